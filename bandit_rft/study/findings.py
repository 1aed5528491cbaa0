"""What the intervals support, in sentences: of each factor, of the baseline, and for a practitioner."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from bandit_rft.report.plot import number
from bandit_rft.report.shell import signed
from bandit_rft.study.analyse import Analysis
from bandit_rft.study.cells import BASELINE, SPLITS
from bandit_rft.study.pairing import ALL, Level, Row
from bandit_rft.study.points import detectable, simultaneous

SIGNIFICANT = 0.05
MAX_NAMED = 4


@dataclass
class Recommendation:
    """What to do: a few words, then sentences with the uncertainty; and the numbers of the cards below them."""

    words: str
    sentences: list[str]
    baseline: dict[str, Row]  # by split, what the baseline learned
    counts: dict[str, tuple[int, int, int]]  # by split: above, below, compared
    detectable: float


def finding(analysis: Analysis, factor: str) -> str:
    """One sentence on a factor: which levels change final test Pass@1, by Holm's correction, and nothing more."""
    levels = [level for level in analysis.study.levels if level[0] == factor]
    rows = {level: row for level in levels if (row := analysis.row(level)) is not None}
    planned = len(analysis.study.seeds)
    if not rows and any(_paired(analysis, level) for level in levels):
        return "nothing can be said yet: no seed is finished for all models and tasks, here and for the baseline."
    if not rows:
        return "nothing can be said: no finished cell has a finished baseline cell to be compared with."
    known = {level: row for level, row in rows.items() if not math.isnan(row["p_holm"])}
    absent = len(levels) - len(known)
    if not known and max(row["seeds"] for row in rows.values()) > 1:
        return "no interval can be given: the differences do not vary at all."
    if not known and planned > 1:
        return f"no interval can be given yet: of {planned} seeds one alone is finished both here and for the baseline."
    if not known:
        return "no interval can be given: that takes two seeds or more."
    gains = [_gain(level, row) for level, row in known.items() if _above(row)]
    losses = [_gain(level, row) for level, row in known.items() if _below(row)]
    rest = [row for row in known.values() if row["p_holm"] > SIGNIFICANT]
    parts = []
    if gains:
        parts.append(f"{', '.join(gains)} {'is' if len(gains) == 1 else 'are'} above the baseline")
    if losses:
        parts.append(f"{', '.join(losses)} {'is' if len(losses) == 1 else 'are'} below the baseline")
    if rest:
        span = f"{signed(min(row['low'] for row in rest))} and {signed(max(row['high'] for row in rest))}"
        which = "its interval lies" if len(rest) == 1 else "their intervals lie"
        who = (
            f"the other {len(rest)}"
            if parts
            else "its one level"
            if len(rest) == 1
            else f"any of its {len(rest)} levels"
        )
        parts.append(f"no difference is shown for {who} ({which} between {span})")
    text = "; ".join(parts)
    return text + (f"; {absent} could not be compared." if absent else ".")


def _paired(analysis: Analysis, level: Level) -> bool:
    """Whether a level and the baseline have any finished run of the same model, task and seed."""
    index = analysis.study.index()
    base = index.get(BASELINE, {})
    return any(seeds.keys() & base.get(condition, {}).keys() for condition, seeds in index.get(level, {}).items())


def baseline_finding(analysis: Analysis) -> str:
    """One sentence on what the baseline alone learned, from before training to the end."""
    parts = []
    for split in SPLITS:
        row = analysis.row(BASELINE, "learned", split)
        if row is None:
            return "nothing can be said: no baseline cell has finished."
        change = f"{row['baseline']:.3f} to {row['value']:.3f}"
        if math.isnan(row["low"]):
            planned = len(analysis.study.seeds)
            seeds = "one seed" if planned == 1 else f"one of {planned} seeds so far"
            parts.append(f"{split} Pass@1 went from {change} ({seeds}: no interval)")
            continue
        verb = "rose" if row["low"] > 0 else "fell" if row["high"] < 0 else "is not shown to have changed,"
        parts.append(
            f"{split} Pass@1 {verb} from {change} ({signed(row['gain'])} [{signed(row['low'])}, {signed(row['high'])}])"
        )
    return "; ".join(parts) + "."


def distinct(analysis: Analysis) -> list[Level]:
    """Every configuration once: levels that are another's cells by another name are left out."""
    return [level for level in analysis.study.levels if level not in analysis.study.same_as]


def recommend(analysis: Analysis) -> Recommendation:
    """What a practitioner should do, by final test Pass@1, all models and tasks together, after Holm's correction."""
    rows = {split: _compared(analysis, split) for split in SPLITS}
    counts = {
        split: (sum(map(_above, found.values())), sum(map(_below, found.values())), len(found))
        for split, found in rows.items()
    }
    learned = {split: row for split in SPLITS if (row := analysis.row(BASELINE, "learned", split)) is not None}
    test = rows["test"]
    if not test:
        planned = len(analysis.study.seeds)
        seeds = "with two seeds or more" if planned == 1 else f"of at least two of the {planned} seeds"
        text = f"That takes finished cells of a level and of the baseline, {seeds}."
        return Recommendation("Nothing can be recommended yet", [text], learned, counts, math.nan)
    smallest = statistics.median(detectable(row) for row in test.values())
    above = {level: row for level, row in test.items() if _above(row)}
    best = max(above or test, key=lambda level: test[level]["gain"])
    estimate = f"{_both(test[best])}{_price(analysis, best)}"
    sentences = []
    so_far = "So far: " if analysis.study.unused else ""
    if above:
        words = f"{so_far}use {_name(best)}"
        sentences.append(f"It adds {estimate}.")
        others = {level: row for level, row in above.items() if level != best}
        if others:
            sentences.append(f"Also above the baseline: {_list(others)}. Which of them is best is not tested here.")
    else:
        words = f"{so_far}keep the baseline"
        sentences.append(
            f"None of {len(test)} configurations is shown to reach more test Pass@1. The largest estimate is "
            f"{_name(best)}: {estimate}."
        )
    below = {level: row for level, row in test.items() if _below(row)}
    if below:
        sentences.append(f"Avoid what is below it: {_list(below)}.")
    sentences.append(_on_train(rows["train"], " either" if not above and not below else ""))
    power = (
        f"A true gain of {smallest:.3f} in test Pass@1 would have been found with 80% power after the correction "
        "(the median configuration)."
        if smallest < 1
        else "With this few seeds no gain that is possible would have been found for sure after the correction."
    )
    sentences.append(f"{power} Models and tasks are taken as given: nothing is said of others.")
    return Recommendation(
        words[:1].upper() + words[1:], [sentence for sentence in sentences if sentence], learned, counts, smallest
    )


def _compared(analysis: Analysis, split: str) -> dict[Level, Row]:
    rows = {level: analysis.row(level, "final", split) for level in distinct(analysis)}
    return {level: row for level, row in rows.items() if row is not None and not math.isnan(row["p_holm"])}


def _above(row: Row) -> bool:
    return bool(row["p_holm"] <= SIGNIFICANT and row["gain"] > 0)


def _below(row: Row) -> bool:
    return bool(row["p_holm"] <= SIGNIFICANT and row["gain"] < 0)


def _on_train(rows: Mapping[Level, Row], either: str) -> str:
    """What holds on the questions that were trained on, which is another claim."""
    above, below = ({level: row for level, row in rows.items() if test(row)} for test in (_above, _below))
    if not above and not below:
        return f"On train questions no difference is shown{either}." if rows else ""
    parts = [f"above the baseline: {_list(above)}"] if above else []
    parts += [f"below it: {_list(below)}"] if below else []
    return f"On train questions {'; '.join(parts)}."


def _list(rows: Mapping[Level, Row]) -> str:
    order = sorted(rows, key=lambda level: -abs(rows[level]["gain"]))
    named = [f"{_name(level)} {signed(rows[level]['gain'])}" for level in order[:MAX_NAMED]]
    return ", ".join(named) + (f" and {len(order) - MAX_NAMED} more" if len(order) > MAX_NAMED else "")


def _name(level: Level) -> str:
    return f"{level[0]} {level[1]}"


def _both(row: Row) -> str:
    family = row["family"]
    low, high = simultaneous(row)
    one = f"{signed(row['gain'])} [{signed(row['low'])}, {signed(row['high'])}]"
    return f"{one}, with all {family} compared at once [{signed(low)}, {signed(high)}]" if family > 1 else one


def _price(analysis: Analysis, level: Level) -> str:
    tokens = {
        (row["factor"], row["level"]): row["tokens_generated"]
        for row in analysis.costs
        if row["model"] == row["task"] == ALL
    }
    if not tokens.get(level) or not tokens.get(BASELINE):
        return ""
    return f", for {number(tokens[level] / tokens[BASELINE], 2)} times the tokens generated"


def _gain(level: Level, row: Row) -> str:
    return f"{level[1]} ({signed(row['gain'])} [{signed(row['low'])}, {signed(row['high'])}])"
