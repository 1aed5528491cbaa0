"""Completions drawn in steps that a GPU replays as CUDA graphs, one a batch size and view of the cache.

A decoding step of a small model is some hundred kernels of a few microseconds each, and launching them one by one takes
longer than they do. A captured step is one launch: model, head, draw, bookkeeping. For that all of its state is in
buffers on the device that stay where they are. `capture=False` runs the same step uncaptured.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from bandit_rft import ops
from bandit_rft.model import Policy
from bandit_rft.ops import backends
from bandit_rft.rollout.static import StaticDecoder
from bandit_rft.transfer import to_device

logger = logging.getLogger(__name__)

#: Captured steps that are kept; the one used longest ago goes first. Their scratch memory is shared.
GRAPHS = 64
#: Decoding steps from one look at how many sequences go on to the next, on a GPU.
CHECK_EVERY = 16


def bucket(count: int) -> int:
    """The batch size in which so many sequences are decoded: 2^k or 3 * 2^k, so at most a third is idle."""
    power = 1 << max(count - 1, 0).bit_length()
    return power // 4 * 3 if power >= 8 and count <= power // 4 * 3 else power


class StopCheck:
    """How many sequences go on, as of `lag` checks ago: the host learns it while the device is already further.

    On a GPU the number is copied into pinned memory with an event behind it. Waiting for the event of an earlier check
    keeps the host from running ahead without end, and the device from ever running out of work.

    Args:
        lag: checks between asking and reading; 0 reads at once.
    """

    def __init__(self, lag: int):
        self.lag = lag
        self._asked: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def __call__(self, alive: Tensor) -> int | None:
        """Ask for the number of True in alive [b]; the answer of `lag` checks ago, None before there is one."""
        count, event = alive.sum(), None
        if alive.device.type == "cuda":
            pinned = torch.empty((), dtype=count.dtype, pin_memory=True)
            count = pinned.copy_(count, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(alive.device))  # by default it is that of the current device
        self._asked.append((count, event))
        if len(self._asked) <= self.lag:
            return None
        count, event = self._asked.popleft()
        if event is not None:
            event.synchronize()
        return int(count)


@dataclass
class _Buffers:
    """The state of a batch on the device: R rows decoded together, of which the first are in use, and S steps."""

    seed: Tensor  # int64 []
    step: Tensor  # int64 [1], the completion position that is drawn next
    tokens: Tensor  # int64 [R], drawn last
    places: Tensor  # int64 [R], where in the whole text the drawn token will be
    ids: Tensor  # int64 [R], random streams
    rows: Tensor  # int64 [R], which row of the tables; idle ones write into the last
    alive: Tensor  # bool [R]
    bias: Tensor | None  # [V], the head's
    drawn: tuple[Tensor, Tensor, Tensor]  # tokens int64, log-probabilities and entropy float32, each [R + 1, S]

    @staticmethod
    def of(rows: int, steps: int, bias: Tensor | None, device: torch.device) -> _Buffers:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return _Buffers(
            seed=zeros(),
            step=zeros(1),
            tokens=zeros(rows),
            places=zeros(rows),
            ids=zeros(rows),
            rows=zeros(rows),
            alive=zeros(rows, dtype=torch.bool),
            bias=None if bias is None else bias.detach().clone(),
            drawn=(
                zeros(rows + 1, steps),
                zeros(rows + 1, steps, dtype=torch.float32),
                zeros(rows + 1, steps, dtype=torch.float32),
            ),
        )


class CapturedDecoder:
    """Draws the completions of a batch step by step, each step replayed where it has been captured.

    Args:
        policy: its weights are read where they lie; where they have moved, steps are captured anew.
        decoder: over a static cache.
        stop: bool [V], tokens that end a completion.
        steps: tokens after which a completion is cut off.
        capture: whether steps are captured as CUDA graphs. The first that cannot be ends it, with one warning.
        check_every: steps from one stop check to the next.
        lag: of the stop check, in checks.
    """

    def __init__(
        self, policy: Policy, decoder: StaticDecoder, stop: Tensor, steps: int,
        *, capture: bool, check_every: int = CHECK_EVERY, lag: int = 1,
    ):  # fmt: skip
        self.policy, self.decoder, self.steps, self.capture = policy, decoder, steps, capture
        self.check_every, self.lag = check_every, lag
        self._stop = stop
        self._buffers: _Buffers | None = None
        self._graphs: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()
        self._seen: set[Hashable] = set()  # steps that have run: their kernels are loaded, or compiled
        self._valid_for: Hashable = None
        self._record = _CudaRecorder(policy.device)

    def decode(
        self, prompts: Sequence[Sequence[int]], which: Tensor | None, ids: Tensor,
        *, capacity: int, seed: int, sampling: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Draw B completions.

        Args:
            prompts: P of them.
            which: int64 [B], the prompt of each completion; None: one each, in order.
            ids: int64 [B], their random streams.
            capacity: columns that prompt and completion need at most.
            seed: of the draws.
            sampling: temperature and filters, as `ops.linear_sample` takes them.

        Returns:
            tokens, log-probabilities and entropy [B, steps that were needed]; what lies after a row's first stop token
            means nothing.
        """
        count, size = len(ids), bucket(len(ids))
        lengths = to_device([len(prompt) for prompt in prompts], ids.device)
        hidden = self.decoder.prefill(prompts, size, capacity)
        if which is not None:
            hidden, lengths = hidden[which], lengths[which]
            self.decoder.select(which)
        buffers = self._start(lengths, ids, size, seed)
        self._draw(hidden, sampling)
        stop_check = StopCheck(self.lag)
        drawn = 1
        while drawn < self.steps:
            if drawn % self.check_every == 0:
                remaining = stop_check(buffers.alive[:size])
                if remaining == 0:
                    break
                if remaining is not None and bucket(remaining) < size:
                    size = bucket(remaining)
                    self._shrink(size)
            self._step(size, sampling)
            drawn += 1
        tokens, logprobs, entropy = (table[:count, :drawn] for table in buffers.drawn)
        return tokens, logprobs, entropy

    def _start(self, lengths: Tensor, ids: Tensor, size: int, seed: int) -> _Buffers:
        """Fill the buffers for a batch of `size` rows; they move only when it is larger than any before."""
        count, bias = len(ids), self.policy.head_options["bias"]
        buffers = self._buffers
        if buffers is None or len(buffers.alive) < size or (buffers.bias is None) != (bias is None):
            rows = max(size, 0 if buffers is None else len(buffers.alive))
            self._buffers = buffers = _Buffers.of(rows, self.steps, bias, ids.device)
            self._valid_for = None
        if bias is not None and buffers.bias is not None:
            buffers.bias.copy_(bias)
        buffers.seed.fill_(seed - 2**64 if seed >= 2**63 else seed)
        for state in (buffers.step, buffers.tokens, buffers.places, buffers.ids, buffers.alive, *buffers.drawn):
            state.zero_()
        buffers.rows.fill_(len(buffers.alive))
        torch.arange(count, out=buffers.rows[:count])
        buffers.places[:count].copy_(lengths)
        buffers.ids[:count].copy_(ids)
        buffers.alive[:count] = True
        # Training writes into the weights where they lie; what replaces them, or the cache, voids what is captured.
        valid_for = (self.decoder.memory, *(p.data_ptr() for p in self.policy.model.parameters()))
        if valid_for != self._valid_for:
            self._graphs.clear()
            self._seen.clear()
            self._valid_for = valid_for
        return buffers

    def _shrink(self, size: int) -> None:
        """Go on with `size` rows, among them all that are alive, in their order."""
        buffers = self._buffers
        assert buffers is not None
        keep = buffers.alive.int().argsort(descending=True, stable=True)[:size].sort().values
        for state in (buffers.tokens, buffers.places, buffers.ids, buffers.rows, buffers.alive):
            state[:size].copy_(state[keep])
            if state is buffers.alive:
                state[size:] = False
        self.decoder.select(keep)

    # --- one step -----------------------------------------------------------------------------------------------------

    def _step(self, size: int, sampling: dict[str, Any]) -> None:
        """One step of the first `size` rows: replayed, or run and, the second time it is met, captured."""
        self.decoder.advance()
        key = (size, self.decoder.span, self.decoder.in_window, *sorted(sampling.items()))
        if self.capture and not backends.is_checked():  # checks read values
            if key not in self._graphs and key in self._seen:
                self._capture(key, lambda: self._run(size, sampling))
            if key in self._graphs:
                self._graphs.move_to_end(key)
                self._graphs[key]()
                return
        self._seen.add(key)
        self._run(size, sampling)

    def _capture(self, key: Hashable, function: Callable[[], None]) -> None:
        try:
            self._graphs[key] = self._record(function)
        except Exception as error:  # whatever a model does that a capture does not allow
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            logger.warning("decoding steps are not captured as CUDA graphs, they run uncaptured: %s", reason)
            self.capture = False
            self._graphs.clear()
        while len(self._graphs) > GRAPHS:
            self._graphs.popitem(last=False)

    def _run(self, size: int, sampling: dict[str, Any]) -> None:
        """What is captured: nothing here depends on a number of the host but the key, or gives one to it."""
        buffers = self._buffers
        assert buffers is not None
        hidden = self.decoder.forward(buffers.tokens[:size], buffers.places[:size])
        buffers.places[:size].add_(1)
        self._draw(hidden, sampling)

    def _draw(self, hidden: Tensor, sampling: dict[str, Any]) -> None:
        """Draw a token for each row of hidden [b, H] and write it down."""
        buffers, size = self._buffers, len(hidden)
        assert buffers is not None
        sample = ops.linear_sample(
            hidden, self.policy.weight, seed=buffers.seed, sequence_ids=buffers.ids[:size],
            positions=buffers.step.repeat(size), **{**self.policy.head_options, "bias": buffers.bias}, **sampling,
        )  # fmt: skip
        cells = buffers.rows[:size] * self.steps + buffers.step
        for table, values in zip(buffers.drawn, (sample.tokens, sample.logprobs, sample.entropy), strict=True):
            table.view(-1).index_copy_(0, cells, values.to(table.dtype))
        buffers.tokens[:size].copy_(sample.tokens)
        buffers.alive[:size].logical_and_(~self._stop[sample.tokens])
        buffers.step.add_(1)


class _CudaRecorder:
    """Captures functions as CUDA graphs; those alive share one pool of scratch memory, for no two run at once."""

    def __init__(self, device: torch.device):
        self._device = device
        # PyTorch gives a pool up with the last of its graphs, and asserts where one is captured into it after that.
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            pool = next((graph.pool() for graph in self._alive), None)
            try:
                graph = self._captured(function, pool)
            except BaseException:
                # One that failed leaves PyTorch's random generator as if it went on; one that ends well mends that.
                with suppress(RuntimeError):
                    self._captured(lambda: torch.zeros(1, device=self._device), None)
                raise
        self._alive.add(graph)
        return graph.replay

    def _captured(self, function: Callable[[], Any], pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads (rewards, a monitor) may use the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
        return graph
