"""A causal LM seen as hidden states and a head: what the head does to them, and heads that cannot be taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

#: What configs call a soft cap on the final logits, a factor on them, and a divisor of them.
SOFTCAP_KEYS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTOR_KEYS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISOR_KEYS = ("logits_scaling",)
#: Models that multiply by what everyone else divides by.
MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)


class UnsupportedModelError(ValueError):
    """The model cannot be served without changing what it computes; the message says what would."""


@dataclass(frozen=True)
class Split:
    """The two halves of a causal LM.

    Attributes:
        base: what gives the hidden states.
        weight: the head [V, H], the very parameter of the model.
        bias: the head's bias [V] or None.
        softcap: z becomes softcap * tanh(z / softcap); None for none.
        logit_scale: factor on the logits, before the softcap.
    """

    base: nn.Module
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    @staticmethod
    def of(causal_lm: PreTrainedModel, whole: Any = None) -> Split:
        """Take a causal LM apart; `whole` is the model around it, an adapter's for instance.

        Raises:
            UnsupportedModelError: for a head that is adapted, quantized or hooked.
        """
        base: nn.Module = causal_lm.base_model
        if base is causal_lm:  # transformers 4 gives Gemma 3 a prefix that is not its own
            base = causal_lm.get_decoder()  # type: ignore[no-untyped-call]
        if base is causal_lm:  # transformers 5 gives Llama 4 such a prefix, too
            base = next((child for child in causal_lm.children() if isinstance(child, PreTrainedModel)), base)
        head: Any = (whole or causal_lm).get_output_embeddings()
        _check_head(head, whole or causal_lm)
        return Split(base, head.weight, getattr(head, "bias", None), *_logit_transform(causal_lm))

    @property
    def head_options(self) -> dict[str, Any]:
        """The head as keyword arguments of the operations in bandit_rft.ops."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


def _check_head(head: Any, model: nn.Module) -> None:
    name = type(model).__name__
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise UnsupportedModelError(f"{name}: get_output_embeddings() gives no head with a weight; is it a causal LM?")
    adapted = hasattr(head, "base_layer") or type(head).__module__.partition(".")[0] == "peft"
    if adapted or any("lora_" in key for key, _ in head.named_parameters()):
        raise UnsupportedModelError(
            f"{name}: the head carries an adapter, which a fused head would silently leave out. Merge it "
            "(merge_and_unload) or leave lm_head out of target_modules and modules_to_save."
        )
    if not head.weight.is_floating_point() or head.weight.ndim != 2:
        raise UnsupportedModelError(f"{name}: the head's weight is {head.weight.dtype}, quantized heads are not served")
    if head._forward_hooks or head._forward_pre_hooks or nn.utils.parametrize.is_parametrized(head):
        raise UnsupportedModelError(f"{name}: the head has forward hooks or parametrizations, which fusing would skip")


def _logit_transform(model: PreTrainedModel) -> tuple[float | None, float]:
    """(softcap, logit scale) from the config; the probe tells whether they are the whole truth."""
    config = model.config.get_text_config()
    values = {key: getattr(config, key, None) for key in (*SOFTCAP_KEYS, *FACTOR_KEYS, *DIVISOR_KEYS)}
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
    softcap = next((numbers[key] for key in SOFTCAP_KEYS if key in numbers), None)
    scale = 1.0
    for key in FACTOR_KEYS:
        scale *= numbers.get(key, 1.0)
    for key in DIVISOR_KEYS:
        value = numbers.get(key, 1.0)
        scale = scale * value if config.model_type in MULTIPLIES_BY_LOGITS_SCALING else scale / value
    return softcap, scale
