"""Evaluation: further files by name, batches that change nothing, its count, and intervals."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tiny_models import sums
from tiny_rewards import starts_with_vowel

from bandit_rft.assemble import load_policy, make_engine, make_scorer
from bandit_rft.config import Config, ConfigError, build_config
from bandit_rft.data import PromptSet
from bandit_rft.evaluate import EvaluatedSplit, Evaluation, evaluate
from bandit_rft.intervals import reward_interval, wilson
from bandit_rft.listener import Listener
from bandit_rft.metrics import read_metrics
from bandit_rft.model_card import _interval
from bandit_rft.progress import EvaluationProgress, show_evaluations
from bandit_rft.report.load import load_run
from bandit_rft.report.pairs import Pair
from bandit_rft.study.measured import question_rewards
from bandit_rft.tasks import Task, load_task
from bandit_rft.trainer import Trainer


def write_rows(path: Path, *numbers: int, **names: str) -> Path:
    prompt, answer = names.get("prompt", "prompt"), names.get("answer", "answer")
    path.write_text("\n".join(json.dumps({prompt: f"{i}+1=", answer: str(i + 1)}) for i in numbers))
    return path


@pytest.fixture
def configure(model_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", *range(8))
    write_rows(data / "test.jsonl", 20, 21)

    def make(**overrides: Any) -> Config:
        values = {
            "preset": "minimal", "model_name_or_path": str(model_folder), "task": "dataset", "data_path": str(data),
            "output_dir": str(tmp_path / "run"), "max_rounds": 1, "batch_size": 4, "max_prompt_length": 12,
            "max_completion_length": 6, "device": "cpu", "reward.functions": "exact_match", **overrides,
        }  # fmt: skip
        return build_config(values)

    return make


# --- further files ----------------------------------------------------------------------------------------------------


def test_every_file_is_evaluated_under_its_name(configure: Callable[..., Config], tmp_path: Path) -> None:
    easy, hard = write_rows(tmp_path / "easy-sums.jsonl", 30, 31, 32), write_rows(tmp_path / "x.jsonl", 40)
    config = configure(**{"evaluation.files": f"{easy},hard={hard}"})
    Trainer(config).run()
    last = read_metrics(Path(config.output_dir))[-1]
    assert {key.split("/")[1] for key in last if key.endswith("/pass@1")} == {"train", "test", "easy-sums", "hard"}
    files = {path.name for path in (Path(config.output_dir) / "evaluations").iterdir()}
    assert {"round-000001-easy-sums.parquet", "round-000001-hard.parquet"} < files
    # another choice of splits is no other run
    Trainer(configure(max_rounds=2, **{"evaluation.files": f"hard={hard}", "evaluation.splits": "hard"})).run()
    evaluated = [key for key in read_metrics(Path(config.output_dir))[-1] if key.endswith("/pass@1")]
    assert evaluated == ["eval/hard/pass@1"]


def test_a_task_reads_further_files_as_its_own(tmp_path: Path) -> None:
    row = {"question": "1+1?", "answer": "two\n#### 2"}
    for name in ("train", "svamp"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    task = load_task(
        "gsm8k", data_path=str(tmp_path / "train.jsonl"), options={"test_path": str(tmp_path / "train.jsonl")},
        evaluation_files=[str(tmp_path / "svamp.jsonl")],
    )  # fmt: skip
    assert task.splits["svamp"] == task.splits["test"] == task.splits["train"]
    # a task that makes its own examples has none to read: a prompt and an answer, as in a dataset
    own = write_rows(tmp_path / "mine.jsonl", 5, prompt="problem", answer="solution")
    made = load_task("arithmetic", options={"train_size": 64}, evaluation_files=[f"mine={own}"])
    assert [(e.prompt, e.columns["answer"]) for e in made.splits["mine"]] == [("5+1=", "6")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("train=a.jsonl", "evaluation.files: the split 'train' is what is trained on"),
        ("a.jsonl,b/a.jsonl", "'a' is given twice"),
        ("=a.jsonl", "expected name=path"),
        ("../x y.jsonl", "expected name=path, the name of letters"),
        ("a=", "expected name=path"),
    ],
)
def test_names_that_cannot_be_are_refused_at_once(configure: Callable[..., Config], files: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(**{"evaluation.files": files})
    assert message in str(caught.value)


def test_files_that_cannot_be_read_are_named(configure: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"q": 1}')
    for files, message in (
        ("test=x.jsonl", "^evaluation.files: task .* has a split 'test'; give the file another name"),
        ("more=nowhere.jsonl", "^evaluation.files: there is no file 'nowhere.jsonl'"),
        (f"bad={tmp_path}/bad.jsonl", "^evaluation.files, .*bad.jsonl: dataset train row 0: no prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(configure(**{"evaluation.files": files}))


def test_training_prompts_in_an_evaluation_are_said(
    configure: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mixed = write_rows(tmp_path / "mixed.jsonl", 3, 4, 50)
    with caplog.at_level(logging.WARNING, "bandit_rft"):
        Trainer(configure(max_rounds=0, **{"evaluation.files": f"mixed={mixed}"})).run()
    assert "2 of 3 prompts of mixed are training prompts, too" in caplog.text
    assert caplog.text.count("training prompts, too") == 1


# --- batches, count, intervals ----------------------------------------------------------------------------------------


def evaluated(config: Config, batch_size: int, task: Task, **options: Any) -> tuple[Evaluation, list[int]]:
    config = build_config({**_flat(config), "rollout.batch_size": batch_size})
    policy, counts = load_policy(config.model_name_or_path, config), list[int]()
    assert policy.tokenizer is not None
    prompts = PromptSet("test", task.splits["train"], policy.tokenizer, max_prompt_length=12)
    with make_scorer(task, config) as scorer:
        result = evaluate(make_engine(policy, config), scorer, prompts, seed=3, drawn=counts.append, **options)
    return result, counts


def _flat(config: Config) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(config)


def test_batches_change_nothing(configure: Callable[..., Config]) -> None:
    """Prompts of different length, several samples, greedy answers: a batch of 5 and one of 256 give the same."""
    task = Task("sums", sums().splits, [starts_with_vowel])
    whole, once = evaluated(configure(), 256, task, num_samples=3)
    parts, often = evaluated(configure(), 5, task, num_samples=3)
    assert parts.columns == whole.columns and parts.metrics == whole.metrics and parts.intervals == whole.intervals
    assert once == [72, 24] and sum(often) == 96 and len(often) > 20
    assert whole.columns["query"][1][:6] == [0, 0, 0, 1, 1, 1]


def test_what_cannot_be_scored_is_not_the_best_where_others_are_punished(configure: Callable[..., Config]) -> None:
    """The metrics, the report, the model card and the study agree on what it earned."""

    def penalty(prompts: list[str], completions: list[str]) -> list[float | None]:
        return [[None, -0.5, -1.0][len(prompt + text) % 3] for prompt, text in zip(prompts, completions, strict=True)]

    config = configure(
        max_rounds=0, **{"evaluation.num_samples": 3, "evaluation.splits": "train", "reward.functions": []}
    )
    folder = Path(config.output_dir)
    Trainer(config, task=Task("sums", sums().splits, [penalty])).run()
    stored = pq.read_table(folder / "evaluations" / "round-000000-train.parquet").to_pydict()
    of_samples = [r for r, sample in zip(stored["reward"], stored["sample"], strict=True) if sample >= 0]
    assert {None, -0.5, -1.0} == set(of_samples)
    numbers = np.reshape([-1.0 if reward is None else reward for reward in of_samples], (-1, 3))
    metrics = read_metrics(folder)[0]
    assert metrics["eval/train/pass@1"] == pytest.approx(numbers[:, 0].mean())
    assert metrics["eval/train/pass@3"] == pytest.approx(numbers.max(1).mean())
    low, high = _interval(folder / "evaluations", 0, "train", "pass@1")[0] or (0.0, 0.0)
    assert (low + high) / 2 == pytest.approx(numbers[:, 0].mean())
    assert load_run(folder).evaluations[0, "train"].deviation == pytest.approx(numbers[:, 0].std(ddof=1))
    assert np.array_equal(question_rewards(folder / "evaluations" / "round-000000-train.parquet")[1], numbers)
    pair = Pair("test", 0, "", None, "", "", before_reward=-1.0, after_reward=None, outcome="lost")
    assert pair.gain == 0.0


def test_the_trainer_tells_how_far_an_evaluation_is(configure: Callable[..., Config]) -> None:
    told: list[Any] = []

    class Told(Listener):
        def phase(self, name: str) -> None:
            told.append(name)

        def evaluated(self, count: int, total: int) -> None:
            told.append((count, total))

    Trainer(configure(max_rounds=0, **{"rollout.batch_size": 4}), Told()).run()
    assert told == ["evaluate", *[(4, 10)] * 2, (2, 10)]


def test_each_split_is_called_what_it_is() -> None:
    """A split of rewards other than 0 and 1 does not take the name Pass@1 from the others."""

    def split(name: str, binary: bool, **values: float) -> EvaluatedSplit:
        metrics = {f"eval/{name}/{key.replace('_at_', '@')}": value for key, value in values.items()}
        return EvaluatedSplit(name, 4, 0, 1.0, Evaluation(metrics, {"pass@1": (0.1, 0.9)}, binary, {}))

    def rows(*splits: EvaluatedSplit) -> list[list[str]]:
        console = Console(file=io.StringIO(), width=200)
        show_evaluations("a model", splits, console)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        return [re.split(r"\s{2,}", line.strip()) for line in lines[3:-2]]

    passed, earned = split("test", True, pass_at_1=0.5, pass_at_4=0.75), split("hard", False, pass_at_1=0.25)
    assert rows(passed, passed) == [["Pass@1", *["0.500 [0.100, 0.900]"] * 2], ["Pass@4", "0.750", "0.750"]]
    assert rows(earned) == [["mean reward", "0.250 [0.100, 0.900]"]]
    assert rows(passed, earned) == [
        ["Pass@1", "0.500 [0.100, 0.900]", "-"], ["mean reward", "-", "0.250 [0.100, 0.900]"], ["Pass@4", "0.750", "-"]
    ]  # fmt: skip


def test_the_time_left_goes_by_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("bandit_rft.progress.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=200)
    with EvaluationProgress(console) as progress:
        now[0] = 100.0  # loading
        progress.drawn(0, total=1200)
        for now[0], count in ((105.0, 100), (112.0, 140), (180.0, 960)):
            progress.drawn(count, total=1200)
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "evaluation: 240 of 1,200, 0:48 left", "evaluation: 1,200 of 1,200"
    ]  # fmt: skip


def test_intervals_are_those_of_the_report() -> None:
    assert reward_interval([]) is None
    assert reward_interval([1.0, 0.0, 1.0, 1.0]) == wilson(0.75, 4)
    low, high = reward_interval([0.5, 1.5, 1.0]) or (0, 0)
    assert (low + high) / 2 == pytest.approx(1.0) and high - 1 == pytest.approx(1.959964 * 0.5 / 3**0.5, rel=1e-6)
