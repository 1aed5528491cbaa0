"""Log-probabilities whose gradients are ready with them: those of linear_logprobs and of any loss, foretold or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bandit_rft import ops
from bandit_rft.ops.expected import Expectation, Outcome, expected_logprobs
from bandit_rft.ops.objective import PolicyObjective, token_losses

N, H, V = 29, 16, 53
OBJECTIVES = {
    "reinforce": PolicyObjective("reinforce"),
    "importance": PolicyObjective("importance", importance_cap=1.1),
    "ppo": PolicyObjective("ppo", clip_high=0.28, dual_clip=1.5),
    "cispo": PolicyObjective("cispo"),
    "ppo, kl": PolicyObjective("ppo", kl="k3", kl_coef=0.3),
}


def case(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Advantages of which a third are 0, uneven weights, ratios beyond the bounds."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    targets, bias = torch.randint(0, V, (N,)), torch.randn(V, dtype=dtype)
    advantages = torch.randn(N, dtype=dtype)
    advantages[::3] = 0
    logp = ops.linear_logprobs(hidden, weight, targets, bias=bias, temperature=0.8, softcap=9.0)
    assert isinstance(logp, Tensor)
    near = {name: logp + 0.4 * torch.randn(N, dtype=dtype) for name in ("behavior_logprobs", "reference_logprobs")}
    return {
        "leaves": (hidden, weight, bias), "targets": targets, "advantages": advantages,
        "weights": torch.rand(N, dtype=dtype) / N, **near,
    }  # fmt: skip


def loss_of(objective: PolicyObjective, given: dict[str, Any], logp: Tensor, entropy: Tensor) -> Tensor:
    of = token_losses(
        objective, logp, entropy, given["advantages"], given["behavior_logprobs"], given["reference_logprobs"],
        torch.zeros(N).long(), torch.tensor([N]),
    )  # fmt: skip
    return 0.37 * (given["weights"] * of).sum()  # the factor is nobody's to know


def run(
    given: dict[str, Any], objective: PolicyObjective, expected: PolicyObjective | None, more: Any = None
) -> tuple[list[Tensor], Outcome]:
    """(logprobs, entropy, loss, gradients of hidden, weight and bias), by linear_logprobs where nothing is expected."""
    hidden, weight, bias = leaves = [x.clone().requires_grad_() for x in given["leaves"]]
    options: dict[str, Any] = {"bias": bias, "temperature": 0.8, "softcap": 9.0}
    outcome = Outcome()
    if expected is None:
        seen: Any = ops.linear_logprobs(hidden, weight, given["targets"], return_entropy=True, **options)
    else:
        names = ("advantages", "weights", "behavior_logprobs", "reference_logprobs")
        expectation = Expectation(expected, *(given[name] for name in names))
        seen = expected_logprobs(hidden, weight, given["targets"], expectation, outcome, **options)
    loss = loss_of(objective, given, *seen) + (0 if more is None else more(*seen))
    return [x.detach() for x in (*seen, loss, *torch.autograd.grad(loss, leaves))], outcome


def same(found: list[Tensor], true: list[Tensor], within: float = 1e-5) -> None:
    for mine, exact in zip(found, true, strict=True):
        torch.testing.assert_close(mine, exact, rtol=within, atol=within * exact.abs().max().item())


@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", torch.float32), ("torch", torch.float32), ("torch", torch.float64)]
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_expected_loss(name: str, backend: str, dtype: torch.dtype) -> None:
    given = case(dtype)
    with ops.use_backend(backend):
        found, outcome = run(given, OBJECTIVES[name], OBJECTIVES[name])
        same(found, run(given, OBJECTIVES[name], None)[0])
    assert (outcome.came_true, outcome.computed_again) == (1, 0)


@pytest.mark.parametrize(
    "more",
    [
        lambda logp, entropy: 1e-4 * logp.square().mean(),
        lambda logp, entropy: 0.01 * entropy.mean(),
        lambda logp, entropy: 1e-4 * logp[3],  # of a token with advantage 0
    ],
)
def test_any_other_loss_is_computed_again(more: Any) -> None:
    given, objective = case(), OBJECTIVES["ppo"]
    found, outcome = run(given, objective, objective, more)
    same(found, run(given, objective, None, more)[0])
    assert (outcome.came_true, outcome.computed_again) == (0, 1)
    found, outcome = run(given, OBJECTIVES["cispo"], objective)
    same(found, run(given, OBJECTIVES["cispo"], None)[0])
    assert (outcome.came_true, outcome.computed_again) == (0, 1)


def test_a_loss_of_zero_and_advantages_of_zero() -> None:
    given, objective = case(), OBJECTIVES["ppo"]
    nothing = {**given, "advantages": torch.zeros(N)}
    found, outcome = run(nothing, objective, objective)
    assert outcome.came_true == 1 and not any(g.any() for g in found[3:])
    same(found[:2], run(given, objective, None)[0][:2])
    # expected to be zero, and is not
    nothing = {**given, "weights": torch.zeros(N)}
    found, outcome = run(nothing, objective, objective, lambda logp, entropy: logp.mean())
    same(found, run(nothing, objective, None, lambda logp, entropy: logp.mean())[0])
    assert outcome.computed_again == 1


def test_frozen_parts_get_no_gradient() -> None:
    given = case()
    expectation = Expectation(OBJECTIVES["ppo"], given["advantages"], given["weights"], given["behavior_logprobs"])
    for frozen in range(2):
        leaves = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(given["leaves"])]
        logp, entropy = expected_logprobs(
            leaves[0], leaves[1], given["targets"], expectation, Outcome(), bias=leaves[2], temperature=0.8, softcap=9.0
        )
        loss_of(OBJECTIVES["ppo"], given, logp, entropy).backward()
        true = run(given, OBJECTIVES["ppo"], None)[0][3:]
        for i, (leaf, gradient) in enumerate(zip(leaves, true, strict=True)):
            assert (leaf.grad is None) == (i == frozen)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def test_what_cannot_be_expected_is_refused() -> None:
    for objective in (PolicyObjective("gspo"), PolicyObjective("ppo", entropy_coef=0.1)):
        with pytest.raises(ValueError, match="a kind other than gspo, and have no entropy term"):
            Expectation(objective, torch.zeros(1), torch.zeros(1))
    given = case()
    expectation = Expectation(OBJECTIVES["reinforce"], given["advantages"], given["weights"])
    for wrong in (given["targets"] + V, given["targets"].index_fill(0, torch.tensor([4]), -100)):
        with pytest.raises(ValueError, match="targets"):
            expected_logprobs(*given["leaves"][:2], wrong, expectation, Outcome())
    hidden, weight = (x.requires_grad_() for x in given["leaves"][:2])
    logp, _ = expected_logprobs(hidden, weight, given["targets"], expectation, Outcome())
    (gradient,) = torch.autograd.grad(-(logp * given["advantages"] * given["weights"]).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
