"""A trainer of TRL before and after `fuse`: the same loss, metrics and gradient of every parameter.

Both sides are TRL's own `_compute_loss` on the same batch, the second on bandit_rft's head. Tolerances are those of
float32 rounding. What cannot be the same is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import character_tokenizer, save_tiny_llama, tiny_llama
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaForCausalLM

pytest.importorskip("trl", "1.16", reason="pip install trl==1.16.0 to compare with it")

from bandit_rft.integrations import trl as integration
from bandit_rft.model import UnsupportedModelError

PROMPTS = [[5, 9, 14], [6], [21, 7, 30, 8, 12], [11, 4], [3, 3, 3], [40]]
LENGTHS = [4, 7, 1, 5, 3, 6]
LONGEST = 9
ADVANTAGES = torch.tensor([1.3, -0.8, 0.6, -1.7, 0.0, 0.9])
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
NEAR = {"epsilon": 0.2, "epsilon_high": 0.28}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _fresh_random_numbers() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def make_trainer(folder: Path, kind: str = "GRPO", model: Any = None, peft_config: Any = None, **options: Any) -> Any:
    import trl
    from datasets import Dataset

    tokenizer = character_tokenizer()
    tokenizer.padding_side = "left"
    arguments = getattr(trl, f"{kind}Config")(
        **{
            "output_dir": str(folder / "trl"), "per_device_train_batch_size": 6, "num_generations": 3,
            "max_completion_length": LONGEST, "beta": 0.0, "temperature": 0.7, "report_to": [], "use_cpu": True,
            "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, **options,
        }
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(folder) if model is None else model,
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions], args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 12), processing_class=tokenizer, peft_config=peft_config,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = options.get("gradient_accumulation_steps", 1)
    return trainer


def batch(old: bool = True, **extra: Tensor) -> dict[str, Any]:
    """Six completions in TRL's layout; the old and reference log-probabilities are off by 0.3 or so."""
    generator = torch.Generator().manual_seed(1)
    completions = [torch.randint(3, 45, (n,), generator=generator) for n in LENGTHS]
    prompts = [torch.tensor(p) for p in PROMPTS]
    shape = (6, max(LENGTHS))
    # The tiny model's own log-probabilities are near -4.5 +- 2; `near` is what makes ratios pass every bound.
    noise = [0.4 * torch.randn(shape, generator=generator) for _ in range(3)]
    found: dict[str, Any] = {
        "prompt_ids": pad_sequence(prompts, batch_first=True, padding_side="left"),
        "prompt_mask": pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left"),
        "completion_ids": pad_sequence(completions, batch_first=True),
        "completion_mask": pad_sequence([torch.ones_like(c) for c in completions], batch_first=True),
        "advantages": ADVANTAGES, "num_items_in_batch": torch.tensor(sum(LENGTHS)),
        "noise": noise, "old": old,
    }  # fmt: skip
    return {**found, **extra}


def completed(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """With old, reference and vLLM quantities near what the trainer's model says."""
    inputs = dict(inputs)
    noise, old = inputs.pop("noise"), inputs.pop("old")
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, inputs["completion_ids"].shape[1])[
            0
        ]
    if old:
        inputs["old_per_token_logps"] = logps + noise[0]
    inputs["ref_per_token_logps"] = logps + noise[1]
    inputs["importance_sampling_ratio"] = noise[2].exp().clamp(max=1.3)
    inputs["sampling_per_token_logps"] = logps + noise[2]
    if hasattr(trainer, "epsilon_low") and "old_logps" not in inputs:  # RLOO's are of whole sequences
        inputs["old_logps"] = (logps * inputs["completion_mask"]).sum(1) + 0.3 * noise[0][:, 0]
    return inputs


def step(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, list[float]]]:
    """(loss, gradient of each parameter, metrics) of one call of the trainer's own loss."""
    trainer._metrics["train"].clear()
    trainer.model.zero_grad(set_to_none=True)
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, {name: list(values) for name, values in trainer._metrics["train"].items()}


def compare(trainer: Any, inputs: dict[str, Any], *, within: float = 1e-5) -> integration.FusedHead:
    """Loss and metrics to rounding, gradients to 1e-5 of each one's largest entry, before and after `fuse`."""
    inputs = completed(trainer, inputs)
    before = step(trainer, inputs)
    head = integration.fuse(trainer)
    after = step(trainer, inputs)
    torch.testing.assert_close(after[0], before[0], rtol=within, atol=within)
    assert after[1].keys() == before[1].keys() and after[1]
    for name, gradient in before[1].items():
        largest = gradient.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(
            after[1][name], gradient, rtol=0, atol=within * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert after[2].keys() == before[2].keys()
    for name, values in before[2].items():
        assert after[2][name] == pytest.approx(values, rel=1e-5, abs=1e-6, nan_ok=True), name
    return head


#: Options whose loss is foretold, so that gradients are ready with the log-probabilities ("came true").
FORETOLD: dict[str, dict[str, Any]] = {
    "plain": NEAR,
    "delta": {**NEAR, "delta": 1.4},
    "beta, plain KL": {**NEAR, "beta": 0.3, "use_bias_correction_kl": False},
    "accumulation": {**NEAR, "gradient_accumulation_steps": 4},
}
OTHERS: dict[str, dict[str, Any]] = {
    "sequence": {"epsilon": 0.03, "epsilon_high": 0.04, "importance_sampling_level": "sequence"},
    "beta": {**NEAR, "beta": 0.3},
    "sequence, beta": {"epsilon": 0.03, "importance_sampling_level": "sequence", "beta": 0.3},
    "delta below the upper bound": {**NEAR, "delta": 1.1},
    "entropy quantile": {**NEAR, "top_entropy_quantile": 0.4},
    "entropy bonus": {**NEAR, "entropy_coef": 0.05},
    "entropy bonus on the quantile": {**NEAR, "entropy_coef": 0.05, "top_entropy_quantile": 0.4},
    "off-policy mask": {**NEAR, "off_policy_mask_threshold": 0.02},
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("old", [True, False], ids=["several iterations", "on-policy"])
def test_every_loss_type(folder: Path, loss: str, old: bool) -> None:
    head = compare(make_trainer(folder, loss_type=loss, **NEAR), batch(old))
    foretold = loss not in ("sapo", "vespo")
    assert (head.outcome.came_true, head.outcome.computed_again) == (int(foretold), 0)


def test_these_are_all_that_trl_has() -> None:
    import inspect

    import trl
    from trl.trainer.grpo_trainer import GRPOTrainer

    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert trl.GRPOConfig.__dataclass_fields__["loss_type"].default in LOSSES
    assert all(f'"{loss}"' in source for loss in LOSSES)
    documented = trl.GRPOConfig.__doc__ or ""
    after = documented.partition("loss_type (`str`")[2].partition("mask_truncated_completions")[0]
    import re

    assert set(re.findall(r'- `"(\w+)"`', after)) <= set(LOSSES), "TRL has a loss that is not tested here"


@pytest.mark.parametrize("options", FORETOLD.values(), ids=FORETOLD)
@pytest.mark.parametrize("loss", ["grpo", "dapo", "cispo"])
def test_options_whose_loss_is_foretold(folder: Path, loss: str, options: dict[str, Any]) -> None:
    head = compare(make_trainer(folder, loss_type=loss, **options), batch())
    assert (head.outcome.came_true, head.outcome.computed_again) == (1, 0)


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_options_whose_loss_is_not(folder: Path, loss: str, options: dict[str, Any]) -> None:
    head = compare(make_trainer(folder, loss_type=loss, **options), batch())
    assert head.outcome.came_true == 0


def test_masks(folder: Path) -> None:
    """Truncated completions left out, tools' tokens not counted, one advantage a token, and vLLM's correction."""
    inputs = batch()
    left_out = inputs["completion_mask"].clone()
    left_out[1] = 0
    for name, changed in {
        "mask_truncated_completions": {"completion_mask": left_out},
        "tools": {"tool_mask": (torch.arange(7) != 2).long().expand(6, 7)},
        "a token's advantage": {"advantages": ADVANTAGES[:, None] * torch.linspace(0.5, 1.5, 7)},
    }.items():  # fmt: skip
        for loss in ("grpo", "dapo"):
            head = compare(make_trainer(folder, loss_type=loss, **NEAR), {**inputs, **changed})
            assert head.outcome.came_true == 1, name


@pytest.mark.parametrize("loss", ["grpo", "dapo", "vespo"])
def test_vllm_importance_correction(folder: Path, loss: str) -> None:
    trainer = make_trainer(folder, loss_type=loss, **NEAR)
    trainer.use_vllm = True  # the sampler is not needed: its ratios are in the batch
    assert compare(trainer, batch()).outcome.came_true == int(loss != "vespo")


def test_nothing_counts(folder: Path) -> None:
    """All completions left out, and all advantages 0: a gradient of zero, not an error."""
    trainer = make_trainer(folder, loss_type="dapo", **NEAR)
    inputs = completed(trainer, batch())
    integration.fuse(trainer)
    for changed in ({"advantages": torch.zeros(6)}, {"completion_mask": torch.zeros_like(inputs["completion_mask"])}):
        loss, gradients, _ = step(trainer, {**inputs, **changed})
        assert loss == 0 and all(not g.any() for g in gradients.values())


@pytest.mark.parametrize("loss", ["grpo", "dapo", "cispo", "vespo"])
def test_peft(folder: Path, loss: str) -> None:
    from peft import LoraConfig

    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make_trainer(folder, peft_config=adapters, loss_type=loss, beta=0.3, **NEAR)
    compare(trainer, batch())
    assert not trainer.model.get_output_embeddings().weight.requires_grad


def test_rloo(folder: Path) -> None:
    for options in ({}, {"beta": 0.1}):
        compare(make_trainer(folder, "RLOO", **{**NEAR, **options}), batch())


def test_models_that_scale_and_cap_their_logits(folder: Path) -> None:
    from transformers import AutoConfig, CohereForCausalLM, Gemma2ForCausalLM

    shape = {
        "vocab_size": 46, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    for model_type, kind, more in (
        ("gemma2", Gemma2ForCausalLM, {"final_logit_softcapping": 3.0}),
        ("cohere", CohereForCausalLM, {"logit_scale": 0.3}),
    ):  # fmt: skip
        torch.manual_seed(0)
        model = kind(AutoConfig.for_model(model_type, **shape, **more))
        assert compare(make_trainer(folder, model=model, **NEAR), batch()).outcome.came_true == 1


def test_lm_head_in_float32(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    trainer = make_trainer(folder, model=model, cast_lm_head_to_fp32=True, **NEAR)
    compare(trainer, batch(), within=0.02)  # the layers beneath are bfloat16


def test_autocast_is_no_worse_than_trl(folder: Path) -> None:
    """Under bfloat16 autocast logits are not rounded here: log-probabilities are nearer to those of float32."""
    trainer = make_trainer(folder, **NEAR)
    inputs = completed(trainer, batch())
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)

    def errors(hidden_too: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=hidden_too):
            return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 7, compute_entropy=True)[0]

    exact, theirs = errors(False), errors(True)
    integration.fuse(trainer)
    ours = errors(True)
    assert (ours - exact).abs().mean() <= 1.2 * (theirs - exact).abs().mean()
    torch.testing.assert_close(errors(False), exact, rtol=1e-5, atol=1e-5)


def test_a_loss_that_is_not_the_expected_one_is_computed_again(folder: Path) -> None:
    """A subclass in disguise: whatever is done to the loss, its gradient is right."""
    trainer = make_trainer(folder, loss_type="dapo", **NEAR)
    inputs = completed(trainer, batch())
    own = type(trainer)._compute_loss

    def gradients(head: integration.FusedHead | None) -> dict[str, Tensor]:
        trainer.model.zero_grad(set_to_none=True)
        seen: dict[str, Tensor] = {}
        scored = type(trainer)._get_per_token_logps_and_entropies

        def watch(*args: Any, **kwargs: Any) -> Any:
            found = scored(trainer, *args, **kwargs)
            seen["logps"], seen["entropy"] = found[0], found[1]
            return found

        trainer._get_per_token_logps_and_entropies = watch
        if head is not None:
            head.expected = integration._expected(trainer, inputs)
        loss = own(trainer, trainer.model, inputs) + 0.1 * seen["logps"].square().mean() - 0.1 * seen["entropy"].mean()
        loss.backward()
        del trainer._get_per_token_logps_and_entropies
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}

    theirs = gradients(None)
    head = integration.fuse(trainer)
    ours = gradients(head)
    assert (head.outcome.came_true, head.outcome.computed_again) == (0, 1)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def test_training_is_the_same(folder: Path) -> None:
    """Two optimizer steps with several iterations and accumulation, sampling included: the same weights."""
    options = {
        "num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 1e-3,
        "save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 3, "seed": 3,
    }  # fmt: skip
    trained = []
    for fused in (False, True):
        trainer = make_trainer(folder, **options)
        head = integration.fuse(trainer) if fused else None
        trainer.train()
        trained.append((dict(trainer.model.named_parameters()), trainer.state.log_history, head))
    (theirs, their_log, _), (ours, our_log, head) = trained
    assert head is not None and head.outcome.came_true == 8 and head.outcome.computed_again == 0
    for name, weights in theirs.items():
        torch.testing.assert_close(ours[name], weights, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(their_log, our_log, strict=True):
        for key in ("loss", "entropy", "reward", "grad_norm", "clip_ratio/region_mean"):
            assert (key in a) == (key in b)
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("use_liger_kernel", {"use_liger_kernel": True}),
        ("torch_compile", {"torch_compile": True}),
    ],
)
def test_options_that_are_refused(folder: Path, option: str, values: dict[str, Any]) -> None:
    trainer = make_trainer(folder)
    for name, value in values.items():
        setattr(trainer.args, name, value)
    with pytest.raises(integration.UnsupportedTrainerError, match=option):
        integration.fuse(trainer)


def test_trainers_and_models_that_are_refused(folder: Path) -> None:
    with pytest.raises(
        integration.UnsupportedTrainerError, match="trainer must be a GRPOTrainer or RLOOTrainer; got int"
    ):
        integration.fuse(3)
    for name, option in (
        ("is_fsdp_enabled", "fsdp"),
        ("is_deepspeed_enabled", "deepspeed"),
        ("aux_loss_enabled", "router_aux_loss_coef"),
    ):
        trainer = make_trainer(folder)
        setattr(trainer, name, True)
        with pytest.raises(integration.UnsupportedTrainerError, match=option):
            integration.fuse(trainer)
    trainer = make_trainer(folder)
    integration.fuse(trainer)
    with pytest.raises(integration.UnsupportedTrainerError, match="fused already"):
        integration.fuse(trainer)

    class Doubles(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    model = Doubles(copy.deepcopy(tiny_llama().config))
    with pytest.raises(UnsupportedModelError, match="differ from the model's own logits"):
        integration.fuse(make_trainer(folder, model=model))
    hooked = make_trainer(folder)
    hooked.model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(UnsupportedModelError, match="hooks"):
        integration.fuse(hooked)
