"""The matrix products around the rows: logits = hidden . weight^T + bias, and its two gradients, a chunk at a time.

Products are the vendor's, accumulate in float32 and never round a logit to bfloat16. On a GPU, bfloat16 inputs stay
bfloat16 (float32 out); a CPU has no fast such product, so there the weight is widened, a tile of the vocabulary at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import backends
from .reference import computing_dtype

_TILE_BYTES = 8 << 20  # of widened weight at a time
BLOCK = 128  # vocabulary entries that a sparse backward leaves out together


def chunks(
    rows: int, vocabulary: int, device: torch.device, dtype: torch.dtype, backend: str, share: float = 0.85
) -> list[slice]:
    """Equal stretches of rows whose logits (and what plain PyTorch needs beside them) fit a share of the workspace."""
    if rows == 0:
        return []
    copies = 10 if backend == "torch" else 1  # the torch rows hold z, log p, p, dz and temporaries beside the logits
    bytes_a_row = vocabulary * copies * (8 if dtype == torch.float64 else 4)
    most = max(1, int(backends.workspace_bytes(device) * share) // bytes_a_row)
    count = -(-rows // most)
    size = -(-rows // count)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def workspace(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    return torch.empty((rows, vocabulary), dtype=computing_dtype(like), device=like.device)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden [n, H] . weight [V, H]^T + bias [V], written to (and returned as) the first n rows of out, float32."""
    z = out[: hidden.shape[0]]
    if weight.dtype == z.dtype:
        torch.mm(hidden, weight.T, out=z)
    elif weight.device.type == "cpu":
        wide = hidden.to(z.dtype)
        for tile, wide_weight in _widened(weight, z.dtype):
            # Not out=: a slice of columns would be computed into a copy anyway.
            z[:, tile] = wide @ wide_weight.T
    else:
        torch.mm(hidden, weight.T, out_dtype=z.dtype, out=z)
    if bias is not None:
        z += bias
    return z


def narrow_gradient(z: Tensor, dtype: torch.dtype, backend: str) -> Tensor | None:
    """Where the cuda rows write dL/dz [n, V] in the weight's dtype: over the second half of each row of z [n, V].

    The gradient products need it in 16 bits; written there it costs no memory and no visit of its own. None where dL/dz
    goes over z itself.
    """
    if backend != "cuda" or dtype.itemsize != 2 or z.dtype != torch.float32:
        return None
    return z.view(dtype)[:, z.shape[1] :]


def columns_that_count(dz: Tensor, floor: float) -> Tensor | None:
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


def add_hidden_gradient(dz: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [n, H] = dz [n, V] . weight [V, H]; out has weight's dtype."""
    if weight.dtype == dz.dtype:
        torch.mm(dz, weight, out=out)
    elif weight.device.type == "cpu":
        total = torch.zeros(out.shape, dtype=dz.dtype)
        for tile, wide_weight in _widened(weight, dz.dtype):
            total.addmm_(dz[:, tile], wide_weight)
        out.copy_(total)
    else:
        torch.mm(dz.to(weight.dtype), weight, out=out)


def add_weight_gradient(dz: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
    """out [V, H] (+)= dz [n, V]^T . hidden [n, H]; out is in the computing dtype."""
    beta = 1.0 if accumulate else 0.0
    if hidden.dtype == out.dtype or hidden.device.type == "cpu":
        out.addmm_(dz.T, hidden.to(out.dtype), beta=beta)
    elif accumulate:
        torch.addmm(out, dz.to(hidden.dtype).T, hidden, out_dtype=out.dtype, out=out)
    else:
        torch.mm(dz.to(hidden.dtype).T, hidden, out_dtype=out.dtype, out=out)


def _widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    size = max(1, _TILE_BYTES // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], size):
        tile = slice(start, min(start + size, weight.shape[0]))
        yield tile, weight[tile].to(dtype)
