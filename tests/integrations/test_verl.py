"""The functions of verl's actor: against their definition written out in float64, and against verl's own where it is
installed (`pip install verl`; it needs Ray to be imported, though nothing here runs it).
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from verl_parity import MODES, actor_config, both, config, importance, responses

from bandit_rft.integrations import verl as integration

HAS_VERL = find_spec("verl") is not None


@pytest.fixture
def batch() -> dict[str, Any]:
    return responses()


def aggregated(losses: Tensor, mask: Tensor, mode: str, info: dict[str, Any]) -> Tensor:
    """The sums of docs/guides/from-verl.md, a response at a time."""
    ranks, length = info.get("dp_size", 1), info.get("loss_scale_factor") or mask.shape[1]
    rows = [row[counts.bool()] for row, counts in zip(losses, mask, strict=True)]
    tokens = info.get("batch_num_tokens") or sum(len(row) for row in rows)
    responses = info.get("global_batch_size") or sum(len(row) > 0 for row in rows)
    total = torch.stack([row.sum() for row in rows]).sum()
    if mode == "seq-mean-token-mean":
        total = torch.stack([row.mean() for row in rows if len(row)]).sum()
    divisor = {"token-mean": tokens, "token-sum": 1, "seq-mean-token-sum-norm": responses * length}.get(mode, responses)
    return total / divisor * ranks


def defined(kind: str, given: dict[str, Any], options: SimpleNamespace, weights: Tensor | None) -> Tensor:
    """Token losses [B, T] by their formulas (arXiv 1707.06347, 1912.09729, 2507.18071, 2506.13585)."""
    logp, adv, mask = given["log_prob"], given["advantages"], given["response_mask"].double()
    difference = (logp - given["old_log_prob"]).clamp(-20, 20)
    low, high, c = options.clip_ratio_low, options.clip_ratio_high, options.clip_ratio_c
    if kind == "gspo":
        mean = ((logp - given["old_log_prob"]) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        ratio = (logp - logp.detach() + mean.detach()).clamp(max=10).exp()
    else:
        ratio = difference.exp()
    bounded = ratio.clamp(1 - low, 1 + high)
    if kind == "gpg":
        losses = -adv * logp
    elif kind == "cispo":
        losses = -bounded.detach() * adv * logp
    else:
        losses = -torch.minimum(ratio * adv, bounded * adv)
        if kind == "vanilla":
            losses = torch.where(adv < 0, torch.minimum(losses, -c * adv), losses)
    return losses if weights is None else losses * weights


@pytest.mark.parametrize("kind", integration.LOSSES)
def test_losses_are_their_definition(batch: dict[str, Any], kind: str) -> None:
    for mode, whole, weighted in product(MODES, (False, True), (False, True)):
        options, weights = config(whole), importance(batch, kind) if weighted else None

        def ours(given: dict[str, Any], mode: str = mode, options: Any = options, weights: Any = weights) -> Tensor:
            function = integration.LOSSES[kind]
            return function(**given, loss_agg_mode=mode, config=options, rollout_is_weights=weights)[0]

        def definition(
            given: dict[str, Any], mode: str = mode, options: Any = options, weights: Any = weights
        ) -> Tensor:
            losses = defined(kind, given, options, weights)
            return aggregated(losses, given["response_mask"], mode, options.global_batch_info)

        (loss, gradient), (theirs, theirs_gradient) = both(batch, ours), both(batch, definition)
        torch.testing.assert_close(loss, theirs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradient, theirs_gradient, rtol=1e-7, atol=1e-9)
        assert gradient.any() and not gradient[batch["response_mask"] == 0].any()


def test_every_bound_acts_on_these_inputs(batch: dict[str, Any]) -> None:
    metrics = integration.compute_policy_loss_vanilla(**batch, config=config())[1]
    assert metrics["actor/pg_clipfrac"] > 0.1 and metrics["actor/pg_clipfrac_lower"] > 0
    assert integration.compute_policy_loss_gspo(**batch, config=config())[1]["actor/pg_clipfrac"] > 0


def test_extreme_ratios_have_finite_gradients(batch: dict[str, Any]) -> None:
    far = {
        **batch,
        "old_log_prob": batch["log_prob"] - torch.tensor([1000.0, -1000.0, 800.0, 900.0, 0.0, -900.0])[:, None],
    }
    for kind, function in integration.LOSSES.items():
        loss, gradient = both(far, lambda given, f=function: f(**given, config=config())[0])
        assert loss.isfinite() and gradient.isfinite().all(), kind


def test_log_probabilities_and_entropy() -> None:
    """Of [T] and [B, T] tokens, at one temperature and one a token, against float64."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 16), torch.randn(33, 16)
    labels = torch.randint(0, 33, (2, 5))
    factor = torch.randn(2, 5)
    for temperature in (0.7, torch.linspace(0.5, 2, 10).view(2, 5)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        logp, entropy = integration.FusedLinearForPPO()(*leaves, labels, temperature)
        grads = torch.autograd.grad((factor * logp).sum() + entropy.sum(), leaves)

        exact = [x.double().requires_grad_() for x in (hidden, weight)]
        divisor = temperature[..., None].double() if isinstance(temperature, Tensor) else temperature
        rows = torch.log_softmax(exact[0] @ exact[1].T / divisor, -1)
        own, own_entropy = rows.gather(-1, labels[..., None])[..., 0], -(rows.exp() * rows).sum(-1)
        own_grads = torch.autograd.grad((factor.double() * own).sum() + own_entropy.sum(), exact)
        assert logp.shape == entropy.shape == labels.shape
        for mine, true in zip((logp, entropy, *grads), (own, own_entropy, *own_grads), strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-5)
    logits = (hidden @ weight.T).requires_grad_()
    found = integration.logprobs_from_logits(logits, labels)
    torch.testing.assert_close(found, torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0])


def test_what_is_refused(batch: dict[str, Any]) -> None:
    hidden, weight, labels = torch.randn(3, 4), torch.randn(7, 4), torch.zeros(3).long()
    for message, arguments in (
        ("dist_process_group must be None", {"dist_process_group": object()}),
        ("reduction must be 'none'; got 'mean'", {"reduction": "mean"}),
    ):
        with pytest.raises(ValueError, match=message):
            integration.linear_cross_entropy(hidden, weight, labels, **arguments)
    with pytest.raises(ValueError, match=r"labels must be \[3\] to match hidden; got \[2\]"):
        integration.linear_cross_entropy(hidden, weight, labels[:2])
    varied = {**batch, "advantages": batch["advantages"] * torch.linspace(1, 2, batch["advantages"].shape[1])}
    with pytest.raises(ValueError, match="advantages must be one number a response for gspo"):
        integration.compute_policy_loss_gspo(**varied, config=config())
    with pytest.raises(ValueError, match="rollout_is_weights must be one number a response for gspo"):
        integration.compute_policy_loss_gspo(**batch, config=config(), rollout_is_weights=varied["advantages"])
    for message, options in (
        (r"clip_ratio_c must lie between 1 and e\^20; got 1", {"clip_ratio_c": 1.0}),
        ("clip_ratio_high must be a finite number >= 0; got -0.1", {"clip_ratio_high": -0.1}),
    ):
        with pytest.raises(ValueError, match=message):
            integration.compute_policy_loss_vanilla(**batch, config=config(**options))
    with pytest.raises(ValueError, match="config must be given"):
        integration.compute_policy_loss_vanilla(**batch)
    with pytest.raises(ValueError, match=r"loss_agg_mode must be one of token-mean, .*; got 'mean'"):
        integration.compute_policy_loss_vanilla(**batch, loss_agg_mode="mean", config=config())
    with pytest.raises(ValueError, match="batch_num_tokens must be given for dp_size=2"):
        integration.token_weights(batch["response_mask"], "token-mean", dp_size=2)
    with pytest.raises(ValueError, match=r"advantages must be \[6, 8\], as log_prob is; got \[6\]"):
        integration.compute_policy_loss_vanilla(**{**batch, "advantages": torch.ones(6)}, config=config())


def test_no_lower_bound_is_any_above_one(batch: dict[str, Any]) -> None:
    """cispo's usual clip_ratio_low=10: the ratio is above 0 anyway."""
    a, b = (integration.compute_policy_loss_cispo(**batch, config=config(clip_ratio_low=x))[0] for x in (1.0, 10.0))
    assert a == b


@pytest.mark.skipif(HAS_VERL, reason="verl is installed")
def test_without_verl_installing_says_so() -> None:
    with pytest.raises(ImportError, match="needs verl"):
        integration.install()


# --- against verl itself ----------------------------------------------------------------------------------------------

with_verl = pytest.mark.skipif(not HAS_VERL, reason="pip install verl==0.9.1 to compare with it")


@with_verl
@pytest.mark.parametrize("kind", integration.LOSSES)
def test_losses_and_metrics_are_verls(batch: dict[str, Any], kind: str) -> None:
    from verl.trainer.ppo import core_algos

    given = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
    theirs = getattr(core_algos, f"compute_policy_loss_{kind}")
    for mode, whole, weighted in product(MODES, (False, True), (False, True)):
        options, weights = actor_config(config(whole)), importance(batch, kind).float() if weighted else None
        seen: dict[Any, dict[str, Any]] = {}

        def run(given: dict[str, Any], function: Any, seen: Any = seen, o: Any = options, w: Any = weights) -> Tensor:
            loss, seen[function] = function(**given, loss_agg_mode=mode, config=o, rollout_is_weights=w)  # noqa: B023
            return loss  # type: ignore[no-any-return]

        ours = integration.LOSSES[kind]
        (loss, gradient), (their_loss, their_gradient) = (
            both(given, lambda g, f=f: run(g, f)) for f in (ours, theirs)
        )  # fmt: skip
        torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-6)
        largest = their_gradient.abs().max().item()
        torch.testing.assert_close(gradient, their_gradient, rtol=0, atol=1e-5 * largest)
        assert seen[ours].keys() == seen[theirs].keys()
        for name, value in seen[theirs].items():
            assert seen[ours][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@with_verl
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_gradients_are_those_of_its_forward(temperature: float) -> None:
    from tiny_models import tiny_llama
    from verl.models.transformers.dense_common import forward_with_torch_backend
    from verl.utils.experimental import torch_functional

    ids = torch.randint(3, 40, (2, 11), generator=torch.Generator().manual_seed(0))
    theirs = torch_functional.FusedLinearForPPO
    found = []
    for head in (theirs, integration.FusedLinearForPPO):
        torch_functional.FusedLinearForPPO = head
        try:
            model = tiny_llama()
            output = forward_with_torch_backend(model, input_ids=ids, temperature=temperature, return_dict=True)
        finally:
            torch_functional.FusedLinearForPPO = theirs
        (output.log_probs[:, 4:-1].sum() + 0.1 * output.entropy.mean()).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((output.log_probs.detach(), output.entropy.detach(), grads))
    torch.testing.assert_close(found[1][:2], found[0][:2], rtol=1e-5, atol=1e-5)
    assert found[0][2].keys() == found[1][2].keys()
    for name, gradient in found[0][2].items():
        torch.testing.assert_close(found[1][2][name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


@with_verl
def test_as_an_external_module() -> None:
    code = (
        "import verl\n"
        "from verl.trainer.ppo.core_algos import get_policy_loss_fn\n"
        "from verl.utils.experimental.torch_functional import FusedLinearForPPO\n"
        "from bandit_rft.integrations import verl as ours\n"
        "assert all(get_policy_loss_fn(name) is function for name, function in ours.LOSSES.items())\n"
        "assert FusedLinearForPPO is ours.FusedLinearForPPO\n"
        "print(get_policy_loss_fn('sapo').__module__)\n"
    )
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "bandit_rft.integrations.verl_external"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "verl.trainer.ppo.core_algos" in done.stdout  # what we have not is verl's own
