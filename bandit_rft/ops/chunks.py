"""How many rows of logits at a time on a GPU: by whole waves of the products' tiles, not by equal shares of memory.

A product runs in waves of one 128 x 256 tile a multiprocessor. Of the three products of a chunk of n rows only
dL/dhidden [n, H] has few tiles; in logits [n, V] and dL/dweight [V, H] the last, partly filled wave is one of many. And
each chunk but the first reads the sum of dL/dweight [V, H] again. So a chunk of n rows costs, besides what is
proportional to n,

    waves(n) = ceil(ceil(n / 128) ceil(H / 256) / multiprocessors)    waves of 2 x 128 x 256 x V FLOP a multiprocessor
    4 H V bytes read and written                                      (2 H V of them in bfloat16, each way)

and both grow with V alike: at 790 TFLOP/s on 132 multiprocessors and 4.3 TB/s a wave costs 11.0 ns and the sum
0.93 ps x H for each entry of the vocabulary. At H = 4096 that is 11.0 against 3.8: 2,048 rows are 256 tiles, 1.94
waves, where 1,171 rows (equal shares of 8,192 in 0.75 GiB at V = 151,936) were 160 tiles, 1.2 waves paid as 2.
"""

from __future__ import annotations

import math

STEP = 256  # rows: two tiles
CPU_STEP = 16  # rows: a BLAS computes whole vectors of them
TILE = (128, 256)
WAVE_NS = 2 * TILE[0] * TILE[1] / (790e12 / 132) * 1e9
SUM_NS = 4 / 4.3e12 * 1e9
#: Sums of dL/dweight rounded to bfloat16 in turn stay within twice the error of plain PyTorch up to here: the error of
#: one rounding times sqrt((count + 1) / 2) where chunks contribute alike (tests/ops/test_chunks.py measures it).
ROUNDED_SUMS = 8


def waves(rows: int, hidden_size: int, multiprocessors: int) -> int:
    """Of dL/dhidden's tiles for a chunk of this many rows."""
    return math.ceil(math.ceil(rows / TILE[0]) * math.ceil(hidden_size / TILE[1]) / multiprocessors)


def cost(rows: int, size: int, hidden_size: int, multiprocessors: int) -> float:
    """Nanoseconds for each entry of the vocabulary that `rows` rows cost in chunks of `size`, beyond their share."""
    full, last = divmod(rows, size)
    count = full * waves(size, hidden_size, multiprocessors)
    if last:
        count += waves(last, hidden_size, multiprocessors)
    return count * WAVE_NS + math.ceil(rows / size) * hidden_size * SUM_NS


def chunk_size(rows: int, most: int, hidden_size: int, multiprocessors: int) -> int:
    """How many rows a chunk has.

    Args:
        rows: of the batch, at least 1.
        most: whose logits the workspace allows, at least 1.
        hidden_size: H.
        multiprocessors: of the GPU; 0 on a CPU.

    Returns:
        On a CPU as few chunks as may be, about equal, of a multiple of 16 rows where that is not above `most`. On a GPU
        the multiple of 256, at most `most`, with the least cost (the largest of those; all rows at once, where they may
        be). Where `most` is below 256, `most`.
    """
    if rows <= most:
        return rows
    if multiprocessors == 0:
        equal = math.ceil(rows / math.ceil(rows / most))
        return min(math.ceil(equal / CPU_STEP) * CPU_STEP, most)
    sizes = range(most // STEP * STEP, 0, -STEP)
    return min(sizes, key=lambda size: cost(rows, size, hidden_size, multiprocessors), default=most)


def plan(rows: int, most: int, hidden_size: int, multiprocessors: int) -> list[slice]:
    """The chunks, in order: all of `chunk_size` but the last."""
    if rows == 0:
        return []
    size = chunk_size(rows, max(1, most), hidden_size, multiprocessors)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
