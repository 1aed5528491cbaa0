"""What the benchmarks record, compare and write: the numbers of docs/performance.md rest on it."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare
import performance
from comparison import logit_rows, machine, peers, record
from comparison.batch import Batch
from comparison.record import OURS

RUN = ROOT / "benchmarks" / "results" / "cpu.json"
committed = pytest.mark.skipif(not RUN.exists(), reason="there is no benchmarks/results/cpu.json to make the page of")


def case(ours: list[float], plain: list[float], **more: Any) -> dict[str, Any]:
    sides = {"plain PyTorch": {"role": "peer", "seconds": plain}, OURS: {"role": "ours", "seconds": ours}}
    return {"group": "loss", "sides": sides, "missing": {}, "bars": [], **more}


def run(path: Path, **cases: dict[str, Any]) -> Path:
    kept = record.Record(path, threads=2)
    for name, one in cases.items():
        kept.add(name, copy.deepcopy(one))
    return path


def test_a_ratio_is_of_turns_not_of_medians() -> None:
    """The machine got twice as slow in the last turn: both sides did, so the ratio did not move."""
    found = record.ratio(case([1.0, 1.0, 2.0], [2.0, 2.0, 4.0]), OURS, "plain PyTorch")
    assert found == (0.5, 0.5, 0.5)
    assert record.spread([1, 2, 3, 4, 100]) == (3, 2, 4)
    # Rounds are not pairs: three of one side stand beside two of another.
    assert record.ratio(case([1.0, 2.0, 3.0], [2.0, 4.0]), OURS, "plain PyTorch") == (2 / 3, 1 / 4, 3 / 2)


def test_a_run_of_several_commands_is_one_file(tmp_path: Path) -> None:
    path = run(tmp_path / "run.json", loss=case([1.0], [2.0], missing={"vLLM": "not installed"}))
    peaks = {"sides": {OURS: {"role": "ours", "peak_mib": 12.3456789}, "vLLM": {"role": "peer", "peak_mib": 1.0}}}
    run(path, loss={**peaks, "group": "loss"})
    data = record.load(path)
    kept = data["cases"]["loss"]
    assert kept["sides"][OURS] == {"role": "ours", "seconds": [1.0], "peak_mib": 12.346}
    assert kept["missing"] == {}  # it was measured after all
    assert kept["commit"] and kept["date"] and kept["peaks_commit"]
    about = data["machine"]
    assert about["cpu"] and about["versions"]["torch"] == torch.__version__ and about["threads"] == 2
    data["machine"]["cpu"] = "another"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="measured with another cpu"):
        record.Record(path, threads=2)
    path.write_text("[]")
    with pytest.raises(ValueError, match="not the JSON of a benchmark run"):
        record.load(path)


def test_a_case_without_times_is_of_its_latest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for commit in ("earlier", "later"):
        monkeypatch.setattr(machine, "measured", lambda commit=commit: {"date": "2026-11-27", "commit": commit})
        path = run(tmp_path / "run.json", shares={"sides": {OURS: {"role": "ours", "figures": {"a": 1.0}}}})
    kept = record.load(path)["cases"]["shares"]
    assert kept["commit"] == "later" and "peaks_commit" not in kept


def test_times_of_two_runs_are_not_mixed(tmp_path: Path) -> None:
    """A peer that a later run did not measure has no time left, which would stand beside new times of ours."""
    path = run(tmp_path / "run.json", loss=case([1.0], [2.0]))
    run(path, loss={"sides": {"plain PyTorch": {"role": "peer", "peak_mib": 9.0}}, "group": "loss"})
    ours = case([0.5], [2.0])
    del ours["sides"]["plain PyTorch"]
    run(path, loss={**ours, "missing": {"plain PyTorch": "not installed"}})
    kept = record.load(path)["cases"]["loss"]
    assert kept["sides"] == {
        OURS: {"role": "ours", "seconds": [0.5]},
        "plain PyTorch": {"role": "peer", "peak_mib": 9.0},
    }
    assert kept["missing"] == {"plain PyTorch": "not installed"}


@committed
def test_results_name_no_host_and_no_path() -> None:
    """What is committed describes the machine and does not name it."""
    import platform

    for path in (*RUN.parent.glob("*.json"), ROOT / "docs" / "performance.md"):
        text = path.read_text()
        assert str(Path.home()) + "/" not in text and str(ROOT) not in text and "/tmp/" not in text
        assert platform.node() not in text or len(platform.node()) < 5


@pytest.mark.parametrize(
    ("now", "status", "said"),
    [
        ([1.30, 1.31, 1.29, 1.30], 1, "SLOWER"),
        ([1.02, 1.03, 1.02, 1.02], 0, "as before"),  # within the tolerance
        ([0.90, 1.90, 1.00, 1.80], 0, "as before"),  # a larger median, but within the spread
        ([0.70, 0.71, 0.70, 0.70], 0, "faster"),
    ],
)
def test_compare_tells_slower_from_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], now: list[float], status: int, said: str
) -> None:
    drift = [2.0, 2.0, 3.0, 2.0]  # the second run's machine was slower, for both sides
    old = run(tmp_path / "old.json", loss=case([1.0, 1.01, 0.99, 1.0], [2.0] * 4), gone=case([1.0], [1.0]))
    times = [a * b for a, b in zip(now, drift, strict=True)]
    new = run(tmp_path / "new.json", loss=case(times, [2 * b for b in drift]), added=case([1.0], [1.0]))
    assert compare.main([str(old), str(new)]) == status
    printed = capsys.readouterr().out
    assert printed.startswith(said) and "/ plain PyTorch" in printed
    assert "not measured any more: gone" in printed and "new: added" in printed


def test_compare_without_a_reference_and_without_a_common_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = {"group": "demo", "sides": {OURS: {"role": "ours", "seconds": [1.0]}}}
    slow = {"group": "demo", "sides": {OURS: {"role": "ours", "seconds": [2.0]}}}
    old, new = run(tmp_path / "old.json", demo=alone), run(tmp_path / "new.json", demo=slow)
    assert compare.main([str(old), str(new)]) == 1
    assert compare.main([str(old), str(new), "--tolerance", "1.5"]) == 0
    other = run(tmp_path / "other.json", another=alone)
    assert compare.main([str(old), str(other)]) == 2
    assert compare.main([str(old), str(tmp_path / "none.json")]) == 2
    assert "no timed case in common" in capsys.readouterr().err


def test_bars_are_met_or_missed_by_the_median_and_say_what_is_missing() -> None:
    bars = [
        {"over": OURS, "under": "fastest peer", "at_most": 1.0},
        {"over": OURS, "under": "fastest peer", "among": ["vLLM"], "at_most": 1.0},
        {"over": OURS, "under": "plain PyTorch", "at_most": 0.4},
    ]
    one = case([1.0, 1.0], [2.0, 2.0], bars=bars)
    one["sides"]["slow"] = {"role": "peer", "seconds": [9.0, 9.0]}
    rows = performance.Page({"cases": {"a case": one}}, None).bars("loss")
    assert rows == [
        ["a case", "plain PyTorch", "0.50 (0.50-0.50)", "1.00", "met"],
        ["a case", "vLLM", "not measured", "1.00", ""],
        ["a case", "plain PyTorch", "0.50 (0.50-0.50)", "0.40", "**missed**"],
    ]


def test_the_fraction_of_the_limit_counts_only_rows_that_are_worked_on() -> None:
    one = case([1.0], [2.0], zero=0.5)
    one["sides"]["three bare products"] = {"role": "limit", "seconds": [0.8]}
    rows = performance.Page({"cases": {"a case": one}}, None).fractions("loss")
    assert rows == [["a case", "three bare products, of the rows that count", "400 ms", "1.00 s", "0.40"]]


def test_decoding_is_limited_by_reading_where_that_takes_longer() -> None:
    rate = {"group": "limits", "sides": {"torch": {"role": "limit", "figures": {"GFLOP a second": 1.0}}}}
    one = case([1.0], [2.0], flop=0.25e9, bars=[{"over": OURS, "under": "plain PyTorch", "at_most": 0.4}])
    page = performance.Page({"cases": {"float32 multiply-adds": rate, "a case": one}}, None)
    assert page.fractions("loss") == [["a case", "multiply-adds", "250 ms", "1.00 s", "0.25"]]
    one["sides"][record.READING] = {"role": "reference", "seconds": [0.7, 0.5, 0.6]}
    assert page.fractions("loss") == [["a case", record.READING, "600 ms", "1.00 s", "0.60"]]
    assert page.asked("loss") == [["a case", "plain PyTorch", "800 ms", record.READING, "600 ms", "0.75"]]


def test_what_a_missed_bar_leaves_of_a_round() -> None:
    bars = [{"over": OURS, "under": "plain PyTorch", "at_most": 0.4}]
    one = case([1.0], [2.0], group="round", flop=0.4e9, bars=bars)
    one["sides"][OURS]["phases"] = {"rollout": 0.25}
    one["sides"][record.UPDATE_PRODUCTS] = {"role": "reference", "seconds": [0.5]}
    rate = {"group": "limits", "sides": {"torch": {"role": "limit", "figures": {"GFLOP a second": 1.0}}}}
    page = performance.Page({"cases": {"float32 multiply-adds": rate, "a round": one}}, None)
    assert page.left_of_a_round() == {
        "under": "plain PyTorch", "asked": "800 ms", "products": "500 ms", "drawn": "100 ms", "share": "0.75",
        "rollout": "250 ms", "left": "50.0 ms", "rest": "250 ms",
    }  # fmt: skip
    one["bars"][0]["at_most"] = 0.5
    assert page.left_of_a_round() == {}


def test_a_row_a_policy_of_waiting() -> None:
    cases = {
        name: {"group": "thread wait", "sides": {"active": {"role": "reference", "seconds": seconds}}}
        for name, seconds in {"alone": [0.3, 0.1, 0.2], "beside": [2.0, 1.0, 1.5]}.items()
    }
    rows = performance.Page({"cases": cases}, None).waits()
    assert rows == [["active", "0.200 (0.100-0.300)", "1.50 (1.00-2.00)"]]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.999999, "1.00"), (1234.5, "1,230"), (0.01234, "0.0123"), (99.96, "100")]
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert performance.significant(value) == text


@committed
def test_the_page_is_what_the_committed_results_make() -> None:
    assert performance.table([], "a", "b") == "Not measured yet."
    assert performance.render() == performance.PAGE.read_text(encoding="utf-8"), "run `make performance`"
    assert not re.search(r"\|---\|\n(?!\|)", performance.PAGE.read_text(encoding="utf-8")), "a table without rows"
    pictures = performance.Page(record.load(RUN), None).curves()
    assert pictures and all((ROOT / "docs" / path).is_file() for path in pictures.values())


@committed
def test_every_committed_case_has_what_the_page_shows() -> None:
    cases = record.load(RUN)["cases"]
    loss = [one for one in cases.values() if one["group"] == "loss"]
    assert {tuple(one["shape"]) for one in loss} == {(1024, 896, 32000), (2048, 576, 49152), (1536, 640, 40000)}
    for one in loss:
        every = set(one["sides"]) | set(one["missing"])
        assert every == set(peers.LOSS)
        assert all(side["error"] < 1e-5 for side in one["sides"].values() if side["role"] != "limit")


@committed
def test_every_operation_has_its_error_and_its_peak_in_the_same_row() -> None:
    for name, one in record.load(RUN)["cases"].items():
        if one["group"] not in ("loss", "logprobs", "sampling", "rows", "filters"):
            continue
        compared = {side: found for side, found in one["sides"].items() if found["role"] in ("ours", "peer")}
        assert all("error" in found for found in compared.values()), name
        if "at advantage 0" not in name and (one["group"] != "filters" or name.endswith("normal")):
            assert all("peak_mib" in found for found in compared.values()), name


@pytest.mark.parametrize("name", [*logit_rows.ROWS, *logit_rows.FILTERS])
def test_works_on_rows_compute_what_their_names_say(name: str) -> None:
    """Not those that compile, as below."""
    operation = {**logit_rows.ROWS, **logit_rows.FILTERS}[name]
    batch = operation.logits(16, 500 if name in logit_rows.ROWS else 2500)
    sides = {side: make for side, make in operation.works().items() if side != peers.COMPILED}
    works, missing, errors = peers.working(sides, batch, lambda found: operation.error(batch, found))
    assert len(works) == 2 and not missing and max(errors.values()) < 1e-5, (missing, errors)
    if operation.learned:
        assert operation.error(batch, torch.zeros_like(batch.z)) == 1


def test_all_sides_have_the_gradients_of_the_answer() -> None:
    """Those that compile take half a minute each, and are compared by `make bench` in the same row as their time."""
    batch = Batch(64, 16, 300, zero=0.5)
    assert (batch.advantages == 0).sum() == 16
    answer = batch.answer()
    eager = [OURS, peers.PLAIN, *([peers.TORCH] if hasattr(torch.nn.functional, "linear_cross_entropy") else [])]
    sides = {name: peers.LOSS[name] for name in [*eager, peers.TRL, peers.PRODUCTS]}
    works, missing, errors = peers.working(sides, batch, lambda _: batch.gradient_error(answer))
    assert not missing or list(missing) == [peers.TRL]
    assert set(errors) == set(works) - {peers.PRODUCTS}  # the limit has no gradients
    assert max(errors.values()) < 1e-6, errors
    reference = batch.hidden.detach().double().requires_grad_()
    logprobs = (reference @ batch.weight.detach().double().T).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    loss = -(batch.of_token.double() * logprobs).mean()
    loss.backward()
    assert reference.grad is not None
    torch.testing.assert_close(answer.hidden, reference.grad)
    torch.testing.assert_close(answer.loss, loss.detach())


def test_a_peer_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)

    def broken(batch: Batch) -> peers.Work:
        raise RuntimeError("no such kernel")

    sides = {peers.TRL: peers.trl_loss, "FlashInfer": peers.need_gpu("flashinfer", "flashinfer-python"), "x": broken}
    works, missing, errors = peers.working(sides, Batch(32, 8, 64))
    assert works == errors == {} and missing == {
        peers.TRL: "not installed: pip install trl", "x": "RuntimeError: no such kernel",
        "FlashInfer": "its kernels need a CUDA GPU (flashinfer-python)",
    }  # fmt: skip


def test_the_compiler_of_a_library(tmp_path: Path) -> None:
    library = tmp_path / "x.so"
    library.write_bytes(b"\x7fELF\0GCC: (Debian 12.2.0-14) 12.2.0\0")
    assert machine.compiler_of(library) == "GCC: (Debian 12.2.0-14) 12.2.0"
    library.write_bytes(b"\x7fELF")
    assert machine.compiler_of(library) is None


def test_the_page_says_what_decoders_were_and_whether_they_drew_the_same(tmp_path: Path) -> None:
    def of(same: bool) -> dict[str, Any]:
        figures = {"tokens a second": 9.0, "same greedy tokens": True}
        sides = {
            OURS: {"role": "ours", "seconds": [1.0], "version": "0.1.0", "figures": figures},
            "llama.cpp": {
                "role": "peer", "seconds": [1.0], "version": "0.3.9", "figures": {**figures, "same greedy tokens": same}
            },
        }  # fmt: skip
        return {"group": "decoding", "sides": sides, "missing": {}, "bars": [], "model": "1.3M", "shape": [1, 16, 64]}

    def told(same: bool) -> list[str]:
        path = run(tmp_path / f"{same}.json", decoding=of(same))
        return performance.Page(record.load(path), None).decoders()

    assert told(True) == [
        "All sides draw the same greedy tokens, so it is the same model that they run.", "Measured: llama.cpp 0.3.9.",
    ]  # fmt: skip
    assert told(False)[1].startswith("Other greedy tokens than ours: llama.cpp.")


def gpu_run(day: str, measurements: dict[str, Any]) -> dict[str, Any]:
    about = {"device": "NVIDIA H200", "dtype": "bfloat16", "versions": {}}
    return {"schema": 2, "date": day, "machine": about, "measurements": measurements}


def gpu_measurement(status: str, **ratios: float) -> dict[str, Any]:
    results = [
        {"case": case, "shape": "(1,)", "against": "a copy", "ours_ms": 1.0, "other_ms": ratio, "ratio": ratio}
        for case, ratio in ratios.items()
    ]
    return {"section": "rows", "status": status, "text": "", "seconds": 0.0, "results": results}


def test_an_older_gpu_run_adds_what_the_newer_one_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = {"a": gpu_measurement("done", twice=0.111, once=0.222), "b": gpu_measurement("crashed")}
    newer = {"a": gpu_measurement("done", twice=0.333), "c": gpu_measurement("failed")}
    for day, measurements in (("2026-01-01", older), ("2026-01-02", newer)):
        (tmp_path / f"nvidia-h200-{day}.json").write_text(json.dumps(gpu_run(day, measurements)))
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    new, _, old = performance.gpu_tables().partition("**NVIDIA H200, 2026-01-01**, what was not measured since")
    assert "0.333" in new and "0.333" not in old
    assert "0.222" in old and "0.111" not in new + old
    assert "Without a result: c: failed." in new and "Without a result: b: crashed." in old
