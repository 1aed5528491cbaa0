"""The optimizer with several ranks: gradients are summed over them, and its state may be split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from bandit_rft.distributed.sharded import SPLIT, ShardedPolicy, like_share, local
from bandit_rft.optimizer import PolicyOptimizer

if TYPE_CHECKING:
    from bandit_rft.distributed.process import ProcessRanks


class ReplicatedOptimizer(PolicyOptimizer):
    """Every rank has all parameters and all state; gradients are summed in one call a step."""

    def step(self) -> Tensor:
        """As PolicyOptimizer.step, with the gradients of all ranks."""
        self._take_replaced()
        for gradient in self.gradients:
            dist.all_reduce(gradient)
        return super().step()


class ShardedOptimizer(PolicyOptimizer):
    """Every rank has its share of masters, gradients and moments; `state_tensors` gathers them for the first rank."""

    def __init__(self, policy: ShardedPolicy, ranks: ProcessRanks, **options: Any):
        named = policy.named_parameters()
        super().__init__([(name, nn.Parameter(local(share))) for name, share in named], **options)
        self._policy, self._ranks, self._shares = policy, ranks, [share for _, share in named]
        self._grads: dict[int, Tensor] = {}
        for share, master in zip(self._shares, self.masters, strict=True):
            assert master.grad is not None
            share.grad = like_share(master.grad, share, policy.mesh)  # FSDP adds to it in place
            self._grads[id(share)] = master.grad
        self._split = [share.grad for share in self._shares]

    def grad_buffer(self, parameter: Tensor) -> Tensor:
        """The buffer [V, H] of the gathered head's gradient."""
        assert parameter is self._policy.weight
        return self._policy.head_sum("weight")

    def step(self) -> Tensor:
        """As PolicyOptimizer.step, with the gradients of all ranks."""
        self._take_replaced()
        self._policy.reduce_head(self._grads)
        norm = super().step()
        self._policy.stale = True
        return norm

    def clear(self) -> None:
        """As PolicyOptimizer.clear, the gathered head's gradient too."""
        super().clear()
        for share, split in zip(self._shares, self._split, strict=True):
            share.grad = split
        self._policy.forget_head_sums()

    def _take_replaced(self) -> None:
        """As PolicyOptimizer's; autograd knows the shares, not the masters."""
        for share, split, part in zip(self._shares, self._split, self._parts, strict=True):
            if share.grad is not split:
                part.zero_() if share.grad is None else part.copy_(local(share.grad))
                share.grad = split
        super()._take_replaced()

    def _norm(self) -> Tensor:
        return self._ranks.sum(super()._norm().square()).sqrt()

    def state_tensors(self) -> dict[str, Tensor]:
        """As PolicyOptimizer.state_tensors, whole and in host memory, on the first rank; elsewhere {}."""
        masters = dict(zip(self.names, self._shares, strict=True))
        kept: dict[str, Tensor] = {}
        for key, part in super().state_tensors().items():
            share = masters[key.rpartition("|")[0]]
            whole = part if key.endswith("|step") else like_share(part, share, self._policy.mesh).full_tensor()  # type: ignore[attr-defined]
            if self._ranks.first:
                kept[key] = whole.cpu()
        for name in [name for name in self.names if name in self._policy.rounded]:
            whole = masters[name].detach().full_tensor()  # type: ignore[attr-defined]
            if self._ranks.first:
                kept[f"{name}|master"] = whole.cpu()
        return kept

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take up this rank's share of what `state_tensors` gave, on any number of ranks.

        Raises:
            ValueError: names or shapes do not belong to this policy.
        """
        shares = dict(zip(self.names, self._shares, strict=True))
        parts, masters = dict[str, Tensor](), list[tuple[Tensor, Tensor]]()
        for key, whole in tensors.items():
            name, _, entry = key.rpartition("|")
            if entry == "step" or name not in shares:
                parts[key] = whole
                continue
            share = shares[name]
            if whole.shape != share.shape:
                raise ValueError(f"optimizer state {name}: {list(whole.shape)} does not fit {list(share.shape)}")
            part = distribute_tensor(whole.to(self._policy.device), self._policy.mesh, SPLIT, src_data_rank=None)
            if entry == "master":
                masters.append((local(share), local(part)))
            else:
                parts[key] = local(part)
        super().load_state_tensors(parts)
        for own, given in masters:
            own.copy_(given)
