"""The learning rate of each round: torch's own schedules, as a function of the round alone.

Since nothing but the round decides, a continued run has the bits of one that was never interrupted, and no state of a
schedule has to be saved.
"""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


class LearningRate:
    """The learning rate by round, the first round being 1.

    In W rounds of warm-up it rises in equal steps, round r having r / (W + 1) of it. Then it stays, or falls over the
    other rounds, so that the fall would be complete one round after the last. Beyond that it stays at its end.

    Args:
        rate: the full learning rate.
        kind: constant | linear | cosine.
        rounds: how many rounds the whole course takes, warm-up included.
        warmup: rounds of warm-up.
        end: what a falling rate falls to, relative to the full one.

    Raises:
        ValueError: the warm-up leaves no round.
    """

    def __init__(self, rate: float, kind: str = "constant", *, rounds: int = 0, warmup: int = 0, end: float = 0.0):
        if warmup and warmup >= rounds:
            raise ValueError(f"a warm-up of {warmup} rounds leaves none of {rounds} at the full learning rate")
        self.rate, self.kind, self.rounds, self.warmup, self.end = rate, kind, rounds, warmup, end
        self._rates: list[float] = []  # of rounds 1, 2, ... as far as they were asked for

    @property
    def course(self) -> dict[str, int]:
        """What a continued run must share for its rounds to have the same rates; 0: no fall, no warm-up."""
        return {"rounds": 0 if self.kind == "constant" else self.rounds, "warmup": self.warmup}

    def __call__(self, number: int) -> float:
        """The learning rate of a round."""
        if self.kind == "constant" and not self.warmup:
            return self.rate
        if not self._rates:
            self._start()
        while len(self._rates) < min(number, self.rounds + 1):
            self._optimizer.step()
            self._scheduler.step()
            self._rates.append(float(self._optimizer.param_groups[0]["lr"]))
        return self._rates[min(number, self.rounds + 1) - 1]

    def _start(self) -> None:
        """torch's schedulers act on an optimizer; this one has nothing to optimize."""
        self._optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.rate)
        falling = max(1, self.rounds - self.warmup)
        decay: LRScheduler
        if self.kind == "linear":
            decay = LinearLR(self._optimizer, 1.0, self.end, falling)
        elif self.kind == "cosine":
            decay = CosineAnnealingLR(self._optimizer, falling, self.end * self.rate)
        else:
            decay = ConstantLR(self._optimizer, 1.0, falling)
        self._scheduler: LRScheduler = decay
        if self.warmup:
            rise = LinearLR(self._optimizer, 1 / (self.warmup + 1), 1.0, self.warmup)
            self._scheduler = SequentialLR(self._optimizer, [rise, decay], [self.warmup])
        self._rates = [float(self._optimizer.param_groups[0]["lr"])]
