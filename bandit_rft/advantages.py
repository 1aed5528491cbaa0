"""Rewards to advantages. Each function is a design choice: registered by name, chosen by the `advantage` key.

In a loop of your own they take and return tensors (or numpy arrays): rewards [B] with the query of each rollout, or
[queries, n] with n rollouts a query. Anything else is refused.

    >>> import torch
    >>> from bandit_rft import advantages
    >>> advantages.group_mean(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    tensor([[ 0.5000, -0.5000],
            [ 0.0000,  0.0000]])
    >>> advantages.rloo(torch.tensor([1.0, 0.0, 0.0]), queries=torch.tensor([7, 7, 7]))
    tensor([ 1.0000, -0.5000, -0.5000])

An advantage of your own is written on numpy arrays, rewards [B] and groups [B], the query of each:

    @register("my_advantage")
    def my_advantage(rewards, groups): ...

Keyword arguments after these are options (`advantage_options.<name>`), with the rules of their annotations, such as
`Annotated[float, Field(gt=0)]`; a function registered with `memory=` gets what it remembers across rounds as its third
argument, and the memory's keyword arguments are options as well. docs/design-choices.md has them all in one table.

A constant group is recognized by exact equality of its rewards, never by a floating standard deviation of about zero:
dividing rounding noise by 1e-6 is how a group in which nothing was learned gets advantages of order one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bandit_rft.history import Memory, RewardHistory, ValueTracker
from bandit_rft.options import OptionError, OptionModel, nearest, option_problems, options_of

Floats = NDArray[np.float64]
Queries = NDArray[np.int64]
#: (rewards [B], query of each rollout [B], memory where it has one, options) -> advantages [B]
AdvantageFunction = Callable[..., Floats]

EPSILON = 1e-6  # added to a standard deviation, as in the GRPO implementations of verl and of the paper


@dataclass(frozen=True)
class Advantage:
    """A registered advantage and what it asks of the trainer."""

    name: str
    function: AdvantageFunction
    needs_groups: bool = False  # compares the rollouts of one query: at least two of them
    needs_batch: bool = False  # compares the rollouts of a round: at least two of them
    trains_on_first: bool = False  # the other rollouts of a query are drawn for their rewards alone
    memory: Callable[..., Memory] | None = None  # its keyword arguments are options as well
    unit_interval: bool = False  # takes rewards in [0, 1] alone

    @functools.cached_property
    def option_model(self) -> type[OptionModel]:
        """The options it takes, with their rules."""
        return options_of(self.function, *([self.memory] if self.memory else []))

    @property
    def options(self) -> dict[str, Any]:
        """The options it takes, with their defaults."""
        return {name: field.default for name, field in self.option_model.model_fields.items()}

    def make_memory(self, options: Mapping[str, Any]) -> Memory | None:
        """An empty memory, or None for an advantage without one."""
        if self.memory is None:
            return None
        return self.memory(**{k: v for k, v in options.items() if k in inspect.signature(self.memory).parameters})


ADVANTAGES: dict[str, Advantage] = {}


def register(
    name: str,
    *,
    needs_groups: bool = False,
    needs_batch: bool = False,
    trains_on_first: bool = False,
    memory: Callable[..., Memory] | None = None,
    unit_interval: bool = False,
) -> Callable[[AdvantageFunction], AdvantageFunction]:
    """Make an advantage function choosable by name.

    What it becomes takes rewards [B] and queries [B], or rewards [queries, n]: tensors, numpy arrays or lists.

    Args:
        name: its name, as the key `advantage` has it.
        needs_groups: it compares the rollouts of one query, so that there must be at least two.
        needs_batch: it compares the rollouts of a round, so that there must be at least two.
        trains_on_first: the first rollout of each query is trained on, the others are drawn for their rewards alone.
        memory: makes what it remembers across rounds, handed to it as third argument and saved in checkpoints.
        unit_interval: rewards outside [0, 1] are refused.

    Raises:
        ValueError: the name is taken already.
    """

    def add(function: AdvantageFunction) -> AdvantageFunction:
        if name in ADVANTAGES:
            raise ValueError(f"an advantage named {name!r} is registered already")
        ADVANTAGES[name] = Advantage(name, function, needs_groups, needs_batch, trains_on_first, memory, unit_interval)
        return _on_tensors(ADVANTAGES[name])

    return add


def _on_tensors(advantage: Advantage) -> AdvantageFunction:
    """The function as a loop of one's own calls it: shapes checked, tensors in and out."""
    remembers = advantage.memory is not None

    @functools.wraps(advantage.function)
    def call(rewards: Any, queries: Any = None, memory: Memory | None = None, **options: Any) -> Any:
        as_array = isinstance(rewards, np.ndarray)
        values, shape, device = rewards, np.shape(rewards), None
        if not as_array:
            import torch  # not before: a configuration is checked without it

            values = rewards if isinstance(rewards, torch.Tensor) else torch.as_tensor(rewards)
            shape, device = tuple(values.shape), values.device
            values = values.detach().cpu().double().numpy()
        groups = _groups(advantage, shape, queries)
        if advantage.memory is not None and not isinstance(memory, Memory):
            kind = getattr(advantage.memory, "__name__", "Memory")
            raise ValueError(f"memory must be the {kind} that is kept from round to round; got {type(memory).__name__}")
        found = compute_advantages(advantage.name, values.reshape(-1), groups, memory, options).reshape(shape)
        return found if as_array else torch.from_numpy(found).to(device)

    positional, named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("rewards", positional)]
    parameters.append(inspect.Parameter("queries", positional, default=inspect.Parameter.empty if remembers else None))
    parameters += [inspect.Parameter("memory", positional)] if remembers else []
    own = inspect.signature(advantage.function).parameters.values()
    parameters += [parameter.replace(kind=named) for parameter in own if parameter.default is not parameter.empty]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _groups(advantage: Advantage, shape: tuple[int, ...], queries: Any) -> Queries:
    """The query of each rollout, [B], from what a caller says of rewards [B] or [queries, n].

    Raises:
        ValueError, TypeError: for other shapes, and where no two rollouts could be compared.
    """
    name = advantage.name
    if len(shape) not in (1, 2):
        raise ValueError(f"rewards must be [B], with queries [B], or [queries, n]; got {list(shape)}")
    if queries is None:
        if advantage.memory is not None:
            raise ValueError(f"queries must be given, whole numbers {list(shape[:1])}: {name} asks for a query's past")
        if len(shape) == 1 and advantage.needs_groups:
            raise ValueError(
                f"queries must be given, [B] with B = {shape[0]}: {name} compares the rollouts of one query (or give "
                "rewards as [queries, n])"
            )
        ids = np.arange(shape[0]) if len(shape) == 2 else np.zeros(shape[0], dtype=np.int64)
    else:
        ids = np.asarray(queries.detach().cpu() if hasattr(queries, "detach") else queries)
        if ids.size and ids.dtype.kind not in "iu":
            raise TypeError(f"queries must be whole numbers, the query of each rollout; got {ids.dtype}")
        if ids.shape != shape[:1]:
            what = "one a rollout" if len(shape) == 1 else "one a row of rewards"
            raise ValueError(
                f"queries must be {list(shape[:1])}, {what} (rewards are {list(shape)}); got {list(ids.shape)}"
            )
    groups = np.repeat(ids.astype(np.int64), shape[1]) if len(shape) == 2 else ids.astype(np.int64)
    if advantage.needs_groups and len(groups) and len(np.unique(groups)) == len(groups):
        raise ValueError(
            f"{name} compares the rollouts of one query, but each of {len(groups)} rollouts has a query of its own: "
            "give the rollouts of a query the same number, or rewards as [queries, n] with n >= 2"
        )
    return groups


def compute_advantages(
    name: str,
    rewards: Sequence[float] | Floats,
    groups: Sequence[int] | Queries,
    memory: Memory | None = None,
    options: Mapping[str, Any] | None = None,
) -> NDArray[np.float32]:
    """Advantages of B rollouts.

    Args:
        name: one of ADVANTAGES.
        rewards: [B], finite.
        groups: [B], the query of each rollout.
        memory: of the advantages that have one (`ADVANTAGES[name].make_memory`); today's rewards are added to it.
        options: the advantage's own.

    Returns:
        [B] float32.

    Raises:
        ValueError: an unknown name, an unknown or impossible option, lengths that differ, rewards that are not finite
            or not in the advantage's range (naming the rollout), a missing memory.

    >>> compute_advantages("group_mean", rewards=[1, 0, 0, 0], groups=[7, 7, 8, 8]).tolist()
    [0.5, -0.5, 0.0, 0.0]
    >>> compute_advantages("rloo", rewards=[1, 0, 0], groups=[7, 7, 7]).tolist()
    [1.0, -0.5, -0.5]
    """
    if name not in ADVANTAGES:
        raise ValueError(f"advantage must be one of {', '.join(ADVANTAGES)}; got {name!r}{nearest(name, ADVANTAGES)}")
    advantage, options = ADVANTAGES[name], dict(options or {})
    if unknown := sorted(options.keys() - advantage.options.keys()):
        known, hint = ", ".join(advantage.options) or "none", nearest(unknown[0], advantage.options)
        raise OptionError(f"advantage {name} has no option {unknown[0]!r}; it has: {known}{hint}")
    if found := option_problems(advantage.option_model, options):
        raise OptionError(f"advantage {name}: option {found[0]}")
    r, g = np.asarray(rewards, dtype=np.float64), np.asarray(groups, dtype=np.int64)
    if r.ndim != 1 or r.shape != g.shape:
        raise ValueError(f"rewards and groups must be two lists of one length; got {r.shape} and {g.shape}")
    if not np.isfinite(r).all():
        raise ValueError(f"rewards[{int(np.argmin(np.isfinite(r)))}] is not finite")
    if advantage.memory is not None and memory is None:
        raise ValueError(f"advantage {name} compares with the past: give the memory that make_memory() made")
    if advantage.unit_interval and len(outside := np.flatnonzero((r < 0) | (r > 1))):
        raise ValueError(f"advantage {name} takes rewards in [0, 1]; rewards[{outside[0]}] is {r[outside[0]]:g}")
    if not len(r):
        return np.zeros(0, dtype=np.float32)
    own = {k: v for k, v in options.items() if k in inspect.signature(advantage.function).parameters}
    past = [] if advantage.memory is None else [memory]
    return advantage.function(r, g, *past, **own).astype(np.float32)


# --- nothing to compare with ------------------------------------------------------------------------------------------


@register("reward")
def reward(rewards: Floats, groups: Queries) -> Floats:
    """A = r: the bandit baseline, nothing subtracted (Williams 1992 without a baseline; arXiv 2601.22532)."""
    return rewards


@register("psr", unit_interval=True)
def psr(rewards: Floats, groups: Queries) -> Floats:
    """A = r: positive samples alone (arXiv 2506.01347). For rewards in [0, 1], where it is what `reward` is."""
    return rewards


@register("nsr", unit_interval=True)
def nsr(rewards: Floats, groups: Queries) -> Floats:
    """A = r - 1: negative samples alone, a right answer counts nothing (arXiv 2506.01347). Rewards in [0, 1]."""
    return rewards - 1


@register("weighted", unit_interval=True)
def weighted(rewards: Floats, groups: Queries, *, positive_weight: Annotated[float, Field(ge=0)] = 0.1) -> Floats:
    """A = positive_weight r + (r - 1): weighted REINFORCE (arXiv 2506.01347, weight 0.1). Rewards in [0, 1]."""
    return positive_weight * rewards + (rewards - 1)


# --- the batch --------------------------------------------------------------------------------------------------------


@register("batch_mean", needs_batch=True)
def batch_mean(rewards: Floats, groups: Queries) -> Floats:
    """A = r - mean over the batch."""
    return _centered(rewards)


@register("batch_norm", needs_batch=True)
def batch_norm(rewards: Floats, groups: Queries) -> Floats:
    """A = (r - mean) / (std + 1e-6) over the batch, std unbiased (REINFORCE++, arXiv 2501.03262)."""
    return _standardized(rewards)


# --- the rollouts of the query ----------------------------------------------------------------------------------------


@register("group_mean", needs_groups=True)
def group_mean(rewards: Floats, groups: Queries) -> Floats:
    """A = r - mean over the rollouts of the query (Dr. GRPO, arXiv 2503.20783)."""
    return _by_group(rewards, groups, _centered)


@register("group_norm", needs_groups=True)
def group_norm(rewards: Floats, groups: Queries) -> Floats:
    """A = (r - mean) / (std + 1e-6) over the rollouts of the query, std unbiased (GRPO, arXiv 2402.03300)."""
    return _by_group(rewards, groups, _standardized)


@register("group_mean_batch_std", needs_groups=True)
def group_mean_batch_std(rewards: Floats, groups: Queries) -> Floats:
    """A = (r - mean over the query) / (std over the batch + 1e-6), std unbiased (Lite PPO, arXiv 2508.08221)."""
    if _constant(rewards):
        return np.zeros_like(rewards)
    return _by_group(rewards, groups, _centered) / (float(rewards.std(ddof=1)) + EPSILON)


@register("rloo", needs_groups=True)
def rloo(rewards: Floats, groups: Queries) -> Floats:
    """A = r - mean of the query's other rollouts (RLOO, arXiv 2402.14740)."""
    return _by_group(rewards, groups, lambda r: _centered(r) * (len(r) / max(len(r) - 1, 1)))


@register("extra_rollouts", needs_groups=True, trains_on_first=True)
def extra_rollouts(rewards: Floats, groups: Queries) -> Floats:
    """group_norm, of which the first rollout of each query is trained on: the advantage alone (arXiv 2601.22532).

    The other rollouts are drawn to estimate the query's mean and standard deviation and are then left out.
    """
    return _by_group(rewards, groups, _standardized)


# --- the query's past -------------------------------------------------------------------------------------------------


@register("history_mean", memory=RewardHistory)
def history_mean(rewards: Floats, groups: Queries, memory: RewardHistory) -> Floats:
    """A = r - mean(window), over the query's last `window` rewards, this round's included; one alone: A = r."""
    return _by_history(rewards, groups, memory, standardize=False)


@register("history_norm", memory=RewardHistory)
def history_norm(rewards: Floats, groups: Queries, memory: RewardHistory) -> Floats:
    """A = (r - mean(window)) / (std(window) + 1e-6), std unbiased: the paper's reward replay (arXiv 2601.22532).

    The window holds the query's last `window` rewards across epochs. This round's rewards are appended first; a window
    of one reward gives A = r.
    """
    return _by_history(rewards, groups, memory, standardize=True)


@register("spo", needs_batch=True, memory=ValueTracker, unit_interval=True)
def spo(rewards: Floats, groups: Queries, memory: ValueTracker) -> Floats:
    """A = r - (the query's value before this round), then standardized over the batch (SPO, arXiv 2509.13232).

    Rewards in [0, 1]. How far the past counts depends on how far the policy moved since (history.ValueTracker).
    """
    values = np.array([memory.value(query) for query in groups.tolist()])
    memory.append(groups, rewards)
    return _standardized(rewards - values)


# ----------------------------------------------------------------------------------------------------------------------


def _constant(rewards: Floats) -> bool:
    return bool((rewards == rewards[0]).all())


def _centered(rewards: Floats) -> Floats:
    if _constant(rewards):  # exact zeros, which the update may then skip; one rollout compares to nothing
        return np.zeros_like(rewards)
    return rewards - float(rewards.mean())


def _standardized(rewards: Floats) -> Floats:
    if _constant(rewards):
        return np.zeros_like(rewards)
    return _centered(rewards) / (float(rewards.std(ddof=1)) + EPSILON)


def _by_group(rewards: Floats, groups: Queries, function: Callable[[Floats], Floats]) -> Floats:
    advantages: Floats = np.zeros_like(rewards)
    for group in np.unique(groups):
        rows = groups == group
        advantages[rows] = function(rewards[rows])
    return advantages


def _by_history(rewards: Floats, groups: Queries, memory: RewardHistory, standardize: bool) -> Floats:
    queries, counts = np.unique(groups, return_counts=True)
    if counts.max() > memory.window:
        raise ValueError(
            f"window={memory.window} is shorter than the {counts.max()} rollouts of query {queries[counts.argmax()]}"
        )
    memory.append(groups, rewards)
    advantages: Floats = rewards.copy()
    for query in queries:
        rows, window = groups == query, memory.of(int(query))
        if len(window) > 1 and _constant(window):
            advantages[rows] = 0.0
        elif len(window) > 1:
            scale = float(window.std(ddof=1)) + EPSILON if standardize else 1.0
            advantages[rows] = (rewards[rows] - float(window.mean())) / scale
    return advantages
