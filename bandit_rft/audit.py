"""What a configuration amounts to before anything runs: batch, normalizer, tokens, memory. No torch here."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from bandit_rft.advantages import ADVANTAGES
from bandit_rft.budget import evaluation_count, evaluation_rollouts, planned_rounds, schedule_rounds
from bandit_rft.config import Config
from bandit_rft.inactive import inactive_keys

NORMALIZERS = {
    "token-mean": "completion tokens of all scored rollouts of the round, zero-advantage ones included",
    "seq-mean-token-sum": "scored rollouts of the round",
    "seq-mean-token-mean": "scored rollouts of the round, after each rollout's own token mean",
    "seq-mean-token-sum-norm": "scored rollouts of the round times objective.norm_length",
}


def design_audit(config: Config, sizes: Mapping[str, int] | None = None) -> Iterator[tuple[str, str]]:
    """(what, its value) lines describing a run; warnings are called "note".

    Args:
        config: checked.
        sizes: rows of each split, as far as they are known.
    """
    sizes = sizes or {}
    o, rollouts = config.objective, config.batch_size * config.num_generations
    each = f"{config.batch_size} queries x {config.num_generations} rollouts"
    steps = config.update.epochs * config.update.minibatches
    yield "one round", f"{each} = {rollouts} rollouts, {steps} optimizer step{'s' if steps > 1 else ''}"
    yield "trained on", trained_on(config)
    if config.rollout.engine == "vllm":
        yield "drawn by", drawn_by(config)
    rounds = planned_rounds(config, sizes.get("train"))
    yield "whole run", f"{rounds:,} rounds, {rounds * rollouts:,} rollouts{budget(config)}"
    yield from _evaluations(config, sizes, rounds, rounds * rollouts)
    course, warmup = schedule_rounds(config, rounds)
    if warmup or config.lr_scheduler_type != "constant":
        falls = f"{config.lr_scheduler_type} to {config.min_lr_ratio:g} of it after round {course:,}"
        held = "constant" if config.lr_scheduler_type == "constant" else falls
        yield "learning rate", f"{config.learning_rate:g} after {warmup:,} rounds of warm-up, then {held}"
    advantage = ADVANTAGES[config.advantage]
    yield "advantage", f"{config.advantage}: {(advantage.function.__doc__ or '').splitlines()[0]}".rstrip(": ")
    yield "normalizer", NORMALIZERS[o.aggregation]
    completion, prompt = rollouts * config.max_completion_length, rollouts * config.max_prompt_length
    yield "tokens a round", f"at most {completion:,} generated, {prompt + completion:,} with prompts in the update"
    in_loss = o.kl_coef and config.kl.where == "loss"
    if in_loss or o.entropy_coef:
        yield "skipping", "off: the KL or entropy term gives every token a gradient"
    else:
        yield "skipping", "rollouts of advantage 0 cost no update (same gradient, same normalizer)"
    if o.kl_coef:
        model = "the model without its adapters" if config.lora.rank else "a frozen copy of the initial model"
        what = "trained" if in_loss else "generated"
        yield "reference model", f"{model}; every {what} token is scored by it ({o.kl} in the {config.kl.where})"
    yield "memory", memory_estimate(config)
    yield from _notes(config, steps)


def _evaluations(config: Config, sizes: Mapping[str, int], rounds: int, trained: int) -> Iterator[tuple[str, str]]:
    """What evaluation costs beside training."""
    names = config.evaluation.splits or list(sizes)
    if not names or not sizes or any(name not in sizes for name in names):
        yield "evaluation", f"{evaluation_count(config, rounds):,} times; the questions are not counted here"
        return
    once = evaluation_rollouts(config, (sizes[name] for name in names))
    times = evaluation_count(config, rounds)
    each = config.evaluation.num_samples + config.evaluation.greedy
    questions = f"{once // max(1, each):,} questions of {', '.join(names)}"
    total = times * once
    ratio = f", {total / trained:.1f} times the {trained:,} of training" if trained else ""
    yield "evaluation", f"{times:,} times {questions} x {each} = {total:,} rollouts{ratio}"
    if total > trained > 0:
        less = "evaluation.max_queries, evaluation.splits and a larger eval_steps make it less"
        yield "note", f"evaluation draws more than training: {less}"


def trained_on(config: Config) -> str:
    """Which rollouts of a round the update sees."""
    parts = ["every scored rollout"]
    if ADVANTAGES[config.advantage].trains_on_first:
        parts = ["the first rollout of each query; the others only estimate its mean and std"]
    if config.rollout.keep:
        parts = [f"{config.rollout.keep} rollouts of each query, those of greatest reward variance"]
    if config.rollout.dynamic_sampling:
        parts.append(f"queries of constant reward replaced, up to {config.rollout.dynamic_sampling} times a round")
    if config.rollout.stop_hopeless:
        every = config.rollout.stop_hopeless
        parts.append(f"a rollout ends once its reward can only be 0, looked at every {every} tokens")
    if config.rollout.mask_truncated:
        parts.append("truncated completions left out")
    if config.replay.capacity:
        r = config.replay
        parts.append(f"{r.ratio:g} replayed for each, {r.sampling} from {r.capacity:,}, correction {r.correction}")
    return "; ".join(parts)


def drawn_by(config: Config) -> str:
    """Which servers draw, and how weights get there."""
    r = config.rollout
    where = ", ".join(r.urls) or "a vLLM server that the run starts"
    push = ("lora" if config.lora.rank else "folder") if r.push == "auto" else r.push
    past = "the run stops" if r.on_logprob_gap == "stop" else "ratios correct for it"
    ahead = "; one round ahead: rollouts are one version old" if r.ahead else ""
    return f"{where}; weights pushed by {push}, {r.canary_prompts} canaries a push, past the gap {past}{ahead}"


def budget(config: Config) -> str:
    """What else may end the run."""
    tokens, seconds = config.max_generated_tokens, config.max_seconds
    return (f", at most {tokens:,} generated tokens" if tokens else "") + (f", {seconds:,.0f} s" if seconds else "")


def _notes(config: Config, steps: int) -> Iterator[tuple[str, str]]:
    o, replayed = config.objective, config.replay.capacity > 0
    uncorrected = replayed and config.replay.correction == "none"
    for text in inactive_keys(config):
        yield "note", text
    of_others = bool(config.rollout.ahead) or config.rollout.on_logprob_gap == "correct"
    if o.kind in ("ppo", "gspo", "cispo") and steps == 1 and not uncorrected and not of_others:
        yield "note", "one update a round: the ratio is 1, so clipping never acts"
    if o.kind == "reinforce" and steps > 1:
        yield "note", "reinforce has no ratio: after a round's first step its gradient is that of an older policy"
    if o.kind == "reinforce" and config.rollout.ahead:
        yield "note", "rollout.ahead with reinforce: rollouts of the policy one round older are trained on uncorrected"
    if o.kind == "reinforce" and uncorrected:
        yield "note", "replay.correction=none with reinforce: old rollouts are trained on as if drawn today; biased"
    if config.queries.order == "learnable":
        chosen = "the reward of a round is that of the queries it chose, not of the training set"
        yield "note", f"queries.order=learnable: {chosen}; it takes rewards in [0, 1]; any other stops the run"
    if ADVANTAGES[config.advantage].unit_interval:
        yield "note", f"advantage={config.advantage} takes rewards in [0, 1]; any other stops the run"
    if ADVANTAGES[config.advantage].memory is not None:
        yield "note", "compares with a query's past: acts from the second epoch on; repeated prompts have pasts apart"
    if config.rollout.mask_truncated and config.reward.length_penalty:
        yield "note", "truncated completions pay the length penalty in their group, but get no gradient themselves"
    if config.advantage == "reward" and o.aggregation == "token-mean":
        yield "note", "token-mean with raw rewards: wrong answers add nothing to the sum, but count in its divisor"
    if config.rollout.top_k or config.rollout.top_p < 1 or config.rollout.min_p:
        yield "note", "top-k/top-p/min-p: the policy drawn from is not the policy trained; its gradient is biased"
    if config.chat_template == "never":
        yield "note", "chat_template=never: a chat model rarely ends its turn on bare prompts, and then earns nothing"
    if config.save_steps == 0:
        yield "note", "save_steps=0: a run that is killed loses everything"


def memory_estimate(config: Config) -> str:
    """Bytes of weights, gradients, AdamW moments, reference and KV cache, from the files of a local model."""
    folder = model_folder(config) or Path(config.model_name_or_path)
    try:
        model = json.loads((folder / "config.json").read_text())
        model = model.get("text_config", model)
        parameters = sum(_parameters(file) for file in folder.glob("*.safetensors"))
        heads = model.get("num_key_value_heads") or model.get("num_attention_heads") or model["n_head"]
        width = model.get("hidden_size") or model["n_embd"]
        head = model.get("head_dim") or width // (model.get("num_attention_heads") or model["n_head"])
        layers = model.get("num_hidden_layers") or model["n_layer"]
    except (OSError, ValueError, KeyError, struct.error):
        return "unknown: the model is not a local folder"
    on_gpu = (config.device or "").startswith("cuda")
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and on_gpu)
    size = 2 if low else 4
    each = size + 12 + (4 + size if low else 0) + (size if config.objective.kl_coef else 0)
    fixed = parameters * (size if config.lora.rank else each)
    rows = min(config.rollout.batch_size, config.batch_size * config.num_generations)
    rows = rows if config.rollout.engine == "embedded" else 0
    cache = 2 * layers * heads * head * size * rows * (config.max_prompt_length + config.max_completion_length)
    what = "weights, gradients, optimizer" + (" and reference" if config.objective.kl_coef else "")
    if config.lora.rank:
        what = "frozen weights, adapters on top"
    return (
        f"{parameters / 1e6:,.1f}M parameters: {shown_bytes(fixed)} for {what}; up to {shown_bytes(cache)} of KV cache "
        "while drawing; activations of one micro-batch come on top, logits do not"
    )


def model_folder(config: Config) -> Path | None:
    """The folder of the configured model; None where it is a name of the hub."""
    if config.model_name_or_path == "arithmetic-base":
        return Path(__file__).parent / "assets" / "arithmetic-base"
    folder = Path(config.model_name_or_path).expanduser()
    return folder if folder.is_dir() else None


def disk_estimate(config: Config, rounds: int, sizes: Iterable[int]) -> tuple[float, int, float] | None:
    """(bytes of a checkpoint, how many there are at once, bytes of rollouts and evaluations at most).

    A checkpoint holds the weights and, in float32, two moments and, of bfloat16 weights, a master copy; of a run with
    adapters these alone, which is taken for nothing. A logged token takes 12 bytes and its text.

    Returns:
        None where the model is not here.
    """
    folder = model_folder(config)
    try:
        parameters = sum(_parameters(file) for file in folder.glob("*.safetensors")) if folder else 0
    except (OSError, ValueError, KeyError, struct.error):
        return None
    if not parameters:
        return None
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and (config.device or "").startswith("cuda"))
    each = 0.0 if config.lora.rank else parameters * float(2 + 8 + 4 if low else 4 + 8)
    saved = 1 + (rounds // config.save_steps if config.save_steps else 0)
    # a new one is whole before the oldest goes
    kept = min(saved, config.save_total_limit + 1) if config.save_total_limit else saved
    logged = rounds // config.log_rollouts_steps if config.log_rollouts_steps else 0
    drawn = logged * config.batch_size * config.num_generations * config.max_completion_length * 16
    text = 4 * config.max_completion_length + 4 * config.max_prompt_length
    evaluated = evaluation_count(config, rounds) * evaluation_rollouts(config, sizes) * text
    return each, kept, float(drawn + evaluated)


def _parameters(file: Path) -> int:
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1
            for extent in entry["shape"]:
                count *= extent
            total += count
    return total


def shown_bytes(count: float) -> str:
    """A number of bytes in a unit of its size."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
