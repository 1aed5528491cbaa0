"""Make a small base model with mixed habits, trained on demonstrations of the built-in tasks.

Of its demonstrations 70% answer at once, which is mostly wrong; the others work step by step, which even so small a
model mostly gets right. It imitates both in the proportion it saw them, so that there is something for an outcome
reward to teach. The first `worked_steps` show no answer at once: the skill takes far longer to learn than the habit.

At once is a guess: for arithmetic a number near the answer, for countdown some expression of the given numbers. No
demonstration shows a question of a task's test side.

    python examples/warm_start.py --output_dir bandit_rft/assets/arithmetic-base

The same arguments and torch on the same kind of machine and number of threads give the same weights.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from bandit_rft.tasks import Example, arithmetic, collate, countdown, load_task

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
ALPHABETS = {"arithmetic": arithmetic.ALPHABET, "countdown": countdown.ALPHABET}
WORKED = {"arithmetic": "(", "countdown": ","}  # what a completion with steps holds and one without does not


def make_tokenizer(tasks: list[str]) -> PreTrainedTokenizerFast:
    """One token a character of the tasks, nothing added in front or behind."""
    tokens = [PAD, EOS, UNKNOWN, *dict.fromkeys("".join(ALPHABETS[task] for task in tasks))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=256,
    )


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A float32 model of random weights with tied embeddings, or the one that --base names."""
    if args.base is not None:
        return AutoModelForCausalLM.from_pretrained(args.base, attn_implementation="sdpa").float().train()
    config = AutoConfig.for_model(
        args.architecture,
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.key_value_heads or args.heads,
        head_dim=args.hidden_size // args.heads,
        rms_norm_eps=1e-6,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    torch.manual_seed(args.seed)
    return AutoModelForCausalLM.from_config(config).float()


def demonstrations(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield (question, completion), both habits of all tasks, without end."""
    rng, shown = random.Random(args.seed), 0
    while True:
        at_once = args.at_once if shown >= args.worked_steps * args.batch_size else 0.0
        show = show_arithmetic if rng.choice(args.tasks) == "arithmetic" else show_countdown
        yield show(rng, args, at_once)
        shown += 1


def show_arithmetic(rng: random.Random, args: argparse.Namespace, at_once: float) -> tuple[str, str]:
    """Draw a question of the train side; a guess of its answer or the steps to it."""
    while True:
        question = arithmetic.make_question(rng, rng.choice(args.kinds), rng.choice(args.terms), args.digits)
        if not arithmetic.is_held_out(question):
            break
    worked = arithmetic.work_out(question)
    guess = int(arithmetic.final_answer(worked)) + rng.randint(-args.guess_error, args.guess_error)
    return question, str(guess) if rng.random() < at_once else worked


def show_countdown(rng: random.Random, args: argparse.Namespace, at_once: float) -> tuple[str, str]:
    """Draw a question of the train side; a guess or a solution in steps."""
    dial = countdown.Options(max_number=args.max_number)
    while True:
        numbers, way = countdown.make_question(rng, dial, dial.numbers)
        if not countdown.is_held_out(numbers, way.value):
            break
    question, guess = countdown.question_text(numbers, way.value), None
    if rng.random() >= at_once:
        return question, way.steps
    while guess is None:
        guess = countdown.combine(rng, numbers, dial.operators)
    return question, guess.expression


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton-Schulz steps (Jordan et al. 2024), for matrices alone.

    In float32, matrices of one shape together: torch.optim.Muon rounds to bfloat16, which a CPU only emulates. On
    this task it reaches the same loss in about half of AdamW's steps.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), params in by_shape.items():
                updates = []
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                x = torch.stack(updates)
                if rows > columns:
                    x = x.mT
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
                if rows > columns:
                    x = x.mT
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for p, update in zip(params, x, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def train(args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Minimize the cross-entropy of the completions, end of sequence included."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=args.learning_rate, weight_decay=args.weight_decay),
        torch.optim.AdamW(others, lr=args.adam_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def schedule(step: int) -> float:
        """Linear warm-up, then a linear decay to 0."""
        return min((step + 1) / args.warm_up_steps, (args.steps - step) / max(1, args.steps - args.warm_up_steps))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    source = demonstrations(args)
    start, running = time.perf_counter(), 0.0
    for step in range(1, args.steps + 1):
        batch = []
        for _ in range(args.batch_size):
            question, completion = next(source)
            batch.append((tokenizer.encode(question), [*tokenizer.encode(completion), tokenizer.eos_token_id]))
        batch.sort(key=lambda pair: len(pair[0]) + len(pair[1]))  # micro-batches of like lengths: little padding
        total = sum(len(completion) for _, completion in batch)
        for first in range(0, args.batch_size, args.micro_batch_size):
            micro_batch = batch[first : first + args.micro_batch_size]
            width = max(len(question) + len(completion) for question, completion in micro_batch)
            ids = torch.full((len(micro_batch), width), tokenizer.pad_token_id)
            labels = torch.full((len(micro_batch), width), -100)
            for row, (question, completion) in enumerate(micro_batch):
                end = len(question) + len(completion)
                ids[row, :end] = torch.tensor(question + completion)
                labels[row, len(question) : end] = torch.tensor(completion)
            # Padding is on the right and attention causal, so no attention mask is needed.
            logits = model(input_ids=ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / total).backward()
            running += loss.item() / total
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if step % args.log_steps == 0 or step == args.steps:
            taken = args.log_steps if step % args.log_steps == 0 else step % args.log_steps
            print(f"step {step:6d}  loss {running / taken:.4f}  {time.perf_counter() - start:6.0f} s", flush=True)
            running = 0.0
        if step % args.eval_steps == 0 or step == args.steps:
            report(args, model, tokenizer)
            save(args.output_dir, model, tokenizer)


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a class name that version 4 does not know; both know this one.
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: list[Example],
    max_new_tokens: int,
    sample: bool,
) -> list[str]:
    """Complete each prompt, sampled at temperature 1 or greedily."""
    questions = [str(example.prompt) for example in examples]
    by_length = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    completions = [""] * len(questions)
    model.eval()
    for first in range(0, len(questions), 256):
        chosen = by_length[first : first + 256]
        inputs = tokenizer([questions[i] for i in chosen], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=sample, top_k=0 if sample else None)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            completions[i] = text
    model.train()
    return completions


def report(args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print, on each task's test side, Pass@1 and greedy accuracy, and each habit's frequency and accuracy."""
    options = {
        "arithmetic": {"kinds": args.kinds, "digits": args.digits},
        "countdown": {"max_number": args.max_number},
    }
    for name in args.tasks:
        task = load_task(name, seed=args.seed, options=options[name])
        reward = task.rewards[0].load()
        for split, examples in task.splits.items():
            if split == "train":
                continue
            state = torch.get_rng_state()
            torch.manual_seed(args.seed)
            sampled = complete(model, tokenizer, examples, args.max_new_tokens, sample=True)
            torch.set_rng_state(state)
            scores = reward([], sampled, **collate(examples))
            right: dict[str, list[float]] = {"at once": [], "worked": []}
            for text, score in zip(sampled, scores, strict=True):
                right["worked" if WORKED[name] in text else "at once"].append(score)
            greedy = reward([], complete(model, tokenizer, examples, args.max_new_tokens, False), **collate(examples))
            habits = ", ".join(
                f"{habit} {len(hits) / len(examples):.2f} of the time, right {sum(hits) / max(1, len(hits)):.2f}"
                for habit, hits in right.items()
            )
            print(
                f"  {name} {split}: Pass@1 {sum(scores) / len(scores):.3f}, greedy {sum(greedy) / len(greedy):.3f}, "
                f"{sum(map(len, sampled)) / len(sampled):.1f} characters; {habits}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="go on from a model made here, instead of random weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--architecture", choices=["llama", "qwen3", "olmo2"], default="llama")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--intermediate_size", type=int, default=312)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--key_value_heads", type=int, help="fewer than heads: grouped-query attention")
    parser.add_argument("--tasks", nargs="+", choices=list(ALPHABETS), default=["arithmetic"])
    parser.add_argument("--at_once", type=float, default=0.7, help="share of answers at once, after worked_steps")
    parser.add_argument("--guess_error", type=int, default=5, help="an answer at once is at most this far off")
    parser.add_argument("--kinds", nargs="+", choices=arithmetic.KINDS, default=list(arithmetic.KINDS))
    parser.add_argument("--terms", nargs="+", type=int, default=[2, 3, 3, 3, 4, 5], help="one is drawn for a question")
    parser.add_argument("--digits", type=int, default=2)
    parser.add_argument("--max_number", type=int, default=20, help="the largest number given in countdown")
    parser.add_argument("--steps", type=int, default=1250)
    parser.add_argument("--worked_steps", type=int, default=950, help="the first of these show no answer at once")
    parser.add_argument("--batch_size", type=int, default=256, help="demonstrations a step")
    parser.add_argument("--micro_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=0.02, help="of the matrices")
    parser.add_argument("--adam_learning_rate", type=float, default=3e-3, help="of embeddings and norms")
    parser.add_argument("--warm_up_steps", type=int, default=100)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--log_steps", type=int, default=100)
    parser.add_argument("--eval_steps", type=int, default=350)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer(args.tasks)
    model = make_model(args, tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(args, model, tokenizer)
    print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main()
