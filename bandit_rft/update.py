"""The update: from rollouts and their advantages to steps of the optimizer.

A rollout of advantage zero has no gradient unless the KL or entropy term makes it count: it is dropped before the
forward pass, but stays in the normalizer. So the step is the same, only cheaper. Nothing is padded, and no gradient
depends on how rollouts are split into micro-batches.

A batch lies in host memory: which rollouts count, and how many tokens they have, is known here without asking a device.
A micro-batch is a `select` and one copy to the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bandit_rft import ops
from bandit_rft.distributed import Ranks
from bandit_rft.gates import check_logprob_gap, logprob_gaps
from bandit_rft.model import Policy
from bandit_rft.ops.objective import STATISTICS
from bandit_rft.optimizer import PolicyOptimizer
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.transfer import to_device, to_host


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
    logprob_gap: float | None  # the largest mean of these over a rollout; None where none was trained on
    ratio_by_length: dict[str, float]  # off policy: mean and largest ratio, unclipped, of tokens of rollouts by length


@dataclass
class _Sums:
    """What the micro-batches of all steps add up to."""

    losses: list[Tensor] = field(default_factory=list)  # 0-d, one a step
    norms: list[Tensor] = field(default_factory=list)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    differences: list[Tensor] = field(default_factory=list)
    ratios: Tensor | None = None  # [3, lengths]: of tokens by their rollout's length, count, sum and largest ratio
    trained: int = 0
    gap: Tensor | None = None  # 0-d


class PolicyUpdater:
    """Takes optimizer steps on a policy.

    Args:
        policy: what is trained.
        optimizer: over its parameters.
        objective: of bandit_rft.ops; its KL coefficient may be replaced between rounds.
        reference: scored for the KL term; None without one.
        temperature: at which the rollouts were sampled, and log-probabilities are taken.
        tokens_per_microbatch: most tokens of one forward pass, prompts included; a longer rollout is alone.
        epochs: passes over a round's rollouts.
        minibatches: equal parts that a pass is cut into, one step each.
        seed: of the shuffle that cuts them.
        max_logprob_gap: nats a token, mean over a rollout, by which the sampler may differ from this policy in a
            round's first step; 0: any.
        ranks: the processes that share the work, every one of which has the whole batch; None: this one is alone.
    """

    def __init__(
        self, policy: Policy, optimizer: PolicyOptimizer, objective: ops.PolicyObjective, *,
        reference: Policy | None = None, temperature: float = 1.0, tokens_per_microbatch: int = 16384,
        epochs: int = 1, minibatches: int = 1, seed: int = 0, max_logprob_gap: float = 0.0,
        ranks: Ranks | None = None,
    ):  # fmt: skip
        self.policy, self.optimizer, self.objective, self.reference = policy, optimizer, objective, reference
        self.temperature, self.tokens_per_microbatch = temperature, tokens_per_microbatch
        self.epochs, self.minibatches, self.seed = epochs, minibatches, seed
        self.max_logprob_gap, self.ranks = max_logprob_gap, ranks or Ranks()

    def __call__(self, batch: RolloutBatch, round_index: int, *, off_policy: bool = False) -> Update:
        """The steps of one round.

        Args:
            batch: with advantages, and with the logprobs that an objective's ratio is taken against.
            round_index: the current round. Its rollouts were drawn by the policy as it is before the first step.
            off_policy: the batch holds rollouts of other policies, so that the ratio is not 1 even in the first step.

        Raises:
            FloatingPointError: when a loss or a gradient is not finite. The step that failed is not applied; the steps
                before it, in a round of several, are.
            GateError: when the sampler was another policy, before the first step is applied.
        """
        sums, ranks = _Sums(), self.ranks
        ranks.check_same("rollouts of a round", (column.numpy().tobytes() for column in batch.columns().values()))
        # In the only step of a round the sampler is this policy: the ratio is 1 by definition, not by rounding.
        off_policy = off_policy or self.epochs * self.minibatches > 1 or self.objective.weighs_sampler
        for rows in self._minibatches(batch, round_index):
            try:
                self._step(batch, rows, sums, round_index, off_policy)
            except BaseException:
                self.optimizer.clear()  # or they would be part of the next step, if there is one
                raise
        zero = sums.losses[0].new_zeros(())
        totals = ranks.sum(torch.stack([sums.statistics.get(name, zero) for name in STATISTICS]))
        ratios = torch.zeros(3, len(LENGTHS), device=zero.device) if sums.ratios is None else sums.ratios
        if off_policy:
            ratios = torch.cat([ranks.sum(ratios[:2]), ranks.max(ratios[2:])])
        # The one wait of an update on a GPU: what its steps came to.
        refused, losses, norms, differences, gap, ratios, totals = to_host(
            self.optimizer.refused(), torch.stack(sums.losses), torch.stack(sums.norms),
            torch.cat(sums.differences or [zero.new_zeros(0)]), zero if sums.gap is None else sums.gap, ratios, totals,
        )  # fmt: skip
        if refused:
            self._raise_first(sums, round_index)
        means = {n: float(total) / sums.trained for n, total in zip(STATISTICS, totals, strict=True) if sums.trained}
        differences = ranks.join(differences.float())
        return Update(
            loss=float(np.mean(losses.tolist())),
            grad_norm=float(np.mean(norms.tolist())),
            steps=len(losses),
            kl=means.get("kl_k3") if self.reference is not None else None,
            tokens_trained=sums.trained,
            tokens_skipped=len(batch.tokens) * self.epochs - sums.trained,
            tokens_scored=sums.trained if self.reference is not None else 0,
            off_policy=off_policy,
            statistics=means,
            logprob_differences=differences[~differences.isnan()],
            logprob_gap=None if sums.gap is None else float(gap),
            ratio_by_length=_by_length(ratios.tolist()),
        )

    def _minibatches(self, batch: RolloutBatch, round_index: int) -> Iterator[NDArray[np.int64]]:
        """The rollouts of each step: all that are trained on, or parts of a shuffle that follows seed and round alone.

        With fewer rollouts than parts there are fewer steps: one without a rollout would be a step on momentum.
        """
        rng = np.random.Generator(np.random.PCG64([self.seed, round_index, 0x0DD5]))
        trained = np.flatnonzero(batch.trained.numpy())
        for _ in range(self.epochs):
            order = trained if self.minibatches == 1 else rng.permutation(trained)
            yield from np.array_split(order, min(self.minibatches, max(len(trained), 1)))

    def _step(
        self, batch: RolloutBatch, rows: NDArray[np.int64], sums: _Sums, round_index: int, off_policy: bool
    ) -> None:
        objective, lengths = self.objective, batch.lengths.numpy()
        normalizer = lengths[rows].sum() if objective.aggregation == "token-mean" else len(rows)
        advantages = batch.advantage.numpy()
        computed = rows if objective.every_token_counts else rows[advantages[rows] != 0]
        shares = shares_of(batch, computed, self.ranks)
        micros, most = shared_micro_batches(batch, shares, self.tokens_per_microbatch, self.ranks.rank)
        with self.ranks.working(self.policy, self.reference):
            losses = [
                self._forward_backward(micro, sums, round_index, float(max(normalizer, 1)), off_policy)
                for micro in micros
            ]
            for _ in range(most - len(micros) if self.ranks.lockstep else 0):
                if self.reference is not None:
                    self.ranks.take_part(self.reference, backward=False)
                self.ranks.take_part(self.policy, backward=True)
        dtype = torch.promote_types(self.policy.weight.dtype, torch.float32)
        own_loss = torch.stack(losses).sum() if losses else torch.zeros((), dtype=dtype, device=self.policy.device)
        loss = self.ranks.sum(own_loss)
        gap = None
        if not sums.losses and bool((batch.round[torch.from_numpy(computed)] == round_index).any()):
            own = _largest_gap(micros, sums.differences, round_index)
            sums.gap = gap = self.ranks.max(torch.full_like(loss, -torch.inf) if own is None else own.to(loss.dtype))
        if self.optimizer.asynchronous:
            self.optimizer.refuse(~torch.isfinite(loss))
            if self.max_logprob_gap and gap is not None:
                self.optimizer.refuse(~(gap <= self.max_logprob_gap))
        else:
            self._check(loss, gap, round_index)
        sums.losses.append(loss)
        sums.norms.append(self.optimizer.step())
        sums.trained += int(lengths[computed].sum())

    def _check(self, loss: Tensor, gap: Tensor | None, round_index: int) -> None:
        """Raise where a step must not be applied."""
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {float(loss)} in round {round_index}: the update was not applied")
        if self.max_logprob_gap and gap is not None:
            check_logprob_gap(float(gap), self.max_logprob_gap, f"round {round_index}")

    def _raise_first(self, sums: _Sums, round_index: int) -> None:
        """Raise for the first step that the device refused; it has refused those after it, too."""
        for i, (loss, norm) in enumerate(zip(sums.losses, sums.norms, strict=True)):
            self._check(loss, sums.gap if i == 0 else None, round_index)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"the gradient norm is {float(norm)}: the update was not applied")

    def _forward_backward(
        self, micro: RolloutBatch, sums: _Sums, round_index: int, normalizer: float, off_policy: bool
    ) -> Tensor:
        """Add the gradient of some rollouts to the buffers, and what was seen to `sums`; their loss (0-d).

        Nothing here waits for the device: the micro-batches of a step are queued one behind the other.
        """
        policy, inputs = self.policy, training_inputs(micro, self.policy.device)
        micro, reference = micro.to(policy.device), None
        if self.reference is not None:
            reference = _score(self.reference, micro, inputs, self.temperature)
        hidden = policy.hidden_states(inputs.input_ids, inputs.lengths, inputs.predicting)
        advantages = micro.advantage
        if micro.importance is not None:
            advantages = micro.per_token(advantages) * micro.importance
        result = ops.linear_policy_loss(
            hidden, policy.weight, micro.tokens, advantages, micro.cu_seqlens, objective=self.objective,
            behavior_logprobs=micro.logprobs if off_policy else None,
            reference_logprobs=reference, temperature=self.temperature, normalizer=normalizer,
            weight_grad=self.optimizer.grad_buffer(policy.weight) if policy.weight.requires_grad else None,
            skip_zero_rows=False,  # `trained` left them out already, without asking the device
            **policy.head_options,
        )  # fmt: skip
        result.loss.backward()
        for name, value in result.stats.items():
            total = value * result.stats["tokens_computed"]
            sums.statistics[name] = sums.statistics[name] + total if name in sums.statistics else total
        if off_policy:
            seen = _ratios_by_length(micro, result.logprobs)
            sums.ratios = (
                seen
                if sums.ratios is None
                else torch.cat([sums.ratios[:2] + seen[:2], torch.maximum(sums.ratios[2:], seen[2:])])
            )
        if not sums.losses:  # the first step: this round's rollouts were drawn by this very policy
            fresh = micro.per_token(micro.round == round_index)
            sums.differences.append(torch.where(fresh, (result.logprobs - micro.logprobs).abs(), torch.nan))
        return result.loss.detach()


def _largest_gap(micros: list[RolloutBatch], differences: list[Tensor], round_index: int) -> Tensor | None:
    """The largest `logprob_gaps` of this round's rollouts (0-d), where they lie; None without such rollouts."""
    gaps: list[Tensor] = []
    for micro, difference in zip(micros, differences, strict=True):
        fresh = (micro.round == round_index).nonzero()[:, 0]
        if len(fresh):
            gap = logprob_gaps(micro, difference)
            gaps.append(gap.index_select(0, to_device(fresh, gap.device)))
    return torch.cat(gaps).max() if gaps else None


#: Completions are told apart by these lengths (tokens) where ratios are logged: drift adds up over a long one.
LENGTHS = (0, 16, 64, 256, 1024, 4096, 16384)


def _ratios_by_length(batch: RolloutBatch, logprobs: Tensor) -> Tensor:
    """Count, sum and largest of exp(logprobs - behavior), before any clip, by LENGTHS: float32 [3, lengths]."""
    ratio = (logprobs - batch.logprobs).exp().float()
    place = batch.per_token(torch.stack([batch.lengths >= least for least in LENGTHS]).sum(0) - 1)
    count, total, most = torch.zeros(3, len(LENGTHS), device=ratio.device).unbind()
    count = count.index_add(0, place, torch.ones_like(ratio))
    return torch.stack([count, total.index_add(0, place, ratio), most.scatter_reduce(0, place, ratio, "amax")])


def _by_length(ratios: list[list[float]]) -> dict[str, float]:
    """The metrics of what `_ratios_by_length` gave, of the lengths that occurred."""
    found: dict[str, float] = {}
    for least, count, total, most in zip(LENGTHS, *ratios, strict=True):
        if count:
            found |= {f"ratio/length_{least}/mean": total / count, f"ratio/length_{least}/max": most}
    return found


def score_rollouts(
    policy: Policy, batch: RolloutBatch, *, temperature: float = 1.0, tokens_per_microbatch: int = 16384,
    ranks: Ranks | None = None,
) -> Tensor:  # fmt: skip
    """Log-probabilities of a batch's completion tokens under a policy; no gradients.

    Args:
        policy: that scores.
        batch: rollouts in host memory.
        temperature: at which they were sampled.
        tokens_per_microbatch: most tokens of one forward pass, prompts included; a longer rollout is alone.
        ranks: the processes that share the work and get all of its result; None: this one is alone.

    Returns:
        float32 [N] in host memory.
    """
    ranks = ranks or Ranks()
    if not len(batch):
        return torch.zeros(0)
    shares = shares_of(batch, np.arange(len(batch)), ranks)
    micros, most = shared_micro_batches(batch, shares, tokens_per_microbatch, ranks.rank)
    with ranks.working(policy):
        scored = [
            _score(policy, micro.to(policy.device), training_inputs(micro, policy.device), temperature)
            for micro in micros
        ]
        for _ in range(most - len(micros) if ranks.lockstep else 0):
            ranks.take_part(policy, backward=False)
    order = np.concatenate(shares)  # as the ranks give them, one behind the other
    logprobs = ranks.join(torch.cat(scored).float().cpu() if scored else torch.zeros(0))
    return replace(batch.select(order), logprobs=logprobs).select(np.argsort(order)).logprobs


# --- layout -----------------------------------------------------------------------------------------------------------


class TrainingInputs(NamedTuple):
    """What the model reads of B rollouts: T tokens, of which N predict a completion token."""

    input_ids: Tensor  # int64 [T]; a completion's last token predicts nothing and is left out
    lengths: list[int]  # of the B sequences in input_ids
    predicting: Tensor  # int64 [N], the rows of input_ids whose hidden state predicts a completion token


def training_inputs(batch: RolloutBatch, device: torch.device) -> TrainingInputs:
    """Lay out prompts and completions (in host memory) one after another for a forward pass on a device.

    Raises:
        ValueError: for an empty prompt or completion: the state before its first token would be another rollout's.
    """
    for name, lengths in (("prompt", batch.prompt_lengths), ("completion", batch.lengths)):
        if bool((lengths < 1).any()):
            raise ValueError(f"a rollout has an empty {name}: each needs a token or more")
    prompts = batch.prompt_tokens.split(batch.prompt_lengths.tolist())
    pairs = zip(prompts, batch.split(batch.tokens), strict=True)
    input_ids = torch.cat([part for prompt, completion in pairs for part in (prompt, completion[:-1])])
    sizes = batch.prompt_lengths + batch.lengths - 1
    first = sizes.cumsum(0) - sizes + batch.prompt_lengths - 1  # the row that predicts a completion's first token
    predicting = torch.arange(len(batch.tokens)) + batch.per_token(first - batch.cu_seqlens[:-1])
    return TrainingInputs(to_device(input_ids, device), sizes.tolist(), to_device(predicting, device))


def longest_first(batch: RolloutBatch, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows by falling length: lengths side by side keep attention's layout tight. It changes no gradient."""
    return rows[np.argsort(-_sizes(batch)[rows], kind="stable")]


def micro_batches(batch: RolloutBatch, token_limit: int) -> list[RolloutBatch]:
    """Split a batch, in order, into runs of at most token_limit tokens, prompts included (a longer one is alone)."""
    runs = _runs(_sizes(batch), token_limit)
    return [batch.select(rows) for rows in runs] if len(runs) > 1 else [batch] * len(runs)


def shares_of(batch: RolloutBatch, rows: NDArray[np.int64], ranks: Ranks) -> list[NDArray[np.int64]]:
    """Which of some rows of a batch each rank computes, longest first."""
    return [longest_first(batch, rows[share]) for share in ranks.shares(_sizes(batch)[rows])]


def shared_micro_batches(
    batch: RolloutBatch, shares: list[NDArray[np.int64]], token_limit: int, rank: int
) -> tuple[list[RolloutBatch], int]:
    """A rank's micro-batches, of what `shares_of` gave, and the most that any rank has of them."""
    most = max(len(_runs(_sizes(batch)[share], token_limit)) for share in shares)
    return micro_batches(batch.select(shares[rank]), token_limit), most


def _sizes(batch: RolloutBatch) -> NDArray[np.int64]:
    """Tokens of each rollout, the prompt's included."""
    return (batch.prompt_lengths + batch.lengths).numpy()


def _runs(sizes: NDArray[np.int64], limit: int) -> list[list[int]]:
    """Places in `sizes`, in order, in runs of at most `limit` tokens (a longer one is alone)."""
    runs: list[list[int]] = []
    used = 0
    for place, size in enumerate(sizes.tolist()):
        if not runs or used + size > limit:
            runs.append([])
            used = 0
        runs[-1].append(place)
        used += size
    return runs


@torch.no_grad()
def _score(policy: Policy, batch: RolloutBatch, inputs: TrainingInputs, temperature: float) -> Tensor:
    hidden = policy.hidden_states(inputs.input_ids, inputs.lengths, inputs.predicting)
    options: dict[str, Any] = policy.head_options
    logprobs: Tensor = ops.linear_logprobs(hidden, policy.weight, batch.tokens, temperature=temperature, **options)
    return logprobs
