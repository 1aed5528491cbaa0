"""B rollouts as one packed container, from the sampler to the update, the replay, the checkpoint and the Parquet log.

N completion tokens and P prompt tokens lie one after another, without padding, as in flash-attention; `cu_seqlens` says
where each rollout begins. Everything a round does to rollouts is a `select`, a `cat` or a new column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bandit_rft.text import html_table
from bandit_rft.transfer import to_device


class PaddedRollouts(NamedTuple):
    """B rollouts as rectangles: prompts padded on the left to L_p, completions on the right to L_c (TRL's layout)."""

    prompt_ids: Tensor  # int64 [B, L_p]
    prompt_mask: Tensor  # bool [B, L_p]
    completion_ids: Tensor  # int64 [B, L_c]
    completion_mask: Tensor  # bool [B, L_c]
    logprobs: Tensor  # float32 [B, L_c], 0 where there is no token
    entropy: Tensor  # float32 [B, L_c], likewise


@dataclass(frozen=True)
class RolloutBatch:
    """B rollouts with everything known of them.

    A batch that the engine returns is in host memory; `to` moves it. No method asks a device for a value unless the
    batch lies on that device.

    Attributes:
        query: int64 [B], index of the query in its split.
        attempt: int64 [B], 0 .. n - 1 within a query.
        round: int64 [B], in which the rollout was drawn.
        prompt_tokens: int64 [P], token ids of the prompts.
        prompt_cu_seqlens: int32 [B + 1], where each prompt begins, and P.
        tokens: int64 [N], token ids of the completions, the stop token included.
        cu_seqlens: int32 [B + 1], where each completion begins, and N.
        logprobs: float32 [N], of the behavior policy: full softmax at the sampling temperature.
        entropy: float32 [N], of the distribution each token was drawn from, nats.
        truncated: bool [B], ended by the length limit and not by a stop token.
        reward: float64 [B], outcome reward; NaN where there is none.
        advantage: float32 [B].
        trained: bool [B]; False: as if never drawn, in no sum and no normalizer.
        weight_version: int64 [B], rounds of training behind the policy that drew it.
        importance: float32 [N] or None, a factor on each token's advantage (replay); None: 1.
    """

    query: Tensor
    attempt: Tensor
    round: Tensor
    prompt_tokens: Tensor
    prompt_cu_seqlens: Tensor
    tokens: Tensor
    cu_seqlens: Tensor
    logprobs: Tensor
    entropy: Tensor
    truncated: Tensor
    reward: Tensor
    advantage: Tensor
    trained: Tensor
    weight_version: Tensor
    importance: Tensor | None = None

    # --- making one ---------------------------------------------------------------------------------------------------

    @staticmethod
    def of(
        prompts: Sequence[Sequence[int]], tokens: Tensor, lengths: Sequence[int], logprobs: Tensor, entropy: Tensor,
        truncated: Sequence[bool] | Tensor, **columns: Any,
    ) -> RolloutBatch:  # fmt: skip
        """A batch from what a sampler knows; the other columns get defaults, or what `columns` says.

        Args:
            prompts: B lists of token ids.
            tokens: int64 [N], completions one after another.
            lengths: of the completions, B numbers with sum N.
            logprobs: float32 [N].
            entropy: float32 [N].
            truncated: [B].
            columns: any of query, attempt, round, reward, advantage, trained, weight_version: tensors or lists [B], or
                one value for all.

        Raises:
            ValueError: naming the argument, when its length is not B or N, or tokens and lengths are no whole numbers.
        """
        size, device = len(prompts), tokens.device
        if tokens.ndim != 1 or not _whole(tokens):
            raise ValueError(f"tokens must be token ids int64 [N]; got {tokens.dtype} {list(tokens.shape)}")
        tokens, lengths = tokens.long(), list(lengths)
        if wrong := [n for n in lengths if n < 0 or n != int(n)]:
            raise ValueError(f"lengths must be whole numbers >= 0; got {wrong[0]}")
        if len(lengths) != size or sum(lengths) != len(tokens):
            raise ValueError(
                f"lengths must be {size} numbers, one a prompt, with sum {len(tokens)}, the number of tokens; got "
                f"{len(lengths)} with sum {sum(lengths)}"
            )
        for name, values in {"logprobs": logprobs, "entropy": entropy}.items():
            if values.shape != tokens.shape:
                raise ValueError(f"{name} must be [{len(tokens)}], one a token; got {list(values.shape)}")
        defaults: dict[str, Any] = {
            "query": torch.arange(size), "attempt": 0, "round": 0, "truncated": truncated, "reward": torch.nan,
            "advantage": 0.0, "trained": True, "weight_version": 0,
        }  # fmt: skip
        if unknown := set(columns) - set(defaults):
            raise ValueError(f"{sorted(unknown)[0]!r} is no column of a rollout; there are {', '.join(defaults)}")
        flat = [token for prompt in prompts for token in prompt]
        return RolloutBatch(
            prompt_tokens=torch.tensor(flat, dtype=torch.int64, device=device),
            prompt_cu_seqlens=_offsets(torch.tensor([len(prompt) for prompt in prompts]), device),
            tokens=tokens, cu_seqlens=_offsets(torch.tensor([int(n) for n in lengths]), device),
            logprobs=logprobs.float(), entropy=entropy.float(),
            **{name: _column(name, value, size, device) for name, value in (defaults | columns).items()},
        )  # fmt: skip

    @staticmethod
    def from_padded(
        prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor,
        logprobs: Tensor | None = None, entropy: Tensor | None = None, **columns: Any,
    ) -> RolloutBatch:  # fmt: skip
        """A batch from rectangles [B, L_p] and [B, L_c], wherever the padding is; NaN for what is absent.

        Args:
            prompt_ids: int64 [B, L_p].
            prompt_mask: [B, L_p], nonzero where a token counts.
            completion_ids: int64 [B, L_c].
            completion_mask: [B, L_c], likewise.
            logprobs: [B, L_c] or None.
            entropy: [B, L_c] or None.
            columns: as for `of`, and `truncated` [B].

        Raises:
            ValueError: naming the argument, when shapes do not belong together.
        """
        for name, ids, mask in (
            ("prompt", prompt_ids, prompt_mask),
            ("completion", completion_ids, completion_mask),
        ):
            if ids.ndim != 2 or mask.shape != ids.shape or len(ids) != len(prompt_ids):
                raise ValueError(
                    f"{name}_ids and {name}_mask must be [B, length] with B = {len(prompt_ids)}; got "
                    f"{list(ids.shape)} and {list(mask.shape)}"
                )
            if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
                raise ValueError(f"{name}_mask must be bool, or 0 and 1; got other numbers")
        inside = completion_mask.bool()
        tokens = completion_ids[inside]
        absent = torch.full(tokens.shape, torch.nan, device=tokens.device)
        per_token = {}
        for name, values in {"logprobs": logprobs, "entropy": entropy}.items():
            if values is not None and values.shape != completion_ids.shape:
                raise ValueError(f"{name} must be {list(completion_ids.shape)}; got {list(values.shape)}")
            per_token[name] = absent if values is None else values[inside].float()
        prompts = [row[keep.bool()].tolist() for row, keep in zip(prompt_ids, prompt_mask, strict=True)]
        columns = {"truncated": False} | columns
        return RolloutBatch.of(prompts, tokens, inside.sum(1).tolist(), **per_token, **columns)

    @staticmethod
    def cat(parts: Sequence[RolloutBatch]) -> RolloutBatch:
        """Batches one after another.

        Raises:
            ValueError: for no batch at all: its device would be anybody's guess.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("parts must be at least one batch; got none")
        if len(parts) == 1:
            return parts[0]
        flat = ("prompt_tokens", "tokens", "logprobs", "entropy")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in (*_PER_ROLLOUT, *flat)}
        for offsets in ("prompt_cu_seqlens", "cu_seqlens"):
            lengths = torch.cat([getattr(part, offsets).diff() for part in parts])
            joined[offsets] = _offsets(lengths, lengths.device)
        if any(part.importance is not None for part in parts):
            joined["importance"] = torch.cat(
                [torch.ones_like(p.logprobs) if p.importance is None else p.importance for p in parts]
            )
        return RolloutBatch(**joined)

    # --- taking it apart ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.query)

    def __repr__(self) -> str:
        return f"RolloutBatch({len(self)} rollouts, {len(self.tokens)} tokens, {self.tokens.device})"

    def _repr_html_(self) -> str:
        rows = []
        for name, column in self.columns().items():
            values = column.double()
            known = values[~values.isnan()]
            size = {len(self): "B", len(self.tokens): "N"}.get(len(column), str(len(column)))
            shown = (
                ["", "", ""]
                if not len(known)
                else [f"{float(x):.4g}" for x in (known.min(), known.mean(), known.max())]
            )
            rows.append((name, str(column.dtype).removeprefix("torch."), f"[{size}]", *shown))
        return html_table(("column", "dtype", "shape", "min", "mean", "max"), rows, repr(self))

    @property
    def lengths(self) -> Tensor:
        """Completion lengths, int64 [B]."""
        return self.cu_seqlens.diff().long()

    @property
    def prompt_lengths(self) -> Tensor:
        """Prompt lengths, int64 [B]."""
        return self.prompt_cu_seqlens.diff().long()

    def select(self, rows: Tensor | NDArray[Any] | Sequence[int]) -> RolloutBatch:
        """The rollouts `rows` in that order, each as often as it is named.

        Args:
            rows: whole numbers [b], where -1 is the last rollout as in any list, or a mask bool [B].

        Raises:
            ValueError: for a mask of another length and for rows that are no whole numbers.
            IndexError: for a row outside of the batch.
        """
        index = torch.as_tensor(rows, device=self.query.device)
        mask = index.dtype == torch.bool
        if index.ndim != 1 or (mask and len(index) != len(self)) or not (mask or _whole(index) or not len(index)):
            raise ValueError(
                f"rows must be whole numbers [b] or a bool mask [{len(self)}]; got {index.dtype} {list(index.shape)}"
            )
        index = index.nonzero().flatten() if mask else index.long()
        prompt_cu_seqlens, prompt_tokens = _spans(self.prompt_cu_seqlens, index)
        cu_seqlens, tokens = _spans(self.cu_seqlens, index)
        return RolloutBatch(
            prompt_tokens=self.prompt_tokens[prompt_tokens], prompt_cu_seqlens=prompt_cu_seqlens,
            tokens=self.tokens[tokens], cu_seqlens=cu_seqlens, logprobs=self.logprobs[tokens],
            entropy=self.entropy[tokens], importance=None if self.importance is None else self.importance[tokens],
            **{name: getattr(self, name)[index] for name in _PER_ROLLOUT},
        )  # fmt: skip

    def to(self, device: torch.device | str) -> RolloutBatch:
        """The batch on another device; itself where it is there already. Copies to a device do not wait for it."""
        if self.tokens.device == (device := torch.device(device)):
            return self
        if device.type == "cpu":
            return RolloutBatch(**{name: x.cpu() for name, x in self.columns().items()})
        return RolloutBatch(**{name: to_device(x, device) for name, x in self.columns().items()})

    def with_columns(self, **columns: Any) -> RolloutBatch:
        """The batch with other values in some per-rollout columns: tensors, arrays, lists [B], or one value for all.

        Raises:
            ValueError: for a name that is no such column, and for values that are not [B].
        """
        device = self.query.device
        if unknown := sorted(set(columns) - set(_PER_ROLLOUT)):
            raise ValueError(f"{unknown[0]!r} is no column of one value a rollout; there are {', '.join(_PER_ROLLOUT)}")
        return replace(self, **{name: _column(name, value, len(self), device) for name, value in columns.items()})

    def columns(self) -> dict[str, Tensor]:
        """Every column by name; what is None is left out."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every column as a numpy array, for a checkpoint."""
        return {name: column.cpu().numpy() for name, column in self.columns().items()}

    @staticmethod
    def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> RolloutBatch:
        """The inverse of `arrays`.

        Raises:
            ValueError: naming columns that are missing, unknown or of another length.
        """
        known = {f.name for f in fields(RolloutBatch)}
        if missing := sorted(known - {"importance"} - set(arrays)):
            raise ValueError(f"these columns of a RolloutBatch are missing: {', '.join(missing)}")
        if unknown := sorted(set(arrays) - known):
            raise ValueError(f"these are no columns of a RolloutBatch: {', '.join(unknown)}")
        sizes = dict.fromkeys(_PER_ROLLOUT, len(arrays["query"]))
        for offsets, of in (("prompt_cu_seqlens", _PER_PROMPT_TOKEN), ("cu_seqlens", _PER_TOKEN)):
            ends = arrays[offsets]
            if len(ends) != len(arrays["query"]) + 1 or ends[0] != 0 or (np.diff(ends) < 0).any():
                raise ValueError(f"{offsets} must be {len(arrays['query']) + 1} numbers that rise from 0; got {ends}")
            sizes |= dict.fromkeys(of, int(ends[-1]))
        for name, size in sizes.items():
            if name in arrays and arrays[name].shape != (size,):
                raise ValueError(f"{name} must be [{size}]; got {list(arrays[name].shape)}")
        return RolloutBatch(**{name: torch.tensor(column) for name, column in arrays.items()})

    def token_lists(self) -> list[list[int]]:
        """The completions' token ids as B Python lists."""
        return [part.tolist() for part in self.split(self.tokens.cpu())]

    def prompt_lists(self) -> list[list[int]]:
        """The prompts' token ids as B Python lists."""
        return [part.tolist() for part in self.prompt_tokens.cpu().split(self.prompt_lengths.tolist())]

    def split(self, per_token: Tensor) -> list[Tensor]:
        """A tensor [N] as B tensors, one a completion (views)."""
        return list(per_token.split(self.lengths.tolist()))

    def per_token(self, per_rollout: Tensor) -> Tensor:
        """A tensor [B] as [N]: each rollout's value for each of its tokens."""
        return per_rollout.repeat_interleave(self.lengths, output_size=len(self.tokens))

    def pad(self, pad_token: int = 0) -> PaddedRollouts:
        """The rollouts as rectangles, filled with pad_token where there is no token."""

        def rectangle(flat: Tensor, mask: Tensor, filler: float) -> Tensor:
            return torch.full(mask.shape, filler, dtype=flat.dtype, device=flat.device).masked_scatter_(mask, flat)

        lengths, prompt_lengths = self.lengths, self.prompt_lengths
        place = torch.arange(int(lengths.max()) if len(self) else 0, device=lengths.device)
        mask = place < lengths[:, None]
        place = torch.arange(int(prompt_lengths.max()) if len(self) else 0, device=lengths.device)
        prompt_mask = place >= len(place) - prompt_lengths[:, None]
        return PaddedRollouts(
            rectangle(self.prompt_tokens, prompt_mask, pad_token), prompt_mask,
            rectangle(self.tokens, mask, pad_token), mask, rectangle(self.logprobs, mask, 0.0),
            rectangle(self.entropy, mask, 0.0),
        )  # fmt: skip


#: The columns with one value a rollout.
_PER_ROLLOUT = {
    "query": torch.int64, "attempt": torch.int64, "round": torch.int64, "truncated": torch.bool,
    "reward": torch.float64, "advantage": torch.float32, "trained": torch.bool, "weight_version": torch.int64,
}  # fmt: skip
_PER_TOKEN = ("tokens", "logprobs", "entropy", "importance")
_PER_PROMPT_TOKEN = ("prompt_tokens",)


def _whole(values: Tensor) -> bool:
    """Whether a tensor holds whole numbers: bytes, which torch once took for masks, are not meant."""
    return not (values.is_floating_point() or values.is_complex() or values.dtype in (torch.bool, torch.uint8))


def _column(name: str, value: Any, size: int, device: torch.device) -> Tensor:
    """A value for each of `size` rollouts, in the column's dtype."""
    dtype = _PER_ROLLOUT[name]
    column = torch.as_tensor(value, dtype=None if dtype == torch.int64 else dtype, device=device)
    if column.numel() and dtype == torch.int64 and (column.is_floating_point() or column.is_complex()):
        raise ValueError(f"{name} must be whole numbers; got {str(column.dtype).removeprefix('torch.')}")
    column = column.to(dtype)
    if column.ndim == 0:
        column = column.repeat(size)
    if column.shape != (size,):
        raise ValueError(f"{name} must be [{size}], one a rollout; got {list(column.shape)}")
    return column


def _offsets(lengths: Tensor, device: torch.device) -> Tensor:
    """Where packed sequences of these lengths begin, and their total: int32 [B + 1]."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=device)
    offsets[1:] = lengths.cumsum(0)
    if offsets.device.type == "cpu" and int(offsets[-1]) >= 2**31:
        raise ValueError(f"a batch holds fewer than 2^31 tokens; got {int(offsets[-1]):,}")
    return offsets.int()


def _spans(offsets: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(offsets of the packed sequences `index` one after another, int32 [b + 1]; where their entries lie, int64)."""
    begin, lengths = offsets[:-1].long()[index], offsets.diff().long()[index]
    chosen = _offsets(lengths, index.device)
    total = int(chosen[-1])
    shift = (begin - chosen[:-1]).repeat_interleave(lengths, output_size=total)
    return chosen, torch.arange(total, device=index.device) + shift
