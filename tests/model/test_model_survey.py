"""docs/models.md's table, made anew: nothing in it is wrong, and it says what is so.

About a minute of two cores. `python tests/support/model_survey.py --write` writes it.
"""

from __future__ import annotations

import multiprocessing
import os

import pytest
import transformers
from model_survey import PAGE, architectures, committed, examine_named, wrong


def of_this_version() -> bool:
    return f"transformers {transformers.__version__}:" in PAGE.read_text()


def test_nothing_in_the_table_is_wrong_or_crashes() -> None:
    rows = [(name, *cells) for name, cells in committed().items()]
    assert len(rows) > 150 and wrong(rows) == []
    served = [row for row in rows if row[1] not in ("refused", "not built")]
    assert len(served) > 100 and all(row[2] for row in rows)
    if of_this_version():
        assert {row[0] for row in rows} == set(architectures())


@pytest.mark.timeout(900)
def test_the_table_as_it_is_now() -> None:
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        rows = pool.map(examine_named, architectures(), chunksize=1)
    assert wrong(rows) == []
    if of_this_version():
        known = committed()
        changed = [(*row, known[row[0]]) for row in rows if row[1] != known[row[0]][0]]
        assert changed == []
