"""What decoding a float32 policy from bfloat16 weights would save on a CPU, and how far it would be from that policy.

The products are PyTorch's, which use AVX512-BF16 where the processor has it. The distance is of the weights' rounding
alone: tokens are drawn with rounded weights, and scored by the policy that is trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison.record import OURS

from bandit_rft.model import Policy
from bandit_rft.rollout import RolloutEngine, sequence_ids
from bandit_rft.update import score_rollouts

DATA = Path(os.environ.get("BANDIT_RFT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
#: The demo's model, and two of real data.
MODELS = {
    "arithmetic-base": "arithmetic-base",
    "stories260K": str(DATA / "model-stories260K" / "hf"),
    "babyllama936K": str(DATA / "model-babyllama936K" / "hf"),
}
SEQUENCES, NEW = 32, 64


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_products(rows: int, versus: Callable[..., float]) -> None:
    hidden, weight = torch.randn(rows, 4096), torch.randn(4096, 4096)
    narrow = hidden.bfloat16(), weight.bfloat16()
    versus(
        f"a product of bfloat16, {rows} x 4096 x 4096 / float32", lambda: torch.mm(narrow[0], narrow[1].T),
        lambda: torch.mm(hidden, weight.T), None, rounds=30,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_distance(name: str, benchmark: Any, keep: Callable[..., None]) -> None:
    if MODELS[name] != name and not Path(MODELS[name]).exists():
        pytest.skip(f"no {MODELS[name]}: set BANDIT_RFT_DATA")
    trained, rounded = (Policy.load(MODELS[name], device="cpu") for _ in range(2))
    with torch.no_grad():
        for parameter in rounded.model.parameters():
            parameter.copy_(parameter.bfloat16())
    prompts = [[3 + i % 8, 4, 7] for i in range(SEQUENCES)]
    engine = RolloutEngine(rounded, max_completion_length=NEW)
    drawn = engine.generate(prompts, sequence_ids(0, 1, list(range(SEQUENCES)), 0), seed=1)
    off = (score_rollouts(trained, drawn) - drawn.logprobs).abs()
    benchmark.pedantic(lambda: None)
    figures = {"mean nats a token": off.mean().item(), "largest": off.max().item()}
    case = {"group": "bfloat16 distance", "sides": {OURS: {"role": "ours", "figures": figures}}}
    keep(f"weights rounded to bfloat16, {name}", case, f"\n    {figures}")
