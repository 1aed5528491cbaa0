"""Two and three ranks train what one does: the same tokens, every parameter to rounding, the same lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rank_world import TOLERANCE, World, same_lines, same_weights
from safetensors.torch import load_file

Values = dict[str, Any]

CASES: dict[str, tuple[int, str, Values]] = {
    "fsdp, untied": (2, "untied", {}),
    "fsdp, tied, three ranks": (3, "tied", {}),
    "fsdp, float32": (2, "tied", {"dtype": "float32"}),
    "ddp, untied, three ranks": (3, "untied", {"distributed.shard": "ddp"}),
    "ddp, tied": (2, "tied", {"distributed.shard": "ddp"}),
    # Of two rollouts a round one rank has none, and often two have none: their advantage is 0.
    "fsdp, ranks without work, skipping": (3, "tied", {"advantage": "reward", "batch_size": 2}),
    "fsdp, micro-batches, recomputed layers": (
        2, "untied", {"batch_size": 7, "tokens_per_microbatch": 12, "gradient_checkpointing": True},
    ),
    "fsdp, KL in the loss": (2, "tied", {"objective.kl": "k3", "objective.kl_coef": 0.1, "tokens_per_microbatch": 20}),
    "fsdp, KL in the reward": (
        2, "untied", {"objective.kl": "k3", "objective.kl_coef": 0.1, "kl.where": "reward", "kl.target": 0.01},
    ),
    "fsdp, adapters and KL": (2, "tied", {"lora.rank": 2, "objective.kl": "k3", "objective.kl_coef": 0.1}),
    "ddp, adapters": (2, "untied", {"lora.rank": 2, "distributed.shard": "ddp"}),
    "fsdp, a bias of the head, adapters and KL": (
        2, "biased", {"lora.rank": 2, "objective.kl": "k3", "objective.kl_coef": 0.1},
    ),
    "fsdp, a bias of the head": (2, "biased", {}),
    "fsdp, replay and old policies": (
        3, "untied", {"replay.capacity": 20, "advantage": "spo", "num_generations": 2, "batch_size": 3},
    ),
    "fsdp, several steps": (
        2, "tied",
        {"objective.kind": "ppo", "update.epochs": 2, "update.minibatches": 2, "objective.aggregation":
         "seq-mean-token-mean", "objective.entropy_coef": 0.01},
    ),
    "ddp, queries by their rewards": (2, "tied", {"distributed.shard": "ddp", "queries.order": "learnable"}),
    "fsdp, hopeless ones ended": (3, "tied", {"rollout.stop_hopeless": 2, "num_generations": 2, "batch_size": 5}),
    "fsdp, groups": (
        2, "untied",
        {"advantage": "group_mean", "num_generations": 4, "rollout.dynamic_sampling": 2, "rollout.keep": 3,
         "rollout.mask_truncated": True, "objective.kind": "gspo"},
    ),
}  # fmt: skip


class Alone:
    """Runs of one rank, each made once."""

    def __init__(self, world: World, models: dict[str, str], folder: Path):
        self._world, self._models, self._folder, self._runs = world, models, folder, dict[str, Path]()

    def __call__(self, model: str, values: Values) -> Path:
        values = {k: v for k, v in values.items() if not k.startswith("distributed.")}
        key = repr((model, values))
        if key not in self._runs:
            folder = self._folder / str(len(self._runs))
            self._runs[key] = self._world.trains(
                1, {**values, "model_name_or_path": self._models[model], "output_dir": str(folder)}, save=[1]
            )
        return self._runs[key]


@pytest.fixture(scope="module")
def alone(world: World, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(world, models, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("case", CASES)
def test_several_ranks_train_what_one_does(
    world: World, models: dict[str, str], alone: Alone, case: str, tmp_path: Path
) -> None:
    count, model, values = CASES[case]
    run = {**values, "model_name_or_path": models[model], "output_dir": str(tmp_path)}
    whole, folder = alone(model, values), world.trains(count, run, save=[1])
    first, last = (load_file(next((whole / "checkpoints" / f"checkpoint-{n}").glob("*model.safetensors")))
                   for n in (1, 10))  # fmt: skip
    assert any(not torch.equal(first[name], last[name]) for name in first)  # there was something to learn
    step = 1e-2  # the learning rate
    # In float32 a gradient next to 0 is known to 1e-4 of itself, and AdamW's first steps have its sign and size 1.
    tolerance = 1e-2 if values.get("dtype") == "float32" else TOLERANCE
    for number in (1, 10):
        same_weights(folder, whole, number, atol=tolerance * step)
    same_lines(folder, whole)
    for path in sorted((whole / "rollouts").glob("*.parquet")):
        of_one, of_many = pq.read_table(path).to_pydict(), pq.read_table(folder / "rollouts" / path.name).to_pydict()
        assert of_many["token_ids"] == of_one["token_ids"] and of_many["query"] == of_one["query"]
