"""A Hugging Face causal LM seen as (hidden states, head), so that the head can be fused with sampling and loss.

    policy = Policy.load("Qwen/Qwen2.5-0.5B-Instruct")
    hidden = policy.hidden_states(sequences)            # [N, H], the rows that predict completion tokens
    logprobs = ops.linear_logprobs(hidden, policy.weight, targets, **policy.head_options)

Splitting a model in two is only safe when nothing happens between the halves that we do not know of. So wrapping runs a
probe batch both ways (probe.py) and refuses a model whose own logits are not reproduced to float rounding.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from bandit_rft.model.adapters import find_adapter, load_adapter_weights, without_adapter
from bandit_rft.model.llama_layers import LlamaLayers
from bandit_rft.model.packing import PackingMode, PackingPlan
from bandit_rft.model.probe import in_core, probe
from bandit_rft.model.split import Split, UnsupportedModelError
from bandit_rft.model.surroundings import plain_surroundings

__all__ = ["Policy", "UnsupportedModelError"]

#: Bytes: what torch allocates on a CPU begins at a multiple.
ALIGNMENT = 64


class Policy:
    """A causal LM, its head taken apart, its tokenizer and its stop tokens.

    Attributes:
        model: the whole model, in eval mode (dropout would make the sampler and the trainer two different policies);
            with a LoRA adapter a peft model, whose adapter alone is trained.
        causal_lm: the model without its adapter.
        base: what gives the hidden states, in the model or beneath its adapter.
        weight: the head [V, H], the very parameter of the model (of the input embedding too, when they are tied).
        bias: the head's bias [V] or None.
        softcap: c in c * tanh(z / c), which the model does to its logits z, or None.
        logit_scale: factor on its logits, before the softcap.
        plan: how packed sequences are kept apart, and the longest that is served.
        padding_token_ids: entries of the head that no token of the tokenizer has; see `mask_padding_tokens`.
        stop_tokens: ids that end a completion, from the generation config.

    Raises:
        UnsupportedModelError: where the head is adapted or quantized, or the probe finds a difference.
    """

    @plain_surroundings()
    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
        self.model = model
        model.train(False)
        self.tokenizer = tokenizer
        self.causal_lm = causal_lm = without_adapter(model)
        split = Split.of(causal_lm, model)
        self.base: nn.Module = split.base
        self.weight, self.bias = split.weight, split.bias
        self.softcap, self.logit_scale = split.softcap, split.logit_scale
        self.stop_tokens = _stop_tokens(model, tokenizer)
        self.vocab_size, self.hidden_size = self.weight.shape
        self.padding_token_ids: list[int] = []
        self._padding_mask: Tensor | None = None
        self._checkpointed: list[GradientCheckpointingLayer] = []
        self.plan: PackingPlan = probe(model, causal_lm, split)
        self._in_core: LlamaLayers | None = in_core(causal_lm, split, self.plan)

    @staticmethod
    def of(model: Policy | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Policy:
        """A Policy as it is; a Hugging Face causal LM, or a peft model around one, wrapped.

        Raises:
            TypeError: for anything else, and for a tokenizer beside a Policy, which has its own.
            UnsupportedModelError: as above.
        """
        if isinstance(model, Policy):
            if tokenizer is not None and tokenizer is not model.tokenizer:
                raise TypeError("tokenizer goes with a transformers model; a Policy has its own")
            return model
        if not isinstance(model, PreTrainedModel) and not hasattr(model, "get_base_model"):
            hint = "; Policy.load takes a name or a folder" if isinstance(model, str | Path) else ""
            raise TypeError(f"model must be a Policy or a transformers model; got {type(model).__name__}{hint}")
        return Policy(model, tokenizer)

    @staticmethod
    @plain_surroundings()
    def load(
        name_or_path: str,
        *,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        revision: str | None = None,
        base: str | None = None,
    ) -> Policy:
        """Load a model and its tokenizer from a folder or the hub; never runs code that comes with the model.

        A LoRA adapter in peft's format is loaded, trainable, with the model it names.

        Args:
            name_or_path: a folder, a hub name, or arithmetic-base, the small model that comes with the package.
            dtype: of the weights: float32, bfloat16, float16 or float64.
            device: cpu, cuda, cuda:1, ...; None: cuda where there is one.
            revision: of a hub model.
            base: of an adapter, in place of the model that it names.

        Raises:
            OSError: (with transformers' own words) when there is no such model.
            UnsupportedModelError: as above, and where weights are missing in the files or left over.
            ImportError: when an adapter needs the extra `lora`.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if name_or_path == "arithmetic-base":
            name_or_path = str(Path(__file__).parents[1] / "assets" / "arithmetic-base")
        if os.path.sep in name_or_path and not Path(name_or_path).exists() and name_or_path.count("/") != 1:
            raise FileNotFoundError(f"model_name_or_path: there is no folder {name_or_path!r}")
        device = torch.device(device)
        adapter, source, saved = find_adapter(name_or_path, revision), name_or_path, name_or_path
        if adapter is not None:
            source, revision = adapter.base_of(name_or_path, base)
            saved = str(adapter.folder) if adapter.has_tokenizer else source
        elif base is not None:
            raise ValueError(f"base={base!r} is for adapters; {name_or_path} is a whole model")
        options: dict[str, Any] = {"trust_remote_code": False, "revision": revision}
        config = AutoConfig.from_pretrained(source, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        model, report = loaded
        _check_loaded(source, model, report)
        align(model)
        tokenizer = AutoTokenizer.from_pretrained(saved, **options)
        model.to(device)
        if adapter is not None:
            model = adapter.attach(model, device)
        return Policy(model, tokenizer)

    def __repr__(self) -> str:
        own, trained = (
            sum(p.numel() for p in parameters) for parameters in (self.model.parameters(), self.parameters())
        )
        part = "" if trained == own else f", {_count(trained)} of them trained"
        kind = str(self.weight.dtype).removeprefix("torch.")
        return f"Policy({type(self.causal_lm).__name__}, {_count(own)} parameters{part}, {kind}, {self.device})"

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder (with a LoRA adapter, a peft folder) with the tokenizer; safetensors only."""
        model: Any = self.model
        # Left to itself, peft asks the hub whether embeddings have grown; they are not trained here.
        options = {"save_embedding_layers": False} if hasattr(model, "get_base_model") else {}
        model.save_pretrained(folder, **options)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def load_weights(self, folder: str | Path) -> None:
        """Take up, in place, the weights of a folder that `save` wrote: of the adapter, where there is one.

        Raises:
            ValueError, RuntimeError: they are of another model, naming the tensors.
            OSError: there is no such model in the folder.
        """
        model: Any = self.model
        if hasattr(model, "get_base_model"):
            load_adapter_weights(model, Path(folder))
            return
        dtype = functools.reduce(torch.promote_types, (p.dtype for p in self.model.parameters()))
        saved: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        model.load_state_dict(saved.state_dict())

    @property
    def device(self) -> torch.device:
        """Where the head lies."""
        return self.weight.device

    @property
    def packing(self) -> PackingMode:
        """How packed sequences are kept apart."""
        return self.plan.mode

    @property
    def head_options(self) -> dict[str, Any]:
        """The head as keyword arguments of the operations in bandit_rft.ops, for sampling and scoring alike."""
        bias = self.bias
        if self._padding_mask is not None:
            bias = self._padding_mask if bias is None else bias + self._padding_mask
        return {"bias": bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def mask_padding_tokens(self, ids: Sequence[int]) -> None:
        """Entries of the head that stand for no token get the probability 0: a bias of -inf in `head_options`.

        So they are never drawn, and sampler, trainer and reference have the same softmax, over real tokens alone.

        Args:
            ids: of the vocabulary, each in [0, V), not all of it; none takes the mask away.

        Raises:
            ValueError: for ids outside of the vocabulary, and for a model with a softcap: its tanh makes a finite logit
                of -inf, the token would stay possible.
        """
        if outside := [token for token in ids if not 0 <= token < self.vocab_size]:
            raise ValueError(f"padding_token_ids must lie in [0, {self.vocab_size}); got {outside[0]}")
        if len(set(ids)) == self.vocab_size:
            raise ValueError("padding_token_ids must leave a token that can be drawn; got the whole vocabulary")
        if ids and self.softcap is not None:
            raise ValueError(
                f"padding_token_ids: {type(self.model).__name__} has a softcap of {self.softcap} on its logits, "
                "beneath which a masked token would keep a finite one"
            )
        self.padding_token_ids = sorted(set(ids))
        self._padding_mask = None
        if ids:
            self._padding_mask = torch.zeros(self.vocab_size, dtype=self.weight.dtype, device=self.device)
            self._padding_mask[self.padding_token_ids] = -torch.inf

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, tied ones once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trainable parameters by name, tied ones once."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the backward pass computes each layer again."""
        return bool(self._checkpointed)

    def enable_gradient_checkpointing(self) -> None:
        """From now on keep no activations within a layer: the backward pass computes each layer again.

        Memory for activations falls to one [T, H] a layer, an update computes a third more (and by the model's own
        modules, where a CPU's update is computed in the core otherwise). Weights get the same gradients: what is
        computed again is the same, packing included. transformers' own switch asks for train mode,
        which would turn dropout on.

        Raises:
            UnsupportedModelError: for a model without layers that transformers can checkpoint.
        """
        layers = [module for module in self.base.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: gradient_checkpointing: transformers names no layer of it to checkpoint"
            )
        self._checkpointed = layers

    def refuse_dropout(self) -> None:
        """Raise where dropout would act: a model that somebody put back into train mode, and that has any.

        Raises:
            ValueError: as said.
        """
        if self.model.training and any(_drops_out(module) for module in self.model.modules() if module.training):
            raise ValueError(
                f"the policy's {type(self.causal_lm).__name__} is in train mode and has dropout: what is drawn from "
                "and what is trained would be two policies. Call model.eval(); gradients flow all the same"
            )

    def hidden_states(self, input_ids: Tensor, lengths: Sequence[int], rows: Tensor | None = None) -> Tensor:
        """Last hidden states [T, H] of packed token ids [T] made of sequences of the given lengths (host integers).

        Sequences do not see each other. Differentiable; call under torch.no_grad() for scoring. On a CPU in float32 the
        layers of a Llama-shaped model are computed in the core (llama_layers.py), the others' by transformers.

        Args:
            input_ids: int64 [T].
            lengths: of the sequences, host integers that add up to T.
            rows: int64 [N], which of the T tokens are wanted: [N, H] is returned. None: all.

        Raises:
            ValueError: for lengths that do not add up to T, a sequence longer than the model is served for, rows of
                another dtype or shape, or dropout.
        """
        self.refuse_dropout()
        if input_ids.ndim != 1 or input_ids.shape[0] != sum(lengths):
            raise ValueError(f"input_ids must be [{sum(lengths)}] to match lengths; got {list(input_ids.shape)}")
        if rows is not None and (rows.dtype not in (torch.int64, torch.int32) or rows.ndim != 1):
            raise ValueError(f"rows must be int64 [N], indices of tokens; got {rows.dtype} {list(rows.shape)}")
        checkpointed = self._checkpointed if torch.is_grad_enabled() else []
        if self._in_core is not None and not checkpointed:
            layers = self._in_core.weights(self.base, lengths)
            if layers is not None:
                return self._in_core.hidden_states(self.base, layers, input_ids, lengths, rows)
        with _checkpointing(checkpointed):
            hidden = self.plan.hidden_states(self.base, input_ids, lengths)
        return hidden if rows is None else hidden.index_select(0, rows)


def _drops_out(module: nn.Module) -> bool:
    """Whether a module has a dropout that is not 0, as a module or as a number that its forward pass reads."""
    own = {name: value for name, value in vars(module).items() if "dropout" in name}
    if isinstance(module, nn.modules.dropout._DropoutNd):
        own["p"] = module.p
    return any(isinstance(value, float) and value > 0 for value in own.values())


def _count(number: int) -> str:
    """A number of parameters as people say it: 494M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


@contextlib.contextmanager
def _checkpointing(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, these layers are called through torch.utils.checkpoint."""
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            # No layer draws random numbers (dropout is off), so there is no random state to keep.
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


def align(model: nn.Module) -> None:
    """Move weights and buffers that lie at odd addresses of a CPU's memory, as those of a mapped file do.

    The order of a sum, and so its last bits, may follow the address. A model that is loaded from one file and then from
    another, whose header has another length, would not compute the same.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def _check_loaded(name: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Refuse weights that do not fit: transformers fills what is missing with random numbers and only warns."""
    tied = _tied_to_loaded(model, report["missing_keys"])
    problems = {
        "missing": sorted(set(report["missing_keys"]) - tied),
        "of another shape": sorted(str(entry) for entry in report.get("mismatched_keys") or ()),
        "not part of the model": sorted(report["unexpected_keys"]),
    }
    told = [f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
            for what, keys in problems.items() if keys]  # fmt: skip
    if told:
        raise UnsupportedModelError(
            f"{name}: the saved tensors are not those of {type(model).__name__}: {'; '.join(told)}. Training would "
            "start from weights that nobody trained"
        )


def _tied_to_loaded(model: PreTrainedModel, missing: Sequence[str]) -> set[str]:
    """Those of the missing tensors that share memory with one that is not missing, as a tied head does."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {p.data_ptr() for name, p in parameters.items() if name not in set(missing)}
    return {name for name in missing if name in parameters and parameters[name].data_ptr() in loaded}


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    generation = getattr(model, "generation_config", None)
    for source in (generation, model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return sorted({ids} if isinstance(ids, int) else set(ids))
    return []
