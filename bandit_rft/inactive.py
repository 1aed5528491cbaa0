"""Keys that cannot act as a configuration stands: one table, said before a run and by `--dry_run`.

A key that contradicts another is refused where it is declared (sections.py). One that merely waits for another to be
switched on is said, since a file may set it for the day that it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from bandit_rft.advantages import ADVANTAGES
from bandit_rft.config import Config, keys
from bandit_rft.launched import launched_rank
from bandit_rft.presets import PRESETS


class Rule(NamedTuple):
    """When a key acts."""

    key: str  # dotted
    acts: Callable[[Config], bool]
    needs: str  # the same in words


def _keeps_window(config: Config) -> bool:
    return "window" in ADVANTAGES[config.advantage].options


_REPLAYS = "replay.capacity > 0"
_CHOSEN = "queries.order=learnable"
_RANKS = "several processes, as torchrun starts them"
RULES = (
    Rule("objective.kl", lambda c: c.objective.kl_coef > 0, "objective.kl_coef > 0"),
    Rule("kl.horizon", lambda c: c.kl.target is not None, "kl.target"),
    Rule("queries.floor", lambda c: c.queries.order == "learnable", _CHOSEN),
    Rule("queries.half_life", lambda c: c.queries.order == "learnable", _CHOSEN),
    Rule("replay.window", _keeps_window, "an advantage that remembers rewards (history_norm, history_mean)"),
    Rule("replay.ratio", lambda c: c.replay.capacity > 0, _REPLAYS),
    Rule("replay.sampling", lambda c: c.replay.capacity > 0, _REPLAYS),
    Rule("replay.max_staleness", lambda c: c.replay.capacity > 0, _REPLAYS),
    Rule("replay.correction", lambda c: c.replay.capacity > 0, _REPLAYS),
    Rule(
        "replay.importance_cap",
        lambda c: c.replay.capacity > 0 and c.replay.correction != "none",
        f"{_REPLAYS} and a replay.correction",
    ),
    Rule("lora.alpha", lambda c: c.lora.rank > 0, "lora.rank > 0"),
    Rule("lora.targets", lambda c: c.lora.rank > 0, "lora.rank > 0"),
    Rule("rollout.on_logprob_gap", lambda c: c.rollout.max_logprob_gap != 0, "rollout.max_logprob_gap > 0 or null"),
    Rule("evaluation.temperature", lambda c: c.evaluation.num_samples > 0, "evaluation.num_samples > 0"),
    Rule("max_verify_error", lambda c: c.verify_steps > 0, "verify_steps > 0"),
    Rule("distributed.shard", lambda c: launched_rank()[1] > 1, _RANKS),
    Rule("distributed.timeout_s", lambda c: launched_rank()[1] > 1, _RANKS),
)


def inactive_keys(config: Config) -> Iterator[str]:
    """What was set and cannot act, a sentence each.

    A value that is the default, or that the preset brings, was not asked for and is not named.
    """
    for rule in RULES:
        value = _value(config, rule.key)
        if value in (keys()[rule.key].default, _of_preset(config.preset, rule.key)) or rule.acts(config):
            continue
        shown = f"{value:g}" if isinstance(value, float) else value
        yield f"{rule.key}={shown} cannot act: it needs {rule.needs}"


def _value(config: Config, dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _of_preset(preset: str | None, dotted: str) -> Any:
    """The preset's value of a key; None where it has none."""
    value: Any = PRESETS.get(preset or "", {})
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
