"""What the loop asks of the processes of a run; the answers of a process that is alone."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bandit_rft.model import Policy
from bandit_rft.optimizer import PolicyOptimizer

if TYPE_CHECKING:
    from bandit_rft.data import Scorer
    from bandit_rft.rollout import Engine


class RankError(ConnectionError):
    """Another rank died or failed, and this one cannot go on without it."""


class Ranks:
    """The processes that train one policy together. This one is alone: nothing is split, summed or waited for.

    Every rank calls the same methods in the same order: most of them wait for all others.

    Attributes:
        rank: of this process, 0 <= rank < world.
        world: how many there are.
        lockstep: whether forward and backward passes wait for the other ranks, so that all make equally many.
    """

    rank, world, lockstep = 0, 1, False

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, scores and reports."""
        return self.rank == 0

    # --- the work of a round ------------------------------------------------------------------------------------------

    def shares(self, sizes: NDArray[Any]) -> list[NDArray[np.int64]]:
        """Which of so many pieces of work, of these sizes (tokens), each rank does; every rank gets the same answer."""
        return balanced(sizes.tolist(), self.world)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, the same bits on each."""
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest of a tensor over the ranks, entry by entry."""
        return tensor

    def join(self, values: Tensor) -> Tensor:
        """Tensors [n] in host memory, one a rank and of any length, one after another."""
        return values

    def any(self, condition: bool) -> bool:
        """Whether something holds on any rank."""
        return condition

    def from_first(self, value: float) -> float:
        """A number as the first rank knows it."""
        return value

    def check_same(self, what: str, parts: Iterable[bytes]) -> None:
        """Refuse to go on where the ranks do not hold the same (ValueError)."""

    # --- the parts of a run -------------------------------------------------------------------------------------------

    def shard(self, policy: Policy) -> Policy:
        """The policy as this rank trains or scores with it; `policy` itself stays what it draws with and saves."""
        return policy

    def optimizer(self, policy: Policy, **options: Any) -> PolicyOptimizer:
        """The optimizer of a policy that `shard` gave."""
        return PolicyOptimizer(policy.named_parameters(), **options)

    def engine(self, engine: Engine) -> Engine:
        """An engine whose rollouts all ranks get: drawn by each in part, or by servers that the first one asks."""
        return engine

    def scorer(self, scorer: Scorer) -> Scorer:
        """A scorer whose rewards all ranks get; only the first one's is asked."""
        return scorer

    @contextmanager
    def working(self, *policies: Policy | None) -> Iterator[None]:
        """Within the block these policies' heads are whole: gathered once for all of its forward passes."""
        yield

    def take_part(self, policy: Policy, *, backward: bool) -> None:
        """One forward pass (and backward pass) that counts for nothing, where others have more to do."""

    def gather(self) -> None:
        """Give the policy that is drawn with and saved the weights as trained, where it does not have them."""

    def release(self) -> None:
        """The policy that is drawn with is not needed until the next `gather`."""


def balanced(sizes: Sequence[int], world: int) -> list[NDArray[np.int64]]:
    """Pieces of these sizes over `world` ranks: the largest first, each to the rank that has least so far."""
    if world == 1:
        return [np.arange(len(sizes))]
    shares = [list[int]() for _ in range(world)]
    load = [(0, rank) for rank in range(world)]
    for piece in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        total, rank = heapq.heappop(load)
        shares[rank].append(piece)
        heapq.heappush(load, (total + sizes[piece], rank))
    return [np.array(sorted(share), dtype=np.int64) for share in shares]
