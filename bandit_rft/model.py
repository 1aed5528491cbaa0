"""A Hugging Face causal LM seen as (hidden states, head), so that the head can be fused with sampling and loss.

    policy = Policy.load("Qwen/Qwen2.5-0.5B-Instruct")
    hidden = policy.hidden_states(sequences)            # [N, H], the rows that predict completion tokens
    logprobs = ops.linear_logprobs(hidden, policy.weight, targets, **policy.head_options)

Splitting a model in two is only safe when nothing happens between the halves that we do not know of. So wrapping runs a
probe batch both ways and refuses a model whose own logits are not reproduced to float rounding.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bandit_rft import ops
from bandit_rft.ops import attention

#: What configs call a soft cap on the final logits, a factor on them, and a divisor of them.
SOFTCAP_KEYS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTOR_KEYS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISOR_KEYS = ("logits_scaling",)
#: Models that multiply by what everyone else divides by.
MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)

PackingMode = Literal["varlen", "mask", "padded"]


class UnsupportedModelError(ValueError):
    """The model cannot be split into hidden states and a head without changing what it computes."""


# ---------------------------------------------------------------------------------------------------------------------
# Packed attention: every layer but attention works on [T, ...] tokens without padding; attention alone is laid out as
# [sequences, longest] for the time of the call: a kernel with a plain causal mask serves it, no [T, T] mask exists.


class _ScatterRows(torch.autograd.Function):
    """x [T, ...] -> [rows, ...], zero where `index` does not point. Its gradient is a gather, not an atomic add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros((rows, *x.shape[1:])).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _GatherRows(torch.autograd.Function):
    """x [rows, ...] -> x[index] [T, ...] for an index without repeats. Its gradient is a copy, not an atomic add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros((ctx.rows, *grad.shape[1:])).index_copy_(0, ctx.saved_tensors[0], grad), None


def _scatter_rows(x: Tensor, index: Tensor, rows: int) -> Tensor:
    result: Tensor = _ScatterRows.apply(x, index, rows)  # type: ignore[no-untyped-call]
    return result


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    result: Tensor = _GatherRows.apply(x, index)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class Packing:
    """Where the tokens of B packed sequences go in a [B, longest] layout."""

    sequences: int
    longest: int
    index: Tensor | None  # int64 [T], None when every sequence is equally long and the layout is a plain view
    cu_seqlens: Tensor  # int64 [B + 1], where each sequence begins, and T

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> Packing:
        sequences, longest = len(lengths), max(lengths)
        rows = torch.tensor([0, *lengths], device=device)
        cu_seqlens = rows.cumsum(0)
        if all(length == longest for length in lengths):
            return Packing(sequences, longest, None, cu_seqlens)
        starts = torch.arange(sequences, device=device) * longest - cu_seqlens[:-1]
        total = int(sum(lengths))
        index = torch.arange(total, device=device) + starts.repeat_interleave(rows[1:], output_size=total)
        return Packing(sequences, longest, index, cu_seqlens)

    def spread(self, x: Tensor) -> Tensor:
        """[1, heads, T, d] -> [B, heads, longest, d]."""
        tokens = x[0].transpose(0, 1)
        if self.index is not None:
            tokens = _scatter_rows(tokens, self.index, self.sequences * self.longest)
        return tokens.reshape(self.sequences, self.longest, *tokens.shape[1:]).transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """[B, heads, longest, d] -> [1, T, heads, d]."""
        tokens = x.transpose(1, 2).reshape(self.sequences * self.longest, x.shape[1], x.shape[3])
        if self.index is not None:
            tokens = _gather_rows(tokens, self.index)
        return tokens[None]


_packing: Packing | None = None  # set for the time of one forward pass


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence, with the signature of transformers' attention functions."""
    if _packing is None or attention_mask is not None or not getattr(module, "is_causal", True):
        raise NotImplementedError("packed attention serves causal self-attention of packed sequences only")
    for name in ("s_aux", "position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"packed attention does not know {name}")
    length, groups = _packing.longest, query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    plain = softcap is None and (sliding_window is None or sliding_window >= length) and key.shape == value.shape
    if plain and attention.serves(query):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return attention.packed_attention(q, k, v, _packing.cu_seqlens, scale)[None], None
    query, key, value = (_packing.spread(x) for x in (query, key, value))
    mask = None
    if softcap is not None or (sliding_window is not None and sliding_window < length):
        distance = torch.arange(length, device=query.device)
        distance = distance[:, None] - distance[None, :]
        mask = (distance >= 0) & (distance < (sliding_window or length))
    if softcap is not None:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = torch.tanh((query @ key.transpose(-1, -2)) * (scale / softcap)) * softcap
        assert mask is not None
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        output = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value
    else:
        output = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
        )
    return _packing.gather(output), None


# No mask function goes with this name, so transformers builds no mask and passes None.
ALL_ATTENTION_FUNCTIONS.register("bandit_rft_packed", _packed_attention)


# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def attention_function(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within the block, the model attends by the function registered under this name (if it has such an interface)."""
    config = model.config
    configs = [config, *(c for key in config.sub_configs if (c := getattr(config, key, None)) is not None)]
    before = [c._attn_implementation_internal for c in configs]
    try:
        for c in configs:
            c._attn_implementation_internal = name
        yield
    finally:
        for c, implementation in zip(configs, before, strict=True):
            c._attn_implementation_internal = implementation


class Policy:
    """A causal LM, its head taken apart, its tokenizer and its stop tokens.

    Attributes:
        model: the whole model, in eval mode (dropout would make the sampler and the trainer two different policies);
            with a LoRA adapter a peft model, whose adapter alone is trained.
        base: what gives the hidden states, in the model or beneath its adapter.
        weight: the head [V, H], the very parameter of the model (of the input embedding too, when they are tied).
        bias: the head's bias [V] or None.
        softcap, logit_scale: what the model does to its logits, as bandit_rft.ops takes them.
        packing: how packed sequences are kept apart: "varlen" (our attention function), "mask" (transformers' own
            block-diagonal mask) or "padded" (a right-padded batch, for architectures that know no packing).
        stop_tokens: ids that end a completion, from the generation config.

    Raises UnsupportedModelError where the head is adapted or quantized, or the probe finds a difference.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
        self.model = model
        model.train(False)
        self.tokenizer = tokenizer
        causal_lm = _without_adapter(model)
        self.base: nn.Module = causal_lm.base_model
        if self.base is causal_lm:  # transformers 4 gives Gemma 3 a prefix that is not its own
            self.base = causal_lm.get_decoder()  # type: ignore[no-untyped-call]
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        _check_head(head, model)
        self.weight: Tensor = head.weight
        self.bias: Tensor | None = getattr(head, "bias", None)
        self.softcap, self.logit_scale = _logit_transform(model)
        self.stop_tokens = _stop_tokens(model, tokenizer)
        self.vocab_size, self.hidden_size = self.weight.shape
        self.packing: PackingMode = "varlen"
        self._probe()

    @staticmethod
    def load(
        name_or_path: str,
        *,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        revision: str | None = None,
        base: str | None = None,
    ) -> Policy:
        """Load a model and its tokenizer from a folder or the hub; never runs code that comes with the model.

        A LoRA adapter in peft's format is loaded, trainable, with the model it names, or with `base` in place of that.
        Raises OSError (with transformers' own words) when there is no such model, UnsupportedModelError as above,
        ImportError when an adapter needs the extra `lora`.
        """
        from bandit_rft import lora  # which builds on this module

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if os.path.sep in name_or_path and not Path(name_or_path).exists() and name_or_path.count("/") != 1:
            raise FileNotFoundError(f"model_name_or_path: there is no folder {name_or_path!r}")
        device = torch.device(device)
        adapter, source, saved = lora.find_adapter(name_or_path, revision), name_or_path, name_or_path
        if adapter is not None:
            source, revision = adapter.base_of(name_or_path, base)
            saved = str(adapter.folder) if adapter.has_tokenizer else source
        elif base is not None:
            raise ValueError(f"base={base!r} is for adapters; {name_or_path} is a whole model")
        options: dict[str, Any] = {"trust_remote_code": False, "revision": revision}
        config = AutoConfig.from_pretrained(source, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=getattr(torch, dtype), use_safetensors=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(saved, **options)
        model.to(device)
        if adapter is not None:
            model = adapter.attach(model, device)
        return Policy(model, tokenizer)

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder (with a LoRA adapter, a peft folder) with the tokenizer; safetensors only."""
        model: Any = self.model
        # Left to itself, peft asks the hub whether embeddings have grown; they are not trained here.
        options = {"save_embedding_layers": False} if hasattr(model, "get_base_model") else {}
        model.save_pretrained(folder, **options)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def head_options(self) -> dict[str, Any]:
        """The head as keyword arguments of the operations in bandit_rft.ops."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, tied ones once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trainable parameters by name, tied ones once."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def hidden_states(self, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Last hidden states [T, H] of packed token ids [T] made of sequences of the given lengths (host integers).

        Sequences do not see each other. Differentiable; call under torch.no_grad() for scoring.
        """
        if input_ids.ndim != 1 or input_ids.shape[0] != sum(lengths):
            raise ValueError(f"input_ids must be [{sum(lengths)}] to match lengths; got {list(input_ids.shape)}")
        if self.packing == "padded":
            layout = Packing.of(lengths, input_ids.device)
            rows = input_ids.new_zeros(layout.sequences * layout.longest)
            index = torch.arange(len(rows), device=rows.device) if layout.index is None else layout.index
            padded = rows.index_copy(0, index, input_ids).view(layout.sequences, layout.longest)
            output = self.base(input_ids=padded, use_cache=False)
            return _gather_rows(output.last_hidden_state.flatten(0, 1), index)
        positions = torch.cat([torch.arange(n, device=input_ids.device) for n in lengths])
        with self._packed(lengths) if self.packing == "varlen" else contextlib.nullcontext():
            output = self.base(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden[0]

    @contextlib.contextmanager
    def _packed(self, lengths: Sequence[int]) -> Iterator[None]:
        global _packing
        _packing = Packing.of(lengths, self.device)
        try:
            with attention_function(self.model, "bandit_rft_packed"):
                yield
        finally:
            _packing = None

    # -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _probe(self) -> None:
        """Refuse a model that is not hidden states and a head; choose a packing that keeps sequences apart."""
        generator = torch.Generator().manual_seed(0)
        longest = min(24, getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 24)
        lengths = [max(2, longest - 13), longest, max(2, longest // 3)]
        ids = [torch.randint(0, self.vocab_size, (n,), generator=generator).to(self.device) for n in lengths]
        epsilon = torch.finfo(self.weight.dtype).eps
        alone = []
        for sequence in ids:
            output = self.base(input_ids=sequence[None], use_cache=False)
            hidden = getattr(output, "last_hidden_state", None)
            if hidden is None or hidden.shape[-1] != self.hidden_size:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__}: the base model's hidden states have shape "
                    f"{None if hidden is None else list(hidden.shape)}, the head expects a width of {self.hidden_size}"
                )
            alone.append(hidden[0])
            logits = self.model(input_ids=sequence[None], use_cache=False).logits[0].float()
            targets = torch.randint(0, logits.shape[-1], (len(sequence),), generator=generator).to(self.device)
            own = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
            fused: Any = ops.linear_logprobs(hidden[0].to(self.weight.dtype), self.weight, targets, **self.head_options)
            difference = float((fused.double() - own).abs().max())
            # The model rounds each logit to its dtype, we do not; in float32 the order of summation differs as well.
            scale = 1 + float(logits.abs().max())
            allowed = (64 if epsilon < 1e-5 else 4) * epsilon * scale
            if not difference <= allowed:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__}: log-probabilities from hidden states and head (softcap "
                    f"{self.softcap}, logit scale {self.logit_scale}) differ from the model's own logits by "
                    f"{difference:.3g}, float rounding explains {allowed:.3g}. The model does something to its hidden "
                    "states or logits that bandit_rft does not know; training it would optimize another policy."
                )
        together, truth = torch.cat(ids), torch.cat(alone)
        tolerance = (1e-4 if epsilon < 1e-5 else 0.05) * float(truth.abs().max())
        problems = []
        modes: tuple[PackingMode, ...] = ("varlen", "mask", "padded")
        for mode in modes:
            self.packing = mode
            try:
                difference = float((self.hidden_states(together, lengths) - truth).abs().max())
            except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
                problems.append(f"{mode}: {error}")
                continue
            if difference <= tolerance:
                return
            problems.append(f"{mode}: hidden states differ by {difference:.3g} from one sequence at a time")
        raise UnsupportedModelError(
            f"{type(self.model).__name__}: sequences cannot share a batch without seeing each other: "
            + "; ".join(problems)
        )


def _without_adapter(model: Any) -> PreTrainedModel:
    """The causal LM inside a peft model; any other model is its own."""
    if not hasattr(model, "get_base_model"):
        causal_lm: PreTrainedModel = model
        return causal_lm
    from bandit_rft.lora import check_adapter

    check_adapter(model)
    causal_lm = model.get_base_model()
    return causal_lm


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


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    generation = getattr(model, "generation_config", None)
    for source in (generation, model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return sorted({ids} if isinstance(ids, int) else set(ids))
    return []
