"""`make gpu-check` where it can be tested without a GPU: it refuses politely, and loses nothing whatever fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_build
import gpu_check
from gpu_measurements import machine, record
from gpu_measurements.plan import plan

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
NAMES = [one.name for one in plan(small=True, device_type="cpu")]


def command(output: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--output", str(output), *more]


def check(output: Path, *more: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(command(output, *more), capture_output=True, text=True, timeout=280)
    files = list(output.glob("*.json"))
    assert len(files) == 1, done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode, json.loads(files[0].read_text())


def results_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [result for one in data["measurements"].values() for result in one["results"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_refuses(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "needs a CUDA GPU" in done.stderr and "Nothing was measured" in done.stderr
    made = subprocess.run(["make", "gpu-check", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2
    assert "needs a CUDA GPU" in made.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_small_run_on_a_cpu_writes_the_whole_table(tmp_path: Path) -> None:
    code, data = check(tmp_path)
    assert code == 0, data["measurements"]
    results = results_of(data)
    cases = {result["case"].partition(" (")[0] for result in results if "case" in result}
    assert cases == {
        "policy rows", "logprob rows", "sample rows", "sample, top-p 0.9 rows", "sample, top-k 50 rows",
        "linear_sample", "linear_policy_loss, fwd + bwd", "the same, 70% of rows at 0", "linear_logprobs, forward",
        "a round",
    }  # fmt: skip
    measured = [result for result in results if "ratio" in result]
    assert all(result["ours_ms"] > 0 and result["other_ms"] > 0 for result in measured)
    errors = [result for result in results if "gradient" in result]
    assert all(error["met"] for error in errors) and len(errors) == 4
    (round_,) = (result["round"] for result in results if "round" in result)
    assert round_["seconds/round"] >= round_["seconds/rollout"] > 0
    assert "CPU" in data["machine"]["device"] and results[0]["limits"]["copy GB/s"] > 0
    assert f"Commit {data['machine']['commit']}." in next(tmp_path.glob("*-cpu-*.md")).read_text()
    assert list(data["measurements"]) == NAMES
    assert "| linear_sample |" in next(tmp_path.glob("*.md")).read_text()


def test_a_crash_a_hang_an_exception_and_a_missing_peer_cost_one_measurement_each(tmp_path: Path) -> None:
    chosen = [name for name in NAMES if name.startswith(("limit", "logprobs 96", "sample", "row kernel"))]
    only = ("--only", "limit|probabilities logprobs 96|sampling|rows")
    faults = {
        "limit product 96 64 512": ("abort", "crashed", "SIGABRT"),
        "logprobs 96 64 512": ("hang", "timed out", "no end after 8 s"),
        "sample 1 64 512": ("raise", "failed", "RuntimeError: injected"),
        "row kernel policy 64 512": ("missing", "done", ""),
    }
    injected = [word for name, (fault, *_) in faults.items() for word in ("--fault", f"{name}={fault}")]
    code, data = check(tmp_path, *only, *injected, "--hung_after", "8")
    assert code == gpu_check.INCOMPLETE
    assert list(data["measurements"]) == chosen
    for name, one in data["measurements"].items():
        _, status, text = faults.get(name, ("", "done", ""))
        assert one["status"] == status and text in one["text"], (name, one)
        assert bool(one["results"]) == (status == "done"), (name, one)
    (missing,) = (result for result in results_of(data) if "missing" in result)
    assert missing["missing"] == "OSError: injected: no such peer"
    assert "missing: OSError: injected" in next(tmp_path.glob("*.md")).read_text()

    code, again = check(tmp_path, *only, "--resume")
    assert code == 0 and all(one["status"] == "done" for one in again["measurements"].values())
    for name, one in data["measurements"].items():
        if one["status"] == "done":
            assert again["measurements"][name] == one, f"{name} was measured a second time"


def test_the_time_limit_stops_cleanly_and_resume_continues(tmp_path: Path) -> None:
    only = ("--only", "limits|rows")
    code, data = check(tmp_path, *only, "--seconds", "0")
    assert code == gpu_check.INCOMPLETE and data["measurements"] == {}
    code, data = check(tmp_path, *only, "--seconds", "40", "--fault", "row kernel policy 64 512=hang")
    assert code == gpu_check.INCOMPLETE
    hung = data["measurements"].pop("row kernel policy 64 512")
    assert hung["status"] == "timed out" and "the time limit of the whole" in hung["text"]
    assert {one["status"] for one in data["measurements"].values()} == {"done"} and len(data["measurements"]) == 2
    code, data = check(tmp_path, *only, "--resume")
    assert code == 0 and len(data["measurements"]) == 7


def test_what_was_measured_survives_the_checker_itself(tmp_path: Path) -> None:
    """Killed from outside, as a machine's time limit does: the file is whole, and says what was under way."""
    process = subprocess.Popen(
        command(tmp_path, "--only", "limits|rows", "--fault", "row kernel policy 64 512=hang"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        files = list(tmp_path.glob("*.json"))
        if files and "row kernel policy" in files[0].read_text():
            break
        time.sleep(0.05)
    (worker,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    worker.wait(timeout=30)  # it hangs, and would keep the device
    (path,) = tmp_path.glob("*.json")
    measurements = json.loads(path.read_text())["measurements"]
    statuses = [one["status"] for one in measurements.values()]
    assert statuses == ["done", "done", "crashed"]
    assert "this process ended" in measurements["row kernel policy 64 512"]["text"]


def test_a_file_of_another_machine_is_not_continued(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"schema": record.SCHEMA, "machine": {"device": "another"}, "measurements": {}}))
    done = subprocess.run(command(tmp_path, "--resume", str(other)), capture_output=True, text=True, timeout=120)
    assert done.returncode == gpu_check.REFUSED and "--resume" in done.stderr and "another" in other.read_text()


def test_a_file_of_another_commit_is_not_continued(tmp_path: Path) -> None:
    """What was measured before would stand under the new commit's name."""
    about = {"device": "a", "versions": {}, "dtype": "float32", "commit": "old"}
    path = record.Record(tmp_path, about).path
    before = path.read_text()
    with pytest.raises(ValueError, match=r"--resume: .* is of commit old, and this is new"):
        record.Record(tmp_path, {**about, "commit": "new"}, path)
    assert path.read_text() == before
    record.Record(tmp_path, about, path)


@pytest.mark.parametrize(
    ("code", "line", "status"),
    [
        (0, "3 passed in 1s", record.DONE),
        (0, "SKIPPED [1] tests/gpu/test_cuda_rows.py:189: compute-sanitizer is not installed", record.SKIPPED),
        (1, "1 failed, 2 passed", record.FAILED),
        (5, "2 deselected", record.FAILED),
        (-11, "", record.CRASHED),
        (None, "", record.TIMED_OUT),
    ],
)
def test_tests_that_were_skipped_are_not_done(code: int | None, line: str, status: str) -> None:
    assert gpu_check.status_of(code, [line]) == status


# --- the build --------------------------------------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """(command, environment) of every process that is started; none is."""
    seen: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        seen.append((command, env))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu_build.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("BANDIT_RFT_CUDA", raising=False)
    return seen


def test_nvcc_is_found_beside_path_and_one_architecture_is_built(
    builds: list[tuple[list[str], dict[str, str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    where = {None: None, "/usr/local/cuda/bin": "/usr/local/cuda/bin/nvcc"}
    monkeypatch.setattr(gpu_build.shutil, "which", lambda name, path=None: where[path])
    assert gpu_build.build() is None
    ((command, environment),) = builds
    assert environment["CUDACXX"] == "/usr/local/cuda/bin/nvcc" and environment["BANDIT_RFT_CUDA"] == "ON"
    assert "cmake.define.BANDIT_RFT_CUDA_ARCHITECTURES=90" in command and "--no-index" in command


def test_it_stops_loudly_where_cuda_is_wanted_and_nvcc_missing(
    builds: list[tuple[list[str], dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_build.shutil, "which", lambda name, path=None: None)
    problem = gpu_build.build()
    assert problem is not None and "nvcc" in problem and "Nothing was measured" in problem and builds == []
    monkeypatch.setenv("BANDIT_RFT_CUDA", "OFF")
    assert gpu_build.build() is None
    ((_, environment),) = builds
    assert environment["BANDIT_RFT_CUDA"] == "OFF"


def test_it_builds_where_nothing_is_installed_yet() -> None:
    """What it imports must be there before the build: nothing of bandit_rft is, on a fresh machine."""
    code = (
        "import sys; sys.modules['bandit_rft'] = None; import torch; torch.cuda.is_available = lambda: False; "
        "import gpu_build; print(gpu_build.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    assert "needs a CUDA GPU" in done.stderr and "Nothing was measured" in done.stderr


# --- tests as measurements, predictions -------------------------------------------------------------------------------


def test_hanging_tests_keep_what_they_had_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho FAILED one\necho two\nsleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(program))
    measurement = plan(small=True, device_type="cuda")[-1]
    status, text = gpu_check.run_tests(measurement, 1.0, tmp_path / "log")
    assert (status, text) == ("timed out", "FAILED one\ntwo")
    program.write_text("#!/bin/sh\nkill -ABRT $$\n")
    assert gpu_check.run_tests(measurement, 30.0, tmp_path / "log")[0] == "crashed"
    program.write_text("#!/bin/sh\necho 3 passed\n")
    assert gpu_check.run_tests(measurement, 30.0, tmp_path / "log") == ("done", "3 passed")


def test_measurements_come_before_tests_in_the_order_that_decides() -> None:
    sections = list(dict.fromkeys(one.section for one in plan(small=False, device_type="cuda")))
    assert sections == ["limits", "loss", "log-probabilities", "sampling", "rows", "whole round", "tests"]
    assert [one.name for one in plan(small=False, device_type="cuda")][-2:] == ["tests/gpu", "compute-sanitizer"]


def test_predictions_follow_from_the_machine_and_never_count_as_measured(tmp_path: Path) -> None:
    # 37 instructions a logit were disassembled once, and 0.55 of the copy bandwidth predicted from them.
    few = machine.H200._replace(instructions=machine.H200.instructions * machine.INSTRUCTIONS["logprob"] / 37)
    assert machine.row_share(few, "logprob") == pytest.approx(0.55, abs=0.02)
    assert machine.row_share(machine.H200, "logprob") == 1.0
    assert machine.loss_ratio(machine.H200, 8192, 4096, 151936) == pytest.approx(1.11, abs=0.04)
    building = (ROOT / "docs" / "building.md").read_text()
    for kind, kernel in {
        "logprob": "score<F32",
        "policy": "differentiate<F32, Bf16",
        "sample": "sample<F32, whole",
    }.items():
        counted = next(line for line in building.splitlines() if line.startswith(f"| `{kernel}, plain>`"))
        assert float(counted.split("|")[3].split()[0]) == machine.INSTRUCTIONS[kind]  # sm_90
    kernels = {f"linear_sample, {rows} rows": count for rows, count in machine.DRAW.items()}
    for kernel, count in {"linear_logprobs, 8192 rows": machine.SCORE, **kernels}.items():
        counted = next(line for line in building.splitlines() if line.startswith(f"| {kernel} |"))
        assert float(counted.split("|")[3].split(";")[0]) == count
    assert machine.machine_of("NVIDIA H200", {"copy GB/s": 4000.0}) == machine.H200._replace(copy=4e12)
    assert machine.machine_of("a CPU", {}) is None
    about = {"device": "NVIDIA H200", "dtype": "bfloat16", "versions": {}}
    kept = record.Record(tmp_path, about)
    kept.begin("one", "rows")
    row = {"case": "logprob rows", "shape": "(1, 1)", "against": "copy bandwidth", "bar": 0.85, "at_least": True}
    kept.add("one", {**row, "ours_ms": 2.0, "other_ms": 1.0, "ratio": 0.5, "predict": ["row_share", "logprob"]})
    (result,) = json.loads(kept.path.read_text())["measurements"]["one"]["results"]
    assert (result["predicted"], result["ratio"]) == (1.0, 0.5) and record.met(result) is False
    line = next(line for line in kept.path.with_suffix(".md").read_text().splitlines() if "logprob rows" in line)
    assert [cell.strip() for cell in line.split("|")][-5:-1] == ["1.00", "0.500", ">= 0.85", "MISSED"]


@pytest.mark.parametrize("name", ["nvidia-h100-80gb-hbm3-2026-11-27", "nvidia-h200-2026-11-27"])
def test_the_model_of_the_machine_has_learned_from_what_was_measured(name: str) -> None:
    data = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    results = results_of(data)
    limits = {name: value for result in results for name, value in result.get("limits", {}).items()}
    gpu = machine.machine_of(data["machine"]["device"], limits)
    assert gpu is not None
    ratios = {
        ("linear_sample", "bare product"): machine.sample_ratio,
        ("linear_policy_loss, fwd + bwd", "three bare products"): machine.loss_ratio,
        ("the same, 70% of rows at 0", "every advantage"): machine.sparse_ratio,
        ("linear_logprobs, forward", "bare product"): machine.logprobs_ratio,
    }
    compared = 0
    for result in results:
        case = result.get("case", ""), result.get("against")
        predicted = None
        if case in ratios:
            predicted = ratios[case](gpu, *json.loads("[" + result["shape"].strip("()") + "]"))
        elif case[0].endswith(" rows (cuda)") and (kind := case[0].split()[0]) in machine.INSTRUCTIONS:
            predicted = machine.row_share(gpu, kind)
        if predicted is not None:
            assert 0.8 <= predicted / result["ratio"] <= 1.25, (case, result["shape"], predicted, result["ratio"])
            compared += 1
    assert compared >= 18


def test_out_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", os.sep + "elsewhere")
    assert gpu_check.arguments_of([]).output == Path(os.sep, "elsewhere")
    monkeypatch.delenv("OUT")
    assert gpu_check.arguments_of([]).output == ROOT / "benchmarks" / "results"
