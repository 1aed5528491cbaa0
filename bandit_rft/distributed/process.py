"""The ranks of a process group."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from bandit_rft.distributed.drawing import FirstEngine, FirstScorer, SplitEngine
from bandit_rft.distributed.optimizers import ReplicatedOptimizer, ShardedOptimizer
from bandit_rft.distributed.ranks import Ranks
from bandit_rft.distributed.sharded import ShardedPolicy
from bandit_rft.model import Policy
from bandit_rft.model.lora import BasePolicy
from bandit_rft.optimizer import PolicyOptimizer
from bandit_rft.rollout import RolloutEngine, ServerEngine
from bandit_rft.rollout_batch import RolloutBatch

if TYPE_CHECKING:
    from bandit_rft.data import Scorer
    from bandit_rft.rollout import Engine


class ProcessRanks(Ranks):
    """Several processes, joined in torch.distributed's default process group.

    Args:
        sharded: True: parameters, gradients and optimizer state are split over the ranks (FSDP2); False: each rank has
            all of them, and gradients are summed once a step (data parallel).
    """

    def __init__(self, *, sharded: bool):
        self.rank, self.world, self.lockstep = dist.get_rank(), dist.get_world_size(), sharded
        self._policies: list[ShardedPolicy] = []

    # --- sums and agreements ------------------------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """See Ranks."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """See Ranks."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        result = tensor.detach().clone()
        dist.all_reduce(result, operation)
        return result

    def any(self, condition: bool) -> bool:
        """See Ranks."""
        return bool(self.max(torch.tensor(int(condition))))

    def from_first(self, value: float) -> float:
        """See Ranks."""
        told = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(told, 0)
        return float(told)

    def check_same(self, what: str, parts: Iterable[bytes]) -> None:
        """See Ranks."""
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        digests = self._gather(_tensor(digest.digest()))
        if other := [rank for rank, theirs in enumerate(digests) if not torch.equal(theirs, digests[0])]:
            raise ValueError(
                f"rank {other[0]} does not hold the same {what} as rank 0: the ranks must run the same version of "
                "everything, and see the same files"
            )

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """What each rank gives, on every rank."""
        sizes = [int(size) for size in self._gather(torch.tensor([len(data)]))]
        buffer = torch.zeros(max(sizes), dtype=torch.uint8)
        buffer[: len(data)] = _tensor(data)
        return [part[:size].numpy().tobytes() for part, size in zip(self._gather(buffer), sizes, strict=True)]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """Tensors of one shape, of each rank on every rank."""
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor)
        return parts

    def bytes_from_first(self, data: bytes | None) -> bytes:
        """What the first rank gives, on every rank; the others give None."""
        size = int(self.from_first(len(data or b"")))
        buffer = torch.empty(size, dtype=torch.uint8) if data is None else _tensor(data)
        dist.broadcast(buffer, 0)
        return buffer.numpy().tobytes()

    def gather_batch(self, batch: RolloutBatch | None) -> RolloutBatch:
        """Every rank's rollouts, by rank, on every rank; None: this one has none."""
        data = b"" if batch is None else safetensors.torch.save(batch.columns())
        parts = [safetensors.torch.load(part) for part in self.gather_bytes(data) if part]
        return RolloutBatch.cat([RolloutBatch(**columns) for columns in parts])

    def join(self, values: Tensor) -> Tensor:
        """See Ranks."""
        parts = self.gather_bytes(values.contiguous().numpy().tobytes())
        return torch.cat([_tensor(part).view(values.dtype) for part in parts])

    # --- the parts of a run -------------------------------------------------------------------------------------------

    def shard(self, policy: Policy) -> Policy:
        """See Ranks."""
        if isinstance(policy, BasePolicy):  # what lies beneath adapters is sharded with them
            return policy
        if policy.device.type == "cuda" and policy.device.index != torch.cuda.current_device():
            own = f"cuda:{torch.cuda.current_device()}"
            raise ValueError(f"model lies on {policy.device}, but rank {self.rank} works on {own}: move it there")
        for tensor in [*policy.model.parameters(), *policy.model.buffers()]:  # a program may give each rank another
            first = tensor.detach().contiguous()
            dist.broadcast(first, 0)
            tensor.detach().copy_(first)
        if not self.lockstep:
            return policy
        sharded = ShardedPolicy(policy)
        if sharded.parameters():
            self._policies.append(sharded)
        else:
            sharded.release_whole()  # it scores, and is neither drawn with nor saved
        return sharded

    def optimizer(self, policy: Policy, **options: Any) -> PolicyOptimizer:
        """See Ranks."""
        if isinstance(policy, ShardedPolicy):
            return ShardedOptimizer(policy, self, **options)
        return ReplicatedOptimizer(policy.named_parameters(), **options)

    def engine(self, engine: Engine) -> Engine:
        """See Ranks."""
        if isinstance(engine, RolloutEngine):
            return SplitEngine(engine, self)
        assert isinstance(engine, ServerEngine)
        return FirstEngine(engine, self)

    def scorer(self, scorer: Scorer) -> Scorer:
        """See Ranks."""
        return FirstScorer(scorer, self)

    @contextmanager
    def working(self, *policies: Policy | None) -> Iterator[None]:
        """See Ranks."""
        adapted = dict.fromkeys(getattr(policy, "adapted", policy) for policy in policies)  # beneath it, the same head
        sharded = [policy for policy in adapted if isinstance(policy, ShardedPolicy)]
        for policy in sharded:
            policy.gather_head()
        try:
            yield
        finally:
            for policy in sharded:
                policy.drop_head()

    def take_part(self, policy: Policy, *, backward: bool) -> None:
        """See Ranks."""
        with torch.set_grad_enabled(backward):
            hidden = policy.hidden_states(torch.zeros(1, dtype=torch.int64, device=policy.device), [1])
            if backward and hidden.requires_grad:  # not where the head alone is trained
                hidden.backward(torch.zeros_like(hidden))

    def gather(self) -> None:
        """See Ranks."""
        for policy in self._policies:
            policy.gather_whole()

    def release(self) -> None:
        """See Ranks."""
        for policy in self._policies:
            policy.release_whole()


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
