"""Every advantage against its formula written out; what they remember; which subsets and groups are recognized."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from bandit_rft import advantages
from bandit_rft.advantages import ADVANTAGES, compute_advantages, register
from bandit_rft.config import build_config
from bandit_rft.history import RewardHistory, ValueTracker
from bandit_rft.selection import most_varied

REWARDS = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.5, 0.5]
GROUPS = [7, 7, 7, 3, 3, 3, 9, 9]
STATELESS = sorted(name for name, advantage in ADVANTAGES.items() if advantage.memory is None)


def by_group(function: Any) -> np.ndarray:
    r, out = np.array(REWARDS), np.zeros(len(REWARDS))
    for group in set(GROUPS):
        rows = [i for i, g in enumerate(GROUPS) if g == group]
        out[rows] = function(r[rows])
    return out


R = np.array(REWARDS)
EXPECTED = {
    "reward": R,
    "psr": R,
    "nsr": R - 1,
    "weighted": 0.1 * R + R - 1,
    "batch_mean": R - R.mean(),
    "batch_norm": (R - R.mean()) / (R.std(ddof=1) + 1e-6),
    "group_mean": by_group(lambda r: r - r.mean()),
    "group_norm": by_group(lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-6)),
    "group_mean_batch_std": by_group(lambda r: r - r.mean()) / (R.std(ddof=1) + 1e-6),
    "rloo": by_group(lambda r: np.array([x - np.delete(r, i).mean() for i, x in enumerate(r)])),
    "extra_rollouts": by_group(lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-6)),
}


@pytest.mark.parametrize("name", STATELESS)
def test_formula(name: str) -> None:
    np.testing.assert_allclose(compute_advantages(name, REWARDS, GROUPS), EXPECTED[name], atol=1e-6)


def test_every_advantage_the_design_names_is_there() -> None:
    assert set(ADVANTAGES) == {*EXPECTED, "history_mean", "history_norm", "spo"}


@pytest.mark.parametrize("name", sorted(set(STATELESS) - {"reward", "psr", "nsr", "weighted"}))
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-12, 7.7e8])
def test_constant_groups_have_advantage_exactly_zero(name: str, value: float) -> None:
    """The mean of equal floats may differ from them in the last bit; dividing that by 1e-6 is not an advantage."""
    advantages = compute_advantages(name, [value] * 7, [0] * 7)
    assert advantages.dtype == np.float32 and not advantages.any()


def test_constant_group_among_others_is_exactly_zero() -> None:
    for name in ("group_mean", "group_norm", "group_mean_batch_std", "rloo", "extra_rollouts"):
        advantages = compute_advantages(name, [0.1] * 3 + [0.0, 1.0], [0] * 3 + [1] * 2)
        assert not advantages[:3].any() and advantages[3:].all()


def test_history_is_the_papers_window() -> None:
    memory = ADVANTAGES["history_norm"].make_memory({"window": 3})
    seen: list[float] = []
    for reward in (1.0, 0.0, 0.0, 1.0, 1.0, 1.0):
        (advantage,) = compute_advantages("history_norm", [reward], [5], memory)
        window = (seen := [*seen, reward])[-3:]
        if len(window) == 1:
            expected = reward
        elif len(set(window)) == 1:
            expected = 0.0
        else:
            expected = (reward - np.mean(window)) / (np.std(window, ddof=1) + 1e-6)
        assert advantage == pytest.approx(expected, abs=1e-6)
    assert advantage == 0.0  # 1, 1, 1: exactly


def test_history_appends_the_whole_round_before_comparing() -> None:
    memory = RewardHistory(window=4)
    first = compute_advantages("history_mean", [1.0, 0.0, 1.0], [2, 2, 8], memory)
    np.testing.assert_allclose(first, [0.5, -0.5, 1.0])
    second = compute_advantages("history_mean", [1.0], [2], memory)
    np.testing.assert_allclose(second, [1 - 2 / 3], atol=1e-7)
    assert memory.of(2).tolist() == [1.0, 0.0, 1.0] and memory.of(99).tolist() == []
    with pytest.raises(ValueError, match="window=4 is shorter than the 5 rollouts of query 1"):
        compute_advantages("history_mean", [1.0] * 5, [1] * 5, memory)


def test_spo_is_the_tracker_written_out() -> None:
    memory = ValueTracker(half_life=0.06, decay_min=0.875, decay_max=0.96)
    first = compute_advantages("spo", [1.0, 0.0, 1.0], [0, 1, 2], memory)
    d = np.array([0.5, -0.5, 0.5])
    np.testing.assert_allclose(first, (d - d.mean()) / (d.std(ddof=1) + 1e-6), atol=1e-6)
    assert memory.value(0) == pytest.approx((0.96 * 4 + 1) / (0.96 * 8 + 1))  # nothing moved: the slowest decay
    memory.movement = {0: 0.06 * 0.1, 1: 10.0}
    before = [memory.value(q) for q in (0, 1)]
    second = compute_advantages("spo", [1.0, 1.0], [0, 1], memory)
    d = 1 - np.array(before)
    np.testing.assert_allclose(second, (d - d.mean()) / (d.std(ddof=1) + 1e-6), atol=1e-5)
    rho = 2**-0.1
    assert memory.value(0) == pytest.approx((rho * (0.96 * 4 + 1) + 1) / (rho * (0.96 * 8 + 1) + 1))
    assert memory.value(1) == pytest.approx((0.875 * 0.96 * 4 + 1) / (0.875 * (0.96 * 8 + 1) + 1))
    assert memory.movement == {}


@pytest.mark.parametrize("name", ["history_norm", "spo"])
def test_memory_survives_a_checkpoint(name: str) -> None:
    rng = np.random.default_rng(0)
    memory, other = (ADVANTAGES[name].make_memory({"window": 12}) for _ in range(2))
    assert memory is not None and other is not None
    for _ in range(5):
        compute_advantages(name, rng.integers(0, 2, 16).astype(float), rng.integers(0, 9, 16), memory)
    other.restore(memory.arrays())
    rewards, groups = rng.integers(0, 2, 9).astype(float), np.arange(9)
    np.testing.assert_array_equal(
        compute_advantages(name, rewards, groups, memory), compute_advantages(name, rewards, groups, other)
    )
    for a, b in zip(memory.arrays().values(), other.arrays().values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_registry_options_and_errors() -> None:
    assert {name for name, advantage in ADVANTAGES.items() if advantage.needs_batch} == {
        "batch_mean",
        "batch_norm",
        "spo",
    }
    with pytest.raises(ValueError, match=r"advantage=spo compares the rollouts of a round, and is 0 for one alone"):
        build_config({"preset": "minimal", "advantage": "spo", "batch_size": 1})
    assert {name for name, advantage in ADVANTAGES.items() if advantage.needs_groups} == {
        "group_mean", "group_norm", "group_mean_batch_std", "rloo", "extra_rollouts",
    }  # fmt: skip
    assert ADVANTAGES["spo"].options == {"half_life": 0.06, "decay_min": 0.875, "decay_max": 0.96}
    assert ADVANTAGES["history_norm"].options == {"window": 8}
    np.testing.assert_allclose(compute_advantages("weighted", [1.0], [0], options={"positive_weight": 0.4}), [0.4])
    with pytest.raises(ValueError, match="registered already"):
        register("reward")(lambda rewards, groups: rewards)
    for name, arguments, message in [
        ("grpo", ([1.0], [0]), "advantage must be one of"),
        ("reward", ([1.0, float("nan")], [0, 1]), r"rewards\[1\] is not finite"),
        ("reward", ([1.0], [0, 1]), "one length"),
        ("reward", ([1.0], [0], None, {"window": 3}), "advantage reward has no option 'window'; it has: none"),
        ("spo", ([1.0], [0]), "give the memory"),
        ("nsr", ([1.0, -0.5], [0, 1]), r"nsr takes rewards in \[0, 1\]; rewards\[1\] is -0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            compute_advantages(name, *arguments)  # type: ignore[arg-type]
    assert compute_advantages("group_norm", [], []).shape == (0,)
    with pytest.raises(ValueError, match="decay_min <= decay_max"):
        ValueTracker(decay_min=0.9, decay_max=0.5)


@pytest.mark.parametrize("seed", range(20))
def test_most_varied_is_the_best_of_all_subsets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rewards = rng.choice([0.0, 1.0, 0.3, 0.9], size=12).astype(np.float64)
    groups, keep = np.repeat([4, 2], [7, 5]), int(rng.integers(2, 5))
    kept = most_varied(rewards, groups, keep)
    for group in (4, 2):
        rows = np.flatnonzero(groups == group)
        assert kept[rows].sum() == keep
        best = max(np.var(rewards[list(subset)]) for subset in itertools.combinations(rows, keep))
        assert np.var(rewards[rows[kept[rows]]]) == pytest.approx(best)


# --- in a loop of one's own: tensors in, tensors out ------------------------------------------------------------------


def of_rows(name: str, rewards: torch.Tensor, **given: Any) -> torch.Tensor:
    result = getattr(advantages, name)(rewards, **given)
    assert isinstance(result, torch.Tensor)
    return result


@pytest.mark.parametrize("name", STATELESS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_give_the_formula(name: str, dtype: torch.dtype) -> None:
    got = of_rows(name, torch.tensor(REWARDS, dtype=dtype, requires_grad=True), queries=torch.tensor(GROUPS))
    assert got.dtype == torch.float32 and not got.requires_grad
    np.testing.assert_allclose(got.numpy(), EXPECTED[name], atol=1e-6)


@pytest.mark.parametrize("name", STATELESS)
def test_queries_by_n_are_the_rows(name: str) -> None:
    rewards = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.25, 0.0]])
    got = of_rows(name, rewards)
    assert got.shape == (2, 3)
    assert torch.equal(got.flatten(), of_rows(name, rewards.flatten(), queries=[5, 5, 5, 2, 2, 2]))
    assert torch.equal(got, of_rows(name, rewards, queries=torch.tensor([5, 2])))


def test_lists_and_arrays() -> None:
    assert advantages.group_mean([[1, 0], [0, 0]]).tolist() == [[0.5, -0.5], [0, 0]]
    got = advantages.group_mean(np.array([1.0, 0.0]), np.array([3, 3]))
    assert isinstance(got, np.ndarray) and got.dtype == np.float32
    assert advantages.weighted(torch.tensor([1.0, 0.0]), positive_weight=0.5).tolist() == [0.5, -1.0]
    assert of_rows("batch_mean", torch.zeros(0)).shape == (0,)


def test_a_memory_is_kept_by_the_caller() -> None:
    memory = advantages.RewardHistory(window=3)
    assert of_rows("history_mean", torch.tensor([1.0, 0.0]), queries=[4, 9], memory=memory).tolist() == [1, 0]
    assert of_rows("history_mean", torch.tensor([[0.0, 0.0]]), queries=[4], memory=memory).tolist() == [
        [pytest.approx(-1 / 3), pytest.approx(-1 / 3)]
    ]
    assert memory.of(4).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("name", "rewards", "given", "message"),
    [
        ("group_norm", (3, 4), {"queries": range(12)}, r"queries must be \[3\], one a row of rewards .* got \[12\]"),
        ("group_norm", (3, 4), {"queries": range(4)}, r"queries must be \[3\]"),
        ("group_norm", (12,), {"queries": range(3)}, r"queries must be \[12\], one a rollout .* got \[3\]"),
        ("group_norm", (12,), {"queries": range(12)}, "each of 12 rollouts has a query of its own"),
        ("group_norm", (12, 1), {}, "each of 12 rollouts has a query of its own"),
        ("group_norm", (12,), {}, r"queries must be given, \[B\] with B = 12: group_norm compares"),
        ("reward", (2, 2, 2), {}, r"rewards must be \[B\], with queries \[B\], or \[queries, n\]; got \[2, 2, 2\]"),
        ("group_norm", (2,), {"queries": [0.0, 0.5]}, "queries must be whole numbers.*got float64"),
        ("history_norm", (3, 2), {"memory": RewardHistory()}, r"queries must be given, whole numbers \[3\]"),
        ("history_norm", (3,), {"queries": range(3)}, "memory must be the RewardHistory that is kept .* got NoneType"),
        ("weighted", (3,), {"weight": 1}, "has no option 'weight'.*positive_weight"),
    ],
)  # fmt: skip
def test_shapes_that_would_be_silently_wrong_are_refused(
    name: str, rewards: tuple[int, ...], given: dict[str, Any], message: str
) -> None:
    given = {key: list(value) if isinstance(value, range) else value for key, value in given.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        of_rows(name, torch.rand(rewards), **given)


def test_values_are_checked_as_ever() -> None:
    with pytest.raises(ValueError, match=r"rewards\[1\] is not finite"):
        of_rows("reward", torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match=r"nsr takes rewards in \[0, 1\]; rewards\[0\] is 2"):
        of_rows("nsr", torch.tensor([2.0]))


def test_what_is_registered_takes_tensors_too() -> None:
    @register("twice")
    def twice(rewards: Any, groups: Any, *, times: float = 2.0) -> Any:
        return times * rewards

    try:
        assert twice(torch.tensor([[1.0, 2.0]])).tolist() == [[2, 4]]
        assert twice(torch.tensor([1.0]), times=3.0).tolist() == [3]
        assert compute_advantages("twice", [1.0], [0]).tolist() == [2]
    finally:
        del ADVANTAGES["twice"]
