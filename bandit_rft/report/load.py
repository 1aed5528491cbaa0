"""Read a run folder that may be unfinished: whatever is there is used, whatever is broken is named in `notes`."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bandit_rft.intervals import first_earned
from bandit_rft.report.pairs import OF_BINARY, OF_OTHERS, Pair, evaluation_files, first_and_last, is_binary, showcase
from bandit_rft.report.stats import Interval, mean_interval, wilson

MAX_ROLLOUTS = 400
MAX_PAIRS_PER_KIND = 12
ROLLOUT_COLUMNS = ["round", "query", "rollout", "prompt", "completion", "answer", "reward", "advantage", "truncated"]


@dataclass
class EvaluationFile:
    """What one `evaluations/round-R-SPLIT.parquet` says about the precision of its mean reward."""

    questions: int
    binary: bool
    deviation: float


@dataclass
class Run:
    """Everything the page needs, in memory; `rounds` is sorted and holds one metrics line a round."""

    folder: Path
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rounds: list[int] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    evaluations: dict[tuple[int, str], EvaluationFile] = field(default_factory=dict)
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    rollout_note: str = ""
    pairs: list[Pair] = field(default_factory=list)
    pair_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    pair_rounds: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[int, float]]:
        """(round, value) of one metric, without the rounds in which it is missing or not finite."""
        return [(r, m[key]) for r, m in zip(self.rounds, self.metrics, strict=True) if key in m]

    def total(self, key: str) -> float:
        """Sum of a per-round metric over the run."""
        return math.fsum(value for _, value in self.series(key))

    def splits(self) -> list[str]:
        """Evaluated splits: train first, then test, then the others by name."""
        found = {k.split("/")[1] for m in self.metrics for k in m if k.startswith("eval/") and k.endswith("/pass@1")}
        return sorted(found, key=lambda s: (s != "train", s != "test", s))

    def measure(self, split: str) -> str:
        """What eval/<split>/pass@1 is to be called: Pass@1 of rewards that are 0 or 1, else mean reward."""
        stored = [file.binary for (_, name), file in self.evaluations.items() if name == split]
        fractions = all(0 <= value <= 1 for _, value in self.series(f"eval/{split}/pass@1"))
        return "Pass@1" if all(stored) and fractions else "mean reward"

    def interval(self, round_: int, split: str, mean: float) -> Interval | None:
        """95% interval of a Pass@1: Wilson for 0/1 rewards, normal for others, None when not stored."""
        stored = self.evaluations.get((round_, split))
        if stored is None or not stored.questions:
            return None
        if stored.binary and 0 <= mean <= 1:
            return wilson(mean, stored.questions)
        return mean_interval(mean, stored.deviation, stored.questions)


def load_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        FileNotFoundError: it is not a folder.
        ValueError: it holds no run.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"run_folder: {folder} is not a folder")
    if not (folder / "config.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
        raise ValueError(
            f"run_folder: {folder} holds neither config.yaml nor metrics.jsonl; expected a run's output_dir"
        )
    run = Run(folder)
    _load_config(run)
    _load_metrics(run)
    files = evaluation_files(folder)
    _note_filtered_prompts(run)
    _load_evaluations(run, files)
    _load_pairs(run, files)
    _load_rollouts(run)
    return run


def _note_filtered_prompts(run: Run) -> None:
    """Prompts that were too long are not in any number on the page."""
    names = {"prompts/filtered": "train", **{f"eval/{split}/filtered": split for split in run.splits()}}
    for name, split in names.items():
        if (count := next((int(value) for _, value in run.series(name)), 0)) > 0:
            run.notes.append(f"{count:,} prompts of {split} are longer than max_prompt_length and were left out.")


def _load_config(run: Run) -> None:
    import yaml

    path = run.folder / "config.yaml"
    if not path.is_file():
        run.notes.append("config.yaml is missing.")
        return
    run.config_text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(run.config_text)
    except yaml.YAMLError:
        run.notes.append("config.yaml is not valid YAML; it is shown as it is.")
        return
    run.config = config if isinstance(config, dict) else {}


def _load_metrics(run: Run) -> None:
    path = run.folder / "metrics.jsonl"
    if not path.is_file():
        run.notes.append("metrics.jsonl is missing: no round has finished yet.")
        return
    by_round: dict[int, dict[str, float]] = {}
    broken = not_finite = repeated = 0
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            round_ = int(record["round"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            if number == len(lines) - 1:
                run.notes.append("The last line of metrics.jsonl was half written and is left out.")
            else:
                broken += 1
            continue
        values: dict[str, float] = {}
        for key, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                if abs(value) < 1e100:  # false for NaN, infinities and numbers that no scale can show
                    values[key] = float(value)
                else:
                    not_finite += 1
        repeated += round_ in by_round
        # A resumed run writes a round again, or adds an evaluation to it: the later value counts.
        by_round[round_] = by_round.get(round_, {}) | values
    run.rounds = sorted(by_round)
    run.metrics = [by_round[r] for r in run.rounds]
    if broken:
        run.notes.append(f"{broken} unreadable line(s) of metrics.jsonl are left out.")
    if not_finite:
        run.notes.append(f"{not_finite} metric value(s) are NaN, infinite or beyond 1e100; the curves leave them out.")
    if repeated:
        run.notes.append(f"{repeated} round(s) were logged more than once (a resumed run); the later values are used.")


def _read_table(run: Run, path: Path, columns: list[str], row_group: int | None = None) -> dict[str, list[Any]]:
    """The wanted columns that exist, as Python lists; {} with a note when the file cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            present = set(file.schema_arrow.names)
            wanted = [c for c in columns if c in present]
            table = file.read(columns=wanted) if row_group is None else file.read_row_group(row_group, columns=wanted)
            result: dict[str, list[Any]] = table.to_pydict()
            return result
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        run.notes.append(f"{path.parent.name}/{path.name} cannot be read (perhaps half written) and is left out.")
        return {}


def _load_evaluations(run: Run, files: dict[str, list[tuple[int, Path]]]) -> None:
    """How many questions stand behind a Pass@1: those with a first sample (sample -1 is the greedy answer).

    A completion that could not be scored counts as it does in the Pass@1 itself.
    """
    for split, round_, path in [(split, *file) for split, found in files.items() for file in found]:
        table = _read_table(run, path, ["query", "sample", "reward"])
        if not {"query", "reward"} <= table.keys():
            continue
        samples = table.get("sample") or [0] * len(table["query"])
        scores = [None if r is None or not abs(r) < 1e100 else float(r) for r in table["reward"]]
        rewards = first_earned(samples, scores)
        mean = math.fsum(rewards) / len(rewards) if rewards else 0.0
        variance = math.fsum((r - mean) ** 2 for r in rewards) / max(1, len(rewards) - 1)
        binary = is_binary(table["reward"])
        run.evaluations[round_, split] = EvaluationFile(len(rewards), binary, math.sqrt(variance))


def _load_pairs(run: Run, files: dict[str, list[tuple[int, Path]]]) -> None:
    """Match the first and the last stored evaluation of every split, question by question."""
    for split, found in files.items():
        readable = [(round_, path) for round_, path in found if (round_, split) in run.evaluations]
        matched = first_and_last(split, readable, lambda path, columns: _read_table(run, path, columns))
        if matched is None:
            continue
        run.pair_rounds[split], pairs = matched
        names = OF_BINARY if all(pair.binary for pair in pairs) else OF_OTHERS
        kinds = {kind: [pair for pair in pairs if pair.outcome == kind] for kind in names}
        run.pair_counts[split] = {kind: len(of_kind) for kind, of_kind in kinds.items()}
        first = showcase(pairs)
        run.pairs += [] if first is None else [first]
        for of_kind in kinds.values():
            others = [pair for pair in of_kind if pair is not first]
            most = MAX_PAIRS_PER_KIND - (len(others) < len(of_kind))
            run.pairs += [others[i] for i in evenly(len(others), most)]


def evenly(count: int, limit: int) -> list[int]:
    """At most `limit` indices of range(count), the first and the last among them, the others evenly between."""
    if count <= limit:
        return list(range(count))
    if limit < 2:
        return list(range(limit))
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)})


def _rollout_files(run: Run) -> list[tuple[int, Path, int | None]]:
    """(round, file, row group of a file of many rounds) of every round with rollouts, in order."""
    folder = run.folder / "rollouts"
    found: dict[int, tuple[int, Path, int | None]] = {}
    for path in sorted(folder.glob("round*.parquet")):
        if match := re.fullmatch(r"round-(\d+)\.parquet", path.name):
            found[int(match[1])] = int(match[1]), path, None
        elif re.fullmatch(r"rounds-\d+-\d+\.parquet", path.name):
            rounds = _read_table(run, path, ["round"]).get("round", ())
            for row_group, round_ in enumerate(dict.fromkeys(rounds)):  # a row group a round, run_folder.py
                found[round_] = round_, path, row_group
    return [found[round_] for round_ in sorted(found)]


def _load_rollouts(run: Run) -> None:
    files = _rollout_files(run)
    if not files:
        return
    sizes = [
        len(_read_table(run, *files[index][1:2], ["query"], files[index][2]).get("query", ())) for index in (0, -1)
    ]
    per_round = max(*sizes, 1)
    picked = evenly(len(files), max(2, MAX_ROLLOUTS // per_round))
    share = max(1, MAX_ROLLOUTS // len(picked))
    shown, cut = 0, False
    for index in picked:
        round_, path, row_group = files[index]
        table = _read_table(run, path, [*ROLLOUT_COLUMNS, "logprobs", "entropy"], row_group)
        if not {"prompt", "completion"} <= table.keys():
            continue
        shown += 1
        rows = evenly(len(table["prompt"]), share)
        cut |= len(rows) < len(table["prompt"])
        for i in rows:
            row = {key: table[key][i] if key in table else None for key in ROLLOUT_COLUMNS}
            row["round"] = round_ if row["round"] is None else row["round"]
            for key in ("logprobs", "entropy"):
                values = [v for v in (table[key][i] if key in table else None) or [] if v is not None]
                row[key] = math.fsum(values) / len(values) if values else None
                row["tokens"] = max(row.get("tokens") or 0, len(values)) or None
            run.rollouts.append(row)
    if shown == len(files) and not cut:
        run.rollout_note = f"All {len(run.rollouts):,} rollouts of {shown:,} round(s)."
    else:
        run.rollout_note = (
            f"{len(run.rollouts):,} rollouts from {shown:,} of {len(files):,} rounds: the first, the last and rounds "
            "evenly "
            f"between{', rows of a round chosen evenly' if cut else ''}. The rest are in rollouts/*.parquet."
        )
