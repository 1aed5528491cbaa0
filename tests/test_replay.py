"""The store of old rollouts: what is kept, what is drawn, and that a checkpoint gives it back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bandit_rft.replay import LastAnswers, Trajectory, TrajectoryReplay, staleness_metrics
from bandit_rft.update import effective_sample_size, importance_weights


def trajectory(index: int, *, advantage: float = 1.0, query: int | None = None) -> Trajectory:
    rng = np.random.default_rng(index)
    length = int(rng.integers(1, 6))
    return Trajectory(
        round=index, query=index if query is None else query, rollout=0, prompt=rng.integers(0, 9, 3).astype(np.int32),
        tokens=rng.integers(0, 9, length).astype(np.int32), logprobs=-rng.random(length).astype(np.float32), reward=1.0,
        advantage=advantage, truncated=False,
    )  # fmt: skip


def drawn(replay: TrajectoryReplay, count: int, sampling: str, *, now: int = 20, limit: int | None = None) -> list[int]:
    return [t.round for t in replay.draw(count, sampling=sampling, now=now, max_staleness=limit, seed=3)[0]]


def test_first_in_first_out_and_staleness() -> None:
    replay = TrajectoryReplay(6)
    replay.add(trajectory(i) for i in range(10))
    assert len(replay) == 6 and sorted(drawn(replay, 99, "uniform")) == [4, 5, 6, 7, 8, 9]
    assert drawn(replay, 2, "recent") == [8, 9]
    chosen, young = replay.draw(99, sampling="uniform", now=10, max_staleness=2, seed=0)
    assert sorted(t.round for t in chosen) == [8, 9] and young == pytest.approx(2 / 6)
    assert replay.draw(5, sampling="uniform", now=99, max_staleness=1, seed=0) == ([], 0.0)
    assert TrajectoryReplay(3).draw(5, sampling="prioritized", now=1, max_staleness=None, seed=0) == ([], 1.0)


def test_draws_depend_on_seed_and_round_alone() -> None:
    replay = TrajectoryReplay(50)
    replay.add(trajectory(i) for i in range(20))
    for sampling in ("uniform", "positive", "prioritized"):
        assert drawn(replay, 8, sampling) == drawn(replay, 8, sampling) != drawn(replay, 8, sampling, now=21)
        assert len(set(drawn(replay, 8, sampling))) == 8


def test_positive_and_prioritized() -> None:
    replay = TrajectoryReplay(50)
    replay.add(trajectory(i, advantage=[0.0, 1.0, -3.0][i % 3]) for i in range(30))
    assert {i % 3 for i in drawn(replay, 10, "positive")} == {1}
    assert len(drawn(replay, 99, "prioritized")) == 20 and 0 not in {i % 3 for i in drawn(replay, 20, "prioritized")}
    first = [drawn(replay, 1, "prioritized", now=now)[0] % 3 for now in range(30, 1030)]
    assert first.count(2) / len(first) == pytest.approx(0.75, abs=0.05)  # |-3| against |1|


@pytest.mark.parametrize("store", [TrajectoryReplay(7), LastAnswers()])
def test_checkpoint_gives_everything_back(store: TrajectoryReplay | LastAnswers) -> None:
    store.add(trajectory(i, query=i % 5) for i in range(12))
    other = TrajectoryReplay(7) if isinstance(store, TrajectoryReplay) else LastAnswers()
    empty = {k: v[:0] for k, v in store.arrays().items()}
    other.restore(empty)
    assert all(len(x) == 0 for x in other.arrays().values())
    other.restore(store.arrays())
    for (name, a), b in zip(store.arrays().items(), other.arrays().values(), strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b)


def test_last_answers_are_the_latest_of_each_query() -> None:
    answers = LastAnswers()
    answers.add([trajectory(1, query=4), trajectory(2, query=6)])
    answers.add([trajectory(3, query=4)])
    assert [t.round for t in answers.of([6, 4, 4, 77])] == [2, 3]


def test_staleness_histogram_counts_everything_once() -> None:
    metrics = staleness_metrics([trajectory(i) for i in (19, 18, 17, 13, 12, 5, 4, 0)], now=20)
    assert [metrics[f"replay/staleness/{name}"] for name in ("1", "2-3", "4-7", "8-15", "16+")] == [1, 2, 1, 2, 2]
    assert metrics["replay/staleness/max"] == 20
    assert staleness_metrics([], now=20)["replay/staleness/mean"] is None


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
