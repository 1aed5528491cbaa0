"""The adaptive KL coefficient."""

from __future__ import annotations

import pytest

from bandit_rft.kl_controller import KLController


@pytest.mark.parametrize("rollouts", [1, 10, 50, 10_000])
def test_a_small_kl_never_turns_the_coefficient_negative(rollouts: int) -> None:
    """A round may have more rollouts than the horizon: a negative coefficient would pay for divergence."""
    controller = KLController(0.1, target=0.05, horizon=10)
    for _ in range(20):
        before = controller.coef
        controller.update(0.0, rollouts)
        assert before * 0.8 - 1e-15 <= controller.coef < before
    controller.update(100.0, rollouts)
    assert controller.coef > 0


def test_it_moves_as_published() -> None:
    controller = KLController(0.1, target=0.1, horizon=1000)
    controller.update(0.11, 100)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.1 * 100 / 1000))
