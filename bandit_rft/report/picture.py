"""The report's first chart as a file of its own: colours, legend and background go with it."""

from __future__ import annotations

from html import escape
from pathlib import Path

from bandit_rft.report.figures import Charts, learning
from bandit_rft.report.load import load_run
from bandit_rft.report.plot import LARGE, Line

LEGEND = 22  # pixels a line of the legend takes
#: The page's light colours (templates/page.css), for places that have no style sheet of ours.
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #555d67 } .grid { stroke: #ece9e2; fill: none } .axis { stroke: #555d67 }
.curve, .faint { fill: none; stroke-linejoin: round } .curve { stroke-width: 2.2 }
.faint { stroke-width: 1; stroke-opacity: .45 }
.band { stroke: none; fill-opacity: .15 } .dot { stroke: none } .cursor { display: none }
"""
COLOURS = ("#1662b8", "#b4500f", "#0d7a5f", "#8b3fb0", "#7b828b")
DASHES = ("none", "7 4", "2 4", "9 3 2 3", "none")


def learning_picture(folder: Path) -> str:
    """An SVG of train, test and the reward of each round.

    Args:
        folder: of the run.

    Raises:
        ValueError: nothing was measured yet.
    """
    figures = learning(load_run(folder), Charts())
    if not figures:
        raise ValueError(f"{folder} has no metrics to draw yet")
    figure = figures[0]
    width, height = LARGE
    drawing = str(figure.svg).partition(">")[2].removesuffix("</svg>")
    names = "".join(_legend(line, height + LEGEND * i) for i, line in enumerate(figure.lines))
    whole = height + LEGEND * len(figure.lines) + 6
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {whole}" width="{width}" height="{whole}" '
        f'role="img" aria-label="{escape(figure.title)}"><style>{_slots()}{STYLE}</style>'
        f'<rect width="{width}" height="{whole}" fill="#ffffff"/>{drawing}{names}</svg>'
    )


def _legend(line: Line, y: int) -> str:
    kind = "faint" if line.faint else "curve"
    return f'<path class="{kind} s{line.slot}" d="M52 {y + 8}h26"/><text x="86" y="{y + 12}">{escape(line.name)}</text>'


def _slots() -> str:
    rules = []
    for slot, (colour, dash) in enumerate(zip(COLOURS, DASHES, strict=True)):
        rules.append(f".s{slot} {{ stroke: {colour} }} .curve.s{slot} {{ stroke-dasharray: {dash} }}")
        rules.append(f".band.s{slot}, .dot.s{slot} {{ fill: {colour} }}")
    return " ".join(rules)
