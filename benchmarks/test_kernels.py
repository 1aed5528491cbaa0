"""The compiled row kernels alone: nanoseconds a logit, beside a copy of the same bytes. CPU, float32.

`pytest benchmarks/test_kernels.py` prints the table. Once on one thread over rows that stay in the cache, which shows
what a logit costs to compute, and once on all threads over rows that do not, which shows what it costs to move. A copy
reads and writes every byte, and policy rows do as well; logprob and sample rows only read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bandit_rft import PolicyObjective, sample_from_logits
from bandit_rft.ops import backends, rows
from bandit_rft.ops.rows import Scaling, TokenInputs

pytestmark = pytest.mark.skipif(backends.native is None, reason="measures the compiled core")

V = 32_000
#: name -> (rows of V logits, threads)
SIZES = {"one thread, in cache (1 MiB)": (8, 1), "two threads, in memory (125 MiB)": (1024, 2)}
REPEATS = dict(zip(SIZES, (400, 20), strict=True))


class Kernels:
    """The same calls that the operations make, on `count` rows."""

    def __init__(self, count: int) -> None:
        self.logits, self.work = torch.randn(count, V), torch.empty(count, V)
        self.peaked = 8 * self.logits  # top-p 0.9 keeps a few tokens of a row, as it does of a trained model's
        self.targets = torch.randint(V, (count,))
        self.inputs = TokenInputs(torch.randn(count), torch.ones(count), None, None)
        self.stream = {"sequence_ids": torch.arange(count), "positions": torch.zeros(count, dtype=torch.int64)}

    def copy(self) -> Any:
        return self.work.copy_(self.logits)

    def copy_back(self) -> None:
        self.copy()

    def policy_rows(self) -> Any:
        return rows.policy_(self.work, self.targets, Scaling(), PolicyObjective(), self.inputs)

    def policy_rows_with_entropy(self) -> Any:
        return rows.policy_(self.work, self.targets, Scaling(), PolicyObjective(entropy_coef=0.01), self.inputs)

    def logprob_rows(self) -> Any:
        return rows.logprobs(self.logits, self.targets, Scaling())

    def sample_rows(self) -> Any:
        return sample_from_logits(self.logits, seed=1, **self.stream)

    def sample_rows_peaked(self) -> Any:
        return sample_from_logits(self.peaked, seed=1, **self.stream)

    def sample_rows_top_p(self) -> Any:
        return sample_from_logits(self.peaked, seed=1, top_p=0.9, **self.stream)


TABLE: dict[tuple[str, str], tuple[float, float]] = {}  # (size, name) -> median and fastest


@pytest.fixture(scope="module", params=list(SIZES))
def sized(request: Any) -> Iterator[tuple[str, Kernels]]:
    torch.manual_seed(0)
    yield request.param, Kernels(SIZES[request.param][0])
    own = {name: times for (size, name), times in TABLE.items() if size == request.param}
    lines = [f"  {'ns a logit':<26}{'median':>9}{'fastest':>9}"]
    lines += [f"  {name:<26}{median:9.3f}{fastest:9.3f}" for name, (median, fastest) in own.items()]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{request.param}\n" + "\n".join(lines))


NAMES = (
    "copy", "policy_rows", "policy_rows_with_entropy", "logprob_rows", "sample_rows", "sample_rows_peaked",
    "sample_rows_top_p",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_rows(benchmark: Any, sized: tuple[str, Kernels], name: str) -> None:
    size, kernels = sized
    count, threads = SIZES[size]
    torch.set_num_threads(threads)  # after the common fixture, which sets two
    call: Callable[[], Any] = getattr(kernels, name)

    call()
    setup = kernels.copy_back if name.startswith("policy") else None  # they overwrite their logits
    benchmark.pedantic(call, setup=setup, rounds=REPEATS[size], iterations=1)
    times = (benchmark.stats.stats.median, benchmark.stats.stats.min)
    median, fastest = (seconds / (count * V) * 1e9 for seconds in times)
    TABLE[size, name] = median, fastest
    benchmark.extra_info.update(median_ns_a_logit=median, fastest_ns_a_logit=fastest)
    assert fastest > 0
