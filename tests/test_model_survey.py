"""docs/models.md's table: a fixed part of it anew, and the whole for what it may not say.

The whole takes minutes: `python tests/support/model_survey.py`.
"""

from __future__ import annotations

import pytest
import transformers
from model_survey import PAGE, architectures, committed, survey, wrong

#: Some of every kind: each way to pack, windows, soft caps, sinks, latent attention, state spaces, refusals.
PART = [
    "bamba", "bart", "bert", "bloom", "codegen", "deepseek_v32", "doge", "falcon_mamba", "gemma2", "gpt2", "gpt_oss",
    "jamba", "llama", "llama4_text", "mpt", "phi3", "qwen2_moe", "qwen3_next",
]  # fmt: skip


def of_this_version() -> bool:
    return f"transformers {transformers.__version__}:" in PAGE.read_text()


def test_nothing_in_the_table_is_wrong_or_crashes() -> None:
    rows = [(name, *cells) for name, cells in committed().items()]
    assert len(rows) > 150 and wrong(rows) == []
    served = [row for row in rows if row[1] not in ("refused", "not built")]
    assert len(served) > 100 and all(row[2] for row in rows)
    if of_this_version():
        assert {row[0] for row in rows} == set(architectures())


@pytest.mark.parametrize("name", PART)
def test_part_of_the_table_as_it_is_now(name: str) -> None:
    if name not in architectures():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    rows = survey([name])
    assert wrong(rows) == []
    if of_this_version():
        assert rows[0][1:] == committed()[name]
