"""AdamW over the policy's parameters, with float32 master weights where the model itself is in lower precision.

At the learning rates of reinforcement fine-tuning an update is far below the spacing of bfloat16 numbers: added to a
bfloat16 weight it is rounded away. So the optimizer keeps a float32 copy, updates that, and rounds it into the model.
Parameters whose entries do not lie side by side have such a copy, too: AdamW's kernel would step on what is between.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_HOOKS: Any = WeakTensorKeyDictionary()
_ROW = 1 << 16  # gradients whose squares are added up together
_STATE = {"step", "exp_avg", "exp_avg_sq"}  # of a parameter that has been stepped on
_ALIGNED = 16  # entries, so that vectors of any kernel begin where a gradient does


class PolicyOptimizer:
    """Gradients, their clipping, and one AdamW step.

    Every parameter owns a gradient buffer from the start, zeros included, float32 (float64 for float64): the fused head
    adds its weight gradient straight into it, and a round in which no rollout counts is still a step (moments and
    weights decay). The buffers lie side by side, so that a norm, a clip or a sum over ranks is one call.

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
        self.masters = [p if _steps_in_place(p) else nn.Parameter(_master_of(p)) for p in self.parameters]
        #: All gradients side by side: one vector a dtype and device.
        self.gradients = _gradients_of(self.masters)
        self._parts = [cast(Tensor, master.grad) for master in self.masters]
        # The gradient of a parameter with a master goes into the master's as soon as autograd has it: summed over
        # micro-batches in its own precision, it would depend on how they were cut. A parameter belongs to its latest
        # optimizer.
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
        # 1: no step is applied until `refused`. AdamW's fused kernel takes it in float32.
        self._refused = torch.zeros((), dtype=torch.float32, device=self.masters[0].device)
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
        self._take_replaced()
        return self._parts[next(i for i, p in enumerate(self.parameters) if p is parameter)]

    def clear(self) -> None:
        """Forget the gradients, those too that somebody has put in their places."""
        for gradient in self.gradients:
            gradient.zero_()
        for master, part in zip(self.masters, self._parts, strict=True):
            master.grad = part

    @torch.no_grad()
    def step(self) -> Tensor:
        """Clip, update, and clear the gradients.

        A norm that is not finite leaves weights and moments untouched. On a CPU it raises at once; elsewhere nothing
        here waits for the device, which refuses this step and all later ones until `refused`.

        Returns:
            The gradients' norm before clipping, 0-d.

        Raises:
            FloatingPointError: on a CPU, the norm is not finite. The gradients are forgotten.
            RuntimeError: a newer optimizer has parameters that have a master here, or this one is closed; or a
                parameter lies otherwise in memory than it did.
        """
        if any(_HOOKS.get(parameter) is not hook for parameter, hook in self._hooks.items()):
            raise RuntimeError("the parameters have a newer optimizer, or this one is closed: make another")
        self._take_replaced()
        norm = self._norm()
        if self.asynchronous:
            self.refuse(~torch.isfinite(norm))
            # AdamW's fused kernel leaves everything as it is where this is 1.
            self._adamw.found_inf = self._refused  # type: ignore[attr-defined]
        elif not torch.isfinite(norm):
            self.clear()
            raise FloatingPointError(f"the gradient norm is {float(norm)}: the update was not applied")
        if self.max_grad_norm > 0:
            coefficient = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as PyTorch's clip_grad_norm_ has it
            for gradient in self.gradients:
                gradient.mul_(coefficient.to(gradient))
        self._adamw.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                parameter.data.copy_(master.detach())
        self.clear()
        return norm

    @torch.no_grad()
    def _take_replaced(self) -> None:
        """See that every gradient is in `gradients`: `zero_grad` and a newer optimizer put others in their places."""
        for name, master, part in zip(self.names, self.masters, self._parts, strict=True):
            if _layout(master) != _layout(part):  # as somebody has set its data
                raise RuntimeError(
                    f"{name} has the strides {master.stride()} now, {part.stride()} when it was taken up"
                )
            if master.grad is not part:
                part.zero_() if master.grad is None else part.copy_(master.grad)
                master.grad = part

    def _norm(self) -> Tensor:
        """The norm of all gradients together, 0-d.

        By rows: on a CPU, PyTorch adds up the squares of a whole tensor in float32, whose sum outgrows what is added.
        """
        norms = []
        for gradient in self.gradients:
            rows, rest = gradient.tensor_split([len(gradient) // _ROW * _ROW])
            norms += [torch.linalg.vector_norm(part, dim=1) for part in (rows.view(-1, _ROW), rest.view(1, -1))]
        norm: Tensor = torch.linalg.vector_norm(torch.cat([of.to(norms[0].device) for of in norms]))
        return norm

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
        if states and (missing := [name for name in self.names if name not in states]):
            raise ValueError(f"the optimizer state lacks parameters that are trained now: {missing[:3]}")
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            state = states.get(name, {})
            if ("master" not in state) != (parameter is master) and name in states:
                was = "in place, in float32 or float64" if parameter is not master else "through a float32 master copy"
                raise ValueError(
                    f"optimizer state {name}: it was trained {was}, and is {parameter.dtype} with strides "
                    f"{parameter.stride()} now"
                )
            if state.keys() - {"master"} not in (set(), _STATE):
                raise ValueError(f"optimizer state {name}: expected {sorted(_STATE)}; got {sorted(state)}")
            for key, value in state.items():
                if key != "step" and value.shape != master.shape:
                    raise ValueError(f"optimizer state {name}: {list(value.shape)} does not fit {list(master.shape)}")
        self._adamw.state.clear()
        for name, master in zip(self.names, self.masters, strict=True):
            state = states.get(name, {})
            if (kept := state.pop("master", None)) is not None:
                master.data.copy_(kept)
            if state:
                self._adamw.state[master] = {
                    k: v.to(master.device, torch.float32, copy=True) if k == "step" else _laid_out_as(master, v)
                    for k, v in state.items()
                }


def _steps_in_place(parameter: Tensor) -> bool:
    """Whether AdamW may step on the parameter itself: its kernel takes entries in the order of memory, all of them."""
    return parameter.dtype in (torch.float32, torch.float64) and parameter.stride() == _dense_stride(parameter)


def _master_of(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.float64 if parameter.dtype == torch.float64 else torch.float32, copy=True)


def _laid_out_as(master: Tensor, values: Tensor) -> Tensor:
    """The values with the master's entries in its order: AdamW's kernel takes all of them in the order of memory."""
    return torch.empty_like(master, dtype=values.dtype).copy_(values)


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """Of a copy: the same where nothing lies between the tensor's entries."""
    return torch.empty_like(tensor, device="meta").stride()


def _layout(tensor: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides; where there is one entry, its stride says nothing."""
    return [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _gradients_of(masters: list[nn.Parameter]) -> list[Tensor]:
    """Zeros for the gradients of all, side by side, of which each master's `grad` becomes its part."""
    found = []
    for kind in dict.fromkeys((master.dtype, master.device) for master in masters):
        of_kind = [master for master in masters if (master.dtype, master.device) == kind]
        places = [0, *itertools.accumulate(-(-master.numel() // _ALIGNED) * _ALIGNED for master in of_kind)]
        whole = torch.zeros(places[-1], dtype=kind[0], device=kind[1])
        for master, place in zip(of_kind, places, strict=False):
            master.grad = whole.as_strided(master.shape, _dense_stride(master), place)
        found.append(whole)
    return found


def _move_gradient(master: nn.Parameter, parameter: Tensor) -> None:
    """Add a parameter's gradient to its master's float32 buffer and forget it."""
    if parameter.grad is not None and master.grad is not None:
        master.grad.add_(parameter.grad)
        parameter.grad = None
