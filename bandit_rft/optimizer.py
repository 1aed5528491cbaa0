"""AdamW over the policy's parameters, with float32 master weights where the model itself is in lower precision.

At the learning rates of reinforcement fine-tuning an update is far below the spacing of bfloat16 numbers: added to a
bfloat16 weight it is rounded away. So the optimizer keeps a float32 copy, updates that, and rounds it into the model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_HOOKS: Any = WeakTensorKeyDictionary()


class PolicyOptimizer:
    """Gradients, their clipping, and one AdamW step.

    Every parameter owns a gradient buffer from the start, zeros included, float32 (float64 for float64): the fused head
    adds its weight gradient straight into it, and a round in which no rollout counts is still a step (moments and
    weights decay).

    Args:
        named_parameters: what is trained, at least one, by name.
        learning_rate: of AdamW.
        betas: decay of the first and second moments, a step.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate.
        max_grad_norm: gradients are scaled down to this norm; 0: never.

    Raises:
        ValueError: named_parameters is empty.
    """

    def __init__(
        self,
        named_parameters: list[tuple[str, nn.Parameter]],
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
    ):
        if not named_parameters:
            raise ValueError("named_parameters is empty: the policy has no trainable parameter")
        self.names = [name for name, _ in named_parameters]
        self.parameters = [parameter for _, parameter in named_parameters]
        self.masters = [
            p if p.dtype in (torch.float32, torch.float64) else nn.Parameter(p.detach().float())
            for p in self.parameters
        ]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        # A lower-precision gradient goes into the float32 buffer as soon as autograd has it: summed over micro-batches
        # in its own precision, it would depend on how they were cut. A parameter belongs to its latest optimizer.
        self._hooks: Any = WeakTensorKeyDictionary()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                if earlier := _HOOKS.get(parameter):
                    earlier.remove()
                self._hooks[parameter] = _HOOKS[parameter] = parameter.register_post_accumulate_grad_hook(
                    partial(_move_gradient, master)
                )
        self.max_grad_norm = max_grad_norm
        #: Whether a step is refused on the device, and the host hears of it from `refused`; elsewhere `step` raises.
        self.asynchronous = self.masters[0].device.type != "cpu"
        self._refused = torch.zeros((), device=self.masters[0].device)  # 1: no step is applied until `refused`
        self._adamw = torch.optim.AdamW(
            self.masters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True
        )

    def close(self) -> None:
        """Take no gradient any more: from here on autograd leaves it in the parameter, for whoever trains it next."""
        for parameter, hook in self._hooks.items():
            hook.remove()
            if _HOOKS.get(parameter) is hook:
                del _HOOKS[parameter]

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self._adamw.param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self._adamw.param_groups[0]["lr"] = rate

    def grad_buffer(self, parameter: Tensor) -> Tensor:
        """The gradient buffer [as parameter], into which a gradient of this parameter may be added."""
        grad = self.masters[next(i for i, p in enumerate(self.parameters) if p is parameter)].grad
        assert grad is not None
        return grad

    def step(self) -> Tensor:
        """Clip, update, and clear the gradients.

        A norm that is not finite leaves weights and moments untouched. On a CPU it raises at once; elsewhere nothing
        here waits for the device, which refuses this step and all later ones until `refused`.

        Returns:
            The gradients' norm before clipping, 0-d.

        Raises:
            FloatingPointError: on a CPU, the norm is not finite.
        """
        grads = [master.grad for master in self.masters if master.grad is not None]
        norm = self._norm(grads)
        if self.asynchronous:
            self.refuse(~torch.isfinite(norm))
            # AdamW's fused kernel leaves everything as it is where this is 1.
            self._adamw.found_inf = self._refused  # type: ignore[attr-defined]
        elif not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {float(norm)}: the update was not applied")
        if self.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.masters, self.max_grad_norm, norm)
        self._adamw.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                parameter.data.copy_(master.detach())
        torch._foreach_zero_(grads)
        return norm

    def _norm(self, grads: list[Tensor]) -> Tensor:
        """The norm of all gradients together, 0-d."""
        return nn.utils.get_total_norm(grads)

    def refuse(self, condition: Tensor) -> None:
        """Where condition (0-d bool) holds, no step is applied from here to the next `refused`; waits for nothing."""
        self._refused.logical_or_(condition)

    def refused(self) -> Tensor:
        """1 where a step since the last call was not applied, 0-d on the device; steps are taken again from here."""
        refused = self._refused.clone()
        self._refused.zero_()
        return refused

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything needed to continue bit for bit, as tensors by name."""
        tensors: dict[str, Tensor] = {}
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            for key, value in self._adamw.state[master].items():
                tensors[f"{name}|{key}"] = value.detach()
            if parameter is not master:
                tensors[f"{name}|master"] = master.detach()
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `state_tensors` gave.

        Raises:
            ValueError: names or shapes do not belong to this policy.
        """
        states: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, entry = key.rpartition("|")
            states.setdefault(name, {})[entry] = value
        if unknown := set(states) - set(self.names):
            raise ValueError(f"the optimizer state names parameters this policy does not have: {sorted(unknown)[:3]}")
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            state = states.get(name, {})
            kept = state.pop("master", None)
            if kept is not None and parameter is not master:
                master.data.copy_(kept)
            for key, value in state.items():
                if key != "step" and value.shape != master.shape:
                    raise ValueError(f"optimizer state {name}: {list(value.shape)} does not fit {list(master.shape)}")
            if state:
                self._adamw.state[master] = {
                    k: v.to(master.device, torch.float32 if k == "step" else None, copy=True) for k, v in state.items()
                }


def _move_gradient(master: nn.Parameter, parameter: Tensor) -> None:
    """Add a parameter's gradient to its master's float32 buffer and forget it."""
    if parameter.grad is not None and master.grad is not None:
        master.grad.add_(parameter.grad)
        parameter.grad = None
