"""The charts of a run: curves of train and test on one scale, and the small ones on how the policy got there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from markupsafe import Markup

from bandit_rft.report.load import Run, evenly
from bandit_rft.report.plot import SMALL, Line, chart, number
from bandit_rft.report.stats import downsample, smooth
from bandit_rft.report.text import visible

MAX_POINTS = 240
MAX_OTHER_SPLITS = 4
#: Colour and dash pattern: test and train have theirs on every page.
TEST, TRAIN, REWARD = 0, 1, 4
LOSS_NOTE = (
    "A loss near 0 is normal here. With one update a round on fresh rollouts the ratio is 1, so its value is about "
    "minus the mean advantage (REINFORCE: the advantage times minus a log-probability), and a rollout that earned 0 "
    "adds 0. Its gradient teaches, not its value: read the reward and Pass@1."
)
BAND = "Band: 95% interval (Wilson for 0/1 rewards) given the number of questions."
NO_BAND = "The number of questions is not stored for every point, so there is no band."


class Figure(NamedTuple):
    """A chart as the template draws it; its numbers are in `Charts.hover` under the same key."""

    key: str
    title: str
    svg: Markup
    lines: list[Line]
    note: str


@dataclass
class Charts:
    """Draws charts and keeps what their readouts and tables need."""

    hover: dict[str, Any] = field(default_factory=dict)

    def figure(self, title: str, lines: list[Line], note: str = "", x_title: str = "round", **options: Any) -> Figure:
        """A chart of `lines`; options are those of `plot.chart`. Names are made visible here."""
        title = visible(title, 120)
        for line in lines:
            line.name = visible(line.name, 120)
        drawn = chart(f"{title}. {_spoken(lines, x_title)}", lines, x_title=x_title, **options)
        key = f"chart-{len(self.hover)}"
        self.hover[key] = drawn.hover
        return Figure(key, title, Markup(drawn.svg), lines, note)


def _spoken(lines: list[Line], x_title: str) -> str:
    """First and last value of every curve, for a reader who does not see them."""
    parts = [
        f"{line.name}: from {number(line.ys[0])} at {x_title} {number(line.xs[0], 9)} to {number(line.ys[-1])} at "
        f"{x_title} {number(line.xs[-1], 9)}"
        for line in lines
        if line.xs
    ]
    return "; ".join(parts) + ". Arrow keys read the values."


# ---- learning and generalization -------------------------------------------------------------------------------------


def learning(run: Run, charts: Charts) -> list[Figure]:
    """Train, test and the round's reward in one chart; other splits in a second with the same scale."""
    lines, note = _trend(run, "reward", "round reward", REWARD)
    splits = run.splits()
    slots = {"train": TRAIN, "test": TEST}
    lines += [_evaluation(run, split, slots[split]) for split in splits if split in slots]
    others = [split for split in splits if split not in slots]
    more = [_evaluation(run, split, slot) for slot, split in enumerate(others[:MAX_OTHER_SPLITS])]
    span = shared_range([*lines, *more])
    title = " or ".join(dict.fromkeys(run.measure(split) for split in splits)) or "reward"
    figures = []
    if lines:
        shown = " and ".join(split for split in slots if split in splits) or "training"
        figures.append(charts.figure(shown.capitalize(), lines, f"{note}{_bands(lines)}", y_range=span, y_title=title))
    if more:
        hidden = len(others) - len(more)
        left_out = f" {hidden} more splits are in the table of metrics." if hidden else ""
        text = f"Questions the policy never trained on. {_bands(more)}{left_out}"
        figures.append(charts.figure("Other splits", more, text, y_range=span, y_title=title))
    return figures


def shared_range(lines: list[Line]) -> tuple[float, float] | None:
    """One scale from 0 for all lines; of fractions, up to the tenth that leaves some room above them."""
    every = [y for line in lines for y in (*line.ys, *line.low, *line.high, *(y for _, y in line.points))]
    if not every:
        return None
    top = max(every)
    if min(every) >= 0 and top <= 1:
        top = min(1.0, math.ceil(max(top, 0.01) * 10.5) / 10)
    return min(0.0, min(every)), max(0.0, top)


def _bands(lines: list[Line]) -> str:
    lines = [line for line in lines if line.markers]
    return "" if not lines else BAND if all(line.low for line in lines) else NO_BAND


def _evaluation(run: Run, split: str, slot: int) -> Line:
    points = run.series(f"eval/{split}/pass@1")
    points = [points[i] for i in evenly(len(points), MAX_POINTS)]
    known = [i for i in (run.interval(r, split, y) for r, y in points) if i is not None]
    name = f"{split} {run.measure(split)}"
    line = Line(name, [float(r) for r, _ in points], [y for _, y in points], slot, markers=True)
    if len(known) == len(points):  # a band with holes would claim certainty where nothing is known
        line.low, line.high = [i.low for i in known], [i.high for i in known]
    return line


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
            "band their lowest and highest. "
        )
    window = (len(ys) // 12) | 1
    if window < 3:
        return [raw], sentence
    raw.faint = True
    raw.name = f"{name}, {'each round' if size == 1 else f'mean of {size} rounds'}"
    return [raw, Line(f"{name}, moving average of {window * size:,} rounds", xs, smooth(ys, window), slot)], sentence


# ---- how it got there ------------------------------------------------------------------------------------------------


class Dynamics(NamedTuple):
    """Small charts; metrics that never changed, as (name, value); metrics that were not logged."""

    figures: list[Figure]
    constants: list[tuple[str, str]]
    missing: list[str]


class _Plot(NamedTuple):
    title: str
    metrics: list[tuple[str, str]]  # key, name
    note: str
    options: dict[str, Any]


PLOTS = [
    _Plot(
        "Entropy",
        [("entropy", "entropy")],
        "Nats a token, of the policy that sampled. A fall towards 0 ends exploration.",
        {"y_title": "nats a token", "y_range": (0, 0)},
    ),
    _Plot("Response length", [("completions/mean_length", "mean length")], "", {"y_title": "tokens a completion"}),
    _Plot(
        "KL to the initial model",
        [("kl", "KL")],
        "Estimated on the round's rollouts.",
        {"y_title": "nats a token", "y_range": (0, 0)},
    ),
    _Plot(
        "Sampler against trainer",
        [("sampler_trainer_logprob_diff/mean", "mean"), ("sampler_trainer_logprob_diff/max", "max")],
        "Absolute difference of a token's log-probability as sampled and as the trainer computes it. What is above "
        "rounding makes the update off-policy.",
        {"log": True, "y_title": "nats, logarithmic"},
    ),
    _Plot("Loss", [("loss", "loss")], LOSS_NOTE, {"y_title": "loss"}),
    _Plot("Gradient norm", [("grad_norm", "norm")], "Before clipping.", {"y_title": "norm", "y_range": (0, 0)}),
    _Plot(
        "Truncated completions",
        [("completions/truncated_fraction", "fraction")],
        "Cut at the length limit.",
        {"y_range": (0, 0), "y_title": "fraction"},
    ),
    _Plot(
        "Spread of the reward",
        [("reward_std", "standard deviation")],
        "Within a round. At 0 every rollout earned the same.",
        {"y_title": "standard deviation", "y_range": (0, 0)},
    ),
    _Plot("Learning rate", [("learning_rate", "learning rate")], "", {"y_title": "learning rate"}),
]


def dynamics(run: Run, charts: Charts) -> Dynamics:
    """How the policy got there. What never changed is a line of text, not a chart."""
    plots = list(PLOTS)
    rewards = sorted({k for m in run.metrics for k in m if k.startswith("rewards/") and k != "rewards/failures"})
    if len(rewards) > 1:
        plots += [_Plot(f"Reward: {key[8:]}", [(key, key[8:])], "Mean of the round.", {}) for key in rewards]
    if run.total("rewards/failures") > 0:
        text = "Rollouts whose reward function failed."
        plots.append(_Plot("Reward failures", [("rewards/failures", "failures")], text, {"y_range": (0, 0)}))
    found = Dynamics([], [], [])
    for title, metrics, text, options in plots:
        series = [run.series(key) for key, _ in metrics]
        name = title if title.startswith("Reward: ") else title[:1].lower() + title[1:] if title[:2] != "KL" else title
        if not any(series):
            found.missing.append(name)
            continue
        values = {value for points in series for _, value in points}
        if len(values) == 1 and len(series[0]) > 1:
            found.constants.append((name, number(values.pop())))
            continue
        lines: list[Line] = []
        notes: dict[str, None] = {}
        for slot, (key, label) in enumerate(metrics):
            trend, note = _trend(run, key, label, slot)
            if len(metrics) > 1 and len(trend) > 1:
                trend = trend[1:]  # two noisy lines over each other cannot be read: averages only
            if len(metrics) == 1:
                for line in trend:
                    line.name = line.name.removeprefix(f"{label}, ")
            lines += trend
            notes[note] = None
        sentence = f"{text} {' '.join(note for note in notes if note)}".strip()
        found.figures.append(charts.figure(title, lines, sentence, size=SMALL, **options))
    return found
