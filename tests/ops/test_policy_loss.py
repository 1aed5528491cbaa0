"""linear_policy_loss and policy_loss_from_logits: every objective against float64 autograd through the definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from ops_cases import BACKENDS, CASES, OBJECTIVES, Case, assert_close_to_truth, plain_in

from bandit_rft import PolicyObjective, linear_policy_loss, policy_loss_from_logits
from bandit_rft.ops import objective as objective_module
from bandit_rft.ops import reference, use_backend


def truth_of(case: Case, objective: PolicyObjective, *, behavior: bool = True, advantages=None, normalizer=None):
    leaves = case.leaves(torch.float64)
    bias = leaves[2] if case.bias is not None else None
    logp, entropy = reference.linear_logprobs(leaves[0], leaves[1], case.targets, bias=bias, **case.doubled_scaling())
    return reference_loss(case, objective, logp, entropy, leaves, behavior, advantages, normalizer)


def reference_loss(case, objective, logp, entropy, leaves, behavior, advantages=None, normalizer=None):
    advantages = case.advantages if advantages is None else advantages
    loss, stats = reference.policy_loss(
        logp, entropy, advantages.to(logp.dtype), case.cu_seqlens, objective=objective,
        behavior_logprobs=case.behavior.to(logp.dtype) if behavior else None,
        reference_logprobs=case.reference.to(logp.dtype), normalizer=normalizer,
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss, stats, [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True)]


def computed(case: Case, objective: PolicyObjective, *, behavior: bool = True, advantages=None, **extra):
    leaves = case.leaves()
    result = linear_policy_loss(
        leaves[0], leaves[1], case.targets, case.advantages if advantages is None else advantages, case.cu_seqlens,
        objective=objective, behavior_logprobs=case.behavior if behavior else None,
        reference_logprobs=case.reference, bias=leaves[2] if case.bias is not None else None, **case.scaling, **extra,
    )  # fmt: skip
    result.loss.backward()
    return result, [t.grad for t in leaves]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("behavior", [True, False], ids=["off-policy", "on-policy"])
def test_every_objective(objective: PolicyObjective, backend: str, behavior: bool) -> None:
    case = Case.make(**CASES["everything"])
    with use_backend(backend):
        result, gradients = computed(case, objective, behavior=behavior)
    loss, stats, truth = truth_of(case, objective, behavior=behavior)
    p_logp, p_entropy, *p_leaves = plain_in(case, torch.float32)
    p_loss, _, plain = reference_loss(case, objective, p_logp, p_entropy, p_leaves, behavior)
    assert_close_to_truth("loss", result.loss.detach(), p_loss.detach(), loss.detach())
    for label, g, p, t in zip(["dhidden", "dweight", "dbias"], gradients, plain, truth, strict=True):
        assert_close_to_truth(label, g, p, t)
    for name, value, expected in zip(objective_module.STATISTICS, result.stats.values(), stats, strict=True):
        assert float(value) == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("objective", ["reinforce", "gspo-entropy", "ppo-kl3-entropy"])
def test_every_head(name: str, objective: str, backend: str, dtype: torch.dtype) -> None:
    case = Case.make(**CASES[name], dtype=dtype)
    o = OBJECTIVES[objective]
    with use_backend(backend):
        result, gradients = computed(case, o)
    loss, _, truth = truth_of(case, o)
    p_logp, p_entropy, *p_leaves = plain_in(case, dtype)
    p_loss, _, plain = reference_loss(case, o, p_logp.float(), p_entropy.float(), p_leaves, True)
    assert result.loss.dtype == torch.float32
    assert_close_to_truth("loss", result.loss.detach(), p_loss.detach(), loss.detach())
    floor = 4e-6 if dtype == torch.float32 else 4e-3
    for label, g, p, t in zip(["dhidden", "dweight", "dbias"], gradients, plain, truth, strict=False):
        assert_close_to_truth(label, g, p, t, floor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_from_logits_is_the_same(objective: PolicyObjective, backend: str) -> None:
    case = Case.make(**CASES["softcap"])
    logits = (case.hidden @ case.weight.T).requires_grad_()
    with use_backend(backend):
        result = policy_loss_from_logits(
            logits, case.targets, case.advantages, case.cu_seqlens, objective=objective,
            behavior_logprobs=case.behavior, reference_logprobs=case.reference, **case.scaling,
        )  # fmt: skip
        result.loss.backward()
        fused, (d_hidden, _) = computed(case, objective)
    torch.testing.assert_close(result.loss, fused.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad @ case.weight, d_hidden, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_coefficients_are_the_derivative(objective: PolicyObjective) -> None:
    n, lengths = 40, torch.tensor([10, 1, 0, 29])
    sequence_of = torch.repeat_interleave(lengths)
    g = torch.Generator().manual_seed(3)
    logp = (-3 * torch.rand(n, generator=g, dtype=torch.float64)).requires_grad_()
    entropy = torch.zeros(n, dtype=torch.float64)
    behavior, ref = (logp.detach() + 0.4 * torch.randn(n, generator=g, dtype=torch.float64) for _ in range(2))
    advantages = torch.randn(n, generator=g, dtype=torch.float64)
    advantages[::5] = 0
    weights = torch.rand(n, generator=g, dtype=torch.float64)
    arguments = (advantages, behavior, ref, sequence_of, lengths)
    losses = objective_module.token_losses(objective, logp, entropy, *arguments)
    (expected,) = torch.autograd.grad((losses * weights).sum(), logp)
    got = objective_module.token_coefficients(
        objective, logp.detach(), advantages, weights, behavior, ref, sequence_of, lengths
    )
    torch.testing.assert_close(got, expected)
    if (
        not objective.weighs_sampler and objective.kind != "cispo"
    ):  # those hold a factor constant: not a derivative of the value
        assert torch.autograd.gradcheck(
            lambda x: objective_module.token_losses(objective, x, entropy, *arguments).sum(), logp
        )


@pytest.mark.parametrize("kind", ["reinforce", "ppo", "cispo", "importance", "importance_mask", "gspo"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_add_up(kind: str, aggregation: str, backend: str) -> None:
    """One call on all tokens = the sum over any split at sequence boundaries with the whole's normalizer."""
    objective = PolicyObjective(kind, aggregation)
    case = Case.make(60, 16, 300, sequences=6)
    cu = case.cu_seqlens.tolist()
    normalizer = 60 if aggregation == "token-mean" else 6
    with use_backend(backend):
        whole, gradients = computed(case, objective)
        for split in ([0, 2, 6], [0, 1, 2, 3, 4, 5, 6], [0, 5, 6]):
            hidden, weight = case.leaves()
            total = 0.0
            for a, b in itertools.pairwise(split):
                rows = slice(cu[a], cu[b])
                part = linear_policy_loss(
                    hidden[rows], weight, case.targets[rows], case.advantages[a:b],
                    case.cu_seqlens[a : b + 1] - cu[a], objective=objective,
                    behavior_logprobs=case.behavior[rows], normalizer=normalizer,
                )  # fmt: skip
                part.loss.backward()
                total += part.loss.item()
            assert total == pytest.approx(whole.loss.item(), rel=1e-5)
            torch.testing.assert_close(hidden.grad, gradients[0], rtol=1e-4, atol=1e-8)
            torch.testing.assert_close(weight.grad, gradients[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["reinforce", "importance_mask", "ppo", "gspo"])
def test_zero_advantages_are_skipped_exactly(kind: str, backend: str) -> None:
    objective = PolicyObjective(kind)
    case = Case.make(50, 16, 400, sequences=5)
    case.advantages[[0, 3]] = 0
    lengths = torch.diff(case.cu_seqlens)
    with use_backend(backend):
        result, gradients = computed(case, objective)
    assert int(result.stats["tokens_skipped"]) == int(lengths[[0, 3]].sum())
    assert int(result.stats["tokens_computed"]) == 50 - int(lengths[[0, 3]].sum())
    sequence_of = torch.repeat_interleave(lengths.long())
    dropped = (sequence_of == 0) | (sequence_of == 3)
    assert torch.isnan(result.logprobs[dropped]).all() and torch.isfinite(result.logprobs[~dropped]).all()
    assert gradients[0][dropped].eq(0).all()
    _, _, truth = truth_of(case, objective)
    torch.testing.assert_close(gradients[0].double(), truth[0], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(gradients[1].double(), truth[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_learn(backend: str) -> None:
    """All advantages 0, no tokens, no sequences: loss 0 and zero gradients, no error."""
    case = Case.make(9, 8, 40)
    with use_backend(backend):
        result, gradients = computed(case, PolicyObjective("ppo"), advantages=torch.zeros(9))
        assert result.loss.item() == 0 and all(g.eq(0).all() for g in gradients)
        assert int(result.stats["tokens_skipped"]) == 9
        empty = Case.make(0, 8, 40)
        for objective in (PolicyObjective(), PolicyObjective("gspo"), OBJECTIVES["ppo-kl3-entropy"]):
            result, gradients = computed(empty, objective, advantages=torch.zeros(0))
            assert result.loss.item() == 0 and gradients[0].shape == (0, 8) and gradients[1].eq(0).all()
            logits = torch.zeros(0, 40, requires_grad=True)
            result = policy_loss_from_logits(
                logits, empty.targets, torch.zeros(0), empty.cu_seqlens, objective=objective,
                behavior_logprobs=empty.behavior, reference_logprobs=empty.reference,
            )  # fmt: skip
            result.loss.backward()
            assert result.loss.item() == 0 and logits.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_advantage_a_token(backend: str) -> None:
    case = Case.make(30, 8, 200, sequences=3)
    per_token = torch.randn(30)
    per_token[5:9] = 0
    for objective in (PolicyObjective("ppo"), PolicyObjective("gspo", clip_low=0.3, clip_high=0.3)):
        with use_backend(backend):
            result, gradients = computed(case, objective, advantages=per_token)
        loss, _, truth = truth_of(case, objective, advantages=per_token)
        assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
        torch.testing.assert_close(gradients[1].double(), truth[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_policy_clipping_cannot_act(backend: str) -> None:
    case = Case.make(30, 8, 200)
    with use_backend(backend):
        narrow, g_narrow = computed(case, PolicyObjective("ppo", clip_low=0, clip_high=0), behavior=False)
        _plain, g_plain = computed(case, PolicyObjective("reinforce"), behavior=False)
    assert narrow.stats["clip_fraction_low"] == narrow.stats["clip_fraction_high"] == 0
    assert narrow.stats["ratio_mean"] == 1
    torch.testing.assert_close(g_narrow, g_plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_grad_is_added_to(backend: str) -> None:
    case = Case.make(30, 8, 200)
    with use_backend(backend):
        _, (d_hidden, d_weight) = computed(case, PolicyObjective())
        hidden, weight = case.leaves()
        weight.grad = torch.ones_like(weight)
        before = weight.grad.data_ptr()
        result = linear_policy_loss(
            hidden, weight, case.targets, case.advantages, case.cu_seqlens, objective=PolicyObjective(),
            weight_grad=weight.grad,
        )  # fmt: skip
        result.loss.backward()
        assert weight.grad.data_ptr() == before
        torch.testing.assert_close(weight.grad, 1 + d_weight)
        torch.testing.assert_close(hidden.grad, d_hidden)
        scaled = linear_policy_loss(
            hidden, weight, case.targets, case.advantages, case.cu_seqlens, objective=PolicyObjective(),
            weight_grad=weight.grad,
        )  # fmt: skip
        with pytest.raises(RuntimeError):  # the weight's share could not be scaled any more
            (scaled.loss / 2).backward()


def test_loss_can_be_scaled_and_kept() -> None:
    case = Case.make(30, 8, 200)
    _, (d_hidden, d_weight) = computed(case, PolicyObjective())
    hidden, weight = case.leaves()
    result = linear_policy_loss(
        hidden, weight, case.targets, case.advantages, case.cu_seqlens, objective=PolicyObjective()
    )
    (result.loss / 4 + hidden.sum() * 0).backward()
    torch.testing.assert_close(hidden.grad, d_hidden / 4)
    torch.testing.assert_close(weight.grad, d_weight / 4)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_inputs(frozen: str) -> None:
    case = Case.make(12, 8, 100)
    hidden, weight = case.leaves()
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        tensor.requires_grad_(frozen not in (name, "both"))
    result = linear_policy_loss(
        hidden, weight, case.targets, case.advantages, case.cu_seqlens, objective=PolicyObjective()
    )
    assert result.loss.requires_grad == (frozen != "both")
    if frozen != "both":
        result.loss.backward()
        assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")
    expected, _, _ = truth_of(case, PolicyObjective(), behavior=False)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nonfinite_rows_are_counted_never_zeroed(backend: str) -> None:
    case = Case.make(10, 8, 50)
    hidden = case.hidden.clone()
    hidden[4, 0], hidden[7, 2] = math.nan, math.inf
    with use_backend(backend):
        result = linear_policy_loss(
            hidden, case.weight, case.targets, torch.ones(10), case.cu_seqlens, objective=PolicyObjective()
        )
    assert int(result.stats["nonfinite_rows"]) == 2
    assert not math.isfinite(result.loss.item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_to_the_bit(backend: str) -> None:
    """For a fixed number of threads nothing depends on timing: no atomics, no shared accumulators."""
    case = Case.make(**CASES["chunked"])
    with use_backend(backend):
        first, gradients = computed(case, OBJECTIVES["ppo-kl3-entropy"])
        for _ in range(3):
            again, others = computed(case, OBJECTIVES["ppo-kl3-entropy"])
            assert torch.equal(first.loss, again.loss)
            assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_loss_is_the_plain_formula() -> None:
    """By hand, once, without any code of the package: REINFORCE and PPO with the token mean."""
    case = Case.make(12, 6, 20, sequences=2)
    cu = case.cu_seqlens.tolist()
    logp = torch.log_softmax(case.hidden @ case.weight.T, -1)[range(12), case.targets]
    a = torch.cat([case.advantages[i].expand(cu[i + 1] - cu[i]) for i in range(2)])
    ratio = (logp - case.behavior).exp()
    by_hand = {
        "reinforce": -(a * logp).sum() / 12,
        "ppo": -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum() / 12,
    }
    for kind, expected in by_hand.items():
        result, _ = computed(case, PolicyObjective(kind))
        assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
