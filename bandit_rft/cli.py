"""`bandit-rft train | eval | report | study | env`. Nothing heavy is imported before the arguments are known good."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bandit_rft.arguments import UsageError, make_parser, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the process's exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        make_parser(keys=False).print_help()
        return 0
    if arguments[0] == "--version":
        print(_version("bandit_rft"))
        return 0
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "train": train,
        "eval": evaluate,
        "report": report,
        "study": study,
        "env": env,
    }
    try:
        given = parse(arguments)
        return commands[given.command](given)
    except UsageError as error:
        return _fail(str(error), 2)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "bandit_rft":
            raise
        return _fail(f"{error.name} is not installed; this needs an extra: pip install 'bandit_rft[train]'", 1)
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        if "BANDIT_RFT_TRACEBACK" in os.environ:
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
    from bandit_rft.config import build_config, to_yaml

    config = build_config(given.overrides, getattr(given, "config", None))
    if "dry_run" in given:
        from bandit_rft.audit import design_audit

        print(to_yaml(config), end="")
        print("\n# design audit")
        for what, value in design_audit(config):
            print(f"# {what + ':':<17}{value}")
        return 0
    from rich.console import Console

    from bandit_rft.listener import Listeners
    from bandit_rft.progress import ConsoleListener, show_result
    from bandit_rft.report import ReportWriter

    quiet = "quiet" in given
    _quiet_libraries(logging.WARNING if quiet else logging.INFO)
    console = Console(highlight=False, quiet=quiet)
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
    show_result(trainer.folder, lines, report.path, console)
    if not trainer.finished:
        listener.say(
            f"stopped after round {trainer.round} of {config.max_rounds}; saved. Continue with\n"
            f"  bandit-rft train --config {trainer.folder / 'config.yaml'}"
        )
        return 130
    return 0


def evaluate(given: argparse.Namespace) -> int:
    """Evaluate a checkpoint (with its run's settings) or any model, and print the metrics as JSON lines."""
    from bandit_rft.config import build_config

    overrides, file = given.overrides, getattr(given, "config", None)
    found = ""  # the run's own configuration, which came with the checkpoint
    if "checkpoint" in given:
        checkpoint = Path(given.checkpoint)
        if not any((checkpoint / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UsageError(
                f"{checkpoint} is no model folder: it has neither config.json nor adapter_config.json (name "
                "checkpoint-<round>)"
            )
        overrides["model_name_or_path"] = str(checkpoint)
        run = checkpoint.absolute().parent.parent / "config.yaml"
        if file is None and run.is_file():
            file = found = str(run)
    config = build_config(overrides, file)
    if found and "reward.functions" not in overrides:
        from bandit_rft.rewards.spec import refuse_foreign_code

        refuse_foreign_code(config.reward.functions, source=found, allowed="allow_code" in given)
    _quiet_libraries()
    from bandit_rft.assemble import embedded_engine, load_policy, make_scorer
    from bandit_rft.data import PromptSet
    from bandit_rft.evaluate import evaluate as evaluate_split
    from bandit_rft.tasks import load_task

    task = load_task(
        config.task, data_path=config.data_path, seed=config.seed, reward=config.reward.functions or None,
        options=config.task_options,
    )  # fmt: skip
    policy = load_policy(config.model_name_or_path, config)
    assert policy.tokenizer is not None
    engine = embedded_engine(policy, config)
    e = config.evaluation
    names = e.splits or list(task.splits)
    if missing := [name for name in names if name not in task.splits]:
        raise UsageError(f"evaluation.splits: {missing[0]!r} is none of {', '.join(task.splits)}")
    with make_scorer(task, config) as scorer:
        for name in names:
            prompts = PromptSet(
                name, task.splits[name], policy.tokenizer, chat_template=config.chat_template,
                max_prompt_length=config.max_prompt_length, limit=e.max_queries,
            )  # fmt: skip
            start = time.perf_counter()
            result = evaluate_split(
                engine, scorer, prompts,
                seed=config.seed, num_samples=e.num_samples, temperature=e.temperature, greedy=e.greedy,
            )  # fmt: skip
            line = {"split": name, "questions": len(prompts), "filtered": prompts.filtered, **result.metrics}
            print(json.dumps({**line, "seconds": round(time.perf_counter() - start, 3)}), flush=True)
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
        if not (folder / "plan.json").is_file():
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
    from bandit_rft.study.run import Runner
    from bandit_rft.study.status import StudyProgress, show_plan, show_status

    gpus = getattr(given, "gpus", [])
    listener = StudyProgress(plan, folder, console)
    runner = Runner(
        plan, folder, jobs=getattr(given, "jobs", len(gpus) or 1), threads=getattr(given, "threads", 1),
        retry=getattr(given, "retry", 0), gpus=gpus, listener=listener,
    )  # fmt: skip
    if "dry_run" in given:
        show_plan(plan, console)
        return 0

    def stop(number: int, frame: object) -> None:
        console.print("stopping: cells finish their round and save; once more to kill them")
        runner.stop(at_once=runner.stop_requested)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with listener:
            complete = runner.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    show_status(folder, console)
    if runner.stop_requested:
        console.print(f"stopped; run the same command again to continue in {folder}", markup=False)
        return 130
    if complete:
        from bandit_rft.study.report import write_study_report

        console.print(f"report: {write_study_report(folder)}", markup=False, soft_wrap=True)
    return 0 if complete else 1


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
    described = ops.describe()
    for key, value in described.items() if isinstance(described, Mapping) else (("operations", described),):
        print(f"{key:<14}{value}")
    return 0


def _quiet_libraries(level: int = logging.INFO) -> None:
    """Warnings of ours to stderr, chatter of the libraries to nowhere."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("bandit_rft").setLevel(level)
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
