"""Cells run once each, whoever dies; what is left afterwards is what an undisturbed study leaves."""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import study_runner
import yaml
from paths import SUPPORT
from tiny_models import save_tiny_llama

from bandit_rft.study.claims import Claim, Claims
from bandit_rft.study.plan import load_plan
from bandit_rft.study.report import write_study_report
from bandit_rft.study.run import Runner, read_record
from bandit_rft.study.status import last_line, read_status

pytestmark = pytest.mark.slow  # runners that are killed, and wait for one another

KILLS = 20


def write_study(folder: Path, seeds: int, factors: dict[str, Any] | None = None, **changes: Any) -> Path:
    if not (folder / "model").exists():
        save_tiny_llama(folder / "model")
    study = {
        "baseline": {
            "preset": "minimal", "device": "cpu", "batch_size": 4, "max_prompt_length": 12, "max_completion_length": 6,
            "learning_rate": 1e-3, "eval_steps": 10, "save_steps": 4, "log_rollouts_steps": 0,
            "evaluation": {"max_queries": 6, "splits": ["train", "test"], "greedy": False},
        },
        "models": {"tiny": {"model_name_or_path": "model"}},
        "tasks": {"sums": {"task": "arithmetic", "task_options": {"train_size": 24, "longer_size": 0}}},
        "seeds": list(range(seeds)),
        "budget": {"rule": "rounds", "amount": 20},
        "factors": factors or {},
        **changes,
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / "study.yaml"


def start_runner(
    study: Path, out: Path, *, jobs: int = 2, retry: int = 0, work: str = "note"
) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        str(SUPPORT / "study_runner.py"),
        str(study),
        str(out),
        str(jobs),
        str(retry),
    ]
    return subprocess.Popen([*command, work], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def records(out: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in out.glob("cells/*/cell.json")}


def runs(out: Path) -> collections.Counter[str]:
    return collections.Counter(line.split()[0] for line in (out / "runs.txt").read_text().splitlines())


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def cell_processes(runner: int) -> list[psutil.Process]:
    """The children of the runner's fork server that are at work."""
    try:
        servers = psutil.Process(runner).children()
        return [child for server in servers for child in server.children()]
    except psutil.NoSuchProcess:
        return []


# --- claims -----------------------------------------------------------------------------------------------------------


def test_a_claim_is_exclusive_until_it_is_released(tmp_path: Path) -> None:
    ours, theirs = Claims(tmp_path), Claims(tmp_path)
    claim = ours.take("cell")
    assert claim is not None
    assert theirs.take("cell") is None
    assert claim.beat()
    claim.release()
    second = theirs.take("cell")
    assert second is not None
    assert ours.take("cell") is None
    assert not claim.beat(), "the first owner learns that it has lost the cell"
    assert second.beat()


def test_a_silent_owner_is_superseded_and_finds_out(tmp_path: Path) -> None:
    """Its machine may have stopped and come back: the clock is the file system's."""
    ours, theirs = Claims(tmp_path, timeout=60), Claims(tmp_path, timeout=60)
    claim = ours.take("cell")
    assert claim is not None
    past = time.time() - 59
    os.utime(claim.path, (past, past))
    assert theirs.take("cell") is None
    past -= 3
    os.utime(claim.path, (past, past))
    assert theirs.take("cell") is not None
    assert not claim.beat()


def test_a_dead_process_of_this_machine_is_superseded_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from bandit_rft.study.claims import Claims; Claims(pathlib.Path(sys.argv[1])).take('c')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert Claims(tmp_path).take("c") is not None


def test_a_reused_process_number_is_not_taken_for_the_owner(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    claim = claims.take("c")
    assert claim is not None
    owner = json.loads(claim.path.read_text())
    claim.path.write_text(json.dumps({**owner, "started": "1"}))
    assert Claims(tmp_path).take("c") is not None


def test_a_claim_of_another_process_namespace_is_not_taken_for_dead(tmp_path: Path) -> None:
    """One host name and one boot, as in two containers: their process numbers mean nothing to each other."""
    code = (
        "import sys, pathlib, time; from bandit_rft.study.claims import Claims; "
        "assert Claims(pathlib.Path(sys.argv[1])).take('c'); print('taken', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert other.stdout is not None
        if other.stdout.readline() != "taken\n":
            pytest.skip("no PID namespace can be made here")
        assert Claims(tmp_path).take("c") is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', '{"host": null, "pid": "x", "started": 0}'])
def test_a_claim_that_is_none_is_superseded_once_it_is_silent(text: str, tmp_path: Path) -> None:
    claims = Claims(tmp_path, timeout=60)
    claim = claims.take("c")
    assert claim is not None
    claim.path.write_text(text)
    assert Claims(tmp_path).take("c") is None
    os.utime(claim.path, (1, time.time() - 61))
    assert Claims(tmp_path).take("c") is not None


def test_a_claim_dated_tomorrow_is_superseded_once_it_does_not_change(tmp_path: Path) -> None:
    ours, theirs = Claims(tmp_path, timeout=0.3), Claims(tmp_path, timeout=0.3)
    claim = ours.take("c")
    assert claim is not None
    tomorrow = time.time() + 86400
    os.utime(claim.path, (tomorrow, tomorrow))
    assert theirs.take("c") is None
    time.sleep(0.2)
    os.utime(claim.path, (tomorrow + 1, tomorrow + 1))  # its owner lives
    assert theirs.take("c") is None
    time.sleep(0.35)
    assert theirs.take("c") is not None
    assert not claim.beat()


def test_a_removed_claim_is_lost(tmp_path: Path) -> None:
    claim = Claims(tmp_path).take("c")
    assert claim is not None
    claim.path.unlink()
    assert not claim.beat()


# --- runners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lasting", [False, True])
def test_a_file_system_that_does_not_answer(
    lasting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ESTALE or EIO that passes costs nothing; one that stays stops the cell before another runner takes it over."""
    failures, beat = [0], Claim.beat

    def failing(claim: Claim) -> bool:
        failures[0] += 1
        if lasting or failures[0] <= 2:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return beat(claim)

    monkeypatch.setattr(Claim, "beat", failing)
    plan = load_plan(write_study(tmp_path, seeds=1))
    runner = Runner(plan, tmp_path / "out", listener=study_runner.Silent(), work=study_runner.slowly, timeout=2.0)
    if lasting:
        threading.Timer(8.0, runner.stop).start()
    assert runner.run() is not lasting
    assert failures[0] > 2
    assert "the claim" in caplog.text and "Stale file handle" in caplog.text
    assert ("the cell is stopped" in caplog.text) == lasting
    assert len(runs(tmp_path / "out")) == 1


def test_a_process_that_leaves_with_0_has_not_finished(tmp_path: Path) -> None:
    study, out = write_study(tmp_path, seeds=1), tmp_path / "out"
    assert start_runner(study, out, work="leave").wait(timeout=60) == 1
    (record,) = records(out).values()
    assert record["status"] == "failed"
    assert "left with exit status 0 in the middle of its work" in record["error"]


@pytest.mark.parametrize(
    "text",
    ["", "[1]", '{"status": 3}', '{"status": "finished", "attempts": "x"}', '{"status": "failed", "seconds": []}'],
)
def test_a_record_that_is_none_counts_as_not_run(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study, out = write_study(tmp_path, seeds=1), tmp_path / "out"
    (cell,) = load_plan(study).cells
    (out / "cells" / cell.id).mkdir(parents=True)
    (out / "cells" / cell.id / "cell.json").write_text(text)
    assert read_record(out, cell.id) == {}
    assert "the cell counts as not run" in caplog.text
    assert start_runner(study, out).wait(timeout=60) == 0
    assert records(out)[cell.id]["status"] == "finished"


def test_two_runners_share_100_cells_and_run_none_twice(tmp_path: Path) -> None:
    study, out = write_study(tmp_path, seeds=100), tmp_path / "out"
    both = [start_runner(study, out), start_runner(study, out)]
    assert [runner.wait(timeout=100) for runner in both] == [0, 0]
    counts = runs(out)
    assert len(counts) == 100
    assert set(counts.values()) == {1}
    assert all(record["status"] == "finished" for record in records(out).values())
    assert start_runner(study, out).wait(timeout=60) == 0
    assert runs(out) == counts, "finished cells are not repeated"


def test_a_crashed_cell_is_reported_and_retried_by_choice(tmp_path: Path) -> None:
    study, out = write_study(tmp_path, seeds=3), tmp_path / "out"
    assert start_runner(study, out, work="fail").wait(timeout=60) == 1
    status = read_status(out)
    assert status.counts == {"failed": 3}, "the others went on"
    assert all("the reward <b>model</b> is gone" in error for _, error in status.failures)
    assert start_runner(study, out, retry=2, work="fail").wait(timeout=60) == 1
    assert read_status(out).counts == {"finished": 2, "failed": 1}
    assert sorted(runs(out).values()) == [2, 2, 3]
    assert start_runner(study, out, retry=2, work="note").wait(timeout=60) == 1
    assert sorted(runs(out).values()) == [2, 2, 3], "tried as often as was asked, not more"


def test_stopping_after_so_many_failures(tmp_path: Path) -> None:
    study, out = write_study(tmp_path, seeds=6, stopping={"failed_cells": 2}), tmp_path / "out"
    assert start_runner(study, out, jobs=1, work="fail").wait(timeout=60) == 1
    assert read_status(out).counts == {"failed": 2, "waiting": 4}


def test_ctrl_c_saves_and_the_next_run_resumes_exactly(tmp_path: Path) -> None:
    study, out = write_study(tmp_path, seeds=1, budget={"rule": "rounds", "amount": 200}), tmp_path / "out"
    command = [sys.executable, "-m", "bandit_rft", "study", "run", str(study), "--output_dir", str(out)]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    (cell,) = yaml.safe_load(study.read_text())["seeds"]
    metrics = out / "cells" / f"tiny-sums-baseline-baseline-s{cell}" / "metrics.jsonl"
    wait_until(lambda: last_line(metrics).get("round", 0) >= 3)
    runner.send_signal(signal.SIGINT)
    text, _ = runner.communicate(timeout=60)
    assert runner.returncode == 130
    assert "run the same command again" in text
    assert read_status(out).counts == {"stopped": 1}
    stopped_at = last_line(metrics)["round"]
    assert 3 <= stopped_at < 200
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line)["round"] for line in metrics.read_text().splitlines()]
    assert rounds == list(range(201))
    assert (out / "report" / "report.html").is_file()
    shown = subprocess.run([*command[:4], "status", str(out)], capture_output=True, text=True, timeout=60).stdout
    assert "1 cells: 1 finished" in shown


# --- dying ------------------------------------------------------------------------------------------------------------

FACTORS = {
    "rollouts": {"n=2": {"num_generations": 2, "advantage": "rloo"}},
    "replay": {"window": {"advantage": "history_norm"}, "trajectories": {"replay.capacity": 16}},
}


def without_timings(report: Path) -> dict[str, str]:
    pattern = re.compile(r"<!-- timings -->.*?<!-- /timings -->", re.DOTALL)
    return {
        path.name: pattern.sub("", path.read_text()) for path in report.iterdir()
        if path.suffix in (".html", ".md", ".csv") and path.name not in ("timings.csv", "clocks.csv")
    }  # fmt: skip


def gone(processes: list[psutil.Process]) -> bool:
    try:
        return not any(process.is_running() and process.status() != "zombie" for process in processes)
    except psutil.NoSuchProcess:
        return False  # one went while it was looked at: look again


def at_work(runner: subprocess.Popen[bytes]) -> bool:
    return bool(cell_processes(runner.pid)) or runner.poll() is not None


@pytest.mark.timeout(900)
def test_killed_twenty_times_the_report_is_the_same(tmp_path: Path) -> None:
    """SIGKILL at random moments, every fifth to the runner (its cells die with it), the others to a cell.

    A study that ends before twenty kills is run again in another folder, so that a fast machine sees as many.
    """
    study = write_study(tmp_path, seeds=2, factors=FACTORS, budget={"rule": "rounds", "amount": 60})
    assert start_runner(study, tmp_path / "undisturbed", work="train").wait(timeout=200) == 0
    rng, kills, folders = random.Random(0), 0, [tmp_path / "undisturbed"]
    while kills < KILLS:
        folders.append(tmp_path / f"killed-{len(folders)}")
        runner = start_runner(study, folders[-1], retry=99, work="train")
        while kills < KILLS and runner.poll() is None:
            wait_until(functools.partial(at_work, runner))
            time.sleep(rng.uniform(0, 0.5))
            victims = cell_processes(runner.pid)
            if not victims:
                continue
            kills += 1
            if kills % 5:
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended by itself
                    rng.choice(victims).kill()
                continue
            runner.kill()
            runner.wait()
            wait_until(functools.partial(gone, victims))
            runner = start_runner(study, folders[-1], retry=99, work="train")
        assert runner.wait(timeout=200) == 0
    for folder in folders:
        write_study_report(folder)
    undisturbed, *killed = (without_timings(folder / "report") for folder in folders)
    assert len({(folder / "report" / "cells.npz").read_bytes() for folder in folders}) == 1
    for report in killed:
        assert report.keys() == undisturbed.keys() and len(report) >= 6
        for name in report:
            assert report[name] == undisturbed[name], name


# --- pairing ----------------------------------------------------------------------------------------------------------


def test_cells_of_a_seed_are_paired(tmp_path: Path) -> None:
    """The same queries in the same order, and rollout 0 of two is the rollout of one, until the policies differ."""
    import pyarrow.parquet as pq

    factors = {"rollouts": {"n=3": {"num_generations": 3, "advantage": "rloo"}}}
    study = write_study(tmp_path, seeds=1, factors=factors, budget={"rule": "rounds", "amount": 3})
    settings = yaml.safe_load(study.read_text())
    settings["baseline"]["log_rollouts_steps"] = 1
    study.write_text(yaml.safe_dump(settings))
    assert start_runner(study, tmp_path / "out", work="train").wait(timeout=100) == 0
    one, three = (
        [pq.read_table(path).to_pylist() for path in sorted(folder.glob("rollouts/*.parquet"))]
        for folder in sorted((tmp_path / "out" / "cells").iterdir())
    )
    assert len(one) == len(three) == 3
    for alone, group in zip(one, three, strict=True):
        first = [row for row in group if row["rollout"] == 0]
        assert [row["query"] for row in alone] == [row["query"] for row in first]
    first = [row["completion"] for row in three[0] if row["rollout"] == 0]
    assert [row["completion"] for row in one[0]] == first


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "amount"), [("tokens", 400), ("seconds", 0.3)])
def test_cells_of_equal_budget_end_with_the_round_that_uses_it_up(tmp_path: Path, rule: str, amount: float) -> None:
    factors = {"rollouts": {"n=4": {"num_generations": 4, "advantage": "group_norm"}}}
    study = write_study(tmp_path, seeds=2, factors=factors, budget={"rule": rule, "amount": amount})
    assert start_runner(study, tmp_path / "out", work="train").wait(timeout=200) == 0
    cells = sorted((tmp_path / "out" / "cells").iterdir())
    assert len(cells) == 4
    for cell in cells:
        lines = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()][1:]
        if rule == "tokens":
            used = [line["tokens/generated"] for line in lines]
        else:
            used = [line["seconds/round"] - line.get("seconds/evaluate", 0.0) for line in lines]
        slack = 0.0 if rule == "tokens" else 0.1 * amount  # a line's clock is read after the budget's
        assert sum(used[:-1]) < amount + slack and amount <= sum(used)
        assert "eval/test/pass@1" in lines[-1], "the last round is evaluated, whatever its number"
    write_study_report(tmp_path / "out")
    assert f"budget: {amount} {rule}" in (tmp_path / "out" / "report" / "report.md").read_text()


@pytest.mark.parametrize("jobs,gpus", [(0, []), (2, ["0"])])
def test_impossible_numbers_are_refused(tmp_path: Path, jobs: int, gpus: list[str]) -> None:
    from study_runner import Silent

    from bandit_rft.study.plan import load_plan
    from bandit_rft.study.run import Runner

    with pytest.raises(ValueError, match="jobs"):
        Runner(load_plan(write_study(tmp_path, seeds=1)), tmp_path, jobs=jobs, gpus=gpus, listener=Silent())
