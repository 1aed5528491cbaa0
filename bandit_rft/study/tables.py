# ruff: noqa: RUF001  (typographic dashes are meant)
"""The tables of a study's report as text, for the page and for its Markdown twin alike."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from importlib import metadata

import numpy as np

from bandit_rft.report.ledger import duration
from bandit_rft.report.plot import number
from bandit_rft.report.shell import signed
from bandit_rft.study.analyse import Analysis, compare_levels
from bandit_rft.study.cells import BASELINE, short
from bandit_rft.study.designs import designs, planes
from bandit_rft.study.findings import SIGNIFICANT, distinct
from bandit_rft.study.pairing import ALL, Level, Row
from bandit_rft.study.points import detectable, simultaneous
from bandit_rft.study.statistics import MARGIN, Array, holm

MAX_UNUSED_SHOWN = 200
#: A cell is text, or a number and its interval, which the page sets under each other.
Text = str | tuple[str, str]
Table = tuple[list[str], list[list[Text]]]
LEFT_ALIGNED = {
    "factor", "level", "differs from the baseline in", "stands for", "status", "why it is not used", "what", "version",
    "replay level", "same B, n without replay", "where", "cell", "family", "comparison",
}  # fmt: skip


class Tables:
    """Everything a study's report says in rows and columns."""

    def __init__(self, analysis: Analysis):
        self.analysis, self.study = analysis, analysis.study
        self.factors = list(dict.fromkeys(factor for factor, _ in self.study.levels))
        self.levels = distinct(analysis)
        self.designs, self.baseline_config = designs(self.study)
        self.planes = planes(self.designs)
        self._replay = self._replay_rows()

    def also(self, level: Level) -> list[Level]:
        """Other names of the same configuration."""
        return [other for other, first in self.study.same_as.items() if first == level]

    def _name(self, level: Level) -> list[Text]:
        """Factor and level, with the other names of the same configuration."""
        others = ", ".join(f"{factor} {name}" for factor, name in self.also(level))
        return [level[0], f"{level[1]} (also {others})" if others else level[1]]

    def facts(self) -> list[str]:
        """The line below the title."""
        study = self.study
        models, tasks = (list(dict.fromkeys(short(c[i]) for c in study.conditions)) for i in (0, 1))
        used = sum(not cell.problem for cell in study.cells)
        budget = study.settings.get("budget")
        facts = [
            f"{used:,} of {len(study.cells):,} cells used",
            f"{_counted(len(study.levels), 'level')} of {_counted(len(self.factors), 'factor')}",
        ]
        facts += [f"models: {', '.join(models)}", f"tasks: {', '.join(tasks)}", f"{_counted(len(study.seeds), 'seed')}"]
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
            planned = len(self.study.seeds)
            one = "With one seed" if planned == 1 else f"Where one alone of {planned} seeds is finished"
            notes.append(f"{one} no interval can be given: the spread between runs is not known.")
        return notes

    def gains(self) -> Table:
        """The main table: what every level adds to the baseline, pooled."""
        head = [
            "factor", "level", "test gain", "test, all at once", "BCa", "Holm p", "train gain", "best test",
            "area test", "IQM", "P(improve)", "seeds", "conditions",
        ]  # fmt: skip
        rows: list[list[Text]] = []
        for level in self.levels:
            test, train, best, area = (
                self.analysis.row(level, m, s)
                for m, s in (("final", "test"), ("final", "train"), ("best", "test"), ("auc", "test"))
            )
            if test is None or train is None or best is None or area is None:
                rows.append([*self._name(level), "not measured", *[""] * 10])
                continue
            rows.append([
                *self._name(level), (signed(test["gain"]), interval(test)), brackets(*simultaneous(test)),
                brackets(test["bca_low"], test["bca_high"]), p_text(test["p_holm"]),
                (signed(train["gain"]), interval(train)), signed(best["gain"]), signed(area["gain"]),
                signed(test["iqm"]), share(test["probability_of_improvement"]),
                f"{test['seeds']} / {test['planned_seeds']}", f"{test['conditions']} / {test['planned_conditions']}",
            ])  # fmt: skip
        return head, rows

    def beyond(self) -> Table:
        """Generalization gap, Pass@k, entropy: pooled gains over the baseline."""
        rows_of = [r for r in self.analysis.results if r["model"] == r["task"] == ALL]
        names = list(dict.fromkeys(r["metric"] for r in rows_of if r["metric"].startswith("final ")))
        names = sorted(names, key=lambda n: (not n.startswith("final pass@"), len(n), n))
        columns = [name.removeprefix("final ").replace("_", " ") + " (test)" for name in names]
        rows: list[list[Text]] = []
        for level in self.levels:
            found = [self.analysis.row(level, "final", "gap"), *(self.analysis.row(level, name) for name in names)]
            if any(found):
                cells: list[Text] = ["" if r is None else (decimal(r["gain"]), interval(r, decimal)) for r in found]
                rows.append([*self._name(level), *cells])
        return ["factor", "level", "train gain − test gain", *columns], rows

    def endpoints(self) -> Table:
        """Final Pass@1 and the area, test and train: which differ, which are shown to be alike, for how many tokens."""
        ends = [("final", "test"), ("final", "train"), ("auc", "test"), ("auc", "train")]
        head = ["factor", "level"]
        head += [f"{'area' if metric == 'auc' else metric} {split}" for metric, split in ends]
        head.append("tokens generated a run")
        tokens = {
            (row["factor"], row["level"]): decimal(row["tokens_generated"], 4)
            for row in self.analysis.costs
            if row["model"] == row["task"] == ALL
        }
        rows: list[list[Text]] = []
        for level in self.levels:
            found = [self.analysis.row(level, *end) for end in ends]
            if all(found):
                verdicts = [_verdict(row) for row in found if row is not None]
                rows.append([*self._name(level), *verdicts, tokens.get(level, "–")])
        return head, rows

    def wider(self) -> Table:
        """Final test Pass@1: for new models and tasks, whether conditions differ, and failed runs at their worst."""
        head = [
            "factor",
            "level",
            "gain",
            "new models",
            "new models and tasks",
            "conditions differ, Holm p",
            "slope over competence",
            "worst case",
        ]
        rows: list[list[Text]] = []
        for level in self.levels:
            if (row := self.analysis.row(level)) is not None:
                pairs = [brackets(row[f"{of}_low"], row[f"{of}_high"]) or "–" for of in ("models", "conditions")]
                slope = signed(row["competence_slope"]) if not math.isnan(row["competence_slope"]) else "–"
                worst = brackets(row["worst_low"], row["worst_high"])
                rows.append([
                    *self._name(level), (signed(row["gain"]), interval(row)), *pairs, p_text(row["p_interaction_holm"]),
                    (slope, brackets(row["competence_low"], row["competence_high"])),
                    worst if (row["worst_low"], row["worst_high"]) != (row["low"], row["high"]) else "no run failed",
                ])  # fmt: skip
        return head, rows

    def contrasts(self) -> Table:
        """The comparisons that the study file names, in final Pass@1."""
        head = ["family", "comparison", "test", "Holm p", "within ±0.02, p", "train", "Holm p (train)"]
        found = {
            (row["family"], row["name"], row["split"]): row
            for row in self.analysis.contrasts
            if row["metric"] == "final" and row["model"] == row["task"] == ALL
        }
        rows: list[list[Text]] = []
        for family, name, split in found:
            test, train = found[family, name, "test"], found[family, name, "train"]
            if split == "test":
                rows.append([
                    family, name, (signed(test["gain"]), interval(test)), p_text(test["p_holm"]),
                    p_text(test["p_equivalent"]), (signed(train["gain"]), interval(train)), p_text(train["p_holm"]),
                ])  # fmt: skip
        return head, rows

    def tuning(self) -> Table:
        """The tries of the tuned key: mean validation score of each value, and the one that was chosen."""
        tried = self.analysis.tuning
        if not tried:
            return [], []
        values = sorted({row["value"] for row in tried})
        head = ["factor", "level", f"{tried[0]['key']}", *(f"Pass@1 at {value:g}" for value in values)]
        rows: list[list[Text]] = []
        for level in [BASELINE, *self.levels]:
            of_level = {row["value"]: row for row in tried if (row["factor"], row["level"]) == level}
            if of_level:
                chosen = next((f"{value:g}" for value, row in of_level.items() if row["chosen"]), "–")
                scores: list[Text] = [decimal(of_level[v]["score"]) if v in of_level else "–" for v in values]
                rows.append([*level, chosen, *scores])
        return head, rows

    def precision(self) -> Table:
        """How small a gain this study could have found, and what a finer one would need."""
        head = [
            "factor", "level", "standard error", "smallest gain found with 80% power", "the same, corrected for all",
            "seeds to find 0.01",
        ]  # fmt: skip
        rows: list[list[Text]] = []
        for level in self.levels:
            if (row := self.analysis.row(level)) is not None:
                needed = row["seeds_for_one_point"]
                seeds = (
                    "–" if math.isnan(needed) else "more questions needed" if math.isinf(needed) else f"{needed:,.0f}"
                )
                smallest = decimal(row["minimum_detectable"]), decimal(detectable(row))
                rows.append([*self._name(level), decimal(row["error"]), *smallest, seeds])
        return head, rows

    def cost(self, timings: bool = False) -> Table:
        """What a run and a point of gain cost, in tokens, or in seconds and GPU-hours (`timings`)."""
        names = {"seconds": "seconds", "gpu_hours": "GPU-hours"} if timings else {
            "tokens_generated": "tokens generated", "tokens_trained": "tokens trained"}  # fmt: skip
        head = ["factor", "level"]
        for name in names.values():
            head += [f"{name} a run", f"{name} a point learned", f"extra {name} a point gained"]
        rows: list[list[Text]] = []
        for row in self.analysis.timings if timings else self.analysis.costs:
            level = (row["factor"], row["level"])
            if row["model"] == row["task"] == ALL and (level == BASELINE or level in self.levels):
                cells = self._name(level)
                for key in names:
                    each = row[key], row[f"{key}_per_point"], row[f"extra_{key}_per_point"]
                    cells += [decimal(each[0], 4), decimal(each[1]), decimal(each[2])]
                rows.append(cells)
        return head, rows

    def replay(self) -> Table:
        """Levels with replay beside those without it at the same batch size and rollouts."""
        head = ["B, n", "replay level", "gain", "same B, n without replay", "its gain", "replay − without", "Holm p"]
        rows: list[list[Text]] = []
        for (batch, n), replay, plain, row in self._replay:
            a, b = self.analysis.row(replay), self.analysis.row(plain)
            if a is not None and b is not None:
                rows.append([
                    f"{batch}, {n}", "=".join(replay), (signed(a["gain"]), interval(a)), "=".join(plain),
                    (signed(b["gain"]), interval(b)), (signed(row["gain"]), interval(row)), p_text(row["p_holm"]),
                ])  # fmt: skip
        return head, rows

    def _replay_rows(self) -> list[tuple[tuple[int, int], Level, Level, Row]]:
        """Levels with replay against the level of a plane at the same (B, n), as paired differences."""
        found = []
        for level, design in self.designs.items():
            if not design.replays or design.batch is None or design.rollouts is None:
                continue
            point = design.batch, design.rollouts
            for plane in (self.whole(plane) for plane in self.planes):
                plain = plane.get(point)
                if plain is not None and plain != BASELINE and not self.designs[plain].replays:
                    rows = compare_levels(self.study, level, plain)
                    found += [(point, level, plain, r) for r in rows if _main(r)]
        for (*_, row), p in zip(found, holm(_column([row for *_, row in found], "p")), strict=True):
            row |= {"p_holm": float(p), "family": len(found)}
        return found

    def whole(self, plane: dict[tuple[int, int], Level]) -> dict[tuple[int, int], Level]:
        """A plane with its column n = 1: the baseline, and what differs from it in nothing but the batch.

        A group of one has no spread, so n = 1 means the raw reward whatever the group's advantage is. Planes of levels
        with replay have an n = 1 of their own.
        """
        if any(self.designs[level].replays for level in plane.values()):
            return plane
        single = {
            (design.batch, 1): level
            for level, design in self.designs.items()
            if design.rollouts == 1 and design.batch is not None and not design.rest
        }
        return {**single, **plane}

    def versions(self) -> Table:
        """Software of the analysis and of the cells."""
        rows: list[list[Text]] = [["analysis", "python", platform.python_version()]]
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

    def configurations(self) -> Table:
        """What each level changes in the baseline's configuration."""
        rows: list[list[Text]] = []
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

    def baseline_text(self) -> str:
        """The baseline's resolved configuration."""
        return "\n".join(f"{key}: {value}" for key, value in self.baseline_config.items()) or "no baseline cell has run"

    def unused(self) -> Table:
        """Cells that are not in the results, and why."""
        rows: list[list[Text]] = [
            [cell.id, "; ".join("=".join(p) for p in cell.places), cell.status, cell.problem]
            for cell in self.study.unused
        ]
        return ["cell", "stands for", "status", "why it is not used"], rows[:MAX_UNUSED_SHOWN]

    def unused_note(self) -> str:
        """How many of these the table has no room for; empty where it has."""
        hidden = len(self.study.unused) - MAX_UNUSED_SHOWN
        return f"And {hidden:,} more, in cells.csv." if hidden > 0 else ""

    def time(self) -> str:
        """What all cells together took, as their clocks said."""
        cells = self.study.cells
        seconds = math.fsum(cell.totals.get("seconds/round", 0.0) for cell in cells)
        attempts = sum(int(cell.record.get("attempts") or 0) for cell in cells)
        spent = f"All used cells together: {duration(seconds)}, evaluation included"
        return f"{spent}; {attempts:,} attempts for {len(cells):,} cells."


def interval(row: Row, form: Callable[[float], str] = signed) -> str:
    """[low, high] of a row, empty where it is not known."""
    return brackets(row["low"], row["high"], form)


def brackets(low: float, high: float, form: Callable[[float], str] = signed) -> str:
    """[low, high], empty where it is not known."""
    return "" if math.isnan(low) or math.isnan(high) else f"[{form(low)}, {form(high)}]"


def p_text(value: float) -> str:
    """A p-value with three decimals."""
    return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _counted(count: int, what: str) -> str:
    """So many of something, "1 level" or "2 levels"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def share(value: float) -> str:
    """A probability with two decimals."""
    return "–" if math.isnan(value) else f"{value:.2f}"


def decimal(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits."""
    # differences of fractions that cancel leave 1e-21: an artefact of summing, not a gain
    return "–" if math.isnan(value) else number(value if abs(value) > 1e-12 else 0.0, digits)


def _verdict(row: Row) -> Text:
    """A gain with its interval, and in a word what is shown: above, below, or within the margin (TOST)."""
    word = ""
    if row["p_holm"] <= SIGNIFICANT:
        word = " above" if row["gain"] > 0 else " below"
    elif row["p_equivalent"] <= SIGNIFICANT:
        word = f" within ±{MARGIN:g}"
    return signed(row["gain"]) + word, interval(row)


def _main(row: Row) -> bool:
    return (row["metric"], row["split"], row["model"], row["task"]) == ("final", "test", ALL, ALL)


def _column(rows: Sequence[Row], key: str) -> Array:
    return np.array([row[key] for row in rows], dtype=np.float64)
