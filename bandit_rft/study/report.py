# ruff: noqa: RUF001  (typographic dashes and signs are meant)
"""The report of a study: one HTML page that contacts nothing, a Markdown twin, and every table as CSV.

Equal results give equal bytes. What a clock measured stands between `<!-- timings -->` and `<!-- /timings -->` (and in
timings.csv), and nowhere else.
"""

from __future__ import annotations

import csv
import io
import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from bandit_rft.report.page import Charts, duration, source_hash
from bandit_rft.report.plot import SMALL, Line, number
from bandit_rft.report.text import embed_json, html, visible
from bandit_rft.study.analyse import ALL, Analysis, Level, Row, analyse_study, compare_levels
from bandit_rft.study.cells import BASELINE, SPLITS
from bandit_rft.study.designs import designs, planes, short
from bandit_rft.study.plots import Forest, heat_map, signed
from bandit_rft.study.statistics import Array, holm

SIGNIFICANT = 0.05
MAX_PANELS = 80
MAX_UNUSED_SHOWN = 200
DIGITS = 6


def write_study_report(study_folder: Path | str, output: Path | None = None) -> Path:
    """Analyse a study folder and write its report; returns the path of report.html.

    Written to `output` (default: report/ in the study folder): report.html, report.md, results.csv, results.parquet,
    curves.csv, costs.csv, cells.csv, timings.csv. Each file is replaced in one step.

    Raises FileNotFoundError where plan.json or study.yaml is missing, ValueError where they cannot be used.
    """
    analysis = analyse_study(study_folder)
    folder = Path(study_folder) / "report" if output is None else Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(analysis)
    tables = {"results": analysis.results, "curves": analysis.curves, "costs": analysis.costs, "cells": analysis.cells}
    for name, rows in {**tables, "timings": analysis.timings}.items():
        _replace(folder / f"{name}.csv", to_csv(rows).encode())
    _replace(folder / "results.parquet", _to_parquet(analysis.results))
    _replace(folder / "report.md", page.markdown().encode())
    _replace(folder / "report.html", page.html().encode())
    return folder / "report.html"


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


# ---- what the intervals support --------------------------------------------------------------------------------------


def finding(analysis: Analysis, factor: str) -> str:
    """One sentence on a factor: which levels change final test Pass@1, by Holm's correction, and nothing more."""
    levels = [level for level in analysis.study.levels if level[0] == factor]
    rows = {level: row for level in levels if (row := analysis.row(level)) is not None}
    if not rows:
        return "nothing can be said: no finished cell has a finished baseline cell to be compared with."
    known = {level: row for level, row in rows.items() if not math.isnan(row["p_holm"])}
    absent = len(levels) - len(known)
    if not known:
        return "no interval can be given: that takes two seeds or more."
    gains = [_gain(level, row) for level, row in known.items() if row["p_holm"] <= SIGNIFICANT and row["gain"] > 0]
    losses = [_gain(level, row) for level, row in known.items() if row["p_holm"] <= SIGNIFICANT and row["gain"] < 0]
    rest = [row for row in known.values() if row["p_holm"] > SIGNIFICANT]
    parts = []
    if gains:
        parts.append(f"{', '.join(gains)} {'is' if len(gains) == 1 else 'are'} above the baseline")
    if losses:
        parts.append(f"{', '.join(losses)} {'is' if len(losses) == 1 else 'are'} below the baseline")
    if rest:
        span = f"{signed(min(row['low'] for row in rest))} and {signed(max(row['high'] for row in rest))}"
        which = "its interval lies" if len(rest) == 1 else "their intervals lie"
        who = (
            f"the other {len(rest)}"
            if parts
            else "its one level"
            if len(rest) == 1
            else f"any of its {len(rest)} levels"
        )
        parts.append(f"no difference is shown for {who} ({which} between {span})")
    text = "; ".join(parts)
    return text + (f"; {absent} could not be compared." if absent else ".")


def _gain(level: Level, row: Row) -> str:
    return f"{level[1]} ({signed(row['gain'])} [{signed(row['low'])}, {signed(row['high'])}])"


def baseline_finding(analysis: Analysis) -> str:
    """One sentence on what the baseline alone learned, from before training to the end."""
    parts = []
    for split in SPLITS:
        row = analysis.row(BASELINE, "learned", split)
        if row is None:
            return "nothing can be said: no baseline cell has finished."
        change = f"{row['baseline']:.3f} to {row['value']:.3f}"
        if math.isnan(row["low"]):
            parts.append(f"{split} Pass@1 went from {change} (one seed: no interval)")
            continue
        verb = "rose" if row["low"] > 0 else "fell" if row["high"] < 0 else "is not shown to have changed,"
        parts.append(
            f"{split} Pass@1 {verb} from {change} ({signed(row['gain'])} [{signed(row['low'])}, {signed(row['high'])}])"
        )
    return "; ".join(parts) + "."


# ---- the page --------------------------------------------------------------------------------------------------------

Table = tuple[list[str], list[list[str]]]


class Page:
    """The report as HTML and as Markdown, from one set of tables and sentences."""

    def __init__(self, analysis: Analysis):
        self.analysis, self.study = analysis, analysis.study
        self.factors = list(dict.fromkeys(factor for factor, _ in self.study.levels))
        self.designs, self.baseline_config = designs(self.study)
        self.planes = planes(self.designs)
        self.findings = [("baseline", baseline_finding(analysis))]
        self.findings += [(factor, finding(analysis, factor)) for factor in self.factors]
        self.replay = self._replay_rows()

    # --- facts and tables, for both

    def facts(self) -> list[str]:
        study = self.study
        models, tasks = (list(dict.fromkeys(short(c[i]) for c in study.conditions)) for i in (0, 1))
        used = sum(not cell.problem for cell in study.cells)
        budget = study.settings.get("budget")
        facts = [
            f"{used:,} of {len(study.cells):,} cells used",
            f"{len(study.levels)} levels of {len(self.factors)} factors",
        ]
        facts += [f"models: {', '.join(models)}", f"tasks: {', '.join(tasks)}", f"{len(study.seeds)} seeds"]
        if isinstance(budget, dict):
            facts.append(f"budget: {budget.get('amount', '')} {budget.get('rule', '')}".strip())
        return facts

    def notes(self) -> list[str]:
        """What a reader must know before believing a number."""
        notes = []
        if unused := self.study.unused:
            kinds: dict[str, int] = {}
            for cell in unused:
                kinds[cell.status] = kinds.get(cell.status, 0) + 1
            counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
            notes.append(
                f"{len(unused):,} of {len(self.study.cells):,} cells are not in the results: {counts}. "
                "They are listed below."
            )
        rows = [row for level in self.study.levels if (row := self.analysis.row(level)) is not None]
        short_of = [r for r in rows if r["seeds"] < r["planned_seeds"] or r["conditions"] < r["planned_conditions"]]
        if short_of:
            notes.append(
                f"{len(short_of)} of {len(rows)} levels rest on fewer seeds or conditions than planned, since only "
                "seeds that all their conditions have can be averaged; the columns seeds and conditions say which."
            )
        if any(row["seeds"] < 2 for row in rows):
            notes.append("With one seed no interval can be given: the spread between runs is not known.")
        return notes

    def gains_table(self) -> Table:
        head = [
            "factor", "level", "test gain", "95% interval", "BCa", "Holm p", "train gain", "95% interval", "best test",
            "area test", "IQM", "P(improve)", "seeds", "conditions",
        ]  # fmt: skip
        rows = []
        for level in self.study.levels:
            test, train, best, area = (
                self.analysis.row(level, m, s)
                for m, s in (("final", "test"), ("final", "train"), ("best", "test"), ("auc", "test"))
            )
            if test is None or train is None or best is None or area is None:
                rows.append([*level, "not measured", *[""] * 11])
                continue
            rows.append([
                *level, signed(test["gain"]), _interval(test), _interval(test, "bca_"), _p(test["p_holm"]),
                signed(train["gain"]), _interval(train), signed(best["gain"]), signed(area["gain"]),
                signed(test["iqm"]), _share(test["probability_of_improvement"]),
                f"{test['seeds']} / {test['planned_seeds']}", f"{test['conditions']} / {test['planned_conditions']}",
            ])  # fmt: skip
        return head, rows

    def beyond_table(self) -> Table:
        """Generalization gap, Pass@k, entropy: pooled gains over the baseline."""
        rows_of = [r for r in self.analysis.results if r["model"] == r["task"] == ALL]
        names = list(dict.fromkeys(r["metric"] for r in rows_of if r["metric"].startswith("final ")))
        names = sorted(names, key=lambda n: (not n.startswith("final pass@"), len(n), n))
        head = [
            "factor",
            "level",
            "train gain − test gain",
            *(name.removeprefix("final ") + " (test)" for name in names),
        ]
        rows = []
        for level in self.study.levels:
            found = [self.analysis.row(level, "final", "gap"), *(self.analysis.row(level, name) for name in names)]
            rows.append(
                [*level, *("" if r is None else f"{_number(r['gain'])} {_interval(r, form=_number)}" for r in found)]
            )
        return head, rows

    def precision_table(self) -> Table:
        head = ["factor", "level", "standard error", "smallest gain found with 80% power", "seeds to find 0.01"]
        rows = []
        for level in self.study.levels:
            if (row := self.analysis.row(level)) is not None:
                needed = row["seeds_for_one_point"]
                text = (
                    "–" if math.isnan(needed) else "more questions needed" if math.isinf(needed) else f"{needed:,.0f}"
                )
                rows.append([*level, _number(row["error"]), _number(row["minimum_detectable"]), text])
        return head, rows

    def cost_table(self, timings: bool = False) -> Table:
        names = {"seconds": "seconds", "gpu_hours": "GPU-hours"} if timings else {
            "tokens_generated": "tokens generated", "tokens_trained": "tokens trained"}  # fmt: skip
        head = ["factor", "level"]
        for name in names.values():
            head += [f"{name} a run", "a point learned", "extra a point gained"]
        rows = []
        for row in self.analysis.timings if timings else self.analysis.costs:
            if row["model"] == row["task"] == ALL:
                cells = [row["factor"], row["level"]]
                for key in names:
                    cells += [
                        _number(row[key], 4),
                        _number(row[f"{key}_per_point"]),
                        _number(row[f"extra_{key}_per_point"]),
                    ]
                rows.append(cells)
        return head, rows

    def replay_table(self) -> Table:
        head = [
            "B, n",
            "replay level",
            "gain",
            "same B, n without replay",
            "gain",
            "replay − without",
            "95% interval",
            "Holm p",
        ]
        rows = []
        for (batch, n), replay, plain, row in self.replay:
            a, b = self.analysis.row(replay), self.analysis.row(plain)
            if a is not None and b is not None:
                rows.append([
                    f"{batch}, {n}", "=".join(replay), f"{signed(a['gain'])} {_interval(a)}", "=".join(plain),
                    f"{signed(b['gain'])} {_interval(b)}", signed(row["gain"]), _interval(row), _p(row["p_holm"]),
                ])  # fmt: skip
        return head, rows

    def _replay_rows(self) -> list[tuple[tuple[int, int], Level, Level, Row]]:
        """Levels with replay against the level of a plane at the same (B, n), as paired differences."""
        found = []
        for level, design in self.designs.items():
            if not design.replays or design.batch is None or design.rollouts is None:
                continue
            point = design.batch, design.rollouts
            for plane in self.planes:
                plain = plane.get(point)
                if plain is not None and not self.designs[plain].replays:
                    rows = compare_levels(self.study, level, plain)
                    main = [
                        r
                        for r in rows
                        if (r["metric"], r["split"], r["model"], r["task"]) == ("final", "test", ALL, ALL)
                    ]
                    found += [(point, level, plain, row) for row in main]
        for (*_, row), p in zip(found, holm(_column([row for *_, row in found], "p")), strict=True):
            row |= {"p_holm": float(p), "family": len(found)}
        return found

    def versions(self) -> Table:
        rows = [["analysis", "python", platform.python_version()]]
        for name in ("bandit_rft", "numpy", "scipy", "pyarrow"):
            try:
                rows.append(["analysis", name, metadata.version(name)])
            except metadata.PackageNotFoundError:
                rows.append(["analysis", name, "not installed as a package"])
        recorded: dict[tuple[str, str], None] = {}
        for cell in self.study.cells:
            versions = cell.record.get("versions")
            if isinstance(versions, dict):
                recorded |= {(str(k), str(v)): None for k, v in versions.items()}
        return ["where", "what", "version"], rows + [["cells", *pair] for pair in sorted(recorded)]

    def levels_table(self) -> Table:
        rows = []
        for level in self.study.levels:
            design = self.designs.get(level)
            text = (
                "no cell has run"
                if design is None
                else ", ".join(f"{k}: {v}" for k, v in design.changes.items()) or "nothing"
            )
            same = self.study.same_as.get(level)
            rows.append([*level, text + (f" (the cells of {'='.join(same)})" if same else "")])
        rows += [[*level, "nothing: it is the baseline"] for level in self.study.baseline_levels if level != BASELINE]
        return ["factor", "level", "differs from the baseline in"], rows

    def unused_table(self) -> Table:
        rows = [
            [cell.id, "; ".join("=".join(p) for p in cell.places), cell.status, cell.problem]
            for cell in self.study.unused
        ]
        return ["cell", "stands for", "status", "why it is not used"], rows[:MAX_UNUSED_SHOWN]

    def unused_note(self) -> str:
        hidden = len(self.study.unused) - MAX_UNUSED_SHOWN
        return f"And {hidden:,} more, in cells.csv." if hidden > 0 else ""

    # --- HTML

    def html(self) -> str:
        assets = resources.files("bandit_rft")
        files = [("report", "page.css"), ("study", "report.css"), ("report", "page.js")]
        page_style, own_style, script = (assets.joinpath(a, b).read_text(encoding="utf-8") for a, b in files)
        style, charts = page_style + own_style, Charts()
        notes = "".join(f"<li>{html(note)}</li>" for note in self.notes())
        study, facts = self.study, " · ".join(html(fact, 300) for fact in self.facts())
        configurations = (
            _table(self.levels_table(), "levels")
            + _details("study.yaml, as resolved", _pre(study.settings_text))
            + _details("The baseline's configuration", _pre(self._baseline_text()))
        )
        sections = [
            f'<header><h1>{html(study.name, 120)}</h1><p class="facts">{facts}</p></header>',
            f'<aside class="notes" aria-label="Notes on the data"><ul>{notes}</ul></aside>' if notes else "",
            self._findings_html(),
            self._forest_html(),
            self._curves_html(charts),
            self._plane_html(),
            _section("Beyond Pass@1", _table(self.beyond_table()), BEYOND_NOTE),
            _section("Cost", _table(self.cost_table()), COST_NOTE),
            _section("How small a gain this study could have found", _table(self.precision_table()), PRECISION_NOTE),
            _section("Every level", _table(self.gains_table()), f"{METHOD} {FILES_NOTE}"),
            self._unused_html(),
            _section("Configurations", configurations, ""),
            _section("Versions", _table(self.versions()), ""),
            f"<!-- timings -->{_section('Timings', self._timings_html(), TIMINGS_NOTE)}<!-- /timings -->",
        ]
        policy = (
            f"default-src 'none'; style-src {source_hash(style)}; script-src {source_hash(script)}; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        )
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
            f"<title>{html(study.name, 80)} – bandit_rft study</title>\n"
            f"<style>{style}</style>\n</head>\n<body>\n<main>\n"
            + "\n".join(part for part in sections if part)
            + "\n<footer>Written by bandit_rft. This page is one file and contacts nothing.</footer>\n</main>\n"
            f'<script type="application/json" id="chart-data">{embed_json(charts.hover)}</script>\n'
            '<script type="application/json" id="rollout-data">[]</script>\n'
            f"<script>{script}</script>\n</body>\n</html>\n"
        )

    def _findings_html(self) -> str:
        items = "".join(f"<li><b>{html(name, 200)}</b>: {html(text)}</li>" for name, text in self.findings)
        return _section("What the intervals support", f'<ul class="findings">{items}</ul>', FINDINGS_NOTE)

    def _forest_html(self) -> str:
        parts = self._forest(ALL, ALL)
        each = self.study.conditions if len(self.study.conditions) > 1 else []
        parts += "".join(_details(f"{short(m)} on {t}", self._forest(m, t)) for m, t in each)
        return _section("Marginal gains", parts, FOREST_NOTE)

    def _all_levels(self) -> list[Level]:
        """Levels factor by factor; those that are the baseline by another name first in theirs."""
        same = [level for level in self.study.baseline_levels if level[0] in self.factors]
        return [level for factor in self.factors for level in [*same, *self.study.levels] if level[0] == factor]

    def _forest(self, model: str, task: str) -> str:
        pairs = {
            level: [self.analysis.row(level, "final", split, model, task) for split in ("test", "train")]
            for level in self._all_levels()
        }
        rows = [row for pair in pairs.values() for row in pair if row is not None]
        forest = Forest([(r["low"], r["high"]) for r in rows] + [(r["gain"], r["gain"]) for r in rows])
        body, current = "", None
        for level, pair in pairs.items():
            if level[0] != current:
                current = level[0]
                body += f'<tr class="factor"><th colspan="4" scope="rowgroup">{html(current, 200)}</th></tr>'
            name = f'<th scope="row">{html(level[1], 200)}</th>'
            if level in self.study.baseline_levels:
                body += f"<tr>{name}<td class='left'>the baseline</td><td></td><td class='minor'></td></tr>"
                continue
            marks = [
                (split, slot, r["low"], r["gain"], r["high"], r["p_holm"] <= SIGNIFICANT)
                for slot, (split, r) in enumerate(zip(("test", "train"), pair, strict=True))
                if r is not None
            ]
            texts = ["not measured" if r is None else f"{signed(r['gain'])} {_interval(r)}" for r in pair]
            body += f'<tr>{name}<td>{forest.row(marks)}</td><td>{texts[0]}</td><td class="minor">{texts[1]}</td></tr>'
        return (
            '<div class="scroll"><table class="forests"><thead><tr><th scope="col"></th>'
            f'<th scope="col" class="left">{forest.axis()}</th><th scope="col">{_key(0)} test</th>'
            f'<th scope="col" class="minor">{_key(1)} train</th></tr></thead><tbody>{body}</tbody></table></div>'
        )

    def _curves_html(self, charts: Charts) -> str:
        curves: dict[tuple[Any, ...], list[Row]] = {}
        scope = (ALL, ALL) if len(self.study.conditions) > 1 else self.study.conditions[0]
        for row in self.analysis.curves:
            if (row["model"], row["task"]) == scope:
                curves.setdefault((row["factor"], row["level"], row["split"]), []).append(row)
        parts, drawn, left_out = "", 0, 0
        for factor in self.factors:
            figures = {split: "" for split in SPLITS}
            for level in (level for level in self.study.levels if level[0] == factor):
                for split in SPLITS:
                    rows, base = curves.get((*level, split)), curves.get((*BASELINE, split))
                    if not rows or not base:
                        continue
                    if drawn >= MAX_PANELS:
                        left_out += 1
                        continue
                    drawn += 1
                    lines = [_line(level[1], rows, 0), _line("baseline", base, 1)]
                    figures[split] += charts.figure(visible(level[1], 60), lines, "", size=SMALL, y_range=None)
            titles = {"train": "Learning: train Pass@1", "test": "Generalization: test Pass@1"}
            body = "".join(f'<h3>{titles[s]}</h3><div class="charts">{figures[s]}</div>' for s in SPLITS if figures[s])
            if body:
                opened = " open" if factor == self.factors[0] else ""
                parts += f'<details class="factor"{opened}><summary>{html(factor, 200)}</summary>{body}</details>'
        note = "Means over models, tasks and seeds at each evaluation; band: pointwise 95% t-interval over seeds."
        note += (
            f" {left_out} panels are left out; their numbers are in curves.csv."
            if left_out
            else " By model and task: curves.csv."
        )
        return _section(
            "Learning and generalization",
            parts or '<p class="empty">No evaluated round is common to all seeds.</p>',
            note,
        )

    def _plane_html(self) -> str:
        parts = ""
        for plane in self.planes:
            cells = {point: row for point, level in plane.items() if (row := self.analysis.row(level)) is not None}
            if not cells:
                continue
            batches, rollouts = (sorted({point[i] for point in cells}) for i in (0, 1))
            values = {point: (r["gain"], r["low"], r["high"]) for point, r in cells.items()}
            design = self.designs[next(iter(plane.values()))].rest
            title = ", ".join(f"{key}: {value}" for key, value in sorted(design)) or "baseline otherwise"
            drawn = heat_map("Gain in final test Pass@1", batches, rollouts, values, ("B", "n"))
            parts += f'<h3>{html(title, 300)}</h3><div class="scroll">{drawn}</div>'
        if not parts:
            return ""
        head, rows = self.replay_table()
        if rows:
            parts += "<h3>Replay against the same batch and rollouts without it</h3>" + _table((head, rows))
        return _section("Batch size against rollouts", parts, PLANE_NOTE)

    def _unused_html(self) -> str:
        head, rows = self.unused_table()
        if not rows:
            return ""
        return _section(
            "Cells that are not in the results",
            _table((head, rows), "levels") + f"<p class=note>{self.unused_note()}</p>",
            "",
        )

    def _baseline_text(self) -> str:
        return "\n".join(f"{key}: {value}" for key, value in self.baseline_config.items()) or "no baseline cell has run"

    def _timings_html(self) -> str:
        return _table(self.cost_table(timings=True)) + f"<p>{html(self._time())}</p>"

    def _time(self) -> str:
        cells = self.study.cells
        seconds = math.fsum(cell.totals.get("seconds/round", 0.0) for cell in cells)
        attempts = sum(int(cell.record.get("attempts") or 0) for cell in cells)
        spent = f"All used cells together: {duration(seconds)}, evaluation included"
        return f"{spent}; {attempts:,} attempts for {len(cells):,} cells."

    # --- Markdown

    def markdown(self) -> str:
        out = [f"# {_md(self.study.name)}", "", _md(" · ".join(self.facts())), ""]
        out += [f"> {_md(note)}" for note in self.notes()] + [""]
        out += [
            "## What the intervals support",
            "",
            *(f"- **{_md(name)}**: {_md(text)}" for name, text in self.findings),
            "",
            FINDINGS_NOTE,
            "",
        ]
        out += ["## Marginal gains", "", _md_table(self.gains_table()), "", METHOD, ""]
        replay = self.replay_table()
        if replay[1]:
            out += ["## Replay against the same batch and rollouts without it", "", _md_table(replay), ""]
        out += [
            "## Beyond Pass@1",
            "",
            _md_table(self.beyond_table()),
            "",
            "## Cost",
            "",
            _md_table(self.cost_table()),
            "",
        ]
        out += ["## How small a gain this study could have found", "", _md_table(self.precision_table()), ""]
        unused = self.unused_table()
        if unused[1]:
            out += ["## Cells that are not in the results", "", _md_table(unused), "", self.unused_note(), ""]
        out += [
            "## Configurations",
            "",
            _md_table(self.levels_table()),
            "",
            "The study, as resolved:",
            "",
            _md_block(self.study.settings_text),
            "",
        ]
        out += [
            "The baseline:",
            "",
            _md_block(self._baseline_text()),
            "",
            "## Versions",
            "",
            _md_table(self.versions()),
            "",
        ]
        out += [
            "<!-- timings -->",
            "## Timings",
            "",
            _md_table(self.cost_table(timings=True)),
            "",
            self._time(),
            "<!-- /timings -->",
            "",
        ]
        return "\n".join(out)


FINDINGS_NOTE = (
    "Above or below means: p ≤ 0.05 in final test Pass@1 after Holm’s correction over all levels, averaged over "
    "all models and tasks. In brackets: the gain over the baseline and its 95% interval, for one comparison."
)
FOREST_NOTE = (
    "Gain in final Pass@1 over the baseline with its 95% interval, paired over seeds and questions. Filled: p ≤ "
    "0.05 after Holm’s correction; open: no difference is shown."
)
PLANE_NOTE = (
    "Gain in final test Pass@1 over the baseline with its 95% interval, all models and tasks together: B queries "
    "a round (rows), n rollouts a query (columns). Levels in one map differ in B and n alone."
)
BEYOND_NOTE = (
    "Gains over the baseline at the last evaluation, all models and tasks together; entropy in nats a token. A "
    "positive first column: more was gained on train than on test."
)
COST_NOTE = (
    "Means of a run. A point is 0.01 of final test Pass@1: learned, over the model before training; gained, over "
    "the baseline, paid for by what was spent beyond the baseline. Empty where the 95% interval of the gain does "
    "not lie above 0."
)
PRECISION_NOTE = (
    "Final test Pass@1, all models and tasks together, two-sided at 5% for one comparison (before Holm’s correction)."
)
METHOD = (
    "95% interval: t-interval from crossed random effects of seeds and questions, for one comparison. BCa: two-"
    "way bootstrap, beside it. Holm p: over all levels. Best: the best evaluation instead of the last. Area: mean"
    " height of the learning curve. IQM: interquartile mean of the seeds’ gains. P(improve): how often a run of "
    "the level beats a run of the baseline."
)
FILES_NOTE = "All rows, also by model and task: results.csv and results.parquet."
TIMINGS_NOTE = (
    "What a clock measured: the only part of this report that differs between two runs of the same study. "
    "Evaluation is not counted."
)
LEFT_ALIGNED = {
    "level", "differs from the baseline in", "stands for", "status", "why it is not used", "what", "version",
    "replay level", "same B, n without replay",
}  # fmt: skip


def _line(name: str, rows: Sequence[Row], slot: int) -> Line:
    line = Line(visible(name, 60), [float(r["round"]) for r in rows], [r["value"] for r in rows], slot, markers=True)
    if not any(math.isnan(r["low"]) for r in rows):  # with one seed nothing is known of the spread
        line.low, line.high = [max(0.0, r["low"]) for r in rows], [min(1.0, r["high"]) for r in rows]
    return line


def _column(rows: Sequence[Row], key: str) -> Array:
    import numpy as np

    return np.array([row[key] for row in rows], dtype=np.float64)


def _interval(row: Row, prefix: str = "", form: Any = signed) -> str:
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    return "" if math.isnan(low) or math.isnan(high) else f"[{form(low)}, {form(high)}]"


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _number(value: float, digits: int = 3) -> str:
    # differences of fractions that cancel leave 1e-21: an artefact of summing, not a gain
    return "–" if math.isnan(value) else number(value if abs(value) > 1e-12 else 0.0, digits)


def _key(slot: int) -> str:
    mark = (
        '<circle class="mark s0" cx="13" cy="6" r="4.2"/>'
        if slot == 0
        else '<rect class="mark s1" x="9.4" y="2.4" width="7.2" height="7.2"/>'
    )
    line = f'<line class="interval s{slot}" x1="1" x2="25" y1="6" y2="6"/>'
    return f'<span class="keys"><svg viewBox="0 0 26 12" aria-hidden="true">{line}{mark}</svg></span>'


def _section(title: str, body: str, note: str) -> str:
    return f"<section><h2>{title}</h2>{body}" + (f'<p class="note">{note}</p>' if note else "") + "</section>"


def _details(title: str, body: str) -> str:
    return f'<details class="wide"><summary>{html(title, 300)}</summary>{body}</details>'


def _pre(text: str) -> str:
    return f'<pre class="config" tabindex="0">{html(text, 200_000)}</pre>'


def _table(table: Table, kind: str = "") -> str:
    head, rows = table
    kinds = [' class="left"' if name in LEFT_ALIGNED else "" for name in head]
    headings = "".join(f'<th scope="col"{kind}>{html(name, 200)}</th>' for name, kind in zip(head, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{html(value)}</td>" for value, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    head_row = f"<thead><tr>{headings}</tr></thead>"
    return f'<div class="scroll"><table class="{kind}">{head_row}<tbody>{body}</tbody></table></div>'


def _md(text: str) -> str:
    """Text for a Markdown line: no markup of its own, no HTML, no table cell ended, one line."""
    for character in "\\`*_[]<>#|~":
        text = (
            text.replace(character, "\\" + character)
            if character not in "<>"
            else text.replace(character, "&lt;" if character == "<" else "&gt;")
        )
    return " ".join(visible(text).split())


def _md_block(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{visible(text, 200_000).rstrip()}\n{fence}"


def _md_table(table: Table) -> str:
    head, rows = table
    lines = [head, ["---"] * len(head)]
    return "\n".join(
        "| " + " | ".join(map(str, line)) + " |" for line in lines + [[_md(cell) for cell in row] for row in rows]
    )
