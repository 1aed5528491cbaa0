"""A trainer of TRL, a batch for it, and what one step of its own loss gives: for the tests and the table of parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import character_tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from bandit_rft.integrations import trl as integration

PROMPTS = [[5, 9, 14], [6], [21, 7, 30, 8, 12], [11, 4], [3, 3, 3], [40]]
LENGTHS = [4, 7, 1, 5, 3, 6]
LONGEST = 9
ADVANTAGES = torch.tensor([1.3, -0.8, 0.6, -1.7, 0.0, 0.9])
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
NEAR = {"epsilon": 0.2, "epsilon_high": 0.28}
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


def make_trainer(
    folder: Path, kind: str = "GRPO", model: Any = None, peft_config: Any = None, classes: Any = None, **options: Any
) -> Any:
    """A trainer of the tiny model; classes: (configuration, trainer) in place of TRL's of that kind."""
    import trl
    from datasets import Dataset

    tokenizer = character_tokenizer()
    tokenizer.padding_side = "left"
    config, trainer_class = classes or (getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer"))
    arguments = config(
        **{
            "output_dir": str(folder / "trl"), "per_device_train_batch_size": 6, "num_generations": 3,
            "max_completion_length": LONGEST, "beta": 0.0, "temperature": 0.7, "report_to": [], "use_cpu": True,
            "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, **options,
        }
    )  # fmt: skip
    trainer = trainer_class(
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


def differences(trainer: Any, inputs: dict[str, Any]) -> tuple[float, float, bool]:
    """Before and after `fuse`: (relative error of the loss, largest error of a gradient as a share of the parameter's
    largest, whether the gradients were ready after the forward pass).
    """
    inputs = completed(trainer, inputs)
    loss, gradients, _ = step(trainer, inputs)
    head = integration.fuse(trainer)
    fused_loss, fused_gradients, _ = step(trainer, inputs)
    errors = [float((fused_gradients[name] - g).abs().max() / g.abs().max()) for name, g in gradients.items()]
    return float((fused_loss - loss).abs() / loss.abs()), max(errors), head.outcome.came_true > 0


def parity_cases() -> dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """The rows of the table: name -> (options of the trainer, its attributes that are set, what the batch has)."""
    from peft import LoraConfig

    inputs = batch()
    left_out = inputs["completion_mask"].clone()
    left_out[1] = 0
    found: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
        "one step a batch": (NEAR, {}, batch(old=False)),
        "several iterations": (NEAR, {}, inputs),
    }
    for name, options in {**FORETOLD, **OTHERS}.items():
        if name != "plain":
            found[name] = (options, {}, inputs)
    masked = {**inputs, "completion_mask": left_out}
    found["mask_truncated_completions"] = ({**NEAR, "mask_truncated_completions": True}, {}, masked)
    found["tokens of tools"] = (NEAR, {}, {**inputs, "tool_mask": (torch.arange(7) != 2).long().expand(6, 7)})
    found["vLLM's importance correction"] = (NEAR, {"use_vllm": True}, inputs)
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    found["LoRA (peft), beta"] = ({**NEAR, "beta": 0.3, "peft_config": adapters}, {}, inputs)
    return found


def parity_table(folder: Path) -> str:
    """Every option by every loss: the largest error; bold where gradients were ready after the forward pass."""
    lines = ["| | " + " | ".join(f"`{loss}`" for loss in LOSSES) + " |", "|---|" + "---|" * len(LOSSES)]
    for name, (options, attributes, inputs) in parity_cases().items():
        cells = []
        for loss in LOSSES:
            trainer = make_trainer(folder, loss_type=loss, **options)
            for attribute, value in attributes.items():
                setattr(trainer, attribute, value)
            of_loss, of_gradients, ready = differences(trainer, inputs)
            text = f"{max(of_loss, of_gradients):.0e}".replace("e-0", "e-")
            cells.append(f"**{text}**" if ready else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
