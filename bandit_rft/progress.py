"""What the terminal shows of a run: a live line while it trains, a before/after table and two completions at its end.

Model text is printed as text: rich markup in it means nothing, control characters are shown, not sent to the terminal.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bandit_rft.inactive import inactive_keys
from bandit_rft.listener import Listener
from bandit_rft.text import printable

if TYPE_CHECKING:
    from bandit_rft.config import Config
    from bandit_rft.evaluate import EvaluatedSplit
    from bandit_rft.trainer import Trainer

#: Names in the table of an evaluation, so that three splits fit beside each other.
SHORT = {"mean_length": "length", "truncated_fraction": "truncated"}
SMOOTHING = 0.9  # of the shown reward and length, a round


class Count:
    """How much of something is done, and how long the rest will take at that rate."""

    def __init__(self) -> None:
        self.done = 0
        self._begun = self._shown = time.monotonic()

    def add(self, count: int, total: int) -> str:
        """So much more is done; "512 of 8,792, 0:41 left"."""
        self.done += count
        left = (time.monotonic() - self._begun) / max(1, self.done) * (total - self.done)
        return f"{self.done:,} of {total:,}" + (f", {duration(left)} left" if 0 < self.done < total else "")

    def due(self, every: float = 10.0) -> bool:
        """Whether a line about it is due where lines stay: one every ten seconds."""
        now = time.monotonic()
        if now - self._shown < every:
            return False
        self._shown = now
        return True


class ConsoleListener(Listener):
    """Shows a run: a live line in a terminal, plain lines (about one every two seconds, all evaluations) elsewhere."""

    def __init__(self, config: Config, console: Console | None = None):
        self.config = config
        self.console = console or Console(highlight=False)
        self._shown: dict[str, float] = {}
        self._pass_at_1: dict[str, float] = {}
        self._binary: dict[str, bool] = {}  # by split, whether its rewards were 0 and 1 alone
        self._folder: Path | None = None
        self._last_line = -1e9
        self._line = ""
        self._count = Count()
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
        self._folder = trainer.folder
        self.say(
            f"{c.model_name_or_path} on {trainer.task.name}: {len(trainer.data.train):,} training prompts, "
            f"{c.batch_size} x {c.num_generations} rollouts a round, to {trainer.folder}"
        )
        for text in inactive_keys(c):
            self.say(f"note: {text}")
        if getattr(trainer.scorer, "isolation", None) == "fork":
            self.say("Rewards run in forks of this process: one of them cannot be imported.")
        if trainer.round:
            left = "; nothing is left to do" if trainer.finished else ""
            self.say(f"continuing after round {trainer.round}{left}")
        self.say(
            "A loss near 0 is normal here: it is a weighted log-probability, not an error. Watch reward and Pass@1."
        )
        self._rounds = trainer.data.rounds
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.round, total=self._rounds)

    def phase(self, name: str) -> None:
        """Show the current phase."""
        self._count = Count()
        if self._progress is not None:
            self._progress.update(self._task, description=f"{name:<8}")

    def evaluated(self, count: int, total: int) -> None:
        """Show how far an evaluation is, and how long it will take."""
        text = self._count.add(count, total)
        if self._progress is not None:
            self._progress.update(self._task, description=f"evaluate {text}")
        elif self._count.due():
            self.say(f"evaluation: {text}")

    def round_done(self, metrics: dict[str, Any]) -> None:
        """Show a round's numbers."""
        number = int(metrics["round"])
        evaluated = {k.split("/")[1]: v for k, v in metrics.items() if k.startswith("eval/") and k.endswith("/pass@1")}
        self._pass_at_1 |= evaluated
        for split, value in evaluated.items():
            self._binary[split] = self._binary.get(split, True) and _is_pass_at_1(self._folder, split, {number: value})
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
                left = f"  {duration((self._rounds - number) * seconds)} left"
            self.say(f"round {number}/{self._rounds}  {numbers}{left}")

    def _numbers(self, metrics: dict[str, Any]) -> str:
        parts = []
        if "reward" in self._shown:
            parts.append(f"reward {self._shown['reward']:.3f}")
        for split, value in self._pass_at_1.items():
            parts.append(f"{split} {'Pass@1' if self._binary[split] else 'mean reward'} {value:.3f}")
        if "completions/mean_length" in self._shown:
            parts.append(f"length {self._shown['completions/mean_length']:.1f}")
        busy = sum(metrics.get(f"seconds/{phase}") or 0.0 for phase in ("rollout", "reward", "update"))
        if busy:
            parts.append(f"{metrics['tokens/generated'] / busy:,.0f} tok/s")
        return "  ".join(parts)


class EvaluationProgress:
    """How far `bandit-rft eval` is: a live line in a terminal, else a line every ten seconds."""

    def __init__(self, console: Console):
        self.console, self._count = console, Count()
        self._status = console.status("loading") if console.is_terminal else None

    def __enter__(self) -> EvaluationProgress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()

    def drawn(self, count: int, total: int) -> None:
        """So many more completions are drawn and scored; the first time none, once everything is loaded."""
        if not count:
            self._count = Count()
        text = f"evaluation: {self._count.add(count, total)}"
        if self._status is not None:
            self._status.update(Text(text))
        elif self._count.due():
            self.console.print(Text(text))


def evaluation_line(split: EvaluatedSplit) -> dict[str, Any]:
    """One split as `bandit-rft eval --json` prints it."""
    result = split.evaluation
    intervals = {f"eval/{split.name}/{name}": list(interval) for name, interval in result.intervals.items()}
    return {
        "split": split.name, "questions": split.questions, "filtered": split.filtered, **result.metrics,
        "intervals": intervals, "seconds": split.seconds,
    }  # fmt: skip


def show_evaluations(title: str, splits: Sequence[EvaluatedSplit], console: Console) -> None:
    """Print what was measured, a column a split, with 95% intervals over questions where they can be given.

    The mean of rewards that are 0 or 1 is a Pass@1, that of others a mean reward: where splits differ, two rows.
    """
    console.print(Text(printable(title, one_line=True)), soft_wrap=True)
    table = Table("", box=None, pad_edge=False)
    for split in splits:
        table.add_column(Text(split.name))
    of_split = [(split, {k.split("/", 2)[2]: v for k, v in split.evaluation.metrics.items()}) for split in splits]
    table.add_row("questions", *(f"{split.questions:,}" for split in splits))
    if any(split.filtered for split in splits):
        table.add_row("too long", *(f"{split.filtered:,}" for split in splits))
    for name in dict.fromkeys(name for _, values in of_split for name in values):
        if name == "unscored" and not any(values.get(name) for _, values in of_split):
            continue
        called = [_called(name, split.evaluation.binary) for split in splits]
        cells = [_with_interval(values.get(name), split.evaluation.intervals.get(name)) for split, values in of_split]
        for row in dict.fromkeys(of for of, (_, values) in zip(called, of_split, strict=True) if name in values):
            table.add_row(row, *(cell if of == row else "-" for cell, of in zip(cells, called, strict=True)))
    table.add_row("seconds", *(f"{split.seconds:.1f}" for split in splits))
    console.print(table)
    console.print(Text("[ ]: 95% interval over questions, one draw of the samples"))


def _called(name: str, binary: bool) -> str:
    """A metric of a split in words; `binary` as in Evaluation."""
    shown = SHORT.get(name, name.replace("pass@", "Pass@"))
    return shown if binary else shown.replace("Pass@1", "mean reward").replace("Pass@", "best of ")


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> Text:
    if value is None:
        return Text("-")
    number = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
    return Text(number if interval is None else f"{number} [{interval[0]:.3f}, {interval[1]:.3f}]")


def show_result(
    folder: Path, lines: Sequence[dict[str, Any]], report: Path | None, console: Console | None = None
) -> None:
    """Print the before/after table, one question answered before and after, and where the report is."""
    console = console or Console(highlight=False)
    evaluations = [line for line in lines if any(key.startswith("eval/") for key in line)]
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        table = Table("", "before", f"after {last['round']} rounds", "change", title=None)
        for key in [k for k in first if k.startswith("eval/") and k in last and not k.endswith("/unscored")]:
            a, b = first[key], last[key]
            if a is not None and b is not None:
                name = key.removeprefix("eval/").replace("/", " ")
                if key.endswith("/pass@1"):
                    values = {first["round"]: a, last["round"]: b}
                    binary = _is_pass_at_1(folder, key.split("/")[1], values)
                    name = name if binary else name.replace("pass@1", "mean reward")
                table.add_row(Text(name), f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}")
        console.print(table)
        _show_completions(folder, console)
    if report is not None:
        console.print(Text(f"report: {report}"), soft_wrap=True)


def _is_pass_at_1(folder: Path | None, split: str, values: Mapping[int, float | None]) -> bool:
    """Whether these mean rewards, by round, are of rewards 0 and 1: as the stored evaluations say, and the report."""
    from bandit_rft.report.pairs import measured_binary

    fractions = all(value is None or 0 <= value <= 1 for value in values.values())
    return fractions and (folder is None or measured_binary(folder, split, values))


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


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
