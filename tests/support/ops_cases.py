"""Inputs for the operations' tests, and the rule by which a backend passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bandit_rft.ops import PolicyObjective, backends, reference

#: With kernels of one's own, which a module given by `pytest -p` has registered.
BACKENDS = [
    "torch",
    *(["cpu"] if backends.native is not None else []),
    *backends.registered(backends.Call("cpu", torch.float32)),
]


@dataclass
class Case:
    """Packed tokens of a few sequences with a head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    advantages: Tensor
    cu_seqlens: Tensor
    behavior: Tensor
    reference: Tensor
    scaling: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(
        cls, n: int, h: int, v: int, *, dtype: torch.dtype = torch.float32, bias: bool = False, scale: float = 1.0,
        sequences: int = 4, seed: int = 0, **scaling: Any,
    ) -> Case:  # fmt: skip
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        sequences = min(sequences, n) if n else 0
        cuts = torch.randperm(max(n - 1, 0), generator=g)[: max(sequences - 1, 0)].sort().values + 1
        cu = torch.cat([torch.tensor([0]), cuts, torch.tensor([n])]) if n else torch.tensor([0])
        hidden, weight = normal(n, h).to(dtype), (normal(v, h) * scale / h**0.5).to(dtype)
        targets = torch.randint(v, (n,), generator=g)
        b = normal(v).to(dtype) if bias else None
        if scaling.get("temperature") == "rows":
            scaling["temperature"] = torch.rand(n, generator=g) + 0.5
        case = cls(hidden, weight, b, targets, normal(max(sequences, 0)), cu.int(), hidden, hidden, scaling)
        truth, _ = case.truth()
        case.behavior = (truth + 0.3 * normal(n)).float()
        case.reference = (truth + 0.3 * normal(n)).float()
        return case

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """hidden, weight (and bias) as fresh leaves that require a gradient."""
        tensors = [t for t in (self.hidden, self.weight, self.bias) if t is not None]
        return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]

    def truth(self) -> tuple[Tensor, Tensor]:
        hidden, weight, *bias = self.leaves(torch.float64)
        return reference.linear_logprobs(
            hidden, weight, self.targets, bias=bias[0] if bias else None, **self.doubled_scaling()
        )

    def doubled_scaling(self) -> dict[str, Any]:
        return {k: v.double() if isinstance(v, Tensor) else v for k, v in self.scaling.items()}


#: Every way a head's logits can be transformed, over shapes that are multiples of nothing.
CASES = {
    "plain": dict(n=37, h=24, v=1001),
    "bias": dict(n=20, h=17, v=770, bias=True),
    "one-token": dict(n=1, h=8, v=50),
    "one-word": dict(n=5, h=8, v=1),
    "temperature": dict(n=23, h=32, v=769, temperature=0.6),
    "rows-temperature": dict(n=23, h=32, v=1537, temperature="rows"),
    "softcap": dict(n=19, h=16, v=900, softcap=5.0, scale=6.0),
    "everything": dict(n=29, h=40, v=1100, bias=True, softcap=8.0, logit_scale=0.25, temperature="rows", scale=20.0),
    "confident": dict(n=31, h=64, v=513, scale=25.0),
    "chunked": dict(n=300, h=16, v=2000),
}


def plain_in(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """(logprobs, entropy) as a user would write them in plain PyTorch, in that dtype throughout."""
    hidden, weight, *bias = case.leaves(dtype)
    z = hidden @ weight.T
    if bias:
        z = z + bias[0]
    z = z * case.scaling.get("logit_scale", 1.0)
    if (cap := case.scaling.get("softcap")) is not None:
        z = cap * torch.tanh(z / cap)
    t = case.scaling.get("temperature", 1.0)
    z = z / (t[:, None].to(dtype) if isinstance(t, Tensor) else t)
    every = torch.log_softmax(z, -1)
    logp = every.gather(1, case.targets[:, None])[:, 0]
    return [logp, -(every.exp() * every).sum(-1), hidden, weight, *bias]


def assert_close_to_truth(name: str, got: Tensor, plain: Tensor, truth: Tensor, floor: float = 2e-6) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus a floor relative to the truth's size."""
    error = (got.double() - truth).abs().max().item() if truth.numel() else 0.0
    allowed = 2 * (plain.double() - truth).abs().max().item() if truth.numel() else 0.0
    size = truth.abs().max().item() if truth.numel() else 0.0
    assert error <= allowed + floor * max(size, 1e-3), (
        f"{name}: error {error:.3e}, allowed {allowed:.3e} (size {size:.3e})"
    )


OBJECTIVES = {
    "reinforce": PolicyObjective(),
    "importance": PolicyObjective("importance", "seq-mean-token-sum", importance_cap=1.1),
    "importance_mask": PolicyObjective("importance_mask", importance_floor=0.8, importance_cap=1.2),
    "ppo": PolicyObjective("ppo", "seq-mean-token-mean", clip_low=0.1, clip_high=0.2),
    "ppo-dual": PolicyObjective("ppo", dual_clip=1.2, clip_low=0.1, clip_high=0.2),
    "cispo": PolicyObjective("cispo", "seq-mean-token-sum-norm", clip_low=0.1, clip_high=0.2, norm_length=50),
    "gspo": PolicyObjective("gspo", "seq-mean-token-mean", clip_low=0.3, clip_high=0.3),
    "reinforce-kl1": PolicyObjective(kl="k1", kl_coef=0.1),
    "ppo-kl2": PolicyObjective("ppo", kl="k2", kl_coef=0.1),
    "ppo-kl3-entropy": PolicyObjective("ppo", kl="k3", kl_coef=0.05, entropy_coef=0.02),
    "gspo-entropy": PolicyObjective("gspo", clip_low=0.3, clip_high=0.3, entropy_coef=0.02),
    "importance_mask-kl3-entropy": PolicyObjective(
        "importance_mask", importance_floor=0.8, importance_cap=1.2, kl="k3", kl_coef=0.1, entropy_coef=0.02
    ),
    "importance-entropy": PolicyObjective("importance", "seq-mean-token-sum", entropy_coef=0.5),
}
