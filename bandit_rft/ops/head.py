"""The matrix products around the rows: logits = hidden . weight^T + bias, and its two gradients, a chunk at a time.

These products are the vendor's (a backend may have others), accumulate in float32 and never round a logit to bfloat16.
On a GPU, bfloat16 inputs stay bfloat16 (float32 out); a CPU has no fast such product, so there the weight is widened, a
tile of the vocabulary at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .chunks import plan
from .reference import computing_dtype

_TILE_BYTES = 8 << 20  # of widened weight at a time
_TILE_LOGITS = 1 << 17  # that a CPU's thread computes at a time, of at least 256 columns: they stay in its cache
_TILE_COLUMNS = 256
_TILE_ROWS = 1024  # at most, where a tile is looked at and forgotten: of more, the products are hardly faster
BLOCK = 128  # vocabulary entries that a sparse backward leaves out together


def workspace_bytes(device: torch.device) -> int:
    """How much memory an operation may use beyond its inputs and results; BANDIT_RFT_WORKSPACE_MIB overrides it."""
    default = 64 if device.type == "cpu" else 1280
    text = os.environ.get("BANDIT_RFT_WORKSPACE_MIB", "")
    if not text:
        return default << 20
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"BANDIT_RFT_WORKSPACE_MIB must be a positive whole number of MiB; got {text!r}")
    return int(text) << 20


def chunks(rows: int, columns: int, like: Tensor, copies: int, share: float = 0.85) -> list[slice]:
    """Stretches of rows whose logits, `copies` times, fit a share of the workspace (chunks.py: which size).

    Args:
        rows: how many there are.
        columns: logits a row.
        like: hidden states [N, H].
        copies: of the logits that exist at once.
        share: of the workspace.
    """
    bytes_a_row = columns * copies * (8 if like.dtype == torch.float64 else 4)
    most = int(workspace_bytes(like.device) * share) // bytes_a_row
    return plan(rows, most, like.shape[1], multiprocessors(like.device))


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 0 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def workspace(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """Room for the logits of one chunk, [rows, vocabulary] in the computing dtype."""
    return torch.empty((rows, vocabulary), dtype=computing_dtype(like), device=like.device)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden [n, H] . weight [V, H]^T + bias [V], written to (and returned as) the first n rows of out, float32."""
    z = out[: hidden.shape[0]]
    if widens(weight):
        wide = hidden.to(z.dtype)
        # A tile of columns at a time: a BLAS adds to z once for each few hundred of H, and finds the tile in its cache.
        for tile, wide_weight in _widened(weight, z.dtype, columns_a_tile(len(z))):
            z[:, tile].addmm_(wide, wide_weight.T, beta=0)
    elif weight.dtype == z.dtype:
        torch.mm(hidden, weight.T, out=z)
    else:
        _mixed_product(hidden, weight.T, z, accumulate=False)
    if bias is not None:
        z += bias
    return z


def rows_of_tiles(like: Tensor) -> list[slice]:
    """Stretches of rows for `tiles_of_logits` that fit the workspace."""
    threads, widened = torch.get_num_threads(), like.shape[1] if like.dtype.itemsize == 2 else 0
    most = _tile_numbers(like) // (threads * _TILE_COLUMNS + widened)
    return plan(len(like), min(most, _TILE_ROWS), like.shape[1], 0)


def tiles_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """`logits` a tile of columns at a time, each [n, columns] in the memory of the one before."""
    rows = max(1, len(hidden))
    left = _tile_numbers(hidden) - (hidden.numel() if hidden.dtype.itemsize == 2 else 0)
    size = max(1, min(len(weight), columns_a_tile(rows), left // rows))
    memory = workspace(len(hidden), size, hidden).flatten()
    hidden = hidden.to(computing_dtype(hidden)).contiguous()  # once, not for every tile
    for start in range(0, len(weight), size):
        tile = slice(start, min(start + size, len(weight)))
        out = memory[: len(hidden) * (tile.stop - start)].view(len(hidden), -1)
        yield tile, logits(hidden, weight[tile], None if bias is None else bias[tile], out)


def _tile_numbers(like: Tensor) -> int:
    """How many logits and widened hidden states may exist; a quarter is for the weight that is widened."""
    return int(workspace_bytes(like.device) * 0.75) // 4


def narrow_gradient(z: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Where a backend that `writes_narrow` puts dL/dz [n, V] in the weight's dtype: over the second half of z's rows.

    The gradient products need it in 16 bits; written there it costs no memory and no visit of its own. None where dL/dz
    goes over z itself.
    """
    if dtype.itemsize != 2 or z.dtype != torch.float32:
        return None
    return z.view(dtype)[:, z.shape[1] :]


def columns_that_count(dz: Tensor, floor: float | Tensor) -> Tensor | None:
    """The columns of dz [n, V], in blocks of 128, where some |dz| is not below floor, int64; None: most, so take all.

    On a GPU the host waits for their number.
    """
    vocabulary = dz.shape[1]
    low, high = dz.aminmax(dim=0)
    largest = torch.nn.functional.pad(torch.maximum(high, -low), (0, -vocabulary % BLOCK)).view(-1, BLOCK)
    blocks = (~(largest < floor)).any(1).nonzero()  # a NaN counts: it must be seen, not dropped
    if 2 * len(blocks) > len(largest):
        return None
    columns = (blocks * BLOCK + torch.arange(BLOCK, device=dz.device)).flatten()
    return columns[columns < vocabulary]


def add_hidden_gradient(dz: Tensor, weight: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out [n, H] (+)= dz [n, V] . weight [V, H]; out has weight's dtype, or for float16 may be float32.

    It is added up where all three have one dtype alone.
    """
    if weight.dtype == dz.dtype == out.dtype:
        torch.addmm(out, dz, weight, out=out) if accumulate else torch.mm(dz, weight, out=out)
    elif accumulate:
        raise ValueError("add_hidden_gradient accumulates where all dtypes are the same")
    elif widens(weight):
        total = torch.zeros(out.shape, dtype=dz.dtype, device=out.device)
        for tile, wide_weight in _widened(weight, dz.dtype, len(weight)):
            total.addmm_(dz[:, tile], wide_weight)
        out.copy_(total)
    elif weight.dtype == out.dtype:
        torch.mm(dz.to(weight.dtype), weight, out=out)
    else:
        _mixed_product(dz.to(weight.dtype), weight, out, accumulate=False)


def add_weight_gradient(dz: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
    """out [V, H] (+)= dz [n, V]^T . hidden [n, H]; out is in the computing dtype, or rounded to hidden's each time."""
    if hidden.dtype == out.dtype or widens(hidden):
        out.addmm_(dz.to(out.dtype).T, hidden.to(out.dtype), beta=1.0 if accumulate else 0.0)
    else:
        _mixed_product(dz.to(hidden.dtype).T, hidden, out, accumulate)


def widens(tensor: Tensor) -> bool:
    """Whether 16-bit operands are made float32 before a product: on a CPU, whose products round to 16 bits."""
    return tensor.device.type == "cpu"


@cache
def takes_out_dtype(product: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.mm or torch.addmm multiplies this dtype into float32 here. torch 2.8 and 2.9 refuse addmm's.

    Asked by trying it once, on 16 x 16 zeros: no version is compared.
    """
    operand = torch.zeros((16, 16), dtype=dtype, device=device)
    wide = torch.zeros((16, 16), dtype=torch.float32, device=device)
    try:
        if product == "mm":
            torch.mm(operand, operand, out_dtype=torch.float32, out=wide)
        else:
            torch.addmm(wide, operand, operand, out_dtype=torch.float32, out=wide)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # of memory, or of a kernel before: it says nothing of this product
    except (RuntimeError, TypeError):  # refused on the host, before anything is launched
        return False
    return True


def _mixed_product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """out (float32) (+)= a . b of 16-bit operands, with float32 sums; the way that this torch has."""
    if not accumulate and takes_out_dtype("mm", a.device, a.dtype):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif accumulate and takes_out_dtype("addmm", a.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:  # a tile of out's rows at a time, so that what stands beside it is small
        mixed = takes_out_dtype("mm", a.device, a.dtype)
        size = max(1, _TILE_BYTES // (4 * max(a.shape[1], b.shape[1])))
        wide_b = None if mixed else b.to(out.dtype)
        for start in range(0, len(out), size):
            tile = slice(start, min(start + size, len(out)))
            if wide_b is None:
                part = torch.mm(a[tile], b, out_dtype=out.dtype)
            else:
                part = torch.mm(a[tile].to(out.dtype), wide_b)
            out[tile] = out[tile] + part if accumulate else part


def columns_a_tile(rows: int) -> int:
    """Of logits that a CPU computes at once."""
    return torch.get_num_threads() * max(_TILE_COLUMNS, _TILE_LOGITS // max(1, rows))


def _widened(weight: Tensor, dtype: torch.dtype, most: int) -> Iterator[tuple[slice, Tensor]]:
    """Tiles of at most so many rows; of a weight that has the dtype already they are views."""
    size = most if weight.dtype == dtype else min(most, max(1, _TILE_BYTES // (4 * weight.shape[1])))
    for start in range(0, weight.shape[0], size):
        tile = slice(start, min(start + size, weight.shape[0]))
        yield tile, weight[tile].to(dtype)
