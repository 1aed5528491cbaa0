"""The study report's own plots as inline SVG: a forest of intervals and a heat map, in the run report's colours."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import NamedTuple

from bandit_rft.report.plot import number, ticks
from bandit_rft.report.shell import signed

FOREST_WIDTH, ROW_HEIGHT, AXIS_HEIGHT = 380, 40, 34
CELL = (100, 46)
#: Intervals for all comparisons at once may stretch the scale by this much; beyond it they end in an arrow.
STRETCH = 1.6


class Mark(NamedTuple):
    """One estimate in a row of the forest."""

    name: str
    slot: int  # colour and shape: 0 a circle, 1 a square
    low: float  # interval for one comparison
    gain: float
    high: float
    filled: bool  # a difference is shown
    wide: tuple[float, float] | None = None  # interval for all comparisons at once
    seeds: tuple[float, ...] = ()  # the gain of each seed


class Forest:
    """Rows of intervals on one scale. Each method returns one <svg> for a table cell, so that a row is a table row."""

    def __init__(self, ends: Sequence[tuple[float, ...]], wide: Sequence[tuple[float, ...]] = ()):
        """A scale that holds 0 and all finite numbers of `ends`, and those of `wide` that are not much farther out."""
        known = [x for group in ends for x in group if math.isfinite(x)] or [-0.01, 0.01]
        most = STRETCH * max(map(abs, known))
        known += [min(max(x, -most), most) for group in wide for x in group if math.isfinite(x)]
        low, high = min(0.0, *known), max(0.0, *known)
        room = (high - low) * 0.05 or 0.01
        self.low, self.high = low - room, high + room
        self.ticks = ticks(self.low, self.high, 6)

    def _x(self, value: float) -> float:
        return round(6 + (value - self.low) / (self.high - self.low) * (FOREST_WIDTH - 12), 1)

    def _open(self, label: str, height: int) -> str:
        return f'<svg class="forest" viewBox="0 0 {FOREST_WIDTH} {height}" role="img" aria-label="{escape(label)}">'

    def axis(self, title: str = "gain over the baseline") -> str:
        """The scale's numbers and what they measure."""
        out = [self._open(f"scale: {title}", AXIS_HEIGHT)]
        out.append(
            f'<text class="tick title" x="{FOREST_WIDTH / 2:.0f}" y="11" text-anchor="middle">{escape(title)}</text>'
        )
        for tick in self.ticks:
            x = self._x(tick)
            anchor = "start" if x < 20 else "end" if x > FOREST_WIDTH - 20 else "middle"
            text = "0" if abs(tick) < 1e-12 else f"{'+' if tick > 0 else ''}{number(tick)}"
            out.append(f'<text class="tick" x="{x}" y="{AXIS_HEIGHT - 6}" text-anchor="{anchor}">{text}</text>')
        return "".join(out) + "</svg>"

    def row(self, marks: Sequence[Mark]) -> str:
        """Estimates under each other, or the line of 0 alone."""
        label = "; ".join(f"{m.name} {signed(m.gain)} [{signed(m.low)}, {signed(m.high)}]" for m in marks)
        out = [self._open(label or "0 by definition", ROW_HEIGHT)]
        lines = "".join(f"M{self._x(tick)} 0V{ROW_HEIGHT}" for tick in self.ticks if abs(tick) > 1e-12)
        out.append(f'<path class="grid" d="{lines}"/><path class="zero" d="M{self._x(0.0)} 0V{ROW_HEIGHT}"/>')
        for i, mark in enumerate(marks):
            out += self._mark(mark, round((i + 0.5) * (ROW_HEIGHT - 8) / len(marks) + 4, 1))
        return "".join(out) + "</svg>"

    def _mark(self, mark: Mark, y: float) -> list[str]:
        out = []
        dots = "".join(f"M{self._x(g)} {y + 6:g}h0" for g in mark.seeds if self.low <= g <= self.high)
        if dots:
            out.append(f'<path class="points s{mark.slot}" d="{dots}"/>')
        if mark.wide and all(math.isfinite(end) for end in mark.wide):
            a, b = (self._x(min(max(end, self.low), self.high)) for end in mark.wide)
            left = f"M{a} {y - 3:g}v6" if mark.wide[0] >= self.low else f"M{a + 4:g} {y - 3:g}l-4 3l4 3"
            right = f"M{b} {y - 3:g}v6" if mark.wide[1] <= self.high else f"M{b - 4:g} {y - 3:g}l4 3l-4 3"
            out.append(f'<path class="wide s{mark.slot}" d="{left}M{a} {y:g}H{b}{right}"/>')
        if math.isfinite(mark.low) and math.isfinite(mark.high):
            ends = f'x1="{self._x(mark.low)}" x2="{self._x(mark.high)}" y1="{y}" y2="{y}"'
            out.append(f'<line class="interval s{mark.slot}" {ends}/>')
        if not self.low <= mark.gain <= self.high:
            return out  # no interval is known, and this scale was not made for the gain
        kind, x = f'class="mark s{mark.slot}{"" if mark.filled else " open"}"', self._x(mark.gain)
        if mark.slot == 0:
            out.append(f'<circle {kind} cx="{x}" cy="{y}" r="4.2"/>')
        else:
            out.append(f'<rect {kind} x="{round(x - 3.6, 1)}" y="{round(y - 3.6, 1)}" width="7.2" height="7.2"/>')
        return out


def heat_map(
    label: str, rows: Sequence[int], columns: Sequence[int],
    cells: Mapping[tuple[int, int], tuple[float, float, float]], names: tuple[str, str],
    zero: tuple[int, int] | None = None, shown: Collection[tuple[int, int]] | None = None,
) -> str:  # fmt: skip
    """Gains (gain, low, high) at (row, column), with a key of the colours.

    Blue above 0, orange below, the deeper the larger, and hardly any colour where no difference is shown.

    Args:
        label: what a screen reader says before the gains.
        rows: values of the first axis.
        columns: values of the second.
        cells: gains with their interval; a cell that is not there was not run.
        names: of the axes.
        zero: where the baseline is.
        shown: where a difference is shown; by default where the interval leaves out 0.
    """
    left, top = 84, 40
    width, height = left + CELL[0] * max(len(columns), 4) + 4, top + CELL[1] * len(rows) + 52
    if shown is None:
        shown = [point for point, (_, low, high) in cells.items() if low > 0 or high < 0]
    strongest = max((abs(cells[point][0]) for point in shown), default=0.0)
    spoken = "; ".join(f"{names[0]}={r} {names[1]}={c}: {signed(g)}" for (r, c), (g, _, _) in sorted(cells.items()))
    out = [
        f'<svg class="heat" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{escape(f"{label}. {spoken}")}">'
    ]
    for i, column in enumerate(columns):
        x = left + CELL[0] * (i + 0.5)
        out.append(
            f'<text class="tick" x="{x:g}" y="{top - 9}" text-anchor="middle">{escape(names[1])} = {column}</text>'
        )
    for j, row in enumerate(rows):
        y = top + CELL[1] * j
        out.append(
            f'<text class="tick" x="{left - 8}" y="{y + CELL[1] / 2:g}" dy="0.33em" text-anchor="end">'
            f"{escape(names[0])} = {row}</text>"
        )
        for i, column in enumerate(columns):
            x = left + CELL[0] * i
            box = f'x="{x + 1}" y="{y + 1}" width="{CELL[0] - 2}" height="{CELL[1] - 2}" rx="3"'
            middle = f'x="{x + CELL[0] / 2:g}"'
            if (row, column) == zero:
                out.append(f'<rect class="none" {box}/><text class="value" {middle} y="{y + 20}" ')
                out.append(f'text-anchor="middle">0</text><text class="range" {middle} y="{y + 36}" ')
                out.append('text-anchor="middle">the baseline</text>')
            elif (row, column) not in cells:
                out.append(f'<rect class="blank" {box}/>')
            else:
                gain, low, high = cells[row, column]
                kind = "more" if gain > 0 else "less"
                # at most 0.5, so that the text on it stays readable in both colour schemes
                depth = _depth(gain / strongest) if (row, column) in shown and strongest else 0.04
                out.append(f'<rect class="{kind}" {box} fill-opacity="{depth:.2f}"/>')
                out.append(f'<text class="value" {middle} y="{y + 20}" text-anchor="middle">{signed(gain)}</text>')
                text = f"[{signed(low)}, {signed(high)}]" if math.isfinite(low) else ""
                out.append(f'<text class="range" {middle} y="{y + 36}" text-anchor="middle">{text}</text>')
    return "".join(out) + _key(left, height - 38, strongest) + "</svg>"


def _depth(share: float) -> float:
    """Opacity of a gain that is this share of the largest."""
    return 0.12 + 0.38 * abs(share)


def _key(left: int, y: int, strongest: float) -> str:
    """What the colours mean: a swatch and its gain each."""
    steps = (
        [(-1.0, "less"), (-0.5, "less"), (0.0, "none"), (0.5, "more"), (1.0, "more")] if strongest else [(0.0, "none")]
    )
    out = []
    for i, (share, kind) in enumerate(steps):
        x = left + 66 * i
        opacity = f' fill-opacity="{_depth(share):.2f}"' if share else ""
        text = signed(share * strongest) if share else "not shown"
        out.append(f'<rect class="swatch {kind}" x="{x + 1}" y="{y}" width="64" height="12"{opacity}/>')
        out.append(f'<text class="tick" x="{x + 33}" y="{y + 28}" text-anchor="middle">{text}</text>')
    return "".join(out)
