"""Which decoder architectures of the installed transformers are served, and how: the table of docs/models.md.

    python tests/support/model_survey.py            # print what has changed against the committed table
    python tests/support/model_survey.py --write    # write docs/models.md's table
    python tests/support/model_survey.py llama phi3 # these alone, with reasons in full

Every architecture that AutoModelForCausalLM knows is built small, with limits of a few dozen tokens, wrapped, given
sequences on both sides of every limit, differentiated, and sampled from. Nothing is taken from the probe's own verdict:
hidden states, gradients and the sampler's log-probabilities are compared with the model's own logits, one sequence at a
time, here.
"""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from bandit_rft import ops
from bandit_rft.model import Policy, UnsupportedModelError
from bandit_rft.model.probe import describe
from bandit_rft.model.twin import _spread
from bandit_rft.rollout import RolloutEngine, sequence_ids

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- survey -->", "<!-- /survey -->"
#: What makes a default config small, by the names that configs use; each is taken where the config has it.
SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "n_embd": 32, "d_model": 32, "intermediate_size": 48, "ffn_dim": 48,
    "n_inner": 48, "d_ff": 48, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 20, "n_group": 1, "topk_group": 1,
    "max_position_embeddings": 96, "n_positions": 96, "n_ctx": 96, "max_seq_len": 96, "sliding_window": 30,
    "window_size": 30, "attention_window_size": 30, "sliding_window_size": 30, "keep_window_size": 30,
    "attention_chunk_size": 32, "local_attention": 30, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16, "chunk_size": 16,
    "state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "lru_width": 32,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_heads": 4, "linear_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97,
    "laurel_rank": 4, "mamba_dt_rank": 4, "time_step_rank": 4, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48,
    "embedding_size": 32, "embedding_dim": 32, "attention_hidden_size": 32, "rotary_dim": 8, "dim_head": 8,
    "dim_ff": 48, "dff": 48, "emb_dim": 32, "d_inner": 48, "d_head": 8, "num_nextn_predict_layers": 0,
    "mamba_headdim": 8, "kv_channels": 8, "attention_head_dim": 8, "dim_model_base": 32, "mamba_d_ssm": 64,
    "n_mamba_heads": 2, "use_mamba_kernels": False, "original_max_position_embeddings": 60, "index_block_size": 8,
    "index_topk_blocks": 2, "relative_max_distance": 30, "block_size": 16, "intermediate_size_mlp": 48,
    "word_embed_proj_dim": 32, "query_pre_attn_scalar": 8, "attention_head_size": 8, "max_target_positions": 96,
    "attn_layer_offset": 1,
    "attn_layer_period": 2, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_blocks": 2,
}  # fmt: skip


class _TooSlow(BaseException):
    pass


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


#: What single architectures need on top, by model_type: a layer that attends beside the recurrent ones.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3},
    "dots3_note": {"num_key_value_heads": 4}, "dots3_note_text": {"num_key_value_heads": 4},
    "qwen2_moe": {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "plbart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "whisper": {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1},
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "ministral": {"head_dim": 8}, "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "dots1": {"n_shared_experts": 1, "num_experts_per_tok": 2}, "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]}, "gemma3n": {"num_kv_shared_layers": 0},
    "gemma3n_text": {"num_kv_shared_layers": 0}, 
    "zamba2": {
        "n_mamba_heads": 8, "layers_block_type": ["linear_attention", "hybrid"], "attention_head_dim": 16,
        "attention_hidden_size": 64, "num_key_value_heads": 4,
    },
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "mpt": {"n_heads": 4}, "openai-gpt": {"n_head": 4}, 
    "deepseek_v2": {"num_key_value_heads": 4, "head_dim": 8, "num_experts_per_tok": 2},
}  # fmt: skip
#: What is tried in turn until a model computes: latent attention has no groups of heads, some derive a head's width.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": 16, "qk_head_dim": 16},
    {"head_dim": None, "num_key_value_heads": 4, "n_routed_experts": 8, "num_local_experts": 8},
    {"num_key_value_heads": 4, "index_head_dim": 8, "head_dim": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
    {"hidden_size": 64, "embedding_dim": 64, "mamba_n_heads": 16, "mamba_num_heads": 16, "num_heads": 8,
     "attention_head_dim": 32, "mamba_d_ssm": 128},
)  # fmt: skip


def small_config(kind: type, variant: dict[str, Any]) -> Any:
    """A small config of a class: its defaults with the entries of SMALL that it has, layers of every kind."""
    default = kind()
    text = default.get_text_config(decoder=True)
    known = {**text.to_dict(), **{name: 0 for name in text.attribute_map}}
    own = type(text)
    given = {name: value for name, value in {**SMALL, **variant}.items() if known.get(name) is not None}
    given = {name: value for name, value in given.items() if value is not None}
    if "is_decoder" in known:
        given["is_decoder"] = True
    if isinstance(known.get("layer_types"), list):
        kinds = known["layer_types"]
        count = max(2, 1 + max(kinds.index(k) for k in set(kinds)))
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in given:
                given[name] = count
        given["layer_types"] = kinds[:count]
    for name, value in known.items():
        same = name in given or name in text.attribute_map  # another name of the same entry
        if isinstance(value, list) and not same and len(value) == known.get("num_hidden_layers"):
            given[name] = value[: given["num_hidden_layers"]]
    given.update(SPECIAL.get(default.model_type, {}))
    for name in (None, "layer_types"):
        try:
            return own(**{key: value for key, value in given.items() if key != name or name is None})
        except Exception as error:
            problem = error
    raise problem


#: Sequences on both sides of every limit in SMALL: 16, 20, 30, 32, 60 and the length of the table of positions.
LENGTHS = (13, 24, 38, 71, 5, 64)
#: Longest text that is sampled.
TEXT = 75


def build(kind: type) -> Any:
    """A small model with weights that make every part count. Raises whatever transformers raises."""
    problem: Exception | None = None
    for variant in VARIANTS:
        try:
            torch.manual_seed(0)
            with torch.device("meta"):
                size = sum(
                    p.numel() for p in AutoModelForCausalLM.from_config(small_config(kind, variant)).parameters()
                )
            if size > 6_000_000:
                raise ValueError(f"it has {size} parameters")
            model = AutoModelForCausalLM.from_config(small_config(kind, variant))
            _spread(model)
            model = model.float().train(False)
            with torch.no_grad():
                for length in (5, 17):
                    logits = model(input_ids=torch.arange(3, 3 + length)[None], use_cache=False).logits
                    if not bool(logits.isfinite().all()):
                        raise ValueError("its logits are not finite")
            return model
        except Exception as error:
            problem = problem or error
    assert problem is not None
    raise problem


def alone(model: Any, ids: Tensor) -> Tensor:
    """The log-probabilities that the model's own logits give to the tokens of one sequence after the first."""
    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0].double()
    result: Tensor = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return result


def packed(policy: Policy, sequences: list[Tensor]) -> Tensor:
    """The same of all sequences, packed, through the fused head."""
    lengths = [len(ids) - 1 for ids in sequences]
    hidden = policy.hidden_states(torch.cat([ids[:-1] for ids in sequences]), lengths)
    targets = torch.cat([ids[1:] for ids in sequences])
    result: Any = ops.linear_logprobs(hidden, policy.weight, targets, **policy.head_options)
    return result.double()  # type: ignore[no-any-return]


def gradients_of(policy: Policy, values: Tensor) -> dict[str, Tensor]:
    for parameter in policy.model.parameters():
        parameter.grad = None
    (values * torch.linspace(-1, 1, len(values))).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def compare(policy: Policy, model: Any) -> list[str]:
    """What is wrong with a model that was accepted, in words; nothing when all is well."""
    wrong = []
    limit = policy.plan.max_length or 10**6
    generator = torch.Generator().manual_seed(5)
    sequences = [torch.randint(3, 97, (n + 1,), generator=generator) for n in LENGTHS if n <= limit]
    own = torch.cat([alone(model, ids) for ids in sequences])
    got = packed(policy, sequences)
    scale = 1 + float(own.abs().max())
    if not float((got - own).abs().max()) <= 3e-4 * scale:
        wrong.append(f"log-probabilities differ by {float((got - own).abs().max()):.2g}")
    # A gradient is compared as a whole: one element of a router next to a tie says little.
    expected, fused = gradients_of(policy, own), gradients_of(policy, got)
    norm = sum(float(g.double().pow(2).sum()) for g in expected.values()) ** 0.5
    zero = torch.zeros(())
    error = sum(float((fused.get(n, zero) - g).double().pow(2).sum()) for n, g in expected.items()) ** 0.5
    if not error <= 2e-3 * norm:
        wrong.append(f"the gradient differs by {error / norm:.2g}")
    return wrong


def sample(policy: Policy, model: Any) -> tuple[str, list[str]]:
    """(how it is sampled from, what is wrong with that)."""
    longest = min(TEXT, policy.plan.max_length or TEXT)
    limit = RolloutEngine(policy, max_completion_length=1).max_length
    longest = min(longest, limit or longest)
    new = min(12, longest - 2)
    engine = RolloutEngine(policy, max_completion_length=new)
    lengths = [min(n, longest - new) for n in (longest - new, 6, 17, 6, 25)]
    prompts = [[3 + (7 * i + k) % 90 for k in range(n)] for i, n in enumerate(lengths)]
    rollouts = engine.generate(prompts, sequence_ids(0, 1, list(range(10)), 0), seed=3, n=2)
    differences = []
    flat, logprobs, start = rollouts.token_lists(), rollouts.logprobs.double(), 0
    with torch.no_grad():
        for i, tokens in enumerate(flat):
            ids = torch.tensor([*prompts[i // 2], *tokens])
            own = alone(model, ids)[-len(tokens) :]
            differences.append(float((logprobs[start : start + len(tokens)] - own).abs().max()))
            start += len(tokens)
    how = {"ready": "batched", "plain": "batched", None: "batched by length"}[engine.padding]
    how += f", up to {limit} tokens" if limit is not None and limit != policy.plan.max_length else ""
    return how, [] if max(differences) <= 2e-3 else [f"the sampler differs by {max(differences):.2g}"]


def examine(name: str, kind: type) -> tuple[str, str, str]:
    """(architecture, how it is packed, how it is sampled from or why it is not served)."""
    with _at_most(60), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(kind)
        except Exception as error:
            return name, "not built", shortened(error, 80)
        try:
            policy = Policy(model)
        except UnsupportedModelError as error:
            return name, "refused", shortened(error)
        except Exception as error:
            return name, "CRASH", f"{type(error).__name__}: {shortened(error)}"
        packing = describe(policy.plan)
        try:
            wrong = compare(policy, model)
            how, wrong_samples = sample(policy, model)
        except UnsupportedModelError as error:
            return name, "refused", shortened(error) if not wrong else f"WRONG: {'; '.join(wrong)}"
        except Exception as error:
            return name, "CRASH", f"{type(error).__name__}: {shortened(error)}"
        wrong += wrong_samples
        return name, packing, how if not wrong else f"WRONG: {'; '.join(wrong)}"


def shortened(error: Exception, length: int = 220) -> str:
    text = re.sub(r"^\w+: ", "", " ".join(str(error).split())).replace("|", "/")
    text = re.sub(r"\d+\.\d+(e[-+]?\d+)?|\d+e[-+]?\d+", "#", text)  # figures vary with the machine
    return text if len(text) <= length else text[: length - 4] + " ..."


def architectures() -> dict[str, type]:
    kinds = {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}
    return dict(sorted(kinds.items()))


def survey(names: list[str]) -> list[tuple[str, str, str]]:
    """Rows of the table."""
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for name, kind in architectures().items():
        if name in names:
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    rows.append(examine(name, kind))
                except _TooSlow as error:
                    rows.append((name, "not built", str(error)))
    logging.disable(logging.NOTSET)
    return rows


def table(rows: list[tuple[str, str, str]]) -> str:
    """The rows in Markdown, with their count."""
    refused = sum(packing == "refused" for _, packing, _ in rows)
    absent = sum(packing == "not built" for _, packing, _ in rows)
    lines = [
        f"transformers {transformers.__version__}: {len(rows)} architectures, {len(rows) - refused - absent} served, "
        f"{refused} refused, {absent} not built small.",
        "",
        "| model_type | packed | sampled, or why not |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines)


def committed() -> dict[str, tuple[str, str]]:
    """What docs/models.md says of each architecture."""
    lines = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")]
    return {name: (packing, how) for name, packing, how in cells[1:]}


def wrong(rows: list[tuple[str, str, str]]) -> list[str]:
    """Models that were accepted and are wrong, or crash."""
    return [" | ".join(row) for row in rows if row[1] == "CRASH" or row[2].startswith("WRONG")]


def examine_named(name: str) -> tuple[str, str, str]:
    """One row, in a process of its own kind."""
    torch.set_num_threads(1)
    return survey([name])[0]


def main() -> int:
    start = time.time()

    def tell(row: tuple[str, str, str]) -> None:
        print(f"{time.time() - start:6.1f} s", *row, sep=" | ", flush=True)

    names = [name for name in sys.argv[1:] if not name.startswith("--")] or list(architectures())
    torch.set_num_threads(1)
    rows = []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for row in pool.imap(examine_named, names):
            tell(row)
            rows.append(row)
    if "--write" in sys.argv:
        if len(names) < len(architectures()):
            known = {name: (name, *cells) for name, cells in committed().items()}
            rows = [row for _, row in sorted({**known, **{row[0]: row for row in rows}}.items())]
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}")
        return len(wrong(rows))
    known = committed()
    changed = [row for row in rows if known.get(row[0]) != row[1:]]
    print(f"{len(rows)} architectures, {len(changed)} not as docs/models.md says, {len(wrong(rows))} wrong")
    for row in changed:
        print(*row, f"before: {known.get(row[0])}", sep=" | ")
    return len(wrong(rows))


if __name__ == "__main__":
    sys.exit(main())
