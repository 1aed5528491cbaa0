"""What the terminal shows of a run: a live line while it trains, a before/after table and two completions at its end.

Model text is printed as text: rich markup in it means nothing, control characters are shown, not sent to the terminal.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bandit_rft.listener import Listener
from bandit_rft.text import printable

if TYPE_CHECKING:
    from bandit_rft.config import Config
    from bandit_rft.trainer import Trainer

SMOOTHING = 0.9  # of the shown reward and length, a round


class ConsoleListener(Listener):
    """Shows a run: a live line in a terminal, plain lines (about one every two seconds, all evaluations) elsewhere."""

    def __init__(self, config: Config, console: Console | None = None):
        self.config = config
        self.console = console or Console(highlight=False)
        self._shown: dict[str, float] = {}
        self._pass_at_1: dict[str, float] = {}
        self._last_line = -1e9
        self._line = ""
        self._rounds = config.max_rounds  # until the trainer knows better
        self._progress: Progress | None = None
        self._live: Live

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Show that libraries and data are being loaded."""
        status = self.console.status("loading") if self.console.is_terminal else contextlib.nullcontext()
        with status:
            yield

    def __enter__(self) -> ConsoleListener:
        if self.console.is_terminal:
            self._progress = progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("round {task.completed}/{task.total}"),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self._task = self._progress.add_task("loading", total=self.config.max_rounds)
            # The numbers are on a line of their own, which wraps: a narrow terminal must not cut them off.
            self._live = Live(get_renderable=lambda: Group(progress, Text(self._line)), console=self.console)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line of our own."""
        self.console.print(Text(text), soft_wrap=True)

    def started(self, trainer: Trainer) -> None:
        """Say what is about to run."""
        c = self.config
        self.say(
            f"{c.model_name_or_path} on {trainer.task.name}: {len(trainer.data.train):,} training prompts, "
            f"{c.batch_size} x {c.num_generations} rollouts a round, to {trainer.folder}"
        )
        if trainer.scorer.isolation == "fork":
            self.say("Rewards run in forks of this process: one of them cannot be imported.")
        if trainer.round:
            self.say(f"continuing after round {trainer.round}")
        self.say(
            "A loss near 0 is normal here: it is a weighted log-probability, not an error. Watch reward and Pass@1."
        )
        self._rounds = trainer.data.rounds
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.round, total=self._rounds)

    def phase(self, name: str) -> None:
        """Show the current phase."""
        if self._progress is not None:
            self._progress.update(self._task, description=f"{name:<8}")

    def round_done(self, metrics: dict[str, Any]) -> None:
        """Show a round's numbers."""
        number = int(metrics["round"])
        evaluated = {k.split("/")[1]: v for k, v in metrics.items() if k.startswith("eval/") and k.endswith("/pass@1")}
        self._pass_at_1 |= evaluated
        for key in ("reward", "completions/mean_length"):
            if metrics.get(key) is not None:
                before = self._shown.get(key, metrics[key])
                self._shown[key] = SMOOTHING * before + (1 - SMOOTHING) * metrics[key]
        numbers = self._numbers(metrics)
        if self._progress is not None:
            self._line = numbers
            self._progress.update(self._task, completed=number)
        now = time.monotonic()
        due = now - self._last_line > 2 or number == self._rounds
        if evaluated or (self._progress is None and due):
            self._last_line = now
            left = ""
            seconds = (metrics.get("seconds/round") or 0.0) - (metrics.get("seconds/evaluate") or 0.0)
            if self._progress is None and number:
                left = f"  {_duration((self._rounds - number) * seconds)} left"
            self.say(f"round {number}/{self._rounds}  {numbers}{left}")

    def _numbers(self, metrics: dict[str, Any]) -> str:
        parts = []
        if "reward" in self._shown:
            parts.append(f"reward {self._shown['reward']:.3f}")
        measure = "Pass@1" if all(0 <= value <= 1 for value in self._pass_at_1.values()) else "mean reward"
        parts += [f"{split} {measure} {value:.3f}" for split, value in self._pass_at_1.items()]
        if "completions/mean_length" in self._shown:
            parts.append(f"length {self._shown['completions/mean_length']:.1f}")
        busy = sum(metrics.get(f"seconds/{phase}") or 0.0 for phase in ("rollout", "reward", "update"))
        if busy:
            parts.append(f"{metrics['tokens/generated'] / busy:,.0f} tok/s")
        return "  ".join(parts)


def show_result(
    folder: Path, lines: Sequence[dict[str, Any]], report: Path | None, console: Console | None = None
) -> None:
    """Print the before/after table, one question answered before and after, and where the report is."""
    console = console or Console(highlight=False)
    evaluations = [line for line in lines if any(key.startswith("eval/") for key in line)]
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        rewards = [v for line in (first, last) for k, v in line.items() if k.endswith("/pass@1") and v is not None]
        measure = "pass@1" if all(0 <= value <= 1 for value in rewards) else "mean reward"
        table = Table("", "before", f"after {last['round']} rounds", "change", title=None)
        for key in [k for k in first if k.startswith("eval/") and k in last and not k.endswith("/unscored")]:
            a, b = first[key], last[key]
            if a is not None and b is not None:
                name = key.removeprefix("eval/").replace("/", " ").replace("pass@1", measure)
                table.add_row(Text(name), f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}")
        console.print(table)
        _show_completions(folder, console)
    if report is not None:
        console.print(Text(f"report: {report}"), soft_wrap=True)


def _show_completions(folder: Path, console: Console) -> None:
    """The question that the report shows first, answered before and after."""
    from bandit_rft.report.pairs import showcase_of_run

    found = showcase_of_run(folder)
    if found is None:
        return
    _, pair = found
    answer = f"   (answer: {printable(pair.answer)})" if pair.answer is not None else ""
    console.print(Text(f"question: {_short(pair.prompt)}{answer}"))
    for label, reward, text in (("before", pair.before_reward, pair.before), ("after", pair.after_reward, pair.after)):
        console.print(Text(f"{label}, reward {reward}: {_short(text)}"))


def _short(text: str, limit: int = 600) -> str:
    return printable(text, limit)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
