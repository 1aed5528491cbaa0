"""Names of the hub: what can only be a path is looked for, and the hub's silence is said once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from bandit_rft import cli
from bandit_rft.assemble import load_policy
from bandit_rft.config import build_config
from bandit_rft.hub import _CHATTER, asking, check_place
from bandit_rft.tasks import load_task


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./model", "there is no folder or file './model'"),
        ("/no/such/model", "there is no folder or file"),
        ("~/nowhere-at-all", "there is no folder or file"),
        ("a/b/c", "there is no folder or file 'a/b/c'"),
        ("data/gsm", "there is no 'data/gsm'; the folder 'data' holds gsm8k"),
        ("a b", "there is no folder or file 'a b'"),
        ("a\0b", "there is no folder or file"),
    ],
)
def test_a_path_to_nothing_is_refused_before_the_hub_is_asked(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        check_place("model_name_or_path", name)
    assert str(caught.value).startswith("model_name_or_path: ") and message in str(caught.value)
    for fine in ("gpt2", "Qwen/Qwen2.5-0.5B", "data/gsm8k", "data", str(tmp_path)):
        check_place("model_name_or_path", fine)


@pytest.mark.timeout(60)
def test_the_commands_ask_no_hub_for_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = "train --preset minimal --task arithmetic --model_name_or_path ./runs/x --output_dir out"
    assert cli.main(line.split()) == 1
    assert "model_name_or_path: there is no folder or file './runs/x'" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="data_path: there is no folder or file 'my/own/data'"):
        load_task("dataset", data_path="my/own/data", reward=["exact_match"])


def test_a_model_that_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one line: a study keeps the last lines of what a run printed."""

    def load(*given: object, **options: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nCheck your connection.")

    monkeypatch.setattr("bandit_rft.assemble.Policy.load", load)
    config = build_config({"model_name_or_path": "nonexistent/model", "task": "arithmetic"})
    with pytest.raises(OSError) as caught:
        load_policy(config.model_name_or_path, config)
    assert str(caught.value).startswith("model_name_or_path='nonexistent/model' could not be loaded: it is no folder")
    assert "We couldn't connect" in str(caught.value) and "\n" not in str(caught.value)


def test_retries_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    chatter = logging.getLogger(_CHATTER)
    with caplog.at_level(logging.INFO, "bandit_rft"), asking("a/b"):
        for number in range(5):
            chatter.warning("'no name' thrown while requesting HEAD https://hub/a/b/config.json")
            chatter.warning("Retrying in 1s [Retry %d/5].", number)
    assert [record.getMessage() for record in caplog.records] == [
        "the Hugging Face hub does not answer for a/b; trying again for up to a minute"
    ]
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "bandit_rft"), asking("a/b"):
        chatter.warning("Retrying in 1s")
    chatter.warning("afterwards")
    assert [record.getMessage() for record in caplog.records] == ["Retrying in 1s", "afterwards"]
