"""The whole method in one file: one rollout a query, a reward of 0 or 1, one update a round.

    python examples/minimal_rl.py                         # the built-in model learns to work out sums; needs no GPU
    python examples/minimal_rl.py --model PATH_OR_NAME    # another causal LM of Hugging Face

A query is the context of a bandit, a completion its arm, and the reward arrives once, at the end. The policy gradient
needs no more than that:

    loss = - sum over rollouts of  reward * log p(completion | query)  /  tokens drawn in the round

Two operations carry it. `linear_sample` draws a token and returns its log-probability from the same pass over the LM
head; `linear_policy_loss` computes the loss and its gradients there. Neither ever holds a [tokens, vocabulary] tensor.

Shapes: B rollouts, P prompt tokens, T completion tokens, H hidden, V vocabulary; N tokens of K rollouts trained on.
"""

import argparse
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bandit_rft import PolicyObjective, linear_policy_loss, linear_sample
from bandit_rft.tasks import Example, load_task
from bandit_rft.tasks.arithmetic import exact_answer

BUILT_IN = str(files("bandit_rft") / "assets" / "arithmetic-base")


class Rollouts(NamedTuple):
    ids: Tensor  # [B, P + T] prompt, padded on the left, and completion
    attended: Tensor  # [B, P + T] 1 for a token, 0 for padding
    drawn: Tensor  # [B, T] bool: the completion, with its end of sequence
    logprobs: Tensor  # [B, T] of the drawn tokens, by the sampler
    rewards: Tensor  # [B]


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), tokenizer


@torch.no_grad()
def roll_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, queries: list[Example], max_tokens: int, seed: int
) -> Rollouts:
    """Draw one completion a query and ask the outcome reward what it is worth."""
    inputs = tokenizer([str(query.prompt) for query in queries], return_tensors="pt", padding=True, padding_side="left")
    ids, attended = inputs.input_ids.to(model.device), inputs.attention_mask.to(model.device)  # [B, P] each
    weight = model.get_output_embeddings().weight  # [V, H]
    sequence_ids = torch.arange(len(queries), device=model.device)  # [B] each row has random numbers of its own
    alive = torch.ones_like(sequence_ids, dtype=torch.bool)  # [B] not ended yet
    tokens, logprobs, drawn, cache = [], [], [], None
    for step in range(max_tokens):
        output = model.base_model(
            input_ids=ids if step == 0 else tokens[-1][:, None],  # [B, P], then [B, 1]
            attention_mask=attended,  # [B, P + step]
            position_ids=positions_of(attended) if step == 0 else positions_of(attended)[:, -1:],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        hidden = output.last_hidden_state[:, -1]  # [B, H]
        at = torch.full_like(sequence_ids, step)  # [B]
        sample = linear_sample(hidden, weight, seed=seed, sequence_ids=sequence_ids, positions=at)
        tokens.append(sample.tokens.where(alive, tokenizer.pad_token_id))  # [B]
        logprobs.append(sample.logprobs)  # [B]
        drawn.append(alive)  # [B]
        attended = torch.cat([attended, alive[:, None].to(attended.dtype)], dim=1)  # [B, P + step + 1]
        alive = alive & (sample.tokens != tokenizer.eos_token_id)
        if not alive.any():
            break
    completion = torch.stack(tokens, dim=1)  # [B, T]
    texts = tokenizer.batch_decode(completion, skip_special_tokens=True)
    rewards = exact_answer([], texts, [query.columns["answer"] for query in queries])  # 0.0 or 1.0 each
    return Rollouts(
        ids=torch.cat([ids, completion], dim=1),
        attended=attended,
        drawn=torch.stack(drawn, dim=1),
        logprobs=torch.stack(logprobs, dim=1),
        rewards=torch.tensor(rewards, device=model.device),
    )


def positions_of(attended: Tensor) -> Tensor:
    """Count the tokens of each row, padding on the left left out: [B, L] -> [B, L]."""
    return (attended.cumsum(dim=1) - 1).clamp(min=0)


def update(model: PreTrainedModel, optimizer: torch.optim.Optimizer, rollouts: Rollouts) -> dict[str, Tensor]:
    """Take one step of REINFORCE: the advantage of a rollout is its reward, nothing subtracted."""
    kept = rollouts.rewards != 0  # [B]; the others have no gradient, so they cost no forward pass
    if not kept.any():
        return {}
    ids, attended, drawn = rollouts.ids[kept], rollouts.attended[kept], rollouts.drawn[kept]  # [K, ...]
    output = model.base_model(input_ids=ids, attention_mask=attended, position_ids=positions_of(attended))
    completions = drawn.shape[1]  # T
    hidden = output.last_hidden_state[:, -completions - 1 : -1]  # [K, T, H] the states that predict the completions
    lengths = drawn.sum(dim=1)  # [K]
    loss, stats, _ = linear_policy_loss(
        hidden[drawn],  # [N, H]
        model.get_output_embeddings().weight,  # [V, H]
        ids[:, -completions:][drawn],  # [N] the tokens that were drawn
        advantages=rollouts.rewards[kept],  # [K]
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(dim=0), (1, 0)).int(),  # [K + 1] where each rollout begins
        objective=PolicyObjective("reinforce"),
        behavior_logprobs=rollouts.logprobs[kept][drawn],  # [N]; for the statistics: their ratio must be 1
        normalizer=float(rollouts.drawn.sum()),  # every token of the round counts, also those left out above
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return stats


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; returns test Pass@1 before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUILT_IN)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=64, help="queries a round, one rollout each")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--max_tokens", type=int, default=48, help="longest completion")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    model, tokenizer = load(args.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    train, test = (load_task("arithmetic", seed=args.seed).splits[split] for split in ("train", "test"))

    pass_at_1 = [roll_out(model, tokenizer, test, args.max_tokens, args.seed).rewards.mean().item()]
    for round in range(args.rounds):
        queries = [train[(round * args.batch_size + i) % len(train)] for i in range(args.batch_size)]  # [B]
        rollouts = roll_out(model, tokenizer, queries, args.max_tokens, seed=args.seed + round + 1)
        stats = update(model, optimizer, rollouts)
        if stats and (round + 1) % 5 == 0:
            reward, length = rollouts.rewards.mean(), rollouts.drawn.sum() / args.batch_size
            print(f"round {round + 1:4d}   reward {reward:.2f}   {length:4.1f} tokens a completion", end="   ")
            print(f"entropy {stats['entropy']:.2f}   ratio to the sampler {stats['ratio_mean']:.4f}", flush=True)
    pass_at_1.append(roll_out(model, tokenizer, test, args.max_tokens, args.seed).rewards.mean().item())
    print(f"test Pass@1: {pass_at_1[0]:.3f} before, {pass_at_1[1]:.3f} after")
    return pass_at_1


if __name__ == "__main__":
    main()
