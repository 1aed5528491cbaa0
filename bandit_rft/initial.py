"""The model that a run begins with: what it is known by, refused where it is another one, and kept for a KL to it."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bandit_rft.assemble import load_policy, new_policy, prepare
from bandit_rft.checkpoint import CheckpointError
from bandit_rft.config import Config, ConfigError
from bandit_rft.metrics import read_metrics
from bandit_rft.model import Policy

logger = logging.getLogger(__name__)

#: Of each model that a program gave: its `weights_digest` when a run of this process began, and that run's folder.
_BEGAN: WeakKeyDictionary[nn.Module, tuple[str, Path]] = WeakKeyDictionary()

ANEW = "load it anew, or choose another output_dir"


def weights_digest(policy: Policy, *, beneath: bool = False) -> str:
    """What a model is known by: a digest of the names, shapes, dtypes and bytes of all its parameters.

    Args:
        policy: any.
        beneath: of the model beneath its adapter, as it was before it had one; else with the weights of an adapter that
            does something.
    """
    digest = hashlib.sha256()
    # A new adapter's other matrix is drawn at random, and does nothing while this one is 0.
    beneath = beneath or not any(bool(p.any()) for name, p in policy.causal_lm.named_parameters() if ".lora_B" in name)
    for name, parameter in sorted(policy.causal_lm.named_parameters()):
        if beneath and ".lora_" in name:
            continue
        tensor = parameter.detach().cpu().contiguous()
        digest.update(f"{name.replace('.base_layer.', '.')} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


class InitialModel:
    """The model that a run begins with, over all starts of its trainer.

    Args:
        given: the one that a program gave, which is trained in place; None: the configuration names it.
        config: of the run.
    """

    def __init__(self, given: Policy | None, config: Config):
        self.given, self.config, self._beneath = given, config, bool(config.lora.rank)
        self.digest: str | None = None  # of the model that the run began with; a checkpoint keeps it
        self._kept = self._keep()

    def _keep(self) -> Policy | None:
        """A copy of the given model, for the KL to it. Adapters leave it as it is, so that no copy is needed."""
        given, config = self.given, self.config
        if given is None or not config.objective.kl_coef or self._beneath:
            return None
        initial = Policy(copy.deepcopy(given.model), given.tokenizer)
        initial.mask_padding_tokens(given.padding_token_ids)  # the same softmax as the policy's
        initial = prepare(initial, config)
        initial.model.requires_grad_(False)
        return initial

    def is_model_of(self, state: Mapping[str, Any]) -> bool:
        """Whether a run that named its model otherwise began with this one, by its weights."""
        if self.given is not None:
            return state.get("model") is not None  # then `policy` compares it in any case
        named = load_policy(self.config.model_name_or_path, self.config)
        return bool(state.get("model") == weights_digest(named, beneath=self._beneath))

    def policy(self, folder: Path, found: tuple[Path, Mapping[str, Any]] | None, *, first: bool = True) -> Policy:
        """What is trained: the initial model, or the one of a checkpoint; a given model is trained in place.

        Args:
            folder: of the run.
            found: the checkpoint that is continued, and its state.
            first: whether this is the rank whose given model counts.

        Raises:
            ConfigError: the given model is not the one that the run began with.
            CheckpointError: the checkpoint does not fit the given model.
        """
        given, config = self.given, self.config
        if self._kept is not None and not self._kept.weight.numel():
            raise RuntimeError("run() with several ranks used up the initial model of the KL: make a new Trainer")
        if found is None:
            policy = self._new()
            digest = weights_digest(policy, beneath=self._beneath)
            if given is not None:
                began, place = _BEGAN.get(given.model, (digest, folder))
                if digest != began and place == folder.resolve() and read_metrics(folder):
                    raise ConfigError(
                        f"model: it was trained by a run in {folder} that left no checkpoint to continue from, and is "
                        f"not as it was when that run began: {ANEW}"
                    )
                _BEGAN[given.model] = digest, folder.resolve()
            self.digest = digest
            return policy
        path, state = found
        self.digest = state.get("model")
        if given is None:
            policy = load_policy(str(path), config)
            if self._beneath:
                self._compare(path, policy, "the model under its adapter")
        else:
            if first:
                self._compare(path, self._kept or given, "the model that is given")
            _BEGAN[given.model] = self.digest or "", folder.resolve()
            policy = self._new()
            _load_weights(policy, path)
        for what, key, now in (
            ("stop tokens", "stop_tokens", policy.stop_tokens),
            ("masked entries of the head", "padding_token_ids", policy.padding_token_ids),
        ):
            if set(before := state.get(key, now)) != set(now):
                raise ConfigError(f"{path} was made with other {what} ({before} -> {now}): this would be neither run")
        return policy

    def _new(self) -> Policy:
        """The initial model, with a new adapter where the configuration has one."""
        model = None if self.given is None else self.given.model
        plain = model is not None and not self._beneath and not hasattr(model, "get_base_model")
        if model is not None and plain and any(".lora_" in name for name, _ in model.named_parameters()):
            raise ConfigError("model: it holds the adapter of an earlier run: load it anew")
        if self.given is not None and self._beneath and self.given.model in _BEGAN:
            from bandit_rft.model.lora import remove_layers

            remove_layers(self.given.model)  # of an earlier start
        return new_policy(self.config, self.given)

    def _compare(self, path: Path, policy: Policy, what: str) -> None:
        """Refuse a model that is not the one that the run of a checkpoint began with."""
        if self.digest is None:  # an earlier version does not say
            return
        now = weights_digest(policy, beneath=self._beneath)
        # Trained in place since, by a run of this process: the checkpoint's weights take the place of its own.
        if self.digest not in (now, _BEGAN.get(policy.model, (None,))[0]):
            raise ConfigError(
                f"{path} was made by a run that began with another model: {what} has other weights: has it been "
                f"trained since? Then {ANEW}"
            )

    def reference(self, policy: Policy, found: Path | None) -> Policy | None:
        """The initial model that a KL is taken to, without gradients; None where there is no KL.

        Args:
            policy: what is trained; with adapters, the model beneath them is the initial one.
            found: the checkpoint that is continued.

        Raises:
            ConfigError: it is not the model that the run began with.
        """
        config = self.config
        if not config.objective.kl_coef:
            return None
        if self._beneath:
            from bandit_rft.model.lora import base_policy

            return base_policy(policy)
        if self._kept is not None:
            return self._kept
        reference = load_policy(config.model_name_or_path, config)
        reference.model.requires_grad_(False)
        if found is not None:
            self._compare(found, reference, f"what is in {config.model_name_or_path}")
        return reference


def _load_weights(policy: Policy, checkpoint: Path) -> None:
    """Give a policy the weights of a checkpoint, in place (CheckpointError where they do not fit)."""
    try:
        policy.load_weights(checkpoint)
    except (ValueError, RuntimeError, OSError) as error:
        lines = str(error).strip().splitlines()
        raise CheckpointError(f"{checkpoint} does not fit the model that is given: {' '.join(lines[:2])}") from None
