"""What a finished run is in a script or a notebook: its lines, a table of them, a picture, the report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from bandit_rft.checkpoint import list_checkpoints
from bandit_rft.text import html_table, printable

if TYPE_CHECKING:
    import pandas

    from bandit_rft.model import Policy

Line = dict[str, Any]


class Report:
    """The report of a run, one HTML file that fetches nothing; a notebook shows it in a frame.

    Attributes:
        path: of report.html.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def html(self) -> str:
        """The file's text."""
        return self.path.read_text(encoding="utf-8")

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Report({str(self.path)!r})"

    def _repr_html_(self) -> str:
        style = "width: 100%; height: 600px; border: 1px solid #8888"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{escape(self.html)}"></iframe>'


class Picture:
    """A drawing that stands for itself: shown by a notebook, or written to a file.

    Attributes:
        svg: its text.
    """

    def __init__(self, svg: str):
        self.svg = svg

    def save(self, path: str | Path) -> None:
        """Write it to a file, by custom one whose name ends in .svg."""
        Path(path).write_text(self.svg, encoding="utf-8")

    def __repr__(self) -> str:
        return f"Picture({len(self.svg):,} characters of SVG)"

    def _repr_svg_(self) -> str:
        return self.svg


class RunResult(Sequence[Line]):
    """A run that has ended; as a sequence, the lines of metrics.jsonl: before training, then one a round.

    Attributes:
        folder: the run folder.
        lines: of metrics.jsonl.
        policy: what was trained, as it is now.
        finished: False where the run was stopped before its budget was used up.
    """

    def __init__(self, folder: Path, lines: list[Line], policy: Policy, finished: bool = True):
        self.folder, self.lines, self.policy, self.finished = folder, lines, policy, finished

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> Line: ...
    @overload
    def __getitem__(self, index: slice) -> list[Line]: ...
    def __getitem__(self, index: int | slice) -> Line | list[Line]:
        return self.lines[index]

    @property
    def model(self) -> Any:
        """The Hugging Face model that was trained."""
        return self.policy.model

    @property
    def metrics(self) -> pandas.DataFrame:
        """The lines as a table, indexed by round.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("result.metrics is a pandas DataFrame: pip install pandas (or take .lines)") from error
        columns = list(dict.fromkeys(key for line in reversed(self.lines) for key in line))
        return pandas.DataFrame(self.lines, columns=columns).set_index("round")

    @property
    def report(self) -> Report | None:
        """The report, where one was written."""
        path = self.folder / "report.html"
        return Report(path) if path.is_file() else None

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint, a Hugging Face folder."""
        return next(iter(list_checkpoints(self.folder / "checkpoints")[-1:]), None)

    def plot(self) -> Picture:
        """Train, test and the reward of each round, as the report shows them.

        Raises:
            ValueError: for a run without a line to draw.
        """
        from bandit_rft.report.picture import learning_picture

        return Picture(learning_picture(self.folder))

    def summary(self) -> list[tuple[str, float, float]]:
        """(name, before, after) of the reward of a round and of every evaluation, where it was measured twice."""
        from bandit_rft.report.pairs import measured_binary

        found = []
        keys = dict.fromkeys(key for line in self.lines for key in line if key.startswith("eval/"))
        for key in ["reward", *(key for key in keys if not key.endswith(("/unscored", "/filtered")))]:
            values = [line[key] for line in self.lines if line.get(key) is not None]
            if len(values) < 2:
                continue
            name = key.removeprefix("eval/").replace("/", " ")
            if "/pass@" in key:
                fractions = all(0 <= value <= 1 for value in values)
                if not (fractions and measured_binary(self.folder, key.split("/")[1])):
                    name = name.replace("pass@1", "mean reward")
            found.append((name, values[0], values[-1]))
        return found

    def __repr__(self) -> str:
        names = ("reward", "pass@1")
        parts = [f"{name} {a:.3f} -> {b:.3f}" for name, a, b in self.summary() if name.endswith(names)]
        return f"RunResult({'; '.join([self._rounds, *parts, printable(str(self.folder))])})"

    @property
    def _rounds(self) -> str:
        rounds = self.lines[-1]["round"] if self.lines else 0
        return f"{rounds} rounds" + ("" if self.finished else ", stopped before the end")

    def _repr_html_(self) -> str:
        rows = [(n, f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}") for n, a, b in self.summary()]
        return html_table(("", "before", "after", "change"), rows, f"{self._rounds}, in {self.folder}")
