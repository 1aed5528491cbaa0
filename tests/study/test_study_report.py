# ruff: noqa: RUF001  (typographic signs are meant)
"""The study's report: what it says, what it leaves out, equal bytes for equal results, and a real browser."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")
pytest.importorskip("yaml")
pq = pytest.importorskip("pyarrow.parquet")
from browser import HOSTILE, Browser, Page  # noqa: E402
from simulated_study import make_study  # noqa: E402

from bandit_rft.study.analyse import analyse_study  # noqa: E402
from bandit_rft.study.designs import designs, planes, short  # noqa: E402
from bandit_rft.study.findings import baseline_finding, finding  # noqa: E402
from bandit_rft.study.plots import Forest, Mark, heat_map, signed  # noqa: E402
from bandit_rft.study.report import to_csv, write_study_report  # noqa: E402

FILES = {
    "report.html",
    "report.md",
    "results.csv",
    "results.parquet",
    "curves.csv",
    "costs.csv",
    "cells.csv",
    "timings.csv",
}
FAILED = "rollouts-n_16-models_llama_tiny-arithmetic-s0"
SMALL: dict[str, Any] = dict(
    levels={("rollouts", "n=8"): (0.05, 0.05, {"num_generations": 8, "batch_size": 32})},
    models=["m"], tasks=["a"], seeds=3, questions=20, evaluations=(0, 4), also={},
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    return make_study(folder, questions=100, problems={FAILED: "failed", FAILED.replace("s0", "s1"): "running"})


@pytest.fixture(scope="module")
def page(study: Path) -> Page:
    return Page(write_study_report(study).read_text(encoding="utf-8"))


def without_timings(text: str) -> str:
    stripped, count = re.subn(r"<!-- timings -->.*<!-- /timings -->", "", text, flags=re.DOTALL)
    assert count == 1
    return stripped


def test_files_and_tables_agree(study: Path, page: Page) -> None:
    folder = study / "report"
    assert {path.name for path in folder.iterdir()} == FILES
    rows = list(csv.DictReader((folder / "results.csv").open()))
    table = pq.read_table(folder / "results.parquet").to_pylist()
    assert len(rows) == len(table) == len(analyse_study(study).results)
    for row, stored in zip(rows, table, strict=True):
        assert row["level"] == stored["level"]
        assert row["gain"] == "" or float(row["gain"]) == stored["gain"]
    cells = {row["id"]: row for row in csv.DictReader((folder / "cells.csv").open())}
    assert len(cells) == 220 and cells[FAILED]["used"] == "False" and cells[FAILED]["status"] == "failed"
    assert to_csv([{"a": float("nan"), "b": -0.0}, {"c": None, "b": float("inf")}]) == "a,b,c\n,0,\n,inf,\n"


def test_unfinished_cells_are_on_the_page(study: Path, page: Page) -> None:
    markdown = (study / "report" / "report.md").read_text()
    assert "2 of 220 cells are not in the results: 1 failed, 1 running." in page.text
    assert FAILED in page.text and "RuntimeError: <b>out of memory</b>" in page.text
    assert "&lt;b&gt;out of memory&lt;/b&gt;" in markdown and "<b>" not in markdown
    assert "rest on fewer seeds or conditions than planned" in page.text and "rest on fewer" in markdown


def test_sentences_say_what_the_intervals_support(study: Path, page: Page) -> None:
    analysis = analyse_study(study)
    sentence = finding(analysis, "trade-off")
    row = analysis.row(("trade-off", "(128, 2)"))
    assert row is not None and row["p_holm"] <= 0.05
    interval = f"({signed(row['gain'])} [{signed(row['low'])}, {signed(row['high'])}])"
    assert sentence.startswith(f"(128, 2) {interval} is below the baseline; no difference is shown for the other 3 (")
    others = [r for v in analysis.study.levels if v[0] == "trade-off" and (r := analysis.row(v)) and r["p_holm"] > 0.05]
    ends = min(r["low"] for r in others), max(r["high"] for r in others)
    assert sentence.endswith(f"(their intervals lie between {signed(ends[0])} and {signed(ends[1])}).")
    assert finding(analysis, "advantage").startswith(
        "no difference is shown for its one level (its interval lies between"
    )
    assert re.fullmatch(
        r"train Pass@1 rose from 0\.\d{3} to .*; test Pass@1 rose from .*\.", baseline_finding(analysis)
    )
    for factor in ("advantage", "rollouts", "batch", "trade-off", "replay"):
        assert page.text.count(finding(analysis, factor)) == 1
    assert page.text.count(baseline_finding(analysis)) == 1


def test_sentences_where_little_is_known(tmp_path: Path) -> None:
    one = make_study(tmp_path / "one", **{**SMALL, "seeds": 1})
    assert finding(analyse_study(one), "rollouts") == "no interval can be given: that takes two seeds or more."
    assert "(one seed: no interval)" in baseline_finding(analyse_study(one))
    assert "With one seed no interval can be given" in Page(write_study_report(one).read_text()).text
    statuses = {f"{kind}-m-a-s{s}": "running" for kind in ("rollouts-n_8", "baseline-baseline") for s in range(3)}
    none = make_study(tmp_path / "none", **SMALL, problems=statuses)
    assert finding(analyse_study(none), "rollouts").startswith("nothing can be said")
    assert baseline_finding(analyse_study(none)) == "nothing can be said: no baseline cell has finished."
    text = Page(write_study_report(none).read_text()).text
    assert "0 of 6 cells used" in text and "not measured" in text


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    folder = make_study(tmp_path, **{**SMALL, "tasks": ["a", "b"]}, problems={"rollouts-n_8-m-a-s0": "failed"})
    before = {p.name: p.read_bytes() for p in write_study_report(folder).parent.iterdir()}
    again = {p.name: p.read_bytes() for p in write_study_report(folder).parent.iterdir()}
    assert before == again
    # the same study run elsewhere: other clocks, another host, more attempts
    for path in (folder / "cells").glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        slower = [{k: v * 1.7 if k.startswith("seconds/") else v for k, v in line.items()} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in slower))
    for path in (folder / "cells").glob("*/cell.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "attempts": 4, "seconds": 99.0, "host": "there"}))
    after = {p.name: p.read_bytes() for p in write_study_report(folder).parent.iterdir()}
    assert {name for name in FILES if before[name] != after[name]} == {"report.html", "report.md", "timings.csv"}
    for name in ("report.html", "report.md"):
        texts = [content[name].decode() for content in (before, after)]
        assert without_timings(texts[0]) == without_timings(texts[1])


def test_self_contained_and_policy_allows_only_its_own_code(study: Path, page: Page) -> None:
    text = (study / "report" / "report.html").read_text()
    attributes = [(name, value or "") for _, attrs in page.elements for name, value in attrs.items()]
    assert all(not value.startswith(("http", "//")) for name, value in attributes if name in ("src", "href"))
    assert not [name for name, _ in attributes if name == "style" or name.startswith("on")]
    policy = next(dict(a)["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a) or ""
    assert "default-src 'none'" in policy
    for block in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.blocks[block].encode()).digest()).decode()
        assert f"{block}-src 'sha256-{digest}'" in policy
    assert str(study) not in text and "/tmp" not in text


def test_markdown_tables_hold_whatever_a_name_holds(tmp_path: Path) -> None:
    folder = make_study(tmp_path, **SMALL, hostile="|<i>`*_\n# x\\")
    markdown = (write_study_report(folder).parent / "report.md").read_text()
    body = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<i>" not in body and "\n# x" not in body
    tables = re.findall(r"(?:^\|.*\|\n)+", body, flags=re.MULTILINE)
    assert len(tables) >= 5
    for table in tables:
        columns = {len(re.findall(r"(?<!\\)\|", line.replace("\\\\", ""))) for line in table.splitlines()}
        assert len(columns) == 1


def test_plane_and_replay(study: Path, page: Page) -> None:
    analysis = analyse_study(study)
    found, base = designs(analysis.study)
    assert base["advantage"] == "reward" and "output_dir" not in base
    (plane, replays) = planes(found)
    assert set(plane) == {(32, 8), (32, 16), (64, 8), (16, 16), (64, 4), (128, 2)}
    assert set(replays) == {(64, 4), (128, 2), (256, 1)} and all(found[v].replays for v in replays.values())
    assert found["rollouts", "n=8"].changes == {"advantage": "group_norm", "num_generations": 8}
    assert "B = 128" in page.text and "n = 16" in page.text
    assert "Replay against the same batch and rollouts without it" in page.text
    assert "replay=(128, 2)" in page.text and "trade-off=(128, 2)" in page.text and "replay=(256, 1)" not in page.text
    assert short("/somewhere/models/x") == "x" and short("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"


def test_plots_stay_in_their_boxes() -> None:
    forest = Forest([(-0.1, 0.05), (float("nan"), float("nan"))])
    drawn = forest.row(
        [Mark("test", 0, -0.1, 0.0, 0.05, True), Mark("train", 1, float("nan"), 0.01, float("nan"), False)]
    )
    places = [float(x) for x in re.findall(r' (?:x|x1|x2|cx)="([^"]+)"', drawn)]
    assert places and all(0 <= x <= 380 for x in places)
    assert 'class="mark s0"' in drawn and 'class="mark s1 open"' in drawn and drawn.count("interval") == 1
    assert "+0.010 [–, –]" in drawn and Forest([]).axis().count("<text") > 1
    heat = heat_map("gain", [1, 2], [4], {(1, 4): (0.1, 0.05, 0.15), (2, 4): (-0.05, -0.2, 0.1)}, ("B", "n"))
    assert heat.count('class="more"') == 1 and heat.count('class="less"') == 1 and "−0.050" in heat
    assert 'class="blank"' in heat_map("gain", [1, 2], [4], {(1, 4): (0.0, 0.0, 0.0)}, ("B", "n"))


def test_output_elsewhere_and_missing_folder(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "study", **SMALL)
    assert write_study_report(folder, tmp_path / "a" / "b") == tmp_path / "a" / "b" / "report.html"
    assert not (folder / "report").exists()
    with pytest.raises(FileNotFoundError, match="holds no plan"):
        write_study_report(tmp_path)


# ---- in a real browser -----------------------------------------------------------------------------------------------


def test_hostile_names_do_nothing_in_a_browser(tmp_path: Path, browser: Browser) -> None:
    folder = make_study(tmp_path, **SMALL, hostile="".join(HOSTILE), problems={"rollouts-n_8-m-a-s0": "failed"})
    record = folder / "cells" / "rollouts-n_8-m-a-s0" / "cell.json"
    record.write_text(json.dumps({"status": HOSTILE[0], "error": HOSTILE[1]}))
    browser.open(write_study_report(folder))
    assert browser.run("return typeof window.pwned") == "undefined"
    assert browser.run("return document.querySelectorAll('img, a, iframe, pre *').length") == 0
    assert HOSTILE[0] in browser.run("return document.body.innerText")
    fetched = "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))"
    assert browser.run(fetched) == []
    assert [m for m in browser.log() if m["level"] in ("SEVERE", "WARNING")] == []


@pytest.mark.parametrize("width", [360, 1200])
def test_no_console_error_and_no_sideways_scroll(study: Path, browser: Browser, width: int) -> None:
    browser.call("POST", "/window/rect", {"width": width, "height": 900})
    browser.open(write_study_report(study))
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth") is True
    small = (
        "return [...document.querySelectorAll('svg.forest')].filter(s => s.getBoundingClientRect().width < 120).length"
    )
    assert browser.run(small) == 0
    readout = browser.run("""
        const svg = document.querySelector('svg.chart'); svg.focus();
        svg.dispatchEvent(new KeyboardEvent('keydown', { key: 'End' }));
        return document.querySelector('.readout').textContent""")
    assert readout.startswith("round 20: 8 rollouts, train on 1 0.") and "baseline 0." in readout
    assert [m for m in browser.log() if m["level"] in ("SEVERE", "WARNING")] == []
