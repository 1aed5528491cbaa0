"""What stops a run that no longer trains what it samples, or no longer computes the loss it claims.

The probe looks at a model once, when it is wrapped; these look at the run, while it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bandit_rft import ops
from bandit_rft.metrics import Metrics
from bandit_rft.model import Policy
from bandit_rft.model.verify import verify_sequence
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.transfer import to_device

logger = logging.getLogger(__name__)

#: Nats a token, mean over one rollout, where `rollout.max_logprob_gap` says nothing. float32 differs by 1e-5, bfloat16
#: by 0.01 to 0.05 (it rounds hidden states, and the KV cache's are rounded elsewhere than the trainer's).
LOGPROB_GAP = {torch.float64: 0.01, torch.float32: 0.01, torch.bfloat16: 0.25, torch.float16: 0.25}
#: Relative error of loss and gradient against float32 where `max_verify_error` says nothing.
VERIFY_ERROR = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}


class GateError(ArithmeticError):
    """A run that would go on with wrong numbers. Its last checkpoint is from before."""


def logprob_gaps(batch: RolloutBatch, difference: Tensor) -> Tensor:
    """The mean of |sampler - trainer| over each rollout's tokens, from the tokens' own [N]: float32 [B].

    The batch is in host memory, the result where `difference` is; nothing here waits for the device.
    """
    device = difference.device
    row = to_device(batch.per_token(torch.arange(len(batch))), device)
    total = torch.zeros(len(batch), device=device).index_add_(0, row, difference.float())
    return total / to_device(batch.lengths.clamp(min=1), device)


def check_logprob_gap(gap: float, limit: float, where: str) -> None:
    """Refuse to apply an update whose rollouts another policy seems to have drawn.

    Raises:
        GateError: when the gap (nats a token) is above the limit, or NaN.
    """
    if not gap <= limit:
        raise GateError(
            f"{where}: the trainer's log-probabilities of a rollout are {gap:.3g} nats a token from those it was "
            f"sampled with, and rollout.max_logprob_gap is {limit:g}: the sampler and the trainer are two policies. "
            "The update was not applied. Look at what treats the two differently: the model (docs/models.md), its "
            "dtype, a layer with a cache or a length limit of its own. A higher rollout.max_logprob_gap accepts the "
            "difference, 0 never looks"
        )


class CanaryError(GateError):
    """The rollout server draws with another policy than the trainer's; the trainer itself is right, and is saved."""


def check_canaries(
    canaries: RolloutBatch | None, score: Callable[[RolloutBatch], Tensor], limit: float, *, correct: bool, where: str
) -> Metrics:
    """Compare a server's log-probabilities of completions that it just drew with the trainer's.

    Only this notices weights that arrived in part, tensors derived from the old ones, and prefixes cached with them: a
    server that names the right version may have any of these.

    Args:
        canaries: what the server drew after a push; None from an engine that shares the trainer's memory.
        score: the trainer's log-probabilities [N] of a batch.
        limit: nats a token, mean over a completion; 0: any.
        correct: warn where the gap is larger, and leave it to the objective's ratios.
        where: which weights they are, for the message.

    Returns:
        `canary/logprob_gap`, the largest mean over a completion.

    Raises:
        CanaryError: the gap is above the limit, or NaN.
    """
    if canaries is None:
        return {}
    gaps = logprob_gaps(canaries, (score(canaries) - canaries.logprobs).abs())
    gap = float(gaps.max())
    if limit and not gap <= limit:
        worst = int(gaps.nan_to_num(torch.inf).argmax())
        message = (
            f"{where}: a completion that rollout server {int(canaries.attempt[worst]) + 1} drew right after a push of "
            f"weights has log-probabilities {gap:.3g} nats a token from the trainer's, and rollout.max_logprob_gap "
            f"is {limit:g}: it draws with other weights than it was given, or computes another model"
        )
        if not correct:
            raise CanaryError(f"{message}. Nothing was trained on them; the run can be continued from its checkpoint")
        logger.warning("%s. Ratios to its log-probabilities correct for it (rollout.on_logprob_gap=correct)", message)
    return {"canary/logprob_gap": gap}


class SpotCheck:
    """Every `steps` rounds, one rollout's loss and gradient once more by plain PyTorch (verify.py).

    It costs two forward and backward passes over that rollout, two gradients of all trained parameters, and one
    [completion, vocabulary] tensor; where the weights are not float32 a float32 copy of them, too. The first one is in
    the first round, so that a lack of memory shows at once: then a warning, and no more checks.

    Args:
        steps: rounds between checks; 0: never.
        limit: largest relative error; None: by dtype, VERIFY_ERROR.
        seed: chooses the rollouts, with the round.
        objective: whose loss is checked, with all its terms.
    """

    def __init__(self, steps: int, limit: float | None, seed: int, objective: ops.PolicyObjective):
        self.steps, self.limit, self.seed, self.objective = steps, limit, seed, objective
        self._fits = True  # in memory

    def due(self, number: int) -> bool:
        """Whether round `number` is one to check."""
        return bool(self.steps) and (number - 1) % self.steps == 0

    def __call__(
        self, policy: Policy, batch: RolloutBatch, temperature: float, number: int, *, off_policy: bool = False
    ) -> Metrics:
        """Check one rollout of round `number`, chosen by seed and round; {} where there is nothing to check.

        Its advantage is taken as it is; where that is 0, -1 and 1 by turns. Of ratios and a KL term the formulas are
        checked, on made-up policies (verify_sequence): `off_policy` says whether the round's updates had ratios.

        Raises:
            GateError: when an error is above the limit, or NaN.
        """
        if not self.due(number) or not len(batch) or not self._fits:
            return {}
        row = int(np.random.Generator(np.random.PCG64([self.seed, number, 0x5907])).integers(len(batch)))
        one = batch.select([row])
        try:
            found = verify_sequence(
                policy, one.prompt_lists()[0], one.token_lists()[0], objective=self.objective, temperature=temperature,
                advantage=float(one.advantage[0]) or (-1.0) ** number, off_policy=off_policy,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            logger.warning("verify_steps: no memory to compute one rollout by plain PyTorch: no more checks")
            self._fits = False
            return {}
        limit = VERIFY_ERROR[policy.weight.dtype] if self.limit is None else self.limit
        if not found.worst() <= limit:
            raise GateError(
                f"round {number}: the fused path's loss {found.loss:.6g} and gradient differ from plain PyTorch's "
                f"{found.reference_loss:.6g} by {found.loss_error:.3g} and {found.gradient_error:.3g} (relative), and "
                f"max_verify_error is {limit:g}. This round's update was applied, nothing of it is saved"
            )
        return {
            "verify/loss_error": found.loss_error,
            "verify/gradient_error": found.gradient_error,
            "verify/logprob_error": found.logprob_error,
        }
