"""A listener that writes the report when a run ends."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from bandit_rft.listener import Listener

if TYPE_CHECKING:
    from bandit_rft.trainer import Trainer

logger = logging.getLogger(__name__)


class ReportWriter(Listener):
    """Writes report.html into the run folder; `path` is where, or None while there is none."""

    def __init__(self) -> None:
        self.path: Path | None = None

    def finished(self, trainer: Trainer) -> None:
        """Training is done and saved: whatever goes wrong here is said and nothing more."""
        try:
            from bandit_rft.report.page import write_report

            self.path = write_report(trainer.folder)
        except (ImportError, OSError, ValueError) as error:
            logger.warning("no report was written: %s; `bandit-rft report %s` tries again", error, trainer.folder)
