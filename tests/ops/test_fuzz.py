"""Random calls of every operation: what is accepted equals float64, what is refused says which argument and why.

Half a minute here, and half a minute of the compiled core's own fuzzer; `make fuzz SECONDS=3600` takes an hour. The
examples follow from BANDIT_RFT_FUZZ_SEED (default 0), which a failure prints.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from ops_cases import BACKENDS
from paths import ROOT
from torch import Tensor

from bandit_rft import (
    PolicyObjective,
    linear_logprobs,
    linear_policy_loss,
    linear_sample,
    logprobs_from_logits,
    policy_loss_from_logits,
    sample_from_logits,
)
from bandit_rft.ops import objective as definition
from bandit_rft.ops import reference, use_backend
from bandit_rft.ops.philox import gumbel_noise, random_words

SECONDS = float(os.environ.get("BANDIT_RFT_FUZZ_SECONDS", "60"))
SEED = int(os.environ.get("BANDIT_RFT_FUZZ_SEED", "0"))
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
EPSILON = {torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4, torch.float64: 2.3e-16}
PROPERTIES = 3


def keep_drawing(check: Callable[[st.DataObject], None]) -> None:
    """Draw examples for this property's share of the time."""
    end = time.monotonic() + SECONDS / 2 / PROPERTIES
    number = SEED
    while time.monotonic() < end:
        run = given(st.data())(check)
        run = settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))(run)
        seed(number)(run)()
        number += 1


def log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(math.log(low), math.log(high)).map(math.exp)


class Call:
    """Arguments of every operation, for one set of shapes: random values, dtypes, strides and options."""

    def __init__(self, draw: Any) -> None:
        self.g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.backend = draw(st.sampled_from([*BACKENDS, None]))
        self.dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
        if self.backend == "cpu" and self.dtype not in (torch.float32, torch.bfloat16):
            self.backend = None
        self.n, self.h = draw(st.integers(0, 9)), draw(st.integers(1, 40))
        self.v = draw(st.one_of(st.integers(1, 40), st.integers(1, 2000)))
        spread = draw(log_uniform(1e-2, 30))
        self.strided = draw(st.booleans())
        self.hidden = self.made(self.n, self.h)
        self.weight = self.made(self.v, self.h, scale=spread / self.h**0.5)
        bias_dtype = draw(st.sampled_from([None, self.dtype, torch.float32]))
        self.bias = None if bias_dtype is None else self.made(self.v).to(bias_dtype)
        self.logits = self.made(self.n, self.v, scale=spread)
        if self.n and draw(st.booleans()):
            self.logits[0, 1:] = -torch.inf  # one token that can occur
            self.logits[1:, : self.v // 2] = -torch.inf
        self.targets = torch.randint(self.v, (self.n,), generator=self.g)
        self.per_row = draw(st.booleans())
        low = 10.0 ** draw(st.integers(-2, 2))
        self.temperature: Any = low * (torch.rand(self.n, generator=self.g) + 0.5) if self.per_row else low
        self.softcap = draw(st.none() | log_uniform(0.5, 50))
        masked = bool(self.logits.isinf().any())  # times a negative scale: a token of +inf, which is not finite
        self.logit_scale = draw(st.sampled_from([1.0, 0.25, 2.0 if masked else -2.0]))
        note(f"{self.backend} {self.dtype} N {self.n} H {self.h} V {self.v} spread {spread} {self.scaling}")

    def made(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = (torch.randn(*shape, generator=self.g) * scale).to(self.dtype)
        if not self.strided:
            return values
        wide = torch.full((*shape, 2), torch.nan, dtype=self.dtype)
        wide[..., 1] = values
        return wide[..., 1]

    @property
    def scaling(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def exact(self, raw: Tensor, scaled: bool = True) -> Tensor:
        """z in float64."""
        t = self.temperature.double() if self.per_row else self.temperature
        return reference.scaled_logits(raw, t, *((self.softcap, self.logit_scale) if scaled else (None, 1.0)))

    def exact_head(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return reference.head_logits(hidden, weight, None if self.bias is None else self.bias.double())

    def tolerance(self, raw: Tensor) -> Tensor:
        """[N]: how far z may be off, in the computing dtype, before the softmax."""
        t = self.temperature.double() if self.per_row else torch.full((self.n,), float(self.temperature)).double()
        unit = 2.3e-16 if self.dtype == torch.float64 else 1.2e-7
        finite = raw.masked_fill(~torch.isfinite(raw), 0.0)
        size = finite.abs().amax(1) * abs(self.logit_scale) / t
        inside = self.hidden.double().abs() @ self.weight.double().abs().T
        size = size + inside.amax(1) * abs(self.logit_scale) / t * self.h**0.5 if raw is not self.logits else size
        return 16 * unit * (1 + size)


def near(name: str, got: Tensor, want: Tensor, allowed: Tensor) -> None:
    same = (got.double() == want) | (got.isnan() & want.isnan())
    error = torch.where(same, 0.0, (got.double() - want).abs())
    bad = ~(error <= allowed)
    assert not bad.any(), f"{name}: {got[bad][0]} for {want[bad][0]}, allowed {allowed.expand_as(bad)[bad][0]:.3g}"


def dz_bound(call: Call, z: Tensor, of_logp: Tensor, of_entropy: Tensor) -> Tensor:
    """[N, V]: what |dL/draw logit| is a sum of, without cancellation."""
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    each = p.clone().scatter_add_(1, call.targets[:, None], torch.ones(call.n, 1).double()) * of_logp.abs()[:, None]
    entropy = -(p * logp.clamp(min=-1e300)).sum(-1, keepdim=True)
    # Near certainty log p and the entropy are what 1 + x rounds away: 1e-2 covers that in the shares allowed below.
    each += of_entropy.abs()[:, None] * p * (logp.abs().clamp(max=1e300) + entropy + 1e-2)
    t = call.temperature.double()[:, None] if call.per_row else call.temperature
    return each * abs(call.logit_scale) / t


def check_logprobs(data: st.DataObject) -> None:
    """linear_logprobs and logprobs_from_logits, with their gradients."""
    call = Call(data.draw)
    pull = torch.randn(2, call.n, generator=call.g).double()
    hidden, weight, logits = (t.detach().requires_grad_() for t in (call.hidden, call.weight, call.logits))
    with use_backend(call.backend) if call.backend else torch.enable_grad():
        got = linear_logprobs(hidden, weight, call.targets, bias=call.bias, return_entropy=True, **call.scaling)
        plain = logprobs_from_logits(logits, call.targets, temperature=call.temperature, return_entropy=True)
    for logp, entropy in (got, plain):
        finite = torch.isfinite(logp)  # a target of -inf
        (torch.where(finite, logp, 0.0) @ pull[0].to(logp.dtype) + entropy @ pull[1].to(logp.dtype)).backward()
    leaves = [t.detach().double().requires_grad_() for t in (call.hidden, call.weight)]
    raw = call.exact_head(*leaves)
    z = call.exact(raw)
    tolerance = call.tolerance(raw.detach())
    want = reference.logprobs_and_entropy(z, call.targets)
    near("logprobs", got[0], want[0], 2 * tolerance)
    near("entropy", got[1], want[1], 2 * tolerance * (1 + math.log(call.v)))
    wanted = torch.autograd.grad((want[0] @ pull[0]) + (want[1] @ pull[1]), leaves)
    rough = 40 * tolerance[:, None].clamp(max=1e3) + 1e-6
    with torch.no_grad():
        bound = dz_bound(call, z, pull[0], pull[1])
        share = 4 * EPSILON[call.dtype]
        of_hidden, of_weight = bound @ leaves[1].abs(), bound.T @ leaves[0].abs()
        smallest = 1e-7 if call.dtype == torch.float16 else 1e-30
        near("hidden.grad", hidden.grad, wanted[0], rough * of_hidden + share * wanted[0].abs() + smallest)
        allowed = (rough * bound).T @ leaves[0].abs() + share * wanted[1].abs() + smallest + 1e-9 * of_weight
        near("weight.grad", weight.grad, wanted[1], allowed)

    exact = call.logits.detach().double()
    z = call.exact(exact, scaled=False)
    tolerance = call.tolerance(call.logits.double()) if call.n else tolerance
    want = reference.logprobs_and_entropy(z, call.targets)
    near("logprobs of logits", plain[0], want[0], 2 * tolerance)
    near("entropy of logits", plain[1], want[1], 2 * tolerance * (1 + math.log(call.v)))
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[exact == -torch.inf].eq(0).all() or call.targets.numel()


def check_samples(data: st.DataObject) -> None:
    """linear_sample and sample_from_logits against the definition's draw in float64."""
    call = Call(data.draw)
    filters = {
        "top_k": data.draw(st.sampled_from([0, 1, 2, 50, 5000, 2**62])),
        "top_p": data.draw(st.sampled_from([1.0, 0.9, 0.5, 1e-6])),
        "min_p": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
    }
    number = data.draw(st.integers(-(2**63), 2**64 - 1))
    ids = torch.randint(-(2**63), 2**63 - 1, (call.n,), generator=call.g)
    positions = torch.randint(2**32, (call.n,), generator=call.g)
    with use_backend(call.backend) if call.backend else torch.no_grad():
        of_head = linear_sample(
            call.hidden, call.weight, seed=number, sequence_ids=ids, positions=positions, bias=call.bias,
            **call.scaling, **filters,
        )  # fmt: skip
        of_logits = sample_from_logits(
            call.logits, seed=number, sequence_ids=ids, positions=positions, **call.scaling, **filters
        )
    signed = torch.tensor(number - 2**64 if number >= 2**63 else number)
    raws = call.exact_head(call.hidden.double(), call.weight.double()), call.logits.double()
    for name, got, raw in zip(("head", "logits"), (of_head, of_logits), raws, strict=True):
        z, tolerance = call.exact(raw), call.tolerance(raw)
        assert ((got.tokens >= 0) & (got.tokens < call.v)).all()
        logp, entropy = reference.logprobs_and_entropy(z, got.tokens)
        near(f"{name}: logprobs", got.logprobs, logp, 2 * tolerance)
        near(f"{name}: entropy", got.entropy, entropy, 2 * tolerance * (1 + math.log(call.v)))
        if not call.n:
            continue
        want = reference.sample(z, seed=signed, sequence_ids=ids, positions=positions, **filters)
        noise = gumbel_noise(random_words(signed, ids, positions, call.v), torch.float64)
        kept = reference.kept_tokens(z, **filters)
        perturbed = (z + noise).masked_fill(~kept, -torch.inf)
        top = perturbed.topk(min(2, call.v), -1).values
        clear = (top[:, 0] - top[:, -1] > 1e-4 + 4 * tolerance) if call.v > 1 else torch.ones(call.n, dtype=torch.bool)
        # Within rounding of top_p, min_p or of a tie at the edge, a token more or less may have been kept.
        clear &= torch.isclose(got.kept_mass.double(), want.kept_mass, rtol=1e-4)
        edge = z.masked_fill(~kept, torch.inf).amin(-1) - z.masked_fill(kept, -torch.inf).amax(-1)
        clear &= edge > 4 * tolerance  # or another one of equally likely tokens: a softcap makes many
        clear &= tolerance < 1e-3
        assert torch.equal(got.tokens[clear], want.tokens[clear]), name
        assert ((got.kept_mass > 0) & (got.kept_mass <= 1 + 1e-4)).all()


def drawn_objective(draw: Any) -> PolicyObjective:
    kind = draw(st.sampled_from(["reinforce", "importance", "importance_mask", "ppo", "cispo", "gspo"]))
    aggregation = draw(
        st.sampled_from(["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
    )
    kl = draw(st.sampled_from(["none", "k1", "k2", "k3"]))
    return PolicyObjective(
        kind, aggregation, clip_low=draw(st.floats(0, 1)), clip_high=draw(st.floats(0, 2)),
        dual_clip=draw(st.none() | st.floats(1.01, 5)) if kind in ("ppo", "gspo") else None,
        importance_floor=draw(st.floats(0, 1)),
        importance_cap=draw(st.floats(1 if kind == "importance_mask" else 0.1, 5)),
        kl=kl, kl_coef=0.0 if kl == "none" else draw(st.floats(0, 1)),
        entropy_coef=draw(st.sampled_from([0.0, 0.01])),
        norm_length=draw(st.integers(1, 50)) if aggregation.endswith("norm") else None,
    )  # fmt: skip


def check_losses(data: st.DataObject) -> None:
    """linear_policy_loss (with and without weight_grad) and policy_loss_from_logits, with their gradients."""
    call = Call(data.draw)
    objective = drawn_objective(data.draw)
    note(str(objective))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 5), max_size=call.n)) or [1])
    lengths = lengths[lengths.cumsum(0) < call.n]
    cu = torch.tensor([0, *lengths.cumsum(0).tolist(), *([call.n] if call.n else [])], dtype=torch.int32)
    b = len(cu) - 1
    advantages = torch.randn(b if data.draw(st.booleans()) else call.n, generator=call.g)
    advantages[::3] = 0
    leaves = [t.detach().double().requires_grad_() for t in (call.hidden, call.weight)]
    raw = call.exact_head(*leaves)
    z, tolerance = call.exact(raw), call.tolerance(raw.detach())
    logp, entropy = reference.logprobs_and_entropy(z, call.targets)
    shift = torch.randn(2, call.n, generator=call.g) * data.draw(st.sampled_from([0.01, 0.3, 2.0]))
    given_logprobs = (logp.detach() + shift.double()).float()
    behavior = given_logprobs[0] if data.draw(st.booleans()) else None
    options: dict[str, Any] = {
        "objective": objective, "behavior_logprobs": behavior, "reference_logprobs": given_logprobs[1],
        "normalizer": data.draw(st.none() | log_uniform(0.1, 1e4)),
    }  # fmt: skip
    tokens = call.targets, advantages, cu
    hidden, weight, logits = (t.detach().requires_grad_() for t in (call.hidden, call.weight, call.logits))
    buffer = torch.ones(weight.shape, dtype=reference.computing_dtype(weight)) if data.draw(st.booleans()) else None
    with use_backend(call.backend) if call.backend else torch.enable_grad():
        got = linear_policy_loss(
            hidden, weight, *tokens, bias=call.bias, weight_grad=buffer, skip_zero_rows=data.draw(st.booleans()),
            **options, **call.scaling,
        )  # fmt: skip
        got.loss.backward()
        other = policy_loss_from_logits(logits, *tokens, **options, **call.scaling)
        other.loss.backward()
    assert other.loss.dim() == 0 and logits.grad.shape == logits.shape
    exact_options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    want, _ = reference.policy_loss(logp, entropy, advantages.double(), cu, **exact_options)
    wanted = torch.autograd.grad(want, leaves, allow_unused=True)
    wanted = [torch.zeros_like(t) if g is None else g for g, t in zip(wanted, leaves, strict=True)]
    if not call.n:
        assert got.loss == 0 and hidden.grad.shape == hidden.shape
        return
    # Where a ratio lies at a bound, or is too large to be told apart, either side is right.
    sequence_of = torch.repeat_interleave(torch.diff(cu.long()))
    log_ratio = definition.log_ratios(
        objective, logp.detach(), exact_options["behavior_logprobs"], sequence_of, torch.diff(cu.long())
    )
    ratio, most = log_ratio.exp(), 1e-5 + 8 * float(tolerance.max())
    bounds = [1 - objective.clip_low, 1 + objective.clip_high, objective.dual_clip or -1.0]
    bounds += [objective.importance_floor, objective.importance_cap]
    if most > 0.01 or any(((ratio - x).abs() <= 4 * most * (1 + x)).any() for x in bounds):
        return
    each = advantages.double() if len(advantages) == call.n else advantages.double()[sequence_of]
    weights = definition.token_weights(objective, torch.diff(cu.long()), sequence_of, options["normalizer"]).double()
    kl_size = objective.kl_coef * (1 + (logp.detach() - given_logprobs[1].double()).abs().exp())
    slope = weights * (each.abs() * ratio.clamp(min=1) * (1 + logp.detach().abs()) + kl_size)
    if objective.kind == "gspo":
        slope = slope.new_full(slope.shape, float(slope.sum()))
    size = float((slope + weights * objective.entropy_coef * math.log(call.v + 1)).sum())
    near("loss", got.loss.detach(), want.detach(), torch.tensor(20 * most * size + 1e-30))
    with torch.no_grad():
        bound = dz_bound(call, z, slope, weights * objective.entropy_coef)
        share, smallest = 4 * EPSILON[call.dtype], 1e-7 if call.dtype == torch.float16 else 1e-30
        allowed = 60 * most * (bound @ leaves[1].abs()) + share * wanted[0].abs() + smallest
        near("hidden.grad", hidden.grad, wanted[0], allowed)
        allowed = 60 * most * (bound.T @ leaves[0].abs()) + share * wanted[1].abs() + smallest
        if buffer is None:
            near("weight.grad", weight.grad, wanted[1], allowed)
        else:
            near("weight_grad", buffer - 1, wanted[1], allowed + 2.5e-7)


CHECKS = {"logprobs": check_logprobs, "samples": check_samples, "losses": check_losses}


@pytest.mark.timeout(SECONDS * 10 + 300)
@pytest.mark.parametrize("name", CHECKS)
def test_accepted_calls_equal_float64(name: str) -> None:
    keep_drawing(CHECKS[name])


#: argument -> values that are refused whatever the rest is.
BAD: dict[str, list[Any]] = {
    "hidden": [None, 1.0, torch.zeros(3), torch.zeros(6, 5), torch.zeros(6, 4).int(), torch.zeros(6, 4, 1)],
    "weight": [None, torch.zeros(10), torch.zeros(10, 3), torch.zeros(0, 4), torch.zeros(10, 4).double()],
    "targets": [None, torch.zeros(5).long(), torch.zeros(6), torch.full((6,), 10), torch.full((6,), -1)],
    "bias": [torch.zeros(9), torch.zeros(10, 1), torch.zeros(10).long(), 3.0],
    "temperature": [0, -1.0, math.nan, 1e-46, "1", None, True, torch.ones(5), torch.tensor(1.0), -torch.ones(6)],
    "softcap": [0.0, -3.0, math.nan, math.inf, 1e-46, 1e39, "1", torch.ones(1)],
    "logit_scale": [0.0, math.nan, math.inf, "2", None, torch.ones(1)],
    "advantages": [None, torch.zeros(3), torch.zeros(6).long(), torch.zeros(2, 1)],
    "cu_seqlens": [None, torch.tensor([0, 7, 6]), torch.tensor([1, 2, 6]), torch.zeros(0).int(), torch.ones(3)],
    "behavior_logprobs": [torch.zeros(5), torch.zeros(6).long(), [0.0] * 6],
    "reference_logprobs": [torch.zeros(7), torch.zeros(6, 1)],
    "normalizer": [0, -1, math.nan, math.inf, torch.zeros(2), torch.tensor(-1.0), torch.tensor(math.nan), "3"],
    "weight_grad": [torch.zeros(10, 3), torch.zeros(10, 4).half(), torch.zeros(1, 4).expand(10, 4), 0.0],
    "gradient_threshold": [-1, 1.0, math.nan, None, "0"],
    "skip_zero_rows": [None, 1, "yes"],
    "objective": [None, "ppo"],
    "seed": [None, 1.5, 2**64, torch.zeros(1).long(), torch.tensor(1.0)],
    "sequence_ids": [None, torch.zeros(5).long(), torch.zeros(6)],
    "positions": [None, torch.zeros(6).int(), torch.full((6,), -1), torch.full((6,), 2**32)],
    "top_k": [-1, 2**63, 2**70, 1.5, None, True],
    "top_p": [0.0, -1.0, 1.5, math.nan, "1", None],
    "min_p": [-0.1, 1.5, math.nan, "1", None],
}  # fmt: skip
CU = torch.tensor([0, 2, 6], dtype=torch.int32)
HEAD = {"hidden": torch.ones(6, 4), "weight": torch.ones(10, 4), "bias": None}
STREAM = {"seed": 0, "sequence_ids": torch.arange(6), "positions": torch.arange(6)}
SCALING = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0}
FILTERS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
TOKENS = {
    "targets": torch.arange(6), "advantages": torch.ones(2), "cu_seqlens": CU, "objective": PolicyObjective(),
    "behavior_logprobs": None, "reference_logprobs": None, "normalizer": None, **SCALING,
}  # fmt: skip
ACCEPTED: dict[Any, dict[str, Any]] = {
    linear_logprobs: {**HEAD, "targets": torch.arange(6), **SCALING},
    linear_sample: {**HEAD, **STREAM, **SCALING, **FILTERS},
    linear_policy_loss: {**HEAD, **TOKENS, "weight_grad": None, "gradient_threshold": 0.0, "skip_zero_rows": True},
    sample_from_logits: {"logits": torch.ones(6, 10), **STREAM, **SCALING, **FILTERS},
    logprobs_from_logits: {"logits": torch.ones(6, 10), "targets": torch.arange(6), "temperature": 1.0},
    policy_loss_from_logits: {"logits": torch.ones(6, 10), **TOKENS},
}


@pytest.mark.parametrize("operation", ACCEPTED, ids=lambda f: f.__name__)
def test_refused_calls_name_the_argument(operation: Any) -> None:
    """Every bad value of every argument, alone and beside another one: the error names one of the bad ones."""
    good = ACCEPTED[operation]
    operation(**good)
    names = [name for name in good if name in BAD]
    for name in names:
        for value in BAD[name]:
            for other in [None, *names]:
                if other == name:
                    continue
                bad = {name: value} if other is None else {name: value, other: BAD[other][0]}
                with pytest.raises((ValueError, TypeError)) as caught:
                    operation(**{**good, **bad})
                said = str(caught.value)
                assert any(re.search(rf"\b{n}\b", said) for n in bad), f"{bad}: {caught.type.__name__}: {said}"


@pytest.mark.timeout(SECONDS * 2 + 1500)
def test_the_compiled_core() -> None:
    """tests/native/core_fuzz.cpp under the sanitizers, built on first use (make sanitize builds the same)."""
    tools = [shutil.which(name, path=f"{ROOT / '.venv/bin'}:{os.environ['PATH']}") for name in ("cmake", "ninja")]
    if None in tools or shutil.which("c++") is None:
        pytest.skip("needs cmake, ninja and a C++ compiler")
    cmake, ninja = map(str, tools)
    build = ROOT / "build" / "sanitize"
    configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    subprocess.run([*configure, "-DBANDIT_RFT_SANITIZE=ON"], check=True, capture_output=True)
    subprocess.run([cmake, "--build", build, "--target", "core_fuzz"], check=True, capture_output=True)
    command = [build / "core_fuzz", str(SECONDS / 2), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert " 0 failed" in done.stdout
