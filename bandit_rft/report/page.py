# ruff: noqa: RUF001  (typographic dashes and signs are meant)
"""Assemble the report: one HTML file that needs nothing else and may contact nothing."""

import base64
import hashlib
import math
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from bandit_rft.report.load import MAX_PAIRS_PER_KIND, OUTCOMES, Pair, Run, evenly, load_run
from bandit_rft.report.plot import SMALL, Line, chart, legend, number, stacked_bar
from bandit_rft.report.stats import Interval, difference_interval, downsample, mean_interval, smooth
from bandit_rft.report.text import MAX_CHARACTERS, embed_json, html

MAX_POINTS = 240
MAX_TABLE_ROWS = 60
PHASES = ("rollout", "reward", "update", "evaluate", "checkpoint")
LOSS_NOTE = (
    "A loss near 0 is normal here. With one update a round on fresh rollouts the ratio is 1, so its value is about "
    "minus "
    "the mean advantage (REINFORCE: the advantage times minus a log-probability), and a rollout that earned 0 adds "
    "0. Its "
    "gradient teaches, not its value: read the reward and Pass@1."
)


def write_report(run_folder: Path | str, output: Path | None = None) -> Path:
    """Write the report of `run_folder` to `output` (default: report.html in it) and return where it is.

    The run may be in progress: what is missing or half written is left out and named on the page. The file is replaced
    in one step, so a browser never sees half a page.

    Raises FileNotFoundError when `run_folder` is not a folder or the folder of `output` does not exist, ValueError when
    `run_folder` holds neither config.yaml nor metrics.jsonl.
    """
    folder = Path(run_folder)
    target = folder / "report.html" if output is None else Path(output)
    run = load_run(folder)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"output: the folder {target.parent} does not exist")
    page = render(run)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8", newline="\n")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


@dataclass
class Charts:
    """Collects what the hover readout needs while the charts are drawn."""

    hover: dict[str, Any] = field(default_factory=dict)

    def figure(self, title: str, lines: list[Line], note: str, **options: Any) -> str:
        """A chart with its title, legend, readout, explanation (trusted HTML) and the same numbers as a table."""
        drawn = chart(f"{title}. {_spoken(lines)}", lines, **options)
        key = f"chart-{len(self.hover)}"
        self.hover[key] = drawn.hover
        return (
            f'<figure id="{key}"><figcaption><h3>{html(title)}</h3></figcaption>{drawn.svg}'
            f'<output class="readout" aria-live="polite"></output>{legend(lines)}<p class="note">{note}</p>'
            f"{_chart_table(drawn.hover)}</figure>"
        )


def _spoken(lines: list[Line]) -> str:
    """First and last value of every curve, for a reader who does not see them."""
    parts = [
        f"{line.name}: from {number(line.ys[0])} at round {number(line.xs[0], 9)} to {number(line.ys[-1])} at round "
        f"{number(line.xs[-1], 9)}"
        for line in lines
        if line.xs
    ]
    return "; ".join(parts) + ". Arrow keys read the values."


def _chart_table(hover: dict[str, Any]) -> str:
    rows = evenly(len(hover["x"]), MAX_TABLE_ROWS)
    head = "".join(f'<th scope="col">{html(line["name"])}</th>' for line in hover["lines"])
    body = "".join(
        f'<tr><th scope="row">{number(hover["x"][i], 9)}</th>'
        + "".join(f"<td>{line['values'][i] or '–'}</td>" for line in hover["lines"])
        + "</tr>"
        for i in rows
    )
    size = "" if len(rows) == len(hover["x"]) else f" ({len(rows)} of {len(hover['x'])} points)"
    return (
        f'<details><summary>As a table{size}</summary><div class="scroll"><table><thead><tr><th scope="col">round</th>'
        f"{head}"
        f"</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _trend(run: Run, key: str, name: str, slot: int = 0) -> tuple[list[Line], str]:
    """A noisy per-round metric as a faint line and its moving average; a sentence on what was averaged."""
    points = run.series(key)
    if not points:
        return [], ""
    buckets, size = downsample(points, MAX_POINTS)
    xs, ys = [b.x for b in buckets], [b.mean for b in buckets]
    raw = Line(name, xs, ys, slot)
    sentence = ""
    if size > 1:
        raw.low, raw.high = [b.low for b in buckets], [b.high for b in buckets]
        sentence = (
            f"{len(points):,} rounds drawn as {len(buckets)} points: each is the mean of {size} rounds in a row, the "
            "band "
            "their lowest and highest. "
        )
    window = (len(ys) // 12) | 1
    if window < 3:
        return [raw], sentence
    raw.faint = True
    raw.name = f"{name}, {'each round' if size == 1 else f'mean of {size} rounds'}"
    average = Line(f"{name}, moving average of {window * size:,} rounds", xs, smooth(ys, window), slot)
    return [raw, average], sentence


def _evaluation_line(run: Run, split: str, slot: int) -> Line:
    points = run.series(f"eval/{split}/pass@1")
    points = [points[i] for i in evenly(len(points), MAX_POINTS)]
    intervals = [run.interval(r, split, y) for r, y in points]
    known = [i for i in intervals if i is not None]
    line = Line(f"{split} Pass@1", [float(r) for r, _ in points], [y for _, y in points], slot, markers=True)
    if len(known) == len(points):  # a band with holes would claim certainty where nothing is known
        line.low, line.high = [i.low for i in known], [i.high for i in known]
    return line


# ---- the three answers ----------------------------------------------------------------------------------------------


@dataclass
class _Change:
    """First and last value of a Pass@1, and what their difference shows."""

    first: tuple[int, float]
    last: tuple[int, float]
    questions: int | None
    interval: Interval | None

    @property
    def verdict(self) -> tuple[str, str]:
        """(class, words)."""
        if self.interval is None:
            return "unsure", "No interval: the number of questions is not stored"
        if self.interval.low > 0:
            return "good", "Yes"
        if self.interval.high < 0:
            return "bad", "No, it got worse"
        return "unsure", "Not shown: the interval includes 0"


def _change(run: Run, split: str) -> _Change | None:
    points = run.series(f"eval/{split}/pass@1")
    if len(points) < 2:
        return None
    (r0, y0), (r1, y1) = points[0], points[-1]
    old, new = run.interval(r0, split, y0), run.interval(r1, split, y1)
    stored = run.evaluations.get((r1, split))
    interval = difference_interval(y0, old, y1, new) if old and new else None
    return _Change(points[0], points[-1], stored.questions if stored else None, interval)


def _reward_change(run: Run) -> _Change | None:
    """The training reward of the first and the last tenth of the rounds, when no evaluation says more."""
    points = run.series("reward")
    if len(points) < 2:
        return None
    size = max(1, len(points) // 10)
    sides = []
    for part in (points[:size], points[-size:]):
        mean = math.fsum(y for _, y in part) / size
        deviation = math.sqrt(math.fsum((y - mean) ** 2 for _, y in part) / max(1, size - 1))
        sides.append((mean, mean_interval(mean, deviation, size) if size >= 5 else None))
    (y0, old), (y1, new) = sides
    interval = difference_interval(y0, old, y1, new) if old and new else None
    return _Change((points[0][0], y0), (points[-1][0], y1), None, interval)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\u2212")


def _answer(question: str, change: _Change | None, what: str, missing: str, extra: str = "") -> str:
    if change is None:
        return (
            f'<section class="answer"><h2>{question}</h2><p class="figure none">–</p><p>{missing}</p>{extra}</section>'
        )
    kind, words = change.verdict
    difference = change.last[1] - change.first[1]
    interval = f" [{_signed(change.interval.low)}, {_signed(change.interval.high)}]" if change.interval else ""
    count = f" on {change.questions:,} questions" if change.questions else ""
    return (
        f'<section class="answer {kind}"><h2>{question}</h2>'
        f'<p class="figure"><span class="from">{change.first[1]:.3f}</span> <span class="to-arrow" aria-label="to">'
        "→</span> "
        f"{change.last[1]:.3f}</p>"
        f'<p><strong class="verdict">{words}.</strong> <span class="num">{_signed(difference)}{interval}</span></p>'
        f'<p class="note">{what}{count}, round {change.first[0]:,} to {change.last[0]:,}.</p>{extra}</section>'
    )


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _seconds(run: Run) -> tuple[list[tuple[str, float]], float]:
    """Seconds of every phase over the run, the rest as `other`, and their sum."""
    total = other = 0.0
    for metrics in run.metrics:
        named = math.fsum(metrics.get(f"seconds/{phase}", 0.0) for phase in PHASES)
        whole = max(metrics.get("seconds/round", 0.0), named)
        total, other = total + whole, other + whole - named
    return [*((phase, run.total(f"seconds/{phase}")) for phase in PHASES), ("other", other)], total


def _cost_answer(run: Run) -> str:
    _, total = _seconds(run)
    if not any(key.startswith(("seconds/", "tokens/")) for m in run.metrics for key in m):
        return _answer("What did it cost?", None, "", "No cost was logged.")
    generated, skipped, trained = (run.total(f"tokens/{kind}") for kind in ("generated", "skipped", "trained"))
    rollout = run.total("seconds/rollout")
    speed = f", {number(generated / rollout)} a second of rollout" if rollout > 0 else ""
    saved = ""
    if skipped + trained > 0:
        saved = f"<p class=note>{100 * skipped / (skipped + trained):.0f}% of them needed no update (advantage 0).</p>"
    return (
        f'<section class="answer"><h2>What did it cost?</h2><p class="figure">{duration(total)}</p>'
        f'<p><span class="num">{number(generated, 4)}</span> tokens generated{speed}.</p>{saved}</section>'
    )


def _answers(run: Run) -> str:
    train = _change(run, "train")
    if train is None and (reward := _reward_change(run)) is not None:
        learned = _answer(
            "Did it learn?", reward, "Training reward, mean of the first and of the last tenth of the rounds", ""
        )
    else:
        learned = _answer("Did it learn?", train, "Train Pass@1", "Too few measurements so far.")
    splits = [s for s in run.splits() if s != "train"]
    main = splits[0] if splits else "test"
    rows = []
    for split in splits[1:4]:
        if (change := _change(run, split)) is not None:
            interval = f" [{_signed(change.interval.low)}, {_signed(change.interval.high)}]" if change.interval else ""
            rows.append(
                f'<li>{html(split)} <span class="num">{change.first[1]:.3f} → {change.last[1]:.3f}, '
                f"{_signed(change.last[1] - change.first[1])}{interval}</span></li>"
            )
    others = f'<ul class="others">{"".join(rows)}</ul>' if rows else ""
    label = f"{html(main[:1].upper() + main[1:])} Pass@1"
    general = _answer(
        "Did it generalize?", _change(run, main), label, "No second evaluation of an unseen split so far.", others
    )
    note = (
        '<p class="note answers-note">In brackets: the 95% interval of the change, from the two intervals by '
        "squaring and "
        "adding (Newcombe). It takes both samples as independent, which is cautious for the same questions.</p>"
    )
    bracketed = note if "[" in learned + general else ""
    return f'<div class="answers">{learned}{general}{_cost_answer(run)}</div>{bracketed}'


# ---- sections -------------------------------------------------------------------------------------------------------


def _header(run: Run) -> str:
    config = run.config
    task = config.get("task")
    task = task.get("name") if isinstance(task, dict) else task
    model = config.get("model_name_or_path")
    if isinstance(model, str) and model.startswith(("/", ".", "~")):
        model = "/".join(part for part in Path(model).parts[-2:] if part not in ("/", ".", "..", "~"))
    name = run.folder.resolve().name
    title = " on ".join(html(x, 80) for x in (model, task) if x) or html(name, 80)
    last = run.rounds[-1] if run.rounds else 0
    planned = config.get("max_rounds")
    facts = [html(name, 80)]
    if isinstance(planned, int) and not isinstance(planned, bool) and planned > last:
        facts.append(f"round {last:,} of {planned:,}: in progress, or stopped early")
    else:
        facts.append(f"{last:,} rounds, finished" if planned == last and last else f"{last:,} rounds")
    if config.get("batch_size") is not None:
        facts.append(
            f"{html(config['batch_size'], 20)} queries × {html(config.get('num_generations', 1), 20)} rollout(s) a "
            "round"
        )
    facts += [
        f"{key.replace('_', ' ')} {html(config[key], 40)}"
        for key in ("learning_rate", "seed")
        if config.get(key) is not None
    ]
    return f'<header><h1>{title}</h1><p class="facts">{" · ".join(facts)}</p></header>'


def _curves(run: Run, charts: Charts) -> str:
    learning, note = _trend(run, "reward", "round reward", 1)
    splits = run.splits()
    if "train" in splits:
        learning.append(_evaluation_line(run, "train", 0))
    others = [s for s in splits if s != "train"][:4]
    # A few colours repeat in another dash pattern; more than four curves in one plot cannot be read.
    general = [_evaluation_line(run, split, slot) for split, slot in zip(others, (0, 1, 2, 3), strict=False)]
    every = [y for line in learning + general for y in (*line.ys, *line.low, *line.high)]
    span = (0.0, 1.0) if every and min(every) >= 0 and max(every) <= 1 else None
    if span and max(every) < 0.4:  # keep a small rise readable, and the same scale in both plots
        span = (0.0, math.ceil(max(every) * 10.5) / 10)
    figures = ""
    band = " Band of a Pass@1: 95% interval (Wilson for 0/1 rewards) given the number of questions."
    unknown = " The number of questions is not stored for every point, so there is no band."

    def bands(lines: list[Line]) -> str:
        lines = [line for line in lines if line.markers]
        return "" if not lines else band if all(line.low for line in lines) else unknown

    if learning:
        figures += charts.figure("Learning", learning, note + bands(learning), y_range=span)
    if general:
        text = f"Questions the policy never trained on.{bands(general)}"
        figures += charts.figure("Generalization", general, text, y_range=span)
    if not figures:
        figures = '<p class="empty">No round and no evaluation has been logged yet. Write the report again later.</p>'
    head = "<section><h2>Learning and generalization</h2>"
    return f'{head}<div class="pair-of-charts">{figures}</div>{_evaluations(run)}</section>'


def _evaluations(run: Run) -> str:
    """Every eval/* metric, first and last."""
    keys: dict[str, None] = {}
    for metrics in run.metrics:
        keys |= dict.fromkeys(k for k in metrics if k.startswith("eval/") and k.count("/") >= 2)
    order = {split: i for i, split in enumerate(run.splits())}
    rows = []
    for key in sorted(keys, key=lambda k: (order.get(k.split("/")[1], len(order)), k.split("/")[1])):
        points = run.series(key)
        _, split, name = key.split("/", 2)
        cells = []
        for round_, value in (points[0], points[-1]):
            interval = run.interval(round_, split, value) if name == "pass@1" else None
            text = f" [{number(interval.low)}, {number(interval.high)}]" if interval else ""
            cells.append(f"<td>{number(value)}{text}</td>")
        rows.append(
            f'<tr><th scope="row">{html(split, 60)}</th><td class="left">{html(name, 60)}</td>{"".join(cells)}'
            f"<td>{_signed(points[-1][1] - points[0][1])}</td><td>{points[0][0]:,} – {points[-1][0]:,}</td></tr>"
        )
    if not rows:
        return ""
    return (
        '<details class="wide"><summary>Every evaluation metric, first and last</summary><div class="scroll"><table>'
        "<thead><tr>"
        '<th scope="col">split</th><th scope="col" class="left">metric</th><th scope="col">first</th><th scope="col">'
        "last</th>"
        f'<th scope="col">change</th><th scope="col">rounds</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div></details>"
    )


def _dynamics(run: Run, charts: Charts) -> str:
    """Small charts of how the policy got there; names what was not logged."""
    plan: list[tuple[str, list[tuple[str, str]], str, dict[str, Any]]] = [
        (
            "Entropy",
            [("entropy", "entropy")],
            "Nats a token, of the policy that sampled. A fall towards 0 ends exploration.",
            {},
        ),
        ("Response length", [("completions/mean_length", "mean length")], "Tokens a completion.", {}),
        ("KL to the initial model", [("kl", "KL")], "Nats a token, estimated on the round's rollouts.", {}),
        (
            "Sampler against trainer",
            [("sampler_trainer_logprob_diff/mean", "mean"), ("sampler_trainer_logprob_diff/max", "max")],
            "Absolute difference of a token's log-probability as sampled and as the trainer computes it. What is above "
            "rounding makes the update off-policy.",
            {"log": True},
        ),
        ("Loss", [("loss", "loss")], LOSS_NOTE, {}),
        ("Gradient norm", [("grad_norm", "norm")], "Before clipping.", {}),
        (
            "Truncated completions",
            [("completions/truncated_fraction", "fraction")],
            "Cut at the length limit.",
            {"y_range": (0, 0)},
        ),
        ("Spread of the reward", [("reward_std", "standard deviation")], "Within a round.", {}),
        ("Learning rate", [("learning_rate", "learning rate")], "", {}),
    ]
    rewards = sorted({k for m in run.metrics for k in m if k.startswith("rewards/") and k != "rewards/failures"})
    if len(rewards) > 1:
        plan += [(f"Reward: {key[8:]}", [(key, key[8:])], "Mean of the round.", {}) for key in rewards]
    if run.total("rewards/failures") > 0:
        plan.append(
            ("Reward failures", [("rewards/failures", "failures")], "Rollouts whose reward function failed.", {})
        )
    figures, missing = "", []
    for title, metrics, text, options in plan:
        lines: list[Line] = []
        notes: dict[str, None] = {}
        for slot, (key, name) in enumerate(metrics):
            found, note = _trend(run, key, name, slot)
            if len(metrics) > 1 and len(found) > 1:
                found = found[1:]  # two noisy lines over each other cannot be read: averages only
            if len(metrics) == 1:
                for line in found:
                    line.name = line.name.removeprefix(f"{name}, ")
            lines += found
            notes[note] = None
        if not lines:
            missing.append(title.lower().replace("kl", "KL"))
            continue
        figures += charts.figure(
            title, lines, f"{text} {' '.join(n for n in notes if n)}".strip(), size=SMALL, **options
        )
    absent = f'<p class="note">Not logged in this run: {", ".join(missing)}.</p>' if missing else ""
    return f'<section><h2>How it got there</h2><div class="charts">{figures}</div>{absent}</section>'


def _pair_side(label: str, text: str, reward: float | None) -> str:
    value = "no reward" if reward is None else f"reward {number(reward)}"
    kind = "good" if reward is not None and reward > 0 else "plain"
    return (
        f'<div class="side"><h4>{label} <span class="tag {kind}">{value}</span></h4>'
        f'<pre dir="auto" tabindex="0">{html(text) or "⟦empty⟧"}</pre></div>'
    )


def _pair(pair: Pair, rounds: tuple[int, int]) -> str:
    answer = f'<p class="note">Answer: <bdi>{html(pair.answer, 300)}</bdi></p>' if pair.answer else ""
    return (
        f'<article class="pair" data-split="{html(pair.split)}" data-outcome="{pair.outcome}">'
        f'<p class="note">{html(pair.split)} question {pair.query} · {pair.outcome}</p>'
        f'<pre class="prompt" dir="auto" tabindex="0">{html(pair.prompt)}</pre>{answer}<div class="sides">'
        f"{_pair_side(f'Round {rounds[0]:,}', pair.before, pair.before_reward)}"
        f"{_pair_side(f'Round {rounds[1]:,}', pair.after, pair.after_reward)}</div></article>"
    )


def _before_and_after(run: Run) -> str:
    head = "<section><h2>The same question, before and after</h2>"
    if not run.pairs:
        return f'{head}<p class="empty">Needs two stored evaluations of the same questions.</p></section>'
    rows = "".join(
        f'<tr><th scope="row">{html(split)}</th>'
        + "".join(f"<td>{counts[kind]:,}</td>" for kind in OUTCOMES)
        + f'<td class="minor">{run.pair_rounds[split][0]:,} → {run.pair_rounds[split][1]:,}</td></tr>'
        for split, counts in run.pair_counts.items()
    )
    kinds = "".join(f'<th scope="col">{kind}</th>' for kind in OUTCOMES)
    splits = "".join(f"<option>{html(split)}</option>" for split in dict.fromkeys(p.split for p in run.pairs))
    outcomes = "".join(f"<option>{kind}</option>" for kind in OUTCOMES)
    articles = "".join(_pair(pair, run.pair_rounds[pair.split]) for pair in run.pairs)
    return (
        f'{head}<div class="scroll"><table class="counts"><caption>Questions by how their reward changed</caption>'
        "<thead><tr>"
        f'<th scope="col">split</th>{kinds}<th scope="col" class="minor">rounds</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        f'<p class="note">At most {MAX_PAIRS_PER_KIND} questions of each kind are embedded, chosen evenly; texts are '
        "cut at "
        f"{MAX_CHARACTERS:,} characters. All are in evaluations/*.parquet.</p>"
        '<div class="controls" id="pair-controls" hidden>'
        f'<label>Split <select id="pair-split">{splits}</select></label>'
        f'<label>Outcome <select id="pair-outcome"><option value="">all</option>{outcomes}</select></label>'
        '<span class="pager"><button type="button" id="pair-previous">Previous</button>'
        '<span id="pair-position" role="status"></span><button type="button" id="pair-next">Next</button></span></div>'
        f'<div id="pairs">{articles}</div></section>'
    )


_COLUMNS = (  # key in the embedded rows, heading, class
    ("round", "round", ""),
    ("query", "query", "minor"),
    ("reward", "reward", ""),
    ("advantage", "advantage", "minor"),
    ("tokens", "tokens", ""),
    ("logprobs", "log-prob", "minor"),
    ("entropy", "entropy", "minor"),
    ("completion", "completion", "left"),
)


def _rollouts(run: Run) -> str:
    head = "<section><h2>Rollouts</h2>"
    if not run.rollouts:
        return f'{head}<p class="empty">No rollouts are stored yet.</p></section>'
    headings = "".join(
        f'<th scope="col" class="{kind}" data-key="{key}" aria-sort="none"><button type="button">{name}</button></th>'
        for key, name, kind in _COLUMNS
    )
    return (
        f'{head}<p class="note">{run.rollout_note} Texts are cut at {MAX_CHARACTERS:,} characters; control and '
        "invisible "
        "characters are shown by their number, as ⟦U+202E⟧. log-prob and entropy are means over the tokens.</p>"
        "<noscript><p>Browsing the rollouts needs scripts; everything else on this page does not.</p></noscript>"
        '<div id="rollouts" hidden><div class="controls">'
        '<label>Search <input id="search" type="search" autocomplete="off" spellcheck="false"></label>'
        '<label>Reward <select id="reward"><option value="">any</option><option value="positive">above 0</option>'
        '<option value="rest">0 or less</option><option value="none">none</option></select></label>'
        '<label>Rounds <input id="from" type="number" min="0" placeholder="from" aria-label="from round"></label>'
        '<label><span aria-hidden="true">–</span> <input id="to" type="number" min="0" placeholder="to" '
        'aria-label="to round">'
        '</label><label><input id="truncated" type="checkbox"> truncated only</label></div>'
        f'<div class="scroll"><table class="rollouts"><thead><tr>{headings}</tr></thead><tbody></tbody></table></div>'
        '<p class="pager"><button type="button" id="previous">Previous</button><span id="shown" role="status"></span>'
        '<button type="button" id="next">Next</button></p></div></section>'
    )


def _rollout_data(run: Run) -> list[dict[str, Any]]:
    from bandit_rft.report.text import visible

    def clean(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        return visible(value) if isinstance(value, str) else value

    return [{key: clean(value) for key, value in row.items()} for row in run.rollouts]


def _ledger(run: Run) -> str:
    head = "<section><h2>Cost ledger</h2>"
    rounds = sum(1 for m in run.metrics if any(k.startswith(("tokens/", "seconds/")) for k in m))
    if not rounds:
        return f'{head}<p class="empty">No cost was logged.</p></section>'
    parts, total = _seconds(run)
    phase_of = {"generated": "rollout", "trained": "update", "skipped": "", "scored": ""}
    meaning = {
        "generated": "sampled by the engine",
        "scored": "log-probabilities computed without a gradient",
        "trained": "forward and backward",
        "skipped": "advantage exactly 0: no update needed",
    }
    seconds = dict(parts)
    token_rows = ""
    for kind, text in meaning.items():
        if not run.series(f"tokens/{kind}"):
            continue
        count = run.total(f"tokens/{kind}")
        phase = phase_of[kind]
        speed = f"{number(count / seconds[phase])} / s of {phase}" if phase and seconds[phase] > 0 else "–"
        token_rows += (
            f'<tr><th scope="row">{kind}</th><td>{number(count, 9)}</td><td>{number(count / rounds)}</td><td>'
            f"{speed}</td>"
            f'<td class="left">{text}</td></tr>'
        )
    time_rows = "".join(
        f'<tr><th scope="row"><svg class="swatch" viewBox="0 0 10 10" aria-hidden="true"><rect class="p{i}" width="10" '
        f'height="10"/></svg>{phase}</th><td>{duration(spent)}</td><td>{number(spent / rounds)} s</td>'
        f"<td>{100 * spent / total if total else 0:.1f}%</td></tr>"
        for i, (phase, spent) in enumerate(parts)
        if spent > 0
    )
    generated = run.total("tokens/generated")
    whole = (
        f" The whole run made {number(generated / total)} tokens a second, evaluation included." if total > 0 else ""
    )
    tokens = (
        '<div class="scroll"><table><caption>Tokens</caption><thead><tr><th scope="col"></th><th scope="col">total</th>'
        '<th scope="col">a round</th><th scope="col">speed</th><th scope="col" class="left">what</th></tr></thead>'
        f"<tbody>{token_rows}</tbody></table></div>"
    )
    times = (
        '<div class="scroll"><table><caption>Time</caption><thead><tr><th scope="col">phase</th><th scope="col">'
        "total</th>"
        f'<th scope="col">a round</th><th scope="col">share</th></tr></thead><tbody>{time_rows}</tbody></table></div>'
    )
    bar = stacked_bar("Time by phase, as in the table below", parts) if total > 0 else ""
    note = f'<p class="note">Sums over {rounds:,} logged round(s).{whole}</p>'
    return f'{head}{note}{bar}<div class="ledger">{times}{tokens}</div></section>'


def _config(run: Run) -> str:
    if not run.config_text:
        return '<section><h2>Resolved config</h2><p class="empty">config.yaml is missing.</p></section>'
    text = html(run.config_text, 200_000)
    return f'<section><h2>Resolved config</h2><pre class="config" tabindex="0">{text}</pre></section>'


def source_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def render(run: Run) -> str:
    """The whole page. Its policy allows its one style sheet and one script, by hash, and no request at all."""
    assets = resources.files("bandit_rft.report")
    style, script = (assets.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    charts = Charts()
    notes = "".join(f"<li>{html(note)}</li>" for note in dict.fromkeys(run.notes[:20]))
    if len(run.notes) > 20:
        notes += f"<li>and {len(run.notes) - 20} more.</li>"
    sections = [
        _header(run),
        _answers(run),
        f'<aside class="notes" aria-label="Notes on the data"><ul>{notes}</ul></aside>' if notes else "",
        _curves(run, charts),
        _dynamics(run, charts),
        _before_and_after(run),
        _rollouts(run),
        _ledger(run),
        _config(run),
    ]
    policy = (
        f"default-src 'none'; style-src {source_hash(style)}; script-src {source_hash(script)}; img-src data:; "
        "base-uri 'none'; "
        "form-action 'none'"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" '
        'content="light dark">\n'
        '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f"<title>{html(run.folder.resolve().name, 80)} – bandit_rft report</title>\n<style>{style}</style>\n</head>"
        "\n<body>\n<main>\n"
        + "\n".join(part for part in sections if part)
        + "\n<footer>Written by bandit_rft. This page is one file and contacts nothing.</footer>\n</main>\n"
        f'<script type="application/json" id="chart-data">{embed_json(charts.hover)}</script>\n'
        f'<script type="application/json" id="rollout-data">{embed_json(_rollout_data(run))}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )
