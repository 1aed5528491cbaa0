"""A target of -100 is not counted: every operation gives what it gives without it, whatever stands in its row."""

from __future__ import annotations

import pytest
import torch
from ops_cases import BACKENDS, CASES, OBJECTIVES, Case
from torch import Tensor

from bandit_rft import linear_logprobs, linear_policy_loss, logprobs_from_logits, policy_loss_from_logits
from bandit_rft.ops import PolicyLoss, PolicyObjective, reference, use_backend

CASE_NAMES = ["plain", "bias", "everything", "chunked"]
IGNORED_SHARE = 0.4


def with_ignored(case: Case, everything: bool = False) -> tuple[Case, Tensor]:
    """The case with -100 among its targets, a whole sequence among them, and NaN where nobody must look."""
    counted = torch.rand(len(case.targets), generator=torch.Generator().manual_seed(7)) >= IGNORED_SHARE
    counted[int(case.cu_seqlens[1]) : int(case.cu_seqlens[2])] = False
    if everything:
        counted[:] = False
    case.targets = case.targets.masked_fill(~counted, -100)
    for tensor in (case.hidden, case.behavior, case.reference):
        tensor[~counted] = torch.nan
    return case, counted


def without(case: Case, counted: Tensor) -> Case:
    """The same case in which the tokens that are not counted never were; every sequence stays, maybe empty."""
    lengths = torch.stack([part.sum() for part in counted.split(case.cu_seqlens.diff().tolist())])
    scaling = {k: v[counted] if isinstance(v, Tensor) else v for k, v in case.scaling.items()}
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    return Case(
        case.hidden[counted], case.weight, case.bias, case.targets[counted], case.advantages, cu,
        case.behavior[counted], case.reference[counted], scaling,
    )  # fmt: skip


def head(case: Case) -> dict[str, Tensor]:
    names = ("hidden", "weight", "bias")
    return dict(zip(names, case.leaves(), strict=False))


def logits_of(case: Case) -> Tensor:
    z = case.hidden @ case.weight.T
    return (z if case.bias is None else z + case.bias).requires_grad_()


def same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], counted: Tensor) -> None:
    for name, tensor in got.items():
        found, expected = tensor.grad, want[name].grad
        assert found is not None and expected is not None
        if name in ("hidden", "logits"):
            assert not found[~counted].any()
            found = found[counted]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASE_NAMES)
def test_logprobs(name: str, backend: str) -> None:
    case, counted = with_ignored(Case.make(**CASES[name]))
    some = without(case, counted)
    inputs, fewer = head(case), head(some)
    with use_backend(backend):
        logp, entropy = linear_logprobs(targets=case.targets, **inputs, **case.scaling, return_entropy=True)
        (logp + 0.3 * entropy).sum().backward()
        want, want_entropy = linear_logprobs(targets=some.targets, **fewer, **some.scaling, return_entropy=True)
        (want + 0.3 * want_entropy).sum().backward()
    assert not logp[~counted].any() and not entropy[~counted].any()
    torch.testing.assert_close(logp[counted], want)
    torch.testing.assert_close(entropy[counted], want_entropy)
    same_gradients(inputs, fewer, counted)
    exact, _ = case.truth()
    torch.testing.assert_close(logp.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logprobs_from_logits(backend: str) -> None:
    case, counted = with_ignored(Case.make(n=37, h=24, v=1001))
    some = without(case, counted)
    logits, fewer = logits_of(case), logits_of(some)
    with use_backend(backend):
        logp, entropy = logprobs_from_logits(logits, case.targets, temperature=0.7, return_entropy=True)
        (logp + 0.3 * entropy).sum().backward()
        want, want_entropy = logprobs_from_logits(fewer, some.targets, temperature=0.7, return_entropy=True)
        (want + 0.3 * want_entropy).sum().backward()
    assert not logp[~counted].any() and not entropy[~counted].any()
    torch.testing.assert_close(logp[counted], want)
    same_gradients({"logits": logits}, {"logits": fewer}, counted)


def compare_losses(got: PolicyLoss, want: PolicyLoss, counted: Tensor) -> None:
    torch.testing.assert_close(got.loss, want.loss, atol=1e-6, rtol=1e-5)
    for name, value in want.stats.items():
        torch.testing.assert_close(got.stats[name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert not got.logprobs[~counted].any()
    torch.testing.assert_close(got.logprobs[counted], want.logprobs, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_policy_loss(objective: PolicyObjective, backend: str) -> None:
    case, counted = with_ignored(Case.make(n=60, h=24, v=501, bias=True, sequences=7, temperature="rows"))
    case.advantages[3] = 0.0
    some = without(case, counted)
    inputs, fewer = head(case), head(some)

    def loss(of: Case, leaves: dict[str, Tensor], skip: bool = True) -> PolicyLoss:
        return linear_policy_loss(
            **leaves, targets=of.targets, advantages=of.advantages, cu_seqlens=of.cu_seqlens, objective=objective,
            behavior_logprobs=of.behavior, reference_logprobs=of.reference, skip_zero_rows=skip, **of.scaling,
        )  # fmt: skip

    with use_backend(backend):
        for skip in (False, True):
            got, want = loss(case, inputs, skip), loss(some, fewer, skip)
            compare_losses(got, want, counted)
        got.loss.backward()
        want.loss.backward()
    same_gradients(inputs, fewer, counted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_policy_loss_from_logits(objective: PolicyObjective, backend: str) -> None:
    case, counted = with_ignored(Case.make(n=60, h=24, v=501, sequences=7))
    some = without(case, counted)
    logits, fewer = logits_of(case), logits_of(some)
    with use_backend(backend):
        got, want = (
            policy_loss_from_logits(
                z, of.targets, of.advantages, of.cu_seqlens, objective=objective, behavior_logprobs=of.behavior,
                reference_logprobs=of.reference,
            )
            for z, of in ((logits, case), (fewer, some))
        )  # fmt: skip
        compare_losses(got, want, counted)
        got.loss.backward()
        want.loss.backward()
    same_gradients({"logits": logits}, {"logits": fewer}, counted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["reinforce", "gspo"])
def test_nothing_counts(kind: str, backend: str) -> None:
    case, _ = with_ignored(Case.make(n=20, h=8, v=50), everything=True)
    inputs = head(case)
    with use_backend(backend):
        result = linear_policy_loss(
            **inputs, targets=case.targets, advantages=case.advantages, cu_seqlens=case.cu_seqlens,
            objective=PolicyObjective(kind), behavior_logprobs=case.behavior,
        )  # fmt: skip
        result.loss.backward()
        logits = logits_of(case)
        of_logits = policy_loss_from_logits(
            logits, case.targets, case.advantages, case.cu_seqlens,
            objective=PolicyObjective(kind, kl="k3", kl_coef=1.0),
            reference_logprobs=case.reference,
        )  # fmt: skip
        of_logits.loss.backward()
    assert result.loss.item() == of_logits.loss.item() == 0
    assert all(not tensor.grad.any() for tensor in (*inputs.values(), logits))
    assert int(result.stats["tokens_computed"]) == int(of_logits.stats["tokens_computed"]) == 0


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_where_looking_would_wait(monkeypatch: pytest.MonkeyPatch, objective: PolicyObjective) -> None:
    """As on a GPU: nothing is known of the targets beforehand, a mask goes along; rows hold finite numbers."""
    case, counted = with_ignored(Case.make(n=60, h=24, v=501, sequences=7))
    case.hidden = case.hidden.nan_to_num(0.5)
    some = without(case, counted)
    monkeypatch.setattr("bandit_rft.ops.checks.readable", lambda value: False)
    inputs, fewer = head(case), head(some)
    logits, fewer_logits = logits_of(case), logits_of(some)
    with use_backend("torch"):
        for of, leaves, z in ((case, inputs, logits), (some, fewer, fewer_logits)):
            rest = (of.targets, of.advantages, of.cu_seqlens)
            told = {"objective": objective, "behavior_logprobs": of.behavior, "reference_logprobs": of.reference}
            results = linear_policy_loss(*leaves.values(), *rest, **told), policy_loss_from_logits(z, *rest, **told)
            sum(result.loss for result in results).backward()
            linear_logprobs(*leaves.values(), of.targets).sum().backward()
            logprobs_from_logits(z, of.targets).sum().backward()
            if of is case:
                got = results
        for one, other in zip(got, results, strict=True):
            compare_losses(one, other, counted)
    same_gradients(inputs | {"logits": logits}, fewer | {"logits": fewer_logits}, counted)


def test_compiled_and_checked_by_opcheck() -> None:
    case, counted = with_ignored(Case.make(n=60, h=24, v=501, sequences=7))
    some = without(case, counted)

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, cu: Tensor, old: Tensor) -> Tensor:
        options = {"objective": PolicyObjective("ppo", "seq-mean-token-mean"), "behavior_logprobs": old}
        scored = linear_logprobs(hidden, weight, targets)
        return linear_policy_loss(hidden, weight, targets, advantages, cu, **options).loss + scored.sum()

    inputs, fewer = head(case), head(some)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = compiled(*inputs.values(), case.targets, case.advantages, case.cu_seqlens, case.behavior)
    want = loss(*fewer.values(), some.targets, some.advantages, some.cu_seqlens, some.behavior)
    got.backward()
    want.backward()
    torch.testing.assert_close(got, want)
    same_gradients(inputs, fewer, counted)
    hidden = case.hidden.nan_to_num(0.5).requires_grad_()
    weight = case.weight.clone().requires_grad_()
    operation = torch.ops.bandit_rft.linear_logprobs.default
    torch.library.opcheck(operation, (hidden, weight, None, case.targets, 1.0, None, None, 1.0))


def test_other_targets_outside_are_still_refused() -> None:
    case, _ = with_ignored(Case.make(n=20, h=8, v=50))
    case.targets[4] = -1
    with pytest.raises(ValueError, match=r"\[0, V = 50\); targets\[4\] is -1 \(-100 would not be counted\)"):
        linear_logprobs(case.hidden, case.weight, case.targets)


def test_the_reference_in_float64() -> None:
    case, counted = with_ignored(Case.make(n=20, h=8, v=50))
    logp, entropy = reference.linear_logprobs(case.hidden.double(), case.weight.double(), case.targets)
    assert not logp[~counted].any() and logp[counted].all() and logp.isfinite().all() and entropy.isfinite().all()
