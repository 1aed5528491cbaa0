"""Rewards that a program gave as functions: how a configuration calls them, and what they are known by later."""

from __future__ import annotations

import dis
import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from bandit_rft.rewards.spec import BUILTINS, SESSION, RewardFunction

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))


def reward_text(reward: RewardFunction) -> str:
    """The text that RewardFunction.parse reads back to this reward; where there is none, its name behind "session:"."""
    for name, builtin in BUILTINS.items():
        if builtin == reward:
            return name
    kind = "" if reward.kind == "batch" else f"{reward.kind}:"
    text = f"{kind}{reward.target}"
    try:
        if RewardFunction.parse(text) == reward:
            return text
    except ValueError:
        pass
    return f"{SESSION}{kind}{reward.name}"


def code_digest(function: Callable[..., Any]) -> str:
    """What a function of the session is known by: "<Python's version>:<digest of what it computes>".

    Running a notebook's cell again makes another function of the same digest: comments, docstrings, line numbers and
    file names do not count. What counts is its code, its parameters and their defaults, the plain values that it reads
    from around it, and the functions and classes beside it that it calls. What is mutable, as a list or a model, counts
    by its type alone; what other modules define, by its name. Bytecode differs between versions of Python.
    """
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    module = sys.modules.get(getattr(inner, "__module__", None) or "")
    try:
        described = json.dumps(_described(function, vars(module) if module else {}, {}))
    except Exception:  # whatever a program keeps beside its functions: a digest must not end a run
        described = json.dumps(getattr(inner, "__qualname__", type(inner).__qualname__))
    return f"{sys.version_info.major}.{sys.version_info.minor}:{hashlib.sha256(described.encode()).hexdigest()[:32]}"


def _described(value: Any, around: Mapping[str, Any], seen: dict[int, Any]) -> Any:
    """A value as JSON that is the same in every process; `around` are the globals of the code that reads it."""
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, tuple):
        return ["tuple", *(_described(part, around, seen) for part in value)]
    if isinstance(value, frozenset):  # whose order is another in every process
        return ["frozenset", *sorted(json.dumps(_described(part, around, seen)) for part in value)]
    if isinstance(value, re.Pattern):
        return ["pattern", repr(value.pattern), value.flags]
    if isinstance(value, CodeType):
        return _code(value, around, seen)
    if isinstance(value, ModuleType):
        return f"module {value.__name__}"
    if id(value) in seen:  # each once: functions may call themselves and each other
        return f"number {list(seen).index(id(value))}"
    seen[id(value)] = value  # kept, so that nothing else gets its id
    if isinstance(value, MethodType):
        return ["method", _described(value.__func__, around, seen), _described(value.__self__, around, seen)]
    if isinstance(value, functools.partial):
        given = (value.args, tuple(sorted(value.keywords.items())))
        return ["partial", _described(value.func, around, seen), _described(given, around, seen)]
    if isinstance(value, FunctionType):
        return _function(value, around, seen)
    if "__wrapped__" in getattr(value, "__dict__", {}):  # functools.cache and the like
        return [type(value).__name__, _described(value.__wrapped__, around, seen)]
    if isinstance(value, type):
        named = f"class {value.__module__}.{value.__qualname__}"
        return [named, *_members(vars(value), around, seen)] if _beside(value.__module__, around) else named
    kind = type(value)
    if not _beside(kind.__module__, around):
        name = getattr(value, "__qualname__", None)  # of what is written in C
        return f"{kind.__module__}.{kind.__qualname__} {name or ''}"
    return [_described(kind, around, seen), *_members(getattr(value, "__dict__", {}), around, seen)]


def _beside(module: str, around: Mapping[str, Any]) -> bool:
    """Whether a module is that of the code, or of the session."""
    return module in ("__main__", around.get("__name__"))


def _members(members: Mapping[str, Any], around: Mapping[str, Any], seen: dict[int, Any]) -> list[Any]:
    """What a class or an object of the session holds, without what Python puts there itself."""
    parts: list[Any] = []
    for name, value in sorted(members.items()):
        if isinstance(value, staticmethod | classmethod | property):
            value = value.fget if isinstance(value, property) else value.__func__
        if name in ("__call__", "__init__") or not name.startswith("__"):
            parts.append([name, _described(value, around, seen)])
    return parts


def _function(function: FunctionType, around: Mapping[str, Any], seen: dict[int, Any]) -> Any:
    if around and function.__globals__ is not around and not _beside(function.__module__ or "", around):
        return f"{function.__module__}.{function.__qualname__}"
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # nothing was assigned yet
            cells.append(None)
    around = function.__globals__
    given = (function.__defaults__, tuple(sorted((function.__kwdefaults__ or {}).items())), tuple(cells))
    return [_code(function.__code__, around, seen), _described(given, around, seen)]


def _code(code: CodeType, around: Mapping[str, Any], seen: dict[int, Any]) -> Any:
    instructions = list(dis.get_instructions(code))
    written = {i.argval for i in instructions if i.opname == "STORE_GLOBAL"}
    read = {str(i.argval) for i in instructions if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")} - written
    return {
        "parameters": [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, list(code.co_varnames)],
        "code": [[i.opname, _argument(i, around, seen)] for i in instructions],
        "around": [[name, _described(around[name], around, seen)] for name in sorted(read) if name in around],
    }


def _argument(instruction: dis.Instruction, around: Mapping[str, Any], seen: dict[int, Any]) -> Any:
    """What an instruction takes: the constant or the name itself, not where it stands among them."""
    if instruction.opcode in dis.hasconst:
        return _described(instruction.argval, around, seen)
    return instruction.argval if isinstance(instruction.argval, str) else instruction.arg
