"""`bandit-rft train | eval | report | study | env`. Nothing heavy is imported before the arguments are known good."""

from __future__ import annotations

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

USAGE = """bandit-rft: reinforcement fine-tuning of language models as batched contextual bandit learning

  bandit-rft train  [--preset paper|minimal|demo] [--config FILE.yaml] [--KEY VALUE ...] [--dry_run]
  bandit-rft eval   [CHECKPOINT] [--config FILE.yaml] [--KEY VALUE ...] [--allow_code]
  bandit-rft report RUN_FOLDER
  bandit-rft study  plan | run | status | report STUDY.yaml [--output_dir OUT]
                    run: [--jobs N] [--threads N] [--retry N] [--gpus 0,1,...]
  bandit-rft env

  bandit-rft train --preset demo
  bandit-rft train --preset minimal --task gsm8k --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --seed 1
  bandit-rft eval runs/gsm8k/checkpoints/checkpoint-100
  bandit-rft train --help      lists every key
"""


class UsageError(Exception):
    """A command line that cannot be run; its text is for the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the process's exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "eval": evaluate,
        "report": report,
        "study": study,
        "env": env,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        print(_version("bandit_rft"))
        return 0
    name, *rest = arguments
    try:
        if name not in commands:
            import difflib

            near = difflib.get_close_matches(name, commands, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(f"unknown command {name!r}{hint}; try bandit-rft --help")
        return commands[name](rest)
    except UsageError as error:
        return _fail(str(error), 2)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "bandit_rft":
            raise
        return _fail(f"{error.name} is not installed; this needs an extra: pip install 'bandit_rft[train]'", 1)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
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


def train(arguments: list[str]) -> int:
    """Train a policy as configured."""
    overrides, file, flags, _ = _parse(arguments, flags=("dry_run",))
    from bandit_rft.config import build_config, to_yaml

    config = build_config(overrides, file)
    if "dry_run" in flags:
        from bandit_rft.audit import design_audit

        print(to_yaml(config), end="")
        print("\n# design audit")
        for what, value in design_audit(config):
            print(f"# {what + ':':<17}{value}")
        return 0
    from bandit_rft.progress import ConsoleListener, show_result

    _quiet_libraries()
    listener = ConsoleListener(config)
    with listener.loading():
        from bandit_rft.trainer import Trainer

        trainer = Trainer(config, listener)

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
    show_result(trainer.folder, lines, trainer.report)
    if not trainer.finished:
        listener.say(
            f"stopped after round {trainer.round} of {config.max_rounds}; saved. Continue with\n"
            f"  bandit-rft train --config {trainer.folder / 'config.yaml'}"
        )
        return 130
    return 0


def evaluate(arguments: list[str]) -> int:
    """Evaluate a checkpoint (with its run's settings) or any model, and print the metrics as JSON lines."""
    overrides, file, flags, positional = _parse(arguments, flags=("allow_code",), positional=1)
    from bandit_rft.config import build_config

    found = ""  # the run's own configuration, which came with the checkpoint
    if positional:
        checkpoint = Path(positional[0])
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

        refuse_foreign_code(config.reward.functions, source=found, allowed="allow_code" in flags)
    _quiet_libraries()
    from bandit_rft.data import PromptSet
    from bandit_rft.evaluate import evaluate as evaluate_split
    from bandit_rft.rollout import RolloutEngine
    from bandit_rft.tasks import load_task
    from bandit_rft.trainer import check_lengths, load_policy, make_scorer

    task = load_task(
        config.task, data_path=config.data_path, seed=config.seed, reward=config.reward.functions or None,
        options=config.task_options,
    )  # fmt: skip
    policy = load_policy(config.model_name_or_path, config)
    check_lengths(policy, config)
    assert policy.tokenizer is not None
    engine = RolloutEngine(
        policy, max_completion_length=config.max_completion_length, batch_size=config.rollout.batch_size
    )
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


def report(arguments: list[str]) -> int:
    """Write the HTML report of a run folder."""
    _, _, _, positional = _parse(arguments, positional=1, keys=False)
    if not positional:
        raise UsageError("bandit-rft report RUN_FOLDER: which run?")
    folder = Path(positional[0])
    if not (folder / "metrics.jsonl").is_file():
        raise UsageError(f"{folder} is no run folder: it has no metrics.jsonl")
    from bandit_rft.report import write_report

    print(write_report(folder))
    return 0


def study(arguments: list[str]) -> int:
    """Plan, run, watch or report a study; OUT is runs/<name of the study file> by default."""
    actions = ("plan", "run", "status", "report")
    if not arguments or arguments[0] not in actions:
        if arguments and arguments[0] in ("-h", "--help"):
            print(USAGE, end="")
            return 0
        raise UsageError(f"bandit-rft study {' | '.join(actions)} STUDY.yaml: expected one of these; try --help")
    action, *rest = arguments
    known = ("jobs", "threads", "retry", "gpus") if action == "run" else ()
    options, _, _, positional = _parse(rest, flags=("dry_run",), positional=1, only=("output_dir", *known))
    if not positional:
        raise UsageError(f"bandit-rft study {action} STUDY.yaml: which study?")
    file = Path(positional[0])
    folder = Path(options.get("output_dir") or (file if file.is_dir() else Path("runs") / file.stem))
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

    console = Console(highlight=False)
    if action == "status":
        status.show_status(folder, console)
        return 0
    plan = load_plan(file)
    if action == "plan":
        status.show_plan(plan, console)
        return 0
    return _run_study(plan, folder, options, console)


def _run_study(plan: Any, folder: Path, options: Mapping[str, str], console: Any) -> int:
    from bandit_rft.study.run import Runner
    from bandit_rft.study.status import StudyProgress

    gpus = [part for part in options.get("gpus", "").split(",") if part]
    numbers: dict[str, Any] = {"jobs": len(gpus) or 1, "threads": 1, "retry": 0}
    for key in numbers:
        if key in options:
            if not options[key].isdecimal():
                raise UsageError(f"--{key} must be a whole number; got {options[key]!r}")
            numbers[key] = int(options[key])
    listener = StudyProgress(plan, folder, console)
    runner = Runner(plan, folder, **numbers, gpus=gpus, listener=listener)

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
    from bandit_rft.study.status import show_status

    show_status(folder, console)
    if runner.stop_requested:
        console.print(f"stopped; run the same command again to continue in {folder}", markup=False)
        return 130
    if complete:
        from bandit_rft.study.report import write_study_report

        console.print(f"report: {write_study_report(folder)}", markup=False, soft_wrap=True)
    return 0 if complete else 1


def env(arguments: list[str]) -> int:
    """Print what a bug report should contain."""
    _parse(arguments, keys=False)
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


def _parse(
    arguments: list[str],
    *,
    flags: Sequence[str] = (),
    positional: int = 0,
    keys: bool = True,
    only: Sequence[str] | None = None,
) -> tuple[dict[str, Any], str | None, set[str], list[str]]:
    """(dotted overrides, --config file, flags given, positional arguments). `--help` prints and exits."""
    overrides: dict[str, Any] = {}
    file: str | None = None
    given: set[str] = set()
    free: list[str] = []
    rest = list(arguments)
    while rest:
        item = rest.pop(0)
        if item in ("-h", "--help"):
            print(USAGE, end="")
            if keys:
                _print_keys()
            raise SystemExit(0)
        if not item.startswith("--"):
            if len(free) == positional:
                raise UsageError(f"unexpected argument {item!r}; keys are written --key value")
            free.append(item)
            continue
        key, has_value, value = item[2:].partition("=")
        key = key.replace("-", "_")
        if key in flags and not has_value:
            given.add(key)
            continue
        if not keys or (only is not None and key not in only):
            raise UsageError(f"unknown option {item!r}")
        if not has_value:
            if not rest or rest[0].startswith("--"):
                if not _is_switch(key):
                    raise UsageError(f"--{key} needs a value")
                value = "true"
            else:
                value = rest.pop(0)
        if key == "config":
            file = value
        elif key in overrides:
            raise UsageError(f"--{key} is given twice")
        else:
            overrides[key] = value
    return overrides, file, given, free


def _is_switch(key: str) -> bool:
    from bandit_rft.config import key_help

    return any(name == key and kind == "bool" for name, kind, *_ in key_help())


def _print_keys() -> None:
    from bandit_rft.config import key_help

    print("\nkeys (in a YAML file or as --key value; default in brackets):")
    for name, _, default, help in key_help():
        shown = "" if default in (None, "", [], {}) else f" [{default}]"
        print(f"  {name:<28}{help}{shown}")


def _quiet_libraries() -> None:
    """Warnings of ours to stderr, chatter of the libraries to nowhere."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("bandit_rft").setLevel(logging.INFO)
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
    print(f"bandit-rft: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
