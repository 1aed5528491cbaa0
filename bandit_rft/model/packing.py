"""Packed sequences through a transformers model: every layer but attention works on [T, ...] tokens without padding.

The packing travels with the call, as a keyword argument that transformers hands down to the attention function. So a
layer that is computed again in the backward pass (activation checkpointing) sees the same packing as the first time.
Within attention alone the tokens are laid out as [sequences, longest], unless a kernel takes them as they are: one with
a plain causal mask serves them, no [T, T] mask exists.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bandit_rft.ops import attention
from bandit_rft.transfer import to_device

#: How packed sequences are kept apart: by our attention function, by the block-diagonal mask that transformers makes
#: from positions, by a right-padded batch (architectures that know no packing), or by one call a sequence.
PackingMode = Literal["varlen", "mask", "padded", "single"]

#: The keyword argument that carries a Packing to the attention function.
PACKING = "bandit_rft_packing"


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
        """The packing of sequences of these lengths (host integers)."""
        sequences, longest = len(lengths), max(lengths)
        rows = to_device([0, *lengths], device)
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


# --- attention --------------------------------------------------------------------------------------------------------


@functools.cache
def _varlen_attn() -> tuple[Callable[..., Tensor] | None, frozenset[str]]:
    """PyTorch's attention over packed sequences and the names of its parameters; (None, {}) where torch has none."""
    try:
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None, frozenset()
    return function, frozenset(inspect.signature(function).parameters)


def varlen_attn_serves(
    device_type: str, dtype: torch.dtype, head_size: int, value_size: int, parameters: frozenset[str]
) -> bool:
    """Whether torch.nn.attention.varlen.varlen_attn takes such a call.

    FlashAttention's conditions: an NVIDIA GPU, half precision, equally wide heads of at most 256 in steps of 8. Earlier
    versions lack the scale, the window or grouped queries; for those the padded layout remains.

    Args:
        device_type: of the tensors, such as "cuda".
        dtype: of the tensors.
        head_size: width of a query and key head.
        value_size: width of a value head.
        parameters: names that the installed torch's varlen_attn takes; empty where there is none.
    """
    return (
        device_type == "cuda"
        and torch.version.hip is None
        and dtype in (torch.bfloat16, torch.float16)
        and head_size == value_size <= 256
        and head_size % 8 == 0
        and {"scale", "window_size", "enable_gqa"} <= parameters
    )


def packed_attention(
    packing: Packing,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention within each packed sequence; differentiable.

    Args:
        packing: of the T tokens.
        query: [1, heads, T, d].
        key: [1, key_value_heads, T, d].
        value: [1, key_value_heads, T, e].
        scaling: factor on the scores, d ** -0.5 by default.
        sliding_window: how many tokens one sees, itself included; all earlier ones by default.
        softcap: scores s become softcap * tanh(s / softcap).
        sinks: [heads], the score of a token without a value that every token sees.

    Returns:
        [1, T, heads, e].
    """
    length, groups = packing.longest, query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    windowed = sliding_window is not None and sliding_window < length
    plain = softcap is None and sinks is None
    alike = key.shape == value.shape and query.dtype == key.dtype == value.dtype  # autocast leaves them apart
    if plain and not windowed and alike and attention.serves(query):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return attention.packed_attention(q, k, v, packing.cu_seqlens, scale)[None]
    function, parameters = _varlen_attn()
    if plain and varlen_attn_serves(
        query.device.type, query.dtype, query.shape[-1], value.shape[-1], parameters
    ):  # written against the interface of torch 2.13; not yet run on a GPU
        assert function is not None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        cu_seqlens = packing.cu_seqlens.int()
        window = (sliding_window - 1 if windowed and sliding_window is not None else -1, 0)
        return function(
            q, k, v, cu_seqlens, cu_seqlens, length, length, scale=scale, window_size=window, enable_gqa=groups > 1
        )[None]
    query, key, value = (packing.spread(x) for x in (query, key, value))
    mask = None
    if not plain or windowed:
        distance = torch.arange(length, device=query.device)
        distance = distance[:, None] - distance[None, :]
        mask = (distance >= 0) & (distance < (sliding_window or length))
    if not plain:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = (query @ key.transpose(-1, -2)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        assert mask is not None
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if sinks is not None:
            column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], -1)
        precision = torch.promote_types(query.dtype, torch.float32)
        weights = torch.softmax(scores, -1, dtype=precision).to(query.dtype)
        output = weights[..., :length] @ value
    else:
        output = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
        )
    return packing.gather(output)


# --- transformers' interface ------------------------------------------------------------------------------------------


class _PackedOr:
    """An attention function of transformers: packed where the call carries a Packing, else the one it stands for."""

    def __init__(self, implementation: str):
        self.implementation = implementation

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        packing: Packing | None = kwargs.pop(PACKING, None)
        if packing is None:
            if attention_mask is not None and attention_mask.dtype == _NO_MASK:
                raise NotImplementedError("its layers do not hand keyword arguments down to their attention")
            result: tuple[Tensor, Tensor | None] = self._plain(module)(
                module, query, key, value, attention_mask, **kwargs
            )
            return result
        if attention_mask is None or attention_mask.dtype != _NO_MASK:
            raise NotImplementedError("its layers make an attention mask of their own")
        if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
            raise NotImplementedError("its attention is not causal")
        if query.shape[2] != key.shape[2]:
            raise NotImplementedError("its attention sees other tokens than those of the packed sequences")
        for name in ("position_bias", "head_mask", "indices", "block_indices"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"packed attention does not know {name}")
        options = {name: kwargs.get(name) for name in ("scaling", "sliding_window", "softcap")}
        return packed_attention(packing, query, key, value, sinks=kwargs.get("s_aux"), **options), None

    def _plain(self, module: nn.Module) -> Callable[..., Any]:
        if self.implementation == "eager":  # each model file has its own
            function: Callable[..., Any] = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
            return function
        return ALL_ATTENTION_FUNCTIONS[self.implementation]  # type: ignore[no-any-return]


#: What a packed call gives as attention mask. transformers hands a mask of four dimensions on as it is and makes none;
#: no real one has this type, so a layer that would attend by it unasked is found out. Its one value is NaN: so is all
#: that is computed from it.
_NO_MASK = torch.complex64
#: The implementation that packs, for each that it can stand for. Others know packed sequences themselves (flash).
_PACKED = {name: f"bandit_rft_{name}" for name in ("sdpa", "eager")}

for _name, _packed in _PACKED.items():
    ALL_ATTENTION_FUNCTIONS.register(_packed, _PackedOr(_name))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_packed, ALL_MASK_ATTENTION_FUNCTIONS[_name])


def use_packed_attention(model: PreTrainedModel) -> None:
    """From now on the model attends packed where a call carries a packing, and by its own implementation elsewhere.

    It stays set: a layer that is computed again in the backward pass looks its attention function up again.

    Raises:
        NotImplementedError: where the model offers no choice of its attention function.
    """
    implementation = model.config._attn_implementation
    if implementation in _PACKED.values():
        return
    if implementation not in _PACKED:
        raise NotImplementedError(f"{implementation} attention is left to transformers")
    model.set_attn_implementation(_PACKED[implementation])  # which warns and does nothing where it cannot be chosen
    if model.config._attn_implementation != _PACKED[implementation]:
        raise NotImplementedError("it has no choice of attention functions")


def use_own_attention(model: PreTrainedModel) -> None:
    """Undo `use_packed_attention`."""
    own = {packed: name for name, packed in _PACKED.items()}.get(model.config._attn_implementation)
    if own is not None:
        model.set_attn_implementation(own)


@dataclass(frozen=True)
class PackingPlan:
    """How a model computes packed sequences exactly.

    Attributes:
        mode: how sequences are kept apart.
        apart: sequences longer than this go through the model apart from the others, since what their length changes
            (rotary frequencies) the model changes for the whole call; None: all go together.
        max_length: the longest sequence that is served; None: any.
    """

    mode: PackingMode
    apart: int | None = None
    max_length: int | None = None

    def hidden_states(self, base: nn.Module, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Last hidden states [T, H] of packed token ids [T], sequences not seeing each other; differentiable.

        Args:
            base: the model beneath the head; mode "varlen" needs `use_packed_attention` before.
            input_ids: int64 [T].
            lengths: of the sequences, host integers that add up to T.

        Raises:
            ValueError: for a sequence longer than max_length.
        """
        if self.max_length is not None and max(lengths) > self.max_length:
            raise ValueError(
                f"a sequence of {max(lengths)} tokens: this model is served up to {self.max_length}. Beyond, what it "
                "computes for a token depends on the length of the text, or could not be checked (docs/models.md)"
            )
        beyond = [self.apart is not None and n > self.apart for n in lengths]
        if len(set(beyond)) == 1:
            return _hidden_states(base, input_ids, lengths, self.mode)
        sequences = input_ids.split(list(lengths))
        parts: dict[int, Tensor] = {}
        for side in (False, True):
            group = [i for i, is_beyond in enumerate(beyond) if is_beyond == side]
            chosen = [lengths[i] for i in group]
            hidden = _hidden_states(base, torch.cat([sequences[i] for i in group]), chosen, self.mode)
            parts.update(zip(group, hidden.split(chosen), strict=True))
        return torch.cat([parts[i] for i in range(len(lengths))])


def _hidden_states(base: nn.Module, input_ids: Tensor, lengths: Sequence[int], mode: PackingMode) -> Tensor:
    if mode == "single":
        calls = (base(input_ids=ids[None], use_cache=False) for ids in input_ids.split(list(lengths)))
        return torch.cat([output.last_hidden_state[0] for output in calls])
    if mode == "padded":
        layout = Packing.of(lengths, input_ids.device)
        cells = input_ids.new_zeros(layout.sequences * layout.longest)
        index = torch.arange(len(cells), device=cells.device) if layout.index is None else layout.index
        padded = cells.index_copy(0, index, input_ids).view(layout.sequences, layout.longest)
        output = base(input_ids=padded, use_cache=False)
        return _gather_rows(output.last_hidden_state.flatten(0, 1), index)
    positions = torch.cat([torch.arange(n, device=input_ids.device) for n in lengths])
    extra: dict[str, Any] = {}
    if mode == "varlen":
        no_mask = torch.full((1, 1, 1, 1), torch.nan, dtype=_NO_MASK, device=input_ids.device)
        extra = {"attention_mask": no_mask, PACKING: Packing.of(lengths, input_ids.device)}
    output = base(input_ids=input_ids[None], position_ids=positions[None], use_cache=False, **extra)
    hidden: Tensor = output.last_hidden_state
    return hidden[0]
