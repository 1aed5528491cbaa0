"""The update: from rollouts and their advantages to steps of the optimizer.

A rollout of advantage zero has no gradient unless the KL or entropy term makes it count: it is dropped before the
forward pass, but stays in the normalizer. So the step is the same, only cheaper. Nothing is padded, and no gradient
depends on how rollouts are split into micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bandit_rft import ops
from bandit_rft.model import Policy
from bandit_rft.optimizer import PolicyOptimizer
from bandit_rft.rollout import Rollouts


@dataclass(frozen=True)
class TrainingBatch:
    """B rollouts to learn from: those of this round first, then replayed ones."""

    rollouts: Rollouts  # whose logprobs are what an objective's ratio is taken against
    advantages: NDArray[np.float32]  # [B]
    counted: NDArray[np.bool_]  # [B]; False: as if never drawn, in no sum and no normalizer
    fresh: int  # the first so many rollouts were drawn in this round, by this policy
    importance: Tensor | None = None  # float32 [N], a factor on each token's advantage
    off_policy: bool = False  # the ratio is not 1 by definition, even in the first step


@dataclass(frozen=True)
class Update:
    """What the update of one round did; sums and means run over all its steps."""

    loss: float  # mean over steps
    grad_norm: float  # mean over steps, before clipping
    steps: int
    kl: float | None  # k3 estimate against the initial model, mean over trained tokens; None without a KL term
    tokens_trained: int
    tokens_skipped: int
    tokens_scored: int  # by the reference model
    off_policy: bool  # whether the ratio could differ from 1
    statistics: dict[str, float]  # of bandit_rft.ops.PolicyLoss, mean over trained tokens
    logprob_differences: Tensor  # |sampler - trainer| of this round's tokens in the first step, float32 on the host


@dataclass
class _Sums:
    """What the micro-batches of all steps add up to."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    differences: list[Tensor] = field(default_factory=list)
    trained: int = 0


class PolicyUpdater:
    """Takes optimizer steps on a policy.

    Args:
        objective: of bandit_rft.ops; its KL coefficient may be replaced between rounds.
        reference: scored for the KL term; None without one.
        epochs, minibatches: passes over a round's rollouts, and equal parts a pass is cut into, one step each.
    """

    def __init__(
        self, policy: Policy, optimizer: PolicyOptimizer, objective: ops.PolicyObjective, *,
        reference: Policy | None = None, temperature: float = 1.0, tokens_per_microbatch: int = 16384,
        epochs: int = 1, minibatches: int = 1, seed: int = 0,
    ):  # fmt: skip
        self.policy, self.optimizer, self.objective, self.reference = policy, optimizer, objective, reference
        self.temperature, self.tokens_per_microbatch = temperature, tokens_per_microbatch
        self.epochs, self.minibatches, self.seed = epochs, minibatches, seed

    def __call__(self, batch: TrainingBatch, round_index: int) -> Update:
        """The steps of one round. Raises FloatingPointError, weights untouched, when loss or gradient is not finite."""
        sums = _Sums()
        for rows in self._minibatches(len(batch.rollouts), round_index):
            self._step(batch, rows, sums, round_index)
        lengths = np.asarray(batch.rollouts.lengths)
        means = {name: float(total) / max(sums.trained, 1) for name, total in sums.statistics.items()}
        differences = torch.cat(sums.differences).float().cpu() if sums.differences else torch.zeros(0)
        return Update(
            loss=float(np.mean(sums.losses)),
            grad_norm=float(np.mean(sums.norms)),
            steps=len(sums.losses),
            kl=means.get("kl_k3") if self.reference is not None else None,
            tokens_trained=sums.trained,
            tokens_skipped=int(lengths.sum()) * self.epochs - sums.trained,
            tokens_scored=sums.trained if self.reference is not None else 0,
            off_policy=self._off_policy(batch),
            statistics=means,
            logprob_differences=differences[~differences.isnan()],
        )

    def _off_policy(self, batch: TrainingBatch) -> bool:
        # In the only step of a round the sampler is this policy: the ratio is 1 by definition, not by rounding.
        return batch.off_policy or self.epochs * self.minibatches > 1 or self.objective.kind == "importance"

    def _minibatches(self, size: int, round_index: int) -> Iterator[NDArray[np.int64]]:
        """The rollouts of each step: all of them, or the parts of a shuffle that depends on seed and round alone."""
        rng = np.random.Generator(np.random.PCG64([self.seed, round_index, 0x0DD5]))
        for _ in range(self.epochs):
            order = np.arange(size) if self.minibatches == 1 else rng.permutation(size)
            yield from np.array_split(order, self.minibatches)

    def _step(self, batch: TrainingBatch, rows: NDArray[np.int64], sums: _Sums, round_index: int) -> None:
        objective, rollouts = self.objective, batch.rollouts
        lengths = np.asarray(rollouts.lengths)
        counted = rows[batch.counted[rows]]
        normalizer = lengths[counted].sum() if objective.aggregation == "token-mean" else len(counted)
        trained = counted if objective.every_token_counts else counted[batch.advantages[counted] != 0]
        # Lengths side by side keep attention's layout tight; which micro-batch a rollout is in changes no gradient.
        order = sorted(trained.tolist(), key=lambda i: -(len(rollouts.prompts[i]) + lengths[i]))
        first, losses = not sums.losses, []
        for micro in micro_batches(order, rollouts, self.tokens_per_microbatch):
            result, behavior = self._forward_backward(batch, micro, float(max(normalizer, 1)))
            losses.append(result.loss.detach())
            for name, value in result.stats.items():
                total = value * result.stats["tokens_computed"]
                sums.statistics[name] = sums.statistics[name] + total if name in sums.statistics else total
            if first:
                fresh = torch.tensor([i < batch.fresh for i in micro])
                mask = fresh.repeat_interleave(torch.tensor([rollouts.lengths[i] for i in micro]))
                sums.differences.append((result.logprobs - behavior).abs()[mask.to(behavior.device)])
        loss = float(torch.stack(losses).sum()) if losses else 0.0
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in round {round_index}: the update was not applied")
        sums.losses.append(loss)
        sums.norms.append(float(self.optimizer.step()))
        sums.trained += int(lengths[trained].sum())

    def _forward_backward(
        self, batch: TrainingBatch, micro: Sequence[int], normalizer: float
    ) -> tuple[ops.PolicyLoss, Tensor]:
        """Add the gradient of some rollouts to the buffers; the loss, and the behavior log-probabilities [N]."""
        policy, device = self.policy, self.policy.device
        pack = pack_for_training(micro, batch.rollouts, device)
        hidden = policy.hidden_states(pack.input_ids, pack.lengths).index_select(0, pack.predicting)
        reference_logprobs = None if self.reference is None else _score(self.reference, pack, self.temperature)
        advantages = torch.from_numpy(batch.advantages[list(micro)]).to(device)
        if batch.importance is not None:
            spans = [batch.rollouts.slice_of(i) for i in micro]
            per_token = torch.cat([batch.importance[span] for span in spans]).to(device)
            advantages = advantages.repeat_interleave(pack.completion_lengths, output_size=len(per_token)) * per_token
        result = ops.linear_policy_loss(
            hidden, policy.weight, pack.targets, advantages, pack.cu_seqlens, objective=self.objective,
            behavior_logprobs=pack.behavior_logprobs if self._off_policy(batch) else None,
            reference_logprobs=reference_logprobs, temperature=self.temperature, normalizer=normalizer,
            weight_grad=self.optimizer.grad_buffer(policy.weight) if policy.weight.requires_grad else None,
            **policy.head_options,
        )  # fmt: skip
        result.loss.backward()
        return result, pack.behavior_logprobs


def score_rollouts(
    policy: Policy, rollouts: Rollouts, rows: Sequence[int], *, temperature: float, tokens_per_microbatch: int
) -> list[Tensor]:
    """Log-probabilities under `policy` of the completions `rows`, a float32 tensor [length] each; no gradients."""
    order = sorted(rows, key=lambda i: -(len(rollouts.prompts[i]) + rollouts.lengths[i]))
    scored: dict[int, Tensor] = {}
    for micro in micro_batches(order, rollouts, tokens_per_microbatch):
        logprobs = _score(policy, pack_for_training(micro, rollouts, policy.device), temperature)
        scored.update(zip(micro, logprobs.split([rollouts.lengths[i] for i in micro]), strict=True))
    return [scored[i] for i in rows]


def importance_weights(log_ratios: Sequence[Tensor], correction: str, cap: float) -> tuple[list[Tensor], float]:
    """Truncated importance weights of completions from their tokens' log(policy / behavior), and the share truncated.

    "token": min(ratio, cap) for each token. "sequence": min(product of ratios, cap), the same for all tokens.
    """
    if correction == "sequence":
        log_ratios = [ratio.sum().expand_as(ratio) for ratio in log_ratios]
    weights = [ratio.double().exp().clamp(max=cap).float() for ratio in log_ratios]
    truncated = sum(int((w >= cap).sum()) for w in weights) / max(sum(len(w) for w in weights), 1)
    return weights, truncated


def effective_sample_size(weights: Tensor) -> float:
    """(sum w)^2 / (n sum w^2), between 1/n and 1: which share of so many equal weights these are worth."""
    return float(weights.sum() ** 2 / (len(weights) * (weights * weights).sum()))


# --- layout -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pack:
    """Some rollouts laid out for the update: T input tokens, N completion tokens, B sequences."""

    input_ids: Tensor  # int64 [T]; the last completion token predicts nothing and is left out
    lengths: list[int]  # of the B sequences in input_ids
    predicting: Tensor  # int64 [N], the rows of input_ids whose hidden state predicts a completion token
    targets: Tensor  # int64 [N]
    cu_seqlens: Tensor  # int32 [B + 1], in N
    behavior_logprobs: Tensor  # float32 [N]

    @property
    def completion_lengths(self) -> Tensor:
        """int64 [B]."""
        return torch.diff(self.cu_seqlens.long())


def pack_for_training(rows: Sequence[int], rollouts: Rollouts, device: torch.device) -> Pack:
    """Lay out rollouts `rows` one after another, without padding."""
    spans = [rollouts.slice_of(i) for i in rows]
    prompts = [rollouts.prompts[i] for i in rows]
    completions = [rollouts.lengths[i] for i in rows]
    lengths = [len(prompt) + n - 1 for prompt, n in zip(prompts, completions, strict=True)]
    host = torch.empty(sum(lengths), dtype=torch.int64)
    tokens = rollouts.tokens.cpu()
    predicting, start = [], 0
    for prompt, span, length in zip(prompts, spans, lengths, strict=True):
        host[start : start + len(prompt)] = torch.tensor(prompt)
        host[start + len(prompt) : start + length] = tokens[span][:-1]
        predicting.append(torch.arange(start + len(prompt) - 1, start + length))
        start += length
    cu_seqlens = torch.tensor([0, *np.cumsum(completions)], dtype=torch.int32)
    return Pack(
        host.to(device), lengths, torch.cat(predicting).to(device), torch.cat([rollouts.tokens[s] for s in spans]),
        cu_seqlens.to(device), torch.cat([rollouts.logprobs[s] for s in spans]),
    )  # fmt: skip


def micro_batches(rows: Sequence[int], rollouts: Rollouts, token_limit: int) -> list[list[int]]:
    """Split rows, in order, into runs of at most token_limit tokens (a longer rollout is alone)."""
    batches: list[list[int]] = []
    used = 0
    for row in rows:
        tokens = len(rollouts.prompts[row]) + rollouts.lengths[row]
        if not batches or used + tokens > token_limit:
            batches.append([])
            used = 0
        batches[-1].append(row)
        used += tokens
    return batches


@torch.no_grad()
def _score(policy: Policy, pack: Pack, temperature: float) -> Tensor:
    hidden = policy.hidden_states(pack.input_ids, pack.lengths).index_select(0, pack.predicting)
    options: dict[str, Any] = policy.head_options
    logprobs = ops.linear_logprobs(hidden, policy.weight, pack.targets, temperature=temperature, **options)
    assert isinstance(logprobs, Tensor)
    return logprobs
