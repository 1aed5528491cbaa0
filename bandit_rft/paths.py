"""Paths in a configuration file start at the folder that holds it, so a run can be moved, with its data or without.

A saved configuration names what is on disk relative to its run folder. Where nothing is there any more, the folder in
which the run was saved (its checkpoints say) is tried, then the current one. What no path names stays a name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_PATTERNS = {  # what stands before a path, the path, what stands behind it
    "model_name_or_path": re.compile(r"()((?!arithmetic-base$).+)()"),
    "data_path": re.compile(r"()(.+)()"),
    "task": re.compile(r"()(.*/.*|.+\.(?:jsonl|json|parquet|csv))()"),  # a file, or the name of a task
    "task_options.test_path": re.compile(r"()(.+)()"),
    "reward.functions": re.compile(r"((?:(?:batch|sample|verl|openrlhf):)?)(.+\.py)((?::[^:]*)?)"),
    "evaluation.files": re.compile(r"((?:[^=/]*=)?)(.+)()"),
}


def change_paths(key: str, value: Any, change: Callable[[str], str]) -> Any:
    """A key's value with `change` applied to its path, if it has one; of a list, such as reward.functions, to each."""
    if isinstance(value, list):
        return [change_paths(key, entry, change) for entry in value]
    pattern = _PATTERNS.get(key)
    if pattern is None or not isinstance(value, str) or not (match := pattern.fullmatch(value)):
        return value
    return match[1] + change(match[2]) + match[3]


def absolute(path: str) -> str:
    """The absolute path of something that is on disk; any other text as it is."""
    place = Path(path).expanduser()
    return os.path.abspath(place) if _there(place) else path


def relative_to(folder: Path) -> Callable[[str], str]:
    """Paths to what is on disk, relative to a folder; any other text as it is."""

    def change(path: str) -> str:
        if not _there(Path(path).expanduser()):
            return path
        found = os.path.relpath(os.path.abspath(Path(path).expanduser()), os.path.abspath(folder))
        return found if found.startswith("..") else f"./{found}"

    return change


def found_from(folder: Path) -> Callable[[str], str]:
    """Paths of a file in `folder`, as they lead there from the current folder."""

    def change(path: str) -> str:
        if Path(path).expanduser().is_absolute():
            return path
        for start in (folder, *saved_in(folder)):
            place = os.path.normpath(start / path)  # before looking: where the run was saved there may be no folder now
            if _there(Path(place)):
                return place
        return path

    return change


def from_folder(folder: Path, key: str, value: Any) -> Any:
    """A value of a configuration file in `folder`: its paths as they lead there from the current folder.

    A relative output_dir starts at `folder` where it says so, with "." or "..".
    """
    if key == "output_dir" and isinstance(value, str) and re.match(r"\.\.?(/|$)", value):
        return os.path.normpath(folder / value)
    if isinstance(value, str) and key in ("reward.functions", "evaluation.files"):
        value = [part.strip() for part in value.split(",") if part.strip()]
    return change_paths(key, value, found_from(folder))


def saved_in(folder: Path) -> list[Path]:
    """Where a run folder was when its checkpoints were saved; [] where none says."""
    for state in sorted(folder.glob("checkpoints/checkpoint-*/state.json"), reverse=True):
        try:
            place = json.loads(state.read_text(encoding="utf-8"))["folder"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(place, str):
            return [Path(place)]
    return []


def saved_tree(tree: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A nested configuration with `change` applied to every path in it."""

    def walk(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        return {
            name: walk(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else change_paths(f"{prefix}{name}", value, change)
            for name, value in node.items()
        }

    return walk(tree, "")


def same_place(key: str, one: Any, folder: Path | None, other: Any, other_folder: Path) -> bool:
    """Whether two values of a key mean the same files, each of a run in its folder: absolute, or from that folder."""

    def forms(value: Any, start: Path | None) -> list[Any]:
        changes = (
            [absolute] if start is None else [absolute, lambda path: os.path.relpath(os.path.abspath(path), start)]
        )
        return [value, *(change_paths(key, value, change) for change in changes)]

    theirs = forms(other, Path(os.path.abspath(other_folder)))
    return key in _PATTERNS and any(form in theirs for form in forms(one, folder))


def _there(place: Path) -> bool:
    try:
        return place.exists()
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False
