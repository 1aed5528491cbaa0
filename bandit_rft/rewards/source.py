"""What a reward in a file is known by later: its source, read and never run."""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from bandit_rft.rewards.spec import RewardFunction


def source_digest(reward: RewardFunction) -> str | None:
    """What the code of a function in a file is known by: "<Python's version>:<digest of the statements it reaches>".

    The statements are the file's own that define the function, and those that define what it names, and so on; besides
    them what the file only executes. Comments, docstrings and the layout do not count, nor does what other files
    define. A syntax tree differs between versions of Python.

    Returns:
        None for a function that a program gave, for what comes with this package, and where there is no source.
    """
    module, _, name = reward.target.rpartition(":")
    if reward.function is not None or module.partition(".")[0] == __package__.partition(".")[0]:
        return None
    try:
        file = _source_file(module)
        if file is None:
            return None
        reached = _reached(ast.parse(file.read_bytes()), {name.partition(".")[0], "PREPARE"})
        described = "\n".join(map(ast.dump, reached))
    except Exception:  # no file, no Python, nested too deeply: a digest must not end a run; a worker says what is wrong
        return None
    return f"{sys.version_info.major}.{sys.version_info.minor}:{hashlib.sha256(described.encode()).hexdigest()[:32]}"


def _source_file(module: str) -> Path | None:
    """Where the source of a module lies; nothing is imported."""
    if module.endswith(".py"):
        return Path(module)
    head, *rest = module.split(".")
    spec = importlib.util.find_spec(head)
    for part in rest:
        if spec is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _reached(tree: ast.Module, names: set[str]) -> list[ast.stmt]:
    """The statements of a file that define the names, or a name which one of these uses, in the order of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            node.body = [part for part in node.body if not _is_text(part)]
    defined = {statement: set(_defined(statement)) for statement in tree.body if not _is_self_test(statement)}
    # What is run when the file is read counts in any case: so does what a decorator may have kept somewhere.
    reached = {s for s, own in defined.items() if not own or getattr(s, "decorator_list", None)}
    names = names | {name for statement in reached for name in _used(statement)}
    while more := {statement for statement, own in defined.items() if own & names} - reached:
        reached |= more
        names |= {name for statement in more for name in _used(statement)}
    return [statement for statement in tree.body if statement in reached]


def _defined(statement: ast.stmt) -> Iterator[str]:
    """The file's names that a statement gives a value: all that stand in it, for `if` and `try` have statements too."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
        return
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]


def _used(part: ast.AST) -> Iterator[str]:
    return (node.id for node in ast.walk(part) if isinstance(node, ast.Name))


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _is_self_test(statement: ast.stmt) -> bool:
    """Whether it is `if __name__ == "__main__":`, which no worker executes."""
    return isinstance(statement, ast.If) and "__name__" in _used(statement.test)
