"""Start the workers of a study on a cluster: each is the command `bandit-rft study run`, as it would be typed there.

Cells are shared through their claims (claims.py), so a launcher only starts equal processes: by submitit on SLURM, or
in tasks of a Ray cluster. All of them must see the study file and the study folder under the same paths.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bandit_rft.study.plan import PlannedCell

#: Jobs of one array where `scontrol show config` does not say MaxArraySize; SLURM's own default is 1001.
ARRAY = 1000
PR_SET_PDEATHSIG = 1
#: Seconds before a job's limit, or from a preemption on, at which submitit stops a worker; later than limit.RESERVE.
SIGNAL = 30


@dataclass
class Worker:
    """A runner on another machine: a picklable call that runs a command, and ends it cleanly when it has to go.

    Attributes:
        command: of the runner.
        gpus: how many of the GPUs that the cluster gives it the runner deals out to cells; 0: cells see all of them.
    """

    command: list[str]
    gpus: int = 0
    process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Run the command to its end; its exit status."""
        command = [*self.command, *(["--gpus", ",".join(given_gpus(self.gpus))] if self.gpus else [])]
        libc = ctypes.CDLL(None)  # a worker that is killed takes its runner along, and that its cells
        self.process = subprocess.Popen(
            command, start_new_session=True, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        )
        try:
            while self.process.poll() is None:
                time.sleep(0.2)  # short: ray.cancel interrupts the interpreter, and no system call
        except KeyboardInterrupt:  # from a terminal, too
            self.stop()
        return self.process.wait()

    def stop(self) -> None:
        """Let the runner's cells finish their round and save; returns when it has ended.

        It may be called in a signal handler, which a lock of the Popen that it interrupted would stop for ever.
        """
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has just ended by itself
                os.kill(self.process.pid, signal.SIGINT)
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def checkpoint(self) -> Any:
        """What submitit calls before SLURM takes the machine away: stop, and do the same again when it is requeued."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        return DelayedSubmission(Worker(self.command, self.gpus))


def given_gpus(count: int) -> list[str]:
    """The first GPUs that a cluster lets this process see, as CUDA_VISIBLE_DEVICES names them.

    Raises:
        ValueError: they are fewer than `count`.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if visible is None else [name for name in visible.split(",") if name]
    if len(names) < count:
        raise ValueError(f"gpus={count}, but the cluster gives this worker {len(names)} (CUDA_VISIBLE_DEVICES)")
    return names[:count]


def read_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options of a launcher from their KEY=VALUE; a value that is JSON is read as it, any other is text.

    So 4 is a number and ["module load cuda"] a list, but 4:00:00 and 0123 stay what they are. A number with a fraction
    is one where it is written as it prints: a partition may be called 1e3.

    Raises:
        ValueError: naming the one that is none.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier() or key in options:
            raise ValueError(f"launcher_option must be KEY=VALUE, each key once; got {text!r}")
        try:
            options[key] = json.loads(value, parse_float=_fraction, parse_constant=str)
        except (ValueError, RecursionError):
            options[key] = value
    return options


def _fraction(text: str) -> float | str:
    return float(text) if repr(float(text)) == text else text


# --- a share of the cells ---------------------------------------------------------------------------------------------


def share(cells: Sequence[PlannedCell], shard: tuple[int, int]) -> list[PlannedCell]:
    """Share i of n, of `shard` (i, n): every n-th cell from the i-th on, 1 <= i <= n.

    Shares do not meet, together they are all cells, and each begins with the first seeds.

    Raises:
        ValueError: the share is empty.
    """
    index, count = shard
    if index > len(cells):
        raise ValueError(f"shard={index}/{count} is empty: the study has {len(cells)} cells")
    return list(cells[index - 1 :: count])


# --- SLURM ------------------------------------------------------------------------------------------------------------


def slurm_script(workers: int, folder: Path, options: Mapping[str, Any]) -> str:
    """The sbatch script of the (first) array of workers, as submitit would hand it in; nothing is submitted."""
    executor = _slurm_executor(folder, options, anywhere=True)
    if workers > 1:
        executor.parameters["map_count"] = min(workers, max_array_size())
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def start_slurm(worker: Worker, workers: int, folder: Path, options: Mapping[str, Any]) -> list[str]:
    """Submit the workers, an array of as many as SLURM allows at a time; their job ids.

    Args:
        worker: what each of them does.
        workers: how many.
        folder: where submitit keeps its files and the workers' output, seen by all machines.
        options: of `submitit.SlurmExecutor.update_parameters`: partition, time (minutes; required), gpus_per_node, ...

    Raises:
        ValueError: an option that is none, or no `time`.
        RuntimeError: there is no SLURM here.
    """
    executor, size = _slurm_executor(folder, options), max_array_size()
    return [
        job.job_id
        for begin in range(0, workers, size)
        for job in executor.submit_array([Worker(worker.command, worker.gpus)] * min(size, workers - begin))
    ]


def _slurm_executor(folder: Path, options: Mapping[str, Any], *, anywhere: bool = False) -> Any:
    import submitit

    minutes = options.get("time")
    if type(minutes) is not int or minutes < 1:
        raise ValueError(f"launcher_option time=MINUTES is needed, a whole number >= 1; got {minutes!r}")

    kind: Any = submitit.SlurmExecutor
    if anywhere:  # scripts can be written where no SLURM is
        kind = type("Anywhere", (kind,), {"affinity": classmethod(lambda cls: 1)})
    executor = kind(folder)
    try:
        executor.update_parameters(**options)
    except ValueError as error:  # its message goes on with all parameters there are
        raise ValueError(f"launcher_option: {str(error).splitlines()[0]}; submitit's names are expected") from None
    return executor


def max_array_size() -> int:
    """How many jobs one array may have: indices must be below SLURM's MaxArraySize."""
    if shutil.which("scontrol") is None:
        return ARRAY
    shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60, check=False)
    for line in shown.stdout.splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize" and value.strip().isdecimal():
            return max(1, int(value))
    return ARRAY


# --- this machine, and Ray --------------------------------------------------------------------------------------------


def run_local(worker: Worker, workers: int, folder: Path, options: Mapping[str, Any]) -> list[int]:
    """The workers as jobs of submitit on this machine, until they end; their exit statuses. To try out a launch."""
    import submitit

    executor = submitit.LocalExecutor(folder)
    unknown = set(options) - {"timeout_min", "gpus_per_node", "setup"}
    if unknown:
        raise ValueError(f"launcher_option must be timeout_min, gpus_per_node or setup; got {', '.join(unknown)}")
    executor.update_parameters(**{"timeout_min": 60 * 24 * 365, **options})
    jobs = executor.submit_array([Worker(worker.command, worker.gpus)] * workers)
    return [int(job.result()) for job in jobs]


def run_ray(worker: Worker, workers: int, folder: Path, options: Mapping[str, Any]) -> list[int]:
    """The workers as tasks of a Ray cluster, spread over its nodes, until they end; their exit statuses.

    A worker whose node dies is started on another one; its cells are taken over, by the rule of the claims.

    Args:
        worker: what each of them does.
        workers: how many; those that find no room wait for it.
        folder: not used: Ray keeps its own logs, and prints the workers' output here.
        options: `address` (by default what RAY_ADDRESS or a cluster on this machine says), and those of a remote
            function, as `num_cpus`, `num_gpus` and `resources`.
    """
    import ray

    options = dict(options)
    ray.init(address=options.pop("address", "auto"), log_to_driver=True, ignore_reinit_error=True)

    def run() -> int:
        return worker()

    task = ray.remote(run).options(scheduling_strategy="SPREAD", **options)
    running = [task.remote() for _ in range(workers)]
    try:
        return [int(status) for status in ray.get(running)]
    except KeyboardInterrupt:
        for one in running:
            ray.cancel(one)  # a KeyboardInterrupt in the task, which stops its cells as Ctrl-C does
        ended = []
        for one in running:
            try:
                ended.append(int(ray.get(one)))
            except ray.exceptions.RayError:  # it had not begun
                ended.append(130)
        return ended
    finally:
        ray.shutdown()


RUN: dict[str, Callable[[Worker, int, Path, Mapping[str, Any]], list[int]]] = {"ray": run_ray, "local": run_local}


def make_worker(file: Path, folder: Path, flags: Mapping[str, Any], gpus: int) -> Worker:
    """The worker that runs a study file into a folder with these flags of `study run`, by this Python."""
    command = [sys.executable, "-m", "bandit_rft", "study", "run", str(file.absolute())]
    command += ["--output_dir", str(folder.absolute())]
    for name, value in flags.items():
        text = "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
        command += [f"--{name}"] if value is True else [f"--{name}", text]
    return Worker(command, gpus)


def resources(launcher: str, jobs: int, threads: int, gpus: int) -> dict[str, Any]:
    """What a worker needs, by the launcher's names."""
    cpus, of_gpus = jobs * threads, {"gpus_per_node": gpus} if gpus else {}
    if launcher == "slurm":
        return {"cpus_per_task": cpus, "job_name": "bandit-rft-study", "signal_delay_s": SIGNAL, **of_gpus}
    if launcher == "ray":
        return {"num_cpus": cpus, **({"num_gpus": gpus} if gpus else {})}
    return of_gpus
