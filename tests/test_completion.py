"""What a shell completes, asked of the shell itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bandit_rft import cli

pytest.importorskip("shtab")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    code = "from bandit_rft.cli import main; import sys; status = main(['completion', 'bash'])\n"
    code += "assert 'torch' not in sys.modules; raise SystemExit(status)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    path = tmp_path_factory.mktemp("completion") / "bandit-rft.bash"
    path.write_text(result.stdout)
    return path


def completed(script: Path, *words: str) -> list[str]:
    code = f"source {script}; COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}; "
    code += '_shtab_bandit_rft; printf "%s\\n" "${COMPREPLY[@]}"'
    result = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=script.parent, check=True)
    return result.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("line", "some"),
    [
        (["bandit-rft", ""], ["train", "eval", "study", "completion"]),
        (["bandit-rft", "train", "--objective.cl"], ["--objective.clip_low", "--objective.clip_high"]),
        (["bandit-rft", "train", "--objective.kind", "g"], ["gspo"]),
        (["bandit-rft", "train", "--preset", ""], ["paper", "minimal", "demo"]),
        (["bandit-rft", "eval", "--task", "g"], ["gsm8k"]),
        (["bandit-rft", "train", "--rollout.mask_truncated", ""], ["true", "false"]),
        (["bandit-rft", "train", "--dry_run", ""], ["probe"]),
        (["bandit-rft", "study", "run", "--j"], ["--jobs"]),
        (["bandit-rft", "eval", "band"], ["bandit-rft.bash"]),
        (["bandit-rft", "train", "--config", "band"], ["bandit-rft.bash"]),
    ],
)
def test_bash_completes(script: Path, line: list[str], some: list[str]) -> None:
    assert set(some) <= set(completed(script, *line))


def test_only_what_fits_is_offered(script: Path) -> None:
    assert completed(script, "bandit-rft", "train", "--objective.kind", "g") == ["gspo"]
    assert not completed(script, "bandit-rft", "study", "plan", "--jo")


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "bandit-rft" in text and "objective.clip_low" in text


def test_without_the_library_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    assert "pip install 'bandit_rft[completion]'" in capsys.readouterr().err
