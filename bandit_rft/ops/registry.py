"""Registers the operations with torch.library, so that they trace under torch.compile and pass torch.library.opcheck.

`torch.library.custom_op` would do the same, but imports the whole compiler at the first call (seconds) and adds its own
wrapper to every later one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_library = torch.library.Library("bandit_rft", "DEF")
Function = TypeVar("Function", bound=Callable[..., Any])


def operation(name: str, fake: Callable[..., Any]) -> Callable[[Function], Callable[..., Any]]:
    """Register a function without side effects as torch.ops.bandit_rft.<name>; `fake` gives its results' shapes."""

    def register(function: Function) -> Callable[..., Any]:
        _library.define(name + torch.library.infer_schema(function, mutates_args=()))
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"bandit_rft::{name}", fake, lib=_library)
        overload: Callable[..., Any] = getattr(torch.ops.bandit_rft, name).default
        return overload

    return register


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"bandit_rft::{name}", backward, setup_context=setup_context, lib=_library)
