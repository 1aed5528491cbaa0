"""What a study has come to: counts over all cells, the cells at work, and what went wrong."""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bandit_rft.config import Config
from bandit_rft.metrics import read_metrics
from bandit_rft.progress import duration
from bandit_rft.study.plan import Plan, PlannedCell, planned_cells, seed_warning
from bandit_rft.study.price import Cost, estimate_cost
from bandit_rft.study.run import read_record
from bandit_rft.text import LIMIT, printable

STATES = ("finished", "running", "stopped", "failed", "waiting")


@dataclass
class Status:
    """What a look at a study folder found.

    Attributes:
        states: of each cell, one of STATES.
        progress: (cell, round, reward) of those at work.
        failures: (cell, end of its error).
        seconds: that each finished cell took.
    """

    states: dict[str, str]
    progress: list[tuple[str, int, float | None]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def counts(self) -> Counter[str]:
        """How many cells are in each state."""
        return Counter(self.states.values())


def read_status(folder: Path, cells: Sequence[str] | None = None) -> Status:
    """Look at a study folder. "running" is what cell.json says: the cell of a runner that was killed says so too."""
    if cells is None:
        cells = [cell["id"] for cell in planned_cells(folder)]
    status = Status({})
    for cell in cells:
        record = read_record(folder, cell)
        state = status.states[cell] = record.get("status") or "waiting"
        if state == "running":
            line = last_line(folder / "cells" / cell / "metrics.jsonl")
            status.progress.append((cell, int(line.get("round", 0)), line.get("reward")))
        elif state == "finished" and isinstance(record.get("seconds"), int | float):
            status.seconds[cell] = float(record["seconds"])
        elif state == "failed":
            lines = str(record.get("error") or "").strip().splitlines()
            status.failures.append((cell, " / ".join(lines[-2:])))
    return status


def last_line(path: Path) -> dict[str, Any]:
    """The last whole line of a metrics.jsonl; {} before there is one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16384))
            for line in reversed(file.read().split(b"\n")[:-1]):
                try:
                    values = json.loads(line)
                except ValueError:
                    continue
                return values if isinstance(values, dict) else {}
    except OSError:
        pass
    return {}


def show_status(folder: Path, console: Console) -> None:
    """Print the counts and the time left, every cell at work, and every failure with its reason."""
    entries = {cell["id"]: cell for cell in planned_cells(folder)}
    status = read_status(folder, list(entries))
    rounds = {cell: planned(folder, cell, entries[cell]) for cell, *_ in status.progress}
    counts = ", ".join(f"{status.counts[state]} {state}" for state in STATES if status.counts[state])
    left, at_once = seconds_left(folder, entries, status, rounds), len(status.progress)
    shown = "" if not left else f"; about {duration(left / max(1, at_once))} left"
    shown += (
        f" at {at_once} at a time" if left and at_once else " for one at a time, nothing is running" if left else ""
    )
    console.print(f"{len(status.states)} cells: {counts}{shown}", markup=False, soft_wrap=True)
    for cell, round_, reward in status.progress:
        of, earned = f"/{rounds[cell]}" if rounds[cell] else "", "" if reward is None else f"  reward {reward:.3f}"
        console.print(f"  running  {cell}  round {round_}{of}{earned}", markup=False, soft_wrap=True)
    for cell, error in status.failures:
        console.print(f"  failed   {cell}  {printable(str(error), LIMIT)}", markup=False, style="red")


def planned(folder: Path, cell: str, entry: Mapping[str, Any]) -> int | None:
    """How many rounds a cell takes, where its budget is one of rounds; None where that is not known."""
    config = entry.get("config")
    config = config if isinstance(config, dict) else {}
    if any(config.get(key) for key in ("max_generated_tokens", "max_seconds", "num_train_epochs")):
        return None
    try:
        text = (folder / "cells" / cell / "config.yaml").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^max_rounds: (\d+)$", text, re.MULTILINE)
    rounds = int(found[1]) if found else config.get("max_rounds")
    return rounds if isinstance(rounds, int) else None


def seconds_left(
    folder: Path, entries: Mapping[str, Mapping[str, Any]], status: Status, rounds: Mapping[str, int | None]
) -> float | None:
    """Seconds of one cell after another for what is not done, from the cells that are; None before anything is known.

    A cell takes what others of its level, model and task took, or of its level, or all others on average; before any is
    finished, those at work are measured by their rounds.
    """
    groups: dict[tuple[Any, ...], list[float]] = {}

    def kinds(cell: str) -> list[tuple[Any, ...]]:
        level = tuple(entries[cell].get(key) for key in ("factor", "level"))
        return [(*level, entries[cell].get("model"), entries[cell].get("task")), level, ()]

    for cell, seconds in status.seconds.items():
        for kind in kinds(cell):
            groups.setdefault(kind, []).append(seconds)
    begun = {cell: round_ / total for cell, round_, _ in status.progress if (total := rounds[cell])}
    for cell, share in begun.items() if not status.seconds else ():
        spent = sum(line.get("seconds/round") or 0.0 for line in read_metrics(folder / "cells" / cell))
        if share:
            groups.setdefault((), []).append(spent / share)
    left = [cell for cell, state in status.states.items() if state in ("waiting", "stopped", "running")]
    if not left or not groups:
        return None
    seconds_of = {cell: next(groups[kind] for kind in kinds(cell) if kind in groups) for cell in left}
    return sum(sum(known) / len(known) * (1 - min(1.0, begun.get(cell, 0.0))) for cell, known in seconds_of.items())


def show_plan(plan: Plan, console: Console) -> None:
    """Print the levels with their number of cells and estimated cost, and the sum."""
    table = Table(box=None, pad_edge=False)
    for name, justify in (("factor", "left"), ("level", "left"), ("cells", "right"), ("generated", "right"),
                          ("evaluated", "right"), ("trained", "right"), ("GPU-hours", "right")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    total, by_level = Cost(), dict[tuple[str, str], list[Cost]]()
    tried = [estimate_cost(plan.tuning, cell) for cell in plan.tuning.cells] if plan.tuning else []
    if tried and plan.tune:
        each = f"{len(plan.tune.grid)} values a level"
        table.add_row(Text(f"choosing {plan.tune.key}"), each, str(len(tried)), *_cost_columns(sum(tried, Cost())))
        total = sum(tried, total)
    shared: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for cell in plan.cells:
        cost = estimate_cost(plan, cell)
        by_level.setdefault((cell.factor, cell.level), []).append(cost)
        for place in cell.also:
            shared.setdefault(place, set()).add((cell.factor, cell.level))
        total += cost
    for (factor, level), costs in by_level.items():
        table.add_row(Text(factor), Text(level), str(len(costs)), *_cost_columns(sum(costs, Cost())))
    for (factor, level), of in shared.items():
        if (factor, level) not in by_level:
            table.add_row(Text(factor), Text(level), "", "the cells of " + " / ".join(sorted(of)[0]))
    table.add_section()
    table.add_row("all", "", str(len(plan.cells) + len(tried)), *_cost_columns(total))
    console.print(table)
    if (warning := seed_warning(plan)) is not None:
        console.print(f"note: {warning}", markup=False, style="yellow")
    console.print("tokens and GPU-hours are estimates (docs/study.md, Price); nothing has been run", markup=False)


def _cost_columns(cost: Cost) -> list[str]:
    tokens = (cost.generated, cost.evaluated, cost.trained)
    return [
        *("-" if math.isnan(count) else f"{count / 1e6:,.2f}M" for count in tokens),
        f"{cost.gpu_hours:,.2f}" if cost.gpu_hours else "-",
    ]


class StudyProgress:
    """A live view in a terminal: all cells, and every cell at work with its round; elsewhere a line a cell."""

    def __init__(self, plan: Plan, folder: Path, console: Console | None = None, *, verbose: bool = False):
        self.plan, self.folder, self.verbose = plan, folder, verbose
        self.console = console or Console(highlight=False)
        self._totals: dict[str, int] = {}
        self._begun: dict[str, float] = {}
        self._last_look = 0.0
        self._progress = Progress(
            TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        )
        self._task = self._progress.add_task("cells", total=len(plan.cells))
        self._lines: list[str] = []
        self._failed = 0
        self._live: Live | None = None

    def __enter__(self) -> StudyProgress:
        self._look()
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._look()
            self._live.stop()

    def started(self, cell: PlannedCell, config: Config) -> None:
        """A cell of this runner begins."""
        self._totals[cell.id] = config.max_rounds
        self._begun[cell.id] = time.monotonic()
        if self.verbose:
            self.console.print(f"started  {cell.id}", markup=False, soft_wrap=True)

    def ended(self, cell: PlannedCell, record: dict[str, Any]) -> None:
        """A cell of this runner ended; where no terminal is, or it failed, a line says so."""
        seconds = time.monotonic() - self._begun.pop(cell.id)
        self._look()
        done = self._progress.tasks[0].completed
        line = f"{done:.0f}/{len(self.plan.cells)}  {record['status']}  {cell.id}  {seconds:.0f} s"
        if record["status"] == "failed":
            line += "  " + str(record["error"]).strip().splitlines()[-1]
        if not self.console.is_terminal or record["status"] == "failed":
            self.console.print(line, markup=False, soft_wrap=True)

    def tick(self) -> None:
        """Called again and again while cells run: look at the folder when it is time."""
        if time.monotonic() - self._last_look > max(2.0, len(self.plan.cells) / 500):
            self._look()

    def _look(self) -> None:
        """All cells, other runners' too."""
        status = read_status(self.folder, [cell.id for cell in self.plan.cells])
        self._last_look = time.monotonic()
        self._progress.update(self._task, completed=status.counts["finished"])
        self._failed = status.counts["failed"]
        self._lines = []
        for cell, round_, reward in status.progress:
            total = self._totals.get(cell)
            of, shown = f"/{total}" if total else "", "" if reward is None else f"  reward {reward:.3f}"
            self._lines.append(f"  {cell}  round {round_}{of}{shown}{'' if cell in self._begun else '  (elsewhere)'}")

    def _render(self) -> Group:
        failed = [Text(f"  {self._failed} failed", style="red")] if self._failed else []
        return Group(self._progress, *(Text(line) for line in self._lines), *failed)
