"""Which backend serves, that a backward stays with it, one enumeration for all, and no waiting for a device."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import torch
from bandit_rft.kernels.enumerations import KLKind, ObjectiveKind
from ops_cases import BACKENDS, OBJECTIVES, Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bandit_rft import PolicyObjective, linear_logprobs, linear_policy_loss, logprobs_from_logits
from bandit_rft.ops import backends, policy_loss, registry, use_backend
from bandit_rft.ops.backend import Backend
from bandit_rft.ops.objective import Kind, KLEstimator


def test_one_enumeration() -> None:
    from typing import get_args

    assert {kind.name for kind in ObjectiveKind} == {*get_args(Kind), "given"} - {"gspo"}
    assert {kl.name for kl in KLKind} == {*get_args(KLEstimator)}
    if backends.native is None:
        pytest.skip("needs the compiled core")
    for ours, compiled in ((ObjectiveKind, backends.native.ObjectiveKind), (KLKind, backends.native.KLKind)):
        assert {k.name: int(k) for k in ours} == {k.name: int(k) for k in compiled}


def test_triton_has_the_same_numbers() -> None:
    pytest.importorskip("triton")
    from bandit_rft.kernels import row_math

    for name, number in (
        ("IMPORTANCE", ObjectiveKind.importance), ("PPO", ObjectiveKind.ppo), ("CISPO", ObjectiveKind.cispo),
        ("IMPORTANCE_MASK", ObjectiveKind.importance_mask),
        ("NO_KL", KLKind.none), ("K2", KLKind.k2), ("K3", KLKind.k3),
    ):  # fmt: skip
        assert getattr(row_math, name).value == number, name


def test_bindings_have_names() -> None:
    if backends.native is None:
        pytest.skip("needs the compiled core")
    names = ["logprob_rows", "gradient_rows", "policy_rows", "sample_rows", "head_logits", "philox", "gumbel"]
    for name in names:
        assert "arg0" not in getattr(backends.native, name).__doc__, name
    assert backends.native.gumbel(word=7) == backends.native.gumbel(7)


def test_every_backend_has_every_operation() -> None:
    operations = [name for name in vars(Backend) if name.endswith("_rows")]
    assert sorted(operations) == ["gradient_rows", "logprob_rows", "policy_rows", "sample_rows"]
    for entry in backends.BACKENDS:
        assert all(getattr(type(entry.backend), name) is not getattr(Backend, name) for name in operations)
        assert backends.named(entry.backend.name) is entry.backend


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs two backends")
@pytest.mark.parametrize("forced", BACKENDS)
@pytest.mark.parametrize("source", ["head", "logits"])
def test_a_backward_is_served_by_the_backend_of_its_forward(
    forced: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also outside `use_backend`, and in another thread, as autograd runs it on a GPU."""
    case = Case.make(9, 8, 30)
    hidden, weight = case.leaves()
    served: list[str] = []
    for name in BACKENDS:
        backend = backends.named(name)

        def spy(*args: Any, of: Any = backend.gradient_rows, name: str = name, **rest: Any) -> Any:
            served.append(name)
            return of(*args, **rest)

        monkeypatch.setattr(backend, "gradient_rows", spy)
    with use_backend(forced):
        if source == "head":
            logp = linear_logprobs(hidden, weight, case.targets)
        else:
            logp = logprobs_from_logits(hidden @ weight.T, case.targets)
    logp.sum().backward(retain_graph=True)
    thread = threading.Thread(target=logp.sum().backward)
    thread.start()
    thread.join()
    assert served == [forced, forced]


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.calls += 1
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero"):
            self.seen[name] += 1
        to_host = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        if name in ("_to_copy", "copy_") and (to_host or (name == "copy_" and args[0].device.type == "cpu")):
            self.seen[f"{name} to the host"] += 1
        return func(*args, **kwargs)


def waits(monkeypatch: pytest.MonkeyPatch, objective: PolicyObjective, **options: Any) -> Waits:
    """What a loss and its backward do on a device whose tensors have no values: to look at one would raise."""
    for name in ("linear_policy_loss", "linear_policy_loss_into"):
        monkeypatch.setattr(policy_loss, f"_{name}", registry.implementations[name])
    counting = Waits()
    n, h, v, b = 12, 8, 50, 3
    with use_backend("torch"):
        made: dict[str, Any] = {"device": "meta"}
        weight = torch.randn(v, h, **made).requires_grad_()
        with counting:
            result = linear_policy_loss(
                torch.randn(n, h, **made).requires_grad_(), weight, torch.randint(v, (n,), **made),
                torch.randn(b, **made), torch.zeros(b + 1, dtype=torch.int32, **made), objective=objective,
                behavior_logprobs=torch.randn(n, **made), reference_logprobs=torch.randn(n, **made),
                temperature=0.9, normalizer=float(n), weight_grad=torch.zeros(v, h, **made), **options,
            )  # fmt: skip
            result.loss.backward()
    return counting


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_waits_for_nothing_where_the_caller_knows_the_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = waits(monkeypatch, OBJECTIVES[name], skip_zero_rows=False)
    assert counting.calls > 20 and not counting.seen, counting.seen


def test_looking_for_zero_rows_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter sees what it should: the same call with skip_zero_rows asks how many rows there are."""
    with pytest.raises(NotImplementedError, match="nonzero"):
        waits(monkeypatch, PolicyObjective())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_of_advantage_zero_computed_or_not_give_the_same(name: str, backend: str) -> None:
    case = Case.make(40, 8, 200, sequences=5)
    case.advantages[[0, 3]] = 0
    found = []
    for skip in (True, False):
        hidden, weight = case.leaves()
        with use_backend(backend):
            result = linear_policy_loss(
                hidden, weight, case.targets, case.advantages, case.cu_seqlens, objective=OBJECTIVES[name],
                behavior_logprobs=case.behavior, reference_logprobs=case.reference, skip_zero_rows=skip,
            )  # fmt: skip
        result.loss.backward()
        found.append((result, hidden.grad, weight.grad))
    (skipped, *gradients), (computed, *others) = found
    torch.testing.assert_close(computed.loss, skipped.loss, rtol=1e-6, atol=1e-7)
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7)
    assert int(computed.stats["tokens_skipped"]) == 0 and torch.isfinite(computed.logprobs).all()
    every: Tensor = skipped.logprobs.isnan()
    assert every.any() == (not OBJECTIVES[name].every_token_counts)
