"""The command line: quick help, errors that help, training, evaluating and resuming as a user does it."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tiny_models import save_tiny_llama

from bandit_rft import cli
from bandit_rft.arguments import WITH_KEYS, Parser, make_parser, parse, subcommands
from bandit_rft.config import build_config, keys
from bandit_rft.metrics import read_metrics
from bandit_rft.options import choices, read_value
from bandit_rft.progress import show_result
from bandit_rft.text import printable


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data and a reward in a folder, as a user would have them."""
    folder = tmp_path_factory.mktemp("user")
    save_tiny_llama(folder / "model")
    for split, count in (("train", 24), ("test", 8)):
        rows = [json.dumps({"prompt": f"{i}+{i % 5}=", "answer": str(i + i % 5)}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    (folder / "rewards.py").write_text(
        "def vowel(prompts, completions, **columns):\n"
        "    return [float(text[:1] in tuple('aeiou')) for text in completions]\n"
    )
    return folder


def arguments(setup: Path, output: Path, **more: object) -> list[str]:
    values = {
        "preset": "minimal", "model_name_or_path": setup / "model", "task": "dataset", "data_path": setup,
        "reward.functions": f"{setup}/rewards.py:vowel", "output_dir": output, "max_rounds": 3, "batch_size": 8,
        "max_prompt_length": 12, "max_completion_length": 8, "learning_rate": 1e-3, "device": "cpu", **more,
    }  # fmt: skip
    return [item for key, value in values.items() for item in (f"--{key}", str(value))]


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom bandit_rft.cli import main\nmain(['--help'])\n"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules), 'heavy import'\n"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "bandit-rft train" in result.stdout
    assert time.perf_counter() - start < 3  # under 1 s on an idle machine; tests share theirs


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("train --help", 0),
        ("train --objective.cliplow 1", 2),
        ("train --preset demo --seed x", 2),
        ("train --preset demo --objective.kind gspoo", 2),
        ("train --preset demo --advantage spo --advantage_options.half_life -1", 2),
        ("train --preset demo --task_options.digits 0", 2),
        ("train --preset demo --chat_template_kwargs.date_string 2024-07-26", 2),
        ("train --preset demo --chat_template_kwargs.enable_thinking false --help", 0),
        ("eval --preset demo --evaluation.num_samples 0 --evaluation.greedy false", 2),
        ("train --preset demo --dry_run", 0),
        ("study run nowhere.yaml", 2),
    ],
)
def test_what_a_command_line_says_is_checked_without_torch(line: str, status: int) -> None:
    code = (
        "import sys\nfrom bandit_rft.cli import main\n"
        "try:\n    status = main(sys.argv[1:])\nexcept SystemExit as ended:\n    status = ended.code\n"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules), 'heavy import'\n"
        "raise SystemExit(10 + status)"
    )
    result = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True)
    assert result.returncode == 10 + status, result.stderr


def test_train_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for key in ("objective.clip_low", "num_generations", "learning_rate", "resume", "evaluation.num_samples"):
        assert key in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "did you mean train?"),
        ("train --preset minimal --objective.cliplow 0.3", "did you mean objective.clip_low?"),
        ("train --preset minimal --task gsm8k --model_name_or_path x --temperature -1", "temperature must be > 0"),
        ("train --preset minimal --task gsm8k", "--model_name_or_path is missing"),
        ("train --learning_rate", "--learning_rate needs a value"),
        ("train --seed 1 --seed 2", "given twice"),
        ("train gsm8k", "unexpected argument 'gsm8k'"),
        ("train --config nowhere.yaml", "nowhere.yaml"),
        ("train --preset minimal --tsak gsm8k", "did you mean task?"),
        ("train --preset demo --evaluation 5", "evaluation: expected a mapping of keys, such as evaluation.splits"),
        ("train --preset minimal --dry-rn", "unknown key 'dry_rn'"),
        ("train --config a.yaml --config b.yaml", "--config is given twice"),
        ("train --dry_run=no", "--dry_run ignored explicit argument 'no'"),
        ("env --jobs 3", "unknown option '--jobs'"),
        ("env now", "unexpected argument 'now'"),
        ("report --dry_run runs/x", "unknown option '--dry_run'"),
        ("study", "plan | run | status | report"),
        ("study paln x.yaml", "unknown action of study 'paln' (did you mean plan?)"),
        ("study run x.yaml --job 3", "unknown option '--job' (did you mean --jobs?)"),
        ("study run x.yaml --jobs 0", "--jobs must be a whole number >= 1; got '0'"),
        ("study run x.yaml --jobs", "--jobs needs a value"),
        ("study run x.yaml --jobs 1 --jobs 2", "--jobs is given twice"),
        ("study status", "which study?"),
        ("study run", "bandit-rft study run STUDY.yaml: which study?"),
        ("report", "which run?"),
        ("report nowhere", "no run folder"),
        ("eval nowhere", "no model folder"),
        ("completion", "which shell? bash | zsh | tcsh"),
        ("completion fish", "SHELL invalid choice: 'fish'"),
        ("help trian", "did you mean train?"),
    ],
)
def test_wrong_usage_is_status_2_with_a_hint(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    assert message in capsys.readouterr().err


# --- every flag acts --------------------------------------------------------------------------------------------------


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Parser]]:
    """Every command that can be run, by its words."""
    for name, sub in subcommands(parser).items():
        yield from commands(sub, (*words, name)) if subcommands(sub) else [(" ".join((*words, name)), sub)]


COMMANDS = dict(commands(make_parser(keys=False)))
FLAGS = [f"{name} {a.option_strings[-1]}" for name, sub in COMMANDS.items() for a in sub._actions if a.option_strings]


class Stage:
    """What the commands are run on, and what they said."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        self.folder, self.capsys, self.monkeypatch = folder, capsys, monkeypatch
        monkeypatch.chdir(folder)
        (folder / "keys.yaml").write_text("model_name_or_path: nowhere/model\ntask: arithmetic\nbatch_size: 7\n")
        settings = {
            "baseline": {"preset": "demo", "max_rounds": 1}, "models": {"m": {"model_name_or_path": "arithmetic-base"}},
            "tasks": {"t": {"task": "arithmetic"}}, "budget": {"rule": "rounds", "amount": 1},
        }  # fmt: skip
        (folder / "s.yaml").write_text(yaml.safe_dump(settings))

    def says(self, line: str, status: int = 0) -> str:
        try:
            assert cli.main(line.split()) == status
        except SystemExit as ended:
            assert ended.code == status
        captured = self.capsys.readouterr()
        return captured.out + captured.err

    def runner(self, line: str) -> dict[str, Any]:
        """The runner that `study run` makes; it runs nothing."""
        from bandit_rft.study import run

        made: list[dict[str, Any]] = []
        original = run.Runner.__init__

        def note(self: Any, plan: Any, folder: Path, **options: Any) -> None:
            made.append({"folder": folder, **options})
            original(self, plan, folder, **options)

        self.monkeypatch.setattr(run.Runner, "__init__", note)
        self.monkeypatch.setattr(run.Runner, "run", lambda self: self.plan.write(self.folder))
        self.says(line, status=1)
        return made[0]


def helps(name: str) -> Callable[[Stage], None]:
    def check(stage: Stage) -> None:
        text = stage.says(f"{name} --help")
        own = {option for action in COMMANDS[name]._actions for option in action.option_strings}
        others = {option for sub in COMMANDS.values() for a in sub._actions for option in a.option_strings} - own
        assert text.startswith(f"usage: bandit-rft {name}") and all(option in text for option in own)
        if name in WITH_KEYS:
            others -= {"--output_dir", "--max_seconds"}  # keys
        assert not [option for option in others if re.search(rf"{option}\b", text)]
        assert ("objective.clip_low" in text) == (name in WITH_KEYS)

    return check


def config_is_read(stage: Stage) -> None:
    assert "batch_size: 7" in stage.says("train --config keys.yaml --dry_run")
    assert yaml.safe_load(stage.says("train --config keys.yaml --batch_size 8 --dry_run"))["batch_size"] == 8


def eval_config_is_read(stage: Stage) -> None:
    (stage.folder / "keys.yaml").write_text("temperature: -1")
    assert "--model_name_or_path is missing" in stage.says("eval --task arithmetic", 2)
    assert "temperature must be > 0; got -1" in stage.says("eval --config keys.yaml --task arithmetic", 2)


def eval_runs_foreign_code_if_told(stage: Stage) -> None:
    checkpoint = stage.folder / "run" / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    text = "model_name_or_path: m\ntask: arithmetic\nreward:\n  functions: [absent.py:reward]\n"
    (stage.folder / "run" / "config.yaml").write_text(text)
    assert "names code that scoring would run" in stage.says(f"eval {checkpoint}", 1)
    assert "absent.py" in stage.says(f"eval {checkpoint} --allow_code", 1)  # it was looked for


def train_runs_dry(stage: Stage) -> None:
    text = stage.says("train --preset demo --dry_run")
    assert "# design audit" in text and "# checks" in text and "# probe" not in text
    few = "--batch_size 4 --evaluation.splits test --evaluation.max_queries 3 --rollout.batch_size 8"
    text = stage.says(f"train --preset demo --dry_run probe {few}")
    assert "# probe" in text and re.search(r"# wall time: +about \d+:\d\d", text)
    assert not (stage.folder / "runs").exists()


def train_is_quiet(stage: Stage) -> None:
    line = "train --preset demo --max_rounds 1 --batch_size 2 --evaluation.max_queries 2 --evaluation.splits test"
    assert stage.says(f"{line} --quiet --output_dir silent") == ""
    assert (stage.folder / "silent" / "report.html").is_file()
    assert "round 1/1" in stage.says(f"{line} --output_dir loud")


def eval_prints_json(stage: Stage) -> None:
    line = "eval --preset demo --evaluation.max_queries 2 --evaluation.splits test --evaluation.greedy false"
    (found,) = stage.says(f"{line} --json --quiet").splitlines()
    assert json.loads(found)["questions"] == 2 and "eval/test/pass@1" in json.loads(found)["intervals"]
    assert "Pass@1" in stage.says(line) and "{" not in stage.says(line)


def eval_is_quiet(stage: Stage) -> None:
    (stage.folder / "odd.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    line = "eval --preset demo --evaluation.max_queries 2 --evaluation.splits test --evaluation.greedy false"
    stage.monkeypatch.setattr("bandit_rft.progress.Count.due", lambda self: True)
    assert "evaluation: 2 of 2" in stage.says(line) and "evaluation: 2 of 2" not in stage.says(f"{line} --quiet")


def eval_chooses_the_best(stage: Stage) -> None:
    checkpoints = stage.folder / "run" / "checkpoints"
    lines = []
    for number, value in ((1, 0.5), (2, 0.75), (3, 0.25), (4, None)):
        (checkpoints / f"checkpoint-{number}").mkdir(parents=True)
        state = {"round": number, "position": 0, "generated_tokens": 0, "seconds": 0, "kl_coef": 0, "config": {}}
        state |= {"sha256": {}, "written_ns": number, "layout": 2}
        (checkpoints / f"checkpoint-{number}" / "state.json").write_text(json.dumps(state))
        lines.append(json.dumps({"round": number, "eval/train/pass@1": 1 / number, "eval/test/pass@1": value}))
    (stage.folder / "run" / "metrics.jsonl").write_text("\n".join(lines))
    stage.monkeypatch.setattr(
        "bandit_rft.evaluate.evaluate_splits", lambda config, *_, **__: print(config.model_name_or_path) or sys.exit(7)
    )
    line = "eval run --preset demo"
    assert "checkpoint-4\n" in stage.says(line, 7) and "checkpoint-2\n" in stage.says(f"{line} --best", 7)
    assert "give its folder" in stage.says("eval --best", 2)


def is_verbose(line: str) -> Callable[[Stage], None]:
    """The traceback of an error, and what is said in detail."""

    def check(stage: Stage) -> None:
        assert "Traceback" not in stage.says(line, 2)
        for flag in ("-v", "--verbose"):
            with pytest.raises(ValueError):
                cli.main([*line.split(), flag])
        assert "not allowed with argument --quiet" in stage.says(f"{line} --quiet -v", 2)

    return check


def study_is_verbose(stage: Stage) -> None:
    from bandit_rft.study import run

    def begins(self: Any) -> bool:
        cell = self.plan.cells[0]
        self.listener.started(cell, self.plan.config(cell, self.folder))
        return False

    stage.monkeypatch.setattr(run.Runner, "run", lambda self: begins(self) or self.plan.write(self.folder))
    words = "started  m-t-baseline-baseline-s0"
    assert words in stage.says("study run s.yaml -v", 1) and words not in stage.says("study run s.yaml", 1)


def study_is_quiet(stage: Stage) -> None:
    from bandit_rft.study import run

    stage.monkeypatch.setattr(run.Runner, "run", lambda self: self.plan.write(self.folder))
    assert "1 waiting" in stage.says("study run s.yaml", 1)
    said = stage.says("study run s.yaml --quiet", 1).splitlines()
    assert len(said) == 1 and said[0].startswith("note: one seed")  # what it cannot show is a warning


def study_runs_dry(stage: Stage) -> None:
    text = stage.says("study run s.yaml --dry_run --jobs 2")
    assert "GPU-hours" in text and "nothing has been run" in text and text == stage.says("study plan s.yaml")
    assert sorted(path.name for path in stage.folder.iterdir()) == ["keys.yaml", "s.yaml"]
    assert "jobs=3 is more than the 2 gpus" in stage.says("study run s.yaml --dry_run --jobs 3 --gpus 0,1", 1)


def study_plans_dry(stage: Stage) -> None:
    assert stage.says("study plan s.yaml --dry_run") == stage.says("study plan s.yaml")


def reaches_the_runner(option: str, text: str, value: object, before: object) -> Callable[[Stage], None]:
    def check(stage: Stage) -> None:
        assert stage.runner("study run s.yaml")[option] == before
        stage.monkeypatch.undo()
        stage.monkeypatch.chdir(stage.folder)
        assert stage.runner(f"study run s.yaml --{option} {text}")[option] == value

    return check


def study_output_dir(stage: Stage) -> None:
    assert stage.runner("study run s.yaml --output_dir out/of/it")["folder"] == Path("out/of/it")
    assert (stage.folder / "out" / "of" / "it" / "plan.json").is_file()


def study_works_on_a_share(stage: Stage) -> None:
    assert stage.runner("study run s.yaml")["cells"] is None
    stage.monkeypatch.undo()
    stage.monkeypatch.chdir(stage.folder)
    assert [cell.seed for cell in stage.runner("study run s.yaml --shard 1/1")["cells"]] == [0]
    assert "shard=2/2 is empty" in stage.says("study run s.yaml --shard 2/2", 1)


def study_accepts_failures(stage: Stage) -> None:
    from bandit_rft.study.plan import load_plan

    path, record = stage.folder / "s.yaml", stage.folder / "runs" / "s" / "tuning.json"
    path.write_text(path.read_text() + "tune: {grid: [1.0e-3, 2.0e-3], seeds: [9]}\n")
    stage.monkeypatch.setattr("bandit_rft.study.run.Runner.run", lambda self: self.plan.write(self.folder))
    tuning = load_plan(path).tuning
    for cell in tuning.cells if tuning is not None else ():
        home = record.parent / "tuning" / "cells" / cell.id
        home.mkdir(parents=True)
        (home / "cell.json").write_text('{"status": "failed", "attempts": 1}')
    assert "2 of 2 runs that choose learning_rate failed" in stage.says("study run s.yaml", 1) and not record.exists()
    stage.says("study run s.yaml --accept_failed", 1)
    assert json.loads(record.read_text())["chosen"] == [["baseline", "baseline", 1e-3]]


def study_keeps_time(stage: Stage) -> None:
    assert stage.runner("study run s.yaml")["limit"] is None
    stage.monkeypatch.undo()
    stage.monkeypatch.chdir(stage.folder)
    assert stage.runner("study run s.yaml --max_seconds 90")["limit"].seconds == 90


def study_is_launched(stage: Stage) -> None:
    pytest.importorskip("submitit")
    line = "study run s.yaml --launcher slurm --dry_run"
    assert "time=MINUTES is needed" in stage.says(line, 1)
    script = stage.says(f"{line} --launcher_option time=7 --launcher-option qos=low")
    assert "#SBATCH --time=7\n" in script and "#SBATCH --qos=low\n" in script and "--array" not in script
    assert "#SBATCH --array=0-2%3\n" in stage.says(f"{line} --launcher_option time=7 --workers 3")


def of_output_dir(action: str, words: str) -> Callable[[Stage], None]:
    def check(stage: Stage) -> None:
        study_output_dir(stage)
        assert "runs/s is no study folder" in stage.says(f"study {action} s.yaml", 2)
        assert words in stage.says(f"study {action} s.yaml --output_dir out/of/it")

    return check


#: One check for every flag; test_every_flag_acts asks the parser which there are.
ACTS: dict[str, Callable[[Stage], None]] = {
    **{f"{name} --help": helps(name) for name in COMMANDS},
    "train --config": config_is_read,
    "train --dry_run": train_runs_dry,
    "train --quiet": train_is_quiet,
    "train --verbose": is_verbose("train --preset demo --seed x"),
    "eval --config": eval_config_is_read,
    "eval --best": eval_chooses_the_best,
    "eval --json": eval_prints_json,
    "eval --quiet": eval_is_quiet,
    "eval --verbose": is_verbose("eval --preset demo --seed x"),
    "study run --verbose": study_is_verbose,
    "eval --allow_code": eval_runs_foreign_code_if_told,
    "study plan --dry_run": study_plans_dry,
    "study run --dry_run": study_runs_dry,
    "study run --quiet": study_is_quiet,
    "study run --jobs": reaches_the_runner("jobs", "3", 3, 1),
    "study run --threads": reaches_the_runner("threads", "2", 2, 1),
    "study run --retry": reaches_the_runner("retry", "4", 4, 0),
    "study run --gpus": reaches_the_runner("gpus", "0,2", ["0", "2"], []),
    "study run --output_dir": study_output_dir,
    "study run --shard": study_works_on_a_share,
    "study run --accept_failed": study_accepts_failures,
    "study run --max_seconds": study_keeps_time,
    "study run --launcher": study_is_launched,
    "study run --workers": study_is_launched,
    "study run --launcher_option": study_is_launched,
    "study status --output_dir": of_output_dir("status", "1 cells: 1 waiting"),
    "study report --output_dir": of_output_dir("report", "report.html"),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_acts(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ACTS[flag](Stage(tmp_path, capsys, monkeypatch))


def test_no_check_is_of_a_flag_that_is_gone() -> None:
    assert set(ACTS) == set(FLAGS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == metadata.version("bandit_rft")


#: Values for keys where any other value of the type would not do, with what they need beside them.
SAMPLES: dict[str, str] = {
    "preset": "demo", "task": "countdown", "advantage": "weighted --advantage_options.positive_weight 0.2",
    "advantage_options": "'{positive_weight: 1}' --advantage weighted", "task_options": "'{digits: 1}'",
    "chat_template_kwargs": "'{enable_thinking: false}'",
    "objective.kl": "k3 --objective.kl_coef 0.1",
    "objective.kl_coef": "0.1 --objective.kl k3", "objective.dual_clip": "4",
    "objective.importance_cap": "0.25 --objective.kind importance --objective.dual_clip null",
    "kl.target": "0.1 --preset paper",
    "objective.aggregation": "seq-mean-token-sum", "kl.where": "reward --preset paper",
    "objective.norm_length": "9 --objective.aggregation seq-mean-token-sum-norm", "reward.memory_mb": "512",
    "reward.length_penalty_from": "9 --reward.length_penalty 1", "report_to": "tensorboard,wandb",
    "rollout.keep": "2 --num_generations 4", "rollout.dynamic_sampling": "1 --num_generations 4",
    "num_generations": "4", "lora.dropout": "0", "reward.weights": "0.5,1", "objective.kind": "gspo",
    "objective.importance_floor": "0.25 --objective.kind importance_mask --objective.dual_clip null",
    "rollout.engine": "vllm --rollout.urls http://a:1", "rollout.urls": "http://a:1,https://b --rollout.engine vllm",
    **{f"rollout.{key}": "a --rollout.engine vllm" for key in ("server_python", "server_command")},
    **{
        f"rollout.{key}": f"{value} --rollout.engine vllm --rollout.urls http://a:1"
        for key, value in (
            ("push", "folder"), ("push_folder", "a"), ("ahead", "1"), ("canary_prompts", "3"), ("max_requests", "3"),
            ("request_timeout_s", "3"), ("retry_s", "3"), ("on_logprob_gap", "correct"),
        )
    },
    "min_lr_ratio": "0.25 --lr_scheduler_type linear", "lr_scheduler_rounds": "3 --lr_scheduler_type cosine",
}  # fmt: skip


@pytest.mark.parametrize("name", keys())
@pytest.mark.parametrize("command", WITH_KEYS)
def test_every_key_acts(command: str, name: str) -> None:
    key = keys()[name]
    of_kind = {int: "3", float: "0.25", bool: str(not key.default).lower()}
    usual = of_kind.get(key.kind) or next((c for c in choices(key.kind) if c != key.default), "3")
    value, *more = shlex.split(SAMPLES.get(name, usual))
    given = ["--preset", "minimal", "--model_name_or_path", "m", "--task", "arithmetic"]
    for other in (name, *more[::2]):
        if other.removeprefix("--") in ("preset", "model_name_or_path", "task"):
            position = given.index(f"--{other.removeprefix('--')}")
            del given[position : position + 2]
    spelled = [[f"--{name}", value], [f"--{name}={value}"], [f"--{name.replace('_', '-')}", value]]
    configs = [build_config(parse([command, *given, *more, *words]).overrides) for words in spelled]
    assert configs[0] == configs[1] == configs[2]
    assert attrgetter(name)(configs[0]) == read_value(key.kind, value)
    if name not in ("lora.dropout",):
        assert attrgetter(name)(configs[0]) != key.default


def test_switches_and_values_that_look_like_options() -> None:
    given = parse(["train", "--rollout.mask_truncated", "--evaluation.greedy", "no", "--kl.target", "-1e-3"])
    assert given.overrides == {
        "rollout.mask_truncated": "true", "evaluation.greedy": "no", "kl.target": "-1e-3",
    }  # fmt: skip
    given = parse(["train", "--task-options.answer-column", "the answer", "--data_path", "-"])
    assert given.overrides == {"task_options.answer_column": "the answer", "data_path": "-"}
    for line in ("eval --seed 3 runs/x/checkpoint-1", "eval runs/x/checkpoint-1 --seed=3"):
        given = parse(line.split())
        assert given.target == "runs/x/checkpoint-1" and given.overrides == {"seed": "3"}


def test_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(given: argparse.Namespace) -> int:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(cli, "train", missing)
    assert cli.main(["train"]) == 1
    assert "pip install 'bandit_rft[train]'" in capsys.readouterr().err


def test_dry_run_prints_the_configuration_and_an_audit(
    setup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *arguments(setup, tmp_path / "run"), "--dry_run"]) == 0
    text = capsys.readouterr().out
    tree = yaml.safe_load(text)
    assert tree["batch_size"] == 8 and tree["objective"]["kind"] == "ppo"
    assert "8 queries x 1 rollouts" in text and "normalizer" in text and "64 generated" in text and "parameters" in text
    assert not (tmp_path / "run").exists()


def test_env_reports_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "transformers" in text and "python" in text


def test_env_goes_on_where_the_forced_backend_cannot_serve(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug report is wanted most where something does not work."""
    monkeypatch.setenv("BANDIT_RFT_BACKEND", "nonsense")
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert "operations    BANDIT_RFT_BACKEND must be one of" in text and "got 'nonsense'" in text
    assert re.search(r"^cpu  float32 +-> \w+$", text, re.MULTILINE)  # without it
    assert os.environ["BANDIT_RFT_BACKEND"] == "nonsense"


def test_train_then_eval_gives_the_same_numbers(setup: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    given = arguments(setup, run, **{"evaluation.greedy": "true", "evaluation.num_samples": 2})
    assert cli.main(["train", *given]) == 0
    text = capfd.readouterr().out
    assert "loss near 0 is normal" in text and "round 3/3" in text and "after 3 rounds" in text
    assert "question: " in text and "before, reward" in text
    last = read_metrics(run)[-1]

    checkpoint = str(run / "checkpoints" / "checkpoint-3")
    # The run may be somebody's: its configuration names code, which is run only where the user says so.
    assert cli.main(["eval", checkpoint]) == 1
    assert "config.yaml names code that scoring would run" in capfd.readouterr().err
    assert cli.main(["eval", checkpoint, "--allow_code", "--json"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["split"] for line in lines] == ["train", "test"]
    for line in lines:
        for key in ("pass@1", "pass@2", "greedy", "mean_length"):
            name = f"eval/{line['split']}/{key}"
            assert line[name] == last[name]

    # training the same again has nothing left to do, and says where things are
    assert cli.main(["train", *given]) == 0
    text = capfd.readouterr().out
    assert "continuing after round 3" in text and "nothing is left to do" in text


@pytest.mark.slow
def test_interrupt_finishes_the_round_saves_and_says_how_to_resume(setup: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "bandit_rft", "train", *arguments(setup, run, max_rounds=100000, eval_steps=0)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ})
    deadline = time.monotonic() + 90
    while len(read_metrics(run)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    done = read_metrics(run)[-1]["round"]
    assert f"stopped after round {done} of 100000; saved" in output
    assert f"bandit-rft train --config {run / 'config.yaml'}" in output
    assert (run / "checkpoints" / f"checkpoint-{done}" / "state.json").is_file()
    assert "Traceback" not in output


def test_failing_reward_is_an_error_without_our_traceback(
    setup: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.py").write_text("def bad(prompts, completions, **columns):\n    raise RuntimeError('no luck')\n")
    given = arguments(setup, tmp_path / "run", **{"reward.functions": f"{tmp_path}/bad.py:bad"})
    assert cli.main(["train", *given]) == 1
    assert "no luck" in capfd.readouterr().err


def test_model_text_is_shown_as_text(tmp_path: Path) -> None:
    from bandit_rft.metrics import write_parquet

    hostile = "[bold red]hi[/] \x1b[31m\x07 \u202eabc"
    for number in (0, 5):
        columns = {
            "query": ("int64", [0]), "sample": ("int32", [0]), "prompt": ("string", ["[link=x]1+1"]),
            "completion": ("string", [hostile]), "answer": ("string", ["2"]), "reward": ("float64", [0.0]),
            "truncated": ("bool", [False]),
        }  # fmt: skip
        write_parquet(tmp_path / "evaluations" / f"round-{number:06d}-test.parquet", columns)
    out = io.StringIO()
    lines = [{"round": 0, "eval/test/pass@1": 0.25}, {"round": 5, "eval/test/pass@1": 0.75}]
    show_result(tmp_path, lines, tmp_path / "report.html", Console(file=out, width=200, force_terminal=True))
    text = out.getvalue()
    assert "[bold red]hi[/] \\x1b[31m\\x07 \\u202eabc" in text and "[link=x]1+1" in text
    assert "\x07" not in text and "\u202e" not in text
    assert "+0.500" in text and "report.html" in text


def test_printable_keeps_text_and_shows_controls() -> None:
    assert printable("héllo\n\t世界 🙂") == "héllo\n\t世界 🙂"
    assert printable("\x00\x1b\x7f\x9b\u200b\ud800") == "\\x00\\x1b\\x7f\\x9b\\u200b\\ud800"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("weights", "could not be loaded: SafetensorError"),
        ("tokenizer", "could not be loaded: KeyError"),
        ("sizes", "could not be loaded: RuntimeError"),
        ("device", "device='banana' cannot be used"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line(
    damage: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_llama(tmp_path / "model")
    if damage == "weights":
        (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:100])
    if damage == "tokenizer":
        (model / "tokenizer.json").write_text("{}")
    if damage == "sizes":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 8}))
    device = "banana" if damage == "device" else "cpu"
    line = f"train --preset minimal --task arithmetic --model_name_or_path {model} --device {device}"
    assert cli.main([*line.split(), "--output_dir", str(tmp_path / "run"), "--quiet"]) in (1, 2)
    error = [text for text in capsys.readouterr().err.splitlines() if text.startswith("bandit-rft: ")]
    assert len(error) == 1 and message in error[0], error
