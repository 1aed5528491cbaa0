"""The scaling curves of a run as SVG files: a panel of times and, where it was measured, one of peak memory.

The same JSON gives the same bytes: the files are committed, and a change in them is a change in what was measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter

from .record import spread

STYLES = (("#1662b8", "o", "-"), ("#b4500f", "s", "--"), ("#0d7a5f", "^", ":"), ("#8b3fb0", "D", "-."))
LINEAR = ("zero rows", "threads")  # whose horizontal axis is not logarithmic
plt.rcParams.update(
    {"svg.hashsalt": "bandit_rft", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
)


def curves_of(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """{curve: its points, by what grows}."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in data["cases"].values():
        if case.get("group") == "scaling":
            found.setdefault(case["curve"], []).append(case)
    return {name: sorted(points, key=lambda case: case["x"]) for name, points in found.items()}


def short(x: float) -> str:
    """1024 as 1k."""
    return f"{x / 1024:g}k" if x >= 1024 and x % 1024 == 0 else f"{x:g}"


def described(machine: dict[str, Any], points: list[dict[str, Any]]) -> str:
    """One line: where these points are from."""
    commits = sorted({case[key] for case in points for key in ("commit", "peaks_commit") if key in case})
    threads = "" if points[0]["curve"] == "threads" else f"{machine['threads']} threads, "
    return (
        f"{machine['cpu']}, {threads}float32, torch {machine['versions']['torch']}; "
        f"{max(case['date'] for case in points)}, {', '.join(commits)}"
    )


def draw(points: list[dict[str, Any]], path: Path, machine: dict[str, Any]) -> None:
    """One curve, a file: medians, with quartiles as bars; below, the machine."""
    names = list(dict.fromkeys(name for case in points for name in case["sides"]))
    with_memory = any("peak_mib" in side for case in points for side in case["sides"].values())
    panels = ["seconds", "peak_mib"] if with_memory else ["seconds"]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.4), squeeze=False, layout="constrained")
    for ax, what in zip(axes[0], panels, strict=True):
        for name, (colour, marker, dash) in zip(names, STYLES, strict=False):
            own = [(case["x"], case["sides"][name][what]) for case in points if what in case["sides"].get(name, {})]
            xs = [x for x, _ in own]
            if what == "seconds":
                spreads = [spread(seconds) for _, seconds in own]
                ys = [one.median * 1e3 for one in spreads]
                low = [(one.median - one.low) * 1e3 for one in spreads]
                high = [(one.high - one.median) * 1e3 for one in spreads]
                ax.errorbar(xs, ys, (low, high), color=colour, marker=marker, ls=dash, ms=4, capsize=2, label=name)
            else:
                ax.plot(xs, [max(y, 1.0) for _, y in own], color=colour, marker=marker, ls=dash, ms=4, label=name)
        if points[0]["curve"] not in LINEAR:
            ax.set_xscale("log", base=2)
        ax.set_xticks([case["x"] for case in points], [short(case["x"]) for case in points])
        if points[0]["curve"] == "threads":
            ax.set_ylim(bottom=0)
        else:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))  # where a decade is all there is
        ax.set_xlabel(points[0]["axis"])
        ax.set_title("median ms" if what == "seconds" else "peak MiB beyond inputs and gradients", fontsize=10)
        ax.grid(alpha=0.25)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.supxlabel(described(machine, points), fontsize=7, color="#666666", x=0.01, ha="left", wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def file_of(curve: str) -> str:
    """The curve's file name."""
    return f"scaling-{curve.replace(' ', '-')}.svg"


def draw_all(data: dict[str, Any], folder: Path) -> list[Path]:
    """Every curve of a run."""
    paths = []
    for curve, points in curves_of(data).items():
        paths.append(folder / file_of(curve))
        draw(points, paths[-1], data["machine"])
    return paths
