"""What a configuration amounts to before anything runs: batch, normalizer, tokens, memory. No torch here."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from bandit_rft.config import Config

NORMALIZERS = {
    "token-mean": "completion tokens of all scored rollouts of the round, zero-advantage ones included",
    "seq-mean-token-sum": "scored rollouts of the round",
    "seq-mean-token-mean": "scored rollouts of the round, after each rollout's own token mean",
    "seq-mean-token-sum-norm": "scored rollouts of the round times objective.norm_length",
}


def design_audit(config: Config) -> Iterator[tuple[str, str]]:
    """(what, its value) lines describing a run; warnings are called "note"."""
    o, rollouts = config.objective, config.batch_size * config.num_generations
    each = f"{config.batch_size} queries x {config.num_generations} rollouts"
    yield "one round", f"{each} = {rollouts} rollouts, 1 optimizer step"
    yield "whole run", f"{config.max_rounds:,} rounds, {config.max_rounds * rollouts:,} rollouts"
    yield "advantage", config.advantage
    yield "normalizer", NORMALIZERS[o.aggregation]
    completion, prompt = rollouts * config.max_completion_length, rollouts * config.max_prompt_length
    yield "tokens a round", f"at most {completion:,} generated, {prompt + completion:,} with prompts in the update"
    if o.kl_coef or o.entropy_coef:
        yield "skipping", "off: the KL or entropy term gives every token a gradient"
    else:
        yield "skipping", "rollouts of advantage 0 cost no update (same gradient, same normalizer)"
    if o.kl_coef:
        yield "reference model", f"a frozen copy of the initial model; every trained token is scored by it ({o.kl})"
    yield "memory", memory_estimate(config)
    if o.kind in ("ppo", "gspo", "cispo"):
        yield "note", "one update a round: the ratio is 1, so clipping never acts"
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
    folder = Path(config.model_name_or_path)
    if config.model_name_or_path == "arithmetic-base":
        folder = Path(__file__).parent / "assets" / "arithmetic-base"
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
    low = config.dtype != "float32"
    size = 2 if low else 4
    fixed = parameters * (size + 12 + (4 + size if low else 0) + (size if config.objective.kl_coef else 0))
    rows = min(config.rollout.batch_size, config.batch_size * config.num_generations)
    cache = 2 * layers * heads * head * size * rows * (config.max_prompt_length + config.max_completion_length)
    return (
        f"{parameters / 1e6:,.1f}M parameters: {_bytes(fixed)} for weights, gradients, optimizer"
        f"{' and reference' if config.objective.kl_coef else ''}; up to {_bytes(cache)} of KV cache while drawing; "
        "activations of one micro-batch come on top, logits do not"
    )


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


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
