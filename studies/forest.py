"""Draw a study's pooled gains, test and train, from its results.csv: the picture in the README.

python studies/forest.py studies/results/paper-rounds docs/images/paper-rounds-gains.svg
"""

import csv
import sys
from pathlib import Path

WIDTH, LEFT, RIGHT, ROW, TOP = 720, 230, 20, 26, 46
STYLE = """text{font:13px system-ui,sans-serif;fill:#222}.small{font-size:11px;fill:#666}
.zero{stroke:#222;stroke-width:1}.test{stroke:#1f5fbf;fill:#1f5fbf}.train{stroke:#b8561b;fill:#b8561b}
.bar{stroke-width:2.5}.open{fill:#fff}
@media (prefers-color-scheme:dark){text{fill:#ddd}.small{fill:#aaa}.zero{stroke:#ddd}.test{stroke:#7fb0ff;fill:#7fb0ff}
.train{stroke:#f0a46b;fill:#f0a46b}.open{fill:#0d1117}}"""


def rows(folder: Path) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """Level -> split -> gain, low, high, p_holm of final Pass@1, pooled; one row a distinct configuration."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    seen: set[tuple[str, ...]] = set()
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["metric"] != "final" or row["split"] == "gap" or row["model"] != "all" or row["task"] != "all":
                continue
            level = (row["factor"], row["level"])
            values = {key: float(row[key]) for key in ("gain", "low", "high", "p_holm")}
            key = (row["split"], *(row[name] for name in ("gain", "error", "low", "high")))
            if key not in seen or level in found:
                seen.add(key)
                found.setdefault(level, {})[row["split"]] = values
    return found


def svg(levels: dict[tuple[str, str], dict[str, dict[str, float]]]) -> str:
    """The picture; intervals are those of one comparison, filled marks differ after Holm's correction."""
    ends = [v[end] for of in levels.values() for v in of.values() for end in ("low", "high")]
    low, high = min(ends) - 0.005, max(ends) + 0.005
    height = TOP + ROW * len(levels) + 44

    def x(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>Gain in final Pass@1 over the baseline, with 95% intervals</title>", f"<style>{STYLE}</style>",
        '<circle class="test" cx="236" cy="16" r="4"/><text x="246" y="20">test</text>',
        '<circle class="train" cx="296" cy="16" r="4"/><text x="306" y="20">train</text>',
        '<text x="360" y="20" class="small">filled: differs after Holm\u2019s correction</text>',
        f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="{TOP - 10}" y2="{height - 38}"/>',
    ]  # fmt: skip
    for i, ((factor, level), of_level) in enumerate(levels.items()):
        y = TOP + ROW * i + 8
        parts.append(f'<text x="{LEFT - 14}" y="{y + 4}" text-anchor="end">{factor}: {level}</text>')
        for split, at in (("test", y - 5), ("train", y + 5)):
            v = of_level[split]
            mark = split if v["p_holm"] <= 0.05 else f"{split} open"
            parts.append(f'<line class="bar {split}" x1="{x(v["low"])}" x2="{x(v["high"])}" y1="{at}" y2="{at}"/>')
            parts.append(f'<circle class="{mark}" stroke-width="1.5" cx="{x(v["gain"])}" cy="{at}" r="3.5"/>')
    for tick in range(round(low * 50), round(high * 50) + 1):
        if low <= tick / 50 <= high:
            label = f"{tick / 50:+.2f}" if tick else "0"
            parts.append(
                f'<text class="small" x="{x(tick / 50)}" y="{height - 24}" text-anchor="middle">{label}</text>'
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="small" x="{middle}" y="{height - 6}" text-anchor="middle">'
        "gain in final Pass@1 over the baseline, 95% interval of one comparison</text></svg>"
    )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(svg(rows(Path(sys.argv[1]))), encoding="utf-8")
