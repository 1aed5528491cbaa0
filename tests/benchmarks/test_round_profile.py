"""Each moment of a profiled round goes to one kind of work, and to the right one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from paths import ROOT
from tiny_models import save_tiny_llama, sums
from tiny_rewards import everything

sys.path.insert(0, str(ROOT / "benchmarks"))
from comparison import round_profile as profile

from bandit_rft.config import build_config
from bandit_rft.metrics import read_metrics
from bandit_rft.tasks import Task
from bandit_rft.trainer import Trainer

BACKWARD = "autograd::engine::evaluate_function: _PackedAttentionBackward"


def event(*names: str) -> Any:
    """The last of these, inside of those before it."""
    found = None
    for name in names:
        found = SimpleNamespace(name=name, cpu_parent=found)
    return found


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ((profile.ROUND,), profile.REST),
        ((profile.ROUND, "aten::linear", "aten::mm"), profile.PRODUCTS),
        ((profile.ROUND, "MulBackward0", "aten::mul"), profile.ELEMENTS),
        ((profile.ROUND, "MulBackward0"), profile.REST),
        ((profile.ROUND, profile.LOSS, "aten::mm"), profile.LOSS),
        ((profile.ROUND, profile.TOKENS, "aten::empty"), profile.TOKENS),
        ((profile.ROUND, "_PackedAttention", "aten::empty"), profile.ATTENTION),
        ((profile.ROUND, BACKWARD, "_PackedAttentionBackward", "aten::empty"), profile.ATTENTION),
        ((profile.ROUND, profile.OPTIMIZER, "aten::mul_"), profile.OPTIMIZER),
        (("aten::mm",), None),  # beside the round, in another thread
    ],
    ids=str,
)
def test_the_outermost_operation_says_what_it_is(names: tuple[str, ...], kind: str | None) -> None:
    assert profile._kind_of(event(*names)) == kind


def test_all_of_a_round_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_llama(tmp_path / "model", hidden_size=64, intermediate_size=256)
    config = build_config(
        {
            "preset": "minimal", "model_name_or_path": str(model), "task": "arithmetic", "batch_size": 6,
            "output_dir": str(tmp_path / "run"), "max_rounds": 6, "max_prompt_length": 12, "max_completion_length": 6,
            "eval_steps": 0, "evaluation.max_queries": 2, "save_steps": 0, "device": "cpu",
        }
    )  # fmt: skip
    original = Trainer.train_round
    task = sums()
    trainer = Trainer(config, task=Task(task.name, task.splits, [everything]))
    found = profile.by_kind(trainer, 6, 2, monkeypatch.setattr)
    assert set(found) == set(profile.KINDS) and all(ms > 0 for ms in found.values()), found
    seconds = [line["seconds/round"] for line in read_metrics(tmp_path / "run") if 2 < line["round"] < 6]
    assert sum(found.values()) == pytest.approx(1e3 * sum(seconds) / len(seconds), rel=0.15)
    monkeypatch.undo()
    assert Trainer.train_round is original
