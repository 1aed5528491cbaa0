"""The HTML report of a run: one file, no network, readable while the run is still going."""

from bandit_rft.report.page import write_report
from bandit_rft.report.writer import ReportWriter

__all__ = ["ReportWriter", "write_report"]
