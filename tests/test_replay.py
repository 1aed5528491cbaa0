"""The store of old rollouts: what is kept, what is drawn, and that a checkpoint gives it back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from bandit_rft.history import ValueTracker
from bandit_rft.replay import Replay, effective_sample_size, importance_weights, staleness_metrics
from bandit_rft.rollout_batch import RolloutBatch


def rollout(index: int, *, advantage: float = 1.0, query: int | None = None) -> RolloutBatch:
    rng = np.random.default_rng(index)
    length = int(rng.integers(1, 6))
    return RolloutBatch.of(
        [rng.integers(0, 9, 3).tolist()], torch.from_numpy(rng.integers(0, 9, length)), [length],
        torch.from_numpy(-rng.random(length).astype(np.float32)), torch.ones(length), [False], round=index,
        query=index if query is None else query, reward=1.0, advantage=advantage,
    )  # fmt: skip


def rollouts(numbers: Iterable[int], **options: Any) -> RolloutBatch:
    return RolloutBatch.cat([rollout(i, **{k: f(i) for k, f in options.items()}) for i in numbers])


def drawn(replay: Replay, count: int, sampling: str, *, now: int = 20, limit: int | None = None) -> list[int]:
    batch, _ = replay.draw(count, sampling=sampling, now=now, max_staleness=limit, seed=3)
    return [] if batch is None else batch.round.tolist()


def test_first_in_first_out_and_staleness() -> None:
    replay = Replay(6)
    replay.add(rollouts(range(10)))
    assert len(replay) == 6 and sorted(drawn(replay, 99, "uniform")) == [4, 5, 6, 7, 8, 9]
    assert drawn(replay, 2, "recent") == [8, 9]
    chosen, young = replay.draw(99, sampling="uniform", now=10, max_staleness=2, seed=0)
    assert chosen is not None and sorted(chosen.round.tolist()) == [8, 9] and young == pytest.approx(2 / 6)
    assert replay.draw(5, sampling="uniform", now=99, max_staleness=1, seed=0) == (None, 0.0)
    assert Replay(3).draw(5, sampling="prioritized", now=1, max_staleness=None, seed=0) == (None, 1.0)


def test_it_says_how_full_it_is() -> None:
    assert repr(Replay(6)) == "Replay(0 of 6 rollouts)"


def test_draws_depend_on_seed_and_round_alone() -> None:
    replay = Replay(50)
    replay.add(rollouts(range(20)))
    for sampling in ("uniform", "positive", "prioritized"):
        assert drawn(replay, 8, sampling) == drawn(replay, 8, sampling) != drawn(replay, 8, sampling, now=21)
        assert len(set(drawn(replay, 8, sampling))) == 8


def test_positive_and_prioritized() -> None:
    replay = Replay(50)
    replay.add(rollouts(range(30), advantage=lambda i: [0.0, 1.0, -3.0][i % 3]))
    assert {i % 3 for i in drawn(replay, 10, "positive")} == {1}
    assert len(drawn(replay, 99, "prioritized")) == 20 and 0 not in {i % 3 for i in drawn(replay, 20, "prioritized")}
    first = [drawn(replay, 1, "prioritized", now=now)[0] % 3 for now in range(30, 1030)]
    assert first.count(2) / len(first) == pytest.approx(0.75, abs=0.05)  # |-3| against |1|


def test_checkpoint_gives_everything_back() -> None:
    store, other = Replay(7), Replay(7)
    store.add(rollouts(range(12), query=lambda i: i % 5))
    other.restore(Replay(7).arrays())
    assert len(other) == 0 and other.arrays() == {}
    other.restore(store.arrays())
    assert len(other) == 7
    for (name, a), b in zip(store.arrays().items(), other.arrays().values(), strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b)


def test_movement_is_measured_on_the_latest_first_answer_of_each_query() -> None:
    tracker, seen = ValueTracker(), []

    def score(batch: RolloutBatch) -> torch.Tensor:
        seen.append(batch.round.tolist())
        return batch.logprobs - 0.5

    asked = rollouts([9, 10, 11, 12], query=lambda i: [6, 4, 4, 77][i - 9])
    tracker.observe(asked, score)
    assert seen == [] and tracker.movement == {}  # nothing was answered yet
    tracker.remember(rollouts([1, 2], query=lambda i: [4, 6][i - 1]))
    tracker.remember(rollouts([3, 4], query=lambda i: 4).with_columns(attempt=[0, 1]))
    restored = ValueTracker()
    restored.restore(tracker.arrays())
    for memory in (tracker, restored):
        memory.observe(asked, score)
        assert seen.pop() == [2, 3]
        assert memory.movement == pytest.approx({6: np.exp(-0.5) - 0.5, 4: np.exp(-0.5) - 0.5}, rel=1e-5)


def test_staleness_histogram_counts_everything_once() -> None:
    metrics = staleness_metrics(rollouts((19, 18, 17, 13, 12, 5, 4, 0)), now=20)
    assert [metrics[f"replay/staleness/{name}"] for name in ("1", "2-3", "4-7", "8-15", "16+")] == [1, 2, 1, 2, 2]
    assert metrics["replay/staleness/max"] == 20
    assert staleness_metrics(None, now=20)["replay/staleness/mean"] is None


def test_importance_weights() -> None:
    ratios = [torch.tensor([0.1, -0.3]), torch.tensor([2.0, -1.9, 0.5])]
    token, truncated = importance_weights(ratios, "token", 2.0)
    for weight, ratio in zip(token, ratios, strict=True):
        torch.testing.assert_close(weight, ratio.exp().clamp(max=2.0))
    assert truncated == pytest.approx(1 / 5)
    sequence, truncated = importance_weights(ratios, "sequence", 1.5)
    torch.testing.assert_close(torch.cat(sequence), torch.tensor([np.exp(-0.2)] * 2 + [1.5] * 3, dtype=torch.float32))
    assert truncated == pytest.approx(3 / 5)
    assert effective_sample_size(torch.ones(9)) == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
