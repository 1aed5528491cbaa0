# ruff: noqa: RUF001  (text that looks like other text is what is tested)
"""The HTML report: synthetic run folders of every state, and a real browser where one is installed."""

import base64
import hashlib
import json
import math
import random
import re
import shutil
import time
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow")
pytest.importorskip("yaml")
import pyarrow.parquet as pq  # noqa: E402
from browser import HOSTILE, Browser, Page  # noqa: E402
from simulated_run import make_run, write_rollouts  # noqa: E402

from bandit_rft.report import write_report  # noqa: E402
from bandit_rft.report.load import MAX_ROLLOUTS, evenly, load_run  # noqa: E402
from bandit_rft.report.plot import Line, chart, number, ticks  # noqa: E402
from bandit_rft.report.stats import difference_interval, downsample, smooth, wilson  # noqa: E402
from bandit_rft.report.text import embed_json, html, visible  # noqa: E402


def report(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_wilson_and_difference_against_published_values() -> None:
    low, high = wilson(81 / 263, 263)  # Newcombe 1998, Statistics in Medicine 17, 857-872, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0.0, 20).low == 0 and round(wilson(0.0, 20).high, 4) == 0.1611
    assert wilson(1.0, 29).high == 1
    old, new = (
        wilson(48 / 80, 80),
        wilson(56 / 70, 70),
    )  # Newcombe 1998, 17, 873-890, table II: 56/70 - 48/80, method 10
    low, high = difference_interval(48 / 80, old, 56 / 70, new)
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)


def test_downsample_and_smooth() -> None:
    buckets, size = downsample([(i, float(i % 2)) for i in range(10_000)], 240)
    assert (
        size == 42
        and len(buckets) == 239
        and sum(b.mean for b in buckets) / len(buckets) == pytest.approx(0.5, abs=0.01)
    )
    assert all((b.low, b.high) == (0, 1) for b in buckets)
    assert downsample([], 240) == ([], 1)
    assert smooth([0, 3, 0, 3, 0], 3) == pytest.approx([1.5, 1, 2, 1, 1.5])
    assert evenly(10, 4) == [0, 3, 6, 9] and evenly(3, 9) == [0, 1, 2]


def test_numbers_and_ticks() -> None:
    assert [number(x) for x in (0, 0.38, 1234567, -0.5, 2.5e-7, 1e-4)] == [
        "0",
        "0.38",
        "1,234,567",
        "−0.5",
        "2.5e−7",
        "1e−4",
    ]
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0, 10_000) == [0, 2000, 4000, 6000, 8000, 10_000]


@pytest.mark.parametrize("ys", [[], [1.0], [0.0, 0.0], [-3.0, 5.0], [1e-9, 1e9], [1e99, -1e99], [5e-324, 1e-320]])
@pytest.mark.parametrize("log", [False, True])
def test_chart_stays_inside_its_box(ys: list[float], log: bool) -> None:
    svg = chart("label", [Line("a", [float(i) for i in range(len(ys))], ys, low=ys, high=ys)], log=log).svg
    assert "nan" not in svg and "inf" not in svg
    for points in re.findall(r'points="([^"]*)"', svg):
        for x, y in (map(float, p.split(",")) for p in points.split()):
            assert 0 <= x <= 500 and 0 <= y <= 270


def test_visible_and_escaped() -> None:
    assert visible("a\x00b\x07\x7f\u202e\u200b\ud800\t\n") == "a⟦U+0000⟧b⟦U+0007⟧⟦U+007F⟧⟦U+202E⟧⟦U+200B⟧⟦U+D800⟧\t\n"
    assert visible("🧑\u200d🔬 مرحبا") == "🧑\u200d🔬 مرحبا"  # the joiner is part of the emoji
    assert visible("x" * 10, 4) == "xxxx\n⟦6 more characters⟧" and visible(None) == ""
    assert html("<b a='\"'>&") == "&lt;b a=&#x27;&quot;&#x27;&gt;&amp;"
    for text in HOSTILE:
        packed = embed_json([text])
        assert json.loads(packed) == [text] and not re.search("[<>&\u2028\u2029]", packed)


def test_page_answers_the_three_questions(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run"))
    assert "demo-1M on arithmetic" in page.text and "40 rounds, finished" in page.text
    assert page.text.count("Yes.") == 2 and "Train Pass@1 on 200 questions, round 0 to 40." in page.text
    assert "0.350 → 0.840" in page.text and "0.340 → 0.815" in page.text  # train, test; made by make_run
    assert "28,000 tokens generated" in page.text
    assert "A loss near 0 is normal here." in page.text
    assert "95% interval (Wilson for 0/1 rewards)" in page.text
    low, high = wilson(0.84, 200)
    band = page.blocks["chart-data"]
    assert f"0.84 [{number(low)}, {number(high)}]" in band
    assert "gained" in page.text and "longer question" in page.text
    run = load_run(tmp_path / "run")
    counts = run.pair_counts["train"]
    assert sum(counts.values()) == 200 and counts["gained"] - counts["lost"] == 168 - 70


def test_ledger_adds_up(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run"))
    # 40 rounds x 0.22 s, and 5 evaluations of 0.9 s; the one of round 0 has no seconds/round and still counts.
    spent = sum(max(0.22 * bool(r), 0.21 * bool(r) + 0.9 * (r % 10 == 0)) for r in range(41))
    assert f"{number(spent)} s" in page.text
    for kind in ("generated", "scored", "trained", "skipped"):
        assert kind in page.text
    assert f"{number(28_000 / (40 * 0.12))} / s of rollout" in page.text


def test_self_contained_and_policy_allows_only_its_own_code(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", hostile=True)
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    policy = next(
        a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    for block, directive in (("script", "script-src"), ("style", "style-src")):
        digest = base64.b64encode(hashlib.sha256(page.blocks[block].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in (policy or "")
    assert (policy or "").startswith("default-src 'none'") and "unsafe" not in (policy or "")
    assert sum(tag == "script" for tag, _ in page.elements) == 3
    for tag, attributes in page.elements:
        assert tag not in ("img", "a", "iframe", "object", "form")
        assert not [a for a in attributes if a.startswith("on") or a in ("src", "style")], (tag, attributes)
        assert attributes.get("href") in (None, "data:,")
    assert "http://" not in text and "https://" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    stored = json.loads(page.blocks["rollout-data"])
    assert {visible(t) for t in HOSTILE} <= {row["completion"] for row in stored}


def test_run_in_progress(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=25, max_rounds=200)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"round": 26, "rewa')
    (folder / "rollouts" / "round-000026.parquet").write_bytes(b"PAR1 half")
    (folder / "rollouts" / "round-000027.parquet.tmp").write_bytes(b"")
    (folder / "evaluations" / "round-000030-test.parquet").write_bytes(b"")
    page = report(folder)
    assert "round 25 of 200: in progress" in page.text
    assert (
        "half written and is left out" in page.text and "The last line of metrics.jsonl was half written" in page.text
    )
    assert "Yes." in page.text


def test_strange_metrics(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=5, skip=("kl",))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("not json\n[1]\n")
        file.write('{"round": 6, "loss": NaN, "entropy": Infinity, "reward": null, "grad_norm": "x", "kl": true}\n')
        file.write('{"round": 7, "loss": 1e400, "reward": 0.5, "eval/<b>/pass@1": 0.5}\n{"round": 7, "reward": 0.75}\n')
        file.write('{"round": 8, "reward": ' + "9" * 400 + "}\n")
    page = report(folder)
    assert "2 unreadable line(s)" in page.text and "4 metric value(s) are NaN" in page.text
    assert "1 round(s) were logged more than once" in page.text
    assert "Not logged in this run: KL to the initial model" in page.text
    assert not any(tag == "b" for tag, _ in page.elements)
    assert load_run(folder).series("reward")[-1] == (7, 0.75)


def test_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("max_rounds: 100\n")
    page = report(tmp_path)
    assert "No round and no evaluation has been logged yet" in page.text and "No rollouts are stored yet" in page.text
    assert page.text.count("–") >= 3 and "round 0 of 100" in page.text
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("a: [broken\n  </pre><script>x</script>")
    page = report(tmp_path)
    assert "not valid YAML" in page.text and "</pre><script>x</script>" in page.text


def test_single_evaluation_and_no_parquet(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=0)
    assert "No second evaluation of an unseen split so far." in report(folder).text
    folder = make_run(tmp_path / "other", rounds=20, rollout_rounds=0)
    shutil.rmtree(folder / "evaluations")
    page = report(folder)
    assert "No interval: the number of questions is not stored." in page.text and "there is no band" in page.text


def test_rewards_that_are_not_binary_get_no_binomial_interval(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=10)
    for path in (folder / "evaluations").glob("*-test.parquet"):
        table = pq.read_table(path)
        scores = pa.array([0.25 if q % 2 else 0.75 for q in range(table.num_rows)])
        pq.write_table(table.set_column(table.column_names.index("reward"), "reward", scores), path)
    interval = load_run(folder).interval(10, "test", 0.5)
    deviation = math.sqrt(200 / 199) * 0.25
    assert interval == pytest.approx((0.5 - 1.96 * deviation / 200**0.5, 0.5 + 1.96 * deviation / 200**0.5), abs=1e-5)


def test_interval_counts_questions_not_rows(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=10)
    path = folder / "evaluations" / "round-000010-test.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0]["reward"] = None  # could not be scored: counts as 0, as in Pass@1
    more = [row | {"sample": sample, "completion": "other", "reward": 1.0} for row in rows for sample in (1, -1)]
    pq.write_table(pa.Table.from_pylist(more + rows), path)
    run = load_run(folder)
    assert run.evaluations[10, "test"].questions == 200 and run.evaluations[10, "test"].binary
    assert not any(pair.after == "other" for pair in run.pairs)


def test_ten_thousand_rounds_are_downsampled_and_it_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=10_000, every=1000, rollout_rounds=0)
    write_rollouts(folder, 1, random.Random(1))
    for round_ in range(2, 301):
        shutil.copy(folder / "rollouts" / "round-000001.parquet", folder / "rollouts" / f"round-{round_:06d}.parquet")
    started = time.perf_counter()
    page = report(folder)
    assert time.perf_counter() - started < 20
    assert "10,000 rounds drawn as 239 points: each is the mean of 42 rounds in a row" in page.text
    assert "rollouts from 12 of 300 rounds: the first, the last and rounds evenly between" in page.text
    assert len(json.loads(page.blocks["rollout-data"])) <= MAX_ROLLOUTS
    assert (folder / "report.html").stat().st_size < 3e6


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run_folder: .* is not a folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"neither config.yaml nor metrics.jsonl"):
        write_report(tmp_path)
    folder = make_run(tmp_path / "run", rounds=1)
    with pytest.raises(FileNotFoundError, match="output: "):
        write_report(folder, tmp_path / "nowhere" / "report.html")
    assert write_report(str(folder), tmp_path / "elsewhere.html") == tmp_path / "elsewhere.html"
    assert not list(folder.glob(".report*")) and not (folder / "report.html").exists()


# ---- in a real browser -----------------------------------------------------------------------------------------------


FILTERED = """
    const set = (id, value) => { 
        const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event('input')); };
    %s
    return [document.getElementById('shown').textContent,
            [...document.querySelectorAll('tr.row')].map(r => [...r.cells].map(c => c.textContent))];
"""


def test_hostile_text_does_nothing_in_a_browser(tmp_path: Path, browser: Browser) -> None:
    browser.open(write_report(make_run(tmp_path / "run", rounds=20, hostile=True)))
    for row in range(20):  # open every rollout of the first page, so that prompt and completion are on it
        browser.run(f"document.querySelectorAll('tr.row .opener')[{row}].click()")
    assert browser.run("return document.querySelectorAll('tr.more').length") == 20
    assert browser.run("return typeof window.pwned") == "undefined"
    assert browser.run("return document.querySelectorAll('img, a, iframe, pre *, td svg').length") == 0
    shown = browser.run("return [...document.querySelectorAll('tr.more pre')].map(p => p.textContent)")
    assert {visible(t) or "⟦empty⟧" for t in HOSTILE} <= set(shown)
    fetched = "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))"
    assert browser.run(fetched) == []
    # The policy itself: what a break-out would do is refused, and the refusal is logged.
    assert [m for m in browser.log() if m["level"] in ("SEVERE", "WARNING")] == []
    browser.run(
        "const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; document.body.append(s)"
    )
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned = 1\">')")
    assert browser.run("return typeof window.pwned") == "undefined"
    assert any("Content Security Policy" in m["message"] for m in browser.log())


def test_browsing_in_a_browser(tmp_path: Path, browser: Browser) -> None:
    folder = make_run(tmp_path / "run", rounds=12)
    browser.open(write_report(folder))
    shown, rows = browser.run(FILTERED % "")
    assert shown == "1–20 of 384" and len(rows) == 20 and rows[0][0] == "1"
    tokens = "document.querySelector('th[data-key=tokens] button').click();"
    _, rows = browser.run(FILTERED % tokens)
    assert [int(r[4]) for r in rows] == sorted(int(r[4]) for r in rows) and int(rows[0][4]) == 4
    _, rows = browser.run(FILTERED % tokens)
    assert int(rows[0][4]) == 30
    assert browser.run("return document.querySelector('th[data-key=tokens]').ariaSort") == "descending"
    shown, rows = browser.run(FILTERED % "set('search', '#### 17'); set('reward', 'positive');")
    stored = [row for p in (folder / "rollouts").iterdir() for row in pq.read_table(p).to_pylist()]
    expected = sum("#### 17" in row["completion"] and (row["reward"] or 0) > 0 for row in stored)
    assert expected and shown == f"1–{expected} of {expected}" and all(r[2] == "1" for r in rows)
    shown, _ = browser.run(FILTERED % "set('search', ''); set('reward', 'none'); set('from', '3'); set('to', '4');")
    assert shown == "1–2 of 2"
    shown, rows = browser.run(FILTERED % "set('search', 'no such text');")
    assert shown == "no rollout matches" and rows == []
    step = "document.getElementById('%s').dispatchEvent(new Event('change'));"
    step += "return document.getElementById('pair-position').textContent"
    assert browser.run("document.getElementById('pair-outcome').value = 'gained';" + step % "pair-outcome") == "1 of 12"
    browser.run("document.getElementById('pair-next').click()")
    pair = browser.run("return [...document.querySelectorAll('.pair:not([hidden])')].map(p => p.innerText)")
    assert len(pair) == 1 and "test question" in pair[0] and pair[0].index("Round 0") < pair[0].index("Round 10")
    readout = browser.run("""
        const figure = document.querySelector('figure');
        const box = figure.querySelector('svg.chart').getBoundingClientRect();
        const at = (x) => ({ clientX: box.left + x * box.width, clientY: box.top + 9, bubbles: true });
        figure.querySelector('svg.chart').dispatchEvent(new PointerEvent('pointermove', at(0.99)));
        return figure.querySelector('.readout').textContent""")
    assert readout.startswith("round 12: round reward")
    keys = browser.run("""
        const svg = document.querySelector('svg.chart'); svg.focus();
        svg.dispatchEvent(new KeyboardEvent('keydown', { key: 'Home' }));
        return document.querySelector('.readout').textContent""")
    assert keys.startswith("round 0: train Pass@1 0.35 [")
    assert [m for m in browser.log() if m["level"] in ("SEVERE", "WARNING")] == []


@pytest.mark.parametrize("state", ["empty", "long"])
@pytest.mark.parametrize("width", [360, 1200])
def test_no_console_error_and_no_sideways_scroll(tmp_path: Path, browser: Browser, state: str, width: int) -> None:
    folder = make_run(tmp_path / "run", rounds=60, questions=30, hostile=True) if state == "long" else tmp_path
    (folder / "config.yaml").write_text("max_rounds: 60\nmodel_name_or_path: " + "m" * 300)
    browser.resize(width)
    browser.open(write_report(folder))
    assert browser.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth") is True
    assert [m for m in browser.log() if m["level"] in ("SEVERE", "WARNING")] == []


def test_rollouts_in_files_of_many_rounds_are_found(tmp_path: Path) -> None:
    """The trainer gathers rounds into one file, a row group a round; a round in both places is shown once."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"round": i}) + "\n" for i in range(6)))
    for round_ in range(1, 6):
        write_rollouts(folder, round_, random.Random(round_), count=4)
    tables = [pq.read_table(folder / "rollouts" / f"round-{round_:06d}.parquet") for round_ in (1, 2, 3)]
    with pq.ParquetWriter(folder / "rollouts" / "rounds-000001-000003.parquet", tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    for round_ in (1, 2):
        (folder / "rollouts" / f"round-{round_:06d}.parquet").unlink()
    run = load_run(folder)
    assert [row["round"] for row in run.rollouts] == [round_ for round_ in range(1, 6) for _ in range(4)]
    assert run.rollout_note == "All 20 rollouts of 5 round(s)."


def test_prompts_that_were_left_out_are_said(tmp_path: Path) -> None:
    first = {"round": 0, "prompts/filtered": 1200, "eval/test/pass@1": 0.1, "eval/test/filtered": 3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(first) + "\n" + json.dumps({"round": 1, "reward": 0.5}) + "\n")
    text = write_report(tmp_path).read_text()
    assert "1,200 prompts of train are longer than max_prompt_length and were left out." in text
    assert "3 prompts of test are longer" in text
