"""What a run comes to: the headline number, did it learn, did it generalize, its cost, and its health."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

from bandit_rft.report.ledger import duration, seconds_by_phase
from bandit_rft.report.load import Run
from bandit_rft.report.plot import number
from bandit_rft.report.stats import Z95, Interval, difference_interval, mean_interval

#: Health is judged on the last tenth of the rounds, against the first tenth.
TENTH = 10
MANY_TRUNCATED = 0.2
COLLAPSED_ENTROPY = 0.05  # nats a token, and ...
COLLAPSED_SHARE = 0.1  # ... this share of what it was, ...
SOLVED = 0.8  # ... while the reward, a fraction, is below this
MAX_SPLITS = 4


@dataclass
class Change:
    """First and last value of a measure, and what their difference shows."""

    first: tuple[int, float]
    last: tuple[int, float]
    questions: int | None
    interval: Interval | None

    @property
    def difference(self) -> float:
        """After less before."""
        return self.last[1] - self.first[1]

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


class Answer(NamedTuple):
    """One question, and what the run says to it; `change` is None where too little was measured."""

    question: str
    change: Change | None
    what: str
    missing: str


@dataclass
class Verdict:
    """The top of the page. `headline` is (split, measure, change) of the split that matters most."""

    headline: tuple[str, str, Change] | None
    learned: Answer
    generalized: Answer
    others: list[tuple[str, Change]]
    cost: dict[str, str] | None
    flags: list[str] = field(default_factory=list)

    def words(self, change: Change) -> tuple[str, str]:
        """(class, words) of an answer; a run that is not healthy gets no plain yes."""
        kind, words = change.verdict
        return ("unsure", "Yes, but see the warnings") if self.flags and kind == "good" else (kind, words)


def judge(run: Run) -> Verdict:
    """The verdict on a run, from what is logged and stored so far."""
    train = change_of(run, "train")
    if train is None and (reward := _reward_change(run)) is not None:
        text = "Training reward, mean of the first and of the last tenth of the rounds"
        learned = Answer("Did it learn?", reward, text, "")
    else:
        learned = Answer("Did it learn?", train, f"Train {run.measure('train')}", "Too few measurements so far.")
    unseen = [split for split in run.splits() if split != "train"]
    main = unseen[0] if unseen else "test"
    label = f"{main[:1].upper()}{main[1:]} {run.measure(main)}"
    change = change_of(run, main)
    general = Answer("Did it generalize?", change, label, "No second evaluation of an unseen split so far.")
    others = [(split, found) for split in unseen[1:MAX_SPLITS] if (found := change_of(run, split)) is not None]
    headline = next(((s, run.measure(s), c) for s, c in ((main, change), ("train", train)) if c is not None), None)
    return Verdict(headline, learned, general, others, _cost(run), health(run))


def change_of(run: Run, split: str) -> Change | None:
    """A split from its first to its last evaluation; None before there are two."""
    points = run.series(f"eval/{split}/pass@1")
    return _between(run, split, points[0], points[-1]) if len(points) > 1 else None


def _between(run: Run, split: str, first: tuple[int, float], last: tuple[int, float]) -> Change:
    old, new = run.interval(*_args(first, split)), run.interval(*_args(last, split))
    stored = run.evaluations.get((last[0], split))
    interval = difference_interval(first[1], old, last[1], new) if old and new else None
    return Change(first, last, stored.questions if stored else None, interval)


def _args(point: tuple[int, float], split: str) -> tuple[int, str, float]:
    return point[0], split, point[1]


def _tenths(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """The values of the first and of the last tenth of the rounds."""
    size = max(1, len(points) // TENTH)
    return [y for _, y in points[:size]], [y for _, y in points[-size:]]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _reward_change(run: Run) -> Change | None:
    """The training reward of the first and the last tenth of the rounds, when no evaluation says more."""
    points = run.series("reward")
    if len(points) < 2:
        return None
    sides = []
    for part in _tenths(points):
        mean, size = _mean(part), len(part)
        deviation = math.sqrt(math.fsum((y - mean) ** 2 for y in part) / max(1, size - 1))
        sides.append((mean, mean_interval(mean, deviation, size) if size >= 5 else None))
    (y0, old), (y1, new) = sides
    interval = difference_interval(y0, old, y1, new) if old and new else None
    return Change((points[0][0], y0), (points[-1][0], y1), None, interval)


def _cost(run: Run) -> dict[str, str] | None:
    if not any(key.startswith(("seconds/", "tokens/")) for m in run.metrics for key in m):
        return None
    generated, skipped, trained = (run.total(f"tokens/{kind}") for kind in ("generated", "skipped", "trained"))
    rollout = run.total("seconds/rollout")
    return {
        "time": duration(seconds_by_phase(run)[1]),
        "generated": number(generated, 4),
        "speed": number(generated / rollout) if rollout > 0 else "",
        "skipped": f"{100 * skipped / (skipped + trained):.0f}%" if skipped + trained > 0 else "",
    }


# ---- health ----------------------------------------------------------------------------------------------------------


def health(run: Run) -> list[str]:
    """One sentence for each sign that the run went wrong, whatever its reward says; none where nothing was found."""
    return [flag for check in (_constant, _truncation, _collapse, _peak, _failures) if (flag := check(run))]


def _constant(run: Run) -> str:
    rewards, spread = run.series("reward"), run.series("reward_std")
    if len(rewards) < 2:
        return ""
    first = rewards[0][1]
    if all(value == first for _, value in rewards) and all(value == 0 for _, value in spread):
        return f"The reward was {number(first)} in all {len(rewards):,} rounds: there was nothing to learn from."
    last = _tenths(spread)[1] if spread else []
    flat = sum(value == 0 for value in last)
    if len(spread) >= TENTH and flat > len(last) / 2 and not _solved(run):
        return (
            f"In {flat} of the last {len(last)} rounds every rollout earned the same reward: "
            "an advantage relative to the batch or the group is 0 there, and the run has stopped learning."
        )
    return ""


def _solved(run: Run) -> bool:
    """Whether nearly all is right: then being sure, and rounds without a spread, are no sign of trouble."""
    points = run.series("reward")
    return bool(points) and all(0 <= value <= 1 for _, value in points) and _mean(_tenths(points)[1]) >= SOLVED


def _truncation(run: Run) -> str:
    points = run.series("completions/truncated_fraction")
    if not points or (share := _mean(_tenths(points)[1])) <= MANY_TRUNCATED:
        return ""
    return (
        f"{100 * share:.0f}% of the last tenth of the rounds' completions were cut at the length limit: "
        "their rewards judge the limit; raise max_completion_length."
    )


def _collapse(run: Run) -> str:
    points = run.series("entropy")
    if len(points) < 2:
        return ""
    first, last = (_mean(part) for part in _tenths(points))
    if first <= 0 or last >= COLLAPSED_ENTROPY or last >= COLLAPSED_SHARE * first:
        return ""
    if _solved(run):
        return ""
    return (
        f"Entropy collapsed from {number(first)} to {number(last)} nats a token: the policy hardly explores any more, "
        "and Pass@k with many samples may have fallen."
    )


def _peak(run: Run) -> str:
    for split in run.splits():
        points = run.series(f"eval/{split}/pass@1")
        if len(points) < 3:
            continue
        best = max(points, key=lambda point: point[1])
        change = _between(run, split, best, points[-1])
        if change.interval is None:
            continue
        # the best of many is high by luck too: as if each had been compared (Bonferroni)
        wider = NormalDist().inv_cdf(1 - 0.025 / (len(points) - 1)) / Z95
        if change.difference + wider * (change.interval.high - change.difference) < 0:
            return (
                f"The {split} {run.measure(split)} was better before: {number(best[1])} at round {best[0]:,}, "
                f"{number(points[-1][1])} at the end."
            )
    return ""


def _failures(run: Run) -> str:
    failures = run.total("rewards/failures")
    return f"{number(failures, 9)} rollouts could not be scored: their reward function failed." if failures > 0 else ""
