"""The loss and every parameter's gradient against TRL 1.16 and Liger 0.8.5, on the same model, tokens and numbers.

TRL's side is its own GRPOTrainer._compute_loss over a padded batch; Liger's is LigerFusedLinearGRPOLoss over the hidden
states of our packed forward pass. Where a peer defines another loss, the test pins by how much (docs/objectives.md says
why). Needs `pip install trl==1.16.0 liger-kernel==0.8.5`, which are not among the project's requirements.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import character_tokenizer, save_tiny_llama, tiny_llama
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from bandit_rft.advantages import compute_advantages
from bandit_rft.model import Policy
from bandit_rft.ops import PolicyObjective, linear_policy_loss

TEMPERATURE = 0.7
PROMPTS = [[5, 9, 14], [6], [21, 7, 30, 8, 12], [11, 4], [3, 3, 3], [40]]
LENGTHS = [4, 7, 1, 5, 3, 6]
LONGEST = 9  # TRL's max_completion_length
LOW, HIGH, CAP = 0.2, 0.28, 1.28
Result = tuple[Tensor, dict[str, Tensor]]  # loss, gradient of each parameter


@dataclass
class Batch:
    """Six completions of different lengths, some log-probabilities off by 0.3 or so, and one advantage of 0."""

    completions: list[Tensor]
    behavior: list[Tensor] | None
    reference: list[Tensor]
    advantages: Tensor

    def rows(self, start: int, end: int) -> Batch:
        behavior = None if self.behavior is None else self.behavior[start:end]
        return Batch(self.completions[start:end], behavior, self.reference[start:end], self.advantages[start:end])


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    completions = [torch.randint(3, 45, (n,), generator=generator) for n in LENGTHS]
    policy = Policy(tiny_llama())
    with torch.no_grad():
        logprobs = plain_logprobs(*packed(policy, completions, PROMPTS)).split(LENGTHS)

    def near(values: Tensor) -> Tensor:
        return values + 0.3 * torch.randn(len(values), generator=generator)

    return Batch(
        completions, [near(x) for x in logprobs], [near(x) for x in logprobs],
        torch.tensor([1.3, -0.8, 0.6, -1.7, 0.0, 0.9]),
    )  # fmt: skip


def packed(policy: Policy, completions: list[Tensor], prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [N, H], head [V, H], targets [N]) of the completions' tokens, without padding."""
    inputs = [torch.cat([torch.tensor(p), c[:-1]]) for p, c in zip(prompts, completions, strict=True)]
    hidden = policy.hidden_states(torch.cat(inputs), [len(x) for x in inputs])
    rows = [h[len(p) - 1 :] for h, p in zip(hidden.split([len(x) for x in inputs]), prompts, strict=True)]
    return torch.cat(rows), policy.weight, torch.cat(completions)


def plain_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.T / TEMPERATURE, -1).gather(1, targets[:, None])[:, 0]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ours(batch: Batch, objective: PolicyObjective, normalizer: float | None = None, start: int = 0) -> Result:
    policy = Policy(tiny_llama())
    hidden, weight, targets = packed(policy, batch.completions, PROMPTS[start : start + len(batch.completions)])
    lengths = torch.tensor([0, *(len(c) for c in batch.completions)])
    loss = linear_policy_loss(
        hidden, weight, targets, batch.advantages, lengths.cumsum(0).int(), objective=objective,
        behavior_logprobs=None if batch.behavior is None else torch.cat(batch.behavior),
        reference_logprobs=torch.cat(batch.reference), temperature=TEMPERATURE, normalizer=normalizer,
    ).loss  # fmt: skip
    loss.backward()
    return loss.detach(), gradients(policy.model)


def padded(batch: Batch) -> dict[str, Any]:
    """TRL's layout: prompts padded on the left, completions on the right."""
    masks = [torch.ones(len(c), dtype=torch.int64) for c in batch.completions]
    return {
        "completion_ids": pad_sequence(batch.completions, batch_first=True),
        "completion_mask": pad_sequence(masks, batch_first=True),
        "old_per_token_logps": None if batch.behavior is None else pad_sequence(batch.behavior, batch_first=True),
        "ref_per_token_logps": pad_sequence(batch.reference, batch_first=True),
        "advantages": batch.advantages,
    }


def trl_trainer(folder: Path, reward: Any = len, **options: Any) -> Any:
    trl = pytest.importorskip("trl", "1.16", reason="pip install trl==1.16.0 to compare with it")
    from datasets import Dataset

    tokenizer = character_tokenizer()
    tokenizer.padding_side = "left"
    arguments = trl.GRPOConfig(
        **{
            "output_dir": str(folder / "trl"), "per_device_train_batch_size": 6, "num_generations": 3,
            "max_completion_length": LONGEST, "beta": 0.0, "temperature": TEMPERATURE, "report_to": [],
            "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, **options,
        }
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder), reward_funcs=reward, args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 6), processing_class=tokenizer,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def trl(
    folder: Path, batch: Batch, start: int = 0, tokens: int | None = None, left_out: list[int] | None = None,
    **options: Any,
) -> Result:  # fmt: skip
    """What a GRPOTrainer so configured computes for the batch; `tokens`: in the generation batch it is a part of.

    left_out: completions with an empty mask, as TRL leaves out truncated ones.
    """
    trainer = trl_trainer(folder, **options)
    model = trainer.model.eval()  # no dropout either way; and no rescaling for gradient accumulation
    prompts = [torch.tensor(p) for p in PROMPTS[start : start + len(batch.completions)]]
    layout = {
        "prompt_ids": pad_sequence(prompts, batch_first=True, padding_side="left"),
        "prompt_mask": pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left"),
        "num_items_in_batch": torch.tensor(tokens or sum(len(c) for c in batch.completions)),
    }
    layout |= padded(batch)
    layout["completion_mask"][left_out or []] = 0
    loss = trainer._compute_loss(model, layout)
    loss.backward()
    return loss.detach(), gradients(model)


def liger(batch: Batch, **options: Any) -> Result:
    grpo_loss = pytest.importorskip(
        "liger_kernel.chunked_loss.grpo_loss", reason="pip install liger-kernel==0.8.5 to compare with it"
    )
    policy = Policy(tiny_llama())
    hidden, weight, _ = packed(policy, batch.completions, PROMPTS)
    layout = padded(batch)
    options = {"beta": 0.0, "max_completion_length": LONGEST, **options}
    loss, _ = grpo_loss.LigerFusedLinearGRPOLoss(
        compiled=False, use_ref_model=options["beta"] != 0, temperature=TEMPERATURE, **options
    )(
        pad_sequence(hidden.split([len(c) for c in batch.completions]), batch_first=True), weight,
        layout["completion_ids"], layout["completion_mask"], layout["advantages"],
        ref_per_token_logps=layout["ref_per_token_logps"], old_per_token_logps=layout["old_per_token_logps"],
    )  # fmt: skip
    loss.backward()
    return loss.detach(), gradients(policy.model)


def same(a: Result, b: Result) -> None:
    """Equal to float32 rounding: losses add up terms of order 10, gradients have a largest entry each."""
    torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=5e-6)
    assert a[1].keys() == b[1].keys()
    for name, gradient in a[1].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            gradient, b[1][name], rtol=0, atol=1e-5 * gradient.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )


def difference(a: Result, b: Result) -> float:
    """Largest difference between two gradients of the head, relative to the first's largest entry."""
    x, y = a[1]["lm_head.weight"], b[1]["lm_head.weight"]
    return float((x - y).abs().max() / x.abs().max())


# --- where they define the same loss ----------------------------------------------------------------------------------

CLIP: dict[str, Any] = {"clip_low": LOW, "clip_high": HIGH}
#: name -> our objective, and the same in TRL's options (Liger's are theirs but for one name)
SAME: dict[str, tuple[PolicyObjective, dict[str, Any]]] = {
    "grpo": (PolicyObjective("ppo", "seq-mean-token-mean", **CLIP), {"loss_type": "grpo"}),
    "token-mean (bnpo)": (PolicyObjective("ppo", "token-mean", **CLIP), {"loss_type": "bnpo"}),
    "token-mean (dapo)": (PolicyObjective("ppo", "token-mean", **CLIP), {"loss_type": "dapo"}),
    "dr_grpo": (
        PolicyObjective("ppo", "seq-mean-token-sum-norm", norm_length=LONGEST, **CLIP), {"loss_type": "dr_grpo"},
    ),
    "cispo": (
        PolicyObjective("cispo", "token-mean", clip_low=1, clip_high=CAP - 1),
        {"loss_type": "cispo", "epsilon_high": CAP},
    ),
    "gspo": (
        PolicyObjective("gspo", "seq-mean-token-mean", clip_low=0.03, clip_high=0.04),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    ),
    "gspo, token-mean": (
        PolicyObjective("gspo", "token-mean", clip_low=0.03, clip_high=0.04),
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    ),
    "luspo": (
        PolicyObjective("gspo", "seq-mean-token-sum", clip_low=0.03, clip_high=0.04),
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    ),
    "dual clip (delta)": (
        PolicyObjective("ppo", "token-mean", dual_clip=1.4, **CLIP), {"loss_type": "bnpo", "delta": 1.4},
    ),
    "KL (beta)": (
        PolicyObjective("ppo", "token-mean", kl="k3", kl_coef=0.3, **CLIP),
        {"loss_type": "bnpo", "beta": 0.3, "use_bias_correction_kl": False},
    ),
    "gspo and KL": (
        PolicyObjective("gspo", "seq-mean-token-mean", clip_low=0.03, clip_high=0.04, kl="k3", kl_coef=0.3),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04,
         "beta": 0.3, "use_bias_correction_kl": False},
    ),
}  # fmt: skip


def shared(options: dict[str, Any]) -> dict[str, Any]:
    return {"epsilon": LOW, "epsilon_high": HIGH, **options}


def for_liger(options: dict[str, Any]) -> dict[str, Any]:
    """The same options by Liger's names."""
    named = shared(options)
    return {"epsilon_low": named.pop("epsilon"), **named}


@pytest.mark.parametrize("name", SAME)
def test_equals_trl(folder: Path, batch: Batch, name: str) -> None:
    objective, options = SAME[name]
    same(ours(batch, objective), trl(folder, batch, **shared(options)))


def test_luspo_with_token_ratios_equals_trl(folder: Path, batch: Batch) -> None:
    mine = ours(batch, PolicyObjective("ppo", "seq-mean-token-sum", **CLIP))
    same(mine, trl(folder, batch, **shared({"loss_type": "luspo"})))


@pytest.mark.parametrize("name", SAME)
def test_equals_liger(batch: Batch, name: str) -> None:
    objective, options = SAME[name]
    same(ours(batch, objective), liger(batch, **for_liger(options)))


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_equal_on_policy(folder: Path, batch: Batch, name: str) -> None:
    """Without behavior log-probabilities all three take ratio 1, with its gradient."""
    batch = Batch(batch.completions, None, batch.reference, batch.advantages)
    objective, options = SAME[name]
    mine = ours(batch, objective)
    same(mine, trl(folder, batch, **shared(options)))
    same(mine, liger(batch, **for_liger(options)))


def test_the_inputs_make_every_bound_act(batch: Batch) -> None:
    """Parity on inputs where nothing is clipped would show little."""
    policy = Policy(tiny_llama())
    hidden, weight, targets = packed(policy, batch.completions, PROMPTS)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    assert batch.behavior is not None
    for name, acting in (
        ("token-mean (bnpo)", ["low", "high"]), ("cispo", ["high"]), ("gspo", ["low", "high"]),
        ("dual clip (delta)", ["low", "high", "dual"]),
    ):  # fmt: skip
        stats = linear_policy_loss(
            hidden.detach(), weight.detach(), targets, batch.advantages, cu_seqlens, objective=SAME[name][0],
            behavior_logprobs=torch.cat(batch.behavior), temperature=TEMPERATURE,
        ).stats  # fmt: skip
        for bound in acting:
            assert stats[f"clip_fraction_{bound}"] > 0, (name, bound)


# --- where they differ ------------------------------------------------------------------------------------------------


def test_cispo_bounds_differ(folder: Path, batch: Batch) -> None:
    """epsilon_high is the cap itself in TRL and Liger, 1 + clip_high here; and they have no lower bound."""
    options = {"loss_type": "cispo", "epsilon": LOW, "epsilon_high": HIGH}
    theirs = trl(folder, batch, **options)
    same(theirs, liger(batch, **for_liger(options)))
    # Every ratio is above 0.28, so at the value meant for 1 + epsilon all tokens weigh 0.28.
    loss, grads = ours(batch, PolicyObjective("reinforce", "token-mean"))
    same((HIGH * loss, {name: HIGH * g for name, g in grads.items()}), theirs)

    capped = trl(folder, batch, loss_type="cispo", epsilon=LOW, epsilon_high=1 + HIGH)
    loss, grads = ours(batch, PolicyObjective("cispo", "token-mean", **CLIP))
    policy = Policy(tiny_llama())
    logprobs = plain_logprobs(*packed(policy, batch.completions, PROMPTS))
    assert batch.behavior is not None
    ratio = (logprobs - torch.cat(batch.behavior)).exp().detach()
    lacking = (1 - LOW - ratio).clamp(min=0)  # what a lower bound adds to the weight of unlikely tokens
    assert (lacking > 0).any()
    more = -(lacking * batch.advantages.repeat_interleave(torch.tensor(LENGTHS)) * logprobs).mean()
    more.backward()
    added = gradients(policy.model)
    same((loss, grads), (capped[0] + more.detach(), {name: g + added[name] for name, g in capped[1].items()}))


def test_token_mean_over_micro_batches(folder: Path, batch: Batch) -> None:
    """TRL's bnpo averages the means of micro-batches; dapo, and ours always, divide by the tokens of the whole."""
    objective, tokens = SAME["token-mean (bnpo)"][0], sum(LENGTHS)
    whole, parts = ours(batch, objective), [(0, 2), (2, 6)]

    def total(results: list[Result], factor: float = 1.0) -> Result:
        losses, grads = zip(*results, strict=True)
        return factor * sum(losses), {name: factor * sum(g[name] for g in grads) for name in grads[0]}

    same(whole, total([ours(batch.rows(a, b), objective, normalizer=tokens, start=a) for a, b in parts]))
    options = {"epsilon": LOW, "epsilon_high": HIGH}
    same(whole, total([trl(folder, batch.rows(a, b), a, tokens, loss_type="dapo", **options) for a, b in parts]))
    averaged = total([trl(folder, batch.rows(a, b), a, tokens, loss_type="bnpo", **options) for a, b in parts], 0.5)
    assert difference(whole, averaged) > 0.05
    same(averaged, total([ours(batch.rows(a, b), objective, start=a) for a, b in parts], 0.5))


def test_entropy_bonus_is_aggregated_like_the_loss(folder: Path, batch: Batch) -> None:
    """TRL's bonus is the mean over tokens whatever the loss type; ours follows the aggregation. Liger has none."""
    by_token = PolicyObjective("ppo", "token-mean", entropy_coef=0.2, **CLIP)
    same(ours(batch, by_token), trl(folder, batch, loss_type="bnpo", entropy_coef=0.2, **shared({})))

    by_sequence = PolicyObjective("ppo", "seq-mean-token-mean", entropy_coef=0.2, **CLIP)
    theirs = trl(folder, batch, loss_type="grpo", entropy_coef=0.2, **shared({}))
    mine = ours(batch, by_sequence)
    assert difference(mine, theirs) > 0.01
    # Their sum, put together from ours: the sequence-mean loss and the token-mean bonus.
    loss, bonus, none = (
        ours(batch, SAME["grpo"][0]), ours(batch, by_token), ours(batch, SAME["token-mean (bnpo)"][0]),
    )  # fmt: skip
    same((loss[0] + bonus[0] - none[0], {n: g + bonus[1][n] - none[1][n] for n, g in loss[1].items()}), theirs)


def test_kl_is_not_weighted_by_the_ratio(folder: Path, batch: Batch) -> None:
    """TRL multiplies its KL term by the ratio unless told otherwise (Liger only if told so); we never do."""
    options = shared({"loss_type": "bnpo", "beta": 0.3})
    theirs = trl(folder, batch, **options)
    same(theirs, liger(batch, **for_liger({**options, "use_bias_correction_kl": True})))
    loss, grads = ours(batch, SAME["KL (beta)"][0])
    policy = Policy(tiny_llama())
    logprobs = plain_logprobs(*packed(policy, batch.completions, PROMPTS))
    assert batch.behavior is not None
    ratio = (logprobs - torch.cat(batch.behavior)).exp()
    d = logprobs - torch.cat(batch.reference)
    more = 0.3 * ((ratio - 1) * (torch.expm1(-d) + d)).mean()
    more.backward()
    added = gradients(policy.model)
    assert max(g.abs().max() for g in added.values()) > 1e-3
    same((loss + more.detach(), {name: g + added[name] for name, g in grads.items()}), theirs)


def test_delta_below_the_upper_bound_differs(folder: Path, batch: Batch) -> None:
    """There TRL's and Liger's delta lowers the upper bound of positive advantages; ours is for negative ones alone."""
    options = shared({"loss_type": "bnpo", "delta": 1.1})
    theirs = trl(folder, batch, **options)
    same(theirs, liger(batch, **for_liger(options)))
    assert difference(ours(batch, PolicyObjective("ppo", "token-mean", dual_clip=1.1, **CLIP)), theirs) > 0.01
    # What theirs amounts to: positive advantages clipped at delta, negative ones at 1 + epsilon_high.
    split = [
        ours(Batch(batch.completions, batch.behavior, batch.reference, advantages), objective)
        for advantages, objective in (
            (batch.advantages.clamp(min=0), PolicyObjective("ppo", "token-mean", clip_low=LOW, clip_high=0.1)),
            (batch.advantages.clamp(max=0), PolicyObjective("ppo", "token-mean", dual_clip=1 + HIGH, **CLIP)),
        )
    ]
    (positive, up), (negative, down) = split
    same((positive + negative, {name: g + down[name] for name, g in up.items()}), theirs)


def test_left_out_completions_differ_in_the_count(folder: Path, batch: Batch) -> None:
    """A completion left out still counts as a sequence in TRL; here it is as if never drawn."""
    objective, options = SAME["grpo"]
    theirs = trl(folder, batch, left_out=[5], **shared(options))
    loss, grads = ours(batch.rows(0, 5), objective)
    same((loss * 5 / 6, {name: g * 5 / 6 for name, g in grads.items()}), theirs)


def test_group_norm_differs_in_epsilon(folder: Path) -> None:
    """Both divide by the unbiased deviation; TRL adds 1e-4, we 1e-6, and only we give a constant group exactly 0."""
    given = [0.0, 1.0, 0.25, 0.9, 0.9, 0.9]

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return given

    trainer = trl_trainer(folder, reward)
    theirs = trainer._generate_and_score_completions([{"prompt": "1+1="}] * 6)["advantages"]
    mine = torch.from_numpy(compute_advantages("group_norm", given, [0, 0, 0, 1, 1, 1]))
    deviation = torch.tensor(given[:3]).std()
    torch.testing.assert_close(theirs[:3], mine[:3] * (deviation + 1e-6) / (deviation + 1e-4), rtol=1e-5, atol=0)
    assert (mine[3:] == 0).all()
    assert 0 < theirs[3:].abs().max() < 1e-3  # the float32 mean of 0.9, 0.9, 0.9 is not 0.9


def test_group_norm_from_end_to_end(folder: Path) -> None:
    """TRL's own rollouts and rewards: its GRPO step's gradient, and ours of the same completions and its formula."""
    given = [0.0, 1.0, 0.25, 1.0, 0.0, 0.0]

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return given

    trainer = trl_trainer(folder, reward, loss_type="grpo", epsilon=LOW, epsilon_high=HIGH)
    generated = trainer._generate_and_score_completions([{"prompt": "1+1="}] * 6)
    loss = trainer._compute_loss(trainer.model, generated)
    loss.backward()
    lengths = generated["completion_mask"].sum(1).tolist()
    completions = [ids[:n] for ids, n in zip(generated["completion_ids"], lengths, strict=True)]
    prompts = [
        ids[mask.bool()].tolist() for ids, mask in zip(generated["prompt_ids"], generated["prompt_mask"], strict=True)
    ]
    policy = Policy(tiny_llama())
    hidden, weight, targets = packed(policy, completions, prompts)
    advantages = torch.from_numpy(compute_advantages("group_norm", given, [0, 0, 0, 1, 1, 1]))
    mine = linear_policy_loss(
        hidden, weight, targets, advantages, torch.tensor([0, *lengths]).cumsum(0).int(),
        objective=SAME["grpo"][0], temperature=TEMPERATURE,
    )  # fmt: skip
    mine.loss.backward()
    for name, gradient in gradients(policy.model).items():  # 1e-4 / std: what the epsilons leave
        torch.testing.assert_close(
            gradient, gradients(trainer.model)[name], rtol=0, atol=3e-4 * gradient.abs().max().item()
        )
    torch.testing.assert_close(mine.loss.detach(), loss.detach(), rtol=0, atol=1e-4)
