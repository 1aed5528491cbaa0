"""Registers the operations with torch.library, so that they trace under torch.compile and pass torch.library.opcheck.

`torch.library.custom_op` would do the same, but imports the whole compiler at the first call (seconds) and adds its own
wrapper to every later one.

A custom operation takes tensors and numbers one after another; the functions here take some of them together, as
NamedTuples. The schema is made from the fields, in order; a call spreads them (`*scaling`), and every function that is
registered gets them put together again.

A call on plain tensors that nothing traces or transforms goes to the function itself: torch.library's way through the
dispatcher costs a few hundred microseconds, more than the work of a small batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, cast, get_type_hints

import torch
from torch import Tensor
from torch.nn import Parameter

_library = torch.library.Library("bandit_rft", "DEF")
Function = TypeVar("Function", bound=Callable[..., Any])


class Arguments:
    """The parameters of a function, some of which are NamedTuples, and the flat ones of its operation."""

    def __init__(self, function: Callable[..., Any]) -> None:
        hints = get_type_hints(function)
        self._groups: list[tuple[Callable[[Any], Any] | None, int]] = []
        flat: dict[str, Any] = {}
        for name in inspect.signature(function).parameters:
            fields = getattr(hints[name], "_fields", None)
            self._groups.append((None, 1) if fields is None else (partial(tuple.__new__, hints[name]), len(fields)))
            flat.update({name: hints[name]} if fields is None else get_type_hints(hints[name]))
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self._signature = inspect.Signature(
            [inspect.Parameter(name, kind, annotation=hint) for name, hint in flat.items()],
            return_annotation=hints["return"],
        )
        self.count = len(flat)

    def schema(self, mutates: Sequence[str]) -> str:
        """As torch.library.define takes it."""

        def prototype() -> None: ...

        prototype.__signature__ = self._signature  # type: ignore[attr-defined]
        return torch.library.infer_schema(prototype, mutates_args=mutates)

    def together(self, flat: Sequence[Any]) -> list[Any]:
        """The function's own arguments, from those of the operation."""
        own, at = [], 0
        for make, size in self._groups:
            own.append(flat[at] if make is None else make(flat[at : at + size]))
            at += size
        return own

    def taking_flat(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as the operation calls it, without autocast: products here choose their own dtypes."""

        def call(*flat: Any, **named: Any) -> Any:
            if named:
                flat = self._signature.bind(*flat, **named).args
            kind = flat[0].device.type
            if kind != "meta" and torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return function(*self.together(flat))
            return function(*self.together(flat))

        return call


def is_eager(arguments: Sequence[Any]) -> bool:
    """Whether a call is an ordinary one: nothing compiles, traces, fakes or transforms it."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch._C._is_torch_function_mode_enabled() or arguments[0].device.type == "meta":
        return False
    return all(type(value) in (Tensor, Parameter) for value in arguments if isinstance(value, Tensor))


_arguments: dict[str, Arguments] = {}
#: The differentiable operations as autograd functions, for ordinary calls.
_differentiable: dict[str, Any] = {}
#: What the operations run, taking what they take: for tests that watch it.
implementations: dict[str, Callable[..., Any]] = {}


def operation(
    name: str, fake: Callable[..., Any], mutates: Sequence[str] = ()
) -> Callable[[Function], Callable[..., Any]]:
    """Register a function as torch.ops.bandit_rft.<name>.

    Args:
        name: of the operation.
        fake: gives the results' shapes, from the same arguments.
        mutates: the tensors that the function writes to; it has no other side effect.
    """

    def register(function: Function) -> Callable[..., Any]:
        _arguments[name] = arguments = Arguments(function)
        _library.define(name + arguments.schema(mutates))
        implementations[name] = arguments.taking_flat(function)
        _library.impl(name, implementations[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"bandit_rft::{name}", arguments.taking_flat(fake), lib=_library)
        overload: Callable[..., Any] = getattr(torch.ops.bandit_rft, name).default

        def call(*flat: Any) -> Any:
            if not is_eager(flat):
                return overload(*flat)
            if name in _differentiable and torch.is_grad_enabled():
                return _differentiable[name].apply(*flat)
            with torch.no_grad():
                return implementations[name](*flat)

        return call

    return register


def autograd(name: str, backward: Callable[..., tuple[Any, ...]], setup_context: Callable[..., None]) -> None:
    """Give an operation its derivative.

    Args:
        name: of the operation.
        backward: (ctx, *gradients of the results) -> gradients of the first inputs; the other inputs have none.
        setup_context: (ctx, inputs, output), with the function's own arguments as inputs.
    """
    arguments = _arguments[name]

    def whole(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            with torch.no_grad():
                found = backward(ctx, *gradients)
            found = once(found)
        else:
            found = backward(ctx, *gradients)
        return (*found, *(None,) * (arguments.count - len(found)))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, arguments.together(inputs), output)

    torch.library.register_autograd(f"bandit_rft::{name}", whole, setup_context=setup, lib=_library)

    def forward(ctx: Any, *flat: Any) -> Any:
        output = implementations[name](*flat)
        setup(ctx, flat, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(whole)}
    _differentiable[name] = type(name, (torch.autograd.Function,), members)


class _Once(torch.autograd.Function):
    """A gradient that may be used, but not differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *unused: Any) -> Any:
        raise RuntimeError(
            "bandit_rft's operations have no second derivative: their gradients are computed outside autograd. "
            "bandit_rft.ops.reference has the same functions in plain PyTorch, which autograd can differentiate again"
        )


Gradients = TypeVar("Gradients", bound=tuple[Tensor | None, ...])


def once(gradients: Gradients) -> Gradients:
    """The gradients of a backward; where a graph of them is kept (create_graph=True), to differentiate it raises.

    As constants of that graph, which they would be otherwise, they would make a second derivative silently wrong.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    anchor = torch.zeros((), requires_grad=True)
    found = tuple(_Once.apply(g.detach(), anchor) if type(g) is Tensor else g for g in gradients)  # type: ignore[no-untyped-call]
    return cast(Gradients, found)
