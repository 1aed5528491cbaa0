"""Checkpoints: plain Hugging Face folders and what continues the run, written whole or not at all.

Beside the model (peft's layout for adapters) lie optimizer.safetensors, replay.safetensors (what is remembered of
earlier rounds, where something is) and state.json.

A checkpoint is written to a temporary folder, synced to disk, and renamed: a name `checkpoint-<round>` never stands for
half a checkpoint. state.json holds the checksums of the other files and of what it says itself, so a torn or flipped
one is noticed when resuming. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bandit_rft.data import Fingerprint
from bandit_rft.files import sync
from bandit_rft.model import Policy
from bandit_rft.optimizer import PolicyOptimizer

logger = logging.getLogger(__name__)


#: What replay.safetensors holds: 1, flat arrays of trajectories; 2, the columns of a RolloutBatch.
LAYOUT = 2


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: missing, torn, or of another model."""


class LayoutError(CheckpointError):
    """A checkpoint of another version of bandit_rft, intact: not to be passed over for an older one."""


def save_checkpoint(
    folder: Path,
    round_index: int,
    policy: Policy,
    optimizer: Mapping[str, Tensor],
    state: dict[str, Any],
    arrays: dict[str, NDArray[Any]] | None = None,
    keep: int = 0,
    card: str = "",
) -> Path:
    """Write `folder`/checkpoint-<round_index> and remove what is older than the newest ones.

    Args:
        folder: of the run's checkpoints; made where it is missing.
        round_index: the round that was finished last.
        policy: saved as a Hugging Face folder.
        optimizer: its `state_tensors`; go to optimizer.safetensors.
        state: what JSON can hold; goes to state.json.
        arrays: what is remembered of earlier rounds, by name; goes to replay.safetensors.
        keep: how many of the checkpoints written last stay; 0: all.
        card: goes to README.md, which may be edited afterwards: it has no checksum.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full or read-only; every earlier checkpoint is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"checkpoint-{round_index}"
    partial = folder / f".partial-{round_index}-{os.getpid()}"
    for leftover in folder.glob(".partial-*"):  # of a run that was killed while saving; the run folder is locked
        _remove(leftover)
    try:
        partial.mkdir()
        policy.save(partial)
        tensors = {key: value.detach().cpu().contiguous() for key, value in optimizer.items()}
        save_file(tensors, partial / "optimizer.safetensors")
        if arrays:
            safetensors.numpy.save_file(arrays, partial / "replay.safetensors")
        if card:  # in place of peft's
            (partial / "README.md").write_text(card, encoding="utf-8")
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        sums = {str(path.relative_to(partial)): _sha256(path) for path in files if path.name != "README.md"}
        # Later than every other one, also after the clock was set back: the newest are kept, and continued from.
        written = max([time.time_ns(), *(1 + _written(path) for path in list_checkpoints(folder))])
        state = {**state, "layout": LAYOUT, "round": round_index, "written_ns": written, "sha256": sums}
        state["state_sha256"] = state_checksum(state)
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        for path in [*files, partial / "state.json", partial]:
            sync(path)
        if target.exists():  # a round that was saved, resumed from an earlier one, and reached again
            _remove(target)
        partial.rename(target)
        sync(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise OSError(f"{target} could not be saved ({error}); earlier checkpoints are untouched") from error
        raise
    if keep:
        for old in list_checkpoints(folder)[:-keep]:
            _remove(old)
    return target


def _remove(path: Path) -> None:
    """Remove a checkpoint, or the file that stands in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, by the time they were written, oldest first.

    Not by round: a run that was continued from an older checkpoint writes lower numbers later.
    """
    found = [(_written(p), int(m[1]), p) for p in folder.glob("*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for *_, path in sorted(found)]


def _written(path: Path) -> int:
    """When a checkpoint was written, in nanoseconds; copying it does not change that."""
    try:
        return int(json.loads((path / "state.json").read_text())["written_ns"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return path.lstat().st_mtime_ns


def latest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that was written last and is intact, and its state; broken ones are skipped with a warning.

    Raises:
        LayoutError: it is intact, and of another version of bandit_rft.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, read_state(path)
        except LayoutError:
            raise
        except CheckpointError as error:
            logger.warning("%s; falling back to the checkpoint before it", error)
    return None


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _fingerprints(value: Any) -> bool:
    names = {field.name for field in fields(Fingerprint)}
    return isinstance(value, dict) and all(isinstance(x, dict) and x.keys() == names for x in value.values())


def _rewards(value: Any) -> bool:
    names = {"name", "weight", "options", "given", "code"}
    return isinstance(value, list) and all(isinstance(x, dict) and x.keys() == names for x in value)


#: What state.json must hold, if a run is to continue from it; a checkpoint of an earlier version has no fingerprints.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "round": _count,
    "position": _count,
    "generated_tokens": _count,
    "seconds": lambda x: isinstance(x, int | float) and 0 <= x < math.inf,
    "kl_coef": lambda x: isinstance(x, int | float) and math.isfinite(x),
    "layout": lambda x: x is None or _count(x),
    "config": lambda x: isinstance(x, dict),
    "data": lambda x: x is None or _fingerprints(x),
    "rewards": lambda x: x is None or _rewards(x),
}


def state_checksum(state: dict[str, Any]) -> str:
    """SHA-256 of what state.json says, its own checksum left out, however it is laid out."""
    said = {name: value for name, value in state.items() if name != "state_sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint, after comparing every file with its checksum.

    Raises:
        CheckpointError: a file is missing, unreadable or not what was saved.
        LayoutError: it is intact, and of another version of bandit_rft.
    """
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        if state.get("state_sha256", checksum := state_checksum(state)) != checksum:  # an earlier version has none
            raise CheckpointError(f"{path / 'state.json'} does not have the checksum it was saved with")
        sums = dict(state["sha256"])
        if wrong := [name for name, fits in _FIELDS.items() if not fits(state.get(name))]:
            raise ValueError(f"{wrong[0]} is {str(state.get(wrong[0]))[:80]!r}")
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has no readable state.json ({error})") from None
    for name, expected in sums.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} lacks {name}")
        if _sha256(file) != expected:
            raise CheckpointError(f"{file} does not have the checksum it was saved with")
    layout = state.get("layout", 1)
    if layout > LAYOUT:
        raise LayoutError(f"{path} has layout {layout}, of a later bandit_rft; this one reads up to {LAYOUT}")
    if layout == 1 and any(name.endswith("|prompt_lengths") for name in load_arrays(path)):
        raise LayoutError(
            f"{path} keeps rollouts in layout 1, of an earlier bandit_rft; this one reads layout {LAYOUT}. Continue "
            "with that version, or start anew from the weights: this folder as model_name_or_path, a new output_dir"
        )
    return state


def load_optimizer(path: Path, optimizer: PolicyOptimizer) -> None:
    """Take up the optimizer state saved in a checkpoint folder.

    Raises:
        CheckpointError: it is torn, or of another model.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path / "optimizer.safetensors")
        optimizer.load_state_tensors(tensors)
    except (ValueError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """What a checkpoint remembers of earlier rounds, by name; empty when it remembers nothing."""
    file = path / "replay.safetensors"
    return safetensors.numpy.load_file(file) if file.exists() else {}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
