# ruff: noqa: RUF001  (typographic dashes are meant)
"""Assemble the report of a run: one HTML file that needs nothing else and may contact nothing."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from bandit_rft.report.figures import Charts, dynamics, learning
from bandit_rft.report.ledger import ledger
from bandit_rft.report.load import MAX_PAIRS_PER_KIND, Run, load_run
from bandit_rft.report.pairs import OUTCOMES
from bandit_rft.report.plot import number
from bandit_rft.report.shell import render_page
from bandit_rft.report.text import MAX_CHARACTERS, visible
from bandit_rft.report.verdict import judge

SECTIONS = [
    ("curves", "Curves"),
    ("dynamics", "How it got there"),
    ("before-and-after", "Before and after"),
    ("rollouts-section", "Rollouts"),
    ("cost", "Cost"),
    ("config", "Config"),
]
COLUMNS = (  # key in the embedded rows, heading, class
    ("round", "round", ""),
    ("query", "query", "minor"),
    ("reward", "reward", ""),
    ("advantage", "advantage", "minor"),
    ("tokens", "tokens", ""),
    ("logprobs", "log-prob", "minor"),
    ("entropy", "entropy", "minor"),
    ("prompt", "prompt", "left"),
    ("completion", "completion", "left"),
)


def write_report(run_folder: Path | str, output: Path | None = None) -> Path:
    """Write the report of a run.

    The run may be in progress: what is missing or half written is left out and named on the page. The file is replaced
    in one step, so a browser never sees half a page.

    Args:
        run_folder: a run's output_dir.
        output: the page to write; report.html in the folder by default.

    Returns:
        Where the page is.

    Raises:
        FileNotFoundError: `run_folder` is not a folder, or the folder of `output` does not exist.
        ValueError: `run_folder` holds neither config.yaml nor metrics.jsonl.
    """
    folder = Path(run_folder)
    target = folder / "report.html" if output is None else Path(output)
    run = load_run(folder)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"output: the folder {target.parent} does not exist")
    page = render(run)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8", newline="\n")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def render(run: Run) -> str:
    """The whole page."""
    charts, verdict = Charts(), judge(run)
    run.notes[:] = dict.fromkeys(run.notes)
    rewards = {row["reward"] for row in run.rollouts} - {None, 0.0, 1.0}
    changes = [verdict.learned.change, verdict.generalized.change, *(change for _, change in verdict.others)]
    context = {
        "run": run,
        "name": run.folder.resolve().name,
        "title": title(run),
        "facts": facts(run),
        "verdict": verdict,
        "bracketed": any(change is not None and change.interval is not None for change in changes),
        "has_rounds": bool(run.series("reward")),
        "learning": learning(run, charts),
        "dynamics": dynamics(run, charts),
        "evaluations": evaluations(run),
        "ledger": ledger(run),
        "outcomes": [kind for kind in OUTCOMES if any(kind in counts for counts in run.pair_counts.values())],
        "columns": COLUMNS,
        "graded": bool(rewards),
        "most_pairs": MAX_PAIRS_PER_KIND,
        "most_characters": MAX_CHARACTERS,
        "sections": SECTIONS,
    }
    return render_page("run.html", charts.hover, rollout_rows(run), **context)


def title(run: Run) -> str:
    """What was trained on what: the model, the task, and the file of the data where one was given."""
    config = run.config
    task = config.get("task")
    task = task.get("name") if isinstance(task, dict) else task
    model = config.get("model_name_or_path")
    if isinstance(model, str) and model.startswith(("/", ".", "~")):
        model = "/".join(part for part in Path(model).parts[-2:] if part not in ("/", ".", "..", "~"))
    words = " on ".join(visible(x, 80) for x in (model, task) if x) or visible(run.folder.resolve().name, 80)
    data = config.get("data_path")
    return f"{words} ({visible(Path(data).name, 60)})" if isinstance(data, str) and Path(data).name else words


def facts(run: Run) -> list[str]:
    """The line below the title."""
    config = run.config
    last = run.rounds[-1] if run.rounds else 0
    planned = None if config.get("num_train_epochs") else config.get("max_rounds")
    found = [run.folder.resolve().name]
    if isinstance(planned, int) and not isinstance(planned, bool) and planned > last:
        found.append(f"round {last:,} of {planned:,}: in progress, or stopped early")
    else:
        found.append(f"{last:,} rounds, finished" if planned == last and last else f"{last:,} rounds")
    if config.get("batch_size") is not None:
        found.append(f"{config['batch_size']} queries × {config.get('num_generations', 1)} rollout(s) a round")
    names = ("learning_rate", "seed")
    return found + [f"{key.replace('_', ' ')} {config[key]}" for key in names if config.get(key) is not None]


def evaluations(run: Run) -> list[dict[str, Any]]:
    """Every eval/* metric, first and last."""
    keys: dict[str, None] = {}
    for metrics in run.metrics:
        keys |= dict.fromkeys(k for k in metrics if k.startswith("eval/") and k.count("/") >= 2)
    order = {split: i for i, split in enumerate(run.splits())}
    rows = []
    for key in sorted(keys, key=lambda k: (order.get(k.split("/")[1], len(order)), k.split("/")[1])):
        points = run.series(key)
        _, split, name = key.split("/", 2)
        texts = []
        for round_, value in (points[0], points[-1]):
            interval = run.interval(round_, split, value) if name == "pass@1" else None
            texts.append(number(value) + (f" [{number(interval.low)}, {number(interval.high)}]" if interval else ""))
        rows.append({
            "split": split, "metric": run.measure(split) if name == "pass@1" else name, "first": texts[0],
            "last": texts[1], "change": points[-1][1] - points[0][1], "rounds": f"{points[0][0]:,} – {points[-1][0]:,}",
        })  # fmt: skip
    return rows


def rollout_rows(run: Run) -> list[dict[str, Any]]:
    """What the rollout browser shows, as JSON can hold it."""

    def clean(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        return visible(value) if isinstance(value, str) else value

    return [{key: clean(value) for key, value in row.items()} for row in run.rollouts]
