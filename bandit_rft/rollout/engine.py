"""The embedded rollout engine: batched decoding over the model's own KV cache, each token drawn by `ops.linear_sample`.

What makes it fast: one pass of the head gives token, log-probability and entropy; the KV cache is allocated once and
written in place; a query's prompt is read once however many rollouts it gets; finished sequences leave the batch.
What makes it exact: a draw depends on (seed, sequence id, position) and the row's logits, not on the batch around it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bandit_rft import ops
from bandit_rft.model import Policy, UnsupportedModelError
from bandit_rft.rollout.native import NativeDecoder
from bandit_rft.rollout_batch import RolloutBatch

logger = logging.getLogger(__name__)

#: How a model is told which positions are padding: a ready additive mask, or the plain [B, length] one.
Padding = Literal["ready", "plain"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `greedy()` is top_k=1, whose log-probabilities are still those of the full softmax."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @staticmethod
    def greedy() -> Sampling:
        return Sampling(top_k=1)


def sequence_ids(*parts: int | Sequence[int] | np.ndarray) -> Tensor:
    """A 64-bit id for each combination of the parts (stream, round, query, rollout), int64 [B]; parts broadcast.

    splitmix64 (Steele, Lea, Flood 2014) applied part by part: equal parts give equal ids, whatever else is drawn.
    """
    mixed = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            mixed = mixed + np.asarray(part, dtype=np.int64).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return torch.from_numpy(mixed.astype(np.int64))


class _InPlaceLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer with room for the whole completion from the start: one copy a step instead of a concatenation."""

    is_sliding = False  # everything is kept; a sliding window is the mask's business

    def __init__(self, capacity: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.length = capacity, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
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
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        # Only the part in use is copied: early in a completion most of the room is still empty.
        for name in ("_k", "_v"):
            old = getattr(self, name)
            new = old.new_zeros((len(indices), *old.shape[1:]))
            new.narrow(2, 0, self.length).copy_(old.narrow(2, 0, self.length).index_select(0, indices))
            setattr(self, name, new)


class _ModelSteps:
    """Decoding steps through the model's own forward, over its KV cache."""

    lanes = 1  # any number of sequences is as good as another

    def __init__(self, policy: Policy, cache: DynamicCache, cache_argument: str, width: int):
        self._policy, self._cache, self._cache_argument, self._columns = policy, cache, cache_argument, width
        self.mask: Tensor | None = None  # what hides the padding of the prompts; see RolloutEngine._decoding_mask

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states [b, H] after one more token each; positions [b] are those in the whole text."""
        self._columns += 1
        output = self._policy.base(
            input_ids=tokens[:, None],
            attention_mask=self.mask[..., : self._columns] if self.mask is not None else None,
            position_ids=positions[:, None],
            use_cache=True,
            **{self._cache_argument: self._cache},
        )
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden

    def select(self, keep: Tensor) -> None:
        """Go on with the sequences `keep` [b] int64."""
        self.mask = self.mask[keep] if self.mask is not None else None
        _select(self._cache, keep)


@dataclass
class _Segment:
    """Consecutive decoding steps with the same sequences in the batch."""

    rows: Tensor  # int64 [b], which of the B sequences
    first: int  # completion position of the first step
    tokens: list[Tensor] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)


class RolloutEngine:
    """Draws completions from a policy.

    Args:
        policy: the wrapped model; its current weights are used at every call.
        max_completion_length: tokens after which a completion is cut off.
        batch_size: sequences decoded together (the KV cache holds this many).
    """

    def __init__(self, policy: Policy, *, max_completion_length: int, batch_size: int = 256):
        if max_completion_length < 1 or batch_size < 1:
            raise ValueError(
                f"max_completion_length and batch_size must be >= 1; got {max_completion_length} and {batch_size}"
            )
        self.policy, self.max_completion_length, self.batch_size = policy, max_completion_length, batch_size
        self._stop = torch.zeros(policy.vocab_size, dtype=torch.bool, device=policy.device)
        stops = [token for token in policy.stop_tokens if token < policy.vocab_size]
        self._stop[stops] = True
        if not stops:
            logger.warning("the generation config names no stop token: every completion will run to its length limit")
        # Waiting for the device costs more than a wasted step on a GPU, and nothing on a CPU.
        self._check_every = 1 if policy.device.type == "cpu" else 16
        config = policy.model.config.get_text_config()
        windows = [getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)]
        self._window = min((w for w in windows if w), default=None)
        # State-space models call their cache by another name.
        names = inspect.signature(policy.base.forward).parameters
        self._cache_argument = "cache_params" if "cache_params" in names else "past_key_values"
        self._padding: Padding | None = None
        self._padding = self._probe_padding()
        self._native = self._probe_native()

    def generate(
        self, prompts: Sequence[Sequence[int]], ids: Tensor, *, seed: int, sampling: Sampling | None = None, n: int = 1
    ) -> RolloutBatch:
        """Draw n completions of each of P prompts (token ids, not empty), B = P * n in prompt-major order.

        ids [B] int64 name the random streams (see `sequence_ids`); completion i takes the stream ids[i] of `seed`, so
        it is the same whatever else is in the batch, to float rounding of its log-probabilities.

        Returns:
            The rollouts in host memory, with `query` the prompt's position in `prompts`.
        """
        total = len(prompts) * n
        if ids.shape != (total,) or ids.dtype != torch.int64:
            raise ValueError(f"ids must be int64 [{total}], one a completion; got {ids.dtype} {list(ids.shape)}")
        if empty := [i for i, prompt in enumerate(prompts) if not prompt]:
            raise ValueError(f"prompt {empty[0]} has no tokens; every prompt needs at least one")
        ids, sampling = ids.to(self.policy.device), sampling or Sampling()
        order: list[int] = []
        parts: list[RolloutBatch] = []
        for rows in self._batches(prompts, n):
            with torch.inference_mode():
                segments = self._decode(
                    [prompts[i] for i in sorted({r // n for r in rows})], rows, n, ids, seed, sampling
                )
                tokens, logprobs, entropy, lengths, truncated = self._collect(segments, len(rows))
            # The hand-over to the rewards: the one copy of a round from the device.
            tokens, logprobs, entropy = (tensor.cpu().clone() for tensor in (tokens, logprobs, entropy))
            of_rows = [prompts[r // n] for r in rows]
            query, attempt = [r // n for r in rows], [r % n for r in rows]
            parts.append(
                RolloutBatch.of(of_rows, tokens, lengths, logprobs, entropy, truncated, query=query, attempt=attempt)
            )
            order += rows
        batch = RolloutBatch.cat(parts)
        # back in the order they were asked for
        return batch if order == list(range(total)) else batch.select(np.argsort(order))

    # -----------------------------------------------------------------------------------------------------------------

    def _batches(self, prompts: Sequence[Sequence[int]], n: int) -> Iterator[list[int]]:
        """Indices of completions to decode together: whole groups, prompts of similar length side by side."""
        order = list(range(len(prompts)))
        if len(prompts) * n > self.batch_size or self._padding is None:
            order.sort(key=lambda i: len(prompts[i]))
        batch: list[int] = []
        for i in order:
            for j in range(n):
                other_length = batch and self._padding is None and len(prompts[batch[-1] // n]) != len(prompts[i])
                if len(batch) == self.batch_size or other_length:
                    yield sorted(batch)
                    batch = []
                batch.append(i * n + j)
        if batch:
            yield sorted(batch)

    def _decode(
        self, prompts: list[Sequence[int]], rows: list[int], n: int, ids: Tensor, seed: int, sampling: Sampling
    ) -> list[_Segment]:
        policy, device = self.policy, self.policy.device
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        capacity = width + self.max_completion_length - 1
        in_window = self._window is None or capacity <= self._window
        native = self._native if in_window and self._native is not None and self._native.ready() else None
        steps: NativeDecoder | _ModelSteps
        if native is not None:
            hidden, steps = native.read(prompts, len(rows), capacity), native
        else:
            cache = self._cache(capacity)
            hidden = self._prefill(prompts, width, cache)
            steps = _ModelSteps(policy, cache, self._cache_argument, width)

        # One row a prompt so far; from here on one row a completion.
        place = torch.tensor(lengths, device=device)
        if n > 1:
            place_of = {query: i for i, query in enumerate(sorted({r // n for r in rows}))}
            which = torch.tensor([place_of[r // n] for r in rows], device=device)
            hidden, place = hidden[which], place[which]
            steps.select(which)
        if isinstance(steps, _ModelSteps) and min(lengths) < width:
            steps.mask = self._decoding_mask(place, width, capacity, hidden.dtype)

        active = torch.arange(len(rows), device=device)
        row_ids = ids[torch.tensor(rows, device=device)]
        positions = torch.zeros_like(active)
        alive = torch.ones(len(rows), dtype=torch.bool, device=device)
        segments = [_Segment(active, 0)]
        options = {**policy.head_options, **sampling.__dict__}
        for step in range(self.max_completion_length):
            sample = ops.linear_sample(
                hidden, policy.weight, seed=seed, sequence_ids=row_ids, positions=positions, **options
            )
            segment = segments[-1]
            segment.tokens.append(sample.tokens)
            segment.logprobs.append(sample.logprobs)
            segment.entropy.append(sample.entropy)
            if step + 1 == self.max_completion_length:
                break
            alive &= ~self._stop[sample.tokens]
            tokens = sample.tokens
            if (step + 1) % self._check_every == 0:
                remaining = int(alive.sum())
                if remaining == 0:
                    break
                # Moving the cache costs about as much as one step, so it pays once a quarter of the batch is idle.
                size = min(-(-remaining // steps.lanes) * steps.lanes, len(active))
                if size <= 0.75 * len(active):
                    keep = alive.int().argsort(descending=True, stable=True)[:size].sort().values
                    active, row_ids, positions, place = active[keep], row_ids[keep], positions[keep], place[keep]
                    tokens, alive = tokens[keep], alive[keep]
                    steps.select(keep)
                    segments.append(_Segment(active, step + 1))
            hidden = steps.step(tokens, place)
            positions, place = positions + 1, place + 1
        return segments

    def _cache(self, capacity: int) -> DynamicCache:
        """An empty cache of `capacity` columns, written in place where its layers allow it."""
        cache = DynamicCache(config=self.policy.model.config)
        for i, layer in enumerate(cache.layers):
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
                cache.layers[i] = _InPlaceLayer(capacity)
        return cache

    def _prefill(self, prompts: Sequence[Sequence[int]], width: int, cache: DynamicCache) -> Tensor:
        """Run the prompts [P, width], left-padded, into the cache; the last hidden state of each, [P, H]."""
        device = self.policy.device
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[width - len(prompt) :] = prompt
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        places = torch.arange(width, device=device) - (width - lengths)[:, None]
        padded = any(len(prompt) < width for prompt in prompts)
        output = self.policy.base(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=(places >= 0).long() if padded else None,
            position_ids=places.clamp(min=0),
            use_cache=True,
            **{self._cache_argument: cache},
        )
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden

    def _decoding_mask(self, prompt_lengths: Tensor, width: int, capacity: int, dtype: torch.dtype) -> Tensor:
        """What hides the padding of the prompts: additive [B, 1, 1, capacity] where the model takes a ready mask.

        Others get [B, capacity] and build their own at each step; so does a sliding window, which a ready mask would
        override.
        """
        seen = torch.arange(capacity, device=prompt_lengths.device) >= (width - prompt_lengths)[:, None]
        if self._padding == "plain" or (self._window is not None and self._window < capacity):
            return seen.long()
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None, None]

    def _collect(self, segments: list[_Segment], count: int) -> tuple[Tensor, Tensor, Tensor, list[int], list[bool]]:
        """Packed (tokens, logprobs, entropy) [N] and (lengths, truncated) of `count` sequences."""
        steps = segments[-1].first + len(segments[-1].tokens)
        device = self.policy.device
        tokens = torch.zeros((count, steps), dtype=torch.int64, device=device)
        logprobs, entropy = torch.zeros((2, count, steps), device=device)
        for segment in segments:
            columns = slice(segment.first, segment.first + len(segment.tokens))
            for table, values in ((tokens, segment.tokens), (logprobs, segment.logprobs), (entropy, segment.entropy)):
                if values:
                    table[segment.rows, columns] = torch.stack(values, dim=1)
        stops = self._stop[tokens]
        # A row may have run on for a few steps after its stop token: what counts ends with the first one.
        lengths = torch.where(stops.any(1), stops.int().argmax(1) + 1, steps)
        inside = torch.arange(steps, device=device) < lengths[:, None]
        return (
            tokens[inside],
            logprobs[inside],
            entropy[inside],
            lengths.tolist(),
            (~(stops & inside).any(1)).tolist(),
        )

    @torch.inference_mode()
    def _probe_padding(self) -> Padding | None:
        """How prompts of different length share a batch without changing what each gives alone; None: they cannot."""
        generator = torch.Generator().manual_seed(1)
        prompts = [torch.randint(0, self.policy.vocab_size, (k,), generator=generator).tolist() for k in (3, 7, 5)]
        try:
            alone = torch.cat([self._two_steps([prompt]) for prompt in prompts], dim=1)
        except TypeError as error:  # state-space models of transformers 4 take no positions
            raise UnsupportedModelError(
                f"{type(self.policy.model).__name__}: its forward does not decode step by step ({error})"
            ) from None
        tolerance = (1e-4 if alone.dtype == torch.float32 else 0.05) * float(alone.abs().max())
        whole = torch.cat([torch.tensor([*prompt, 1]) for prompt in prompts]).to(self.policy.device)
        lengths = [len(prompt) + 1 for prompt in prompts]
        last = torch.tensor(lengths).cumsum(0) - 1
        difference = float((self.policy.hidden_states(whole, lengths)[last] - alone[1]).abs().max())
        if not difference <= tolerance:
            raise UnsupportedModelError(
                f"{type(self.policy.model).__name__}: decoding with its KV cache gives hidden states that differ by "
                f"{difference:.3g} from those of the whole sequence; the sampler would draw from another policy"
            )
        styles: tuple[Padding, ...] = ("ready", "plain")
        for self._padding in styles:
            try:
                together = self._two_steps(prompts)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                logger.debug("%s padding mask: %s", self._padding, error)
                continue
            if bool(((together - alone).abs() <= tolerance).all()):
                return self._padding
        logger.info("left padding changes what this model computes: prompts are batched by length")
        return None

    @torch.inference_mode()
    def _probe_native(self) -> NativeDecoder | None:
        """The compiled core's decoder where it takes the model and gives the hidden states that it should."""
        prompts = [[5, 4, 3], [3, 4, 5, 6, 5, 4]]
        try:
            native = NativeDecoder(self.policy)
            first = native.read(prompts, 2, 7)
            second = native.step(torch.ones(2, dtype=torch.int64), torch.tensor([3, 6]))
        except (NotImplementedError, AttributeError, ValueError) as error:
            logger.debug("decoding goes through the model's own forward: %s", error)
            return None
        expected = self._two_steps(prompts)
        difference = float((torch.stack([first, second]) - expected).abs().max())
        return native if difference <= 1e-4 * float(expected.abs().max()) else None

    def _two_steps(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states [2, P, H] of the prompts' last token and of one more token."""
        width = max(len(prompt) for prompt in prompts)
        cache = self._cache(width + 1)
        first = self._prefill(prompts, width, cache)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.policy.device)
        padded = min(len(prompt) for prompt in prompts) < width
        steps = _ModelSteps(self.policy, cache, self._cache_argument, width)
        if padded:
            steps.mask = self._decoding_mask(lengths, width, width + 1, first.dtype)
        return torch.stack([first, steps.step(torch.ones_like(lengths), lengths)])


def _select(cache: DynamicCache, rows: Tensor) -> None:
    for layer in cache.layers:
        layer.batch_select_indices(rows)  # type: ignore[union-attr]
