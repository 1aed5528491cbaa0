"""What bad input gets: a ValueError or TypeError that names the argument, what it is and what was expected.

Everything that shape, dtype and device tell is checked before any kernel runs, at no cost. Values are checked where
looking at them does not wait for a GPU: on a CPU always, elsewhere in checked mode (backends.checked).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .objective import LARGEST, SMALLEST
from .reference import IGNORED

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_of(tensor: Tensor) -> str:
    """A tensor's shape as messages show it: [2, 3]."""
    return f"[{', '.join(str(n) for n in tensor.shape)}]"


def tensor(name: str, value: object, rank: int, axes: str) -> Tensor:
    """A tensor with so many axes, which `axes` names in the message."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {axes}; got {type(value).__name__}")
    if value.dim() != rank:
        raise ValueError(f"{name} must be {axes}; got shape {shape_of(value)}")
    return value


def floating(name: str, value: Tensor) -> None:
    """One of the dtypes that the operations compute with."""
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {_name(value.dtype)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """On the device of another argument."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}; got {value.device}")


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: str) -> None:
    """Hidden states [rows, H], weight [V, H] and bias [V] or None belong together."""
    tensor("hidden", hidden, 2, f"[{rows}, H]")
    tensor("weight", weight, 2, "[V, H]")
    floating("hidden", hidden)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight must have hidden's dtype {_name(hidden.dtype)}; got {_name(weight.dtype)}")
    same_device("weight", weight, "hidden", hidden)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight must be [V, H] with H = {hidden.shape[1]} as in hidden {shape_of(hidden)}; got {shape_of(weight)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight must have V >= 1 and H >= 1; got {shape_of(weight)}")
    if bias is not None:
        tensor("bias", bias, 1, "[V]")
        floating("bias", bias)
        same_device("bias", bias, "hidden", hidden)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias must be [V] with V = {weight.shape[0]} as in weight; got {shape_of(bias)}")


def logits(value: Tensor, rows: str) -> None:
    """Logits [rows, V] with V >= 1."""
    tensor("logits", value, 2, f"[{rows}, V]")
    floating("logits", value)
    if value.shape[1] == 0:
        raise ValueError(f"logits must have V >= 1; got {shape_of(value)}")


def per_row(name: str, value: object, rows: int, axis: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A vector with one entry a row of `like`."""
    vector = tensor(name, value, 1, f"[{axis}]")
    if vector.shape[0] != rows:
        raise ValueError(f"{name} must be [{axis}] with {axis} = {rows}; got {shape_of(vector)}")
    same_device(name, vector, "hidden" if like.dim() == 2 else "logits", like)
    if dtype is torch.int64 and vector.dtype != torch.int64:
        raise TypeError(f"{name} must be int64; got {_name(vector.dtype)}")
    if dtype is None:
        floating(name, vector)
    return vector


def scaling(
    temperature: float | Tensor, softcap: float | None, logit_scale: float, rows: int, axis: str, like: Tensor
) -> None:
    """A temperature > 0 or one a row, a softcap > 0 or None, a logit scale other than 0."""
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        per_row("temperature", temperature, rows, axis, like)
    elif isinstance(temperature, Tensor):
        raise ValueError(f"temperature must be a float or a [{axis}] tensor; got a 0-d tensor (use .item())")
    else:
        positive("temperature", temperature)
    if softcap is not None:
        positive("softcap", softcap)
    number("logit_scale", logit_scale, "a finite number other than 0")
    if not SMALLEST <= abs(logit_scale) <= LARGEST:
        raise ValueError(f"logit_scale must be a finite number other than 0 in float32; got {logit_scale}")


def number(name: str, value: object, expected: str) -> None:
    """A Python number, or what torch.compile(dynamic=True) puts in its place."""
    # A tuple: torch.compile of torch 2.8 breaks on int | float.
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be {expected}; got {type(value).__name__}")


def positive(name: str, value: float) -> None:
    """A number that float32 holds in full precision, as its reciprocal: kernels multiply by that."""
    number(name, value, "a number > 0")
    if not (value > 0 and value < math.inf):
        raise ValueError(f"{name} must be > 0 and finite; got {value}")
    if not SMALLEST <= value <= LARGEST:
        raise ValueError(f"{name} must be > 0 and finite in float32, from {SMALLEST:.2g} to {LARGEST:.2g}; got {value}")


def filters(top_k: int, top_p: float, min_p: float) -> None:
    """A whole top_k >= 0, top_p in (0, 1], min_p in [0, 1]."""
    if isinstance(top_k, bool) or not isinstance(top_k, (int, torch.SymInt)) or not 0 <= top_k < 1 << 63:
        raise ValueError(f"top_k must be a whole number >= 0 and < 2^63 (0 keeps every token); got {top_k!r}")
    number("top_p", top_p, "a number in (0, 1]")
    if not (top_p >= SMALLEST and top_p <= 1):  # in float32, as kernels take it
        raise ValueError(f"top_p must lie in (0, 1] (1 keeps every token); got {top_p!r}")
    number("min_p", min_p, "a number in [0, 1]")
    if not (min_p >= 0 and min_p <= 1):
        raise ValueError(f"min_p must lie in [0, 1] (0 keeps every token); got {min_p!r}")


def no_forward_mode(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError for an input with a tangent: the results' would silently be zero."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "bandit_rft's operations have no forward-mode derivative (jvp); use reverse mode, or ops.reference"
        )


def normalizer(value: float | Tensor | None) -> float | Tensor | None:
    """A number > 0 or such a 0-d tensor; a tensor that cannot be looked at becomes NaN where it is not."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        positive("normalizer", value)
        return value
    if value.dim() != 0:
        raise ValueError(f"normalizer must be a number > 0 or a 0-d tensor; got shape {shape_of(value)}")
    if value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"normalizer must be a real number; got a tensor of {_name(value.dtype)}")
    if readable(value):
        positive("normalizer", value.item())
        return value.detach()
    value = value.detach().to(torch.float64)
    return torch.where((value >= SMALLEST) & (value <= LARGEST), value, math.nan).to(torch.float32)


def sequences(cu_seqlens: object, tokens: int, like: Tensor) -> Tensor:
    """Offsets [B + 1] of packed sequences; their values are checked by `sequence_values`."""
    cu = tensor("cu_seqlens", cu_seqlens, 1, "[B + 1]")
    if cu.shape[0] == 0:
        raise ValueError(f"cu_seqlens must be [B + 1], beginning with 0; got shape {shape_of(cu)}")
    if cu.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 (or int64); got {_name(cu.dtype)}")
    if cu.shape[0] == 0:
        raise ValueError("cu_seqlens must be [B + 1] and start with 0; got an empty tensor")
    same_device("cu_seqlens", cu, "hidden", like)
    return cu


def readable(value: Tensor) -> bool:
    """Whether looking at values is free: on a CPU, or asked for. Nothing has a value while it is traced."""
    return not torch.compiler.is_compiling() and (value.device.type == "cpu" or backends.is_checked())


def sequence_values(cu_seqlens: Tensor, tokens: int) -> None:
    """Offsets that never fall, from 0 to the number of tokens; where looking is free."""
    if readable(cu_seqlens):
        values = cu_seqlens.tolist()  # a few numbers: cheaper to look at here than by operations of torch
        if values[0] != 0 or values[-1] != tokens or any(a > b for a, b in pairwise(values)):
            shown = values if len(values) <= 8 else [*values[:4], "...", *values[-3:]]
            raise ValueError(f"cu_seqlens must be increasing from 0 to N = {tokens}; got {shown}")


def target_values(targets: Tensor, vocabulary: int) -> None:
    """Targets in [0, V), or IGNORED; where looking is free."""
    if readable(targets):
        within("targets", targets, vocabulary, f"[0, V = {vocabulary})", besides=IGNORED)


def within(name: str, values: Tensor, end: int, expected: str, besides: int | None = None) -> None:
    """Raise ValueError unless every integer lies in [0, end), or is the one `besides`, which is not counted."""
    if values.numel() == 0:
        return
    low, high = values.aminmax()
    if low.item() < 0 or high.item() >= end:
        outside, also = (values < 0) | (values >= end), ""
        if besides is not None:
            outside, also = outside & (values != besides), f" ({besides} would not be counted)"
        for where in outside.nonzero()[:1, 0].tolist():
            raise ValueError(f"{name} must lie in {expected}; {name}[{where}] is {int(values[where])}{also}")


def temperature_values(temperature: Tensor | None) -> None:
    """Temperatures > 0 that float32 holds; where looking is free."""
    if temperature is not None and readable(temperature) and temperature.numel():
        bad = ~((temperature >= SMALLEST) & (temperature <= LARGEST))
        if bool(bad.any()):
            where = int(bad.nonzero()[0, 0])
            raise ValueError(f"temperature must be > 0 and finite; temperature[{where}] is {float(temperature[where])}")


def finite_values(name: str, values: Tensor | None) -> None:
    """In checked mode: raise on a NaN or infinity with its index."""
    if values is not None and backends.is_checked() and values.numel():
        bad = ~torch.isfinite(values)
        if bool(bad.any()):
            where = int(bad.nonzero()[0, 0])
            raise ValueError(f"{name} must be finite; row {where} is {float(values[where])} (checked mode)")
