"""A batch for verl's policy losses, and how far ours are from its own: for the tests and the table of parity."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bandit_rft.integrations import verl as integration

MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
WHOLE: dict[str, Any] = {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 12, "loss_scale_factor": 9}
LENGTHS = [4, 7, 1, 5, 0, 6]


def responses() -> dict[str, Any]:
    """Six responses, one of them empty; ratios beyond every bound; one advantage a response, one of them 0."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), max(LENGTHS) + 1)
    mask = (torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    log_prob = -2 + torch.randn(shape, generator=generator, dtype=torch.float64)
    old = log_prob + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    old[1, 1], old[3, 2], old[0, 1] = log_prob[1, 1] - 3, log_prob[3, 2] + 30, log_prob[0, 1] - 30
    advantages = torch.tensor([1.3, -0.8, 0.0, -1.7, 0.4, 0.9], dtype=torch.float64)[:, None].expand(shape)
    return {"old_log_prob": old, "log_prob": log_prob, "advantages": advantages, "response_mask": mask}


def config(whole: bool = False, **options: Any) -> SimpleNamespace:
    fields = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0, **options}
    return SimpleNamespace(**fields, global_batch_info=dict(WHOLE) if whole else {})


def both(given: dict[str, Any], of: Any) -> tuple[Tensor, Tensor]:
    """(loss, its gradient with respect to log_prob)."""
    leaf = given["log_prob"].clone().requires_grad_()
    loss = of({**given, "log_prob": leaf})
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def importance(given: dict[str, Any], kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = given["log_prob"].shape if kind != "gspo" else (len(LENGTHS), 1)
    return (0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)).exp().expand(given["log_prob"].shape)


def actor_config(options: SimpleNamespace) -> Any:
    from verl.workers.config import FSDPActorConfig

    made = FSDPActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=options.clip_ratio,
        clip_ratio_low=options.clip_ratio_low, clip_ratio_high=options.clip_ratio_high,
        clip_ratio_c=options.clip_ratio_c,
    )  # fmt: skip
    made.global_batch_info.update(options.global_batch_info)
    return made


def parity_table() -> str:
    """Every policy loss by every aggregation: the largest error of loss and gradient against verl's own, float32."""
    from verl.trainer.ppo import core_algos

    given = {name: value.float() if value.is_floating_point() else value for name, value in responses().items()}
    lines = ["| | " + " | ".join(f"`{mode}`" for mode in MODES) + " |", "|---|" + "---|" * len(MODES)]
    for kind, ours in integration.LOSSES.items():
        for weighted in (False, True):
            cells = []
            for mode in MODES:
                worst = 0.0
                for whole in (False, True):
                    more = {
                        "loss_agg_mode": mode, "config": actor_config(config(whole)),
                        "rollout_is_weights": importance(given, kind).float() if weighted else None,
                    }  # fmt: skip
                    (loss, gradient), (theirs, their_gradient) = (
                        both(given, lambda g, f=f, m=more: f(**g, **m)[0])
                        for f in (ours, getattr(core_algos, f"compute_policy_loss_{kind}"))
                    )
                    of_gradient = float((gradient - their_gradient).abs().max() / their_gradient.abs().max())
                    terms = float((their_gradient * given["log_prob"]).abs().sum())  # a loss may be a small difference
                    worst = max(worst, of_gradient, float((loss - theirs).abs()) / terms)
                cells.append(f"{worst:.0e}".replace("e-0", "e-").replace("0e+00", "0"))
            lines.append(f"| `{kind}`{', rollout_is_weights' if weighted else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
