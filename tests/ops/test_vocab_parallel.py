"""A vocabulary split over two and three processes is that of one process: tokens equal, the rest to rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
import torch.multiprocessing
from vocab_parallel_rank import run

pytestmark = [
    pytest.mark.slow,  # ranks, which all tests here wait for
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]

#: Relative to the largest value; logits reach 200. Parts of hidden's gradient are rounded to bfloat16 on each rank.
BOUNDS = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 2e-2}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    size, folder = request.param, tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run, (size, str(folder)), nprocs=size)
    return [json.loads(Path(folder / f"rank-{rank}.json").read_text()) for rank in range(size)]


def test_equal_to_the_whole_head(ranks: list[Any]) -> None:
    wrong = []
    for rank, found in enumerate(ranks):
        assert len(found["differences"]) > 200
        for what, difference in found["differences"].items():
            bound = next(bound for dtype, bound in BOUNDS.items() if dtype in what)
            if difference > (0 if "tokens" in what else bound):
                wrong.append(f"rank {rank}: {what}: {difference:.2g}")
    assert not wrong, "\n".join(wrong)


def test_what_does_not_fit_is_refused_on_every_rank(ranks: list[Any]) -> None:
    for found in ranks:
        shapes, target, group, threshold = found["refusals"]
        assert shapes.startswith("hidden must be the same [N, H] on every rank of process_group; got [2, 4], [3, 4]")
        assert target.startswith(f"targets must lie in [0, V = {5 * len(ranks)})")
        assert group == "process_group must be a torch.distributed.ProcessGroup; got str"
        assert threshold == "gradient_threshold must be 0 with a process_group; got 0.1"
