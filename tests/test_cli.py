"""The command line: quick help, errors that help, training, evaluating and resuming as a user does it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from tiny_models import save_tiny_llama

from bandit_rft import cli
from bandit_rft.metrics import read_metrics
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
        ("report", "which run?"),
        ("report nowhere", "no run folder"),
        ("eval nowhere", "no model folder"),
    ],
)
def test_wrong_usage_is_status_2_with_a_hint(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(arguments: list[str]) -> int:
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
    assert cli.main(["eval", checkpoint, "--allow_code"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["split"] for line in lines] == ["train", "test"]
    for line in lines:
        for key in ("pass@1", "pass@2", "greedy", "mean_length"):
            name = f"eval/{line['split']}/{key}"
            assert line[name] == last[name]

    # training the same again has nothing left to do, and says where things are
    assert cli.main(["train", *given]) == 0
    assert "continuing after round 3" in capfd.readouterr().out


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
