"""The configuration: one tree of dataclasses, filled from a preset, a YAML file and dotted overrides, in that order.

Everything here runs before torch is imported, so that a typo costs a second and not the loading of a model. Unknown
keys and impossible values are errors that name the key and what would do.
"""

# ruff: noqa: RUF009  (`_key` is `dataclasses.field`, with the help text in it)
from __future__ import annotations

import difflib
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from bandit_rft.advantages import ADVANTAGES
from bandit_rft.selection import SELECTIONS


class ConfigError(ValueError):
    """A configuration that cannot be used, with the key and what was expected in its message."""


def _key(default: Any, help: str) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class ObjectiveConfig:
    """What the update minimizes (bandit_rft.ops.PolicyObjective)."""

    kind: str = _key("reinforce", "reinforce | importance | ppo | cispo | gspo")
    aggregation: str = _key(
        "token-mean", "token-mean | seq-mean-token-sum | -token-mean | -token-sum-norm (verl's names)"
    )
    clip_low: float = _key(0.2, "the ratio is clipped below at 1 - clip_low (ppo, cispo, gspo)")
    clip_high: float = _key(0.2, "the ratio is clipped above at 1 + clip_high (ppo, cispo, gspo)")
    dual_clip: float | None = _key(None, "bound on the loss of negative advantages, > 1 (ppo, gspo)")
    importance_cap: float = _key(2.0, "largest importance ratio (importance)")
    kl: str = _key("none", "estimator of the KL to the initial model: none | k1 | k2 | k3")
    kl_coef: float = _key(0.0, "its coefficient in the loss (TRL's beta); 0 loads no reference model")
    entropy_coef: float = _key(0.0, "coefficient of the entropy bonus")
    norm_length: int | None = _key(None, "the constant length of seq-mean-token-sum-norm")


@dataclass
class RolloutConfig:
    """How completions are drawn for training."""

    batch_size: int = _key(256, "sequences decoded together (size of the KV cache)")
    top_k: int = _key(0, "sample among the k most likely tokens; 0: all (biases the policy gradient)")
    top_p: float = _key(1.0, "sample among the most likely tokens that make up this mass (biases the policy gradient)")
    min_p: float = _key(0.0, "sample among tokens at least this likely relative to the first (biases the gradient)")
    keep: int = _key(0, "train on so many of a query's rollouts, those of greatest reward variance (PODS); 0: all")
    dynamic_sampling: int = _key(
        0,
        "replace queries whose rollouts all earned the same by new ones, at most so many times a round (DAPO); 0: off",
    )
    mask_truncated: bool = _key(
        False, "completions cut off by the length limit are left out of the loss and normalizer"
    )


@dataclass
class ReplayConfig:
    """What of the past is learned from again."""

    window: int = _key(8, "rewards a query remembers (advantage history_norm and history_mean: the paper's replay)")
    capacity: int = _key(0, "rollouts kept to be trained on again, newest first; 0: none")
    ratio: float = _key(1.0, "replayed rollouts for every fresh one")
    sampling: str = _key("uniform", " | ".join(SELECTIONS))
    max_staleness: int | None = _key(None, "rounds after which a rollout is not replayed any more; null: never too old")
    correction: str = _key("token", "importance weights of replayed tokens: token | sequence (both truncated) | none")
    importance_cap: float = _key(2.0, "largest importance weight")


@dataclass
class UpdateConfig:
    """How many optimizer steps a round makes. With one, ratio and clipping cannot act."""

    epochs: int = _key(1, "passes over the round's rollouts")
    minibatches: int = _key(1, "parts of the round's rollouts, one optimizer step each")


@dataclass
class KLConfig:
    """Where the KL to the initial model goes (its estimator and coefficient: objective.kl, objective.kl_coef)."""

    where: str = _key("loss", "loss: a term of the objective | reward: subtracted from the rollout's reward")
    target: float | None = _key(None, "adapt the coefficient to keep the KL here (nats a token); null: fixed")
    horizon: int = _key(10000, "rollouts over which an adaptive coefficient moves (arXiv 1909.08593)")


@dataclass
class LoraConfig:
    """Low-rank adapters instead of full fine-tuning (bandit_rft[lora])."""

    rank: int = _key(0, "rank of the adapters; 0: none, every weight is trained")
    alpha: float = _key(16.0, "scale of the adapters, alpha / rank")
    targets: list[str] = _key(["all-linear"], "names of the modules that get one; the head never does")
    dropout: float = _key(0.0, "must be 0: with dropout the sampler and the trainer would be two policies")


@dataclass
class RewardConfig:
    """Which rewards, and what a reward may cost (bandit_rft.rewards)."""

    functions: list[str] = _key([], "replaces the task's rewards: names or module.py:function")
    weights: list[float] = _key([], "one weight a function; empty: all 1")
    timeout_s: float = _key(30.0, "seconds after which a reward call is killed")
    memory_mb: int = _key(2048, "memory a reward worker may use")
    workers: int = _key(1, "worker processes")
    on_error: str = _key("raise", "raise: stop the run; none: leave that rollout out and count it")
    length_penalty: float = _key(0.0, "subtracted from the reward of a completion of max_completion_length tokens")
    length_penalty_from: int = _key(0, "length from which the penalty grows, linearly (DAPO's overlong buffer)")


@dataclass
class EvaluationConfig:
    """What is measured before training, every eval_steps rounds, and at the end."""

    splits: list[str] = _key([], "splits to evaluate; empty: all the task has")
    num_samples: int = _key(1, "samples a question at evaluation.temperature; pass@1 needs one, pass@k needs k")
    greedy: bool = _key(True, "also decode greedily, once a question")
    temperature: float = _key(1.0, "temperature of the samples")
    max_queries: int | None = _key(None, "use only the first so many questions of each split; null: all")


@dataclass
class Config:
    """A training run."""

    preset: str | None = _key(None, "start from these values: paper | minimal | demo")
    model_name_or_path: str = _key("", "a Hugging Face causal LM: folder, hub name, or arithmetic-base (built in)")
    task: str = _key("", "arithmetic | gsm8k | math | summarize | jsonl | ... (bandit_rft.tasks)")
    data_path: str | None = _key(None, "folder or file with the task's data; null: where the task gets it by default")
    task_options: dict[str, Any] = _key({}, "options of the task, e.g. --task_options.prompt_column text")
    output_dir: str = _key("", "the run folder; empty: runs/<task>")
    seed: int = _key(0, "seed of data order, sampling and evaluation")
    max_rounds: int = _key(1000, "rounds of training")
    batch_size: int = _key(32, "queries a round")
    num_generations: int = _key(1, "rollouts a query")
    learning_rate: float = _key(1e-6, "constant learning rate of AdamW")
    weight_decay: float = _key(0.01, "weight decay of AdamW")
    adam_beta1: float = _key(0.9, "first moment decay of AdamW")
    adam_beta2: float = _key(0.999, "second moment decay of AdamW")
    adam_epsilon: float = _key(1e-8, "epsilon of AdamW")
    max_grad_norm: float = _key(1.0, "gradients are scaled down to this norm; 0: never")
    temperature: float = _key(1.0, "sampling temperature; the update uses log-probabilities at the same temperature")
    max_prompt_length: int = _key(512, "longer prompts (in tokens) are left out and counted")
    max_completion_length: int = _key(1024, "completions are cut off after so many tokens")
    chat_template: str = _key(
        "auto", "auto: plain prompts to a chat model become user messages; never: sent as they are"
    )
    max_generated_tokens: int | None = _key(
        None, "stop after the round in which so many tokens were drawn; null: never"
    )
    max_seconds: float | None = _key(None, "stop after the round in which rounds took so long, evaluation not counted")
    advantage: str = _key("reward", " | ".join(ADVANTAGES))
    advantage_options: dict[str, Any] = _key({}, "options of the advantage, e.g. --advantage_options.half_life 0.1")
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tokens_per_microbatch: int = _key(16384, "prompt and completion tokens of one forward and backward pass")
    dtype: str = _key("float32", "of the weights: float32, or bfloat16 with float32 master weights in the optimizer")
    device: str | None = _key(None, "cpu, cuda, cuda:1, ...; null: cuda where there is one")
    save_steps: int = _key(100, "rounds between checkpoints; 0: only at the end")
    save_total_limit: int = _key(2, "checkpoints kept, the newest; 0: all")
    eval_steps: int = _key(100, "rounds between evaluations; 0: only before and after")
    log_rollouts_steps: int = _key(1, "rounds between saved rollouts; 0: none")
    resume: str = _key(
        "auto", "auto: continue the run in output_dir | never: refuse a used folder | a checkpoint folder"
    )
    report_to: list[str] = _key([], "trackers besides metrics.jsonl: tensorboard, wandb, trackio")


PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2601.22532, the baseline: raw outcome reward in the clipped surrogate, KL to the initial model.
    "paper": {
        "batch_size": 32, "num_generations": 1, "advantage": "reward", "learning_rate": 1e-6, "weight_decay": 0.01,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "max_grad_norm": 1.0, "temperature": 1.0, "max_prompt_length": 512,
        "max_completion_length": 1024, "eval_steps": 100,
        "objective": {
            "kind": "ppo", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "aggregation": "token-mean", "kl": "k3",
            "kl_coef": 0.001, "entropy_coef": 0.0,
        },
        "evaluation": {"num_samples": 1, "greedy": False},
    },
    "demo": {
        "model_name_or_path": "arithmetic-base", "task": "arithmetic", "learning_rate": 5e-5, "max_rounds": 160,
        "max_prompt_length": 64, "max_completion_length": 64, "eval_steps": 40, "save_steps": 80,
        "evaluation": {"max_queries": 500},
    },
}  # fmt: skip
#: The paper's baseline without the KL term, which is what lets rollouts of reward 0 cost nothing.
PRESETS["minimal"] = {
    **PRESETS["paper"],
    "objective": {**PRESETS["paper"]["objective"], "kl": "none", "kl_coef": 0.0},
}
PRESETS["demo"] = {**PRESETS["minimal"], **PRESETS["demo"]}

#: Keys whose own keys are up to the task or the advantage.
FREE = ("task_options", "advantage_options")

#: What other trainers call a key of ours.
KNOWN_AS = {
    "beta": "objective.kl_coef",
    "kl_coef": "objective.kl_coef",
    "epsilon": "objective.clip_low",
    "epsilon_low": "objective.clip_low",
    "epsilon_high": "objective.clip_high",
    "clip_low": "objective.clip_low",
    "clip_high": "objective.clip_high",
    "loss_type": "objective.kind",
    "entropy_coeff": "objective.entropy_coef",
    "top_k": "rollout.top_k",
    "top_p": "rollout.top_p",
    "min_p": "rollout.min_p",
    "lr": "learning_rate",
    "model": "model_name_or_path",
    "dataset": "task",
    "max_steps": "max_rounds",
    "num_train_epochs": "max_rounds",
    "per_device_train_batch_size": "batch_size",
    "n": "num_generations",
    "max_new_tokens": "max_completion_length",
    "max_response_length": "max_completion_length",
    "max_tokens": "max_completion_length",
    "reward_funcs": "reward.functions",
    "reward_weights": "reward.weights",
    "resume_from_checkpoint": "resume",
    "logging_dir": "output_dir",
    "num_iterations": "update.epochs",
    "ppo_epochs": "update.epochs",
    "num_mini_batches": "update.minibatches",
    "mask_truncated_completions": "rollout.mask_truncated",
    "target_kl": "kl.target",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "buffer_size": "replay.capacity",
}

CHOICES: dict[str, tuple[str, ...]] = {
    "objective.kind": ("reinforce", "importance", "ppo", "cispo", "gspo"),
    "objective.aggregation": ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
    "objective.kl": ("none", "k1", "k2", "k3"),
    "reward.on_error": ("raise", "none"),
    "chat_template": ("auto", "never"),
    "dtype": ("float32", "bfloat16"),
    "replay.sampling": tuple(SELECTIONS),
    "replay.correction": ("token", "sequence", "none"),
    "kl.where": ("loss", "reward"),
}
#: key -> (smallest, largest) value; an open end is None. Keys in POSITIVE exclude zero.
RANGES: dict[str, tuple[float | None, float | None]] = {
    "seed": (0, 2**63 - 1), "max_rounds": (0, None), "batch_size": (1, None), "num_generations": (1, None),
    "learning_rate": (0, None), "weight_decay": (0, None), "adam_beta1": (0, 1), "adam_beta2": (0, 1),
    "adam_epsilon": (0, None), "max_grad_norm": (0, None), "temperature": (0, None), "max_prompt_length": (1, None),
    "max_completion_length": (1, None), "tokens_per_microbatch": (1, None), "save_steps": (0, None),
    "save_total_limit": (0, None), "eval_steps": (0, None), "log_rollouts_steps": (0, None),
    "rollout.batch_size": (1, None),
    "rollout.top_k": (0, None), "rollout.top_p": (0, 1), "rollout.min_p": (0, 1), "reward.timeout_s": (0, None),
    "reward.memory_mb": (64, None), "reward.workers": (1, None), "evaluation.num_samples": (0, None),
    "evaluation.temperature": (0, None), "evaluation.max_queries": (1, None), "objective.clip_low": (0, 1),
    "objective.clip_high": (0, None), "objective.dual_clip": (1, None), "objective.importance_cap": (0, None),
    "objective.kl_coef": (0, None), "objective.norm_length": (1, None), "max_generated_tokens": (1, None),
    "max_seconds": (0, None), "rollout.keep": (0, None), "rollout.dynamic_sampling": (0, None),
    "replay.window": (1, None), "replay.capacity": (0, None), "replay.ratio": (0, None),
    "replay.max_staleness": (1, None), "replay.importance_cap": (0, None), "update.epochs": (1, None),
    "update.minibatches": (1, None), "kl.target": (0, None), "kl.horizon": (1, None), "lora.rank": (0, None),
    "lora.alpha": (0, None), "lora.dropout": (0, 1), "reward.length_penalty": (0, None),
    "reward.length_penalty_from": (0, None),
}  # fmt: skip
POSITIVE = {"temperature", "evaluation.temperature", "rollout.top_p", "reward.timeout_s", "adam_epsilon"}
POSITIVE |= {
    "objective.importance_cap",
    "replay.importance_cap",
    "kl.target",
    "max_seconds",
    "lora.alpha",
    "replay.ratio",
}


def build_config(
    overrides: Mapping[str, Any] | None = None, file: str | Path | None = None, *, check: bool = True
) -> Config:
    """The configuration from a preset (named in the overrides or the file), then the file, then dotted overrides.

    overrides: {"objective.clip_low": 0.3, ...}; strings are read as YAML scalars. Raises ConfigError.
    """
    from_file: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = yaml.safe_load(Path(file).read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {file}: {error}") from None
        if not isinstance(loaded, dict | None):
            raise ConfigError(f"--config {file}: expected keys and values, got a {type(loaded).__name__}")
        from_file = dict(_flatten(loaded or {}))
    overrides = dict(overrides or {})
    preset = overrides.get("preset", from_file.get("preset"))
    config = Config()
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(f"preset must be one of {', '.join(sorted(PRESETS))}{_nearest(str(preset), PRESETS)}")
        for key, value in _flatten(PRESETS[preset]):
            _set(config, key, value)
    for source in (from_file, overrides):
        for key, value in source.items():
            _set(config, key, value)
    if not config.output_dir:
        config.output_dir = f"runs/{config.task or 'run'}"
    if check:
        check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raise ConfigError for the first value that cannot work, by name."""
    flat = dict(_flatten(asdict(config)))
    for key in ("model_name_or_path", "task"):
        if not flat[key]:
            raise ConfigError(f"--{key} is missing (or choose a --preset that names one: demo)")
    for key, choices in {**CHOICES, "advantage": tuple(ADVANTAGES)}.items():  # more may be registered by now
        if flat[key] not in choices:
            hint = _nearest(flat[key], choices)
            raise ConfigError(f"{key} must be one of {', '.join(choices)}; got {flat[key]!r}{hint}")
    for key, (low, high) in RANGES.items():
        value = flat[key]
        if value is None:
            continue
        outside = (low is not None and value < low) or (high is not None and value > high)
        if outside or (key in POSITIVE and value == 0):
            bounds = "> 0" if key in POSITIVE else f">= {low:g}"
            bounds += f" and <= {high:g}" if high is not None else ""
            raise ConfigError(f"{key} must be {bounds}; got {value!r}")
    o = config.objective
    if o.kl == "none" and o.kl_coef:
        raise ConfigError(f"objective.kl_coef={o.kl_coef} has no effect with objective.kl=none; choose k1, k2 or k3")
    if (o.aggregation == "seq-mean-token-sum-norm") != (o.norm_length is not None):
        raise ConfigError(
            "objective.norm_length belongs to objective.aggregation=seq-mean-token-sum-norm, which needs one"
        )
    if o.dual_clip is not None and (o.kind not in ("ppo", "gspo") or o.dual_clip <= 1):
        raise ConfigError("objective.dual_clip must be > 1 and applies to objective.kind ppo or gspo")
    _check_design(config)
    weights, functions = config.reward.weights, config.reward.functions
    if weights and functions and len(weights) != len(functions):
        raise ConfigError(f"reward.weights has {len(weights)} entries for {len(functions)} reward.functions")
    for tracker in config.report_to:
        if tracker not in ("tensorboard", "wandb", "trackio"):
            raise ConfigError(f"report_to knows tensorboard, wandb and trackio; got {tracker!r}")


def _check_design(config: Config) -> None:
    """Refuse design choices that contradict each other. What is merely questionable is explained by audit.py."""
    o, n, advantage = config.objective, config.num_generations, ADVANTAGES[config.advantage]
    if advantage.needs_groups and n < 2:
        raise ConfigError(
            f"advantage={config.advantage} compares the rollouts of one query: num_generations must be >= 2, got {n} "
            "(advantage=reward, batch_mean or history_norm work with one)"
        )
    if unknown := set(config.advantage_options) - (set(advantage.options) - {"window"}):
        known = ", ".join(set(advantage.options) - {"window"}) or "none"
        name = sorted(unknown)[0]
        hint = "; the window is replay.window" if name == "window" else ""
        raise ConfigError(
            f"advantage_options.{name} is no option of advantage={config.advantage} (it has: {known}){hint}"
        )
    if "window" in advantage.options and config.replay.window < n:
        raise ConfigError(
            f"replay.window={config.replay.window} forgets rollouts of its own round: num_generations={n}"
        )
    keep = config.rollout.keep
    if keep and not 2 <= keep < n:
        raise ConfigError(
            f"rollout.keep={keep} chooses among a query's rollouts by their variance: it must be at least 2 and less "
            f"than num_generations={n}"
        )
    if keep and advantage.trains_on_first:
        raise ConfigError(
            f"advantage={config.advantage} trains on one rollout of a query; rollout.keep has no meaning then"
        )
    if config.rollout.dynamic_sampling and n < 2:
        raise ConfigError(
            "rollout.dynamic_sampling replaces queries whose rollouts all earned the same; with num_generations=1 that "
            "is every query"
        )
    if config.rollout.dynamic_sampling and advantage.memory is not None:
        raise ConfigError(
            f"advantage={config.advantage} learns from a group of equal rewards through the query's past; "
            "rollout.dynamic_sampling would drop it"
        )
    if config.replay.capacity:
        narrowed = config.rollout.top_k or config.rollout.top_p < 1 or config.rollout.min_p
        if config.replay.correction != "none" and narrowed:
            raise ConfigError(
                f"replay.correction={config.replay.correction} needs the log-probabilities of the distribution that "
                "was drawn from; with rollout.top_k, top_p or min_p those of the full softmax are kept. Use "
                "replay.correction=none, or sample from the full softmax"
            )
        if config.replay.correction == "token" and o.kind == "gspo":
            raise ConfigError(
                "objective.kind=gspo has one ratio a sequence; replay.correction=token would weigh its tokens apart. "
                "Use replay.correction=sequence"
            )
    steps, rollouts = config.update.minibatches, config.batch_size * (keep or n)
    if steps > rollouts:
        raise ConfigError(f"update.minibatches={steps} is more than the {rollouts} rollouts of a round")
    if config.kl.where == "reward" and not o.kl_coef:
        raise ConfigError("kl.where=reward needs objective.kl_coef > 0 and an estimator objective.kl")
    if config.kl.target is not None and not o.kl_coef:
        raise ConfigError("kl.target adapts objective.kl_coef: start it above 0 and choose objective.kl")
    if config.reward.length_penalty_from and not config.reward.length_penalty:
        raise ConfigError("reward.length_penalty_from has no effect without reward.length_penalty")
    if config.reward.length_penalty_from >= config.max_completion_length:
        raise ConfigError("reward.length_penalty_from must be less than max_completion_length")
    if config.lora.dropout:
        raise ConfigError("lora.dropout must be 0: the sampler and the trainer would be two different policies")


def advantage_options(config: Config) -> dict[str, Any]:
    """The options of the configured advantage, as compute_advantages takes them."""
    window = {"window": config.replay.window} if "window" in ADVANTAGES[config.advantage].options else {}
    return {**window, **config.advantage_options}


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `--config` reads back to the same values."""
    text: str = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    return text


def key_help() -> Iterator[tuple[str, str, Any, str]]:
    """(dotted key, type, default, help) of every key."""
    yield from _describe(Config(), "")


def _describe(node: Any, prefix: str) -> Iterator[tuple[str, str, Any, str]]:
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            yield from _describe(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", str(f.type), value, f.metadata["help"]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in FREE:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nearest(name: str, names: typing.Iterable[str]) -> str:
    found = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def _set(config: Config, dotted: str, value: Any) -> None:
    head, _, rest = dotted.partition(".")
    if head in FREE and rest:
        getattr(config, head)[rest] = yaml.safe_load(value) if isinstance(value, str) else value
        return
    node: Any = config
    *path, last = dotted.split(".")
    for part in path:
        node = getattr(node, part, None) if is_dataclass(node) else None
    known = {f.name for f in fields(node)} if is_dataclass(node) else set()
    if last not in known or is_dataclass(getattr(node, last)):
        names = [key for key, *_ in key_help()]
        if dotted in KNOWN_AS:
            hint = f" (did you mean {KNOWN_AS[dotted]}?)"
        elif by_last := [name for name in names if name.rpartition(".")[2] == last]:
            hint = f" (did you mean {by_last[0]}?)"
        else:
            hint = _nearest(dotted, names)
        raise ConfigError(f"unknown key {dotted!r}{hint}")
    kind = _types(type(node))[last]  # type: ignore[arg-type]
    setattr(node, last, _convert(dotted, kind, value))


@functools.cache
def _types(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _convert(key: str, kind: Any, value: Any) -> Any:
    """`value` as the type of the key: YAML scalars for strings from the command line, no silent rounding."""
    optional = isinstance(kind, types.UnionType)
    if optional:
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if isinstance(value, str) and kind is not str:
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{key}: cannot read {value!r}") from None
        if isinstance(value, str) and kind is float:  # YAML 1.1 reads 1e-6 as a string
            try:
                value = float(value)
            except ValueError:
                raise ConfigError(f"{key} must be a finite number; got {value!r}") from None
    if value is None or (kind is str and optional and value in ("null", "none", "")):
        if optional:
            return None
        raise ConfigError(f"{key} must be given; got null")
    if kind is bool and isinstance(value, bool):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int and number and int(value) == value:
        return int(value)
    if kind is float and number:
        return float(value)
    if kind is str and isinstance(value, str | int | float):
        return str(value)
    if kind == dict[str, Any] and isinstance(value, dict):
        return dict(value)
    if typing.get_origin(kind) is list:
        item = typing.get_args(kind)[0]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, Sequence):
            value = [value]
        return [_convert(key, item, entry) for entry in value]
    names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    raise ConfigError(f"{key} must be {names.get(kind, str(kind))}; got {value!r}")
