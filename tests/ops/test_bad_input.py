"""Every row of "what bad input gets": an error that names the argument, what it is and what was expected."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from ops_cases import BACKENDS

from bandit_rft import (
    PolicyObjective,
    linear_logprobs,
    linear_policy_loss,
    linear_sample,
    logprobs_from_logits,
    policy_loss_from_logits,
    sample_from_logits,
)
from bandit_rft.ops import checked, use_backend

H, W, T = torch.randn(6, 4), torch.randn(10, 4), torch.randint(10, (6,))
ADV, CU = torch.ones(2), torch.tensor([0, 2, 6], dtype=torch.int32)
REINFORCE = PolicyObjective()
STREAM = {"seed": 0, "sequence_ids": torch.arange(6), "positions": torch.zeros(6, dtype=torch.int64)}


def logprobs(**change: Any) -> Any:
    arguments = {"hidden": H, "weight": W, "targets": T, **change}
    return linear_logprobs(**arguments)


def loss(**change: Any) -> Any:
    arguments = {
        "hidden": H, "weight": W, "targets": T, "advantages": ADV, "cu_seqlens": CU, "objective": REINFORCE, **change
    }  # fmt: skip
    return linear_policy_loss(**arguments)


def sample(**change: Any) -> Any:
    return linear_sample(**{"hidden": H, "weight": W, **STREAM, **change})


CASES = [
    # wrong rank
    (lambda: logprobs(hidden=H[0]), ValueError, r"hidden must be \[N, H\]; got shape \[4\]"),
    (lambda: logprobs(weight=W[None]), ValueError, r"weight must be \[V, H\]; got shape \[1, 10, 4\]"),
    (lambda: logprobs(targets=T[:, None]), ValueError, r"targets must be \[N\]; got shape \[6, 1\]"),
    (lambda: loss(cu_seqlens=CU[None]), ValueError, r"cu_seqlens must be \[B \+ 1\]"),
    (lambda: sample(hidden=H[0]), ValueError, r"hidden must be \[B, H\]"),
    (lambda: logprobs_from_logits(W[0], T), ValueError, r"logits must be \[N, V\]"),
    (lambda: logprobs(hidden=[1.0]), TypeError, r"hidden must be a torch.Tensor \[N, H\]; got list"),
    # mismatched N, H, V, B
    (lambda: logprobs(weight=W[:, :3]), ValueError, r"weight must be \[V, H\] with H = 4 .* got \[10, 3\]"),
    (lambda: logprobs(targets=T[:5]), ValueError, r"targets must be \[N\] with N = 6; got \[5\]"),
    (lambda: logprobs(bias=torch.zeros(9)), ValueError, r"bias must be \[V\] with V = 10 .* got \[9\]"),
    (lambda: logprobs(temperature=torch.ones(5)), ValueError, r"temperature must be \[N\] with N = 6; got \[5\]"),
    (lambda: logprobs(temperature=torch.tensor(1.0)), ValueError, r"temperature .* 0-d tensor"),
    (lambda: loss(advantages=torch.ones(3)), ValueError, r"advantages must be \[B\] with B = 2 or \[N\] with N = 6"),
    (lambda: loss(behavior_logprobs=torch.zeros(5)), ValueError, r"behavior_logprobs must be \[N\] with N = 6"),
    (lambda: loss(reference_logprobs=torch.zeros(7)), ValueError, r"reference_logprobs must be \[N\] with N = 6"),
    (lambda: sample(positions=torch.zeros(5, dtype=torch.int64)), ValueError, r"positions must be \[B\] with B = 6"),
    (lambda: logprobs(weight=W[:0]), ValueError, r"weight must have V >= 1"),
    # dtype or device mix
    (lambda: logprobs(weight=W.double()), TypeError, r"weight must have hidden's dtype float32; got float64"),
    (lambda: logprobs(hidden=H.long(), weight=W.long()), TypeError, r"hidden must be float32.*got int64"),
    (lambda: logprobs(targets=T.int()), TypeError, r"targets must be int64; got int32"),
    (lambda: logprobs(weight=W.to("meta")), ValueError, r"weight must be on hidden's device cpu; got meta"),
    (lambda: loss(cu_seqlens=CU.float()), TypeError, r"cu_seqlens must be int32"),
    (lambda: loss(advantages=ADV.long()), TypeError, r"advantages must be float32.*got int64"),
    (
        lambda: loss(weight_grad=torch.zeros(10, 4, dtype=torch.bfloat16)),
        TypeError,
        r"weight_grad must be torch.float32",
    ),
    (lambda: loss(weight_grad=torch.zeros(10, 3)), ValueError, r"weight_grad must be \[V, H\] = \[10, 4\]"),
    # values
    (
        lambda: logprobs(targets=T.clone().fill_(10)),
        ValueError,
        r"targets must lie in \[0, V = 10\); targets\[0\] is 10",
    ),
    (lambda: loss(targets=torch.tensor([0, 1, -1, 0, 0, 0])), ValueError, r"targets\[2\] is -1"),
    (lambda: logprobs_from_logits(W, torch.full((10,), 4)), ValueError, r"targets must lie in \[0, V = 4\)"),
    (lambda: logprobs(temperature=0.0), ValueError, r"temperature must be > 0 and finite; got 0.0"),
    (lambda: sample(temperature=-1.0), ValueError, r"temperature must be > 0 and finite; got -1.0"),
    (lambda: logprobs(temperature=math.nan), ValueError, r"temperature must be > 0 and finite; got nan"),
    (lambda: logprobs(temperature="hot"), TypeError, r"temperature must be a number > 0; got str"),
    (lambda: logprobs(temperature=torch.tensor([1, 1, 0, 1, 1, 1.0])), ValueError, r"temperature\[2\] is 0.0"),
    (lambda: logprobs(softcap=0.0), ValueError, r"softcap must be > 0"),
    (lambda: logprobs(logit_scale=0.0), ValueError, r"logit_scale must be a finite number other than 0"),
    (lambda: sample(top_p=0.0), ValueError, r"top_p must lie in \(0, 1\].*got 0.0"),
    (lambda: sample(top_p=1e-46), ValueError, r"top_p must lie in \(0, 1\].*got 1e-46"),
    (lambda: sample(top_p=1.5), ValueError, r"top_p must lie in \(0, 1\].*got 1.5"),
    (lambda: sample(top_k=-1), ValueError, r"top_k must be a whole number >= 0.*got -1"),
    (lambda: sample(min_p=2.0), ValueError, r"min_p must lie in \[0, 1\].*got 2.0"),
    (lambda: sample(seed=1.5), TypeError, r"seed must be an int or a 0-d int64 tensor; got float"),
    (lambda: sample(seed=2**64), ValueError, r"seed must fit 64 bits"),
    (lambda: sample(seed=torch.tensor([1])), TypeError, r"seed must be an int or a 0-d int64 tensor"),
    (
        lambda: sample(positions=torch.full((6,), -1)),
        ValueError,
        r"positions must lie in \[0, 2\^32\); positions\[0\] is -1",
    ),
    (lambda: sample_from_logits(W, seed=0, sequence_ids=T, positions=T), ValueError, r"sequence_ids must be \[B\]"),
    (lambda: loss(cu_seqlens=torch.tensor([0, 7, 6])), ValueError, r"cu_seqlens must be increasing from 0 to N = 6"),
    (lambda: loss(cu_seqlens=torch.tensor([1, 4, 6])), ValueError, r"increasing from 0 to N = 6; got \[1, 4, 6\]"),
    (lambda: loss(cu_seqlens=torch.tensor([0, 4, 5])), ValueError, r"increasing from 0 to N = 6; got \[0, 4, 5\]"),
    (
        lambda: loss(cu_seqlens=torch.tensor([0]), advantages=torch.ones(6)),
        ValueError,
        r"cu_seqlens must be increasing",
    ),
    (lambda: loss(normalizer=0), ValueError, r"normalizer must be > 0"),
    (lambda: loss(normalizer=torch.ones(2)), ValueError, r"normalizer must be a number > 0 or a 0-d tensor"),
    (lambda: loss(normalizer=torch.tensor(0.0)), ValueError, r"normalizer must be > 0 and finite; got 0.0"),
    (lambda: loss(normalizer=torch.tensor(-2)), ValueError, r"normalizer must be > 0 and finite; got -2"),
    (lambda: loss(normalizer=torch.tensor(math.nan)), ValueError, r"normalizer must be > 0 and finite; got nan"),
    (lambda: loss(normalizer=math.inf), ValueError, r"normalizer must be > 0 and finite; got inf"),
    (lambda: loss(normalizer=torch.tensor(True)), TypeError, r"normalizer must be a real number; got a tensor of bool"),
    (lambda: loss(normalizer="6"), TypeError, r"normalizer must be a number > 0; got str"),
    # what float32 does not hold: 1e-46 is 0 there
    (lambda: logprobs(temperature=1e-46), ValueError, r"temperature must be > 0 and finite in float32.*got 1e-46"),
    (lambda: logprobs(temperature=1e39), ValueError, r"temperature must be > 0 and finite in float32.*got 1e\+39"),
    (lambda: logprobs(softcap=1e-46), ValueError, r"softcap must be > 0 and finite in float32.*got 1e-46"),
    (lambda: logprobs(logit_scale=1e-46), ValueError, r"logit_scale must be a finite number.*got 1e-46"),
    (lambda: logprobs(logit_scale="1"), TypeError, r"logit_scale must be a finite number.*got str"),
    (
        lambda: logprobs(temperature=torch.full((6,), 1e-46, dtype=torch.float64)),
        ValueError,
        r"temperature must be > 0 and finite; temperature\[0\] is 0.0",
    ),
    (lambda: sample(temperature=torch.full((6,), 1e-40)), ValueError, r"temperature must be > 0.*temperature\[0\]"),
    (
        lambda: sample(top_k=2**70),
        ValueError,
        r"top_k must be a whole number >= 0 and < 2\^63.*got 1180591620717411303424",
    ),
    (lambda: sample(top_p="0.9"), TypeError, r"top_p must be a number in \(0, 1\]; got str"),
    (lambda: sample(top_p=math.nan), ValueError, r"top_p must lie in \(0, 1\].*got nan"),
    (lambda: sample(min_p=None), TypeError, r"min_p must be a number in \[0, 1\]; got NoneType"),
    (lambda: loss(skip_zero_rows=1), TypeError, r"skip_zero_rows must be True or False; got 1"),
    (lambda: loss(cu_seqlens=torch.zeros(0, dtype=torch.int32)), ValueError, r"cu_seqlens must be \[B \+ 1\]"),
    (
        lambda: loss(cu_seqlens=torch.tensor([0, 2**31 - 1, -(2**31), 6], dtype=torch.int32), advantages=torch.ones(3)),
        ValueError,
        r"cu_seqlens must be increasing",
    ),
    (lambda: loss(weight_grad=torch.zeros(1, 4).expand(10, 4)), ValueError, r"weight_grad must have memory of its own"),
    (lambda: loss(weight_grad=W.clone().requires_grad_()), ValueError, r"weight_grad must not require a gradient"),
    (lambda: loss(objective="ppo"), TypeError, r"objective must be a PolicyObjective; got str"),
    (
        lambda: loss(objective=PolicyObjective(kl="k3", kl_coef=0.1)),
        ValueError,
        r"reference_logprobs must be given for kl='k3'",
    ),
    (
        lambda: policy_loss_from_logits(W, T, ADV, CU, objective=REINFORCE),
        ValueError,
        r"targets must be \[N\] with N = 10",
    ),
    # the objective itself
    (lambda: PolicyObjective("grpo"), ValueError, r"kind must be one of reinforce, .*; got 'grpo'"),  # type: ignore
    (lambda: PolicyObjective(aggregation="mean"), ValueError, r"aggregation must be one of"),  # type: ignore
    (lambda: PolicyObjective(kl="k4", kl_coef=1), ValueError, r"kl must be one of none, k1, k2, k3"),  # type: ignore
    (lambda: PolicyObjective(kl_coef=0.1), ValueError, r"kl_coef=0.1 has no effect with kl='none'"),
    (lambda: PolicyObjective(kl="k1", kl_coef=-1), ValueError, r"kl_coef must be >= 0"),
    (lambda: PolicyObjective("ppo", clip_low=1.5), ValueError, r"clip_low must lie in \[0, 1\]"),
    (lambda: PolicyObjective("ppo", clip_high=-0.1), ValueError, r"clip_high must be >= 0"),
    (lambda: PolicyObjective("ppo", dual_clip=0.5), ValueError, r"dual_clip must be > 1"),
    (lambda: PolicyObjective("cispo", dual_clip=3.0), ValueError, r"dual_clip applies to kind 'ppo' or 'gspo'"),
    (lambda: PolicyObjective("importance", importance_cap=0), ValueError, r"importance_cap must be > 0"),
    (lambda: PolicyObjective(importance_floor=1.5), ValueError, r"importance_floor must lie in \[0, 1\]; got 1.5"),
    (
        lambda: PolicyObjective("importance_mask", importance_cap=0.9),
        ValueError,
        r"importance_cap must be >= 1 for kind 'importance_mask'.*got 0.9",
    ),
    (lambda: PolicyObjective(entropy_coef=math.nan), ValueError, r"entropy_coef must be a finite number"),
    (
        lambda: PolicyObjective(aggregation="seq-mean-token-sum-norm"),
        ValueError,
        r"norm_length must be a positive length",
    ),
    (
        lambda: PolicyObjective(aggregation="seq-mean-token-sum-norm", norm_length=math.nan),  # type: ignore
        ValueError,
        r"norm_length must be a positive length.*got nan",
    ),
    (lambda: PolicyObjective("ppo", dual_clip="3"), ValueError, r"dual_clip must be > 1; got 3"),  # type: ignore
    *(
        (
            lambda value=value: PolicyObjective(aggregation="seq-mean-token-sum-norm", norm_length=value),
            ValueError,
            r"norm_length must be a positive length",
        )
        for value in (10**400, 1e-46)
    ),
    (lambda: PolicyObjective(importance_cap=10**400), ValueError, r"importance_cap"),
    (lambda: PolicyObjective(norm_length=5), ValueError, r"norm_length has no effect"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=range(len(CASES)))
def test_message(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_checked_mode_names_the_row(backend: str) -> None:
    bad = H.clone()
    bad[3, 1] = math.nan
    with use_backend(backend), checked():
        with pytest.raises(ValueError, match=r"the logits must be finite; row 3 is nan"):
            logprobs(hidden=bad)
        with pytest.raises(ValueError, match=r"the logits must be finite; row 3 is nan"):
            loss(hidden=bad)
        with pytest.raises(ValueError, match=r"the logits must be finite; row 3 is nan"):
            sample(hidden=bad)
        with pytest.raises(ValueError, match=r"advantages must be finite; row 0 is inf"):
            loss(advantages=torch.tensor([math.inf, 1.0]))
        with pytest.raises(ValueError, match=r"behavior_logprobs must be finite; row 5 is nan"):
            loss(behavior_logprobs=torch.tensor([0.0] * 5 + [math.nan]))
    with use_backend(backend):
        assert math.isnan(loss(advantages=torch.tensor([math.nan, 0.0])).loss.item())  # not dropped as if it were 0


def test_forced_backend_that_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANDIT_RFT_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"BANDIT_RFT_BACKEND must be one of cpu, cuda, triton, torch; got 'gpu'"):
        logprobs()
    monkeypatch.setenv("BANDIT_RFT_BACKEND", "cpu")
    with pytest.raises(ValueError, match=r"BANDIT_RFT_BACKEND=cpu cannot serve this call"):
        logprobs(hidden=H.double(), weight=W.double())


def test_workspace_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANDIT_RFT_WORKSPACE_MIB", "lots")
    with pytest.raises(ValueError, match=r"BANDIT_RFT_WORKSPACE_MIB must be a positive whole number"):
        logprobs()


def test_without_the_compiled_module() -> None:
    """The package imports, says once that it is slower, and computes the same."""
    script = """
import sys, warnings
sys.modules["bandit_rft._C"] = None
import torch, bandit_rft
from bandit_rft.ops import describe
h, w, t = torch.randn(5, 4), torch.randn(9, 4), torch.arange(5)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    got = bandit_rft.linear_logprobs(h, w, t)
    bandit_rft.linear_logprobs(h, w, t)
assert len(said) == 1 and "compiled module is missing" in str(said[0].message), said
assert torch.allclose(got, torch.log_softmax(h @ w.T, -1)[range(5), t], atol=1e-5)
assert "missing" in describe()
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "BANDIT_RFT_BACKEND": ""})
