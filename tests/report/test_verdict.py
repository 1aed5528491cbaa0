# ruff: noqa: RUF001  (typographic signs are meant)
"""What the run report claims: names of measures, warnings, constants, the question that is shown, and its sections."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pa = pytest.importorskip("pyarrow")
pytest.importorskip("yaml")
import pyarrow.parquet as pq  # noqa: E402
from browser import HARD_TO_READ, HOSTILE, Browser, Page  # noqa: E402
from rich.console import Console  # noqa: E402
from simulated_run import make_run, write_evaluation  # noqa: E402

from bandit_rft.config import Config  # noqa: E402
from bandit_rft.metrics import read_metrics  # noqa: E402
from bandit_rft.progress import ConsoleListener, show_result  # noqa: E402
from bandit_rft.report import write_report  # noqa: E402
from bandit_rft.report.figures import Charts, dynamics, learning  # noqa: E402
from bandit_rft.report.load import load_run  # noqa: E402
from bandit_rft.report.pairs import first_answers, match, showcase  # noqa: E402
from bandit_rft.report.shell import environment  # noqa: E402
from bandit_rft.report.verdict import health, judge  # noqa: E402
from bandit_rft.run_result import RunResult  # noqa: E402


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change every line of metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        change(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def text_of(folder: Path) -> str:
    return Page(write_report(folder).read_text(encoding="utf-8")).text


def test_a_mean_reward_is_not_called_pass_at_1(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=20)
    for path in (folder / "evaluations").iterdir():
        table = pq.read_table(path)
        scores = pa.array([2.5 * r for r in table["reward"].to_pylist()])
        pq.write_table(table.set_column(table.column_names.index("reward"), "reward", scores), path)
    rewrite(folder, lambda line: line.update({k: 2.5 * v for k, v in line.items() if k.endswith("/pass@1")}))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "test mean reward after 20 rounds" in page.text and "Train mean reward on 200 questions" in page.text
    assert "train mean reward" in page.blocks["chart-data"]
    verdict = page.text[: page.text.index("How it got there")]
    assert "Pass@1" not in verdict
    out = io.StringIO()
    show_result(folder, read_metrics(folder), None, Console(file=out, width=200))
    assert "test mean reward" in out.getvalue() and "pass@1" not in out.getvalue()
    # without stored evaluations the values say it
    for path in (folder / "evaluations").iterdir():
        path.unlink()
    assert load_run(folder).measure("test") == "mean reward"
    assert load_run(make_run(tmp_path / "other", rounds=10)).measure("test") == "Pass@1"


def constant(line: dict[str, Any]) -> None:
    if "reward" in line:
        line |= {"reward": 0.0, "reward_std": 0.0}


def truncated(line: dict[str, Any]) -> None:
    if line["round"] > 30:
        line["completions/truncated_fraction"] = 0.6


def collapsed(line: dict[str, Any]) -> None:
    if line["round"] > 10:
        line |= {"entropy": 0.001, "reward": 0.5}


def flat(line: dict[str, Any]) -> None:
    if line["round"] > 30:
        line |= {"reward": 0.5, "reward_std": 0.0}


def failing(line: dict[str, Any]) -> None:
    if line["round"] == 7:
        line["rewards/failures"] = 3


def fallen(line: dict[str, Any]) -> None:
    if line["round"] == 40:
        line |= {"eval/test/pass@1": 0.5}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (constant, "The reward was 0 in all 40 rounds"),
        (truncated, "60% of the last tenth"),
        (collapsed, "Entropy collapsed from"),
        (flat, "In 4 of the last 4 rounds every rollout earned the same"),
        (failing, "3 rollouts could not be scored"),
        (fallen, "The test Pass@1 was better before"),
    ],
)
def test_an_unhealthy_run_gets_no_plain_yes(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    folder = make_run(tmp_path / "run")
    assert health(load_run(folder)) == []
    assert "No sign of trouble" in text_of(folder)
    rewrite(folder, change)
    text = text_of(folder)
    assert words in text and "Yes." not in text and "No sign of trouble" not in text
    assert "Yes, but see the warnings." in text


def test_nothing_is_wrong_where_nearly_all_is_right(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    solved = {"entropy": 0.001, "reward": 0.95, "reward_std": 0.0}
    rewrite(folder, lambda line: line.update(solved if line["round"] > 10 else {}))
    assert health(load_run(folder)) == []


def test_a_fall_that_luck_explains_is_no_warning(tmp_path: Path) -> None:
    """Twenty evaluations of one policy: the best of them is high by chance, and the last is no fall."""
    folder = make_run(tmp_path / "run", rounds=100, every=5, questions=50, rollout_rounds=0)
    rng, warned = random.Random(0), 0
    for _ in range(40):

        def noise(line: dict[str, Any]) -> None:
            line |= {key: sum(rng.random() < 0.5 for _ in range(50)) / 50 for key in line if key.endswith("/pass@1")}

        rewrite(folder, noise)
        warned += bool(health(load_run(folder)))
    assert warned <= 4


def test_train_and_test_are_on_one_axis_from_0(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run"))
    charts = Charts()
    first, others = learning(run, charts)
    names = [line.name for line in first.lines]
    assert {"train Pass@1", "test Pass@1"} <= set(names) and [line.name for line in others.lines] == ["longer Pass@1"]
    for figure in (first, others):  # the same scale: the same ticks at the same places
        assert re.findall(r'<text class="tick" x="44" y="([\d.]+)"[^>]*>([\d.]+)<', figure.svg) == re.findall(
            r'<text class="tick" x="44" y="([\d.]+)"[^>]*>([\d.]+)<', first.svg
        )
        assert ">0</text>" in figure.svg and ">1</text>" in figure.svg
        assert ">Pass@1</text>" in figure.svg


def test_what_never_changed_is_a_line_of_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    found = dynamics(load_run(folder), Charts())
    assert ("learning rate", "1e−4") in found.constants
    assert "Learning rate" not in [figure.title for figure in found.figures]
    assert "The same in every round: learning rate 1e−4." in text_of(folder)


def test_the_title_names_the_data_file(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    config = folder / "config.yaml"
    config.write_text(config.read_text() + "data_path: /somewhere/private/sums.jsonl\n")
    text = write_report(folder).read_text(encoding="utf-8")
    head = text[: text.index("</header>")]
    assert head.count("demo-1M on arithmetic (sums.jsonl)") == 2 and "private" not in head  # the title and the heading


def test_every_section_says_when_it_is_empty_and_is_in_the_contents(tmp_path: Path) -> None:
    for folder in (tmp_path, make_run(tmp_path / "run")):
        (tmp_path / "metrics.jsonl").write_text("")
        page = Page(write_report(folder).read_text(encoding="utf-8"))
        ids = [a["id"] for tag, a in page.elements if tag == "section" and "id" in a]
        assert ids == [a["data-goto"] for tag, a in page.elements if "data-goto" in a]
    text = text_of(tmp_path)
    for words in (
        "No change can be told yet", "No round and no evaluation", "No metric of the training rounds",
        "Needs two stored evaluations", "No rollouts are stored yet", "No cost was logged.", "config.yaml is missing.",
    ):  # fmt: skip
        assert words in text


# ---- one sample of one question --------------------------------------------------------------------------------------


def test_the_first_sample_is_shown_and_the_greedy_answer_only_without_one() -> None:
    rows = [(0, -1, "greedy"), (0, 1, "second"), (0, 0, "first"), (1, -1, "greedy alone"), (2, 3, "fourth")]
    table = {
        "query": [q for q, _, _ in rows], "sample": [s for _, s, _ in rows], "completion": [t for _, _, t in rows],
        "prompt": ["?"] * 5, "reward": [0.0] * 5,
    }  # fmt: skip
    texts = {query: row["completion"] for query, row in first_answers(table).items()}
    assert texts == {0: "first", 1: "greedy alone", 2: "fourth"}
    before = {**table, "reward": [1.0, 0.0, 0.0, None, 0.5]}
    after = {**table, "reward": [1.0, 1.0, 0.25, 0.25, 1.0]}
    pairs = match("test", before, after)
    assert [pair.gain for pair in pairs] == [0.25, 0.25, 0.5]
    best = showcase(pairs)
    assert best is not None and best.query == 2 and showcase(pairs[:2]) is pairs[0] and showcase([]) is None


@pytest.mark.parametrize("samples", [(0,), (-1, 0), (0, -1), (1, -1, 0), (-1,)])
def test_the_terminal_and_the_page_show_the_same(tmp_path: Path, samples: tuple[int, ...]) -> None:
    folder = make_run(tmp_path / "run", rounds=20, rollout_rounds=0)
    for path in (folder / "evaluations").iterdir():
        rows = pq.read_table(path).to_pylist()
        more = [{**row, "sample": s, "completion": f"{row['completion']} <{s}>"} for row in rows for s in samples]
        pq.write_table(pa.Table.from_pylist(more), path)
    out = io.StringIO()
    show_result(folder, read_metrics(folder), None, Console(file=out, width=300))
    page = write_report(folder).read_text(encoding="utf-8")
    first = page[page.index("<article") : page.index("</article")]
    shown = [Page(f"<pre>{text}</pre>").text for text in re.findall(r"<pre[^>]*>(.*?)</pre>", first, re.DOTALL)]
    prompt, before, after = (" ".join(text.split()) for text in shown)
    terminal = " ".join(out.getvalue().split())
    assert f"question: {prompt} (answer" in terminal
    assert f"before, reward 0.0: {before}" in terminal and f"after, reward 1.0: {after}" in terminal
    assert before.endswith(f"<{min(s for s in samples if s >= 0) if max(samples) >= 0 else -1}>")


def test_the_question_shown_first_is_embedded_whatever_its_place(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=20, rollout_rounds=0)
    path = folder / "evaluations" / "round-000020-test.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[101]["reward"] = 7.0
    pq.write_table(pa.Table.from_pylist(rows), path)
    run = load_run(folder)
    assert run.pairs[0].query == 101 and run.pairs[0].split == "test"
    assert "same" in run.pair_counts["test"] and "still right" in run.pair_counts["train"]  # a reward of 7 is no 0 or 1
    for outcome in run.pair_counts["test"]:
        of_kind = [pair for pair in run.pairs if (pair.split, pair.outcome) == ("test", outcome)]
        assert len(of_kind) == min(12, run.pair_counts["test"][outcome])


def rated(folder: Path, rewards: dict[float, float]) -> Path:
    """The run's stored evaluations with other rewards in place of 0 and 1."""
    for path in (folder / "evaluations").iterdir():
        table = pq.read_table(path)
        scores = pa.array([rewards[r] for r in table["reward"].to_pylist()])
        pq.write_table(table.set_column(table.column_names.index("reward"), "reward", scores), path)
    return folder


def test_rewards_other_than_0_and_1_are_not_called_right_or_wrong(tmp_path: Path) -> None:
    folder = rated(make_run(tmp_path / "run", rounds=20, rollout_rounds=0), {0.0: 0.1, 1.0: 0.9})
    run = load_run(folder)
    assert set(run.pair_counts["test"]) == {"gained", "lost", "same"} and run.pair_counts["test"]["same"] > 0
    page = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "still right" not in page and "still wrong" not in page
    binary = make_run(tmp_path / "binary", rounds=20, rollout_rounds=0)
    assert set(load_run(binary).pair_counts["test"]) == {"gained", "lost", "still right", "still wrong"}
    assert "same" not in {pair.outcome for pair in load_run(binary).pairs}


def test_the_console_and_the_result_judge_rewards_and_not_their_mean(tmp_path: Path) -> None:
    folder = rated(make_run(tmp_path / "run", rounds=20, rollout_rounds=0), {0.0: 0.1, 1.0: 0.9})
    lines = read_metrics(folder)  # every mean lies between 0 and 1
    other = make_run(tmp_path / "binary", rounds=20, rollout_rounds=0)
    for path, said, not_said in ((folder, "mean reward", "pass@1"), (other, "pass@1", "mean reward")):
        out = io.StringIO()
        show_result(path, lines, None, Console(file=out, width=200))
        result = RunResult(path, lines, None)  # type: ignore[arg-type]
        live = io.StringIO()
        listener = ConsoleListener(Config(max_rounds=20), Console(file=live, width=300))
        listener._folder = path
        for line in lines:
            listener.round_done(line | {"tokens/generated": 0})
        for text in (out.getvalue(), repr(result), live.getvalue()):
            assert f"test {said}" in text.replace("Pass@1", "pass@1")
            assert not_said not in text.replace("Pass@1", "pass@1")


# ---- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_templates_escape_whatever_they_print(text: str) -> None:
    page = environment().from_string("<p>{{ text }}</p><p title='{{ text }}'>").render(text=text)
    parsed = [tag for tag in re.findall(r"<(\w+)", page)]
    assert parsed == ["p", "p"] and not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", page.replace("\r", ""))
    line = environment(markdown=True).from_string("| {{ text }} |").render(text=text)
    assert "<" not in line and "\n" not in line and not re.search(r"(?<!\\)[`*|]", line[1:-1])


def test_names_of_splits_and_rewards_are_hostile_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=10)
    name = "\u202e<img src=x onerror=alert(1)>\x07"
    keys = (f"eval/{name}/pass@1", f"rewards/{name}", f"rewards/other {name}")
    rewrite(folder, lambda line: line.update({key: line["round"] / 20 for key in keys}))
    (folder / "config.yaml").write_text(
        json.dumps({"model_name_or_path": name, "task": name, "data_path": f"/x/{name}"})
    )
    text = write_report(folder).read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    page = Page(text)
    assert not any(tag == "img" for tag, _ in page.elements)
    names = [line["name"] for chart in json.loads(page.blocks["chart-data"]).values() for line in chart["lines"]]
    assert any("⟦U+202E⟧<img" in name for name in names) and not any("\u202e" in name for name in names)


def test_verdict_of_the_split_that_matters_most(tmp_path: Path) -> None:
    verdict = judge(load_run(make_run(tmp_path / "run")))
    assert verdict.headline is not None and verdict.headline[:2] == ("test", "Pass@1")
    assert [split for split, _ in verdict.others] == ["longer"]
    write_evaluation(tmp_path / "run", 40, "train", 200, 168, False)
    text = text_of(tmp_path / "run")
    assert text.index("0.815") < text.index("Did it learn?")  # the headline number comes first


# ---- in a real browser -----------------------------------------------------------------------------------------------


FILTER = """
    document.getElementById('reset').click();
    for (const [id, value] of Object.entries(%s)) {
        const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event('input'));
    }
    return [document.getElementById('shown').textContent,
            [...document.querySelectorAll('tr.row')].map(r => [...r.cells].map(c => c.textContent))];
"""


def test_filters_by_query_and_length_and_prompts_in_the_list(tmp_path: Path, browser: Browser) -> None:
    folder = make_run(tmp_path / "run", rounds=12)
    browser.open(write_report(folder))
    stored = load_run(folder).rollouts
    shown, rows = browser.run(FILTER % json.dumps({"least-tokens": 10, "most-tokens": 11}))
    expected = sum(10 <= row["tokens"] <= 11 for row in stored)
    assert expected and shown.endswith(f" of {expected}") and {row[4] for row in rows} <= {"10", "11"}
    query = next(row["query"] for row in stored if sum(r["query"] == row["query"] for r in stored) > 1)
    same = [row for row in stored if row["query"] == query]
    shown, rows = browser.run(FILTER % json.dumps({"query": query}))
    assert shown == f"1–{len(same)} of {len(same)}"
    assert {row[7] for row in rows} == {row["prompt"].replace("\n", " ") for row in same}
    assert browser.run("return document.querySelectorAll('#least-reward').length") == 0  # rewards are 0 or 1
    assert [m for m in browser.log() if m["level"] in ("SEVERE", "WARNING")] == []


def test_a_rollout_leads_to_the_others_of_its_query(tmp_path: Path, browser: Browser) -> None:
    folder = make_run(tmp_path / "run", rounds=12)
    stored = load_run(folder).rollouts
    counts = [sum(r["query"] == row["query"] for r in stored) for row in stored]
    place = counts.index(max(counts))
    browser.open(write_report(folder))
    query, round_ = (stored[place][key] for key in ("query", "round"))
    browser.run(FILTER % json.dumps({"query": query, "from": round_, "to": round_}))
    browser.run("document.querySelector('tr.row .opener').click()")
    button = "document.querySelector('tr.more button')"
    assert browser.run(f"return {button}.textContent") == f"All {max(counts)} rollouts of query {query}"
    browser.run(f"{button}.click()")
    shown = browser.run("return document.getElementById('shown').textContent")
    assert shown == f"1–{max(counts)} of {max(counts)}"
    assert browser.run("return document.getElementById('from').value") == ""


def test_tables_of_charts_and_contents(tmp_path: Path, browser: Browser) -> None:
    folder = make_run(tmp_path / "run", rounds=200)
    browser.open(write_report(folder))
    browser.run("document.querySelector('details.numbers').open = true")
    for _ in range(50):
        rows = browser.run("return document.querySelectorAll('details.numbers table tbody tr').length")
        if rows:
            break
    assert rows == 60
    assert browser.run("return document.querySelector('details.numbers .note').textContent") == "60 of 201 points"
    browser.run("document.querySelector('[data-goto=rollouts-section]').click()")
    top = browser.run("return document.getElementById('rollouts-section').getBoundingClientRect().top")
    assert 0 <= top < 120


@pytest.mark.parametrize("width", [390, 500, 768, 1400])
def test_nothing_is_cut_or_scrolls_sideways(tmp_path: Path, browser: Browser, width: int) -> None:
    folder = make_run(tmp_path / "run", rounds=40)
    browser.resize(width)
    browser.open(write_report(folder))
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    clipped = """return [...document.querySelectorAll('main, .scroll, figure, .answer')]
        .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.className + ' in ' + e.parentElement.className)"""
    assert browser.run(clipped) == []
    wide = "return [...document.querySelectorAll('figure')].map(f => f.getBoundingClientRect().width)"
    assert max(browser.run(wide)) < 720  # a chart alone is no wider than one of two


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_legible(tmp_path: Path, browser: Browser, scheme: str) -> None:
    browser.scheme(scheme)
    browser.open(write_report(make_run(tmp_path / "run", rounds=40)))
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    shade = browser.run("return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]")
    assert (int(shade) < 64) == (scheme == "dark")
    assert browser.run(HARD_TO_READ) == []
    assert browser.run(HARD_TO_READ.replace("? 3 : 4.5", "? 21.1 : 21.1"))  # it finds texts at all
