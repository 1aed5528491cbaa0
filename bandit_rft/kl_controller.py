"""The coefficient of the KL to the initial model: fixed, or moved so that the KL stays near a target."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class KLController:
    """coef <- coef (1 + clip(kl / target - 1, -0.2, 0.2) min(rollouts / horizon, 1)) (arXiv 1909.08593, section 2.2).

    Theirs has no minimum: with five horizons in one round the coefficient would turn negative.

    Attributes:
        coef: today's coefficient; what a checkpoint keeps.
        target: nats a token; None: the coefficient stays.
        horizon: rollouts over which the coefficient moves.
    """

    coef: float
    target: float | None = None
    horizon: int = 10000

    def update(self, kl: float | None, rollouts: int) -> None:
        """Move after a round in which the policy was `kl` nats a token away (None: not measured)."""
        if self.target is not None and kl is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * min(rollouts / self.horizon, 1.0)
