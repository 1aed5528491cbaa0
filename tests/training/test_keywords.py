"""A run from keywords: a model in memory, rows, functions of the session; what comes of it in a notebook."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch
from browser import HOSTILE, Page
from tiny_models import character_tokenizer, sums, tiny_llama

from bandit_rft import Config, Example, Listener, Policy, RolloutBatch, RunResult, Task, Trainer
from bandit_rft.config import ConfigError, build_config

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), "kind": "even"} for i in range(12)]
SMALL = {
    "preset": "minimal", "batch_size": 4, "max_rounds": 2, "max_prompt_length": 12, "max_completion_length": 6,
    "learning_rate": 1e-3, "eval_steps": 0, "device": "cpu", "progress": False,
}  # fmt: skip


def vowels(completion: str, answer: str) -> float:
    return float(bool(answer) and completion[:1] in "aeiou")


def batch_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.fixture
def in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return {**SMALL, "model": tiny_llama(), "tokenizer": character_tokenizer()}


def local(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a notebook's cell would have defined it."""
    here = copy.copy(function)
    here = type(function)(function.__code__, function.__globals__, function.__name__)
    here.__module__, here.__annotations__ = "__main__", function.__annotations__
    return here


@pytest.mark.parametrize("kind", ["list", "Dataset", "DataFrame"])
def test_rows_functions_and_a_model_in_memory(in_memory: dict[str, Any], kind: str, capsys: Any) -> None:
    rows: Any = {"list": list, "Dataset": datasets.Dataset.from_list, "DataFrame": pandas.DataFrame}[kind](ROWS)
    before = [p.clone() for p in in_memory["model"].parameters()]
    options = {**in_memory, "progress": True}
    trainer = Trainer(train_dataset=rows, eval_dataset=ROWS[:3], reward_funcs=[local(vowels)], **options)
    assert {split: len(part) for split, part in trainer.task.splits.items()} == {"train": 12, "test": 3}
    assert trainer.task.splits["train"][1] == Example("1+1=", {"answer": "2", "kind": "even"})
    result = trainer.run()
    assert [line["round"] for line in result] == [0, 1, 2] and result.finished
    assert result.model is in_memory["model"]  # trained in place
    assert not all(torch.equal(p, q) for p, q in zip(before, result.model.parameters(), strict=True))
    assert result.folder == Path("runs/dataset") and result.checkpoint == result.folder / "checkpoints/checkpoint-2"
    printed = capsys.readouterr().out
    assert "round 2/2" in printed and "test Pass@1" in printed and printed.count("forks of this process") == 1
    loaded = build_config(file=result.folder / "config.yaml")
    assert loaded.task == "dataset" and loaded.model_name_or_path == "LlamaForCausalLM"


def test_what_comes_of_it(in_memory: dict[str, Any]) -> None:
    result = Trainer(train_dataset=ROWS, reward_funcs=local(batch_reward), **in_memory).run()
    assert (
        isinstance(result, RunResult)
        and len(result) == 3
        and result[-1]["round"] == 2
        and next(iter(result))["round"] == 0
    )
    table = result.metrics
    assert isinstance(table, pandas.DataFrame) and table.index.tolist() == [0, 1, 2]
    assert table.loc[2, "reward"] == result[2]["reward"]
    assert result.report is not None and "<!doctype html>" in result.report.html.lower()
    frame = result.report._repr_html_()
    assert frame.startswith("<iframe") and Page(frame).elements[0][1]["sandbox"] == "allow-scripts"
    assert re.fullmatch(r"RunResult\(2 rounds; reward .*; train mean reward .* -> .*; runs/dataset\)", repr(result))
    assert Page(result._repr_html_()).text.count("mean reward") == 1
    picture = result.plot()._repr_svg_()
    assert picture.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and "moving average" not in picture
    assert "train mean reward" in Page(picture).text
    result.plot().save("curve.svg")
    assert Path("curve.svg").read_text() == picture


def test_nothing_is_shown_without_progress(in_memory: dict[str, Any], capsys: Any) -> None:
    told: list[int] = []

    class Rounds(Listener):
        def round_done(self, metrics: dict[str, Any]) -> None:
            told.append(metrics["round"])

    Trainer(None, Rounds(), train_dataset=ROWS, reward_funcs=local(vowels), **in_memory).run()
    captured = capsys.readouterr()
    assert told == [0, 1, 2] and captured.out == "" and "%" not in captured.err


def test_presets_names_and_a_task_by_name(tmp_path: Path) -> None:
    trainer = Trainer(preset="demo", max_rounds=1, output_dir=str(tmp_path / "demo"))
    assert trainer.config.model_name_or_path == "arithmetic-base" and trainer.task.name == "arithmetic"
    trainer = Trainer(model="arithmetic-base", task="arithmetic", reward_funcs=[local(vowels)], reward_weights=[2.0])
    assert [reward.name for reward in trainer.task.rewards] == ["vowels"] and trainer.config.reward.weights == [2.0]
    assert trainer.task.rewards[0].kind == "sample" and trainer.config.output_dir == "runs/arithmetic"


def test_a_task_and_a_policy(in_memory: dict[str, Any]) -> None:
    policy = Policy(in_memory.pop("model"), in_memory.pop("tokenizer"))
    result = Trainer(model=policy, task=sums(), **in_memory).run()
    assert result.policy is policy and result.folder == Path("runs/sums")


def test_a_kl_is_taken_to_the_model_as_it_was_given(in_memory: dict[str, Any]) -> None:
    keys = {
        **in_memory,
        "preset": "paper",
        "objective.kl_coef": 0.1,
        "train_dataset": ROWS,
        "reward_funcs": local(batch_reward),
    }
    initial = copy.deepcopy(keys["model"])
    trainer = Trainer(**keys)
    result = trainer.run()
    assert result[1]["kl"] == pytest.approx(0, abs=1e-9) and result[2]["kl"] > 0
    reference = trainer.updater.reference
    assert reference is not None
    assert all(torch.equal(p, q) for p, q in zip(reference.model.parameters(), initial.parameters(), strict=True))
    trainer.run()  # it goes on where it was, with the model as it was given first
    assert trainer.updater.reference is reference
    with pytest.raises(ConfigError, match="has other weights: has it been trained since"):
        Trainer(**{**keys, "max_rounds": 3}).run()
    assert len(Trainer(**{**keys, "max_rounds": 3, "model": initial}).run()) == 4


def bad(**change: Any) -> Callable[[], Any]:
    def call() -> Any:
        given: dict[str, Any] = {
            **SMALL, "model": tiny_llama(), "tokenizer": character_tokenizer(), "train_dataset": ROWS,
            "reward_funcs": local(vowels), **change,
        }  # fmt: skip
        return Trainer(**{name: value for name, value in given.items() if value is not ...})

    return call


ERRORS = [
    (bad(model=None, tokenizer=None), "model must be given: a folder, a hub name"),
    (bad(model=3), "model must be a Policy or a transformers model; got int"),
    (bad(tokenizer=None), "tokenizer must be given with a model in memory"),
    (bad(model="arithmetic-base"), "tokenizer goes with a model in memory"),
    (bad(train_dataset=None), "task or train_dataset must be given"),
    (bad(task="arithmetic"), "task and train_dataset are two ways"),
    (bad(task=3, train_dataset=None), "task must be a Task or a name"),
    (
        bad(train_dataset="rows.jsonl"),
        r"train_dataset must be a datasets.Dataset, .* list of dicts; .*task='rows.jsonl'",
    ),
    (bad(train_dataset={"train": ROWS}), "got a dict: give one of its splits"),
    (bad(train_dataset=[]), "dataset train: there are no rows"),
    (bad(train_dataset=["1+1="]), "dataset train row 0: expected a dict with a prompt, got '1.1='"),
    (
        bad(train_dataset=[{"text": "hi"}]),
        "dataset train row 0: no prompt; expected one of the columns prompt, question",
    ),
    (bad(train_dataset=[{"prompt": "a", "answer": object()}]), "train row 0, column answer: object cannot be handed"),
    (bad(eval_dataset={"train": ROWS}), "eval_dataset: 'train' is the split that is trained on"),
    (bad(eval_dataset=[{"answer": "4"}]), "dataset test row 0: no prompt"),
    (bad(reward_funcs=None), "reward_funcs must be given with train_dataset"),
    (bad(reward_funcs=[3]), "reward_funcs: expected a function, a RewardFunction or a text, got 3"),
    (bad(reward_funcs=["nowhere.py:f"]), "reward_funcs: .*names a file that does not exist"),
    (bad(reward_funcs=["exact_macth"]), "reward_funcs: unknown reward 'exact_macth'; did you mean 'exact_match'"),
    (
        bad(reward_funcs=lambda completion, solution: 1.0),
        r"reward_funcs: reward '<lambda>' takes \['solution'\], but the data",
    ),
    (bad(reward_weights=[1.0, 2.0]), "reward_weights: expected 1, one a reward, got 2"),
    (bad(batch_size=32), "batch_size=32 is more than the 12 training prompts"),
    (bad(evaluation={"splits": ["tset"]}), "evaluation.splits: 'tset' is none of the splits of task dataset: train"),
    (bad(learning_rat=1.0), r"unknown key 'learning_rat' \(did you mean learning_rate\?\)"),
    (bad(learning_rate="fast"), "learning_rate must be a finite number; got 'fast'"),
    (bad(preset="demmo"), r"preset must be one of .*did you mean demo"),
    (bad(dtype="bfloat16"), "dtype='bfloat16', but the model that was given is float32"),
    (bad(config=build_config({}, check=False)), "train_dataset, reward_funcs, .*: a config is given"),
    (bad(config={"learning_rate": 1}), "train_dataset"),
    (lambda: Trainer({"learning_rate": 1}), r"config must be a Config; got dict \(keys go by keyword"),  # type: ignore[arg-type]
    (lambda: Trainer(build_config({}, check=False), model="a/b"), "model='a/b' beside a config: the config names it"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message[:30] for _, message in ERRORS])
def test_messages_name_the_argument(
    call: Callable[[], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError), match=message):
        call()
    assert not list(tmp_path.iterdir())  # nothing was begun


# --- how things show themselves ---------------------------------------------------------------------------------------


def test_representations_are_short() -> None:
    task = Task("many", {"train": [Example("long " * 1000, {"answer": "x"})] * 500}, ["exact_match"])
    batch = RolloutBatch.of([[1, 2]] * 3, torch.arange(6), [1, 2, 3], torch.zeros(6), torch.zeros(6), [False] * 3)
    policy = Policy(tiny_llama(), character_tokenizer())
    assert repr(task) == "Task('many': 500 train; rewards exact_match)"
    assert repr(policy).startswith("Policy(LlamaForCausalLM, ") and "K parameters, float32, cpu)" in repr(policy)
    config = Config(task="x", batch_size=7)
    assert repr(config) == "Config(task='x', batch_size=7)"
    assert "replay.ratio" in repr(build_config({"replay.capacity": 5, "replay.ratio": 0.5}, check=False))
    for thing in (task, batch, config):
        page = Page(thing._repr_html_())
        assert len(page.text) < 2000 and ("table", {}) in page.elements
    assert "reward" in Page(batch._repr_html_()).text


@pytest.mark.parametrize("text", [text for text in HOSTILE if text])
def test_tables_show_what_they_quote_as_text(text: str, tmp_path: Path) -> None:
    task = Task(text, {text: [Example(text, {text: text})]}, ["exact_match"])
    result = RunResult(
        tmp_path / text.replace("/", " ").replace("\x00", ""), [{"round": 0, f"eval/{text}/pass@1": 0.5}] * 2, None
    )  # type: ignore[arg-type]
    for html in (task._repr_html_(), Config(task=text)._repr_html_(), result._repr_html_()):
        page = Page(html)
        assert {tag for tag, _ in page.elements} <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
        assert not any(attributes for _, attributes in page.elements) and "\x1b" not in html and "\u202e" not in html
