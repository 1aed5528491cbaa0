"""Contrasts, interactions, new models, failed runs, and what conditions share: against values that are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("scipy")
pytest.importorskip("pyarrow")
from scipy import stats
from simulated_study import make_study

from bandit_rft.study.analyse import analyse_study, compare_levels
from bandit_rft.study.pairing import share_seeds
from bandit_rft.study.plan import StudyError, read_contrasts
from bandit_rft.study.points import simultaneous
from bandit_rft.study.statistics import Block, Spread, contrast, equivalence, nothing_differed
from bandit_rft.study.wider import competence, welch

N8, BIG = ("rollouts", "n=8"), ("batch", "B=64")
TWO: dict[Any, Any] = {
    N8: (0.06, 0.03, {"num_generations": 8}),
    BIG: (0.06, 0.03, {"num_generations": 8, "batch_size": 64}),
}


def two_levels(folder: Path, **changes: Any) -> Path:
    return make_study(folder, TWO, seeds=4, questions=60, also={}, **changes)


def with_contrasts(folder: Path, contrasts: dict[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "contrasts": contrasts}))
    return folder


def test_a_contrast_of_two_levels_is_their_paired_comparison(tmp_path: Path) -> None:
    weights = {"rollouts/n=8": 1, "batch/B=64": -1}
    half = {"rollouts/n=8": 0.5, "batch/B=64": 0.5, "baseline": -1}
    folder = with_contrasts(two_levels(tmp_path), {"pair": {"n8 - B64": weights}, "mean": {"both": half}})
    analysis = analyse_study(folder)
    (row,) = (
        r for r in analysis.contrasts if r["family"] == "pair" and r["metric"] == "final" and r["split"] == "test"
        and r["task"] == "all"
    )  # fmt: skip
    (direct,) = (
        r for r in compare_levels(analysis.study, N8, BIG)
        if (r["metric"], r["split"], r["model"], r["task"]) == ("final", "test", "all", "all")
    )  # fmt: skip
    for key in ("gain", "low", "high", "p", "error", "degrees"):
        assert row[key] == pytest.approx(direct[key], rel=1e-9), key
    both = next(r for r in analysis.contrasts if r["family"] == "mean" and r["split"] == "test" and r["task"] == "all")
    mean = np.mean([analysis.row(level)["gain"] for level in (N8, BIG)])  # type: ignore[index]
    assert both["gain"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([1], "mapping of families"), ({"f": {"n": {"a/b": 1}}}, "two levels or more"),
        ({"f": {"n": {"a/b": 1, "a/x": -1}}}, "no level 'a/x'"), ({"f": {"n": {"a/b": 1, "baseline": 1}}}, "sum to 0"),
        ({"f": {"n": {"a/b": "1", "baseline": -1}}}, "must be a number"),
    ],
)  # fmt: skip
def test_a_wrong_contrast_is_refused_by_name(given: Any, words: str) -> None:
    with pytest.raises(StudyError, match=words):
        read_contrasts({"contrasts": given}, [("a", "b")])


def test_conditions_with_seeds_of_their_own_give_more_degrees_of_freedom(tmp_path: Path) -> None:
    study = analyse_study(two_levels(tmp_path)).study
    assert share_seeds(study)
    for cell in study.cells:
        cell.config["seed"] = cell.seed + 10**6 * study.conditions.index(cell.condition)
    assert not share_seeds(study)
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((1, 4, 1)) for _ in range(6)]
    apart = contrast([Block(1 / 6, v, seeds=i, questions=None) for i, v in enumerate(values)])
    together = contrast([Block(1 / 6, v, seeds=0, questions=None) for v in values])
    expected = np.sum([v.var(ddof=1) / 4 / 36 for v in values])
    assert apart.seeds[0] == pytest.approx(expected) and apart.gain[0] == pytest.approx(together.gain[0])
    assert apart.degrees[0] > 8 and together.degrees[0] == 3


def test_blocks_with_seeds_and_questions_in_common_are_one_layout() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((2, 1, 5, 40))
    together = contrast([Block(0.5, v, "s", "q") for v in values])
    merged = contrast([(1.0, values.mean(0))])
    for name in ("gain", "seeds", "questions", "residual", "degrees"):
        np.testing.assert_allclose(getattr(together, name), getattr(merged, name), rtol=1e-12, err_msg=name)
    apart = contrast([Block(0.5, v, i, "q") for i, v in enumerate(values)])  # other seeds, the same questions
    np.testing.assert_allclose(apart.questions, merged.questions, rtol=1e-12)


def test_the_floor_under_the_seeds_part() -> None:
    rng = np.random.default_rng(2)
    values = rng.standard_normal((1, 5, 40))
    values -= values.mean(-1, keepdims=True)  # by accident all seeds have the same mean
    found = contrast([(1.0, values)])
    assert found.seeds[0] < 1e-20 < found.residual[0] <= found.variance[0]
    own = contrast([Block(1.0, values, 0, None)])
    within = values.var(-1, ddof=1).mean() / 200
    assert own.variance[0] == pytest.approx(within) == pytest.approx(own.residual[0])


def test_equivalence_and_the_bound_of_no_difference() -> None:
    gain, error, degrees = np.array([0.005]), np.array([0.006]), np.array([20.0])
    low, high = 0.005 + np.array([-1, 1]) * stats.t.ppf(0.95, 20) * 0.006
    assert low > -0.02 and high < 0.02 and equivalence(gain, Spread(error, degrees))[0] < 0.05
    assert equivalence(gain, Spread(2 * error, degrees))[0] > 0.05
    assert nothing_differed(360) == pytest.approx((0.0083, 0.98**360), abs=1e-4)
    assert nothing_differed(5, span=2.0) == pytest.approx((2 * nothing_differed(5)[0], 0.99**5))


def test_nothing_that_differs_is_no_interval_of_width_zero(tmp_path: Path) -> None:
    """A level whose every reward is the baseline's, which is the same algorithm by another name."""
    folder = make_study(tmp_path, {N8: (0.0, 0.0, {"advantage": "psr"})}, seeds=3, questions=20, also={})
    with_contrasts(folder, {"f": {"same": {"rollouts/n=8": 2, "baseline": -2}}})
    cells = folder / "cells"
    for path in cells.glob("rollouts-n_8-*"):
        twin = cells / path.name.replace("rollouts-n_8", "baseline-baseline")
        for file in path.glob("evaluations/*.parquet"):
            file.write_bytes((twin / "evaluations" / file.name).read_bytes())
    analysis = analyse_study(folder)
    row, gap = analysis.row(N8), analysis.row(N8, split="gap")
    assert row is not None and row["gain"] == 0 and row["p"] == 1
    assert row["high"] == -row["low"] == pytest.approx(1 - 0.05 ** (1 / 3)), "three seeds, whatever they were asked"
    assert row["p_equivalent"] == pytest.approx(0.98**3) and gap is not None and gap["high"] == 2 * row["high"]
    low, high = simultaneous({**row, "family": 4})
    assert high == -low == pytest.approx(1 - 0.0125 ** (1 / 3))
    named = [r for r in analysis.contrasts if r["task"] == "all"]
    assert named and all(r["high"] == -r["low"] == gap["high"] for r in named)
    assert all(r["p_equivalent"] == pytest.approx(0.99**3) for r in named)
    plan = json.loads((folder / "plan.json").read_text())
    conditions = list(dict.fromkeys((entry["model"], entry["task"]) for entry in plan))
    for entry in plan:  # each condition has seeds of its own
        own_seed = entry["seed"] + 100 * conditions.index((entry["model"], entry["task"]))
        entry["config"] = {**entry["config"], "seed": own_seed}
    (folder / "plan.json").write_text(json.dumps(plan))
    own = analyse_study(folder).row(N8)
    assert own is not None and own["high"] == pytest.approx(1 - 0.05 ** (1 / 12)), "four conditions of three seeds"


def test_interactions_are_welchs_test() -> None:
    rng = np.random.default_rng(3)
    groups = [rng.normal(mean, spread, 6) for mean, spread in ((0, 1), (0.3, 2), (1.5, 0.5))]
    own = {
        ("m", str(i)): {"gain": g.mean(), "error": g.std(ddof=1) / np.sqrt(6), "degrees": 5.0}
        for i, g in enumerate(groups)
    }
    if not hasattr(stats, "anova_oneway") and "equal_var" not in (stats.f_oneway.__kwdefaults__ or {}):
        weight = np.array([1 / r["error"] ** 2 for r in own.values()])
        assert 0 < welch(own) < 1 and weight.all()  # this SciPy has no Welch to compare with
        return
    assert welch(own) == pytest.approx(stats.f_oneway(*groups, equal_var=False).pvalue)


def test_the_slope_over_competence_is_that_of_a_regression_with_a_mean_for_each_task() -> None:
    rng = np.random.default_rng(4)
    conditions = [(f"m{i}", task) for i in range(5) for task in ("a", "b")]
    start = {c: 0.1 + 0.02 * i + 0.3 * (c[1] == "b") for i, c in enumerate(conditions)}
    own = {c: {"gain": 0.5 * start[c] - 0.2 * (c[1] == "b") + 0.01 * rng.standard_normal()} for c in conditions}
    found = competence(own, start)
    design = np.array([[start[c], c[1] == "a", c[1] == "b"] for c in conditions], dtype=float)
    gains = np.array([row["gain"] for row in own.values()])
    beta, rest, *_ = np.linalg.lstsq(design, gains, rcond=None)
    error = np.sqrt(rest[0] / 7 * np.linalg.inv(design.T @ design)[0, 0])
    assert found["competence_slope"] == pytest.approx(beta[0])
    assert found["competence_high"] == pytest.approx(beta[0] + stats.t.ppf(0.975, 7) * error)
    assert np.isnan(competence(dict(list(own.items())[:4]), start)["competence_slope"])


def test_a_failed_run_widens_what_is_said(tmp_path: Path) -> None:
    failed = "rollouts-n_8-models_llama_tiny-arithmetic-s1"
    whole = analyse_study(two_levels(tmp_path / "whole")).row(N8)
    row = analyse_study(two_levels(tmp_path / "failed", problems={failed: "failed"})).row(N8)
    assert whole is not None and row is not None
    assert (whole["worst_low"], whole["worst_high"]) == (whole["low"], whole["high"])
    assert row["worst_low"] < row["low"] and row["worst_high"] > row["high"]
    assert row["models_low"] != row["models_low"], "two models say nothing of others"


def test_failed_runs_count_by_condition_and_as_badly_as_a_difference_can_be(tmp_path: Path) -> None:
    """A level whose runs all fail on one of two tasks: half of what was planned could have been -1 or 1."""
    options: dict[str, Any] = {"models": ["m"], "seeds": 4, "questions": 40, "also": {}}
    failed = {f"rollouts-n_8-m-arithmetic-s{s}": "failed" for s in range(4)} | {"batch-B_64-m-countdown-s0": "failed"}
    analysis = analyse_study(make_study(tmp_path / "a", TWO, problems=failed, **options))
    row, one = analysis.row(N8), analysis.row(BIG)
    assert row is not None and one is not None
    assert row["worst_low"] == pytest.approx(0.5 * row["low"] - 0.5)
    assert row["worst_high"] == pytest.approx(0.5 * row["high"] + 0.5)
    assert one["worst_low"] == pytest.approx(7 / 8 * one["low"] - 1 / 8), "one of four runs, in one of two conditions"
    gap = analysis.row(N8, split="gap")
    assert gap is not None and "worst_low" not in gap, "a difference of two gains has other ends"
    failed = {"baseline-baseline-m-countdown-s1": "failed"}
    pair = analyse_study(make_study(tmp_path / "b", TWO, problems=failed, **options)).row(N8)
    assert pair is not None and pair["worst_high"] == pytest.approx(7 / 8 * pair["high"] + 1 / 8)
