"""The operations as torch sees them: opcheck, torch.compile(fullgraph=True), and what they cost to import."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from ops_cases import OBJECTIVES, Case

from bandit_rft import linear_logprobs, linear_policy_loss, linear_sample, logprobs_from_logits, sample_from_logits
from bandit_rft.ops import PolicyObjective, policy_loss_from_logits
from bandit_rft.ops.token_arguments import ObjectiveFields

OPS = torch.ops.bandit_rft


def sampling_arguments(rows: int) -> tuple[torch.Tensor, ...]:
    return torch.tensor(3), torch.arange(rows), torch.zeros(rows, dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_opcheck(dtype: torch.dtype) -> None:
    case = Case.make(12, 8, 60, bias=True, dtype=dtype)
    hidden, weight, bias = case.leaves()
    scaling = (1.0, torch.rand(12) + 0.5, 20.0, 1.5)
    torch.library.opcheck(OPS.linear_logprobs.default, (hidden, weight, bias, case.targets, *scaling))
    logits = torch.randn(12, 60).to(dtype).requires_grad_()
    torch.library.opcheck(OPS.logits_logprobs.default, (logits, case.targets, 0.7, None))
    seed, ids, positions = sampling_arguments(12)
    filters = (5, 0.9, 0.01)
    torch.library.opcheck(
        OPS.linear_sample.default,
        (hidden.detach(), weight.detach(), bias.detach(), seed, ids, positions, *scaling, *filters),
    )
    torch.library.opcheck(OPS.logits_sample.default, (logits.detach(), seed, ids, positions, *scaling, *filters))
    lengths = torch.diff(case.cu_seqlens.long())
    sequence_of = torch.repeat_interleave(lengths)
    tokens = (
        case.targets, case.advantages[sequence_of], torch.full((12,), 1 / 12), case.behavior, case.reference,
        sequence_of, lengths, case.cu_seqlens,
    )  # fmt: skip
    for of in (PolicyObjective("ppo", kl="k3", kl_coef=0.1, entropy_coef=0.01), PolicyObjective("gspo")):
        objective = ObjectiveFields.of(of)
        torch.library.opcheck(
            OPS.linear_policy_loss.default,
            (hidden, weight, bias, *tokens, *scaling, *objective, True, 0.0, [True, True, True]),
        )
        torch.library.opcheck(OPS.logits_policy_loss.default, (logits, *tokens, *scaling, *objective, True))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(compiler: str) -> None:
    case = Case.make(12, 8, 60, bias=True)
    objective = OBJECTIVES["ppo-kl3-entropy"]
    seed, ids, positions = sampling_arguments(12)

    def step(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = hidden * 1.5  # something for the compiler to do on either side of the operations
        logp, entropy = linear_logprobs(hidden, weight, case.targets, bias=bias, return_entropy=True)
        result = linear_policy_loss(
            hidden, weight, case.targets, case.advantages, case.cu_seqlens, objective=objective,
            behavior_logprobs=case.behavior, reference_logprobs=case.reference, bias=bias,
        )  # fmt: skip
        logits = hidden @ weight.T
        more = policy_loss_from_logits(
            logits, case.targets, case.advantages, case.cu_seqlens, objective=OBJECTIVES["gspo"]
        )
        other = logprobs_from_logits(logits, case.targets)
        drawn = linear_sample(hidden, weight, seed=seed, sequence_ids=ids, positions=positions, top_k=5)
        again = sample_from_logits(logits, seed=4, sequence_ids=ids, positions=positions)
        total = 3 * result.loss + more.loss + logp.sum() + (entropy * entropy).sum() + other.sum()
        return total, drawn.tokens, again.tokens, result.stats["kl_k3"]

    eager_leaves, leaves = case.leaves(), case.leaves()
    expected = step(*eager_leaves)
    expected[0].backward()
    got = torch.compile(step, fullgraph=True, backend=compiler)(*leaves)
    got[0].backward()
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
    for g, e in zip(leaves, eager_leaves, strict=True):
        torch.testing.assert_close(g.grad, e.grad, rtol=1e-4, atol=1e-5)


def test_import_is_light() -> None:
    """torch and numpy alone, and less than 0.3 s beyond `import torch`."""
    script = """
import time, sys, torch
before = time.perf_counter()
import bandit_rft.ops
print(time.perf_counter() - before)
assert not {"transformers", "datasets", "yaml", "rich", "torch._dynamo"} & set(sys.modules), "too much is imported"
bandit_rft.logprobs_from_logits(torch.randn(2, 3), torch.tensor([0, 1]))
assert "torch._dynamo" not in sys.modules, "the first call imports the compiler"
"""
    seconds = min(
        float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    )
    assert seconds < 0.3


def test_kernels_are_installed() -> None:
    import bandit_rft.kernels

    assert bandit_rft.kernels.__doc__
