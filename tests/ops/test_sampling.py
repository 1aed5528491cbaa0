"""linear_sample and sample_from_logits: the distribution, the statistics, and independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import BACKENDS
from torch import Tensor

from bandit_rft import Sample, linear_sample, sample_from_logits
from bandit_rft.ops import reference, use_backend

FILTERS = [{}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}]


def stream(rows: int, seed: int = 11) -> dict[str, object]:
    return {"seed": seed, "sequence_ids": torch.arange(rows) * 7919 + 3, "positions": torch.arange(rows) % 5}


def expected_sample(z: Tensor, arguments: dict[str, object], **filters: float) -> tuple[Sample, Tensor]:
    """The reference's draw in float64, and how far the winner is ahead of the runner-up (nearly-ties may differ)."""
    tensors = {**arguments, "seed": torch.tensor(arguments["seed"])}
    drawn = reference.sample(z, **tensors, **filters)
    from bandit_rft.ops.philox import gumbel_noise, random_words

    noise = gumbel_noise(
        random_words(tensors["seed"], tensors["sequence_ids"], tensors["positions"], z.shape[1]), z.dtype
    )
    perturbed = (z + noise).masked_fill(~reference.kept_tokens(z, **filters), -torch.inf)
    top = perturbed.topk(min(2, z.shape[1]), -1).values
    return drawn, (top[:, 0] - top[:, -1]) if z.shape[1] > 1 else torch.full((len(z),), torch.inf)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_equals_the_reference(filters: dict[str, float], backend: str, dtype: torch.dtype) -> None:
    rows, h, v = 48, 40, 1603
    hidden, weight = torch.randn(rows, h).to(dtype), (torch.randn(v, h) * 0.5).to(dtype)
    bias, temperature = torch.randn(v).to(dtype), torch.rand(rows) + 0.5
    arguments = stream(rows)
    with use_backend(backend):
        got = linear_sample(
            hidden, weight, bias=bias, temperature=temperature, softcap=10.0, logit_scale=1.5, **arguments, **filters
        )
    z = reference.scaled_logits(
        reference.head_logits(hidden.double(), weight.double(), bias.double()), temperature.double(), 10.0, 1.5
    )
    want, margin = expected_sample(z, arguments, **filters)
    clear = margin > 1e-4
    assert clear.float().mean() > 0.9
    assert torch.equal(got.tokens[clear], want.tokens[clear])
    for name in ("logprobs", "sampling_logprobs", "entropy", "kept_mass"):
        g, w = getattr(got, name), getattr(want, name)
        assert g.dtype == torch.float32
        torch.testing.assert_close(g[clear].double(), w[clear], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9), v=st.integers(1, 2500), spread=st.floats(0.0, 30.0), backend=st.sampled_from(BACKENDS),
    top_k=st.sampled_from([0, 1, 2, 50, 5000]), top_p=st.sampled_from([1.0, 0.99, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_and_filter(
    rows: int, v: int, spread: float, backend: str, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    z = torch.randn(rows, v, generator=torch.Generator().manual_seed(seed)) * spread
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    arguments = stream(rows, seed)
    with use_backend(backend):
        got = sample_from_logits(z, **arguments, **filters)
    want, margin = expected_sample(z.double(), arguments, **filters)
    clear = margin > 1e-4
    # Where a cumulative probability lies within rounding of top_p, the kept sets may differ by one token.
    same = clear & torch.isclose(got.kept_mass.double(), want.kept_mass, rtol=1e-4)
    assert same.sum() >= clear.sum() - (1 if top_p < 1 else 0)
    assert torch.equal(got.tokens[same], want.tokens[same])
    torch.testing.assert_close(got.logprobs[same].double(), want.logprobs[same], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got.sampling_logprobs[same].double(), want.sampling_logprobs[same], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("filters", [{}, {"top_k": 20, "top_p": 0.95}], ids=str)
@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled core")
@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_row_is_the_same_in_any_batch(filters: dict[str, float], dtype: torch.dtype) -> None:
    """Bit for bit: alone, in any batch, in any order, with any number of threads."""
    rows, h, v = 70, 333, 1201  # one row is left of every tile
    hidden, weight = torch.randn(rows, h).to(dtype), torch.randn(v, h).to(dtype) * 0.1
    arguments = stream(rows)
    whole = linear_sample(hidden, weight, **arguments, **filters)

    def part(index: Tensor) -> Sample:
        return linear_sample(
            hidden[index], weight, seed=arguments["seed"], sequence_ids=arguments["sequence_ids"][index],
            positions=arguments["positions"][index], **filters,
        )  # fmt: skip

    threads = torch.get_num_threads()
    try:
        for index in (
            torch.tensor([13]),
            torch.tensor([40, 3]),
            torch.arange(60, 63),
            torch.arange(50, 54),
            torch.arange(5),
            torch.randperm(rows),
            torch.arange(33, 70),
            torch.arange(4, 16),
            torch.arange(17),
        ):
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                for name, g, w in zip(Sample._fields, part(index), whole, strict=True):
                    assert torch.equal(g, w[index]), name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}], ids=str)
def test_frequencies(filters: dict[str, float], backend: str) -> None:
    """Chi-square over 200,000 draws of one distribution, a new stream for each."""
    draws, v = 200_000, 24
    logits = torch.randn(v) * 1.5
    tokens = []
    with use_backend(backend):
        for start in range(0, draws, 50_000):
            n = 50_000
            batch = logits.expand(n, v).contiguous()
            ids = torch.arange(start, start + n)
            tokens.append(
                sample_from_logits(batch, seed=1, sequence_ids=ids, positions=torch.zeros_like(ids), **filters).tokens
            )
    counts = torch.bincount(torch.cat(tokens), minlength=v).double()
    keep = reference.kept_tokens(logits[None], **filters)[0]
    expected = torch.softmax(logits.double().masked_fill(~keep, -torch.inf), 0) * draws
    assert counts[~keep].eq(0).all()
    chi2 = ((counts - expected)[keep] ** 2 / expected[keep]).sum().item()
    freedom = int(keep.sum()) - 1
    # Wilson-Hilferty: the 99.99% point of chi-square.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi2 < limit, f"chi2 {chi2:.1f}, {freedom} degrees of freedom, limit {limit:.1f}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_and_sequences_are_independent_streams(backend: str) -> None:
    z = torch.zeros(1, 1000)

    def draw(seed: int, sequence: int, position: int) -> int:
        with use_backend(backend):
            return int(
                sample_from_logits(
                    z, seed=seed, sequence_ids=torch.tensor([sequence]), positions=torch.tensor([position])
                ).tokens
            )

    seen = {draw(s, i, p) for s in range(4) for i in (0, 1, 2**32, 2**40) for p in range(4)}
    assert len(seen) > 55  # 64 draws from 1000 values: two or so collide


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_is_top_k_one(backend: str) -> None:
    z = torch.randn(20, 500)
    with use_backend(backend):
        got = sample_from_logits(z, top_k=1, **stream(20))
    assert torch.equal(got.tokens, z.argmax(-1))
    torch.testing.assert_close(got.sampling_logprobs, torch.zeros(20))
    torch.testing.assert_close(got.kept_mass, got.logprobs.exp())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_edges(filters: dict[str, float], backend: str) -> None:
    with use_backend(backend):
        lone = sample_from_logits(torch.tensor([[3.0]]), **stream(1), **filters)
        assert lone.tokens.tolist() == [0] and lone.logprobs.item() == 0 and lone.entropy.item() == 0
        masked = torch.full((6, 700), -torch.inf)
        masked[:, 321] = -1e4
        assert sample_from_logits(masked, **stream(6), **filters).tokens.tolist() == [321] * 6
        peak = torch.full((6, 700), -1e4)
        peak[:, 699] = 1e4
        drawn = sample_from_logits(peak, **stream(6), **filters)
        assert drawn.tokens.tolist() == [699] * 6 and drawn.logprobs.eq(0).all() and drawn.entropy.eq(0).all()
        level = sample_from_logits(torch.full((6, 700), -1e4), **stream(6), **filters)
        torch.testing.assert_close(level.logprobs, torch.full((6,), -math.log(700)))
        assert sample_from_logits(torch.zeros(0, 5), **stream(0), **filters).tokens.shape == (0,)
        assert linear_sample(torch.zeros(0, 7), torch.ones(5, 7), **stream(0), **filters).tokens.shape == (0,)
        ties = sample_from_logits(torch.zeros(50, 10), top_k=3, **stream(50))
        assert set(ties.tokens.tolist()) == {0, 1, 2}  # ties are ranked by the lower id


def awkward_rows(v: int) -> dict[str, Tensor]:
    """Rows on which a selection by histogram could go wrong: ties, many magnitudes, masks, a single outlier."""
    j = torch.arange(v)
    normal = torch.randn(v)
    return {
        "two values": (j % 2).float(),
        "few values": (j * 7 % 5).float() * 0.25,
        "geometric": -(2.0 ** (j % 200 - 100).float()),
        "masked": normal.masked_fill(j % 3 == 0, -1e9),
        "half of it -inf": normal.masked_fill(j % 2 == 0, -torch.inf),
        "neighbours in float32": 1 + (j % 300).float() * 2**-23,
        "one far above": normal.index_fill(0, torch.tensor([v - 1]), 3e38).clamp(min=-3e38),
        "one far below": normal.index_fill(0, torch.tensor([5]), -3e38),
    }


@pytest.mark.parametrize("filters", [*FILTERS[1:], {"top_p": 0.999}, {"top_k": 1000, "top_p": 0.3}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_filters_on_awkward_rows(backend: str, filters: dict[str, float]) -> None:
    v = 3001
    for name, row in awkward_rows(v).items():
        with use_backend(backend):
            got = sample_from_logits(row.expand(40, v).contiguous(), **stream(40), **filters)
        keep = reference.kept_tokens(row[None], **filters)[0]
        mass = torch.softmax(row.double(), 0)[keep].sum()
        assert keep[got.tokens].all(), name
        torch.testing.assert_close(
            got.kept_mass.double(), mass.expand(40), rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_nan_is_not_filtered_away(filters: dict[str, float], backend: str) -> None:
    z = torch.randn(4, 700)
    z[1, 600] = torch.nan
    with use_backend(backend):
        got = sample_from_logits(z, **stream(4), **filters)
    assert got.logprobs.isnan().tolist() == [False, True, False, False]


def test_seed_may_be_a_tensor_or_any_64_bit_integer() -> None:
    z = torch.randn(9, 300)
    rest = {k: v for k, v in stream(9).items() if k != "seed"}
    for seed in (0, 2**64 - 1, -1, 2**63):
        signed = seed - 2**64 if seed >= 2**63 else seed
        a = sample_from_logits(z, seed=seed, **rest)
        b = sample_from_logits(z, seed=torch.tensor(signed), **rest)
        assert torch.equal(a.tokens, b.tokens)
