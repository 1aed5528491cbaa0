"""Decoding through a model's own forward: prefill, draws with a step after each, sequences that leave.

The KV cache is allocated once and written in place where its layers allow it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bandit_rft import ops
from bandit_rft.transfer import to_device

#: How a model is told which positions are padding: a ready additive mask, or the plain [B, length] one.
Padding = Literal["ready", "plain"]


class Source(NamedTuple):
    """What tokens are drawn from, and how.

    Attributes:
        weight: [V, H] of the head.
        options: the head's and the sampling's, as `ops.linear_sample` takes them.
        seed: of all streams.
        stop: bool [V], tokens that end a completion.
        check_every: draws from one look at how many sequences go on to the next.
    """

    weight: Tensor
    options: dict[str, Any]
    seed: int
    stop: Tensor
    check_every: int


class Drawn(NamedTuple):
    """[steps, b] each; after a sequence's stop token they mean nothing."""

    tokens: Tensor
    logprobs: Tensor
    entropy: Tensor


@dataclass
class Batch:
    """The sequences that are decoded together, [b] each.

    Attributes:
        rows: which of the call's completions they are.
        ids: their random streams.
        positions: in the completion, of the token that is drawn next.
        places: the same, in the whole text.
        alive: whether they go on.
    """

    rows: Tensor
    ids: Tensor
    positions: Tensor
    places: Tensor
    alive: Tensor

    def keep(self, which: Tensor) -> None:
        """Go on with these of them."""
        self.rows, self.ids, self.positions = self.rows[which], self.ids[which], self.positions[which]
        self.places, self.alive = self.places[which], self.alive[which]


class InPlaceLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer with room for the whole completion from the start: one copy a step instead of a concatenation."""

    is_sliding = False  # everything is kept; a sliding window is the mask's business

    def __init__(self, capacity: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.length = capacity, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, heads, tokens, d] of keys and values; all of them so far."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            # zeros: a masked column still takes part in the product, with weight 0, and 0 * NaN is NaN
            room = ((*x.shape[:2], self.capacity, x.shape[3]) for x in (key_states, value_states))
            self._k, self._v = (key_states.new_zeros(shape) for shape in room)
        start, self.length = self.length, self.length + key_states.shape[2]
        self._k.narrow(2, start, key_states.shape[2]).copy_(key_states)
        self._v.narrow(2, start, value_states.shape[2]).copy_(value_states)
        self.keys, self.values = self._k.narrow(2, 0, self.length), self._v.narrow(2, 0, self.length)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these sequences."""
        if not self.is_initialized:
            return
        # Only the part in use is copied: early in a completion most of the room is still empty.
        for name in ("_k", "_v"):
            old = getattr(self, name)
            new = old.new_zeros((len(indices), *old.shape[1:]))
            new.narrow(2, 0, self.length).copy_(old.narrow(2, 0, self.length).index_select(0, indices))
            setattr(self, name, new)
        self.keys, self.values = self._k.narrow(2, 0, self.length), self._v.narrow(2, 0, self.length)


class ModelDecoder:
    """Decodes a batch through the model's own forward, over its KV cache: `prefill`, then `draw`, `step` and `select`.

    Args:
        base: what gives the hidden states.
        config: of the model.
        padding: how padding is hidden; None where the prompts of a batch must have one length.
    """

    def __init__(self, base: nn.Module, config: PreTrainedConfig, padding: Padding | None):
        self._base, self._config, self._padding = base, config, padding
        parameters = inspect.signature(base.forward).parameters
        # State-space models call their cache by another name; few models take no positions.
        self._cache_argument = "cache_params" if "cache_params" in parameters else "past_key_values"
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._takes_positions = anything or "position_ids" in parameters
        text = config.get_text_config()
        windows = [getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)]
        self.window = min((w for w in windows if w), default=None)
        self.device = next(base.parameters()).device
        self._mask: Tensor | None = None
        self._columns = 0

    def prefill(self, prompts: Sequence[Sequence[int]], room: int, capacity: int) -> Tensor:
        """Start a batch of P prompts, left-padded, with that many columns; the last hidden state of each, [P, H]."""
        device = self.device
        self._cache = self._empty_cache(room, capacity)
        width = max(len(prompt) for prompt in prompts)
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[width - len(prompt) :] = prompt
        lengths = to_device([len(prompt) for prompt in prompts], device)
        places = torch.arange(width, device=device) - (width - lengths)[:, None]
        padded = any(len(prompt) < width for prompt in prompts)
        hidden = self._forward(
            to_device(ids, device), places.clamp(min=0), self._prompt_mask(places, capacity) if padded else None
        )
        self._start(lengths, width, capacity, hidden.dtype, padded)
        return hidden

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states [b, H] after one more token each; positions [b] are those in the whole text."""
        self._columns += 1
        mask = self._mask[..., : self._columns] if self._mask is not None else None
        return self._forward(tokens[:, None], positions[:, None], mask)

    def draw(self, hidden: Tensor, batch: Batch, source: Source, steps: int) -> Drawn:
        """Draw up to `steps` tokens of each sequence, with a step after each draw but the last.

        Fewer, where so many sequences have ended that it is worth to go on without them (`is_idle`).

        Args:
            hidden: [b, H], the last hidden states.
            batch: the sequences; positions, places and who is alive are brought up to date.
            source: what is drawn from.
            steps: at least 1.
        """
        drawn: list[Drawn] = []
        while True:
            sample = ops.linear_sample(
                hidden, source.weight, seed=source.seed, sequence_ids=batch.ids, positions=batch.positions,
                **source.options,
            )  # fmt: skip
            # of a float64 model they are float64
            drawn.append(Drawn(sample.tokens, sample.logprobs.float(), sample.entropy.float()))
            batch.positions = batch.positions + 1
            batch.alive = batch.alive & ~source.stop[sample.tokens]
            if len(drawn) == steps:
                break
            if len(drawn) % source.check_every == 0 and is_idle(self, int(batch.alive.sum()), len(hidden)):
                break
            hidden = self.step(sample.tokens, batch.places)
            batch.places = batch.places + 1
        return Drawn(*(torch.stack(values) for values in zip(*drawn, strict=True)))

    def computed(self, sequences: int) -> int:
        """How many are computed where so many are decoded: all that is asked for, and no more."""
        return sequences

    def select(self, keep: Tensor) -> None:
        """Go on with the sequences `keep` [b] int64."""
        self._mask = self._mask[keep] if self._mask is not None else None
        for layer in self._cache.layers:
            state: Any = layer
            # A layer with a recurrent state may inherit a selection that knows its keys and values alone.
            recurrent = hasattr(state, "recurrent_states") or not hasattr(state, "batch_select_indices")
            (state.reorder_cache if recurrent else state.batch_select_indices)(keep)

    def _empty_cache(self, room: int, capacity: int) -> DynamicCache:
        return _cache(self._config, capacity)

    def _start(self, lengths: Tensor, width: int, capacity: int, dtype: torch.dtype, padded: bool) -> None:
        """After the prompts, of these lengths [P], in `width` columns."""
        self._columns = width
        self._mask = self._decoding_mask(lengths, width, capacity, dtype) if padded else None

    def _forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Any) -> Tensor:
        options: dict[str, Any] = {self._cache_argument: self._cache}
        if self._takes_positions:
            options["position_ids"] = position_ids
        output = self._base(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **options)
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden

    def _prompt_mask(self, places: Tensor, capacity: int) -> Tensor:
        """What hides the padding from prompts whose tokens have these places [P, width], negative where there is none.

        A ready mask is additive [P, 1, width, width]. From the plain one transformers would make the same, but first
        ask the device whether anything is hidden at all.
        """
        seen = places >= 0
        if self._padding == "plain" or (self.window is not None and self.window < capacity):
            return seen.long()
        column = torch.arange(seen.shape[1], device=seen.device)
        # Padding sees itself: a row that sees nothing is not a number.
        ready = (column <= column[:, None]) & (seen[:, None] | (column == column[:, None]))
        zeros = torch.zeros(ready.shape, dtype=next(self._base.parameters()).dtype, device=seen.device)
        return zeros.masked_fill_(~ready, -torch.inf)[:, None]

    def _decoding_mask(self, prompt_lengths: Tensor, width: int, capacity: int, dtype: torch.dtype) -> Tensor:
        """What hides the padding of the prompts: additive [B, 1, 1, capacity] where the model takes a ready mask.

        Others get [B, capacity] and build their own at each step; so does a sliding window, which a ready mask would
        override.
        """
        seen = torch.arange(capacity, device=prompt_lengths.device) >= (width - prompt_lengths)[:, None]
        if self._padding == "plain" or (self.window is not None and self.window < capacity):
            return seen.long()
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None, None]


def is_idle(decoder: Any, remaining: int, count: int) -> bool:
    """Whether so much of a batch of `count` idles, `remaining` of it being alive, that the others go on alone.

    Moving the cache costs about as much as one step, so it pays once a quarter of the batch is idle.
    """
    return bool(decoder.computed(remaining) <= 0.75 * decoder.computed(count))


def _cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """An empty cache of `capacity` columns, written in place where its layers allow it."""
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            cache.layers[i] = InPlaceLayer(capacity)
    return cache


def check_arguments(prompts: Sequence[Sequence[int]], ids: Tensor, n: int, vocabulary: int) -> None:
    """What an engine is asked for: n completions of each prompt, a random stream each.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(n, bool) or not isinstance(n, SupportsIndex) or n < 1:
        raise ValueError(f"n must be a whole number >= 1; got {n!r}")
    if len(prompts) == 0:
        raise ValueError("prompts must hold at least one list of token ids; got none")
    for i, prompt in enumerate(prompts):
        if not hasattr(prompt, "__len__"):
            raise TypeError(f"prompts must be lists of token ids; prompt {i} is {prompt!r:.60}")
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} has no tokens; every prompt needs at least one")
        if not isinstance(prompt[0], SupportsIndex):
            raise TypeError(f"prompts must be lists of token ids, whole numbers; prompt {i} is {prompt!r:.60}")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            token = next(token for token in prompt if not 0 <= token < vocabulary)
            raise ValueError(f"prompt {i} has the token {token}; the model's are 0 to {vocabulary - 1}")
    total = len(prompts) * n
    if not isinstance(ids, Tensor) or ids.shape != (total,) or ids.dtype != torch.int64:
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else f"{ids!r:.60}"
        raise ValueError(f"ids must be int64 [{total}], a tensor with one a completion (`sequence_ids`); got {got}")
