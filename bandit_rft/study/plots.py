"""The study report's own plots as inline SVG: a forest of intervals and a heat map, in the run report's colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from bandit_rft.report.plot import number, ticks

FOREST_WIDTH, ROW_HEIGHT = 380, 34
CELL = (104, 54)


def signed(value: float) -> str:
    """+0.012, with a real minus sign; a dash for what is not known."""
    return "\u2013" if math.isnan(value) else f"{value:+.3f}".replace("-", "\u2212")


class Forest:
    """Rows of intervals on one scale. Each method returns one <svg> for a table cell, so that a row is a table row."""

    def __init__(self, intervals: Sequence[tuple[float, float]]):
        known = [x for pair in intervals for x in pair if math.isfinite(x)] or [-0.01, 0.01]
        low, high = min(0.0, *known), max(0.0, *known)
        room = (high - low) * 0.05 or 0.01
        self.low, self.high = low - room, high + room

    def _x(self, value: float) -> float:
        return round(6 + (value - self.low) / (self.high - self.low) * (FOREST_WIDTH - 12), 1)

    def _open(self, label: str, height: int) -> str:
        return f'<svg class="forest" viewBox="0 0 {FOREST_WIDTH} {height}" role="img" aria-label="{escape(label)}">'

    def axis(self) -> str:
        """The scale's numbers."""
        out = [self._open("scale of the gain", 20)]
        for tick in ticks(self.low, self.high, 6):
            x = self._x(tick)
            anchor = "start" if x < 20 else "end" if x > FOREST_WIDTH - 20 else "middle"
            text = "0" if abs(tick) < 1e-12 else f"{'+' if tick > 0 else ''}{number(tick)}"
            out.append(f'<text class="tick" x="{x}" y="14" text-anchor="{anchor}">{text}</text>')
        return "".join(out) + "</svg>"

    def row(self, marks: Sequence[tuple[str, int, float, float, float, bool]]) -> str:
        """Intervals under each other: (name, colour slot, low, gain, high, whether the marker is filled)."""
        label = "; ".join(f"{name} {signed(gain)} [{signed(a)}, {signed(b)}]" for name, _, a, gain, b, _ in marks)
        out = [self._open(label, ROW_HEIGHT)]
        for tick in ticks(self.low, self.high, 6):
            kind = "zero" if abs(tick) < 1e-12 else "grid"
            out.append(f'<line class="{kind}" x1="{self._x(tick)}" x2="{self._x(tick)}" y1="0" y2="{ROW_HEIGHT}"/>')
        for i, (_, slot, low, gain, high, filled) in enumerate(marks):
            y = round((i + 0.5) * (ROW_HEIGHT - 8) / len(marks) + 4, 1)
            if math.isfinite(low) and math.isfinite(high):
                ends = f'x1="{self._x(low)}" x2="{self._x(high)}" y1="{y}" y2="{y}"'
                out.append(f'<line class="interval s{slot}" {ends}/>')
            if not self.low <= gain <= self.high:
                continue  # no interval is known, and this scale was not made for the gain
            kind, x = f'class="mark s{slot}{"" if filled else " open"}"', self._x(gain)
            if slot == 0:
                out.append(f'<circle {kind} cx="{x}" cy="{y}" r="4.2"/>')
            else:
                out.append(f'<rect {kind} x="{round(x - 3.6, 1)}" y="{round(y - 3.6, 1)}" width="7.2" height="7.2"/>')
        return "".join(out) + "</svg>"


def heat_map(
    label: str, rows: Sequence[int], columns: Sequence[int],
    cells: Mapping[tuple[int, int], tuple[float, float, float]], names: tuple[str, str],
) -> str:  # fmt: skip
    """Gains (gain, low, high) at (row, column): blue above 0, orange below, the deeper the larger; blank: not run."""
    left, top = 70, 26
    width, height = left + CELL[0] * len(columns) + 4, top + CELL[1] * len(rows) + 26
    strongest = max((abs(gain) for gain, _, _ in cells.values()), default=0.0) or 1.0
    spoken = "; ".join(f"{names[0]}={r} {names[1]}={c}: {signed(g)}" for (r, c), (g, _, _) in sorted(cells.items()))
    out = [
        f'<svg class="heat" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{escape(f"{label}. {spoken}")}">'
    ]
    for i, column in enumerate(columns):
        x = left + CELL[0] * (i + 0.5)
        out.append(
            f'<text class="tick" x="{x}" y="{top - 9}" text-anchor="middle">{escape(names[1])} = {column}</text>'
        )
    for j, row in enumerate(rows):
        y = top + CELL[1] * j
        out.append(
            f'<text class="tick" x="{left - 10}" y="{y + CELL[1] / 2}" dy="0.33em" text-anchor="end">'
            f"{escape(names[0])} = {row}</text>"
        )
        for i, column in enumerate(columns):
            x = left + CELL[0] * i
            box = f'x="{x + 1}" y="{y + 1}" width="{CELL[0] - 2}" height="{CELL[1] - 2}" rx="3"'
            if (row, column) not in cells:
                out.append(f'<rect class="blank" {box}/>')
                continue
            gain, low, high = cells[row, column]
            kind, middle = "more" if gain > 0 else "less", x + CELL[0] / 2
            # at most 0.5, so that the text on it stays readable in both colour schemes
            out.append(f'<rect class="{kind}" {box} fill-opacity="{0.06 + 0.44 * abs(gain) / strongest:.3f}"/>')
            out.append(f'<text class="value" x="{middle}" y="{y + 23}" text-anchor="middle">{signed(gain)}</text>')
            out.append(
                f'<text class="range" x="{middle}" y="{y + 41}" text-anchor="middle">'
                f"[{signed(low)}, {signed(high)}]</text>"
            )
    return "".join(out) + "</svg>"
