"""A checkpoint of several ranks is one folder: it goes on with the same bits on as many, and on any other number."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from rank_world import REMEMBERING, TOLERANCE, World, same_lines, same_weights

from bandit_rft.metrics import read_metrics


@pytest.fixture(scope="module", params=["float64", "bfloat16"])
def whole(
    world: World, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, dict[str, Any]]:
    """Two ranks, six rounds, saved after the third as well; bfloat16 has float32 masters."""
    folder = tmp_path_factory.mktemp("whole")
    values = {
        **REMEMBERING, "dtype": request.param, "model_name_or_path": models["tied"], "save_steps": 3,
        # So that a step moves a weight in proportion to its gradient, not to the sign of a bfloat16 rounding.
        "adam_epsilon": 1e-8 if request.param == "float64" else 1.0,
        "learning_rate": 1e-2 if request.param == "float64" else 1.0,
    }  # fmt: skip
    return world.trains(2, {**values, "output_dir": str(folder)}), values


def continued(world: World, whole: tuple[Path, dict[str, Any]], folder: Path, count: int, **changes: Any) -> Path:
    """The run as it was after round 3, continued on so many ranks."""
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    world.trains(count, {**whole[1], "output_dir": str(folder), **changes})
    assert [line["round"] for line in read_metrics(folder)] == list(range(7))
    return folder


def test_two_ranks_continue_two_ranks_bit_for_bit(
    world: World, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = continued(world, whole, tmp_path / "run", 2)
    for name in ("model.safetensors", "optimizer.safetensors", "replay.safetensors"):
        one, other = (of / "checkpoints" / "checkpoint-6" / name for of in (folder, whole[0]))
        assert one.read_bytes() == other.read_bytes(), name
    lines, expected = ([{k: v for k, v in line.items() if not k.startswith("seconds/")} for line in read_metrics(of)]
                       for of in (folder, whole[0]))  # fmt: skip
    assert lines == expected


@pytest.mark.parametrize(("count", "shard"), [(1, "fsdp"), (2, "ddp"), (3, "fsdp")])
def test_any_number_of_ranks_continues_two(
    world: World, whole: tuple[Path, dict[str, Any]], tmp_path: Path, count: int, shard: str
) -> None:
    if whole[1]["dtype"] == "bfloat16" and count == 2:
        pytest.skip("as with float64")
    folder = continued(world, whole, tmp_path / "run", count, **{"distributed.shard": shard})
    exact = whole[1]["dtype"] == "float64"
    same_weights(folder, whole[0], 6, atol=TOLERANCE * 1e-2 if exact else 1e-2)
    if exact:
        same_lines(folder, whole[0])
