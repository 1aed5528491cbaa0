"""Learning rates chosen by runs that serve nothing else; seeds of their own for every model and task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pq = pytest.importorskip("pyarrow.parquet")
import pyarrow as pa  # noqa: E402

from bandit_rft import cli  # noqa: E402
from bandit_rft.study.plan import BASELINE, Plan, StudyError, Tune, load_plan  # noqa: E402
from bandit_rft.study.tuning import best, choose, undecided  # noqa: E402

ARITHMETIC = {"task": "arithmetic", "task_options": {"train_size": 64, "validation_size": 20}}
STUDY: dict[str, Any] = {
    "baseline": {"preset": "minimal", "learning_rate": 1e-4, "evaluation": {"splits": ["train", "test"]}},
    "models": {"a": {"model_name_or_path": "arithmetic-base"}, "b": {"model_name_or_path": "arithmetic-base"}},
    "tasks": {"sums": ARITHMETIC, "countdown": {"task": "countdown", "task_options": {"train_size": 64}}},
    "factors": {
        "rollouts": {"n=1": {}, "n=4": {"num_generations": 4, "advantage": "group_norm"}},
        "trade-off": {"(32,4)": {"num_generations": 4, "advantage": "group_norm"}},
    },
    "seeds": [0, 1],
    "tune": {"grid": ["1e-4", 2e-4], "seeds": [10]},
    "budget": {"rule": "rounds", "amount": 3},
}
N4 = ("rollouts", "n=4")


def plan_of(folder: Path, **changes: Any) -> Plan:
    (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return load_plan(folder / "study.yaml")


def test_models_and_tasks_have_seeds_of_their_own_and_levels_share_them(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    seeds = {(cell.model, cell.task, cell.seed): cell.config["seed"] for cell in plan.cells}
    assert len(set(seeds.values())) == len(seeds) == 8, "no two conditions share a seed"
    assert seeds["a", "sums", 1] == 1 and seeds["b", "countdown", 1] == 1_001_000_001
    for cell in plan.cells:
        assert cell.config["seed"] == seeds[cell.model, cell.task, cell.seed], "levels of a condition are paired"
    more = plan_of(tmp_path, models={**STUDY["models"], "c": {"model_name_or_path": "arithmetic-base"}})
    assert {c.id: c.config["seed"] for c in plan.cells}.items() <= {c.id: c.config["seed"] for c in more.cells}.items()
    shared = plan_of(tmp_path, shared_seeds=True)
    assert all(cell.config["seed"] == cell.seed for cell in shared.cells)


def test_a_tuned_study_is_two_plans(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.tune == Tune("learning_rate", (1e-4, 2e-4), (10,), "validation") and plan.tuning is not None
    assert len(plan.tuning.cells) == 2 * 2 * 2 * 2 and len({cell.id for cell in plan.tuning.cells}) == 16
    tried = plan.tuning.config(plan.tuning.cells[0], tmp_path)
    assert tried.evaluation.splits == ["validation"] and tried.eval_steps == 0 and tried.seed == 10
    assert {cell.config["learning_rate"] for cell in plan.tuning.cells} == {1e-4, 2e-4}
    assert {cell.seed for cell in plan.tuning.cells} == {10}
    tuned = plan.tuned({BASELINE: 2e-4, ("rollouts", "n=1"): 2e-4, N4: 1e-4, ("trade-off", "(32,4)"): 1e-4})
    assert [c.id for c in tuned.cells] == [c.id for c in plan.cells] and tuned.tuning is None
    rates = {(c.factor, c.level): c.config["learning_rate"] for c in tuned.cells}
    assert rates == {BASELINE: 2e-4, N4: 1e-4}
    assert tuned.cells[1].also == [("trade-off", "(32,4)")], "what is one configuration was tuned as one"


def run(folder: Path, cell: Any, score: float, status: str = "finished") -> None:
    home = folder / "tuning" / "cells" / cell.id
    (home / "evaluations").mkdir(parents=True)
    (home / "cell.json").write_text(json.dumps({"status": status}))
    for round_, right in ((0, 0), (3, round(score * 10))):
        table = {"query": [i // 2 for i in range(10)], "sample": [i % 2 for i in range(10)],
                 "reward": [float(i < right) for i in range(10)]}  # fmt: skip
        pq.write_table(pa.table(table), home / "evaluations" / f"round-{round_:06d}-validation.parquet")


def test_the_value_with_the_best_mean_on_validation_is_chosen(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.tuning is not None
    for cell in plan.tuning.cells:
        n4, high, first = cell.level == "n=4", cell.config["learning_rate"] == 2e-4, cell.model == "a"
        run(tmp_path, cell, 0.5 + (0.2 if first else -0.1) * high * (not n4), "failed" if n4 and high else "finished")
    assert undecided(plan.tuning, tmp_path / "tuning") == 0
    chosen = choose(plan, tmp_path)
    assert chosen == {BASELINE: 2e-4, ("rollouts", "n=1"): 2e-4, N4: 1e-4, ("trade-off", "(32,4)"): 1e-4}
    record = json.loads((tmp_path / "tuning.json").read_text())
    assert record["chosen"][0] == ["baseline", "baseline", 2e-4]
    scores = [row["score"] for row in record["runs"] if ["rollouts", "n=4"] in row["levels"]]
    assert sorted(scores) == [0.0] * 4 + [0.5] * 4, "a run that failed earned nothing"


def test_nothing_is_chosen_before_all_have_ended(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.tuning is not None
    for cell in plan.tuning.cells[1:]:
        run(tmp_path, cell, 0.5)
    with pytest.raises(StudyError, match="1 of 16 runs that choose learning_rate have not ended"):
        choose(plan, tmp_path)


def one_level(folder: Path) -> Plan:
    (folder / "study").mkdir()
    return plan_of(folder / "study", models={"a": STUDY["models"]["a"]}, tasks={"sums": ARITHMETIC}, factors={})


def run_study(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> tuple[int, list[str]]:
    """`study run` whose cells are not run; its status, and the cells of which plans it would have run."""
    plans: list[str] = []

    def note(plan: Plan, folder: Path, *_: Any) -> int:
        plans.append("tuning" if folder.name == "tuning" else f"{plan.cells[0].config['learning_rate']:g}")
        return 1

    monkeypatch.setattr(cli, "_run_cells", note)
    return cli.main(["study", "run", str(folder / "study" / "study.yaml"), "--output_dir", str(folder), *flags]), plans


def test_a_failed_run_decides_nothing_before_that_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = one_level(tmp_path)
    assert plan.tuning is not None
    low, high = plan.tuning.cells
    run(tmp_path, low, 0.5)
    run(tmp_path, high, 0.6, "failed")
    assert run_study(monkeypatch, tmp_path) == (1, ["tuning"])
    assert f"1 of 2 runs that choose learning_rate failed and would count as 0: {high.id}" in capsys.readouterr().err
    assert not (tmp_path / "tuning.json").exists()
    assert run_study(monkeypatch, tmp_path, "--accept_failed") == (1, ["tuning", "0.0001"])


def test_a_choice_that_was_made_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = one_level(tmp_path)
    assert plan.tuning is not None
    low, high = plan.tuning.cells
    run(tmp_path, low, 0.5)
    run(tmp_path, high, 0.6, "failed")
    assert choose(plan, tmp_path) == {BASELINE: 1e-4}
    (tmp_path / "tuning" / "cells" / high.id / "cell.json").write_text('{"status": "finished"}')
    assert choose(plan, tmp_path) == {BASELINE: 1e-4}, "cells may have begun with it"
    assert run_study(monkeypatch, tmp_path, "--retry", "1") == (1, ["0.0001"])
    record = json.loads((tmp_path / "tuning.json").read_text())
    for name, value in (("grid", [1e-4, 3e-4]), ("seeds", [11]), ("chosen", []), ("runs", record["runs"][1:])):
        (tmp_path / "tuning.json").write_text(json.dumps({**record, name: value}))
        assert choose(plan, tmp_path) == {BASELINE: 2e-4}, f"the choice of other runs: {name}"
    for text in ("", "[]", '{"chosen": 1}', json.dumps({**record, "chosen": [["a", "b", []]]})):
        (tmp_path / "tuning.json").write_text(text)
        assert choose(plan, tmp_path) == {BASELINE: 2e-4}


def test_shares_say_how_their_tuning_comes_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = one_level(tmp_path)
    assert plan.tuning is not None
    run(tmp_path, plan.tuning.cells[0], 0.5)
    assert run_study(monkeypatch, tmp_path, "--shard", "1/2") == (1, ["tuning"])
    assert "1 of 2 runs that choose learning_rate are not in" in capsys.readouterr().err
    run(tmp_path, plan.tuning.cells[1], 0.6)  # copied from the other share
    assert run_study(monkeypatch, tmp_path, "--shard", "1/2") == (1, ["tuning", "0.0002"])
    (tmp_path / "tuning").rename(tmp_path / "elsewhere")
    assert run_study(monkeypatch, tmp_path, "--shard", "2/2") == (1, ["0.0002"]), "the choice is all it needs"


def test_of_equal_values_the_smaller_one_is_chosen() -> None:
    rows = [{"levels": [["f", "x"]], "value": v, "score": s} for v, s in ((0.2, 0.3), (0.1, 0.3), (0.4, 0.1))]
    assert best(Tune("learning_rate", (0.1, 0.2, 0.4), (1,), "validation"), rows) == {("f", "x"): 0.1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tune": [1e-4]}, ["tune must be a mapping of grid and seeds"]),
        ({"tune": {"grid": [1e-4, 2e-4]}}, ["tune must be a mapping"]),
        ({"tune": {"grid": [1e-4], "seeds": [10]}}, ["tune.grid", "at least two"]),
        ({"tune": {"grid": [1e-4, "1e-4"], "seeds": [10]}}, ["tune.grid", "different"]),
        ({"tune": {"grid": [1e-4, 2e-4], "seeds": [1]}}, ["tune.seeds must be none of seeds", "{1}"]),
        ({"tune": {"grid": [1e-4, 2e-4], "seeds": [10], "split": "test"}}, ["tune.split", "not test"]),
        ({"tune": {"grid": [1e-4, 2e-4], "seeds": [10], "key": "learning_rat"}}, ["learning_rat"]),
        ({"factors": {"f": {"x": {"learning_rate": 1e-3}}}}, ["factors.f.x sets learning_rate", "tune.grid decides"]),
        ({"shared_seeds": "no"}, ["shared_seeds must be true or false"]),
        ({"seeds": [10**6]}, ["seeds must be below 1,000,000"]),
        ({"tune": {"grid": [1e-4, 2e-4], "seeds": [10**9 + 1]}}, ["tune.seeds must be below 1,000,000", "1000000001"]),
    ],
)  # fmt: skip
def test_a_wrong_tune_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(StudyError) as error:
        plan_of(tmp_path, **changes)
    assert all(word in str(error.value) for word in words), error.value
