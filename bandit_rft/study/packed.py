"""A study's results in one small file: every reward of every evaluation, one bit each, and what each cell was.

cells.npz holds all that the report is made of, so that anyone can recompute every number of it without running a cell:
`bandit-rft study report FOLDER` reads it where the run folders are not there. It is a NumPy archive without pickled
objects:

| array | what |
|---|---|
| `description` | UTF-8 text, JSON: the study file, the cells of the plan, and where each one's rewards begin |
| `bits` | rewards that are all 0 or 1, eight to a byte (numpy.packbits); a block [E, Q, K] for each cell and split |
| `numbers` | float32 rewards of blocks that hold others |
| `queries` | the questions' places in their splits, int64 |

What a clock said of the cells is in clocks.csv beside it: equal results give equal bytes.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bandit_rft.study.measured import Evaluations, Measured

FILE = "cells.npz"
CLOCKS = "clocks.csv"
FORMAT = 1
#: Of cell.json and of a run's sums, what differs from machine to machine and from time to time.
CLOCK_KEYS = ("seconds/round", "seconds/evaluate")
RECORD_KEYS = ("attempts", "gpus")
#: What an entry of the plan must have.
ENTRY = ("id", "places", "model", "task", "seed", "baseline", "config", "status", "problem")
NO_CELLS = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError)


class Packer:
    """Collects a study's cells, one at a time, for `content`."""

    def __init__(self) -> None:
        self._description: dict[str, Any] = {"format": FORMAT, "cells": []}
        self._bits: list[NDArray[np.uint8]] = []
        self._numbers: list[NDArray[np.float32]] = []
        self._queries: list[NDArray[np.int64]] = []
        self._sizes = {"bits": 0, "numbers": 0, "queries": 0}
        self._places: dict[bytes, int] = {}
        self._clocks: list[dict[str, Any]] = []

    def study(self, name: str, settings_text: str, tuning: Mapping[str, Any] | None) -> None:
        """Say whose cells they are: the study's name, its file, and tuning.json."""
        self._description |= {"name": name, "study": settings_text, "tuning": tuning}

    def add(self, cell: dict[str, Any], record: Mapping[str, Any], measured: Measured | None) -> None:
        """Add a cell: its entry of the plan with its status and problem, its cell.json, and its results if it has any.

        Args:
            cell: plain values.
            record: of which versions go into the description, attempts and GPUs to the clocks.
            measured: None for a cell that is not used.
        """
        entry = {**cell, "versions": record.get("versions")}
        clock: dict[str, Any] = {"id": cell["id"], **{key: record.get(key) for key in RECORD_KEYS}}
        if measured is not None:
            entry["totals"] = {k: v for k, v in measured.totals.items() if k not in CLOCK_KEYS}
            entry["final"] = measured.final
            entry["progress"] = [[round_, spent] for round_, spent in measured.progress.items()]
            entry["evaluations"] = {split: self._block(found) for split, found in measured.evaluations.items()}
            clock |= {key: measured.totals[key] for key in CLOCK_KEYS}
        self._description["cells"].append(entry)
        self._clocks.append(clock)

    def _block(self, found: Evaluations) -> dict[str, Any]:
        binary = bool(np.isin(found.rewards, (0, 1)).all())
        rewards = np.packbits(found.rewards.astype(np.uint8)) if binary else found.rewards.ravel()
        return {
            "rounds": found.rounds, "shape": list(found.rewards.shape), "asked": found.asked,
            "in": "bits" if binary else "numbers", "at": self._place("bits" if binary else "numbers", rewards),
            "queries": self._place("queries", found.queries.astype(np.int64)),
        }  # fmt: skip

    def _place(self, name: str, values: NDArray[Any]) -> int:
        """Where an array begins among its kind; equal ones are kept once."""
        key = name.encode() + values.tobytes()
        if key not in self._places:
            self._places[key] = self._sizes[name]
            self._sizes[name] += len(values)
            getattr(self, f"_{name}").append(values)
        return self._places[key]

    def content(self) -> tuple[bytes, str]:
        """cells.npz and clocks.csv."""
        text = json.dumps(self._description, separators=(",", ":"))  # escaped: a name may hold half a surrogate pair
        sink = io.BytesIO()
        np.savez_compressed(
            sink,
            description=np.frombuffer(text.encode(), dtype=np.uint8),
            bits=_joined(self._bits, np.uint8),
            numbers=_joined(self._numbers, np.float32),
            queries=_joined(self._queries, np.int64),
        )
        clocks = io.StringIO()
        writer = csv.DictWriter(clocks, ["id", *RECORD_KEYS, *CLOCK_KEYS], lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(self._clocks)
        return sink.getvalue(), clocks.getvalue()


def _joined(parts: list[NDArray[Any]], kind: type) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, kind)


class Packed:
    """An opened cells.npz.

    Attributes:
        description: as packed: `study` (the study file's text), `name`, `tuning` and `cells`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not what `Packer` writes.
    """

    def __init__(self, path: Path):
        try:
            with np.load(path, allow_pickle=False) as archive:
                self.description: dict[str, Any] = json.loads(archive["description"].tobytes().decode())
                self._arrays = {name: archive[name] for name in ("bits", "numbers", "queries")}
            if self.description["format"] != FORMAT:
                raise ValueError(f"format {self.description['format']}, which this version does not know")
            for name in ("study", "tuning", "cells"):
                self.description[name]
        except FileNotFoundError:
            raise
        except (OSError, EOFError, *NO_CELLS, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no file of a study's cells ({error!r})") from None
        self._path = path
        self._clocks = _read_clocks(path.with_name(CLOCKS))

    def cells(self) -> Iterator[tuple[dict[str, Any], dict[str, Any], Measured | None]]:
        """(entry of the plan with status and problem, what is known of cell.json, results or None) of every cell.

        Raises:
            ValueError: an entry is not what `Packer` writes.
        """
        try:
            yield from self._cells()
        except NO_CELLS as error:
            raise ValueError(f"{self._path} is no file of a study's cells ({error!r})") from None

    def _cells(self) -> Iterator[tuple[dict[str, Any], dict[str, Any], Measured | None]]:
        for entry in self.description["cells"]:
            for key in ENTRY:
                entry[key]
            clock = self._clocks.get(entry["id"], {})
            record = {key: int(float(clock[key])) for key in RECORD_KEYS if clock.get(key)}
            if entry.get("versions"):
                record["versions"] = entry["versions"]
            if "evaluations" not in entry:
                yield entry, record, None
                continue
            totals = entry["totals"] | {key: float(clock.get(key) or "nan") for key in CLOCK_KEYS}
            progress = {int(round_): float(spent) for round_, spent in entry["progress"]}
            evaluations = {split: self._evaluations(block) for split, block in entry["evaluations"].items()}
            yield entry, record, Measured(totals, progress, entry["final"], evaluations)

    def _evaluations(self, block: Mapping[str, Any]) -> Evaluations:
        shape, at = tuple(block["shape"]), block["at"]
        count = int(np.prod(shape))
        if block["in"] == "bits":
            packed = self._arrays["bits"][at : at + -(-count // 8)]
            if 8 * len(packed) < count:  # it would fill up with rewards of 0
                raise ValueError(f"{len(packed)} bytes for {count} rewards")
            values = np.unpackbits(packed, count=count).astype(np.float32)
        else:
            values = self._arrays["numbers"][at : at + count]
        queries = self._arrays["queries"][block["queries"] : block["queries"] + shape[1]]
        if len(queries) != shape[1]:
            raise ValueError(f"{len(queries)} questions for rewards of shape {shape}")
        return Evaluations(list(block["rounds"]), queries, values.reshape(shape), int(block["asked"]))


def _read_clocks(path: Path) -> dict[str, dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {row["id"]: row for row in csv.DictReader(file)}
    except (OSError, KeyError):
        return {}
