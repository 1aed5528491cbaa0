"""studies/recompute.py, which knows nothing of the package, finds the report's numbers in the committed data."""

from __future__ import annotations

import csv
import json
import math
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

pytest.importorskip("scipy")
pq = pytest.importorskip("pyarrow.parquet")
from simulated_study import make_study  # noqa: E402

from bandit_rft.study.analyse import analyse_study  # noqa: E402
from bandit_rft.study.report import write_study_report  # noqa: E402

COMMITTED = sorted(path.parent for path in (ROOT / "studies" / "results").glob("*/cells.npz"))


@pytest.fixture(scope="module")
def recompute() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "studies" / "recompute.py"))


def with_own_seeds(folder: Path) -> Path:
    """The study as if each condition had seeds, and each run questions, of its own."""
    plan = json.loads((folder / "plan.json").read_text())
    conditions = list(dict.fromkeys((entry["model"], entry["task"]) for entry in plan))
    for entry in plan:
        own = entry["seed"] + 10**6 * conditions.index((entry["model"], entry["task"]))
        entry["config"] = {**entry["config"], "seed": own}
        for path in folder.glob(f"cells/{entry['id']}/evaluations/*.parquet"):
            table = pq.read_table(path).drop_columns("prompt")
            pq.write_table(table.append_column("prompt", [[f"{own}?"] * len(table)]), path)
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


@pytest.mark.parametrize(("seeds", "own"), [(1, False), (4, False), (4, True)])
def test_simulated_studies(tmp_path: Path, recompute: dict[str, Any], seeds: int, own: bool) -> None:
    failed = "rollouts-n_16-models_llama_tiny-arithmetic-s1"
    folder = make_study(tmp_path, seeds=seeds, questions=40, problems={failed: "failed"})
    folder = with_own_seeds(folder) if own else folder
    report = write_study_report(folder).parent
    compared, differing = recompute["main"](report)
    assert compared > 100 and differing == []
    keys = ("factor", "level", "metric", "split", "model", "task")
    rows = {tuple(row[key] for key in keys): row for row in analyse_study(folder).results}
    for key, found in recompute["recompute"](report).items():
        for name, value in found.items():
            assert value == pytest.approx(rows[key][name], abs=1e-6, rel=1e-8, nan_ok=True), (key, name)


def test_a_row_that_is_missing_and_a_number_that_is_empty_are_differences(
    tmp_path: Path, recompute: dict[str, Any]
) -> None:
    path = write_study_report(make_study(tmp_path, seeds=3, questions=20)).with_name("results.csv")
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    keys = {"metric": "final", "split": "test", "model": "all", "task": "all", "level": "n=8"}
    row = next(row for row in rows if keys.items() <= dict(zip(head, row, strict=True)).items())

    def differing(kept: list[list[str]]) -> list[str]:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([head, *kept])
        found: list[str] = recompute["main"](path.parent)[1]
        return found

    assert differing(rows) == []
    kept = [other for other in rows if other is not row]
    assert differing(kept) == ["rollouts/n=8/final/test/all/all is not in results.csv"]
    row[head.index("p")] = ""
    (difference,) = differing(rows)
    assert difference.startswith("rollouts/n=8/final/test/all/all p: ") and difference.endswith("nan in results.csv")


@pytest.mark.parametrize("folder", COMMITTED, ids=[folder.name for folder in COMMITTED])
def test_committed_results(folder: Path, recompute: dict[str, Any], tmp_path: Path) -> None:
    compared, differing = recompute["main"](folder)
    assert compared > 100 and differing == []
    for name in ("cells.npz", "clocks.csv"):
        shutil.copy(folder / name, tmp_path / name)
    report = write_study_report(tmp_path)
    for name in ("results.csv", "curves.csv", "costs.csv"):
        assert report.with_name(name).read_bytes() == (folder / name).read_bytes(), f"{name} is not what the data give"


@pytest.mark.parametrize("study", ["paper-rounds", "paper-tokens"])
def test_the_pictures_in_the_readme_are_what_the_tables_give(study: str) -> None:
    draw = runpy.run_path(str(ROOT / "studies" / "forest.py"))
    drawn = draw["svg"](draw["rows"](ROOT / "studies" / "results" / study))
    picture = ROOT / "docs" / "images" / f"{study}-gains.svg"
    assert picture.read_text(encoding="utf-8") == drawn
    assert f"docs/images/{picture.name}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_in_the_readme_is_what_the_results_say() -> None:
    """Every configuration of the pictures has a row; bold is what differs after Holm's correction."""
    names = {
        ("advantage alone", "1 of 4"): "the group's advantage alone (1 of 4 trained on)",
        ("rollouts", "n=2"): "2 rollouts a query", ("rollouts", "n=8"): "8 rollouts a query",
        **{("trade-off", of): f"64 rollouts in all: {of}" for of in ("(1,64)", "(8,8)", "(16,4)", "(64,1)")},
        **{("replay", of): f"reward replay at {of}" for of in ("(32,2)", "(64,1)")},
    }  # fmt: skip
    read = runpy.run_path(str(ROOT / "studies" / "forest.py"))["rows"]
    rounds, tokens = (read(ROOT / "studies" / "results" / study) for study in ("paper-rounds", "paper-tokens"))
    assert rounds.keys() == tokens.keys() == names.keys()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for level, name in names.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
        test, train, _, test_tokens, train_tokens = (cell.strip() for cell in line.split("|")[2:-1])
        for cell, split, found in (
            (test, "test", rounds), (train, "train", rounds), (test_tokens, "test", tokens),
            (train_tokens, "train", tokens),
        ):  # fmt: skip
            values = found[level][split]
            said = [float(number) for number in re.findall(r"[+-]\d\.\d+", cell)]
            keys = ("gain", "low", "high") if split == "test" else ("gain",)
            assert said == pytest.approx([values[key] for key in keys], abs=0.000501), (level, split)
            assert cell.startswith("**") == (values["p_holm"] <= 0.05), (level, split)


def test_what_not_generating_saves_is_what_the_results_say() -> None:
    folder = ROOT / "studies" / "results"
    found = runpy.run_path(str(ROOT / "studies" / "reached.py"))["reached"](folder / "skipping-tokens")
    text = (folder / "README.md").read_text(encoding="utf-8")
    for level, name in (
        ("learnable", "`queries.order=learnable`"),
        ("ended", "`rollout.stop_hopeless=1`"),
        ("both", "both"),
    ):
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        said = [float(part.replace(",", "")) for part in re.findall(r"\d\d,\d\d\d", row)]
        assert said == pytest.approx([found["one rollout", level][split] for split in ("test", "train")], abs=55), level
    assert all(math.isnan(found["groups of 4", "epochs"][split]) for split in ("test", "train"))
    assert found["one rollout", "ended"]["cost"] == pytest.approx(0.71, abs=0.005)
