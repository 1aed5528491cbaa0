"""What a policy-gradient update minimizes: the token loss, its KL and entropy terms, and how tokens are averaged.

`token_losses` is the definition, written so that autograd differentiates it; `token_coefficients` is its derivative
with respect to the log-probability in closed form, which is what the fused kernels need. Tests hold the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

import torch
from torch import Tensor

#: What float32 holds in full precision; a reciprocal of these is finite.
SMALLEST, LARGEST = float(torch.finfo(torch.float32).tiny), float(torch.finfo(torch.float32).max)

Kind = Literal["reinforce", "importance", "importance_mask", "ppo", "cispo", "gspo"]
Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KLEstimator = Literal["none", "k1", "k2", "k3"]


@dataclass(frozen=True)
class PolicyObjective:
    """A policy-gradient objective, checked when it is made.

    The loss of a token by `kind`, with r = exp(logp - behavior) and A the advantage:

        reinforce        -A logp                                             (Williams 1992)
        importance       -A min(r, importance_cap) logp, ratio held constant (truncated importance sampling)
        importance_mask  -A r logp, ratio held constant, where importance_floor <= r <= importance_cap; elsewhere 0
                         (DIS of arXiv 2607.07508; IcePop)
        ppo              -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); for A < 0 at most -dual_clip A
                         (arXiv 1707.06347; dual clip: arXiv 1912.09729)
        cispo            -clip(r, 1 - clip_low, 1 + clip_high) A logp, clipped ratio held constant (arXiv 2506.13585)
        gspo             the ppo form with r = exp(mean over the sequence of (logp - behavior))    (arXiv 2507.18071)

    The loss by `aggregation` (verl's names; D is `normalizer` where one is given):

        token-mean               sum over all tokens / D,                          D = tokens
        seq-mean-token-sum       sum over all tokens / D,                          D = sequences (the bandit gradient)
        seq-mean-token-mean      sum over sequences of their token mean / D,       D = sequences
        seq-mean-token-sum-norm  sum over all tokens / (norm_length D),            D = sequences  (arXiv 2503.20783)

    Attributes:
        kind: the token loss, from the table above.
        aggregation: how token losses become one loss, from the table above.
        clip_low: the ratio's lower bound is 1 - clip_low; in [0, 1].
        clip_high: the ratio's upper bound is 1 + clip_high; >= 0.
        dual_clip: ppo and gspo: for A < 0 the token loss is at most -dual_clip A; > 1, or None.
        importance_floor: importance_mask: tokens of a smaller ratio are dropped; in [0, 1].
        importance_cap: importance: the largest ratio. importance_mask: tokens of a larger one are dropped; >= 1 there.
        kl: an estimator of KL(policy || reference) added to the token loss, times kl_coef. With d = logp - reference:
            k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1. Its gradient is the derivative of that expression.
        kl_coef: factor of the KL; >= 0.
        entropy_coef: this times the token's entropy (nats) is subtracted from its loss, with the true gradient.
        norm_length: the constant length of seq-mean-token-sum-norm, tokens.

    Raises:
        ValueError: an unknown name, a value out of range, or a coefficient that would have no effect.
    """

    kind: Kind = "reinforce"
    aggregation: Aggregation = "token-mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    importance_floor: float = 0.5
    importance_cap: float = 2.0
    kl: KLEstimator = "none"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    norm_length: int | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("kind", self.kind, get_args(Kind)),
            ("aggregation", self.aggregation, get_args(Aggregation)),
            ("kl", self.kl, get_args(KLEstimator)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        for name in ("clip_low", "clip_high", "importance_floor", "importance_cap", "kl_coef", "entropy_coef"):
            value = getattr(self, name)
            if not _is_number(value):
                raise ValueError(f"{name} must be a finite number; got {value!r}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(
                f"clip_low must lie in [0, 1] (the ratio's lower bound is 1 - clip_low); got {self.clip_low}"
            )
        if self.clip_high < 0:
            raise ValueError(f"clip_high must be >= 0 (the ratio's upper bound is 1 + clip_high); got {self.clip_high}")
        if self.importance_cap <= 0:
            raise ValueError(f"importance_cap must be > 0; got {self.importance_cap}")
        if not 0 <= self.importance_floor <= 1:
            raise ValueError(f"importance_floor must lie in [0, 1]; got {self.importance_floor}")
        if self.kind == "importance_mask" and self.importance_cap < 1:
            raise ValueError(
                "importance_cap must be >= 1 for kind 'importance_mask' (a token of an unchanged policy, ratio 1, is "
                f"kept); got {self.importance_cap}"
            )
        if self.dual_clip is not None:
            if self.kind not in ("ppo", "gspo"):
                raise ValueError(f"dual_clip applies to kind 'ppo' or 'gspo'; got kind={self.kind!r}")
            if not _is_number(self.dual_clip) or self.dual_clip <= 1:
                raise ValueError(f"dual_clip must be > 1; got {self.dual_clip}")
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef must be >= 0; got {self.kl_coef}")
        if self.kl == "none" and self.kl_coef != 0:
            raise ValueError(f"kl_coef={self.kl_coef} has no effect with kl='none'; choose kl='k1', 'k2' or 'k3'")
        if self.aggregation == "seq-mean-token-sum-norm":
            if not _is_number(self.norm_length) or self.norm_length < SMALLEST:
                raise ValueError(
                    f"norm_length must be a positive length for {self.aggregation}; got {self.norm_length}"
                )
        elif self.norm_length is not None:
            raise ValueError(f"norm_length has no effect with aggregation={self.aggregation!r}; leave it None")

    @property
    def every_token_counts(self) -> bool:
        """Whether a token with advantage 0 still has a gradient (through the KL or the entropy term)."""
        return self.kl_coef != 0 or self.entropy_coef != 0

    @property
    def weighs_sampler(self) -> bool:
        """Whether the ratio to the sampler counts even where the sampler was this policy, to rounding."""
        return self.kind in ("importance", "importance_mask")

    @property
    def token_separable(self) -> bool:
        """Whether a token's coefficient depends on that token alone, so that one pass is enough."""
        return self.kind != "gspo"


def _is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number that float32 holds, and finite; a bool is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def token_weights(
    objective: PolicyObjective, lengths: Tensor, sequence_of: Tensor, normalizer: float | Tensor | None
) -> Tensor:
    """The factor of each token's loss in the total, [N]. lengths [B] and sequence_of [N] are int64."""
    tokens, sequences = sequence_of.shape[0], lengths.shape[0]
    weights = torch.ones(tokens, dtype=torch.float32, device=lengths.device)
    if objective.aggregation == "seq-mean-token-mean":
        weights = weights / lengths[sequence_of]
    elif objective.norm_length is not None:
        weights = weights / objective.norm_length
    if normalizer is None:
        normalizer = max(1, tokens if objective.aggregation == "token-mean" else sequences)
    return weights / normalizer


def log_ratios(
    objective: PolicyObjective, logprobs: Tensor, behavior: Tensor | None, sequence_of: Tensor, lengths: Tensor
) -> Tensor:
    """log r of each token, [N]. Without behavior log-probabilities the update is on-policy: 0, with a gradient."""
    difference = logprobs - (logprobs.detach() if behavior is None else behavior)
    return sequence_mean(difference, sequence_of, lengths) if objective.kind == "gspo" else difference


def sequence_mean(values: Tensor, sequence_of: Tensor, lengths: Tensor) -> Tensor:
    """Each token gets the mean of `values` over its sequence, [N]."""
    sums = torch.zeros(lengths.shape[0], dtype=values.dtype, device=values.device)
    return (sums.index_add(0, sequence_of, values) / lengths.clamp(min=1))[sequence_of]


def token_losses(
    objective: PolicyObjective,
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    behavior: Tensor | None,
    reference: Tensor | None,
    sequence_of: Tensor,
    lengths: Tensor,
) -> Tensor:
    """The loss of each token before aggregation, [N], differentiable in logprobs and entropy (all [N])."""
    o = objective
    if o.kind == "reinforce":
        policy_term = -advantages * logprobs
    else:
        ratio = log_ratios(o, logprobs, behavior, sequence_of, lengths).exp()
        if o.kind == "importance":
            policy_term = -advantages * ratio.detach().clamp(max=o.importance_cap) * logprobs
        elif o.kind == "importance_mask":
            policy_term = -advantages * _masked(o, ratio.detach()) * logprobs
        elif o.kind == "cispo":
            policy_term = -advantages * ratio.detach().clamp(1 - o.clip_low, 1 + o.clip_high) * logprobs
        else:
            surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * advantages)
            if o.dual_clip is not None:
                bounded = torch.maximum(surrogate, o.dual_clip * advantages)
                surrogate = torch.where(advantages < 0, bounded, surrogate)
            policy_term = -surrogate
    # An advantage of exactly zero says nothing about the token, whatever its ratio (0 * inf must not become NaN).
    loss = torch.where(advantages == 0, torch.zeros_like(policy_term), policy_term)
    if o.kl_coef:
        assert reference is not None
        loss = loss + o.kl_coef * kl_estimate(o.kl, logprobs, reference)
    if o.entropy_coef:
        loss = loss - o.entropy_coef * entropy
    return loss


def _masked(objective: PolicyObjective, ratio: Tensor) -> Tensor:
    """The ratio where it lies in the band, 0 where it does not; a NaN stays one."""
    outside = (ratio < objective.importance_floor) | (ratio > objective.importance_cap)
    return torch.where(outside, torch.zeros_like(ratio), ratio)


def kl_estimate(kind: KLEstimator, logprobs: Tensor, reference: Tensor) -> Tensor:
    """The k1, k2 or k3 estimate of KL(policy || reference) at each token, [N] (Schulman, joschu.net/blog/kl-approx)."""
    d = logprobs - reference
    if kind == "k1":
        return d
    return d * d / 2 if kind == "k2" else torch.expm1(-d) + d


def clip_masks(objective: PolicyObjective, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the ratio's clip acts on the token: (at the lower bound, at the upper bound, at the dual bound), bool [N].

    ppo and gspo clip on the side where the surrogate would overshoot (and lose the gradient there); cispo and
    importance bound the weight on either side whatever the advantage's sign (and keep the gradient); importance_mask
    drops the token on either side.
    """
    o, none = objective, torch.zeros_like(ratio, dtype=torch.bool)
    counts = advantages != 0
    if o.kind == "reinforce":
        return none, none, none
    if o.kind == "importance":
        return none, counts & (ratio > o.importance_cap), none
    if o.kind == "importance_mask":
        return counts & (ratio < o.importance_floor), counts & (ratio > o.importance_cap), none
    low, high = ratio < 1 - o.clip_low, ratio > 1 + o.clip_high
    if o.kind == "cispo":
        return counts & low, counts & high, none
    dual = none if o.dual_clip is None else (advantages < 0) & (ratio > o.dual_clip)
    return (advantages < 0) & low, (advantages > 0) & high, dual


def token_coefficients(
    objective: PolicyObjective,
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    behavior: Tensor | None,
    reference: Tensor | None,
    sequence_of: Tensor,
    lengths: Tensor,
) -> Tensor:
    """d(sum of weights * token_losses) / d(logprob) of each token, [N]; the entropy term is not in it.

    (The derivative with respect to a token's entropy is simply -entropy_coef * weight.)
    """
    o = objective
    ratio = log_ratios(o, logprobs, behavior, sequence_of, lengths).exp()
    if o.kind == "reinforce":
        coefficient = -advantages * weights
    elif o.kind == "importance":
        coefficient = -advantages * weights * ratio.clamp(max=o.importance_cap)
    elif o.kind == "importance_mask":
        coefficient = -advantages * weights * _masked(o, ratio)
    elif o.kind == "cispo":
        coefficient = -advantages * weights * ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
    else:
        low, high, dual = clip_masks(o, ratio, advantages)
        coefficient = torch.where(low | high | dual, torch.zeros_like(ratio), -advantages * weights * ratio)
    coefficient = torch.where(advantages == 0, torch.zeros_like(coefficient), coefficient)
    if o.kind == "gspo":  # every token of a sequence moves the one ratio that all its tokens share
        coefficient = sequence_mean(coefficient, sequence_of, lengths)
    if o.kl_coef:
        assert reference is not None
        d = logprobs - reference
        slope = torch.ones_like(d) if o.kl == "k1" else (d if o.kl == "k2" else -torch.expm1(-d))
        coefficient = coefficient + o.kl_coef * weights * slope
    return coefficient


#: Order of the statistics vector that the operations return; every entry is a mean over the tokens computed,
#: but for the last four (a sum of squares ratio, and counts).
STATISTICS = (
    "ratio_mean",
    "clip_fraction_low",
    "clip_fraction_high",
    "clip_fraction_dual",
    "kl_k1",
    "kl_k3",
    "entropy",
    "effective_sample_size",
    "tokens_computed",
    "tokens_skipped",
    "nonfinite_rows",
)


def loss_and_statistics(
    objective: PolicyObjective,
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    weights: Tensor,
    behavior: Tensor | None,
    reference: Tensor | None,
    sequence_of: Tensor,
    lengths: Tensor,
    tokens_skipped: int | Tensor,
    ignored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss 0-d, statistics [len(STATISTICS)]) from per-token values of the tokens computed; no host waits.

    Tokens that are `ignored`, bool [N], have weight, advantage and all their log-probabilities 0 and are in no mean.
    """
    losses = token_losses(objective, logprobs, entropy, advantages, behavior, reference, sequence_of, lengths)
    loss = (losses * weights).sum()
    ratio = log_ratios(objective, logprobs, behavior, sequence_of, lengths).exp()
    tokens = logprobs.shape[0]
    computed: int | Tensor = tokens
    if ignored is not None:
        ratio, computed = ratio.masked_fill(ignored, 0), tokens - ignored.sum()
    low, high, dual = clip_masks(objective, ratio, advantages)
    zero = torch.zeros((), dtype=logprobs.dtype, device=logprobs.device)
    if reference is None:
        k1 = k3 = zero
    else:
        k1, k3 = (kl_estimate(kind, logprobs, reference).sum() for kind in ("k1", "k3"))
    sums = torch.stack([ratio.sum(), low.sum(), high.sum(), dual.sum(), k1, k3, entropy.sum()]).to(logprobs.dtype)
    finite = torch.isfinite(logprobs)
    # (sum r)^2 / sum r^2: how many equally weighted tokens these importance weights are worth.
    squares = (ratio * ratio).sum()
    effective = ratio.sum() ** 2 / (squares if ignored is None else squares.clamp(min=SMALLEST)) if tokens else zero
    counts = torch.stack([zero + computed, zero + tokens_skipped, (~finite).sum().to(logprobs.dtype)])
    return loss, torch.cat([sums / (zero + computed).clamp(min=1), effective.reshape(1), counts])
