# ruff: noqa: RUF001  (typographic dashes are meant)
"""What a run cost: tokens of every kind and seconds of every phase."""

from __future__ import annotations

import math
from typing import NamedTuple

from markupsafe import Markup

from bandit_rft.report.load import Run
from bandit_rft.report.plot import number, stacked_bar

PHASES = ("rollout", "reward", "update", "evaluate", "checkpoint")
TOKENS = {  # kind -> (the phase that its speed is of, what it is)
    "generated": ("rollout", "sampled by the engine"),
    "scored": ("", "log-probabilities computed without a gradient"),
    "trained": ("update", "forward and backward"),
    "skipped": ("", "advantage exactly 0: no update needed"),
}


class Ledger(NamedTuple):
    """Rows of text: `time` (slot, phase, total, a round, share), `tokens` (kind, total, a round, speed, what)."""

    rounds: int
    time: list[tuple[int, str, str, str, str]]
    tokens: list[tuple[str, str, str, str, str]]
    speed: str
    bar: Markup | None


def duration(seconds: float) -> str:
    """Seconds for people: 8.3 s, 4 min 7 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 60:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def seconds_by_phase(run: Run) -> tuple[list[tuple[str, float]], float]:
    """Seconds of every phase over the run, the rest as `other`, and their sum."""
    total = other = 0.0
    for metrics in run.metrics:
        named = math.fsum(metrics.get(f"seconds/{phase}", 0.0) for phase in PHASES)
        whole = max(metrics.get("seconds/round", 0.0), named)
        total, other = total + whole, other + whole - named
    return [*((phase, run.total(f"seconds/{phase}")) for phase in PHASES), ("other", other)], total


def ledger(run: Run) -> Ledger | None:
    """The cost of a run; None where none was logged."""
    rounds = sum(1 for m in run.metrics if any(k.startswith(("tokens/", "seconds/")) for k in m))
    if not rounds:
        return None
    parts, total = seconds_by_phase(run)
    seconds = dict(parts)
    tokens = []
    for kind, (phase, meaning) in TOKENS.items():
        if run.series(f"tokens/{kind}"):
            count = run.total(f"tokens/{kind}")
            speed = f"{number(count / seconds[phase])} / s of {phase}" if phase and seconds[phase] > 0 else "–"
            tokens.append((kind, number(count, 9), number(count / rounds), speed, meaning))
    time = [
        (slot, phase, duration(spent), f"{number(spent / rounds)} s", f"{100 * spent / total:.1f}%")
        for slot, (phase, spent) in enumerate(parts)
        if spent > 0
    ]
    bar = Markup(stacked_bar("Time by phase, as in the table below", parts)) if total > 0 else None
    speed = number(run.total("tokens/generated") / total) if total > 0 else ""
    return Ledger(rounds, time, tokens, speed, bar)
