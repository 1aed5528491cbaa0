"""The end of a runner's time on a cluster: which cells still fit before it, and when those at work must be stopped.

A cell is expected to take what the longest finished one of its level, model and task took, or else of its model and
task. A cell of which nothing is known is begun. Whatever was foretold, cells are asked to stop while there is time for
the longest round that was seen, twice; a stopped cell has saved, and is continued by whoever runs the study next.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bandit_rft.study.plan import PlannedCell
from bandit_rft.study.status import last_line

#: Of the whole time, at most so much, and at most so many seconds, are kept for starting to stop and for saving.
MARGIN, MARGIN_S = 0.05, 60.0
#: Seconds between two looks at the rounds of the cells at work.
LOOK = 2.0

#: A runner in a SLURM job ends so many seconds before the job's limit, before submitit's own signal comes (launch.py).
RESERVE = 60.0

logger = logging.getLogger(__name__)
Clock = Callable[[], float]


class TimeLimit:
    """So many seconds from now, and what may be begun before they are over.

    Args:
        seconds: until the limit, > 0.
        folder: the study folder, whose cells' metrics are looked at.
        clock: seconds, from anywhere; another one in tests.
    """

    def __init__(self, seconds: float, folder: Path, clock: Clock = time.monotonic):
        if not seconds > 0:
            raise ValueError(f"max_seconds must be > 0; got {seconds:g}")
        self.seconds, self.folder, self.clock = seconds, folder, clock
        self.end = clock() + seconds
        self._longest: dict[tuple[str, ...], float] = {}  # what finished cells took, by kind
        self._spent: dict[str, float] = {}  # on cells that are not finished
        self._round, self._looked = 0.0, -LOOK

    @property
    def left(self) -> float:
        """Seconds until the limit; negative after it."""
        return self.end - self.clock()

    @property
    def margin(self) -> float:
        """Seconds that a clean stop is given: two rounds, evaluated if one that was seen is, and a little."""
        return min(MARGIN * self.seconds, MARGIN_S) + 2 * self._round

    def learn(self, cell: PlannedCell, record: Mapping[str, Any]) -> None:
        """Take note of a cell's cell.json."""
        seconds = float(record.get("seconds") or 0.0)
        if record.get("status") != "finished":
            self._spent[cell.id] = seconds
            return
        for kind in _kinds(cell):
            self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))

    def fits(self, cell: PlannedCell) -> bool:
        """Whether the cell can be expected to end in time; True where nothing is known of its kind.

        One that is longer than the whole limit can end in no runner's time: it is begun, stopped, and continued.
        """
        known = [self._longest[kind] for kind in _kinds(cell) if kind in self._longest]
        if not known:
            return self.left > self.margin
        need = known[0] - self._spent.get(cell.id, 0.0)
        return need + self.margin <= self.left or (need + self.margin > self.seconds and self.left > self.margin)

    def near(self, cells: Iterable[str]) -> bool:
        """Whether the cells at work must be asked to stop now."""
        if self.clock() - self._looked >= LOOK:
            self._looked = self.clock()
            lines = (last_line(self.folder / "cells" / cell / "metrics.jsonl") for cell in cells)
            self._round = max([self._round, *(float(line.get("seconds/round") or 0.0) for line in lines)])
        return self.left <= self.margin


def _kinds(cell: PlannedCell) -> list[tuple[str, ...]]:
    return [(cell.factor, cell.level, cell.model, cell.task), (cell.model, cell.task)]


# --- SLURM's limit ----------------------------------------------------------------------------------------------------


def seconds_left(asked: float | None) -> float | None:
    """Seconds until a runner must have ended: the shorter of what was asked for and SLURM's limit; None: no limit."""
    of_slurm = slurm_seconds_left(os.environ)
    known = [] if of_slurm is None else [max(1.0, of_slurm - RESERVE)]
    return min([*known, *([] if asked is None else [asked])], default=None)


def slurm_seconds_left(environment: Mapping[str, str]) -> float | None:
    """Seconds until SLURM ends this job; None outside a job, or where it has no limit.

    SLURM_JOB_END_TIME says when, in newer versions; otherwise `scontrol show job` is asked; a warning says where that
    does not answer, and the job may then be killed in the middle of a round.
    """
    job = environment.get("SLURM_JOB_ID")
    if not job:
        return None
    if "SLURM_ARRAY_TASK_ID" in environment:  # by its number alone, scontrol may show all jobs of an array
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    if environment.get("SLURM_JOB_END_TIME", "").isdecimal():
        return int(environment["SLURM_JOB_END_TIME"]) - time.time()
    try:
        shown = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, timeout=30, check=True
        ).stdout  # fmt: skip
        limit, spent = (re.search(rf"\b{name}=(\S+)", shown) for name in ("TimeLimit", "RunTime"))
        if limit is None or spent is None:
            raise ValueError(f"no TimeLimit and RunTime in {shown[:200]!r}")
        if limit[1] in ("UNLIMITED", "NOT_SET", "Partition_Limit"):
            return None
        return slurm_seconds(limit[1]) - slurm_seconds(spent[1])
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        logger.warning("the time limit of SLURM job %s is not known (%s): give --max_seconds", job, error)
        return None


def slurm_seconds(text: str) -> float:
    """Seconds of a time as scontrol prints it: [days-]hours:minutes:seconds or minutes:seconds.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        raise ValueError(f"a time of scontrol must be [days-]hours:minutes:seconds; got {text!r}")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
