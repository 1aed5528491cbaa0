"""What a trainer tells the outside: the terminal, the report, a test."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bandit_rft.metrics import Metrics
    from bandit_rft.trainer import Trainer


class Listener:
    """Told of a run as it happens; each method does nothing until a subclass says otherwise."""

    def started(self, trainer: Trainer) -> None:
        """Everything is loaded, the first round comes next."""

    def phase(self, name: str) -> None:
        """A phase ("rollout", "evaluate", ...) begins."""

    def evaluated(self, count: int, total: int) -> None:
        """So many more of an evaluation's completions are drawn and scored; the phase "evaluate" begins with none."""

    def round_done(self, metrics: Metrics) -> None:
        """A round's line was written (round 0: the evaluation before training)."""

    def finished(self, trainer: Trainer) -> None:
        """The run ended, by its budget or because it was asked to stop, and is saved."""


class Listeners(Listener):
    """Several listeners, told one after another."""

    def __init__(self, *listeners: Listener):
        self.listeners = listeners

    def started(self, trainer: Trainer) -> None:
        """Tell everyone."""
        for listener in self.listeners:
            listener.started(trainer)

    def phase(self, name: str) -> None:
        """Tell everyone."""
        for listener in self.listeners:
            listener.phase(name)

    def evaluated(self, count: int, total: int) -> None:
        """Tell everyone."""
        for listener in self.listeners:
            listener.evaluated(count, total)

    def round_done(self, metrics: Metrics) -> None:
        """Tell everyone."""
        for listener in self.listeners:
            listener.round_done(metrics)

    def finished(self, trainer: Trainer) -> None:
        """Tell everyone."""
        for listener in self.listeners:
            listener.finished(trainer)
