"""How a model decodes exactly: what is checked before the rollout engine relies on its KV cache.

Sequences are read, some of them twice, decoded token by token, and leave the batch in between; each must get the
hidden states that it gets alone and whole. On the model itself with short prompts, on its twin across every limit that
its config names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from bandit_rft.model import Policy
from bandit_rft.model.packing import use_packed_attention
from bandit_rft.model.probe import tolerance_of
from bandit_rft.model.split import Split, UnsupportedModelError
from bandit_rft.model.twin import Twin, limits_of, twin_of
from bandit_rft.rollout.decoding import ModelDecoder, Padding
from bandit_rft.rollout.static import StaticDecoder
from bandit_rft.transfer import to_device

logger = logging.getLogger(__name__)

#: Tokens of each probe sequence that are decoded, not read.
STEPS = 4
#: What makes a decoder of (base, config, padding).
Making = Callable[[nn.Module, PreTrainedConfig, Padding | None], ModelDecoder]


@dataclass(frozen=True)
class DecodingPlan:
    """How a model decodes exactly.

    Attributes:
        padding: how prompts of different length share a batch; None: they cannot, batches have one length.
        max_length: the longest text, prompt and completion, that is decoded; None: any.
    """

    padding: Padding | None
    max_length: int | None = None


@torch.inference_mode()
def probe_decoding(policy: Policy, base_config: PreTrainedConfig) -> DecodingPlan:
    """The first way to decode that changes nothing.

    Raises:
        UnsupportedModelError: where none gives the hidden states of whole sequences.
    """
    sequences, whole = _short_sequences(policy)
    twin = twin_of(policy.causal_lm)
    problems: list[str] = []
    for plan in _plans(base_config, policy.plan.max_length, twin):
        reason = _refusal(ModelDecoder, policy.base, base_config, plan.padding, sequences, whole)
        if reason is None and twin is not None:
            reason = _twin_refusal(ModelDecoder, twin, plan, policy.plan.mode == "varlen")
        if reason is None:
            if plan.padding is None:
                logger.info("left padding changes what this model computes: prompts are batched by length")
            return plan
        problems.append(reason)
        logger.debug("%s decoding, %s", type(policy.model).__name__, f"{plan}: {reason}")
    raise UnsupportedModelError(
        f"{type(policy.model).__name__}: decoding with its KV cache fails, or gives other hidden states than the whole "
        f"sequence, and the sampler would draw from another policy: {problems[-1]} (of {len(problems)} ways tried)"
    )


@torch.inference_mode()
def probe_static_decoding(policy: Policy, base_config: PreTrainedConfig, plan: DecodingPlan) -> DecodingPlan | None:
    """The longest text that a static cache decodes as `plan` does; None where it decodes none.

    Where a sliding window, or chunks, cannot be told to the model by a mask, texts within it are served.
    """
    sequences, whole = _short_sequences(policy)
    twin = twin_of(policy.causal_lm)
    window = ModelDecoder(policy.base, base_config, plan.padding).window
    limits = [plan.max_length]
    if window is not None and (plan.max_length is None or window < plan.max_length):
        limits.append(window)
    for limit in limits:
        candidate = DecodingPlan(plan.padding, limit)
        short = [i for i, ids in enumerate(sequences) if limit is None or len(ids) <= limit]
        chosen, states = [sequences[i] for i in short], [whole[i] for i in short]
        reason = _refusal(_probed_static, policy.base, base_config, plan.padding, chosen, states)
        if reason is None and twin is not None:
            reason = _twin_refusal(_probed_static, twin, candidate, policy.plan.mode == "varlen")
        if reason is None and (twin is not None or limit is None or limit == window):
            return candidate
        logger.debug("%s, static cache, %s: %s", type(policy.model).__name__, candidate, reason)
    return None


def _probed_static(base: nn.Module, config: PreTrainedConfig, padding: Padding | None) -> StaticDecoder:
    return StaticDecoder(base, config, padding, span=8)  # so that the probe crosses some


def _short_sequences(policy: Policy) -> tuple[list[Tensor], list[Tensor]]:
    """A few random sequences, each [length], and what the model gives for each alone, [length, H]."""
    generator = torch.Generator().manual_seed(1)
    lengths = [3 + STEPS, 7 + STEPS, 5 + STEPS]
    sequences = [torch.randint(0, policy.vocab_size, (n,), generator=generator) for n in lengths]
    whole = policy.hidden_states(torch.cat(sequences).to(policy.device), lengths).split(lengths)
    return sequences, list(whole)


def _plans(config: PreTrainedConfig, max_length: int | None, twin: Twin | None) -> Iterator[DecodingPlan]:
    """What to try, best first."""
    paddings: tuple[Padding | None, ...] = ("ready", "plain", None)
    limits: list[int | None] = [max_length]
    if twin is not None:
        longest = len(twin.sequences[-1])
        crossed = [limit for limit, scaled in twin.limits.items() if 2 * STEPS < scaled < longest]
        limits += [limit for limit in reversed(crossed) if limit < (max_length or limit + 1)]
    else:
        beyond = [limit for limit in limits_of(config) if limit > 24]
        limits = [min(beyond) if beyond else max_length]
    for limit in limits:
        yield from (DecodingPlan(padding, limit) for padding in paddings)


def _twin_refusal(make: Making, twin: Twin, plan: DecodingPlan, packed: bool) -> str | None:
    key = ("decoding", make, plan, packed)
    if key not in twin.verdicts:
        model, longest = twin.fresh(), twin.scaled(plan.max_length)
        if packed:
            use_packed_attention(model)
        within = [
            i for i, ids in enumerate(twin.sequences) if len(ids) > STEPS and (longest is None or len(ids) <= longest)
        ]
        twin.verdicts[key] = _refusal(
            make,
            Split.of(model).base,
            model.config,
            plan.padding,
            [twin.sequences[i] for i in within[::-1]],
            [twin.hidden[i] for i in within[::-1]],
        )
    return twin.verdicts[key]


def _refusal(
    make: Making,
    base: nn.Module,
    config: PreTrainedConfig,
    padding: Padding | None,
    sequences: list[Tensor],
    whole: list[Tensor],
) -> str | None:
    """Why decoding does not give the hidden states `whole` [length, H] of each sequence; None where it does."""
    if not sequences:
        return "no sequence is short enough"
    tolerance = tolerance_of(whole[0]) * max(float(hidden.abs().max()) for hidden in whole)
    everyone = list(range(len(sequences)))
    try:
        for batch in [everyone] if padding is not None else [[i] for i in everyone]:
            got = _decoded(make(base, config, padding), [sequences[i] for i in batch])
            for i, states in zip(batch, got, strict=True):
                expected = whole[i][len(whole[i]) - 1 - STEPS :][: len(states)]
                difference = float((states - expected).abs().max())
                if not difference <= tolerance:
                    return f"hidden states of {len(sequences[i])} tokens differ by {difference:.3g}"
    except Exception as error:  # anything: a model that cannot be asked is not relied on
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def _decoded(decoder: ModelDecoder, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Hidden states [STEPS + 1, H] of each sequence's last tokens; fewer for those at odd places, who leave half way.

    Everyone is there twice up to then, and the second copy is the one that is looked at.
    """
    prompts = [ids[: len(ids) - STEPS].tolist() for ids in sequences]
    device = decoder.device
    count = len(sequences)
    first = decoder.prefill(prompts, 2 * count, max(len(ids) for ids in sequences))
    states: list[list[Tensor]] = [[first[i]] for i in range(count)]
    rows = torch.arange(count, device=device).repeat_interleave(2)
    decoder.select(rows)
    for step in range(STEPS):
        if step == STEPS // 2:
            keep = to_device([i for i in range(2 * count) if i % 2 == 0 and (i // 2 % 2 == 0)], device)
            decoder.select(keep)
            rows = rows[keep]
        places = [len(prompts[i]) + step for i in rows.tolist()]
        tokens = torch.stack([sequences[i][place] for i, place in zip(rows.tolist(), places, strict=True)]).to(device)
        hidden = decoder.step(tokens, to_device(places, device))
        for row, i in enumerate(rows.tolist()):
            if len(rows) < 2 * count or row % 2:
                states[i].append(hidden[row])
    return [torch.stack(chain) for chain in states]
