"""The report of a study: one HTML page that contacts nothing, a Markdown twin, and every table as CSV.

Equal results give equal bytes. What a clock measured stands between `<!-- timings -->` and `<!-- /timings -->` (and in
timings.csv), and nowhere else.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bandit_rft.report.figures import Charts
from bandit_rft.report.shell import environment, markdown_block, render_page
from bandit_rft.study.analyse import Analysis, analyse_study
from bandit_rft.study.figures import curves, forests, maps
from bandit_rft.study.findings import baseline_finding, finding, recommend
from bandit_rft.study.packed import CLOCKS, FILE, Packer
from bandit_rft.study.pairing import Row
from bandit_rft.study.points import Pairs
from bandit_rft.study.tables import LEFT_ALIGNED, Tables

DIGITS = 6
SECTIONS = [
    ("findings", "Findings"),
    ("gains", "Gains"),
    ("curves", "Curves"),
    ("plane", "Batch and rollouts"),
    ("endpoints", "Endpoints"),
    ("wider", "Wider claims"),
    ("beyond", "Beyond Pass@1"),
    ("cost", "Cost"),
    ("precision", "Precision"),
    ("levels", "Every level"),
    ("unused", "Unused cells"),
    ("configurations", "Configurations"),
]


def write_study_report(study_folder: Path | str, output: Path | None = None) -> Path:
    """Analyse a study folder and write its report: report.html, report.md, and the tables behind them.

    The tables are results.csv, results.parquet, curves.csv, costs.csv, cells.csv, timings.csv and, where the study file
    asks for them, contrasts.csv and tuning.csv. cells.npz (with clocks.csv) holds all that they are made of. Each file
    is replaced in one step.

    Args:
        study_folder: what `study run` made, finished or not; or a folder that holds cells.npz.
        output: the folder to write to; by default report/ in a study folder, and the folder of cells.npz itself.

    Returns:
        The path of report.html.

    Raises:
        FileNotFoundError: neither plan.json and study.yaml are there nor cells.npz.
        ValueError: one of them cannot be used.
    """
    packer = Packer()
    analysis = analyse_study(study_folder, packer)
    source = Path(study_folder)
    folder = Path(output) if output is not None else source / "report" if (source / "plan.json").is_file() else source
    folder.mkdir(parents=True, exist_ok=True)
    cells, clocks = packer.content()
    _replace(folder / FILE, cells)
    _replace(folder / CLOCKS, clocks.encode())
    tables = {"results": analysis.results, "curves": analysis.curves, "costs": analysis.costs, "cells": analysis.cells}
    tables |= {name: rows for name in ("contrasts", "tuning") if (rows := getattr(analysis, name))}
    for name, rows in {**tables, "timings": analysis.timings}.items():
        _replace(folder / f"{name}.csv", to_csv(rows).encode())
    _replace(folder / "results.parquet", _to_parquet(analysis.results))
    markdown, page = render(analysis)
    _replace(folder / "report.md", markdown.encode())
    _replace(folder / "report.html", page.encode())
    return folder / "report.html"


def render(analysis: Analysis) -> tuple[str, str]:
    """The report as Markdown and as HTML, from one set of tables and sentences."""
    tables, pairs, charts = Tables(analysis), Pairs(analysis.study), Charts()
    study = analysis.study
    context: dict[str, Any] = {
        "study": study,
        "tables": tables,
        "facts": tables.facts(),
        "notes": tables.notes(),
        "advice": recommend(analysis),
        "findings": [
            ("baseline", baseline_finding(analysis)),
            *((factor, finding(analysis, factor)) for factor in tables.factors),
        ],
        "sections": SECTIONS,
        "left": LEFT_ALIGNED,
    }
    markdown = environment(markdown=True).get_template("study.md").render(block=markdown_block, **context)
    drawn: dict[str, Any] = {
        "forests": forests(tables, pairs),
        "curves": curves(tables, pairs, charts),
        "maps": maps(tables),
    }
    return markdown, render_page("study.html", charts.hover, **drawn, **context)


def to_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV: six significant digits, nothing where a number is not known, `inf` where none is large enough."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer.writerow(columns)
    writer.writerows([_plain(row.get(column)) for column in columns] for row in rows)
    return text.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value + 0.0:.{DIGITS}g}"
    return "" if value is None else value


def _to_parquet(rows: Sequence[Row]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def clean(value: Any) -> Any:
        return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = pa.table({column: [clean(row.get(column)) for row in rows] for column in columns})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
