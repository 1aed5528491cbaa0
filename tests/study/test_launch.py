"""Workers on a cluster: the same cells, each once; a limit in time is kept, and what is begun can be continued."""

from __future__ import annotations

import _thread
import collections
import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import study_runner
import yaml
from paths import SUPPORT
from tiny_models import save_tiny_llama

from bandit_rft import cli
from bandit_rft.study.launch import (
    Worker,
    given_gpus,
    max_array_size,
    read_options,
    run_local,
    run_ray,
    share,
    slurm_script,
    start_slurm,
)  # fmt: skip
from bandit_rft.study.limit import RESERVE, TimeLimit, seconds_left, slurm_seconds, slurm_seconds_left
from bandit_rft.study.plan import PlannedCell, load_plan
from bandit_rft.study.run import Runner
from bandit_rft.study.status import last_line, read_status

# Before any test: its import closes what logs, and absl's handler pytest's stderr.
with contextlib.suppress(ImportError):
    import submitit  # noqa: F401


def write_study(folder: Path, seeds: int = 1, rounds: int = 2) -> Path:
    save_tiny_llama(folder / "model")
    study = {
        "baseline": {
            "preset": "minimal", "device": "cpu", "batch_size": 4, "max_prompt_length": 12, "max_completion_length": 6,
            "learning_rate": 1e-3, "log_rollouts_steps": 0, "save_steps": 4,
            "evaluation": {"max_queries": 6, "splits": ["train", "test"], "greedy": False},
        },
        "models": {"tiny": {"model_name_or_path": "model"}},
        "tasks": {"sums": {"task": "arithmetic", "task_options": {"train_size": 24, "longer_size": 0}}},
        "seeds": list(range(seeds)),
        "budget": {"rule": "rounds", "amount": rounds},
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / "study.yaml"


def noting(study: Path, out: Path) -> Worker:
    """A worker that runs a study of cells that only say that they were run."""
    return Worker([sys.executable, str(SUPPORT / "study_runner.py"), str(study), str(out), "1", "0", "note"])


def assert_each_ran_once(out: Path, cells: int, runners: int) -> None:
    counts = collections.Counter(line.split()[0] for line in (out / "runs.txt").read_text().splitlines())
    assert len(counts) == cells and set(counts.values()) == {1}
    owners = {json.loads(claim.read_text())["pid"] for claim in (out / "locks").glob("[!.]*")}
    assert len(owners) == runners, "every worker had some of them"
    assert read_status(out).counts == {"finished": cells}


# --- on this machine, and on Ray --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_jobs_of_submitit_share_100_cells_and_run_none_twice(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    worker = noting(write_study(tmp_path, seeds=100), tmp_path / "out")
    assert run_local(worker, 2, tmp_path / "launch", {"timeout_min": 5}) == [0, 0]
    assert_each_ran_once(tmp_path / "out", 100, 2)


@pytest.mark.slow
def test_two_nodes_of_a_ray_cluster_share_100_cells_and_run_none_twice(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed (extra [ray])")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        worker = noting(write_study(tmp_path, seeds=100), tmp_path / "out")
        options = {"address": cluster.address, "num_cpus": 1}
        assert run_ray(worker, 2, tmp_path / "launch", options) == [0, 0]
    finally:
        cluster.shutdown()
    assert_each_ran_once(tmp_path / "out", 100, 2)


@pytest.mark.slow
def test_a_launched_study_is_the_study(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    study, out = write_study(tmp_path, seeds=2), tmp_path / "out"
    line = f"study run {study} --output_dir {out} --launcher local --workers 2 --launcher_option timeout_min=5"
    assert cli.main(line.split()) == 0
    assert "2 cells: 2 finished" in capfd.readouterr().out
    assert (out / "report" / "report.html").is_file()
    assert "/2  finished  tiny-sums-baseline-baseline-s" in "".join(p.read_text() for p in out.glob("launch/*_log.out"))


# --- SLURM ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch, scontrol and srun that note what they are asked for; arrays of three jobs at most."""
    pytest.importorskip("submitit")
    folder = tmp_path / "slurm"
    folder.mkdir()
    here = 'cd "$(dirname "$0")"\n'
    says = {
        "sbatch": f'script=$1\n{here}cat "$script" >> scripts\necho "Submitted batch job $(grep -c bin/bash scripts)"',
        "srun": "exit 1",
        "scontrol": f'{here}test "$2" = config && echo "MaxArraySize            = 3"\ntest "$2" = job && cat job',
    }
    for name, text in says.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_the_array_script_is_printed_and_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "/nowhere")  # on a machine without SLURM, too
    study = write_study(tmp_path)
    line = (
        f"study run {study} --output_dir {tmp_path / 'out'} --launcher slurm --workers 4 --jobs 2 --threads 3 --dry_run"
    )
    options = ["--launcher_option", "time=90", "--launcher_option", "partition=gpu", "--gpus", "0,1"]
    assert cli.main([*line.split(), *options]) == 0
    script = capsys.readouterr().out
    for words in ("array=0-3%4", "time=90", "partition=gpu", "cpus-per-task=6", "gpus-per-node=2", "signal=USR2@30"):
        assert f"#SBATCH --{words}\n" in script
    assert script.startswith("#!/bin/bash\n") and f"submitit.core._submit {tmp_path / 'out' / 'launch'}" in script
    assert not (tmp_path / "out").exists()


def test_more_workers_than_an_array_may_have_are_several_arrays(slurm: Path, tmp_path: Path) -> None:
    assert max_array_size() == 3
    jobs = start_slurm(Worker(["true"]), 7, tmp_path / "launch", {"time": 5})
    assert jobs == ["1_0", "1_1", "1_2", "2_0", "2_1", "2_2", "3"]
    scripts = (slurm / "scripts").read_text()
    assert scripts.count("--array=0-2%3") == 2 and scripts.count("#!/bin/bash") == 3
    assert "--array=0-2%3" in slurm_script(7, tmp_path / "launch", {"time": 5})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--launcher slurm", "time=MINUTES is needed"),
        ("--launcher slurm --launcher_option time=x", "time=MINUTES is needed"),
        ("--launcher slurm --launcher_option time=4:00:00", "a whole number >= 1; got '4:00:00'"),
        ("--launcher slurm --launcher_option time=true", "a whole number >= 1; got True"),
        ("--launcher slurm --launcher_option time=-5", "a whole number >= 1; got -5"),
        ("--launcher slurm --launcher_option time=5 --launcher_option patition=gpu", "['patition']; submitit's names"),
        ("--launcher slurm --launcher_option time", "must be KEY=VALUE"),
        ("--launcher slurm --launcher_option time=1 --launcher_option time=2", "each key once; got 'time=2'"),
        ("--launcher local --launcher_option partition=x", "got partition"),
        ("--launcher local --dry_run", "--launcher slurm"),
        ("--workers 2", "--workers needs --launcher"),
        ("--launcher_option time=2", "--launcher_option needs --launcher"),
        ("--shard 3/2", "--shard must be I/N with 1 <= I <= N; got '3/2'"),
        ("--shard 2/3", "shard=2/3 is empty: the study has 1 cells"),
        ("--max_seconds 0", "--max_seconds must be a number > 0; got '0'"),
        ("--max_seconds nan", "--max_seconds must be a number > 0"),
    ],
)
def test_what_cannot_be_launched_is_refused(
    slurm: Path, line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["study", "run", str(write_study(tmp_path)), "--output_dir", str(tmp_path / "out"), *line.split()])
    assert words in capsys.readouterr().err
    assert not (slurm / "scripts").exists()


def test_without_slurm_launching_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match='Could not detect "srun"'):
        start_slurm(Worker(["true"]), 2, tmp_path, {"time": 5})


@pytest.mark.parametrize(("launcher", "library"), [("slurm", "submitit"), ("ray", "ray"), ("local", "submitit")])
def test_a_launcher_without_its_library_names_the_extra(
    launcher: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    line = f"study run {write_study(tmp_path)} --output_dir {tmp_path / 'out'} --launcher {launcher}"
    assert cli.main([*line.split(), *(["--launcher_option", "time=5"] if launcher == "slurm" else [])]) == 1
    extra = "ray" if library == "ray" else "slurm"
    assert (
        f"{library} is not installed; this needs an extra: pip install 'bandit_rft[{extra}]'" in capsys.readouterr().err
    )


def test_a_worker_deals_out_the_gpus_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their numbers are the machine's, where SLURM does not hide the others."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    assert given_gpus(2) == ["3", "5"]
    assert Worker(["sh", "-c", 'test "$0 $1" = "--gpus 3,5"'], gpus=2)() == 0
    with pytest.raises(ValueError, match="gpus=4, but the cluster gives this worker 3"):
        given_gpus(4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert given_gpus(2) == ["0", "1"]


def test_launcher_options_are_json_or_text() -> None:
    given = ["time=90", 'setup=["module load cuda", "a"]', "a=x=y", "num_cpus=0.5", "exclusive=true"]
    assert read_options(given) == {
        "time": 90, "setup": ["module load cuda", "a"], "a": "x=y", "num_cpus": 0.5, "exclusive": True,
    }  # fmt: skip
    for text in ("time=4:00:00", "account=0123", "a=1e3", "qos=off", "a=NaN", "a=1.50", "a=[", "a=" + "[" * 5000):
        key, value = text.split("=")
        assert read_options([text]) == {key: value}, "a name that looks like a number to YAML"


# --- a worker that has to go ------------------------------------------------------------------------------------------

GENTLE = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.3), print("saved", flush=True), sys.exit(130)))
time.sleep(60)
"""


@pytest.mark.timeout(30)
def test_a_preempted_worker_stops_its_runner_and_is_submitted_again(capfd: pytest.CaptureFixture[str]) -> None:
    """submitit calls checkpoint() in a signal handler, in the middle of the worker's wait."""
    pytest.importorskip("submitit")
    worker = Worker([sys.executable, "-c", GENTLE], gpus=0)
    again: list[Any] = []
    before = signal.signal(signal.SIGUSR2, lambda *_: again.append(worker.checkpoint()))
    try:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        assert worker() == 130
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert capfd.readouterr().out == "saved\n"
    assert again[0].function.command == worker.command and again[0].function.process is None


@pytest.mark.timeout(30)
def test_an_interrupted_worker_stops_its_runner(capfd: pytest.CaptureFixture[str]) -> None:
    threading.Timer(1.0, _thread.interrupt_main).start()  # as Ray does
    assert Worker([sys.executable, "-c", GENTLE])() == 130
    assert capfd.readouterr().out == "saved\n"


def test_a_killed_worker_takes_its_runner_along(tmp_path: Path) -> None:
    code = f"from bandit_rft.study.launch import Worker; Worker(['sh', '-c', 'echo $$ > {tmp_path}/pid; sleep 60'])()"
    worker = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker.kill()
    worker.wait()
    pid = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_stopping_while_the_first_cell_is_being_started(tmp_path: Path) -> None:
    study, out = write_study(tmp_path, rounds=100_000), tmp_path / "out"
    command = [sys.executable, "-m", "bandit_rft", "study", "run", str(study), "--output_dir", str(out)]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("cells/*/cell.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    runner.send_signal(signal.SIGINT)
    text, _ = runner.communicate(timeout=60)
    assert runner.returncode == 130 and read_status(out).counts == {"stopped": 1}, text


# --- shares -----------------------------------------------------------------------------------------------------------


def cell(name: str, level: str = "l", task: str = "t") -> PlannedCell:
    return PlannedCell(name, "f", level, "m", task, 0, False, {})


def test_shares_are_disjoint_and_all_cells() -> None:
    cells = [cell(str(i)) for i in range(11)]
    shares = [share(cells, (i, 3)) for i in (1, 2, 3)]
    assert [c.id for c in shares[1]] == ["1", "4", "7", "10"]
    assert sorted(int(c.id) for part in shares for c in part) == list(range(11))
    assert share(cells, (1, 1)) == cells


@pytest.mark.slow
def test_a_share_is_run_alone_and_the_report_waits_for_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, out = write_study(tmp_path, seeds=3, rounds=1), tmp_path / "out"
    line = f"study run {study} --output_dir {out} --shard"
    assert cli.main([*line.split(), "2/2"]) == 0
    assert read_status(out).states == {f"tiny-sums-baseline-baseline-s{i}": s for i, s in enumerate(
        ["waiting", "finished", "waiting"])}  # fmt: skip
    assert "report:" not in capsys.readouterr().out
    assert cli.main([*line.split(), "1/2"]) == 0
    assert read_status(out).counts == {"finished": 3} and "report:" in capsys.readouterr().out


# --- time -------------------------------------------------------------------------------------------------------------


class Now:
    """A clock that is set."""

    def __init__(self) -> None:
        self.time = 50.0

    def __call__(self) -> float:
        return self.time


def test_a_cell_is_begun_only_if_it_can_end_in_time(tmp_path: Path) -> None:
    now = Now()
    limit = TimeLimit(1000, tmp_path, now)
    assert limit.fits(cell("new")) and limit.margin == 50
    limit.learn(cell("a"), {"status": "finished", "seconds": 300})
    limit.learn(cell("b"), {"status": "finished", "seconds": 400})
    limit.learn(cell("c", level="slow"), {"status": "finished", "seconds": 700})
    now.time += 1000 - 450
    assert limit.left == 450 and limit.fits(cell("d"))
    now.time += 1
    assert not limit.fits(cell("d"))
    assert not limit.fits(cell("e", level="other")), "a level that nobody ran takes what the slowest of its task took"
    assert limit.fits(cell("f", task="other")), "nothing is known of it"
    limit.learn(cell("d"), {"status": "stopped", "seconds": 100})
    assert limit.fits(cell("d")), "it was begun already"
    limit.learn(cell("long", level="long"), {"status": "finished", "seconds": 960})
    assert limit.fits(cell("g", level="long")), "no runner's time is enough for it: it is begun, and continued"
    now.time = 50 + 1000 - 49
    assert not limit.fits(cell("g", level="long")) and not limit.fits(cell("f", task="other"))


def test_cells_are_stopped_with_time_for_two_rounds(tmp_path: Path) -> None:
    now = Now()
    limit = TimeLimit(1000, tmp_path, now)
    for name, seconds in (("a", [40.0, 90.0]), ("b", [10.0])):
        (tmp_path / "cells" / name).mkdir(parents=True)
        lines = [json.dumps({"round": i, "seconds/round": s}) for i, s in enumerate(seconds)]
        (tmp_path / "cells" / name / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    assert not limit.near(["a", "b", "not begun"]) and limit.margin == 50 + 180
    now.time += 769
    assert not limit.near(["a"])
    now.time += 1
    assert limit.near([]) and limit.left == 230
    with pytest.raises(ValueError, match="max_seconds must be > 0; got 0"):
        TimeLimit(0, tmp_path)


def test_a_runner_begins_nothing_that_does_not_fit_and_ends(tmp_path: Path) -> None:
    plan, out = load_plan(write_study(tmp_path, seeds=2)), tmp_path / "out"
    folder = out / "cells" / plan.cells[0].id
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps({"status": "finished", "seconds": 100.0}))
    now = Now()
    limit = TimeLimit(200, out, now)
    now.time += 100
    runner = Runner(plan, out, listener=study_runner.Silent(), work=study_runner.note_and_nap, limit=limit)
    start = time.monotonic()
    assert runner.run() is False and time.monotonic() - start < 5
    assert runner.out_of_time and not (out / "runs.txt").exists()


@pytest.mark.slow
def test_at_the_limit_cells_have_saved_and_go_on_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, out = write_study(tmp_path, rounds=100_000), tmp_path / "out"
    settings = yaml.safe_load(study.read_text())
    settings["baseline"] |= {"save_steps": 0, "eval_steps": 0}
    study.write_text(yaml.safe_dump(settings))
    metrics = out / "cells" / "tiny-sums-baseline-baseline-s0" / "metrics.jsonl"
    reached = [0]
    for seconds in (10, 6):
        start = time.monotonic()
        status = cli.main(["study", "run", str(study), "--output_dir", str(out), "--max_seconds", str(seconds)])
        assert status == 130 and 0.7 * seconds < time.monotonic() - start < seconds + 5
        assert "stopped at the time limit; run the same command again" in capsys.readouterr().out
        assert read_status(out).counts == {"stopped": 1}
        reached.append(last_line(metrics)["round"])
    assert reached[1] < reached[2], "nothing was lost"
    assert [json.loads(line)["round"] for line in metrics.read_text().splitlines()] == list(range(reached[2] + 1))


def test_slurms_limit(slurm: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert slurm_seconds_left({}) is None
    assert slurm_seconds_left({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": f"{time.time() + 100:.0f}"}) == pytest.approx(
        100, abs=2
    )
    (slurm / "job").write_text("JobId=7 RunTime=00:01:02 TimeLimit=1-01:00:00 TimeMin=N/A\n")
    assert slurm_seconds_left({"SLURM_JOB_ID": "7"}) == 25 * 3600 - 62
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert seconds_left(None) == 25 * 3600 - 62 - RESERVE and seconds_left(10.0) == 10
    (slurm / "job").write_text("JobId=7 RunTime=00:59:30 TimeLimit=01:00:00\n")
    assert seconds_left(None) == 1, "hardly begun, it ends"
    (slurm / "job").write_text("JobId=7 RunTime=00:01:02 TimeLimit=UNLIMITED\n")
    assert seconds_left(None) is None and seconds_left(10.0) == 10 and not caplog.records
    (slurm / "job").write_text("slurm_load_jobs error\n")
    assert seconds_left(None) is None and "give --max_seconds" in caplog.text


@pytest.mark.parametrize(("text", "seconds"), [("05:06", 306), ("1:02:03", 3723), ("2-00:00:01", 172801)])
def test_times_of_scontrol(text: str, seconds: float) -> None:
    assert slurm_seconds(text) == seconds
    with pytest.raises(ValueError, match="hours:minutes:seconds; got '7'"):
        slurm_seconds("7")


# --- a real SLURM -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sinfo") is None, reason="no SLURM here")
def test_slurm_runs_the_workers(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    if subprocess.run(["sinfo"], capture_output=True, check=False).returncode:
        pytest.skip("SLURM does not answer")
    out = tmp_path / "out"
    jobs = start_slurm(noting(write_study(tmp_path, seeds=100), out), 2, tmp_path / "launch", {"time": 5})
    assert len(jobs) == 2
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "launch").glob("*_result.pkl"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert_each_ran_once(out, 100, 2)
