"""The commands of `bandit-rft`. Nothing heavy is imported before the arguments are known good."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandit_rft.arguments import UsageError, make_parser, parse
from bandit_rft.launched import launched_rank
from bandit_rft.threads import choose_wait

if TYPE_CHECKING:
    from bandit_rft.config import Config

#: Extras by the library that is missing without them; all others come with "train".
EXTRAS = {"shtab": "completion", "scipy": "study", "peft": "lora", "submitit": "slurm", "ray": "ray"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the process's exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments in (["-h"], ["--help"], ["help"]):
        make_parser(keys=False).print_help()
        return 0
    if arguments[0] == "--version":
        print(_version("bandit_rft"))
        return 0
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "train": train, "eval": evaluate, "report": report, "study": study, "env": env, "completion": completion,
    }  # fmt: skip
    given = argparse.Namespace()
    try:
        given = parse(arguments)
        if given.command in ("eval", "study") and launched_rank()[1] > 1:
            raise UsageError(f"{given.command} is for one process; torchrun starts several for train")
        return commands[given.command](given)
    except UsageError as error:
        return _fail(str(error), 2)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "bandit_rft":
            raise
        extra = EXTRAS.get((error.name or "").split(".")[0], "train")
        return _fail(f"{error.name} is not installed; this needs an extra: pip install 'bandit_rft[{extra}]'", 1)
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        if "BANDIT_RFT_TRACEBACK" in os.environ or "verbose" in given:
            raise
        wrong = any(kind.__name__ == "ConfigError" for kind in type(error).__mro__)  # not imported unless raised
        return _fail(str(error) or repr(error), 2 if wrong else 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if type(error).__name__ != "RewardError":  # a reward's failure comes with its own traceback
            raise
        return _fail(str(error), 1)


def train(given: argparse.Namespace) -> int:
    """Train a policy as configured."""
    from bandit_rft.config import build_config
    from bandit_rft.inputs import refuse_python_inputs

    file = getattr(given, "config", None)
    config = build_config(given.overrides, file)
    choose_wait(config.thread_wait)
    refuse_python_inputs(config, file, given.overrides)
    rank, world = launched_rank()
    if "dry_run" in given:
        if world > 1:
            raise UsageError("--dry_run is for one process: leave torchrun away")
        return _dry_run(config, probe=given.dry_run == "probe")
    from rich.console import Console

    from bandit_rft.listener import Listeners
    from bandit_rft.progress import ConsoleListener, show_result
    from bandit_rft.report import ReportWriter

    _set_loudness(given)
    console = Console(highlight=False, quiet="quiet" in given or rank > 0)
    listener, report = ConsoleListener(config, console), ReportWriter()
    with listener.loading():
        from bandit_rft.trainer import Trainer

        trainer = Trainer(config, Listeners(listener, report))

    def stop(number: int, frame: object) -> None:
        if trainer.stop_requested:
            raise KeyboardInterrupt
        trainer.stop_requested = True
        listener.say("stopping after this round; once more to stop at once and lose it")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with listener:
            lines = trainer.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if rank == 0:
        show_result(trainer.folder, lines, report.path, console)
    if not trainer.finished:
        listener.say(
            f"stopped after round {trainer.round} of {trainer.data.rounds}; saved. Continue with\n"
            f"  bandit-rft train --config {trainer.folder / 'config.yaml'}"
        )
        return 130
    return 0


def _dry_run(config: Config, probe: bool) -> int:
    """Print the configuration as YAML and, as comments in it, what it amounts to and what would fail."""
    from bandit_rft.audit import design_audit
    from bandit_rft.config import to_yaml
    from bandit_rft.preflight import preflight
    from bandit_rft.text import printable

    def say(what: str, text: str) -> None:
        print(f"# {what + ':':<17}{printable(text, 2000, one_line=True)}", flush=True)

    found = preflight(config)
    print(to_yaml(config), end="")
    print("\n# design audit")
    for what, value in design_audit(config, found.sizes):
        say(what, value)
    print("\n# checks")
    for what, well, text in found.lines:
        say(what, ("" if well else "FAILS: " if well is False else "not checked: ") + text)
    if found.failed:
        return _fail(f"this would fail: {', '.join(dict.fromkeys(found.failed))}", 1)
    if probe:
        from bandit_rft.wall_time import probe_round

        print("\n# probe")
        for what, value in probe_round(config):
            say(what, value)
    return 0


def evaluate(given: argparse.Namespace) -> int:
    """Evaluate a run's checkpoint (with its settings) or any model; print a table with intervals, or JSON lines."""
    from bandit_rft.config import ConfigError, build_config
    from bandit_rft.inputs import refuse_python_inputs, saved_state

    overrides, file = given.overrides, getattr(given, "config", None)
    found, title = "", ""  # the run's own configuration, which came with the checkpoint; what is evaluated
    base, state = None, None  # what the run began with; what its checkpoint says
    if "target" in given:
        target = Path(given.target)
        if not any((target / name).exists() for name in ("config.json", "adapter_config.json", "checkpoints")):
            raise UsageError(
                f"{target} is no run folder (it has no checkpoints) and no model folder (neither config.json nor "
                "adapter_config.json)"
            )
        of_model = (target / "config.json").is_file() or (target / "adapter_config.json").is_file()
        run = Path(os.path.relpath(target.absolute().parent.parent)) if of_model else target
        overrides["model_name_or_path"] = str(target)
        if file is None and (run / "config.yaml").is_file():
            file = found = str(run / "config.yaml")
            base = build_config({}, file, check=False).model_name_or_path or None
    elif "best" in given:
        raise UsageError("--best chooses among the checkpoints of a run: give its folder")
    config = build_config(overrides, file)
    if not config.evaluation.num_samples and not config.evaluation.greedy:
        raise ConfigError("evaluation.num_samples=0 with evaluation.greedy=false measures nothing: choose one")
    choose_wait(config.thread_wait)
    refuse_python_inputs(config, found or None, overrides)
    if found and "reward.functions" not in overrides:
        from bandit_rft.rewards.spec import refuse_foreign_code

        refuse_foreign_code(config.reward.functions, source=found, allowed="allow_code" in given)
    _set_loudness(given)
    if "target" in given:
        from bandit_rft.run_folder import checkpoint_of

        checkpoint, title = checkpoint_of(target, best="best" in given)
        config = replace(config, model_name_or_path=str(checkpoint))
        state = saved_state(checkpoint) if found else None
    from rich.console import Console

    from bandit_rft.progress import EvaluationProgress, evaluation_line, show_evaluations

    console = Console(stderr=True, highlight=False, quiet="quiet" in given)  # a table's or JSON's reader sees only that
    with EvaluationProgress(console) as progress:
        from bandit_rft.evaluate import evaluate_splits

        evaluations = evaluate_splits(config, progress.drawn, base=base, state=state, asked=overrides)
        if "json" in given:
            for evaluation in evaluations:
                print(json.dumps(evaluation_line(evaluation)), flush=True)
            return 0
        done = list(evaluations)
    show_evaluations(title or config.model_name_or_path, done, Console(highlight=False))
    return 0


def report(given: argparse.Namespace) -> int:
    """Write the HTML report of a run folder."""
    folder = Path(given.folder)
    if not (folder / "metrics.jsonl").is_file():
        raise UsageError(f"{folder} is no run folder: it has no metrics.jsonl")
    from bandit_rft.report import write_report

    print(write_report(folder))
    return 0


def study(given: argparse.Namespace) -> int:
    """Plan, run, watch or report a study; OUT is runs/<name of the study file> by default."""
    action, file = given.action, Path(given.study)
    folder = Path(getattr(given, "output_dir", None) or (file if file.is_dir() else Path("runs") / file.stem))
    if action in ("status", "report"):
        if action == "status" and not (folder / "plan.json").is_file():
            folder = folder / "tuning" if (folder / "tuning" / "plan.json").is_file() else folder
        packed = action == "report" and (folder / "cells.npz").is_file()
        if not packed and not (folder / "plan.json").is_file():
            raise UsageError(f"{folder} is no study folder: it has no plan.json (study run makes one; or --output_dir)")
        if action == "report":
            from bandit_rft.study.report import write_study_report

            print(write_study_report(folder))
            return 0
    from rich.console import Console

    from bandit_rft.study import status
    from bandit_rft.study.plan import load_plan

    console = Console(highlight=False, quiet="quiet" in given and "dry_run" not in given)
    if action == "status":
        status.show_status(folder, console)
        return 0
    plan = load_plan(file)
    if action == "plan":
        status.show_plan(plan, console)
        return 0
    return _run_study(plan, folder, given, console)


def _run_study(plan: Any, folder: Path, given: argparse.Namespace, console: Any) -> int:
    """Run a study's cells; of one with `tune`, first those that decide each level's value."""
    choose_wait("bounded")
    from rich.console import Console

    from bandit_rft.study.limit import seconds_left
    from bandit_rft.study.plan import seed_warning
    from bandit_rft.study.status import read_status, show_plan
    from bandit_rft.study.tuning import choose

    seconds = None if "launcher" in given else seconds_left(getattr(given, "max_seconds", None))
    ends = None if seconds is None else time.monotonic() + seconds
    _runner(plan, folder, given, console, ends)  # checks its options
    if "launcher" in given:
        return _launch_study(plan, folder, given, console)
    for name in ("workers", "launcher_option"):
        if name in given:
            raise UsageError(f"--{name} needs --launcher")
    if "dry_run" in given:
        show_plan(plan, console)
        return 0
    if (warning := seed_warning(plan)) is not None:
        said = Console(stderr=True, highlight=False)  # --quiet, too
        said.print(f"note: {warning}", markup=False, style="yellow", soft_wrap=True)
    if plan.tuning is not None:
        if _tune_study(plan, folder, given, console, ends) == 130:
            return 130
        plan = plan.tuned(choose(plan, folder))
    code = _run_cells(plan, folder, given, console, ends)
    if code == 0 and read_status(folder).counts["finished"] == len(plan.cells):  # all shares, not this one alone
        from bandit_rft.study.report import write_study_report

        console.print(f"report: {write_study_report(folder)}", markup=False, soft_wrap=True)
    return code


def _tune_study(plan: Any, folder: Path, given: argparse.Namespace, console: Any, ends: float | None) -> int:
    """Run the cells that choose a study's tuned values, until these can be chosen: 0, or 130 when stopped.

    Raises:
        ValueError: some failed, which is not said to be accepted, or belong to another share and are not here.
    """
    from bandit_rft.study.tuning import FILE, FOLDER, failures, recorded, undecided

    if recorded(plan, folder) is not None:
        return 0
    runs = folder / FOLDER
    if _run_cells(plan.tuning, runs, given, console, ends) == 130:
        return 130
    if recorded(plan, folder) is not None:  # another runner has chosen meanwhile
        return 0
    of = f"of {len(plan.tuning.cells)} runs that choose {plan.tune.key}"
    if "shard" in given and (missing := undecided(plan.tuning, runs)):
        raise ValueError(
            f"{missing} {of} are not in {runs / 'cells'}. When every share has run its own, copy the cells of all "
            f"shares into one of these folders and run that share again; then copy its {FILE} to the others"
        )
    if (failed := failures(plan.tuning, runs)) and "accept_failed" not in given:
        raise ValueError(
            f"{len(failed)} {of} failed and would count as 0: {', '.join(failed[:5])}{', ...' * (len(failed) > 5)}. "
            "--retry 1 tries them again; --accept_failed goes on, right where the tried value made them fail"
        )
    return 0


def _run_cells(plan: Any, folder: Path, given: argparse.Namespace, console: Any, ends: float | None) -> int:
    """Run the cells of one plan: 0 when all are finished, 130 when stopped, else 1."""
    from bandit_rft.study.status import show_status

    runner = _runner(plan, folder, given, console, ends)

    def stop(number: int, frame: object) -> None:
        console.print("stopping: cells finish their round and save; once more to kill them")
        runner.stop(at_once=runner.stop_requested)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with runner.listener:
            complete = runner.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    show_status(folder, console)
    if runner.stop_requested:
        why = "stopped at the time limit" if runner.out_of_time else "stopped"
        console.print(f"{why}; run the same command again to continue in {folder}", markup=False)
        return 130
    return 0 if complete else 1


def _runner(plan: Any, folder: Path, given: argparse.Namespace, console: Any, ends: float | None) -> Any:
    """The runner that the options ask for, which must have ended at `ends` on the monotonic clock."""
    from bandit_rft.study.launch import share
    from bandit_rft.study.limit import TimeLimit
    from bandit_rft.study.run import Runner
    from bandit_rft.study.status import StudyProgress

    gpus = getattr(given, "gpus", [])
    return Runner(
        plan, folder, jobs=getattr(given, "jobs", len(gpus) or 1), threads=getattr(given, "threads", 1),
        retry=getattr(given, "retry", 0), gpus=gpus,
        listener=StudyProgress(plan, folder, console, verbose="verbose" in given),
        cells=share(plan.cells, given.shard) if "shard" in given else None,
        limit=None if ends is None else TimeLimit(max(1, math.ceil(ends - time.monotonic())), folder),
    )  # fmt: skip


def _launch_study(plan: Any, folder: Path, given: argparse.Namespace, console: Any) -> int:
    """Start workers that run this command, and wait for them (slurm: submit them)."""
    from bandit_rft.study import launch, status
    from bandit_rft.study.tuning import FOLDER

    kind, workers, gpus = given.launcher, getattr(given, "workers", 1), len(getattr(given, "gpus", []))
    flags = ("jobs", "threads", "retry", "shard", "accept_failed", "max_seconds", "quiet", "verbose")
    worker = launch.make_worker(Path(given.study), folder, {f: getattr(given, f) for f in flags if f in given}, gpus)
    needs = launch.resources(kind, getattr(given, "jobs", gpus or 1), getattr(given, "threads", 1), gpus)
    options = needs | launch.read_options(getattr(given, "launcher_option", []))
    files = folder.absolute() / "launch"
    if "dry_run" in given:
        if kind != "slurm":
            raise UsageError("--dry_run of a launcher prints an sbatch script: --launcher slurm")
        print(launch.slurm_script(workers, files, options))
        return 0
    first = plan.tuning or plan
    first.write(folder / FOLDER if plan.tuning else folder)
    if kind == "slurm":
        jobs = launch.start_slurm(worker, workers, files, options)
        console.print(
            f"submitted {len(jobs)} workers, {jobs[0]} to {jobs[-1]}; what they print is in {files}\n"
            f"  bandit-rft study status {given.study} --output_dir {folder}", markup=False, soft_wrap=True,
        )  # fmt: skip
        return 0
    statuses = launch.RUN[kind](worker, workers, files, options)
    status.show_status(folder, console)
    return max(statuses)


def env(given: argparse.Namespace) -> int:
    """Print what a bug report should contain."""
    import torch

    from bandit_rft import ops

    print(f"platform      {platform.platform()}")
    print(f"python        {platform.python_version()}")
    packages = "bandit_rft torch transformers tokenizers safetensors datasets numpy pyarrow triton"
    for name in packages.split():
        print(f"{name:<14}{_version(name)}")
    print(f"threads       {torch.get_num_threads()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"cuda          {torch.version.cuda or 'none'}; {', '.join(devices) or 'no device'}")
    try:
        described = ops.describe()
    except ValueError as error:  # the backend that is asked for cannot serve here
        forced = os.environ.pop("BANDIT_RFT_BACKEND", "")
        described = f"{error}; without it:\n{ops.describe()}"
        os.environ["BANDIT_RFT_BACKEND"] = forced
    print(f"operations    {described}")
    return 0


def completion(given: argparse.Namespace) -> int:
    """Print the script that makes a shell complete these commands."""
    from bandit_rft.completion import completion_script

    print(completion_script(given.shell))
    return 0


def _set_loudness(given: argparse.Namespace) -> None:
    """Messages of ours to stderr, chatter of the libraries to nowhere; with --verbose all of it."""
    verbose = "verbose" in given
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(message)s")
    level = logging.WARNING if "quiet" in given else logging.DEBUG if verbose else logging.INFO
    logging.getLogger("bandit_rft").setLevel(level)
    if verbose:
        return
    try:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    except ImportError as error:
        raise ModuleNotFoundError(str(error), name="transformers") from error


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _fail(message: str, status: int) -> int:
    from bandit_rft.text import printable  # a message may quote what a model or a reward wrote

    print(f"bandit-rft: {printable(message)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
