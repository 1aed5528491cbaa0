"""Paths in configuration files: from the file's folder, and found again after a run was moved, with its data or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import save_tiny_llama

from bandit_rft import cli
from bandit_rft.config import build_config
from bandit_rft.metrics import read_metrics
from bandit_rft.paths import change_paths

VOWEL = """def vowel(prompts, completions, **columns):
    return [float(text[:1] in tuple('aeiou')) for text in completions]
"""


def write_rows(path: Path, *numbers: int) -> None:
    path.write_text("\n".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) for i in numbers))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder as a user has it: model, data, rewards, and runs below it."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    save_tiny_llama(folder / "model")
    for name, numbers in (("train", range(8)), ("test", range(20, 24)), ("extra", range(30, 33))):
        write_rows(folder / "data" / f"{name}.jsonl", *numbers)
    (folder / "rewards.py").write_text(VOWEL)
    return folder


def train(**more: object) -> int:
    values = {
        "preset": "minimal", "model_name_or_path": "model", "task": "dataset", "data_path": "data", "batch_size": 4,
        "reward.functions": "rewards.py:vowel", "evaluation.files": "extra=data/extra.jsonl", "output_dir": "runs/one",
        "max_rounds": 1, "max_prompt_length": 12, "max_completion_length": 6, "device": "cpu", **more,
    }  # fmt: skip
    return cli.main(["train", "--quiet", *(item for key, value in values.items() for item in (f"--{key}", str(value)))])


def with_data(project: Path) -> Path:
    """The whole project is somewhere else now, and the old one is gone."""
    moved = project.parent / "elsewhere" / "renamed"
    moved.parent.mkdir()
    shutil.move(project, moved)
    return moved / "runs" / "one"


def alone(project: Path) -> Path:
    """The run folder is somewhere else now; model, data and rewards are where they were."""
    moved = project.parent / "archive" / "of" / "runs" / "one"
    moved.parent.mkdir(parents=True)
    shutil.move(project / "runs" / "one", moved)
    return moved


@pytest.mark.parametrize("move", [with_data, alone], ids=lambda f: f.__name__)
def test_a_moved_run_is_evaluated_and_continued(
    project: Path, move: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(project)
    assert train() == 0
    before = read_metrics(Path("runs/one"))[-1]
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    run = move(project)
    capsys.readouterr()
    for target in (run, run / "checkpoints" / "checkpoint-1", f"../{run.relative_to(tmp_path)}"):
        assert cli.main(["eval", str(target), "--json", "--allow_code", "--quiet"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["split"] for line in lines] == ["train", "test", "extra"]
        for line in lines:
            key = f"eval/{line['split']}/pass@1"
            assert line[key] == before[key]
    assert cli.main(["train", "--config", str(run / "config.yaml"), "--max_rounds", "3", "--quiet"]) == 0
    assert [line["round"] for line in read_metrics(run)] == [0, 1, 2, 3] and not list(other.iterdir())
    # continued there, it is at home there
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["output_dir"] == "." and saved["resume"] == "auto"
    for value in (saved["data_path"], saved["model_name_or_path"]):
        assert value.startswith("..") and (run / value).is_dir()
    assert json.loads((run / "checkpoints/checkpoint-3/state.json").read_text())["folder"] == str(run)


def test_other_rewards_are_another_run(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    assert train() == 0
    (project / "other").mkdir()
    shutil.copy("rewards.py", "other/rewards.py")
    assert train(max_rounds=2, **{"reward.functions": "other/rewards.py:vowel"}) == 2
    assert "reward.functions: " in capsys.readouterr().err
    monkeypatch.chdir(project / "other")  # the same file by another name is the same
    same = {"reward.functions": "../rewards.py:vowel", "output_dir": "../runs/one", "model_name_or_path": "../model"}
    places = {"data_path": "../data", "evaluation.files": "extra=../data/extra.jsonl"}
    assert train(max_rounds=2, **same, **places) == 0


def test_a_moved_adapter_finds_its_base(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(project)
    assert train(**{"lora.rank": 2}) == 0
    monkeypatch.chdir(tmp_path)
    run = with_data(project)
    assert cli.main(["eval", str(run), "--json", "--allow_code", "--quiet"]) == 0
    assert cli.main(["train", "--config", str(run / "config.yaml"), "--max_rounds", "2", "--quiet"]) == 0
    assert read_metrics(run)[-1]["round"] == 2


def test_paths_of_a_file_start_at_its_folder(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model_name_or_path": "model", "task": "data/train.jsonl", "task_options": {"test_path": "data/test.jsonl"},
        "reward": {"functions": ["sample:rewards.py:vowel", "exact_match", "absent.py:f"]}, "output_dir": "./runs/x",
        "evaluation": {"files": "extra=data/extra.jsonl, data/test.jsonl"},
    }  # fmt: skip
    (project / "mine.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    config = build_config(file="project/mine.yaml")
    assert config.model_name_or_path == "project/model" and config.task == "project/data/train.jsonl"
    assert config.task_options == {"test_path": "project/data/test.jsonl"} and config.output_dir == "project/runs/x"
    assert config.reward.functions == ["sample:project/rewards.py:vowel", "exact_match", "absent.py:f"]
    assert config.evaluation.files == ["extra=project/data/extra.jsonl", "project/data/test.jsonl"]
    # what stands on the command line starts where it is typed, and an output_dir without a dot there, too
    settings |= {"output_dir": "runs/x", "task": "gsm8k", "task_options": {}}
    (project / "mine.yaml").write_text(yaml.safe_dump(settings))
    (project / "gsm8k").mkdir()
    config = build_config({"model_name_or_path": "model", "data_path": "data"}, "project/mine.yaml")
    assert (config.model_name_or_path, config.data_path, config.output_dir) == ("model", "data", "runs/x")
    assert config.task == "gsm8k", "the name of a task, whatever folder stands beside the file"


@pytest.mark.parametrize(
    ("key", "value", "changed"),
    [
        ("reward.functions", ["a.py:f", "verl:b/c.py", "gsm8k", "pkg.mod:f", "sample:d.py:g"],
         ["<a.py>:f", "verl:<b/c.py>", "gsm8k", "pkg.mod:f", "sample:<d.py>:g"]),
        ("evaluation.files", ["x=a=b.jsonl", "c/d=e.jsonl", "f"], ["x=<a=b.jsonl>", "<c/d=e.jsonl>", "<f>"]),
        ("model_name_or_path", "arithmetic-base", "arithmetic-base"),
        ("task", "gsm8k", "gsm8k"), ("task", "a/b", "<a/b>"), ("task", "rows.csv", "<rows.csv>"),
        ("data_path", None, None), ("seed", "a/b", "a/b"),
    ],
)  # fmt: skip
def test_what_a_path_is(key: str, value: Any, changed: Any) -> None:
    assert change_paths(key, value, lambda path: f"<{path}>") == changed
