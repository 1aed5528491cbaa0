"""The container of rollouts: selecting, joining, padding and storing lose nothing and mix nothing up."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandit_rft.rollout import sequence_ids
from bandit_rft.rollout_batch import RolloutBatch, _offsets


def make(sizes: list[tuple[int, int]], seed: int = 0) -> RolloutBatch:
    """Rollouts with prompts and completions of these lengths, every column different everywhere."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [size[1] for size in sizes]
    tokens = torch.randint(0, 99, (sum(lengths),), generator=generator)
    return RolloutBatch.of(
        [torch.randint(0, 99, (size[0],), generator=generator).tolist() for size in sizes], tokens, lengths,
        -torch.rand(len(tokens), generator=generator), torch.rand(len(tokens), generator=generator),
        torch.rand(len(sizes), generator=generator) < 0.5, query=torch.arange(len(sizes)) + 100 * seed, attempt=seed,
        round=torch.arange(len(sizes)), reward=torch.rand(len(sizes), generator=generator),
        advantage=torch.randn(len(sizes), generator=generator), trained=torch.rand(len(sizes)) < 0.5, weight_version=7,
    )  # fmt: skip


def rows(batch: RolloutBatch) -> list[tuple[object, ...]]:
    """Each rollout by itself, as plain values."""
    parts = zip(
        batch.prompt_lists(), batch.token_lists(), batch.split(batch.logprobs), batch.split(batch.entropy),
        batch.query.tolist(), batch.attempt.tolist(), batch.round.tolist(), batch.truncated.tolist(),
        batch.reward.tolist(), batch.advantage.tolist(), batch.trained.tolist(), batch.weight_version.tolist(),
        strict=True,
    )  # fmt: skip
    return [tuple(part.tolist() if isinstance(part, torch.Tensor) else part for part in row) for row in parts]


SIZES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.data())
def test_select_is_what_a_list_would_give(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    batch = make(sizes)
    chosen = data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=8))
    assert rows(batch.select(chosen)) == [rows(batch)[i] for i in chosen]
    mask = torch.tensor([i in chosen for i in range(len(sizes))])
    assert rows(batch.select(mask)) == [rows(batch)[i] for i in sorted(set(chosen))]


@settings(deadline=None, max_examples=60)
@given(SIZES, SIZES)
def test_cat_and_select_are_inverse(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    first, second = make(a, 1), make(b, 2)
    both = RolloutBatch.cat([first, second])
    assert rows(both) == rows(first) + rows(second)
    assert rows(both.select(range(len(a), len(a) + len(b)))) == rows(second)
    assert both.cu_seqlens.dtype == both.prompt_cu_seqlens.dtype == torch.int32


@settings(deadline=None, max_examples=60)
@given(SIZES)
def test_padding_and_back(sizes: list[tuple[int, int]]) -> None:
    batch = make(sizes)
    padded = batch.pad(pad_token=77)
    for i, (prompt, completion) in enumerate(zip(batch.prompt_lists(), batch.token_lists(), strict=True)):
        width, length = padded.prompt_ids.shape[1], padded.completion_ids.shape[1]
        assert padded.prompt_ids[i].tolist() == [77] * (width - len(prompt)) + prompt  # on the left
        assert padded.completion_ids[i].tolist() == completion + [77] * (length - len(completion))  # on the right
    columns = {name: getattr(batch, name) for name in ("query", "attempt", "round", "truncated", "reward", "advantage")}
    columns |= {"trained": batch.trained, "weight_version": batch.weight_version}
    again = RolloutBatch.from_padded(*padded, **columns)
    assert rows(again) == rows(batch)


def test_importance_is_one_where_a_part_has_none() -> None:
    plain, weighted = make([(1, 2)]), make([(1, 3), (2, 1)])
    weighted = RolloutBatch.from_arrays(weighted.arrays() | {"importance": torch.arange(4.0).numpy()})
    assert RolloutBatch.cat([plain, plain]).importance is None
    both = RolloutBatch.cat([plain, weighted])
    assert both.importance is not None and both.importance.tolist() == [1, 1, 0, 1, 2, 3]
    picked = both.select([2, 0]).importance
    assert picked is not None and picked.tolist() == [3, 1, 1]


def test_arrays_give_everything_back_and_name_what_is_missing() -> None:
    batch = make([(3, 2), (1, 4)])
    again = RolloutBatch.from_arrays(batch.arrays())
    assert rows(again) == rows(batch)
    assert all(
        getattr(again, f.name).dtype == getattr(batch, f.name).dtype for f in fields(batch) if f.name != "importance"
    )
    arrays = batch.arrays()
    del arrays["entropy"], arrays["round"]
    with pytest.raises(ValueError, match="missing: entropy, round"):
        RolloutBatch.from_arrays(arrays)


def test_bad_columns_are_named() -> None:
    tokens, zero = torch.tensor([1, 2, 3]), torch.zeros(3)
    with pytest.raises(ValueError, match="lengths must be 2 numbers, one a prompt, with sum 3"):
        RolloutBatch.of([[1], [2]], tokens, [1, 1], zero, zero, [False, False])
    with pytest.raises(ValueError, match=r"logprobs must be \[3\], one a token"):
        RolloutBatch.of([[1], [2]], tokens, [1, 2], zero[:2], zero, [False, False])
    with pytest.raises(ValueError, match=r"reward must be \[2\], one a rollout; got \[3\]"):
        RolloutBatch.of([[1], [2]], tokens, [1, 2], zero, zero, [False, False], reward=[1, 2, 3])
    with pytest.raises(ValueError, match="'rewards' is no column of a rollout"):
        RolloutBatch.of([[1], [2]], tokens, [1, 2], zero, zero, [False, False], rewards=[1, 2])
    with pytest.raises(ValueError, match="completion_ids and completion_mask must be"):
        RolloutBatch.from_padded(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4))


def test_numbers_that_would_be_cut_off_are_refused() -> None:
    batch = RolloutBatch.of([[1], [2]], torch.arange(2), [1, 1], torch.zeros(2), torch.zeros(2), [False] * 2)
    with pytest.raises(ValueError, match="query must be whole numbers; got float32"):
        batch.with_columns(query=[0.7, 1.9])
    assert batch.with_columns(reward=[0.1, 0.2]).reward.tolist() == [0.1, 0.2]
    additive = torch.tensor([[0.0, 0.0, -torch.inf]])
    with pytest.raises(ValueError, match="prompt_mask must be bool, or 0 and 1; got other numbers"):
        RolloutBatch.from_padded(torch.ones(1, 3).long(), additive, torch.ones(1, 3).long(), torch.ones(1, 3).bool())
    with pytest.raises(ValueError, match=r"fewer than 2\^31 tokens; got 3,221,225,472"):
        _offsets(torch.tensor([2**30] * 3), torch.device("cpu"))
    with pytest.raises(TypeError, match="whole numbers; got float64"):
        sequence_ids(0, [0.2, 0.9])


def test_per_token_repeats_each_rollouts_value() -> None:
    batch = make([(1, 2), (0, 0), (2, 3)])
    assert batch.per_token(torch.tensor([5, 6, 7])).tolist() == [5, 5, 7, 7, 7]


def three() -> RolloutBatch:
    return RolloutBatch.of([[1], [2], [3]], torch.arange(6), [1, 2, 3], torch.zeros(6), torch.zeros(6), [False] * 3)


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([True, False]), torch.tensor([True] * 4), [0.5, 1.0], [float("nan")], torch.tensor([1j]), [[0, 1]],
        torch.tensor([1, 0, 1], dtype=torch.uint8),
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_name_no_rollouts_are_refused(rows: Any) -> None:
    """A mask of another length chose rollouts before, and 0.5 was row 0."""
    with pytest.raises(ValueError, match=r"rows must be whole numbers \[b\] or a bool mask \[3\]"):
        three().select(rows)


def test_rows_count_from_the_end_and_none_is_a_batch() -> None:
    assert three().select([-1]).tokens.tolist() == [3, 4, 5] and len(three().select([])) == 0
    for row in (3, -4):
        with pytest.raises(IndexError):
            three().select([row])
    empty = three().select([])
    assert empty.pad().completion_ids.shape == (0, 0) and len(RolloutBatch.cat([empty, three()])) == 3


def test_holes_in_a_mask_close() -> None:
    ids, mask = torch.arange(8).view(2, 4), torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]])
    batch = RolloutBatch.from_padded(ids, mask, ids, mask)
    assert batch.token_lists() == [[0, 2, 3], [5]] and batch.prompt_lists() == [[0, 2, 3], [5]]


def test_what_is_no_batch_is_named() -> None:
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match="at least one batch"):
        RolloutBatch.cat([])
    with pytest.raises(ValueError, match="'rewrad' is no column"):
        three().with_columns(rewrad=1.0)
    with pytest.raises(ValueError, match="lengths must be whole numbers"):
        RolloutBatch.of([[1], [2]], torch.arange(2), [-1, 3], zeros, zeros, [False] * 2)
    with pytest.raises(ValueError, match="lengths must be whole numbers"):
        RolloutBatch.of([[1], [2]], torch.arange(2), [0.5, 1.5], zeros, zeros, [False] * 2)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="tokens must be token ids"):
        RolloutBatch.of([[1]], zeros, [2], zeros, zeros, [False])
    arrays = three().arrays()
    for name, change in (("reward", arrays["reward"][:2]), ("logprobs", arrays["logprobs"][:2]),
                         ("cu_seqlens", arrays["cu_seqlens"] + 1), ("weight", arrays["reward"])):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            RolloutBatch.from_arrays({**arrays, name: change})
