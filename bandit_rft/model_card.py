"""The README.md of a checkpoint: what was trained, on what, with which result. Everything in it is written as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bandit_rft.intervals import Interval, first_earned, reward_interval
from bandit_rft.text import printable

if TYPE_CHECKING:
    from bandit_rft.config import Config
    from bandit_rft.tasks import Task

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(
    config: Config, task: Task, lines: Sequence[Mapping[str, Any]], evaluations: Path, versions: Mapping[str, str]
) -> str:
    """The card of the checkpoint that is about to be written.

    Args:
        config: of the run.
        task: what it trains on.
        lines: of metrics.jsonl, up to the checkpoint's round.
        evaluations: the run's folder of stored completions, from which intervals are made.
        versions: of the libraries, by name.

    Returns:
        Markdown behind a front matter of YAML, as the Hugging Face hub reads it.
    """
    adapter, rounds = config.lora.rank > 0, lines[-1]["round"] if lines else 0
    model, on_hub = _short(config.model_name_or_path), _HUB_NAME.fullmatch(config.model_name_or_path)
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if on_hub and not Path(config.model_name_or_path).exists():
        head["base_model"] = config.model_name_or_path
    head["tags"] = ["bandit_rft", "reinforcement-learning", *["lora"] * adapter]
    made = "a LoRA adapter of" if adapter else "made of"
    o = config.objective
    settings = {
        "rounds": f"{rounds:,} of {config.batch_size} queries, {config.num_generations} completion(s) each",
        "completions drawn": f"{sum(line.get('tokens/generated') or 0 for line in lines):,} tokens",
        "advantage": config.advantage,
        "objective": f"{o.kind}, {o.aggregation}" + (f", {o.kl} KL x {o.kl_coef:g}" if o.kl_coef else ""),
        "learning rate": f"{config.learning_rate:g}, {config.lr_scheduler_type}",
        "temperature": f"{config.temperature:g}",
        "completions up to": f"{config.max_completion_length:,} tokens",
        "seed": str(config.seed),
    }
    rewards = ", ".join(_code(getattr(reward, "name", "?")) for reward in task.rewards)
    data = f" ({_code(_short(config.data_path))})" if config.data_path else ""
    sizes = ", ".join(f"{len(examples):,} of {_code(name)}" for name, examples in task.splits.items())
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {_text(model)} after {rounds:,} rounds on {_text(task.name)}",
        f"This model was {made} {_code(model)} by reinforcement fine-tuning with `bandit_rft`: completions of its own "
        "were scored by a reward, and what was rewarded became more likely.",
        "## Data",
        f"Task {_code(task.name)}{data}: {sizes} examples. Reward: {rewards}.",
        "## Result",
        _results(lines, evaluations),
        "## Training",
        _table(["", ""], [[name, _text(value)] for name, value in settings.items()]),
        "state.json in this folder has every setting, and the digests of the data.",
        "Made with " + ", ".join(f"{name} {_text(version)}" for name, version in versions.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _results(lines: Sequence[Mapping[str, Any]], evaluations: Path) -> str:
    """The first evaluation beside the last one, by split."""
    measured = [line for line in lines if any(key.endswith("/pass@1") for key in line)]
    if not measured:
        return "Nothing was measured."
    first, last = measured[0], measured[-1]
    rows, binary = list[list[str]](), True
    for key in last:
        match = re.fullmatch(r"eval/(.+)/(pass@1|greedy)", key)
        if match is None or last[key] is None:
            continue
        cells = []
        for line in (first, last):
            interval, zero_one = _interval(evaluations, int(line["round"]), match[1], match[2])
            binary = binary and zero_one
            value = line.get(key)
            shown = "" if interval is None else f" [{interval.low:.3f}, {interval.high:.3f}]"
            cells.append("-" if value is None else f"{value:.3f}{shown}")
        rows.append([_code(match[1]), "sampled" if match[2] == "pass@1" else "greedy", *cells])
    table = _table(["split", "completions", f"round {first['round']}", f"round {last['round']}"], rows)
    what = "Pass@1: the share of completions that earn the reward" if binary else "Mean reward"
    return f"{what}; in brackets a 95% interval over questions.\n\n{table}"


def _interval(evaluations: Path, number: int, split: str, kind: str) -> tuple[Interval | None, bool]:
    """The interval of a stored evaluation's mean reward, and whether each was 0 or 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(evaluations / f"round-{number:06d}-{split}.parquet") as file:
            columns = file.read(columns=["sample", "reward"]).to_pydict()
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None, True
    found = first_earned(columns["sample"], columns["reward"], greedy=kind != "pass@1")
    return reward_interval(found), all(reward in (0.0, 1.0) for reward in found)


def _short(name: str) -> str:
    """A name of the hub as it is; of a path the last part, which says nothing of the machine."""
    return name if _HUB_NAME.fullmatch(name) and not Path(name).exists() else Path(name).name or name


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _text(value: str) -> str:
    """A value as text that Markdown and HTML leave alone, on one line."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>&~$:-])", r"\\\1", printable(value, 200, one_line=True).replace("\t", " "))


def _code(value: str) -> str:
    """A value as code, which has neither Markdown nor HTML in it; a backtick would end it, a bar a table's cell."""
    shown = printable(value, 200, one_line=True).replace("\t", " ").replace("`", "'").replace("|", "/").strip()
    return f"`{shown or '?'}`"
