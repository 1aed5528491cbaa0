"""Decoding of Llama-shaped models in the compiled core (csrc/cpu/drawing.h): one call for many tokens of a batch.

A step of a million-parameter model is 200 operations of a few microseconds, and calling them through modules costs more
than they do; for one sequence, so does calling head, draw and step. The core knows one kind of layer: RMS norms, rotary
positions, grouped-query attention, a gated SiLU. A model built of exactly that is decoded there, on a CPU in float32,
from its own weights; the engine compares both ways before it relies on it. Any other model, and any other device,
decodes through the model's own forward.

What a sequence gets has the same bits whatever it is batched with: no sum runs over the batch's lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from bandit_rft.model import Policy
from bandit_rft.model.llama_layers import (
    layer_weights,
    numbers_of,
    outside_weights,
    plain_modules,
    refuse_unless,
    shape_of,
    window_of,
)
from bandit_rft.ops import backends, checks, head
from bandit_rft.ops.decoder_layer import serves
from bandit_rft.ops.sampling import stream_of
from bandit_rft.rollout.decoding import Batch, Drawn, Source

#: Tokens of a sequence that are drawn in one call, at most: memory for so many is set aside.
AT_ONCE = 32


class NativeDecoder:
    """The core's decoder over a policy's weights: `prefill`, then `draw`, `step` and `select`, as a ModelDecoder does.

    Raises:
        NotImplementedError: saying why, for a model that the core does not compute.
    """

    def __init__(self, policy: Policy):
        self._policy = policy
        self._base: Any = policy.base
        self._shape = shape_of(policy.base)
        self._seen: Any = None
        self._core: Any = None
        self._refresh()

    def computed(self, sequences: int) -> int:
        """How many are computed where so many are decoded: a few, or whole SIMD vectors of them, or halves."""
        computed: int = self._core.computed(sequences)
        return computed

    def ready(self, capacity: int) -> bool:
        """Whether the model still is what the core computes, for texts of up to `capacity` tokens.

        Reads the weights' addresses again if they have moved.
        """
        try:
            self._refresh()
        except (NotImplementedError, AttributeError, ValueError):  # other modules, or of other sizes
            return False
        window = window_of(self._base)
        return window is None or capacity <= window

    def prefill(self, prompts: Sequence[Sequence[int]], room: int, capacity: int) -> Tensor:
        """Start a batch of P prompts, with room for so many sequences and columns; the last hidden states, [P, H].

        Tokens lie side by side in the SIMD lanes, so that a prompt's bits do not depend on the others here either.
        Whoever may have changed the model since the last batch asks `ready` first.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        tokens = torch.tensor([token for prompt in prompts for token in prompt])
        cos, sin = (x[0].contiguous() for x in self._base.rotary_emb(torch.zeros(1), torch.arange(capacity)[None]))
        hidden = torch.empty(len(prompts), self._shape.hidden_size)
        views = (_dl(x) for x in (cos, sin, hidden))
        self._core.prefill(_dl(tokens), _dl(lengths), room, capacity, *views, torch.get_num_threads())
        return hidden

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states [B, H] after one more token each; positions [B] are those in the whole text."""
        hidden = torch.empty(len(tokens), self._shape.hidden_size)
        self._core.step(_dl(tokens), _dl(positions), _dl(hidden), torch.get_num_threads())
        return hidden

    def draw(self, hidden: Tensor, batch: Batch, source: Source, steps: int) -> Drawn:
        """Draw up to `steps` tokens of each sequence (and at most AT_ONCE), with a step after each draw but the last.

        As `ModelDecoder.draw`, by which the arguments are explained; hidden is overwritten.
        """
        steps, count, options = min(steps, AT_ONCE), len(hidden), source.options
        checks.scaling(options["temperature"], options["softcap"], options["logit_scale"], count, "b", hidden)
        checks.filters(options["top_k"], options["top_p"], options["min_p"])
        stream = stream_of(source.seed, batch.ids, batch.positions, hidden)
        weight, bias = source.weight.detach(), options["bias"]
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
        rows = head.chunks(count, len(weight), hidden, copies=1)[0].stop
        logits, going = head.workspace(rows, len(weight), hidden), batch.alive.long()
        tokens = torch.empty((steps, count), dtype=torch.int64)
        logprobs, entropy = torch.empty((2, steps, count))
        steps = self._core.draw(
            _dl(hidden), _dl(weight), None if bias is None else _dl(bias), float(options["temperature"]),
            options["softcap"] or 0.0, options["logit_scale"], int(stream.seed) % 2**64, _dl(stream.sequence_ids),
            _dl(stream.positions), options["top_k"], float(options["top_p"]), float(options["min_p"]),
            _dl(batch.places), source.stop.nonzero()[:, 0].tolist(),
            *map(_dl, (going, logits, tokens, logprobs, entropy)), torch.get_num_threads(),
        )  # fmt: skip
        if backends.is_checked():
            for of_step in logprobs[:steps]:
                checks.finite_values("the logits", of_step)
        batch.alive, batch.positions, batch.places = going.bool(), batch.positions + steps, batch.places + steps - 1
        return Drawn(tokens[:steps], logprobs[:steps], entropy[:steps])

    def select(self, which: Tensor) -> None:
        """Go on with the sequences `which` [b] int64 of the batch: ascending, some left out or some repeated."""
        self._core.select(_dl(which))

    def _refresh(self) -> None:
        weight, device = self._policy.weight, self._policy.device
        served = weight.dtype == torch.float32 and backends.select(device, torch.float32) == "cpu"
        refuse_unless(served, f"it is {weight.dtype} on {device}, or another backend is forced")
        modules = plain_modules(self._base)
        parameters = [p for m in modules for p in m._parameters.values() if p is not None]
        places = [(p.data_ptr(), p.stride()) for p in parameters]
        seen = places, numbers_of(modules), self._base.config.get_text_config().num_hidden_layers
        if seen == self._seen:
            return
        refuse_unless(shape_of(self._base) == self._shape, "it was changed")
        outside, layers = outside_weights(self._base), [layer_weights(layer) for layer in self._base.layers]
        weights = [*outside.values(), *(weight for layer in layers for weight in layer.values())]
        refuse_unless(serves(*weights), "its weights are not plain contiguous float32 in CPU memory")
        self._core = _native().Decoder(_capsules(outside), [_capsules(layer) for layer in layers], *self._shape)
        self._seen = seen


def _capsules(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: None if weight is None else _dl(weight.detach()) for name, weight in weights.items()}


def _native() -> Any:
    return backends.native


def _dl(tensor: Tensor) -> Any:
    return to_dlpack(tensor)
