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
from tiny_models import save_tiny_llama, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

pytest.importorskip("trl", "1.16", reason="pip install trl==1.16.0 to compare with it")

from trl_parity import ADVANTAGES, FORETOLD, LOSSES, NEAR, OTHERS, batch, completed, make_trainer, step

from bandit_rft.integrations import trl as integration
from bandit_rft.model import UnsupportedModelError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _fresh_random_numbers() -> Iterator[None]:
    torch.manual_seed(0)
    yield


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


@pytest.mark.parametrize("how", ["autocast", "bfloat16 weights"])
@pytest.mark.parametrize("loss", ["dapo", "vespo"])
def test_bfloat16_is_no_worse_than_trl(folder: Path, how: str, loss: str) -> None:
    """Logits are not rounded here: log-probabilities and gradients are at least as near to those of float32."""

    def of(kind: str, fused: bool) -> tuple[Tensor, dict[str, Tensor]]:
        dtype = torch.bfloat16 if kind == "bfloat16 weights" else torch.float32
        trainer = make_trainer(folder, model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), loss_type=loss)
        if fused:
            integration.fuse(trainer)
        inputs = batch(old=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 7)[0].detach()
            _, gradients, _ = step(trainer, inputs)
        return logps, gradients

    exact, theirs, ours = of("float32", False), of(how, False), of(how, True)
    assert (ours[0] - exact[0]).abs().mean() <= 1.2 * (theirs[0] - exact[0]).abs().mean()
    for name, gradient in exact[1].items():
        error, their_error = ((side[1][name].float() - gradient).norm() for side in (ours, theirs))
        assert error <= 2 * their_error + 1e-3 * gradient.norm(), name


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


@pytest.mark.parametrize("kind", ["dapo", "grpo, beta", "LoRA, beta", "bfloat16 autocast"])
def test_training_is_the_same(folder: Path, kind: str) -> None:
    """Optimizer steps with several iterations and accumulation, sampling and reference included: the same weights."""
    options: dict[str, Any] = {
        "num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 1e-3,
        "save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 3,
        "seed": 0,  # with 3 every advantage of the first step is 0: Adam makes whole steps of a KL that is rounding
        "gradient_checkpointing": True,
    }  # fmt: skip
    more: dict[str, dict[str, Any]] = {
        "grpo, beta": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
        "LoRA, beta": {"beta": 0.1, "use_bias_correction_kl": False},
        "bfloat16 autocast": {"bf16": True},
    }
    trained = []
    for fused in (False, True):
        adapters = None
        if kind.startswith("LoRA"):
            from peft import LoraConfig

            torch.manual_seed(0)
            adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        trainer = make_trainer(folder, peft_config=adapters, **options, **more.get(kind, {}))
        head = integration.fuse(trainer) if fused else None
        trainer.train()
        trained.append((dict(trainer.model.named_parameters()), trainer.state.log_history, head))
    (theirs, their_log, _), (ours, our_log, head) = trained
    assert head is not None
    assert head.outcome.came_true == 8 and head.outcome.computed_again == 0
    if "bfloat16" in kind:  # another rounding draws other tokens: only that it trains
        assert all(torch.isfinite(weights).all() for weights in ours.values())
        return
    for name, weights in theirs.items():
        torch.testing.assert_close(ours[name], weights, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(their_log, our_log, strict=True):
        for key in ("loss", "entropy", "reward", "grad_norm", "kl", "clip_ratio/region_mean"):
            assert (key in a) == (key in b)
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-6), key


def test_evaluation_computes_no_gradient(folder: Path) -> None:
    trainer = make_trainer(folder, **NEAR)
    inputs = completed(trainer, batch())
    trainer.model.eval()
    with torch.no_grad():
        theirs = trainer._compute_loss(trainer.model, dict(inputs))
        head = integration.fuse(trainer)
        ours = trainer._compute_loss(trainer.model, dict(inputs))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not ours.requires_grad and head.outcome.came_true == 0


def test_a_replica_of_data_parallel_training(folder: Path) -> None:
    """The loss goes through DistributedDataParallel's forward, as accelerate wraps the model: one process is enough."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.nn.parallel import DistributedDataParallel

    trainer = make_trainer(folder, loss_type="dapo", **NEAR)
    inputs = completed(trainer, batch())
    _, theirs, _ = step(trainer, inputs)
    head = integration.fuse(trainer)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        trainer.model.zero_grad(set_to_none=True)
        trainer._compute_loss(DistributedDataParallel(trainer.model), dict(inputs)).backward()
    finally:
        destroy_process_group()
    assert head.outcome.came_true == 1
    for name, parameter in trainer.model.named_parameters():
        within = 1e-5 * theirs[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=0, atol=within)


def test_a_trainer_with_a_loss_of_its_own(folder: Path) -> None:
    """TRL's own GMPOTrainer inherits from GRPOTrainer: its loss is not foretold, and is right."""
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    trainer = make_trainer(folder, classes=(GMPOConfig, GMPOTrainer), epsilon=0.2, epsilon_high=0.28)
    head = compare(trainer, batch())
    assert (head.outcome.came_true, head.outcome.computed_again) == (0, 0)


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


def test_trainers_and_models_that_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    trainer = make_trainer(folder)
    trainer.model._original_forward = trainer.model.forward
    with pytest.raises(integration.UnsupportedTrainerError, match=r"fuse before train\(\)"):
        integration.fuse(trainer)
    trainer = make_trainer(folder)
    text = copy.deepcopy(trainer.model.config)
    monkeypatch.setattr(trainer.model.config, "get_text_config", lambda: text)
    with pytest.raises(UnsupportedModelError, match="images or sound are not served"):
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


def test_other_versions_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older TRL by its number; a later one that asks its model for something else when it does."""
    import trl

    trainer = make_trainer(folder)
    monkeypatch.setattr(trl, "__version__", "1.15.2")
    with pytest.raises(ImportError, match=r"needs TRL >= 1\.16; this is 1\.15\.2"):
        integration.fuse(trainer)
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    inputs = completed(trainer, batch())
    integration.fuse(trainer)

    def otherwise(model: Any, input_ids: Tensor, *unused: Any, **options: Any) -> Any:
        logits = model(input_ids=input_ids).logits[:, -8:-1]
        return logits.logsumexp(-1), logits.mean(-1), None

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", otherwise)
    with pytest.raises(integration.UnsupportedTrainerError, match=r"does not ask its model .* this is 1\.99\.0"):
        trainer._compute_loss(trainer.model, inputs)
