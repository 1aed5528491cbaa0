"""What is checked before a model is relied on.

That its head is the whole of what follows its hidden states, and how sequences share a call without seeing each other.
Both on the model itself, with a few short sequences, and on its twin (twin.py), with sequences on both sides of every
length that its config names. Whatever a model does instead of answering counts as a difference.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bandit_rft import ops
from bandit_rft.model.llama_layers import LlamaLayers
from bandit_rft.model.packing import PackingMode, PackingPlan, use_own_attention, use_packed_attention
from bandit_rft.model.split import Split, UnsupportedModelError
from bandit_rft.model.twin import Twin, limits_of, twin_of

logger = logging.getLogger(__name__)

MODES: tuple[PackingMode, ...] = ("varlen", "mask", "padded")


def tolerance_of(hidden: Tensor) -> float:
    """How far two computations of the same hidden states may differ, as a share of the largest."""
    return 1e-4 if torch.finfo(hidden.dtype).eps < 1e-5 else 0.05


@torch.no_grad()
def probe(model: Any, causal_lm: PreTrainedModel, split: Split) -> PackingPlan:
    """Refuse a model that is not hidden states and a head; find out how it packs.

    Args:
        model: the whole model.
        causal_lm: the same without its adapter.
        split: its halves.

    Raises:
        UnsupportedModelError: saying what differs, by how much.
    """
    name = type(model).__name__
    sequences = _sequences(causal_lm, split)
    try:
        alone = [check_head(model, split, ids) for ids in sequences]
        if torch.finfo(split.weight.dtype).eps > 1e-5:
            _check_head_in_float32(causal_lm, split, sequences[0])
    except UnsupportedModelError:
        raise
    except Exception as error:  # what the model's own code may raise is anyone's guess
        raise UnsupportedModelError(
            f"{name}: it cannot be computed as hidden states and a head ({type(error).__name__}: {error})"
        ) from error
    twin = twin_of(causal_lm)
    problems: list[str] = []
    for plan in _plans(causal_lm, twin):
        served = [i for i, ids in enumerate(sequences) if len(ids) <= (plan.max_length or len(ids))]
        if not served:
            continue
        reason = _refusal(causal_lm, split.base, plan, [sequences[i] for i in served], [alone[i] for i in served])
        if reason is None and twin is not None:
            reason = twin_refusal(twin, plan)
        if reason is None:
            return plan
        problems.append(f"{describe(plan)}: {reason}")
        logger.debug("%s packed, %s", name, problems[-1])
        use_own_attention(causal_lm)
    raise UnsupportedModelError(
        f"{name}: sequences cannot share a batch without seeing each other: " + "; ".join(problems[:6])
    )


@torch.no_grad()
def in_core(causal_lm: PreTrainedModel, split: Split, plan: PackingPlan) -> LlamaLayers | None:
    """The model's layers in the compiled core, where it computes them, and gives what the model gives; else None.

    What the plan has found of longer texts, that they go apart or not at all, the core does not know.
    """
    if plan != PackingPlan("varlen"):
        return None
    sequences = _sequences(causal_lm, split)
    lengths, ids = [len(sequence) for sequence in sequences], torch.cat(sequences)
    try:
        layers = LlamaLayers(split.base)
        weights = layers.weights(split.base, lengths)
        if weights is None:
            return None
        own = plan.hidden_states(split.base, ids, lengths)
        found = layers.hidden_states(split.base, weights, ids, lengths)
        difference, scale = float((found - own).abs().max()), float(own.abs().max())
        if not difference <= tolerance_of(own) * scale:
            raise NotImplementedError(f"hidden states differ by {difference:.3g} (of {scale:.3g})")
    except Exception as error:  # anything: the model's own forward remains
        logger.debug("%s is left to its own forward: %s", type(causal_lm).__name__, error)
        return None
    return layers


def describe(plan: PackingPlan) -> str:
    """A plan in a few words."""
    apart = "" if plan.apart is None else f", beyond {plan.apart} tokens apart"
    limit = "" if plan.max_length is None else f", up to {plan.max_length} tokens"
    return f"{plan.mode}{apart}{limit}"


def _sequences(model: PreTrainedModel, split: Split) -> list[Tensor]:
    """Token ids of three short sequences, on the model's device."""
    generator = torch.Generator().manual_seed(0)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 24
    longest = min(24, positions) if positions > 0 else 24  # XLNet's are -1: any
    lengths = [max(2, longest - 13), longest, max(2, longest // 3)]
    device = split.weight.device
    return [torch.randint(0, split.weight.shape[0], (n,), generator=generator).to(device) for n in lengths]


# --- the head ---------------------------------------------------------------------------------------------------------


def check_head(model: Any, split: Split, ids: Tensor) -> Tensor:
    """Hidden states [T, H] of one sequence; refuses a model whose logits are not those of the head on them."""
    name, weight = type(model).__name__, split.weight
    hidden = getattr(split.base(input_ids=ids[None], use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.ndim != 3 or hidden.shape[-1] != weight.shape[1]:
        raise UnsupportedModelError(
            f"{name}: the base model's hidden states have shape {None if hidden is None else list(hidden.shape)}, "
            f"the head expects a width of {weight.shape[1]}"
        )
    logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
    if logits.shape != (len(ids), weight.shape[0]) or not bool(logits.isfinite().all()):
        raise UnsupportedModelError(
            f"{name}: its logits are {list(logits.shape)} for {len(ids)} tokens and a head of {weight.shape[0]}, "
            f"{int((~logits.isfinite()).sum())} of them not finite"
        )
    generator = torch.Generator().manual_seed(len(ids))
    targets = torch.randint(0, logits.shape[-1], (len(ids),), generator=generator).to(ids.device)
    own = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    fused: Any = ops.linear_logprobs(hidden[0].to(weight.dtype), weight, targets, **split.head_options)
    difference = float((fused.double() - own).abs().max())
    # The model rounds each logit to its dtype, we do not; from float32 on the order of summation differs as well.
    epsilon = torch.finfo(weight.dtype).eps
    allowed = (64 if epsilon < 1e-5 else 4) * max(epsilon, 1e-12) * (1 + float(logits.abs().max()))
    if not difference <= allowed:
        raise UnsupportedModelError(_differs(name, split, difference, allowed))
    return hidden[0]  # type: ignore[no-any-return]


def _differs(name: str, split: Split, difference: float, allowed: float) -> str:
    return (
        f"{name}: log-probabilities from hidden states and head (softcap {split.softcap}, logit scale "
        f"{split.logit_scale}) differ from the model's own logits by {difference:.3g}, float rounding explains "
        f"{allowed:.3g}. The model does something to its hidden states or logits that bandit_rft does not know; "
        "training it would optimize another policy."
    )


def _check_head_in_float32(model: PreTrainedModel, split: Split, ids: Tensor) -> None:
    """What a half-precision model does behind its base, with some rows of its head in float32, to float32 rounding.

    In bfloat16 a logit of 8 is known to 0.03: a softcap of 30 hides in that. So the head is replaced for one call by
    256 of its rows in float32, and what comes out of the base by large float32 hidden states.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    rows = torch.linspace(0, split.weight.shape[0] - 1, min(256, split.weight.shape[0]), device=ids.device).long()
    weight = split.weight[rows].float()
    bias = None if split.bias is None else split.bias[rows].float()
    substitute = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    substitute.weight.copy_(weight)
    if bias is not None:
        substitute.bias.copy_(bias)
    hidden = split.base(input_ids=ids[None], use_cache=False).last_hidden_state.float()
    hidden = hidden * (40 / float((hidden[0] @ weight.T * split.logit_scale).abs().max().clamp(min=1e-6)))
    seen = []

    def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
        seen.append(module)
        output.last_hidden_state = hidden
        return output

    handle = split.base.register_forward_hook(replace)
    try:
        model.set_output_embeddings(substitute)  # type: ignore[no-untyped-call]
        own = model(input_ids=ids[None], use_cache=False).logits[0].float()
    except Exception as error:
        logger.debug("%s: its head is not checked in float32: %s", type(model).__name__, error)
        return
    finally:
        handle.remove()
        model.set_output_embeddings(head)  # type: ignore[no-untyped-call]
    if not seen or own.shape != (len(ids), len(rows)):
        logger.debug("%s: its head is not checked in float32: it does not call its base", type(model).__name__)
        return
    logits = (hidden[0] @ weight.T + (0 if bias is None else bias)) * split.logit_scale
    if split.softcap is not None:
        logits = split.softcap * torch.tanh(logits / split.softcap)
    difference, allowed = float((own - logits).abs().max()), 1e-4 * (1 + float(logits.abs().max()))
    if not difference <= allowed:
        raise UnsupportedModelError(_differs(type(model).__name__, split, difference, allowed))


# --- packing ----------------------------------------------------------------------------------------------------------


def _plans(model: PreTrainedModel, twin: Twin | None) -> Iterator[PackingPlan]:
    """What to try, best first."""
    if twin is None:
        # Only the model itself can tell, up to the next limit that is too long for it to be asked.
        beyond = [limit for limit in limits_of(model.config) if limit > 24]
        modes: tuple[PackingMode, ...] = (*MODES, "single")
        yield from (PackingPlan(mode, max_length=min(beyond) if beyond else None) for mode in modes)
        return
    for mode in MODES:
        yield PackingPlan(mode)
    crossed = [limit for limit, scaled in twin.limits.items() if 8 < scaled < len(twin.sequences[-1])]
    for limit in reversed(crossed):
        yield from (PackingPlan(mode, apart=limit) for mode in MODES)
    for limit in reversed(crossed):
        yield from (PackingPlan(mode, max_length=limit) for mode in MODES)
    yield PackingPlan("single")


def twin_refusal(twin: Twin, plan: PackingPlan) -> str | None:
    """Why a plan does not give the twin's hidden states; None where it does."""
    if plan not in twin.verdicts:
        model = twin.fresh()
        scaled = PackingPlan(plan.mode, twin.scaled(plan.apart), twin.scaled(plan.max_length))
        within = [i for i, ids in enumerate(twin.sequences) if len(ids) <= (scaled.max_length or len(ids))]
        order = within[::-1]  # the longest first: what a model remembers of it would show in the others
        base = Split.of(model).base
        twin.verdicts[plan] = _refusal(
            model, base, scaled, [twin.sequences[i] for i in order], [twin.hidden[i] for i in order]
        )
    return twin.verdicts[plan]


@torch.no_grad()
def _refusal(
    model: PreTrainedModel, base: nn.Module, plan: PackingPlan, sequences: list[Tensor], alone: list[Tensor]
) -> str | None:
    """Why a plan does not give each sequence's hidden states; None where it does."""
    tolerance = tolerance_of(alone[0])
    try:
        if plan.mode == "varlen":
            use_packed_attention(model)
            for ids, hidden in zip(sequences[:1], alone[:1], strict=True):  # it attends as before without packing
                own = base(input_ids=ids[None], use_cache=False).last_hidden_state[0]
                if not float((own - hidden).abs().max()) <= tolerance * float(hidden.abs().max()):
                    return "it attends otherwise where its attention function is replaced"
        together = plan.hidden_states(base, torch.cat(sequences), [len(ids) for ids in sequences])
    except Exception as error:  # anything: a model that cannot be asked is not relied on
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    scale = max(float(hidden.abs().max()) for hidden in alone)
    parts = together.split([len(ids) for ids in sequences])
    differences = [float((part - hidden).abs().max()) for part, hidden in zip(parts, alone, strict=True)]
    if not max(differences) <= tolerance * scale or any(d != d for d in differences):
        worst = max(range(len(differences)), key=lambda i: (differences[i] != differences[i], differences[i]))
        return (
            f"hidden states of {len(sequences[worst])} tokens differ by {differences[worst]:.3g} (of {scale:.3g}) from "
            "one sequence at a time"
        )
    return None
