"""Adapters as they come: saved folders and hub names in peft's format, and which adapters a policy can have.

`bandit_rft.model.lora` makes new ones.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from bandit_rft.model.split import UnsupportedModelError

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A saved adapter: its folder, and the model it belongs to."""

    folder: Path
    base: str | None
    base_revision: str | None

    def base_of(self, name: str, other: str | None = None) -> tuple[str, str | None]:
        """(name or folder, revision) of the model this adapter belongs to, or of `other`, where that has moved."""
        if other is not None:
            return other, None
        if not self.base or (Path(self.base).is_absolute() and not Path(self.base).is_dir()):
            raise FileNotFoundError(f"{name} is an adapter whose base model is not at {self.base!r}; give it as `base`")
        return self.base, self.base_revision

    def attach(self, model: Any, device: torch.device) -> PeftModel:
        """The model with this adapter, trainable."""
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(self.folder), is_trainable=True, torch_device=str(device))

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was saved beside the adapter."""
        return (self.folder / "tokenizer_config.json").is_file()


def find_adapter(name_or_path: str, revision: str | None = None) -> Adapter | None:
    """The adapter saved under a folder or hub name; None where something else is.

    Raises:
        ImportError: without peft.
        UnsupportedModelError: weights that are not safetensors.
        OSError: an unknown hub name, in transformers' own words.
    """
    if find_adapter_config_file(name_or_path, revision=revision) is None:
        return None
    need_peft()
    folder = Path(name_or_path)
    if not folder.is_dir():
        files = ["adapter_config.json", WEIGHTS, "token*", "special_tokens_map.json", "vocab*", "*.jinja"]
        folder = Path(snapshot_download(name_or_path, revision=revision, allow_patterns=files))
    if not (folder / WEIGHTS).is_file():
        raise UnsupportedModelError(f"{name_or_path} has an adapter_config.json but no {WEIGHTS}; pickles are not read")
    config = json.loads((folder / "adapter_config.json").read_text())
    return Adapter(folder, config.get("base_model_name_or_path"), config.get("revision"))


def load_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Give a model's adapter the weights of a saved one (ValueError where they are of another adapter)."""
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    saved = load_peft_weights(str(folder), device="cpu")
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    if other := sorted(saved.keys() ^ own.keys()):
        raise ValueError(f"the saved adapter is another: {', '.join(other[:3])}")
    set_peft_model_state_dict(model, saved)


def check_adapter(model: PeftModel) -> None:
    """Refuse (UnsupportedModelError) adapters that do not only act inside of the base model; warn of dropout."""
    name, configs = type(model).__name__, model.peft_config
    if list(configs) != ["default"]:
        raise UnsupportedModelError(f"{name}: expected one adapter, named 'default'; got {sorted(configs)}")
    config = configs["default"]
    if config.is_prompt_learning:
        raise UnsupportedModelError(f"{name}: {config.peft_type} adds tokens to every prompt, which is not served")
    if dropout := getattr(config, "lora_dropout", 0):
        logger.warning("lora_dropout=%s stays off: sampler and trainer would be two different policies", dropout)


def need_peft() -> None:
    """Make sure that peft is there.

    Raises:
        ImportError: it is not; says what to install.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(f"adapters need the peft library: pip install 'bandit_rft[lora]' ({error})") from error


def without_adapter(model: Any) -> PreTrainedModel:
    """The causal LM inside a peft model; any other model is its own.

    Raises:
        UnsupportedModelError: for adapters that do not only act inside of the base model.
    """
    if not hasattr(model, "get_base_model"):
        causal_lm: PreTrainedModel = model
        return causal_lm
    check_adapter(model)
    causal_lm = model.get_base_model()
    return causal_lm
