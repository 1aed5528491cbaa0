"""docs/your-own-study.md: its files are what it says of them (tests/guides runs its commands)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from paths import ROOT

from bandit_rft import cli
from bandit_rft.study.plan import load_plan

GUIDE = (ROOT / "docs" / "your-own-study.md").read_text(encoding="utf-8")
FILES = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)


def test_the_file_is_ten_lines_and_what_the_guide_says(tmp_path: Path) -> None:
    assert len(FILES[0].splitlines()) == 10
    (tmp_path / "mine.yaml").write_text(FILES[0])
    plan = load_plan(tmp_path / "mine.yaml")
    assert len(plan.cells) == 15 and {cell.factor for cell in plan.cells} == {"baseline", "rollouts", "learning rate"}
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "rewards.py").write_text("def mine(completions, **columns):\n    return [0.0] * len(completions)\n")
    settings = {**yaml.safe_load(FILES[0]), **yaml.safe_load(FILES[1])}
    del settings["preset"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    plan = load_plan(tmp_path / "mine.yaml")
    config = plan.config(plan.cells[0], tmp_path / "runs" / "mine")
    assert (config.model_name_or_path, config.data_path) == ("../../models/mine", "../../data/mine")
    assert config.reward.functions == ["../../rewards.py:mine"]


def test_too_few_seeds_are_said_of_a_quiet_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(FILES[0].replace("[0, 1, 2, 3, 4]", "[0, 1]"))
    monkeypatch.setattr(cli, "_run_cells", lambda *arguments: 1)
    assert cli.main(["study", "run", "mine.yaml", "--quiet"]) == 1
    printed = capsys.readouterr()
    assert "two seeds: where runs differ" in printed.err and not printed.out
