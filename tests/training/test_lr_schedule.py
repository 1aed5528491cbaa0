"""The learning rate by round: torch's schedules, with a warm-up, exact after an interruption."""

from __future__ import annotations

import math
import warnings

import pytest

from bandit_rft.lr_schedule import LearningRate


def rates(kind: str, rounds: int, warmup: int = 0, end: float = 0.0, last: int | None = None) -> list[float]:
    schedule = LearningRate(0.5, kind, rounds=rounds, warmup=warmup, end=end)
    return [schedule(number) for number in range(1, (last or rounds) + 1)]


@pytest.mark.parametrize("end", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_the_rates_are_the_formulas(warmup: int, end: float) -> None:
    rounds = 12
    rise = [0.5 * number / (warmup + 1) for number in range(1, warmup + 1)]
    falls = {
        "constant": lambda x: 1.0,
        "linear": lambda x: 1 - (1 - end) * x,
        "cosine": lambda x: end + (1 - end) * (1 + math.cos(math.pi * x)) / 2,
    }
    for kind, fall in falls.items():
        expected = rise + [0.5 * fall(i / (rounds - warmup)) for i in range(rounds - warmup)]
        assert rates(kind, rounds, warmup, end) == pytest.approx(expected, rel=1e-12), kind
        beyond = rates(kind, rounds, warmup, end, last=rounds + 5)[rounds:]
        assert beyond == pytest.approx([0.5 * fall(1.0)] * 5, abs=1e-12), kind  # a cosine does not rise again


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_round_has_the_same_rate_wherever_a_run_begins(kind: str) -> None:
    whole = rates(kind, 200, warmup=7, end=0.03)
    for first in (1, 7, 8, 93, 200):
        later = LearningRate(0.5, kind, rounds=200, warmup=7, end=0.03)
        assert [later(number) for number in range(first, 201)] == whole[first - 1 :]


def test_a_constant_rate_is_the_number_given() -> None:
    assert LearningRate(1e-6)(1) == LearningRate(1e-6)(10**9) == 1e-6


def test_no_warning_of_torch_and_no_warm_up_that_never_ends() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates("cosine", 20, warmup=4)
    with pytest.raises(ValueError, match="a warm-up of 5 rounds leaves none of 5"):
        LearningRate(0.1, rounds=5, warmup=5)
