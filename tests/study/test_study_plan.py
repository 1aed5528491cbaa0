"""From a study file to cells: which there are, which are one, what is refused, what they cost."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import ROOT

from bandit_rft.cli import main
from bandit_rft.study.plan import Plan, StudyError, load_plan, seed_warning
from bandit_rft.study.price import Cost, estimate_cost

STUDIES = ROOT / "studies"
MINIMAL: dict[str, Any] = {
    "baseline": {"preset": "minimal", "evaluation": {"splits": ["train", "test"]}},
    "models": {"base": {"model_name_or_path": "arithmetic-base"}},
    "tasks": {"sums": {"task": "arithmetic", "task_options": {"train_size": 64, "kinds": ["sum"]}}},
    "seeds": [0, 1],
    "budget": {"rule": "rounds", "amount": 3},
}


def plan_of(folder: Path, **changes: Any) -> Plan:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
    return load_plan(path)


def places(plan: Plan) -> set[tuple[str, str]]:
    return {place for cell in plan.cells for place in [(cell.factor, cell.level), *cell.also]}


def test_equal_configurations_are_one_cell(tmp_path: Path) -> None:
    factors = {
        "rollouts": {"n=1": {}, "n=8": {"num_generations": 8, "advantage": "group_norm"}},
        "trade-off": {"(32,8)": {"advantage": "group_norm", "batch_size": 32, "num_generations": 8}},
    }
    plan = plan_of(tmp_path, factors=factors)
    assert [(cell.factor, cell.level, cell.also) for cell in plan.cells if cell.seed == 0] == [
        ("baseline", "baseline", [("rollouts", "n=1")]),
        ("rollouts", "n=8", [("trade-off", "(32,8)")]),
    ]
    assert [cell.seed for cell in plan.cells] == [0, 0, 1, 1], "whole seeds, one after the other"
    assert sum(cell.baseline for cell in plan.cells) == 2


def test_a_level_changes_one_option_of_a_task_and_keeps_the_others(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, factors={"size": {"128": {"task_options": {"train_size": 128}}}})
    config = plan.config(plan.cells[1], tmp_path)
    assert config.task_options == {"train_size": 128, "kinds": ["sum"]}


@pytest.mark.parametrize(
    ("rule", "key"), [("rounds", "max_rounds"), ("tokens", "max_generated_tokens"), ("seconds", "max_seconds")]
)
def test_budgets(tmp_path: Path, rule: str, key: str) -> None:
    plan = plan_of(tmp_path, budget={"rule": rule, "amount": 7}, stopping={} if rule == "rounds" else {"max_rounds": 9})
    config = plan.config(plan.cells[0], tmp_path)
    assert getattr(config, key) == 7
    assert config.max_rounds == (7 if rule == "rounds" else 9)


def test_paths_start_at_the_study_file(tmp_path: Path) -> None:
    (tmp_path / "studies" / "model").mkdir(parents=True)
    plan = plan_of(
        tmp_path / "studies", models={"m": {"model_name_or_path": "model"}, "hub": {"model_name_or_path": "a/b"}}
    )
    configs = {cell.model: plan.config(cell, tmp_path / "out") for cell in plan.cells if cell.seed == 0}
    mine, hub = configs["m"], configs["hub"]
    assert mine.model_name_or_path == "../studies/model"
    assert hub.model_name_or_path == "a/b", "not a folder beside the study file: a name on the hub"
    assert mine.output_dir == "cells/m-sums-baseline-baseline-s0"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factor": {}}, ["unknown key 'factor'", "did you mean factors?"]),
        ({"budget": {"rule": "round", "amount": 3}}, ["budget", "rounds | tokens | seconds"]),
        ({"budget": None}, ["budget"]),
        ({"budget": {"rule": "rounds", "amount": -4}}, ["budget.amount must be a whole number >= 0 with", "got -4"]),
        ({"budget": {"rule": "rounds", "amount": "x"}}, ["budget.amount must be a whole number >= 0", "got 'x'"]),
        ({"budget": {"rule": "tokens", "amount": 2.5}}, ["budget.amount must be a whole number >= 1", "got 2.5"]),
        ({"budget": {"rule": "tokens", "amount": 0}}, ["budget.amount must be a whole number >= 1", "got 0"]),
        ({"budget": {"rule": "seconds", "amount": 0}}, ["budget.amount must be a number > 0", "rule=seconds", "got 0"]),
        ({"budget": {"rule": "seconds", "amount": True}}, ["budget.amount must be a number > 0", "got True"]),
        ({"preset": "dmo", "baseline": {}, "models": None}, ["preset must be one of", "(did you mean demo?)"]),
        ({"baseline": {"preset": "dmo"}}, ["baseline.preset must be one of", "got 'dmo' (did you mean demo?)"]),
        ({"baseline": {"preset": ["demo"]}}, ["baseline.preset must be one of", "got ['demo']"]),
        ({"stopping": {"patience": 3}}, ["stopping", "failed_cells"]),
        ({"seeds": [0, 0]}, ["seeds"]),
        ({"seeds": [0, "1"]}, ["seeds must be a list of different whole numbers >= 0; got [0, '1']"]),
        ({"seeds": [0.0, 1]}, ["seeds must be"]),
        ({"seeds": [True]}, ["seeds must be"]),
        ({"seeds": [-1]}, ["seeds must be"]),
        ({"models": {}}, ["models"]),
        ({"models": {"m": "gpt2"}}, ["models.m", "mapping"]),
        ({"factors": {"f": ["n=1"]}}, ["factors.f", "levels"]),
        ({"factors": {"f": {"x": {"num_generation": 8}}}}, ["factors.f.x", "model base, task sums", "num_generations"]),
        ({"factors": {"f": {"x": {"advantage": "rloo"}}}}, ["factors.f.x", "num_generations must be >= 2"]),
        ({"factors": {"f": {"A": {"batch_size": 2}, "a": {"batch_size": 3}}}}, ["different names"]),
    ],
)  # fmt: skip
def test_a_wrong_study_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(StudyError) as error:
        plan_of(tmp_path, **changes)
    assert all(word in str(error.value) for word in words), error.value


def test_a_folder_keeps_its_study(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    plan.write(tmp_path / "out")
    plan.write(tmp_path / "out")
    changed = plan_of(tmp_path, baseline={**MINIMAL["baseline"], "learning_rate": 1e-3})
    changed.write(tmp_path / "out")  # nothing was begun
    begun = tmp_path / "out" / "cells" / plan.cells[0].id
    begun.mkdir(parents=True)
    (begun / "cell.json").write_text("{}")
    plan_of(tmp_path, baseline={**MINIMAL["baseline"], "learning_rate": 1e-3}, seeds=[0, 1, 2]).write(tmp_path / "out")
    with pytest.raises(StudyError, match="another configuration"):
        plan.write(tmp_path / "out")


def priced(folder: Path, rule: str, amount: float, parameters: float = 1e9) -> Cost:
    """A cell of 4 x 2 rollouts of 100 tokens after 50 a round, evaluated every 5 rounds on 20 + 10 questions."""
    plan = plan_of(
        folder,
        baseline={"preset": "minimal", "batch_size": 4, "num_generations": 2, "advantage": "rloo", "eval_steps": 5},
        models={"m": {"model_name_or_path": "a/b", "parameters": parameters}},
        budget={"rule": rule, "amount": amount},
        cost={
            "prompt_tokens": 50, "completion_tokens": 100, "train_questions": 20, "test_questions": 10,
            "flops": 1e12, "bytes_per_second": 1e12, "bytes_per_parameter": 2, "decode_batch": 8,
        },
    )  # fmt: skip
    return estimate_cost(plan, plan.cells[0])


def test_cost_of_a_cell_by_hand(tmp_path: Path) -> None:
    cost = priced(tmp_path, "rounds", 10)
    assert cost.generated == 10 * 8 * 100
    assert cost.trained == 10 * 8 * 150
    assert cost.evaluated == 3 * 30 * 100  # at rounds 0, 5 and 10
    # Drawing 8 sequences: 2 P x 8 x 150 FLOP = 2.4 s, more than 100 reads of 2 GB = 0.2 s.
    seconds = 10 * 2.4 + 2e9 * 90 * 150 / 1e12 + 6e9 * cost.trained / 1e12
    assert cost.gpu_hours == pytest.approx(seconds / 3600)


@pytest.mark.parametrize(
    ("rule", "amount", "rounds"),
    [("tokens", 8000, 10), ("tokens", 8001, 11), ("seconds", 90, 10), ("seconds", 95, 10), ("seconds", 97, 11)],
)
def test_what_a_budget_buys(tmp_path: Path, rule: str, amount: float, rounds: int) -> None:
    """A round draws 800 tokens and takes 2.4 + 7.2 s; a run ends after the round that uses its budget up."""
    assert priced(tmp_path, rule, amount) == priced(tmp_path, "rounds", rounds)


def test_seconds_of_a_model_of_unknown_size_buy_nobody_knows_how_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cost = priced(tmp_path, "seconds", 60, parameters=0)
    assert math.isnan(cost.generated) and math.isnan(cost.trained) and math.isnan(cost.evaluated)
    assert main(["study", "plan", str(tmp_path / "study.yaml")]) == 0
    assert re.search(r"all +2 +- +- +- +-", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ({"flop": 1e12}, "cost.flop is unknown (did you mean flops?)"),
        ({"flops": "fast"}, "cost.flops must be a number > 0; got 'fast'"),
        ({"flops": 0}, "cost.flops must be a number > 0; got 0"),
        ({"test_questions": -1}, "cost.test_questions must be a number >= 0; got -1"),
    ],
)
def test_a_wrong_cost_is_named(tmp_path: Path, cost: dict[str, Any], message: str) -> None:
    plan = plan_of(tmp_path, cost=cost)
    with pytest.raises(StudyError, match=re.escape(message)):
        estimate_cost(plan, plan.cells[0])


def test_a_cost_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    """`flops: 1e12` in a study file is a text to YAML 1.1."""
    of_text, of_number = (plan_of(tmp_path, cost={"flops": flops, "test_questions": 0}) for flops in ("1e12", 1e12))
    assert estimate_cost(of_text, of_text.cells[0]) == estimate_cost(of_number, of_number.cells[0])


def test_the_papers_grid() -> None:
    plan = load_plan(STUDIES / "paper.yaml")
    levels = places(plan)
    assert {level for factor, level in levels if factor == "trade-off"} == {
        "(1,256)", "(2,128)", "(4,64)", "(8,32)", "(16,16)", "(32,8)", "(64,4)", "(128,2)", "(256,1)",
    }  # fmt: skip
    assert {level for factor, level in levels if factor == "replay"} == {
        "(64,4)", "(128,2)", "(256,1)", "(512,1)", "(1024,1)", "(2048,1)",
    }  # fmt: skip
    assert {level for factor, level in levels if factor == "rollouts"} == {"n=1", "n=8", "n=16", "n=32", "n=64"}
    assert {level for factor, level in levels if factor == "batch"} == {"B=32", "B=64", "B=128"}
    for cell in plan.cells:
        config = plan.config(cell, STUDIES)
        named = cell.level.strip("()").split(",")
        if len(named) == 2:
            assert [config.batch_size, config.num_generations] == [int(part) for part in named]
    assert len(plan.cells) == 22 * 3 * 2 * 5


@pytest.mark.parametrize("name", ["tiny", "neighbours", "choices", "skipping-tokens"])
def test_the_studies_in_the_repository_are_sound(name: str) -> None:
    plan = load_plan(STUDIES / f"{name}.yaml")
    for cell in plan.cells:
        assert plan.config(cell, STUDIES / "out").seed % 10**6 == cell.seed  # a condition's own, or as listed
    models = [STUDIES / of["model_name_or_path"] for of in plan.settings["models"].values()]
    assert all((model / "model.safetensors").is_file() or model.name == "arithmetic-base" for model in models)


def test_the_command_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_of(tmp_path, factors={"rollouts": {"n=1": {}, "n=2": {"num_generations": 2, "advantage": "rloo"}}})
    assert main(["study", "plan", str(tmp_path / "study.yaml"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "n=2" in out and "the cells of" in out and "GPU-hours" in out
    assert not (tmp_path / "out").exists()
    assert main(["study", "plan", str(tmp_path / "none.yaml")]) == 2
    assert main(["study", "plan"]) == 2
    assert main(["study", "paint", "x.yaml"]) == 2
    assert main(["study", "run", str(tmp_path / "study.yaml"), "--jobs", "many"]) == 2
    assert main(["study", "plan", str(tmp_path / "study.yaml"), "--learning_rate", "1"]) == 2
    assert main(["study", "report", str(tmp_path)]) == 2
    assert "--jobs must be a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["[]", "{}", "[1]", '[{"id": 3}]', '{"cells": []}', "null", "[", "[[", '[{"id": "../x"}]']
)
@pytest.mark.parametrize("action", ["status", "report"])
def test_a_plan_that_lists_no_cells_is_one_error(
    action: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(text)
    (tmp_path / "study.yaml").write_text("name: a")
    assert main(["study", action, str(tmp_path)]) != 0
    said = capsys.readouterr()
    assert "plan.json" in said.err and len(said.err.splitlines()) == 1 and said.out == ""


@pytest.mark.parametrize("text", ["name: " + "[" * 5000, "name: a\nname: b", "name: 2024-13-45", "seeds: &a [*a]"])
def test_a_hostile_study_file_is_one_error(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.yaml").write_text(text)
    assert main(["study", "plan", str(tmp_path / "study.yaml")]) == 2
    assert "study file" in capsys.readouterr().err


# --- a short file, and few seeds --------------------------------------------------------------------------------------


def test_a_short_file_is_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: demo\nfactors: {n: {n=2: {num_generations: 2, advantage: group_norm}}}\nseeds: [0, 1, 2]\n"
                    "budget: {rule: rounds, amount: 3}\n")  # fmt: skip
    plan = load_plan(path)
    assert [(cell.model, cell.task) for cell in plan.cells[:1]] == [("arithmetic-base", "arithmetic")]
    assert len(plan.cells) == 6 and plan.config(plan.cells[0], tmp_path).learning_rate == 5e-5
    plan.write(tmp_path / "out")  # as written, it can be read again
    again = load_plan(tmp_path / "out" / "study.yaml")
    assert [cell.config for cell in again.cells] == [cell.config for cell in plan.cells]
    # a model of one's own, a folder beside the file
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    path.write_text("baseline: {preset: minimal, model_name_or_path: models/tiny, task: arithmetic}\n"
                    "budget: {rule: rounds, amount: 3}\nseeds: [0, 1, 2]\n")  # fmt: skip
    plan = load_plan(path)
    assert plan.cells[0].model == "tiny" and plan.cells[0].id == "tiny-arithmetic-baseline-baseline-s0"
    assert plan.config(plan.cells[0], tmp_path / "out").model_name_or_path == "../models/tiny"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: minimal", "models is missing, and neither baseline nor its preset says which model_name_or_path"),
        ("preset: minimal\nmodels: {m: {model_name_or_path: x}}", "tasks is missing"),
        ("preset: demo\nbaseline: {preset: paper}", "preset='demo' and baseline.preset='paper': give one"),
        ("preset: dmo\nmodels: {m: {}}\ntasks: {t: {}}", "did you mean demo?"),
        ("seeds: [0]", "baseline must be a mapping with at least one entry, or a preset be given"),
        ("preset: demo\nmodels: {}", "models must be a mapping"),
    ],
)
def test_what_a_short_file_leaves_open_is_said(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(f"{text}\nbudget: {{rule: rounds, amount: 3}}\n")
    with pytest.raises(StudyError) as caught:
        load_plan(tmp_path / "s.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(("seeds", "words"), [([0], "one seed: no"), ([0, 1], "two seeds: where"), ([0, 1, 2], None)])
def test_few_seeds_are_warned_of_before_anything_runs(
    seeds: list[int], words: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plan = plan_of(tmp_path, seeds=seeds)
    warning = seed_warning(plan)
    assert warning is None if words is None else warning is not None and words in warning
    started: list[str] = []
    monkeypatch.setattr("bandit_rft.study.run.Runner.run", lambda self: started.append(capsys.readouterr().err))
    monkeypatch.setattr("bandit_rft.study.status.show_status", lambda folder, console: None)
    main(["study", "run", str(tmp_path / "study.yaml"), "--output_dir", str(tmp_path / "out")])
    assert ("note: " in started[0]) == (words is not None)
    main(["study", "plan", str(tmp_path / "study.yaml")])
    assert ("note: " in capsys.readouterr().out) == (words is not None)


# --- time left --------------------------------------------------------------------------------------------------------


def test_the_time_left_is_what_like_cells_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factors = {"n": {"n=2": {"num_generations": 2, "advantage": "group_norm"}}}
    plan = plan_of(tmp_path, factors=factors, seeds=[0, 1, 2])
    out = tmp_path / "out"
    plan.write(out)
    names = [cell.id for cell in plan.cells]
    assert [name[-11:] for name in names[:2]] == ["baseline-s0", "n-n_2-s0"] or len(names) == 6

    def record(name: str, **values: Any) -> None:
        (out / "cells" / name).mkdir(parents=True, exist_ok=True)
        (out / "cells" / name / "cell.json").write_text(json.dumps(values))

    def says() -> str:
        main(["study", "status", str(out)])
        return capsys.readouterr().out

    assert says().splitlines() == ["6 cells: 6 waiting"]
    # the first cell is a third done, after 10 seconds: 30 a cell
    record(names[0], status="running")
    (out / "cells" / names[0] / "metrics.jsonl").write_text(
        '{"round": 0, "seconds/round": 4.0}\n{"round": 1, "seconds/round": 6.0, "reward": 0.25}\n'
    )
    lines = says().splitlines()
    assert lines[0] == "6 cells: 1 running, 5 waiting; about 2:50 left at 1 at a time"
    assert lines[1] == f"  running  {names[0]}  round 1/3  reward 0.250"
    # the baseline takes 60 seconds, n=2 takes 100: left are two of each
    record(names[0], status="finished", seconds=60.0)
    record(names[1], status="finished", seconds=100.0)
    assert says().splitlines() == [
        "6 cells: 2 finished, 4 waiting; about 5:20 left for one at a time, nothing is running"
    ]
    for name in names[2:4]:
        record(name, status="running")
    assert "about 2:40 left at 2 at a time" in says()
    for name in names[2:]:
        record(name, status="finished", seconds=1.0)
    assert says().splitlines() == ["6 cells: 6 finished"]
