"""Runs a study in a process of its own, so that tests can kill it: study_runner.py STUDY FOLDER JOBS RETRY WORK."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from bandit_rft.config import Config
from bandit_rft.study.plan import load_plan
from bandit_rft.study.run import Runner, train_cell


class Silent:
    def started(self, *_: Any) -> None:
        pass

    def ended(self, *_: Any) -> None:
        pass

    def tick(self) -> None:
        pass


def note_and_nap(config: Config) -> None:
    """Say that this cell was run, in one write that no other process can tear."""
    line = f"{Path(config.output_dir).name} {os.getpid()}\n".encode()
    file = os.open("runs.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, line)
    os.close(file)
    time.sleep(0.02)


def fail_once(config: Config) -> None:
    """Crash the first time; cells of seed 1 every time."""
    note_and_nap(config)
    marker = Path(config.output_dir) / "was here"
    if config.seed == 1 or not marker.exists():
        marker.touch()
        raise RuntimeError("the reward <b>model</b> is gone")


def slowly(config: Config) -> None:
    """Work that takes longer than a claim of two seconds may be silent."""
    note_and_nap(config)
    time.sleep(4)


def leave(config: Config) -> None:
    """What a reward may do."""
    note_and_nap(config)
    os._exit(0)


WORK = {"leave": leave, "note": note_and_nap, "fail": fail_once, "train": train_cell}

if __name__ == "__main__":
    study, folder, jobs, retry, work = sys.argv[1:]
    runner = Runner(
        load_plan(study), Path(folder), jobs=int(jobs), retry=int(retry), listener=Silent(), work=WORK[work]
    )
    sys.exit(0 if runner.run() else 1)
