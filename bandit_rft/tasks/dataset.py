"""Your own data: jsonl, json, parquet or csv files, or any dataset of the Hugging Face hub.

A row needs a prompt, a text or chat messages, and, unless your reward does without, an answer. Names understood, in
this order: prompt, question, problem; answer, solution, ground_truth, label, and verl's reward_model.ground_truth. The
first one that any row of a split has is that of all its rows. All other columns are handed to the rewards under their
own names.
"""

import logging
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import Field

from bandit_rft.options import OptionModel
from bandit_rft.rewards.spec import unknown_name
from bandit_rft.tasks.base import Example, Task, read_options
from bandit_rft.tasks.files import SUFFIXES, Row, read_hub, read_splits
from bandit_rft.text import printable

log = logging.getLogger(__name__)

PROMPT = ("prompt", "question", "problem")
ANSWER = ("answer", "solution", "ground_truth", "label")


class Options(OptionModel):
    """Where things are in the data, and what is added to it."""

    prompt_column: str | None = Field(None, description="the prompt's name in your data, where it is another")
    answer_column: str | None = Field(None, description="the answer's")
    config: str | None = Field(None, description="of a dataset of the hub that has several")
    revision: str | None = Field(None, description="likewise")
    test_path: str | None = Field(None, description="a file for the split test")
    test_size: int = Field(
        0, ge=0, description="or this many rows of train, drawn by the seed, where there is no such split"
    )
    suffix: str = Field("", description="text put behind each prompt (the last message's, in a chat), after a space")


def load(data_path: str | None, seed: int, options: dict[str, Any]) -> Task:
    """Load a dataset; it brings no reward.

    Raises:
        ValueError: naming the argument, the columns and the row.
    """
    chosen = read_options("dataset", Options, options)
    if data_path is None:
        raise ValueError("data_path: task 'dataset' needs a file, a folder or the name of a dataset of the hub")
    held: dict[str, Any] = {"test_path": chosen.test_path, "test_size": chosen.test_size, "seed": seed}
    if Path(data_path).expanduser().exists() or Path(data_path).suffix in SUFFIXES:
        rows = read_splits(data_path, **held)
    else:
        rows = read_hub(data_path, chosen.config, chosen.revision, **held)
    return Task("dataset", _splits(rows, chosen), [])


def examples_of(rows: Mapping[str, Iterable[Any]], options: dict[str, Any]) -> dict[str, list[Example]]:
    """Examples from rows that are in memory: a datasets.Dataset, or a list of dicts, for each split.

    Raises:
        ValueError: naming the split, the row and the columns.
    """
    chosen = read_options("dataset", Options, options)
    read = {split: [_row(row, f"dataset {split} row {i}") for i, row in enumerate(of)] for split, of in rows.items()}
    if empty := [split for split, of_split in read.items() if not of_split]:
        raise ValueError(f"dataset {empty[0]}: there are no rows")
    return _splits(read, chosen)


def _row(row: Any, where: str) -> Row:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected a dict with a prompt, got {printable(repr(row), 100)}")
    return dict(row)


def _splits(rows: dict[str, list[Row]], chosen: Options) -> dict[str, list[Example]]:
    """The examples of each split; one whose answers are all null is left out, unless it is trained on."""
    splits, answers = {}, {}
    for split, split_rows in rows.items():
        prompts = chosen.prompt_column or _first(PROMPT, split_rows)
        answers[split] = chosen.answer_column or _first(ANSWER, split_rows)
        splits[split] = [
            _example(row, f"dataset {split} row {number}", prompts, answers[split], chosen)
            for number, row in enumerate(split_rows)
        ]
    for split, examples in list(splits.items()):
        lacking = [number for number, one in enumerate(examples) if one.columns.get("answer") is None]
        if lacking and len(lacking) < len(examples):
            column = "" if answers[split] is None else f" in the column {answers[split]}"
            raise ValueError(f"dataset {split} row {lacking[0]}: no answer, though other rows have one{column}")
        empty = [name for name in (chosen.answer_column, *ANSWER) if name is not None and name in rows[split][0]]
        if lacking and (empty or "answer" in examples[0].columns):
            message = f"dataset {split}: the answers ({', '.join(empty) or 'ground_truth'}) are null in every row"
            if split == "train" or "train" not in splits:
                raise ValueError(f"{message}; fill them in, or leave out the column if your reward does without")
            log.warning(
                "%s: the split is left out", message
            )  # public data often keep the answers of a test to themselves
            del splits[split]
    return splits


def _example(row: Row, where: str, prompt_column: str | None, answer_column: str | None, options: Options) -> Example:
    for name in ("prompt_column", "answer_column"):
        if (own := getattr(options, name)) is not None and own not in row:
            raise ValueError(f"{where}: {unknown_name(name, own, sorted(row))}")
    if prompt_column is None:
        near = next((found[0] for name in PROMPT if (found := get_close_matches(name, sorted(row), 1, 0.5))), "")
        raise ValueError(
            f"{where}: no prompt; expected one of the columns {', '.join(PROMPT)}, or the option prompt_column; "
            f"got {sorted(row)}" + (f"; did you mean {near!r}, prompt_column={near}?" if near else "")
        )
    columns = {name: value for name, value in row.items() if name not in (prompt_column, answer_column)}
    if clash := sorted({"prompt", "prompts", "completion", "completions"} & set(columns)):
        hint = ", or take it for the answer: option answer_column=completion" if "completion" in clash else ""
        raise ValueError(
            f"{where}: the columns {clash} have names that rewards are given other things under; rename them{hint}"
        )
    nested = row.get("reward_model")
    if answer_column is not None:
        columns["answer"] = _answer(row.get(answer_column))
    elif isinstance(nested, dict) and "ground_truth" in nested:
        columns["answer"] = _answer(nested["ground_truth"])
    return Example(_prompt(row.get(prompt_column), options.suffix, f"{where}, column {prompt_column}"), columns)


def _first(names: tuple[str, ...], rows: list[Row]) -> str | None:
    """Return the first of the names under which any row has a value: one for all, else a gap is filled with another."""
    return next((name for name in names if any(row.get(name) is not None for row in rows)), None)


def _answer(value: Any) -> Any:
    """Take NaN, which is what some writers make of a missing answer, for none."""
    return None if isinstance(value, float) and value != value else value


def _prompt(value: Any, suffix: str, where: str) -> str | list[dict[str, Any]]:
    """Check a prompt: a text that says something, or messages."""
    tail = f" {suffix}" if suffix else ""
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{where}: expected a text, got an empty one")
        return value + tail
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: expected a text or a list of chat messages, got a {type(value).__name__}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f'{where}: expected messages like {{"role": "user", "content": "..."}}, got {repr(message)[:100]}'
            )
        messages.append({key: value for key, value in message.items() if value is not None})  # tool calls, names
    messages[-1]["content"] += tail
    return messages
