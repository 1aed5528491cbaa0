"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: only A and B of W + alpha / rank * B A are trained.

    policy = add_adapter(Policy.load("Qwen/Qwen2.5-0.5B-Instruct"), rank=16)
    reference = base_policy(policy)                     # the initial model: the same weights with the adapters off
    policy.save("out"); Policy.load("out")              # a folder in peft's own format

The head never has an adapter: it is fused with sampling and loss, which would leave the adapter out. Frozen, it costs
no gradient either: the loss computes dL/dhidden alone (4NHV instead of 6NHV).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bandit_rft.model.adapters import find_adapter, need_peft
from bandit_rft.model.policy import Policy
from bandit_rft.model.split import UnsupportedModelError

__all__ = ["BasePolicy", "add_adapter", "base_policy", "find_adapter", "is_adapted"]

#: Initializations that leave the weights beneath the adapter as they were.
PLAIN_INITIALIZATIONS = (True, False, "gaussian")


def add_adapter(
    policy: Policy,
    *,
    rank: int,
    alpha: float = 16.0,
    targets: Sequence[str] = ("all-linear",),
    dropout: float = 0.0,
    seed: int = 0,
) -> Policy:
    """A policy that trains adapters only, equal to the given one until the first step (B = 0).

    Args:
        policy: its model gets the adapters in place; go on with the policy that is returned.
        rank: of the adapters, at least 1.
        alpha: their scale is alpha / rank; > 0.
        targets: names of linear modules (the last parts of their paths), or "all-linear": all but the head.
        dropout: must be 0; with dropout, the sampler and the trainer would be two different policies.
        seed: of the initial A; the global random state is left as it was.

    Returns:
        The policy to go on with.

    Raises:
        ValueError: naming the argument.
        UnsupportedModelError: there is an adapter already.
    """
    need_peft()
    from peft import LoraConfig, TaskType, get_peft_model

    if rank < 1 or not alpha > 0:
        raise ValueError(f"lora.rank and lora.alpha must be > 0; got {rank} and {alpha}")
    if dropout:
        raise ValueError(
            f"lora.dropout must be 0; got {dropout}: a token drawn with dropout off and trained on with dropout on has "
            "two probabilities, and neither is the policy's"
        )
    if is_adapted(policy):
        raise UnsupportedModelError(
            f"{type(policy.model).__name__}: there is an adapter already; lora.rank=0 trains that one on, "
            "merge_and_unload() makes it part of the weights"
        )
    _check_targets(policy.model, targets)
    model: Any = policy.model
    everything = list(targets) == ["all-linear"]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a plain factor; peft's annotation says int
        target_modules="all-linear" if everything else sorted(set(targets)),
        task_type=TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, config)
    base = model.name_or_path  # what the saved adapter names; a folder must be found from another one, too
    adapted.peft_config["default"].base_model_name_or_path = (
        str(Path(base).resolve()) if base and Path(base).is_dir() else base or None
    )
    result = Policy(adapted, policy.tokenizer)
    result.stop_tokens = list(policy.stop_tokens)
    if policy.padding_token_ids:
        result.mask_padding_tokens(policy.padding_token_ids)
    if policy.gradient_checkpointing:
        result.enable_gradient_checkpointing()
    return result


def remove_layers(model: PreTrainedModel) -> None:
    """Take the layers of an adapter out of the model that `add_adapter` put them in; its weights stay as they are."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    vars(model).pop("peft_config", None)


def is_adapted(policy: Policy) -> bool:
    """Whether the policy's weights include an adapter."""
    return hasattr(policy.model, "get_base_model") or bool(getattr(policy.model, "_hf_peft_config_loaded", False))


# --- the reference ----------------------------------------------------------------------------------------------------


class BasePolicy(Policy):
    """What an adapted policy was before it was adapted, on the same weights: scores and samples, trains nothing."""

    def __init__(self, adapted: Policy):
        vars(self).update(vars(adapted))  # loaded and probed already
        self.adapted = adapted
        self.base = _AdaptersOff(adapted.base)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The adapted policy's head, which is not always the same tensor."""
        return self.adapted.weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """Likewise its bias, which a sharded policy has only while it works."""
        return self.adapted.bias

    def parameters(self) -> list[nn.Parameter]:
        """None: the weights belong to the adapted policy."""
        return []

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """None: the weights belong to the adapted policy."""
        return []


class _AdaptersOff(nn.Module):
    """The base model of an adapted causal LM, with the adapters off for the time of each call.

    As peft's `disable_adapter`, which also looks at every parameter and has trained ones frozen and unfrozen: 12 ms a
    call with 35 adapters on a CPU, more than the forward pass of a small model takes.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.wrapped = base
        self.adapters: list[Any] = [m for m in base.modules() if isinstance(getattr(m, "disable_adapters", None), bool)]

        @functools.wraps(base.forward)  # its signature tells the rollout engine what it takes
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._off():
                return base(*args, **kwargs)

        self.forward = forward
        with self._off():
            if not self.adapters or not all(adapter.disable_adapters for adapter in self.adapters):
                raise RuntimeError("this version of peft does not turn its adapters off the way it is known to")

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        before = [adapter.disable_adapters for adapter in self.adapters]
        try:
            for adapter in self.adapters:
                adapter._disable_adapters = True
            yield
        finally:
            for adapter, disabled in zip(self.adapters, before, strict=True):
                adapter._disable_adapters = disabled


def base_policy(policy: Policy) -> Policy:
    """The model beneath the adapters as a policy of its own: the reference of a KL term, at no memory.

    Raises:
        ValueError: turning the adapters off does not give back the weights that were adapted.
    """
    model: Any = policy.model
    if not hasattr(model, "disable_adapter"):
        raise ValueError(f"base_policy needs a policy with a peft adapter; got a {type(model).__name__}")
    config = model.peft_config["default"]
    changed = getattr(config, "bias", "none") != "none" and f"bias={config.bias!r}"
    if getattr(config, "init_lora_weights", True) not in PLAIN_INITIALIZATIONS:
        changed = f"init_lora_weights={config.init_lora_weights!r}"
    if changed:
        raise ValueError(f"base_policy: an adapter with {changed} changes weights that turning it off leaves changed")
    return BasePolicy(policy)


# ----------------------------------------------------------------------------------------------------------------------


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    """Every target must be linear modules, not the head. peft ignores a misspelt name as long as another one fits."""
    if isinstance(targets, str) or not targets:
        raise ValueError(f"lora.targets must be a list of module names or ['all-linear']; got {targets!r}")
    if list(targets) == ["all-linear"]:
        return
    head = model.get_output_embeddings()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding | Conv1D) and m is not head]
    heads = [n for n, m in model.named_modules() if m is head]
    known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    for target in targets:
        if any(_fits(name, target) for name in heads):
            raise ValueError(
                f"lora.targets: {target!r} is the head, whose adapter a fused loss would leave out; choose of {known}"
            )
        if not any(_fits(name, target) for name in names):
            raise ValueError(f"lora.targets: no linear module is named {target!r}; there are {known}")


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
