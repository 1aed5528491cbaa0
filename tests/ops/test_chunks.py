"""Chunks by whole waves, and what summing dL/dweight in bfloat16 over them costs in accuracy."""

from __future__ import annotations

import math

import pytest
import torch

from bandit_rft.ops import chunks, head

GIB, H200 = 1 << 30, 132


@pytest.mark.parametrize(
    "rows, hidden_size, vocabulary, size",
    [(8192, 4096, 151936, 2048), (16384, 2048, 151936, 2048), (8192, 896, 151936, 2048), (8192, 4096, 128256, 2048)],
)
def test_the_four_shapes_take_2048_rows_within_the_memory_bar(
    rows: int, hidden_size: int, vocabulary: int, size: int
) -> None:
    most = int(1.25 * GIB) // (4 * vocabulary)
    assert chunks.chunk_size(rows, most, hidden_size, H200) == size
    # logits of a chunk, its hidden states gathered and their gradient: all that is allocated beside results
    assert size * (4 * vocabulary + 2 * 2 * hidden_size) <= 1.25 * GIB


def test_whole_waves_decide() -> None:
    assert chunks.waves(2048, 4096, H200) == 2 and 2048 // 128 * 4096 // 256 == 256  # 1.94 waves
    assert chunks.waves(1171, 4096, H200) == 2  # 1.2 waves, paid as 2
    # 2,560 rows would fit at V = 128,256, but their 320 tiles are 2.4 waves, paid as 3.
    assert chunks.cost(8192, 2560, 4096, H200) > chunks.cost(8192, 2048, 4096, H200)
    assert math.isclose(chunks.WAVE_NS, 11.0, abs_tol=0.1) and math.isclose(chunks.SUM_NS * 4096, 3.8, abs_tol=0.1)


@pytest.mark.parametrize("multiprocessors", [0, 108, 132, 148])
@pytest.mark.parametrize("most", [0, 1, 100, 255, 256, 700, 5000])
@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 3000, 8192])
def test_chunks_cover_every_row_once_and_fit(rows: int, most: int, multiprocessors: int) -> None:
    parts = chunks.plan(rows, most, 1000, multiprocessors)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))
    assert all(0 < part.stop - part.start <= max(1, most) for part in parts)
    assert len({part.stop - part.start for part in parts[:-1]}) <= 1
    if multiprocessors == 0 and rows > most >= 1:
        size = parts[0].stop - parts[0].start
        assert len(parts) == math.ceil(rows / most) and (size % 16 == 0 or size == most)
    if multiprocessors and most >= 256 and rows > most:
        assert (parts[0].stop - parts[0].start) % 256 == 0


def test_no_size_is_cheaper_than_the_chosen_one() -> None:
    for rows in (3000, 8192, 10_001):
        for hidden_size in (896, 2048, 4096, 8192):
            chosen = chunks.chunk_size(rows, 2208, hidden_size, H200)
            costs = {size: chunks.cost(rows, size, hidden_size, H200) for size in range(256, 2209, 256)}
            assert costs[chosen] == min(costs.values())


@pytest.mark.parametrize("count", [4, chunks.ROUNDED_SUMS])
@pytest.mark.parametrize("coherent", [False, True])
def test_bfloat16_sums_of_the_weight_gradient_stay_within_the_rule(count: int, coherent: bool) -> None:
    """What a GPU's bfloat16 addmm does, emulated: float32 products and sum, one rounding a chunk.

    The rule: at most twice the error of plain PyTorch in bfloat16 (logits, dL/dlogits and the sum rounded once each).
    """
    n, h, v = 128 * count, 48, 96
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(n, h, generator=generator).bfloat16()
    weight = (torch.randn(v, h, generator=generator) * h**-0.5).bfloat16()
    targets = torch.randint(v, (n,), generator=generator)
    slopes = torch.rand(n, generator=generator) + 0.5 if coherent else torch.randn(n, generator=generator)

    def gradient_of_logits(z: torch.Tensor) -> torch.Tensor:
        z = z.clone().requires_grad_()
        (slopes.to(z) * z.log_softmax(-1).gather(1, targets[:, None])[:, 0]).sum().backward()
        assert z.grad is not None
        return z.grad

    exact = gradient_of_logits(hidden.double() @ weight.double().T).T @ hidden.double()
    plain = gradient_of_logits((hidden @ weight.T).float()).bfloat16().T @ hidden
    narrow = gradient_of_logits(hidden.float() @ weight.float().T).bfloat16()
    total = torch.zeros(v, h, dtype=torch.bfloat16)
    for start in range(0, n, 128):
        part = slice(start, start + 128)
        total = (total.float() + narrow[part].float().T @ hidden[part].float()).bfloat16()

    def error(gradient: torch.Tensor) -> float:
        return float((gradient.double() - exact).norm() / exact.norm())

    assert error(total) <= 2 * error(plain), (error(total), error(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mib", [1, 8, 64])
@pytest.mark.parametrize("threads", [1, 2, 16, 192])
@pytest.mark.parametrize("n, hidden_size", [(1, 64), (40, 4096), (341, 896), (1024, 16384), (5000, 64)])
def test_a_tile_of_columns_fits_the_workspace(
    n: int, hidden_size: int, threads: int, mib: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BANDIT_RFT_WORKSPACE_MIB", str(mib))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(head, "logits", lambda hidden, weight, bias, out: out)
    hidden, weight = torch.empty(n, hidden_size, dtype=dtype), torch.empty(151_936, 1).expand(-1, hidden_size)
    stretches = head.rows_of_tiles(hidden)
    assert [i for part in stretches for i in range(part.start, part.stop)] == list(range(n))
    of = hidden[stretches[0]]
    tiles = list(head.tiles_of_logits(of, weight, None))
    assert [tile.start for tile, _ in tiles] == [0, *(tile.stop for tile, _ in tiles[:-1])]
    assert tiles[-1][0].stop == 151_936
    widened = 4 * of.numel() if dtype == torch.bfloat16 else 0
    assert len(of) == 1 or 4 * tiles[0][1].numel() + widened <= mib << 20
