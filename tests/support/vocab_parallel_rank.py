"""One rank of a head whose vocabulary is split: every operation against the whole head in the same process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ops_cases import OBJECTIVES, Case

from bandit_rft import PolicyObjective, linear_logprobs, linear_policy_loss, linear_sample
from bandit_rft.ops import use_backend

SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows": {"temperature": "rows", "bias": True, "softcap": 3.0, "logit_scale": 0.7},
    "large": {"scale": 60.0},
    "not counted": {},  # a third of the targets are -100
}


def slices(vocabulary: int, size: int) -> list[slice]:
    """Of unequal size where the vocabulary cannot be divided; beginnings that are no multiple of four."""
    cuts = [round(i * vocabulary / size) for i in range(size + 1)]
    return [slice(*cut) for cut in itertools.pairwise(cuts)]


def difference(a: torch.Tensor, b: torch.Tensor, unit: float = 1e-30) -> float:
    """The largest difference relative to the largest value, or to `unit` if that is larger; NaN must meet NaN."""
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    a, b = a.detach().nan_to_num().double(), b.detach().nan_to_num().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=unit)) if a.numel() else 0.0


def mine(case: Case, part: slice, dtype: torch.dtype) -> list[torch.Tensor]:
    hidden, weight, *bias = case.leaves(dtype)
    own = [weight, *bias]
    return [hidden, *(tensor.detach()[part].clone().requires_grad_() for tensor in own)]


def check_all(rank: int, size: int) -> dict[str, float]:
    """The largest difference of each kind, by case."""
    group, found = dist.group.WORLD, dict[str, float]()
    assert group is not None
    for (kind, options), dtype, vocabulary in itertools.product(
        SCALINGS.items(), (torch.float64, torch.float32, torch.bfloat16), (101, 7)
    ):
        case = Case.make(19, 16, vocabulary, **options)
        if kind == "not counted":
            if (dtype, vocabulary) != (torch.float64, 101):  # once is enough: the rows left out are the same for all
                continue
            case.targets[::3] = -100
        part, name = slices(vocabulary, size)[rank], f"{kind} {dtype} {vocabulary}"
        scaling = dict(case.scaling)
        whole, split = case.leaves(dtype), mine(case, part, dtype)
        bias = {"bias": whole[2]} if len(whole) > 2 else {}
        own_bias = {"bias": split[2]} if len(split) > 2 else {}

        expected = linear_logprobs(whole[0], whole[1], case.targets, **bias, **scaling, return_entropy=True)
        got = linear_logprobs(
            split[0], split[1], case.targets, **own_bias, **scaling, return_entropy=True, process_group=group
        )
        given = torch.randn(2, 19, generator=torch.Generator().manual_seed(3))
        for pair in (expected, got):
            sum((a * b).sum() for a, b in zip(pair, given, strict=True)).backward()
        found[f"{name} logprobs"] = difference(got[0], expected[0])
        found[f"{name} entropy"] = difference(got[1], expected[1])
        found[f"{name} gradients"] = gradients_differ(split, whole, part)

        stream = {"sequence_ids": torch.arange(19) + 2**33, "positions": torch.arange(19) % 5, "seed": 2**63 + 5}
        filters: list[dict[str, Any]] = [{}, {"top_k": 1}, {"top_k": 3, "top_p": 0.8}, {"min_p": 0.2}]
        for chosen in filters:
            with use_backend("torch"), torch.no_grad():
                one = linear_sample(whole[0], whole[1], **bias, **scaling, **stream, **chosen)
                many = linear_sample(split[0], split[1], **own_bias, **scaling, **stream, **chosen, process_group=group)
            found[f"{name} tokens {chosen}"] = float((one.tokens != many.tokens).sum())
            # Of one kept token, log-probability and entropy are 0 but for rounding: differences of numbers of size 1.
            pairs = zip(many[1:], one[1:], strict=True)
            found[f"{name} sample {chosen}"] = max(difference(a, b, unit=1.0) for a, b in pairs)
        for label, objective in OBJECTIVES.items():
            found[f"{name} {label} loss"] = loss_differs(case, objective, part, dtype, group)
    return found


def gradients_differ(split: list[torch.Tensor], whole: list[torch.Tensor], part: slice) -> float:
    pairs = [(split[0].grad, whole[0].grad)]
    pairs += [(a.grad, b.grad[part]) for a, b in zip(split[1:], whole[1:], strict=True) if b.grad is not None]
    return max(difference(a, b) for a, b in pairs if a is not None and b is not None)


def loss_differs(case: Case, objective: PolicyObjective, part: slice, dtype: torch.dtype, group: Any) -> float:
    """The largest difference of loss, statistics, log-probabilities and gradients, both ways that weight's can go."""
    whole, split = case.leaves(dtype), mine(case, part, dtype)
    rest: dict[str, Any] = {
        **case.scaling, "objective": objective, "behavior_logprobs": case.behavior,
        "reference_logprobs": case.reference if objective.kl_coef else None,
    }  # fmt: skip
    advantages = case.advantages.clone()
    advantages[0] = 0  # whose rows are dropped
    results = []
    for tensors, more in ((whole, {}), (split, {"process_group": group})):
        bias = {"bias": tensors[2]} if len(tensors) > 2 else {}
        results.append(
            linear_policy_loss(
                tensors[0], tensors[1], case.targets, advantages, case.cu_seqlens, **bias, **rest, **more
            )
        )
        results[-1].loss.backward()
    one, many = results
    worst = [gradients_differ(split, whole, part), difference(many.loss, one.loss)]
    worst += [difference(many.logprobs, one.logprobs)]
    worst += [difference(many.stats[key], one.stats[key]) for key in one.stats if one.stats[key] != 0]
    gradient = split[1].grad
    assert gradient is not None
    gradient = gradient.to(torch.float64 if dtype == torch.float64 else torch.float32)
    into = gradient.clone()
    again = mine(case, part, dtype)
    bias = {"bias": again[2]} if len(again) > 2 else {}
    linear_policy_loss(
        again[0], again[1], case.targets, advantages, case.cu_seqlens, **bias, **rest,
        process_group=group, weight_grad=into,
    ).loss.backward()  # fmt: skip
    assert again[1].grad is None
    return max(*worst, difference(into, 2 * gradient))


def refusals(rank: int) -> list[str]:
    """What each rank is told where the ranks do not fit together."""
    group, said = dist.group.WORLD, []
    hidden, weight, ids = torch.zeros(2 + rank, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)
    calls = [
        lambda: linear_logprobs(hidden, weight, torch.zeros(len(hidden), dtype=torch.int64), process_group=group),
        lambda: linear_logprobs(hidden[:2], weight, ids + 5 * dist.get_world_size(), process_group=group),
        lambda: linear_logprobs(hidden[:2], weight, ids, process_group="world"),
        lambda: linear_policy_loss(
            hidden[:2], weight, ids, torch.ones(2), torch.arange(3).int(), objective=PolicyObjective(),
            gradient_threshold=0.1, process_group=group,
        ),
    ]  # fmt: skip
    for call in calls:
        try:
            call()
        except (TypeError, ValueError) as error:
            said.append(str(error))
    return said


def run(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    found = {"differences": check_all(rank, size), "refusals": refusals(rank)}
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
