"""Read rows of examples from jsonl, json, parquet and csv files and from the Hugging Face hub."""

import codecs
import csv
import io
import json
import logging
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bandit_rft.hub import asking, check_place
from bandit_rft.text import printable

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
log = logging.getLogger(__name__)
_SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "dev": "validation"}


def named_files(entries: Sequence[str]) -> dict[str, str]:
    """Paths by the name of their split, of texts "name=path"; without a name the file's own is it.

    Raises:
        ValueError: for a name that no file can be called by, one given twice, and "train".
    """
    files: dict[str, str] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals:
            name, path = Path(entry).stem, entry
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or not path:
            raise ValueError(
                f"expected name=path, the name of letters, digits, '_', '.' and '-'; got {printable(repr(entry), 200)}"
            )
        if name == "train":
            raise ValueError("the split 'train' is what is trained on; give the file another name: name=path")
        if name in files:
            raise ValueError(f"{name!r} is given twice; give the files names: name=path")
        files[name] = path
    return files


def read_splits(
    data_path: str, test_path: str | None = None, test_size: int = 0, seed: int = 0
) -> dict[str, list[Row]]:
    """Read the rows of each split.

    Args:
        data_path: a file is the split of its name (train, test, validation, dev), or else "train"; of a folder every
            file named like a split is read.
        test_path: a file with the split "test", in place of any other.
        test_size: where there is no "test" split, this many rows of "train", drawn by the seed, become it.
        seed: of that draw.

    Raises:
        ValueError: naming the argument.
    """
    path = Path(data_path).expanduser()
    if path.is_dir():
        names = list(_SPLITS)
        files = [file for file in path.iterdir() if file.suffix in SUFFIXES and file.stem in names]
        splits: dict[str, list[Row]] = {}
        for file in sorted(files, key=lambda file: (names.index(file.stem), file.suffix)):
            split = _SPLITS[file.stem]
            if split in splits:
                raise ValueError(f"data_path: {path} holds more than one file for the split {split!r}")
            splits[split] = read_rows(file)
        if not splits:
            found = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
            raise ValueError(
                f"data_path: expected train.jsonl, test.jsonl (or {', '.join(SUFFIXES[1:])}) in {path}, found {found}"
            )
    elif path.is_file():
        splits = {_SPLITS.get(path.stem, "train"): read_rows(path)}
    else:
        raise ValueError(f"data_path: there is no file or folder {data_path!r}")
    return hold_out(splits, test_path, test_size, seed)


def read_hub(
    name: str,
    config: str | None = None,
    revision: str | None = None,
    *,
    test_path: str | None = None,
    test_size: int = 0,
    seed: int = 0,
) -> dict[str, list[Row]]:
    """Read the splits of a dataset of the Hugging Face hub; see read_splits for the rest."""
    check_place("data_path", name)
    try:
        import datasets
    except ImportError as error:
        raise ImportError("the datasets library is missing: pip install 'bandit_rft[train]'") from error
    try:
        with asking(name):
            loaded = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:
        raise ValueError(
            f"data_path: the dataset {name!r} could not be loaded from the Hugging Face hub "
            f"({type(error).__name__}: {printable(str(error), 300)}); give data_path to read local files"
        ) from error
    splits = {_SPLITS.get(str(split), str(split)): [dict(row) for row in rows] for split, rows in loaded.items()}
    return hold_out(splits, test_path, test_size, seed)


def hold_out(splits: dict[str, list[Row]], test_path: str | None, test_size: int, seed: int) -> dict[str, list[Row]]:
    """Add the split "test" from a file, or from the rows of "train"."""
    if test_path is not None:
        splits = {**splits, "test": read_rows(Path(test_path).expanduser(), "test_path")}
    if test_size and "test" in splits:
        rows = len(splits["test"])
        log.warning("test_size=%d cannot act: the data have a split test (%d rows)", test_size, rows)
    elif test_size:
        train = splits.get("train", [])
        if not 0 < test_size < len(train):
            raise ValueError(f"test_size: expected 1 to {len(train) - 1} of {len(train)} rows, got {test_size}")
        held = set(random.Random(f"test_size {seed}").sample(range(len(train)), test_size))
        return {
            **splits,
            "train": [row for index, row in enumerate(train) if index not in held],
            "test": [train[index] for index in sorted(held)],
        }
    return splits


def read_rows(path: Path, argument: str = "data_path") -> list[Row]:
    """Read one file's rows.

    Raises:
        ValueError: with the file and, for jsonl, the line.
    """
    if not path.is_file():
        raise ValueError(f"{argument}: there is no file {str(path)!r}")
    if path.suffix == ".jsonl":
        lines = io.StringIO(_text(path, argument), newline=None)
        located = ((line, f"{argument}: {path}, line {number}") for number, line in enumerate(lines, 1))
        rows = [_row(_json(line, where), where) for line, where in located if line.strip()]
    elif path.suffix == ".json":
        values = _json(_text(path, argument), f"{argument}: {path}")
        if not isinstance(values, list):
            raise ValueError(f"{argument}: {path}: expected a list of objects, got a {type(values).__name__}")
        rows = [_row(value, f"{argument}: {path}, entry {number}") for number, value in enumerate(values)]
    elif path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(_text(path, argument), newline=""))
        try:
            names = list(reader.fieldnames or ())
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{argument}: {path}: the header names the column {twice[0]!r} twice")
            rows = [_csv_row(row, f"{argument}: {path}, row {number}") for number, row in enumerate(reader, 1)]
        except csv.Error as error:
            raise ValueError(f"{argument}: {path}, line {reader.line_num + 1}: not CSV: {error}") from None
    elif path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError("the pyarrow library is missing: pip install 'bandit_rft[train]'") from error
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise ValueError(f"{argument}: {path} is not a Parquet file, or not one of UTF-8 text: {error}") from error
    else:
        raise ValueError(f"{argument}: expected a file ending in {', '.join(SUFFIXES)}, got {str(path)!r}")
    if not rows:
        raise ValueError(f"{argument}: {path} holds no rows")
    return rows


def _text(path: Path, argument: str) -> str:
    """Read a file as UTF-8, with a byte order mark or without.

    Raises:
        ValueError: with the file and the line.
    """
    raw = path.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{argument}: {path} is UTF-16; expected UTF-8")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{argument}: {path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}: {error.reason})"
        ) from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return row


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got a {type(value).__name__}")
    return value


def _csv_row(row: dict[Any, Any], where: str) -> Row:
    if None in row or None in row.values():
        raise ValueError(f"{where}: the number of fields differs from the header's")
    return row
