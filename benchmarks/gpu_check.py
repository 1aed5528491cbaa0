"""Measures the operations on a CUDA GPU next to what they are made of and what they compete with; needs no network.

    make gpu-check                                             build (gpu_build.py), measure, then test
    python benchmarks/gpu_check.py --resume                    go on with this device's file in --output
    python benchmarks/gpu_check.py --device cpu --small        the same code on small shapes: does it run?

Nothing that was measured is lost: every measurement runs in a process that may crash or hang, and each of its results
is in <gpu>-<date>.json (and .md) in --output before the next begins. What decides comes first, what may fault last.
Everything compared is timed alternately in one process, by device events, and shown as ratios of medians beside the
bar and beside what a model of the machine predicts. A GPU's cache is overwritten before every sample.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_measurements.operations import Setting
from gpu_measurements.plan import TESTS, Measurement, injected, plan
from gpu_measurements.record import CRASHED, DONE, FAILED, SKIPPED, TIMED_OUT, Record, record_path
from gpu_measurements.worker import Worker, serve

ROOT = Path(__file__).resolve().parents[1]
REFUSED, INCOMPLETE = 2, 3
LEAST_SECONDS = 5.0  # what is left must allow this much, or no measurement is begun


def newest(folder: Path, device: str) -> Path:
    """The file of this device that was begun last, today or yesterday: one of a commit is not to be gone on with."""
    today = datetime.date.today()
    days = (today.isoformat(), (today - datetime.timedelta(days=1)).isoformat())
    found = [path for day in days if (path := record_path(folder, device, day)).exists()]
    if not found:
        raise FileNotFoundError(f"--resume: {folder} has no file of this {device} of today or yesterday")
    return found[0]


def run_tests(measurement: Measurement, seconds: float, log: Path) -> tuple[str, str]:
    """(status, last lines) of pytest over tests/gpu; what it had said is kept where it hangs."""
    command = [
        sys.executable, "-u", "-m", "pytest", "-rfEs", "tests/gpu", "-k", TESTS[measurement.name],
        "-p", "no:cacheprovider",
    ]  # fmt: skip
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    with log.open("rb") as said:
        said.seek(start)
        lines = said.read().decode(errors="replace").strip().splitlines()
    kept = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))][:40] + lines[-1:]
    return status_of(code, kept), "\n".join(kept)


def status_of(code: int | None, lines: list[str]) -> str:
    """Of a pytest that ended with this code (None: it was stopped) and said these lines. Skipped is not done."""
    if code:
        return CRASHED if code < 0 else FAILED
    return TIMED_OUT if code is None else SKIPPED if any(line.startswith("SKIPPED") for line in lines) else DONE


class Checker:
    """Runs a plan: one worker after another, one record, one deadline."""

    def __init__(self, record: Record, command: list[str], worker: Worker, deadline: float, log: Path):
        self.record, self.command, self.log = record, command, log
        self.worker: Worker | None = worker
        self.deadline = deadline

    def measure(self, measurement: Measurement) -> None:
        name, start = measurement.name, time.monotonic()
        seconds = min(measurement.seconds, self.deadline - start)
        self.record.begin(name, measurement.section)
        if measurement.run is None:
            self._stop()  # the tests need the GPU's memory
            status, text = run_tests(measurement, seconds, self.log)
        else:
            try:
                worker = self.worker or self._start()
                status, text, usable = worker.run(name, seconds, lambda result: self._keep(name, result))
                if not usable:
                    self._stop()
            except RuntimeError as error:
                status, text = CRASHED, str(error)
        if status == TIMED_OUT and self.deadline - time.monotonic() < LEAST_SECONDS:
            text += ": the time limit of the whole"
        self.record.end(name, status, text, time.monotonic() - start)
        print(f"{measurement.section:<18}{name:<50}{status:<10}{text.splitlines()[-1] if text else ''}", flush=True)

    def _keep(self, name: str, result: dict[str, object]) -> None:
        self.record.add(name, result)
        if "ratio" in result:
            print(f"    {result['case']} {result['shape']} / {result['against']}: {result['ratio']:.3f}", flush=True)

    def _start(self) -> Worker:
        self.worker = Worker(self.command, self.log)
        self.worker.start()
        return self.worker

    def _stop(self) -> None:
        if self.worker is not None:
            self.worker.stop()
            self.worker = None

    def run(self, measurements: list[Measurement]) -> bool:
        """Whether everything was begun before the time limit."""
        try:
            for measurement in measurements:
                if self.record.is_done(measurement.name):
                    continue
                if self.deadline - time.monotonic() < LEAST_SECONDS:
                    return False
                self.measure(measurement)
            return True
        finally:
            self._stop()


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes: whether it runs, not how fast")
    parser.add_argument("--only", default="", help="only measurements whose section or name has this (a regex)")
    parser.add_argument("--seconds", type=float, default=560.0, help="time limit of the whole")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results"))
    parser.add_argument(
        "--resume", type=Path, nargs="?", const=Path(), metavar="FILE",
        help="measure what an earlier file (default: this device's of today or yesterday in --output) has not as done",
    )  # fmt: skip
    parser.add_argument("--fault", action="append", default=[], metavar="NAME=abort|hang|raise|missing", help="tests")
    parser.add_argument("--hung_after", type=float, default=None, help="seconds for every measurement (tests)")
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    start = time.monotonic()
    arguments = arguments_of(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        text = f"gpu-check needs a CUDA GPU; torch {torch.__version__} finds none here. Nothing was measured."
        print(text, file=sys.stderr)
        return REFUSED
    os.environ.pop("BANDIT_RFT_BACKEND", None)
    measurements = [
        one for one in plan(arguments.small, device.type) if re.search(arguments.only, f"{one.section} {one.name}")
    ]
    faults = dict(fault.rsplit("=", 1) for fault in arguments.fault)
    if unknown := set(faults) - {one.name for one in measurements}:
        raise SystemExit(f"--fault: no measurement is called {', '.join(sorted(unknown))}")
    measurements = [injected(one, faults[one.name]) if one.name in faults else one for one in measurements]
    if arguments.hung_after is not None:
        measurements = [one._replace(seconds=arguments.hung_after) for one in measurements]
    if arguments.worker is not None:
        serve(
            arguments.worker, {one.name: one.run for one in measurements if one.run}, Setting(device, arguments.small)
        )
        return 0
    arguments.output.mkdir(parents=True, exist_ok=True)
    log = arguments.output / "gpu-check.log"
    command = [sys.executable, "-u", str(Path(__file__).resolve()), *(sys.argv[1:] if argv is None else argv)]
    worker = Worker(command, log)
    try:
        worker.start()
        resumed = arguments.resume
        if resumed is not None and not resumed.name:
            resumed = newest(arguments.output, worker.about["device"])
        record = Record(arguments.output, worker.about, resumed)
    except (RuntimeError, ValueError, OSError) as error:
        worker.stop()
        print(f"gpu-check: {error}", file=sys.stderr)
        return REFUSED
    whole = Checker(record, command, worker, start + arguments.seconds, log).run(measurements)
    left = [one.name for one in measurements if not record.is_done(one.name)]
    print(record.path.with_suffix(".md").read_text())
    print(f"{record.path}: {len(measurements) - len(left)} of {len(measurements)} measured", end="")
    print("" if whole else f"; the {arguments.seconds:.0f} s are over, --resume continues")
    return INCOMPLETE if left else 0


if __name__ == "__main__":
    sys.exit(main())
