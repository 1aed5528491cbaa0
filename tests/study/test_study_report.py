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

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("yaml")
pq = pytest.importorskip("pyarrow.parquet")
from browser import HARD_TO_READ, HOSTILE, Browser, Page  # noqa: E402
from simulated_study import make_study  # noqa: E402

from bandit_rft.report.figures import Charts  # noqa: E402
from bandit_rft.study.analyse import analyse_study  # noqa: E402
from bandit_rft.study.cells import BASELINE, short  # noqa: E402
from bandit_rft.study.designs import designs, planes  # noqa: E402
from bandit_rft.study.figures import curves, forests, maps  # noqa: E402
from bandit_rft.study.findings import baseline_finding, distinct, finding, recommend  # noqa: E402
from bandit_rft.study.pairing import ALL  # noqa: E402
from bandit_rft.study.plots import Forest, Mark, heat_map, signed  # noqa: E402
from bandit_rft.study.points import Pairs, detectable, simultaneous  # noqa: E402
from bandit_rft.study.report import to_csv, write_study_report  # noqa: E402
from bandit_rft.study.tables import Tables  # noqa: E402

FILES = {
    "report.html",
    "report.md",
    "results.csv",
    "results.parquet",
    "curves.csv",
    "costs.csv",
    "cells.csv",
    "timings.csv",
    "cells.npz",
    "clocks.csv",
}
CLOCKED = {"report.html", "report.md", "timings.csv", "clocks.csv"}
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
    page = Page(write_study_report(one).read_text()).text
    assert "With one seed no interval can be given" in page and "· 1 seed ·" in page
    # two seeds were planned: that it takes two is no news, which of them are missing is
    for number, missing in enumerate((["baseline-baseline"], ["rollouts-n_8", "baseline-baseline"], ["rollouts-n_8"])):
        problems = {f"{kind}-m-a-s1": "running" for kind in missing}
        two = make_study(tmp_path / f"two{number}", **{**SMALL, "seeds": 2}, problems=problems)
        text = Page(write_study_report(two).read_text()).text + (two / "report" / "report.md").read_text()
        assert "two seeds or more" not in text and "With one seed" not in text
        assert finding(analyse_study(two), "rollouts") == (
            "no interval can be given yet: of 2 seeds one alone is finished both here and for the baseline."
        )
        assert ("one of 2 seeds so far" in baseline_finding(analyse_study(two))) == ("baseline-baseline" in missing)
    apart = make_study(
        tmp_path / "apart", **{**SMALL, "seeds": 2, "models": ("m", "n")},
        problems={"rollouts-n_8-m-a-s0": "running", "rollouts-n_8-n-a-s1": "running"},
    )  # fmt: skip
    assert "no seed is finished for all models and tasks" in finding(analyse_study(apart), "rollouts")
    whole = make_study(tmp_path / "whole", **{**SMALL, "seeds": 2})
    assert "no interval" not in finding(analyse_study(whole), "rollouts") + baseline_finding(analyse_study(whole))
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
    assert {name for name in FILES if before[name] != after[name]} == CLOCKED
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


def test_recommendation_first_with_its_uncertainty(study: Path, page: Page) -> None:
    analysis = analyse_study(study)
    advice = recommend(analysis)
    low = analysis.row(("trade-off", "(128, 2)"))
    assert low is not None and advice.counts["test"][1] >= 1
    assert advice.words.startswith("So far: ")  # two cells are missing
    text = " ".join(advice.sentences)
    assert f"trade-off (128, 2) {signed(low['gain'])}" in text and "Avoid" in text
    assert "compared at once [" in text and "times the tokens generated" in text and "80% power" in text
    assert page.text.index(advice.words) < page.text.index("What the intervals support")
    assert all(sentence in page.text for sentence in advice.sentences)
    assert advice.sentences[0].replace("[", "\\[")[:40] in (study / "report" / "report.md").read_text()


@pytest.mark.parametrize(("gain", "words"), [(0.4, "Use rollouts n=8"), (0.0, "Keep the baseline")])
def test_recommendation_follows_the_corrected_test(tmp_path: Path, gain: float, words: str) -> None:
    levels = {("rollouts", "n=8"): (gain, gain, {"num_generations": 8, "batch_size": 32})}
    folder = make_study(tmp_path, **{**SMALL, "levels": levels, "seeds": 6, "questions": 200})
    analysis = analyse_study(folder)
    advice = recommend(analysis)
    assert advice.words == words
    row = analysis.row(("rollouts", "n=8"))
    assert row is not None and advice.detectable == pytest.approx(detectable(row))
    assert advice.counts["test"] == (int(gain > 0), 0, 1)


def test_intervals_for_all_at_once_agree_with_the_correction(study: Path) -> None:
    analysis = analyse_study(study)
    for level in distinct(analysis):
        row = analysis.row(level)
        assert row is not None
        low, high = simultaneous(row)
        assert low < row["low"] < row["high"] < high  # wider than the interval of one comparison
        if low > 0 or high < 0:
            assert row["p_holm"] <= 0.05
        assert (low > 0 or high < 0) == (row["p"] * row["family"] <= 0.05)
        assert detectable(row) > row["minimum_detectable"]
    assert simultaneous({"simultaneous_low": -1.0, "simultaneous_high": 2.0}) == (-1.0, 2.0)  # the analysis' own


def test_seeds_behind_a_gain_average_to_it(study: Path) -> None:
    analysis = analyse_study(study)
    pairs = Pairs(analysis.study)
    for level in distinct(analysis):
        for split in ("train", "test"):
            row = analysis.row(level, "final", split)
            gains = pairs.gains(level, split, analysis.study.conditions)
            assert row is not None and len(gains) == row["seeds"]
            assert sum(gains) / len(gains) == pytest.approx(row["gain"], abs=1e-6)
            curve = pairs.curve(level, split, analysis.study.conditions)
            assert curve is not None and curve.marks == [0, 10, 20]
            assert (curve.low <= curve.level + 1e-9).all() and (curve.high >= curve.level - 1e-9).all()
            assert curve.level[-1] - curve.baseline[-1] == pytest.approx(row["gain"], abs=1e-6)
            assert curve.seeds.shape == (row["seeds"], 3)


def test_one_row_a_configuration_and_one_scale(study: Path, page: Page) -> None:
    tables = Tables(analyse_study(study))
    plots = forests(tables, Pairs(tables.study))
    names = [(factor, row.name) for factor, rows in plots[0].factors.items() for row in rows]
    assert names[0] == ("", "the baseline") and len(names) == 11 and len(set(names)) == 11
    eight = next(row for row in plots[0].factors["rollouts"] if row.name == "n=8")
    assert eight.also == "batch B=32, trade-off (32, 8)"
    assert eight.svg.count('class="wide') == 2 and eight.svg.count('class="points') == 2
    assert eight.svg.count("h0") == 10  # five seeds, test and train
    assert len(plots) == 1 + 4 and "gain in final Pass@1 over the baseline" in plots[0].axis
    charts = Charts()
    drawn = curves(tables, Pairs(tables.study), charts)
    scales = {
        tuple(re.findall(r'<text class="tick" x="44" y="([\d.]+)"[^>]*>([\d.]+)<', figure.svg))
        for panels in drawn.factors.values() for panel in panels for figure in panel.figures
    }  # fmt: skip
    assert len(scales) == 1 and "0" in [text for _, text in scales.pop()]
    assert len(charts.hover) == 2 * 10


def test_tokens_stand_beside_the_gains(study: Path) -> None:
    analysis = analyse_study(study)
    head, rows = Tables(analysis).endpoints()
    assert head[-1] == "tokens generated a run" and {len(row) for row in rows} == {len(head)}
    spent = {
        (row["factor"], row["level"]): row["tokens_generated"]
        for row in analysis.costs
        if row["model"] == row["task"] == ALL
    }
    for row in rows:
        factor, level, tokens = row[0], str(row[1]).split(" (also")[0], row[-1]
        assert isinstance(tokens, str)
        assert float(tokens.replace(",", "")) == pytest.approx(spent[str(factor), level], rel=1e-3)


def test_the_plane_has_its_column_n_1_and_a_key(study: Path, page: Page) -> None:
    tables = Tables(analyse_study(study))
    plain, replays = tables.planes
    assert tables.whole(plain)[32, 1] == ("baseline", "baseline") and tables.whole(replays) is replays
    first, second = maps(tables)
    assert "n = 1<" in first.svg and "the baseline" in first.svg and "the baseline" not in second.svg
    assert first.svg.count('class="swatch') == 5 and "not shown" in first.svg


def test_no_deep_colour_where_no_difference_is_shown() -> None:
    cells = {(1, 1): (0.30, -0.01, 0.61), (2, 1): (0.05, 0.01, 0.09), (4, 1): (-0.02, -0.03, -0.01)}
    drawn = heat_map("gain", [1, 2, 4], [1], cells, ("B", "n"))
    opacity = {
        (kind, float(value))
        for kind, value in re.findall(r'<rect class="(more|less)"[^>]*fill-opacity="([.\d]+)"', drawn)
    }
    assert opacity == {("more", 0.04), ("more", 0.5), ("less", 0.27)}
    drawn_after = heat_map("gain", [1, 2, 4], [1], cells, ("B", "n"), shown=[])
    assert set(re.findall(r'fill-opacity="([.\d]+)"', drawn_after)) == {"0.04"}  # none after the correction
    assert "+0.050" in drawn and ">+0.025<" in drawn  # the key: the strongest difference that is shown, and half of it


def test_intervals_beyond_the_scale_end_in_an_arrow() -> None:
    forest = Forest([(-0.1, 0.1)], [(-4.0, 4.0)])
    drawn = forest.row([Mark("test", 0, -0.1, 0.0, 0.1, False, (-4.0, 0.12))])
    assert forest.high < 0.2 and "l-4 3l4 3" in drawn and drawn.count("v6") == 1
    places = [float(x) for x in re.findall(r"[MH](-?[\d.]+)", drawn)]
    assert all(0 <= x <= 380 for x in places)


def test_every_section_says_when_it_is_empty(tmp_path: Path) -> None:
    statuses = {f"{kind}-m-a-s{s}": "running" for kind in ("rollouts-n_8", "baseline-baseline") for s in range(3)}
    folder = make_study(tmp_path, **SMALL, problems=statuses)
    page = Page(write_study_report(folder).read_text())
    for words in (
        "Nothing can be recommended yet", "no baseline cell has finished", "No evaluation is common",
        "No three levels differ", "No finished level has a finished baseline beside it.", "No cell has finished.",
    ):  # fmt: skip
        assert words in page.text
    ids = [a["id"] for tag, a in page.elements if tag == "section" and "id" in a]
    goto = [a["data-goto"] for tag, a in page.elements if "data-goto" in a]
    assert set(goto) <= set(ids) and len(goto) == len(set(goto)) == 12
    whole = make_study(tmp_path / "whole", **SMALL)
    assert "None: every planned cell is used." in Page(write_study_report(whole).read_text()).text


def test_two_seeds_are_not_told_that_two_are_needed(tmp_path: Path) -> None:
    folder = make_study(tmp_path, **{**SMALL, "seeds": 2})
    analysis = analyse_study(folder)
    for row in analysis.results:
        row["p_holm"] = float("nan")  # as where nothing varies but the gain is not 0
    assert finding(analysis, "rollouts") == "no interval can be given: the differences do not vary at all."


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
    browser.resize(width)
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


@pytest.mark.parametrize("width", [390, 500, 768, 1400])
def test_nothing_is_cut(study: Path, browser: Browser, width: int) -> None:
    browser.resize(width)
    browser.open(write_study_report(study))
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    clipped = """return [...document.querySelectorAll('main, .level, .answer, table, .scroll')]
        .filter(e => e.scrollWidth > e.clientWidth + 1)
        .map(e => e.className + ' in ' + e.parentElement.className)"""
    assert browser.run(clipped) == []
    outside = """return [...document.querySelectorAll('svg, td, th, p')].filter(e => {
        const box = e.getBoundingClientRect();
        return box.width && (box.left < 0 || box.right > document.documentElement.clientWidth);
    }).map(e => e.tagName + ' ' + e.textContent.slice(0, 40))"""
    assert browser.run(outside) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_legible(study: Path, browser: Browser, scheme: str) -> None:
    browser.scheme(scheme)
    browser.open(write_study_report(study))
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    shade = browser.run("return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]")
    assert (int(shade) < 64) == (scheme == "dark")
    assert browser.run(HARD_TO_READ) == []
    assert browser.run(HARD_TO_READ.replace("? 3 : 4.5", "? 21.1 : 21.1"))  # it finds texts at all


EIGHT = ("rollouts", "n=8")


def test_curves_at_equal_tokens_are_over_tokens(tmp_path: Path) -> None:
    """Runs were evaluated wherever their tokens ended: no round but the first is common to all."""
    folder = make_study(tmp_path, levels={EIGHT: (0.05, 0.05, {"num_generations": 8})}, seeds=3, rule="tokens")
    text = (folder / "study.yaml").read_text()
    (folder / "study.yaml").write_text(re.sub(r"amount: \d+", f"amount: {20 * 32 * 12}", text))
    analysis = analyse_study(folder)
    study = analysis.study
    ends = [[(0.0, 0.1), (100.0, 0.2), (7700.0, 0.3)], [(0.0, 0.2), (90.0, 0.4), (7680.0, 0.5)]]
    assert study.axis == "tokens" and study.marks(ends) == [0, 1920, 3840, 5760, 7680]
    assert study.marks([*ends, [(0.0, 0.1), (6000.0, 0.3)]]) == [0, 1920, 3840, 5760]
    assert study.marks([*ends, []]) == study.marks([]) == []

    def drawn(place: tuple[str, str]) -> dict[int, float]:
        wanted = (*place, "test", ALL)
        rows = [r for r in analysis.curves if (r["factor"], r["level"], r["split"], r["model"]) == wanted]
        return {row["tokens"]: row["value"] for row in rows}

    base, wide = drawn(BASELINE), drawn(EIGHT)
    assert list(base) == list(wide) == [0, 1920, 3840, 5760, 7680]
    runs = [c for c in study.cells if EIGHT in c.places]
    at_0, at_10 = (np.mean([run.curves["test"][i][1] for run in runs]) for i in (0, 1))
    assert runs[0].curves["test"][1][0] == 10 * 8 * 32 * 12  # eight rollouts a query: an eighth of the way
    assert wide[3840] == pytest.approx(at_0 + (at_10 - at_0) / 8)
    curve = Pairs(study).curve(EIGHT, "test", study.conditions)
    assert curve is not None and curve.marks == list(base)
    assert curve.baseline == pytest.approx(list(base.values())) and curve.level == pytest.approx(list(wide.values()))
    page = write_study_report(folder).read_text()
    assert "tokens \u2192" in page and "round \u2192" not in page and re.search('"axis": ?"tokens"', page)
