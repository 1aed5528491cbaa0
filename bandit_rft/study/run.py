"""Run the cells of a study as processes, several at once, next to any other runners of the same folder.

The runner imports no torch: a fork server has imported it once, and every cell is a fork of that server. A runner that
is killed takes its fork server and cells with it; whoever runs the study next claims and resumes them (claims.py).
"""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from bandit_rft.config import Config
from bandit_rft.study.claims import HEARTBEAT, TIMEOUT, Claim, Claims
from bandit_rft.study.plan import Plan, PlannedCell, replace_file

INTERRUPTED = 130
FINISHED = 77  # how a cell's process says that it came to its end: a reward or a library may exit with 0
PR_SET_PDEATHSIG = 1
ERROR_LINES = 12
POLL = 0.5
IDLE = 15.0  # at most so long between two looks when all that is left is at work elsewhere


logger = logging.getLogger(__name__)
#: What cell.json may hold of what the runner decides by.
RECORD = {"status": str, "attempts": int, "seconds": (int, float), "error": str}


class Listener(Protocol):
    """What a runner tells the outside."""

    def started(self, cell: PlannedCell, config: Config) -> None:
        """A cell's process was started."""

    def ended(self, cell: PlannedCell, record: dict[str, Any]) -> None:
        """A cell's process ended; `record` is its cell.json."""

    def tick(self) -> None:
        """Called about twice a second."""


class Limit(Protocol):
    """The end of a runner's time (limit.py)."""

    @property
    def left(self) -> float:
        """Seconds until then."""

    def learn(self, cell: PlannedCell, record: Mapping[str, Any]) -> None:
        """What cell.json says of a cell."""

    def fits(self, cell: PlannedCell) -> bool:
        """Whether a cell may be begun."""

    def near(self, cells: Iterable[str]) -> bool:
        """Whether the cells at work must be asked to stop."""


@dataclass
class Running:
    """A cell at work: its process, its claim, and where it may compute."""

    cell: PlannedCell
    process: BaseProcess
    claim: Claim
    gpu: str | None
    begun: float
    lost: bool = False
    beaten: float = 0.0  # when its claim was last known to hold

    def __post_init__(self) -> None:
        self.beaten = self.begun


def read_record(folder: Path, cell: str) -> dict[str, Any]:
    """cell.json of a cell; {} before it was begun, and, with a warning, where it is none."""
    path = folder / "cells" / cell / "cell.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): the cell counts as not run", path, error)
        return {}
    if not isinstance(record, dict):
        logger.warning("%s holds no object: the cell counts as not run", path)
        return {}
    for key, kind in RECORD.items():
        value = record.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):  # type: ignore[arg-type]
            logger.warning("%s: %s cannot be %r: the cell counts as not run", path, key, value)
            return {}
    return record


class Runner:
    """Works through a plan in a folder until every cell is finished, failed for good, or another runner's.

    Args:
        plan: the study.
        folder: the study folder, which other runners may share.
        jobs: cells at once.
        threads: CPU threads a cell.
        retry: how often a cell that crashed is tried again; it resumes from its last checkpoint.
        gpus: device numbers, one cell each at a time (then jobs <= len(gpus)); empty: cells choose for themselves.
        listener: told of cells as they start and end.
        work: what a cell's process does, called with its configuration; `train_cell` by default.
        timeout: seconds without a sign of life after which another runner's cell is taken over.
        cells: those of the plan that this runner may work on; all by default.
        limit: when this runner must have ended; then cells are stopped in time, and `out_of_time` is true.

    Raises:
        ValueError: naming the number that is too small, or jobs where there are fewer gpus.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        *,
        jobs: int = 1,
        threads: int = 1,
        retry: int = 0,
        gpus: Sequence[str] = (),
        listener: Listener,
        work: Callable[[Config], None] | None = None,
        timeout: float = TIMEOUT,
        cells: Sequence[PlannedCell] | None = None,
        limit: Limit | None = None,
    ):
        for name, value, least in (("jobs", jobs, 1), ("threads", threads, 1), ("retry", retry, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        if gpus and jobs > len(gpus):
            raise ValueError(f"jobs={jobs} is more than the {len(gpus)} gpus; a GPU runs one cell at a time")
        self.plan, self.folder, self.listener = plan, folder.absolute(), listener
        self.jobs, self.threads, self.retry, self.timeout = jobs, threads, retry, timeout
        self.work = work or train_cell
        self.free_gpus: list[str | None] = list(gpus) or [None] * jobs
        self.failed_limit = (plan.settings.get("stopping") or {}).get("failed_cells")
        self.failed = 0
        self.stop_requested = self.out_of_time = False
        self.running: list[Running] = []
        self.cells, self.limit = plan.cells if cells is None else list(cells), limit
        self._waiting = list(self.cells)  # not known to be done; others' cells stay, they may die
        self._heart = threading.Event()

    def run(self) -> bool:
        """Run until nothing is left to do here; whether every cell that this runner may work on is finished."""
        self.plan.write(self.folder)
        self.claims = Claims(self.folder, self.timeout)
        os.environ["OMP_NUM_THREADS"] = str(self.threads)  # before the fork server starts
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bandit_rft.trainer", "bandit_rft.study.run"])
        beating = threading.Thread(target=self._beat, daemon=True)
        beating.start()
        idle = POLL
        try:
            while not self._done():
                while len(self.running) < self.jobs and (cell := self._next()):
                    self._start(context, *cell)
                self.listener.tick()
                self._keep_time()
                if self.running:
                    wait([job.process.sentinel for job in self.running], timeout=POLL)
                    idle = POLL
                elif not self._done():  # all that is left is at work elsewhere: look less and less often, not in step
                    self._wait(idle * random.uniform(0.5, 1))
                    idle = min(IDLE, 1.5 * idle)
                for job in [job for job in self.running if not job.process.is_alive()]:
                    self._end(job)
        finally:
            for job in self.running:
                job.process.kill()
            self._heart.set()
            beating.join()
            self.claims.close()
        return all(read_record(self.folder, cell.id).get("status") == "finished" for cell in self.cells)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.stop_requested:
            time.sleep(min(POLL, seconds))
            self.listener.tick()
            self._keep_time()

    def stop(self, at_once: bool = False) -> None:
        """Let every cell finish its round and save, or kill them; they resume when the study is run again."""
        self.stop_requested = True
        for job in self.running:
            job.process.kill() if at_once else job.process.terminate()

    def _keep_time(self) -> None:
        """Stop the cells at work while they have time to save, and kill them at the limit itself."""
        if self.limit is None or not (self.out_of_time or self.limit.near([job.cell.id for job in self.running])):
            return
        if not self.out_of_time:
            self.out_of_time = True
            self.stop()
        elif self.limit.left <= 0:
            self.stop(at_once=True)

    def _done(self) -> bool:
        if self.failed_limit is not None and self.failed >= self.failed_limit and not self.stop_requested:
            self.stop()
        return not self.running and (self.stop_requested or not self._waiting)

    def _next(self) -> tuple[PlannedCell, Claim] | None:
        """The next cell that nobody works on, claimed. Cells that are finished or failed for good are forgotten."""
        if self.stop_requested:
            return None
        ours, late = {job.cell.id for job in self.running}, 0
        for cell in list(self._waiting):
            if cell.id in ours:
                continue
            if self._settled(cell):
                self._waiting.remove(cell)
                continue
            if self.limit is not None and not self.limit.fits(cell):
                late += 1
                continue
            claim = self.claims.take(cell.id)
            if claim is None:
                continue
            if self._settled(cell):  # finished between the two looks
                claim.release()
                self._waiting.remove(cell)
                continue
            return cell, claim
        if late and late == len(self._waiting):  # nothing that is left would end in time
            self.stop_requested = self.out_of_time = True
        return None

    def _settled(self, cell: PlannedCell) -> bool:
        record = read_record(self.folder, cell.id)
        if self.limit is not None:
            self.limit.learn(cell, record)
        failed = record.get("status") == "failed" and record.get("attempts", 0) > self.retry
        return record.get("status") == "finished" or failed

    def _start(self, context: multiprocessing.context.ForkServerContext, cell: PlannedCell, claim: Claim) -> None:
        folder, config = self.folder / "cells" / cell.id, self.plan.config(cell, self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._write(cell, status="running", error="", host=platform.node())
        gpu = self.free_gpus.pop(0)
        process = context.Process(target=_cell_process, args=(self.work, config, str(self.folder), self.threads, gpu))
        process.start()
        self.running.append(Running(cell, process, claim, gpu, time.monotonic()))
        if self.stop_requested:  # while the fork server was being started, which takes seconds
            process.terminate()
        self.listener.started(cell, config)

    def _end(self, job: Running) -> None:
        self.running.remove(job)
        self.free_gpus.append(job.gpu)
        if job.lost:  # another runner took it over; its record is not ours to write
            return
        code, before = job.process.exitcode, read_record(self.folder, job.cell.id)
        status, error, attempts = "finished", "", before.get("attempts", 0)
        stopped = code == INTERRUPTED or (self.stop_requested and code in (-signal.SIGKILL, -signal.SIGTERM))
        if stopped:
            status = "stopped"
        elif code != FINISHED:
            status, attempts = "failed", attempts + 1
            error = _how_it_ended(code)
            error = "\n".join([*_last_lines(self.folder / "cells" / job.cell.id / "output.log"), error])
            self.failed += attempts > self.retry
        seconds = before.get("seconds", 0.0) + time.monotonic() - job.begun
        record = self._write(
            job.cell, status=status, attempts=attempts, error=error, seconds=round(seconds, 3), versions=_versions(),
            gpus=_gpus(self.plan.config(job.cell, self.folder), job.gpu),
        )  # fmt: skip
        if status == "finished" and not self.plan.settings.get("keep_checkpoints", False):
            shutil.rmtree(self.folder / "cells" / job.cell.id / "checkpoints", ignore_errors=True)
        job.claim.release()
        self.listener.ended(job.cell, record)

    def _write(self, cell: PlannedCell, **values: Any) -> dict[str, Any]:
        record = {"status": "", "attempts": 0, "seconds": 0.0, **read_record(self.folder, cell.id), **values}
        replace_file(self.folder / "cells" / cell.id / "cell.json", json.dumps(record, indent=1) + "\n")
        return record

    def _beat(self) -> None:
        while not self._heart.wait(min(HEARTBEAT, self.timeout / 4)):
            for job in list(self.running):
                now = time.monotonic()
                try:
                    held = job.claim.beat()
                    job.beaten = now
                except OSError as error:  # it may pass; but stop before another runner takes the cell for dead
                    held = now - job.beaten < self.timeout / 2
                    logger.warning(
                        "the claim %s cannot be touched (%s)%s", job.claim.path, error.strerror,
                        "" if held else ": the cell is stopped, and runs again where its claim can be held",
                    )  # fmt: skip
                if not held:
                    job.lost = True
                    job.process.kill()


# --- in the cell's process --------------------------------------------------------------------------------------------


def _cell_process(work: Callable[[Config], None], config: Config, folder: str, threads: int, gpu: str | None) -> None:
    """Run one cell in a fork of the server: dies with it, writes to output.log, exits with what the runner reads."""
    server = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the runner says what to do
    signal.signal(signal.SIGTERM, lambda *_: os._exit(INTERRUPTED))
    os.chdir(folder)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    log = os.open(Path(config.output_dir) / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    try:
        work(config)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    raise SystemExit(FINISHED)


def _how_it_ended(code: int | None) -> str:
    if code == 0:
        return "the process left with exit status 0 in the middle of its work (os._exit in a reward?)"
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"


def train_cell(config: Config) -> None:
    """One training run, continued where it was. SIGTERM finishes the round, saves, and leaves with status 130."""
    from bandit_rft.report import ReportWriter
    from bandit_rft.run_folder import RunFolder
    from bandit_rft.trainer import Trainer

    # A killed runner's cell needs a moment to die.
    with RunFolder(config.output_dir).lock(wait_s=30.0):
        pass
    trainer = Trainer(config, ReportWriter())

    def stop(number: int, frame: object) -> None:
        trainer.stop_requested = True

    signal.signal(signal.SIGTERM, stop)
    trainer.run()
    if not trainer.finished:
        raise SystemExit(INTERRUPTED)


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            return file.read().decode("utf-8", "replace").splitlines()[-ERROR_LINES:]
    except OSError:
        return []


def _gpus(config: Config, gpu: str | None) -> int:
    """How many GPUs the cell had to itself or shared, for the cost in GPU-hours."""
    if config.device is not None:
        return int(config.device.startswith("cuda"))
    return int(gpu is not None or Path("/dev/nvidia0").exists())


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("bandit_rft", "torch", "transformers", "tokenizers", "numpy", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
