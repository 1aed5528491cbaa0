"""A policy whose parameters are split over the ranks (FSDP2), beside the whole one that is drawn with and saved.

The layers are `fully_shard`ed: each is gathered for its forward pass and again for its backward pass, and its gradient
is summed into the rank's share. The head stands outside of them: the fused loss takes it as one matrix, so it is
gathered once for all micro-batches of a step, its gradient adds up in one float32 buffer, and that is summed over the
ranks once.

Low-precision parameters that are trained have float32 shares, which are the optimizer's master weights; they are
rounded when they are gathered.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from bandit_rft.model import Policy, UnsupportedModelError

SPLIT = (Shard(0),)
SUMS = (torch.float32, torch.float64)


class ShardedPolicy(Policy):
    """The trained (or scoring) side of a policy; collective: every rank calls the same in the same order.

    Attributes:
        whole: the policy that was sharded. Its weights are those of the last `gather_whole`.
        mesh: the ranks, in one dimension.
        shares: this rank's share of every parameter, DTensors by the name it has in the whole model.
        stale: whether the whole policy's weights are older than the shares.

    Raises:
        UnsupportedModelError: for a model that cannot be trained so; distributed.shard=ddp remains.
    """

    def __init__(self, whole: Policy):
        _check(whole)
        vars(self).update(vars(whole))
        self.whole, self.stale = whole, False
        self.mesh = init_device_mesh(whole.device.type, (torch.distributed.get_world_size(),))
        copies: dict[int, Any] = {}
        self.base = copy.deepcopy(whole.base, copies)
        self._checkpointed = [copies[id(layer)] for layer in whole._checkpointed]
        _shard(self.base, self.mesh)
        # After sharding, a parameter is known by its module alone; tied ones are one parameter of two names.
        within = dict(self.base.named_parameters(remove_duplicate=False))
        inside = {id(p): within[name] for name, p in whole.base.named_parameters(remove_duplicate=False)}
        self.shares: dict[str, Tensor] = {}
        for name, parameter in whole.model.named_parameters():
            share = inside.get(id(parameter))
            self.shares[name] = _share(parameter, self.mesh) if share is None else share
        names = {id(p): name for name, p in whole.model.named_parameters()}
        self._head_shares = {
            kind: self.shares[names[id(tensor)]]
            for kind, tensor in (("weight", whole.weight), ("bias", whole.bias))
            if tensor is not None
        }
        self._computing = whole.weight.dtype
        #: What is computed with in a lower precision than it is kept in.
        self.rounded = {name for name, p in whole.model.named_parameters() if p.dtype != self.shares[name].dtype}
        self._sums: dict[str, Tensor] = {}  # [V, H] and [V]: gradients of the head, not yet summed over ranks
        self.drop_head()

    # --- as a policy --------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the shares lie."""
        return next(iter(self._head_shares.values())).to_local().device  # type: ignore[attr-defined, no-any-return]

    def parameters(self) -> list[nn.Parameter]:
        """This rank's shares of what is trained."""
        return [share for _, share in self.named_parameters()]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's shares of what is trained, by the names that they have in the whole model."""
        return [(name, share) for name, share in self.shares.items() if share.requires_grad]  # type: ignore[misc]

    # --- the head -----------------------------------------------------------------------------------------------------

    def gather_head(self) -> None:
        """Make `weight` (and `bias`) whole, for the forward passes that follow."""
        for kind, share in self._head_shares.items():
            head = _gathered(share, self._computing).requires_grad_(share.requires_grad)
            if kind == "bias" and share.requires_grad:
                head.register_post_accumulate_grad_hook(partial(_move_gradient, self.head_sum(kind)))
            setattr(self, kind, head)

    def drop_head(self) -> None:
        """Keep the shares alone; a use of the head before the next `gather_head` fails."""
        for kind, share in self._head_shares.items():
            setattr(self, kind, torch.empty(share.shape, dtype=self._computing, device="meta"))

    def head_sum(self, kind: str) -> Tensor:
        """The buffer, whole and in the dtype of the shares, in which a step's gradient of the head adds up."""
        if kind not in self._sums:
            share = self._head_shares[kind]
            self._sums[kind] = torch.zeros(share.shape, dtype=share.dtype, device=self.device)
        return self._sums[kind]

    def reduce_head(self, gradients: dict[int, Tensor]) -> None:
        """Sum the head's gradient over the ranks and add it to the gradients, by id of the share; once a step."""
        for kind, share in self._head_shares.items():
            if share.requires_grad:
                whole = DTensor.from_local(self.head_sum(kind), self.mesh, (Partial(),), run_check=False)
                gradients[id(share)].add_(whole.redistribute(placements=SPLIT).to_local())
        self._sums.clear()

    def forget_head_sums(self) -> None:
        """Without them; their next use begins with zeros."""
        self._sums.clear()

    # --- the whole policy ---------------------------------------------------------------------------------------------

    def gather_whole(self) -> None:
        """Give the whole policy the weights as trained, rounded to its dtype, where they are not there."""
        if not self.stale:
            return
        for name, parameter in self.whole.model.named_parameters():
            if parameter.requires_grad or not parameter.numel():
                parameter.data = _gathered(self.shares[name], parameter.dtype)
        self.stale = False

    def release_whole(self) -> None:
        """Free the whole policy's weights until `gather_whole`."""
        for parameter in self.whole.model.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        self.stale = True


def local(share: Tensor) -> Tensor:
    """This rank's part of a parameter, in the share's own memory."""
    part: Tensor = share.detach().to_local()  # type: ignore[attr-defined]
    return part


def like_share(part: Tensor, share: Tensor, mesh: DeviceMesh) -> Tensor:
    """A tensor of this rank that is split as `share` is."""
    return DTensor.from_local(part, mesh, SPLIT, run_check=False, shape=share.shape, stride=share.stride())


def _gathered(share: Tensor, dtype: torch.dtype) -> Tensor:
    """A whole parameter, in a dtype."""
    whole: Tensor = share.detach().to(dtype).full_tensor()  # type: ignore[attr-defined]
    return whole


def _share(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """The share of a parameter that no layer holds."""
    low = parameter.requires_grad and parameter.dtype not in SUMS
    data = parameter.detach().float() if low else parameter.detach().clone()
    split = distribute_tensor(data, mesh, SPLIT, src_data_rank=None)
    return nn.Parameter(split, requires_grad=parameter.requires_grad)


def _shard(base: nn.Module, mesh: DeviceMesh) -> None:
    """Split a model's layers, and what is outside of them."""
    computing = next((p.dtype for p in base.parameters() if p.requires_grad and p.dtype not in SUMS), None)
    options: dict[str, Any] = {
        "mesh": mesh, "reshard_after_forward": True,
        # Its inputs are token ids and positions: nothing to cast.
        "mp_policy": MixedPrecisionPolicy(computing, torch.float32 if computing else None, cast_forward_inputs=False),
    }  # fmt: skip
    for module in [*(m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)), base]:
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.dtype not in SUMS:  # a layer at a time: all would need memory
                parameter.data = parameter.data.float()
        fully_shard(module, **options)
    for module in base.modules():
        if isinstance(module, FSDPModule):  # the setters are not recursive in every version
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
            module.set_reduce_scatter_unused_params(True)


def _check(policy: Policy) -> None:
    """Refuse what would not be the same model, or would make the ranks wait for each other for ever."""
    name, instead = type(policy.model).__name__, "; distributed.shard=ddp trains it"
    plan = policy.plan
    if plan.mode == "single" or plan.apart is not None:
        raise UnsupportedModelError(
            f"{name}: the calls that one micro-batch takes depend on its sequences' lengths, so that ranks would not "
            f"make equally many{instead}"
        )
    dtypes = {p.dtype for p in policy.model.parameters()}
    if len(dtypes) > 1 and any(p.requires_grad and p.dtype not in SUMS for p in policy.model.parameters()):
        raise UnsupportedModelError(
            f"{name}: it has parameters of several dtypes ({sorted(map(str, dtypes))}){instead}"
        )
    held = {id(p) for p in policy.base.parameters()} | {id(policy.weight), id(policy.bias)}
    if outside := [name for name, p in policy.named_parameters() if id(p) not in held]:
        raise UnsupportedModelError(f"{name}: {outside[0]} is neither of its layers nor of its head{instead}")


def _move_gradient(into: Tensor, head: Tensor) -> None:
    """Add a gradient to its buffer and forget it."""
    if head.grad is not None:
        into.add_(head.grad)
        head.grad = None
