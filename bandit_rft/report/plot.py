"""Line charts as inline SVG, drawn in Python: no plotting library, no network, crisp at any size.

Colours come from the page's stylesheet through the classes s0..s3, so that the charts follow the colour scheme;
the lines differ in dash pattern too, so that they can be told apart without colour.
"""

import math
from dataclasses import dataclass, field
from html import escape
from typing import Any

LARGE, SMALL = (500, 270), (360, 216)
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 22, 40
MAX_MARKERS = 60


@dataclass
class Line:
    """One curve. `low` and `high` (same length as `ys`) draw a band; `slot` picks colour and dash pattern.

    `points` are single measurements behind the curve, (x, y): one a seed, say.
    """

    name: str
    xs: list[float]
    ys: list[float]
    slot: int = 0
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    faint: bool = False
    markers: bool = False
    points: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Chart:
    """`svg` for the page and `hover` for the readout: pixel positions, x values and the lines' values."""

    svg: str
    hover: dict[str, Any]


def number(value: float, digits: int = 3) -> str:
    """A number for people: `digits` significant digits, thousands separated, exponents only where they help."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e9:
        mantissa, exponent = f"{value:.{max(0, digits - 1)}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", "\u2212")
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:,.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "\u2212")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], about `count` of them."""
    raw = (high - low) / max(1, count)
    if not raw > 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high] (both log10), thinned to six; 2 and 5 times a power too where there are few."""
    powers = [float(p) for p in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)]
    if len(powers) < 3:
        fine = [p + math.log10(m) for p in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
        return [p for p in fine if low <= p <= high]
    return powers[:: max(1, math.ceil(len(powers) / 6))]


def chart(
    label: str,
    lines: list[Line],
    *,
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    size: tuple[int, int] = LARGE,
    y_title: str = "",
    x_title: str = "round",
) -> Chart:
    """Draw `lines`, over rounds or what else `x_title` names.

    Args:
        label: what a screen reader says.
        lines: the curves; those without points are left out.
        y_range: shown at least; without it the axis fits the values.
        log: a logarithmic axis, used only if every value is above 0.
        size: width and height of the drawing; the page scales it.
        y_title: what the vertical axis measures.
        x_title: what the horizontal one counts.
    """
    width, height = size
    lines = [line for line in lines if line.xs]
    values = [y for line in lines for y in (*line.ys, *line.low, *line.high, *(y for _, y in line.points))]
    log = log and bool(values) and min(values) > 0
    scale_y = math.log10 if log else float
    low, high = (scale_y(min(values)), scale_y(max(values))) if values else (0.0, 1.0)
    if y_range is not None:
        low, high = min(low, y_range[0]), max(high, y_range[1])
    constant = high if values and high - low <= abs(high) * 1e-9 else None
    if high - low <= abs(high) * 1e-9:  # a constant needs some room around it
        room = abs(high) * 0.1 or (0.5 if log else 1.0)
        low, high = low - room, high + room
    elif y_range is None:
        room = (high - low) * 0.06
        low, high = (low if low >= 0 > low - room and not log else low - room), high + room
    xs = [x for line in lines for x in line.xs]
    x0, x1 = (min(xs), max(xs)) if xs else (0.0, 1.0)
    if x1 <= x0:
        x0, x1 = x0 - 1, x1 + 1

    def px(x: float) -> float:
        return round(LEFT + (x - x0) / (x1 - x0) * (width - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        share = (min(max(scale_y(y), low), high) - low) / (high - low)
        return round(height - BOTTOM - share * (height - TOP - BOTTOM), 1)

    out = [
        f'<svg class="chart{" small" if size == SMALL else ""}" viewBox="0 0 {width} {height}" role="img" '
        f'tabindex="0" aria-label="{escape(label)}">'
    ]
    y_ticks = [constant] if constant is not None else _log_ticks(low, high) if log else ticks(low, high)
    grid: list[str] = []
    for tick in y_ticks:
        y = py(10**tick if log else tick)
        text = number(10**tick if log else tick)
        grid.append(f"M{LEFT} {y}H{width - RIGHT}")
        out.append(f'<text class="tick" x="{LEFT - 8}" y="{y}" dy="0.33em" text-anchor="end">{text}</text>')
    base = height - BOTTOM
    out.append(f'<path class="grid" d="{"".join(grid)}"/>')
    out.append(f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{base}" y2="{base}"/>')
    if y_title:
        out.append(f'<text class="tick title" x="{LEFT}" y="12">{escape(y_title)}</text>')
    for tick in (t for t in ticks(x0, x1) if t == int(t)):
        anchor, text = "middle", number(tick, 9)
        if px(tick) + 4 * len(text) > width:  # the last label would be cut at the edge
            anchor = "end"
        out.append(f'<text class="tick" x="{px(tick)}" y="{base + 17}" text-anchor="{anchor}">{text}</text>')
    out.append(
        f'<text class="tick" x="{width - RIGHT}" y="{height - 5}" text-anchor="end">{escape(x_title)} \u2192</text>'
    )

    for line in lines:
        if line.low:
            top = [f"{px(x)},{py(y)}" for x, y in zip(line.xs, line.high, strict=True)]
            bottom = [f"{px(x)},{py(y)}" for x, y in zip(line.xs, line.low, strict=True)]
            if len(line.xs) > 1:
                out.append(f'<polygon class="band s{line.slot}" points="{" ".join(top + bottom[::-1])}"/>')
            else:
                x = px(line.xs[0])
                out.append(
                    f'<line class="bar s{line.slot}" x1="{x}" x2="{x}" y1="{py(line.low[0])}" y2="{py(line.high[0])}"/>'
                )
    for line in lines:
        points = [(px(x), py(y)) for x, y in zip(line.xs, line.ys, strict=True)]
        kind = "faint" if line.faint else "curve"
        if len(points) > 1:
            path = "M" + "L".join(f"{x} {y}" for x, y in points)
            out.append(f'<path class="{kind} s{line.slot}" d="{path}"/>')
        if line.points:
            marks = "".join(f"M{px(x)} {py(y)}h0" for x, y in line.points)
            out.append(f'<path class="points s{line.slot}" d="{marks}"/>')
        if len(points) == 1 or (line.markers and len(points) <= MAX_MARKERS):
            out += [f'<circle class="dot s{line.slot}" cx="{x}" cy="{y}" r="3.2"/>' for x, y in points]
    out.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{base}" visibility="hidden"/></svg>')

    columns = sorted(set(xs))
    hover: dict[str, Any] = {
        "axis": x_title,
        "x": [_short(x) for x in columns],
        "px": [px(x) for x in columns],
        "lines": [],
    }
    for line in lines:
        texts = dict(zip(line.xs, [number(y) for y in line.ys], strict=True))
        if line.low:
            for x, a, b in zip(line.xs, line.low, line.high, strict=True):
                texts[x] += f" [{number(a)}, {number(b)}]"
        hover["lines"].append({"name": line.name, "values": [texts.get(x) for x in columns]})
    return Chart("".join(out), hover)


def _short(x: float) -> float | int:
    return int(x) if x == int(x) else x


def legend(lines: list[Line]) -> str:
    """The names of the curves, each with a sample of its line."""
    items = []
    for line in lines:
        kind = "faint" if line.faint else "curve"
        items.append(
            f'<li><svg class="key" viewBox="0 0 26 10" aria-hidden="true"><path class="{kind} s{line.slot}" d="M1 '
            '5L25 5"/></svg>'
            f"{escape(line.name)}</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def stacked_bar(label: str, parts: list[tuple[str, float]]) -> str:
    """One horizontal bar whose segments are in proportion to `parts`; classes p0, p1, ... colour them."""
    total = math.fsum(value for _, value in parts) or 1.0
    out = [
        f'<svg class="stack" viewBox="0 0 1000 28" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
    ]
    at = 0.0
    for i, (name, value) in enumerate(parts):
        width = value / total * 1000
        if width > 0:
            tip = f"<title>{escape(name)} {100 * value / total:.0f}%</title>"
            out.append(
                f'<rect class="p{i}" x="{at:.2f}" y="0" width="{max(0.0, width - 2):.2f}" height="28">{tip}</rect>'
            )
        at += width
    return "".join(out) + "</svg>"
