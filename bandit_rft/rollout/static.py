"""Decoding steps over a KV cache of fixed place and size, so that a step can be captured and replayed.

A replayed step sees the addresses, the shapes and the host's numbers of the step that was captured. So whatever changes
from step to step (the column that is written, the columns that are seen) is on the device, and a step reads the first
`span` columns, of which the mask hides those that are padding, to come, or out of a sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bandit_rft.rollout.decoding import ModelDecoder, Padding

#: Columns by which a step's view of the cache grows: one captured step for each. A multiple of 8, as GPU kernels for
#: attention want a mask's rows aligned.
SPAN = 256


@dataclass
class _Shared:
    """What all layers of a cache have in common."""

    rows: int
    capacity: int
    column: Tensor  # int64 [1] on the device: the column that a step writes
    span: int = 0  # columns that a step reads
    reading: bool = False  # prompts, into the columns from 0 on


class StaticLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer whose memory stays where it is from the first prompt on."""

    is_sliding = False  # everything is kept; a sliding window is the mask's business

    def __init__(self, shared: _Shared):
        super().__init__()  # type: ignore[no-untyped-call]
        self.shared = shared

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [b, heads, tokens, d] of keys and values; what this step reads."""
        shared, batch = self.shared, key_states.shape[0]
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            room = ((shared.rows, x.shape[1], shared.capacity, x.shape[3]) for x in (key_states, value_states))
            self._k, self._v = (key_states.new_zeros(shape) for shape in room)
        if shared.reading:
            for memory, states in ((self._k, key_states), (self._v, value_states)):
                memory[:batch, :, : states.shape[2]].copy_(states)
            self.keys, self.values = key_states, value_states
        else:
            for memory, states in ((self._k, key_states), (self._v, value_states)):
                memory[:batch].index_copy_(2, shared.column, states)
            self.keys, self.values = (memory[:batch, :, : shared.span] for memory in (self._k, self._v))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens so far, as far as the host may know: a step takes every column it reads but its own as such."""
        return 0 if self.shared.reading else self.shared.span - 1

    def clear(self, rows: int) -> None:
        """Zeros for so many sequences: a hidden column still takes part, with weight 0, and 0 * NaN is NaN."""
        if self.is_initialized:
            self._k[:rows].zero_()
            self._v[:rows].zero_()

    def batch_select_indices(self, indices: Tensor, columns: int | None = None) -> None:
        """Go on with these sequences, of which `columns` are in use."""
        for memory in (self._k, self._v):
            memory[: len(indices), :, :columns].copy_(memory[:, :, :columns].index_select(0, indices))


def static_cache_serves(device_type: str, padding: Padding | None, plain_layers: bool) -> bool:
    """Whether decoding goes over a static cache where a probe agrees.

    Only launches are saved, of which a CPU has none; there the cache that grows reads less.

    Args:
        device_type: of the model, such as "cuda".
        padding: how the model takes prompts of several lengths; None: not at all, then no mask can hide columns either.
        plain_layers: whether the model's cache is keys and values alone.
    """
    return device_type == "cuda" and padding is not None and plain_layers


def has_plain_cache(config: PreTrainedConfig) -> bool:
    """Whether the cache of such a model is keys and values alone."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


class StaticDecoder(ModelDecoder):
    """Decodes as ModelDecoder does; a step is `advance` on the host, then `forward` on the device alone.

    Args:
        base: what gives the hidden states.
        config: of the model.
        padding: how what a step does not see is hidden.
        span: columns by which a step's view of the cache grows.

    Attributes:
        memory: a number that changes when the cache moves: steps captured before are void.
    """

    def __init__(self, base: nn.Module, config: PreTrainedConfig, padding: Padding | None, *, span: int = SPAN):
        super().__init__(base, config, padding)
        self.memory, self._span_step, self._used = 0, span, 0
        layers = DynamicCache(config=config).layers
        self._windows: set[int | None] = {getattr(layer, "sliding_window", None) for layer in layers}
        self._shared = _Shared(0, 0, torch.zeros(1, dtype=torch.int64, device=self.device))
        self._static: DynamicCache | None = None

    @property
    def span(self) -> int:
        """Columns that the present step reads."""
        return self._shared.span

    def advance(self) -> None:
        """The host's part of a step: one more column is in use."""
        self._used += 1
        self._shared.span = _rounded_up(self._used, self._span_step)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        """The device's part of a step: last hidden states [b, H] after one more token each, at `places` [b]."""
        self._shared.column.add_(1)
        return self._forward(tokens[:, None], places[:, None], self._seen(len(tokens)))

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states [b, H] after one more token each; positions [b] are those in the whole text."""
        self.advance()
        return self.forward(tokens, positions)

    def select(self, keep: Tensor) -> None:
        """Go on with the sequences `keep` [b] int64, in the first rows of the same memory."""
        assert self._static is not None
        for layer in self._static.layers:
            assert isinstance(layer, StaticLayer)
            layer.batch_select_indices(keep, self._used)
        self._first[: len(keep)].copy_(self._first[keep])

    def _empty_cache(self, room: int, capacity: int) -> DynamicCache:
        if not has_plain_cache(self._config) or self._padding is None:
            raise NotImplementedError("its cache has other layers than keys and values, or it takes no mask")
        shared, capacity = self._shared, _rounded_up(capacity, self._span_step)
        if self._static is None or room > shared.rows or capacity > shared.capacity:
            shared.rows, shared.capacity = max(room, shared.rows), max(capacity, shared.capacity)
            self._static = DynamicCache(config=self._config)
            self._static.layers[:] = [StaticLayer(shared) for _ in self._static.layers]
            self._first = torch.zeros(shared.rows, dtype=torch.int64, device=self.device)
            self._numbers = torch.arange(shared.capacity, device=self.device)
            self.memory += 1
        for layer in self._static.layers:
            assert isinstance(layer, StaticLayer)
            layer.clear(room)
        shared.reading = True
        return self._static

    def _start(self, lengths: Tensor, width: int, capacity: int, dtype: torch.dtype, padded: bool) -> None:
        self._shared.reading, self._used, self._dtype = False, width, dtype
        self._shared.column.fill_(width - 1)
        self._first.zero_()  # rows without a sequence see something, too: nothing is not a number
        self._first[: len(lengths)].copy_(width - lengths)
        self.in_window = self.window is None or capacity <= self.window

    def _seen(self, rows: int) -> Tensor | dict[str, Tensor]:
        """The mask of a step: ready ones by the kind of layer where a window hides something, else one for all."""
        columns, column = self._numbers[: self.span], self._shared.column
        seen = (columns >= self._first[:rows, None]) & (columns <= column)
        if self._padding == "plain":
            return seen.long()
        if self.in_window:
            return self._ready(seen)
        sliding = [window for window in self._windows if window is not None]
        if len(sliding) != 1:
            raise NotImplementedError(f"its layers have the windows {self._windows}")
        masks = {"sliding_attention": self._ready(seen & (columns > column - sliding[0]))}
        if len(self._windows) == 1:
            return masks["sliding_attention"]
        return masks | {"full_attention": self._ready(seen)}

    def _ready(self, seen: Tensor) -> Tensor:
        zeros = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device)
        return zeros.masked_fill_(~seen, -torch.inf)[:, None, None]


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
