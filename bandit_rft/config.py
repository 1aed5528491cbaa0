"""The configuration: a tree of pydantic dataclasses, filled from a preset, a file and dotted overrides, in that order.

Everything here runs before torch is imported, so that a typo costs a second and not the loading of a model. Errors name
the key, what was given and what would do. The sections, with their rules, are in sections.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass

from bandit_rft.advantages import ADVANTAGES
from bandit_rft.budget import check_schedule
from bandit_rft.options import (
    STRICT,
    check_json,
    check_options,
    choices,
    fields_of,
    nearest,
    problems,
    read_given,
    read_value,
    read_yaml,
    shown,
)
from bandit_rft.paths import from_folder, relative_to, saved_tree
from bandit_rft.peer_names import answer_to_name, answer_to_value
from bandit_rft.presets import PRESETS
from bandit_rft.sections import (
    DistributedConfig,
    EvaluationConfig,
    Key,
    KLConfig,
    LoraConfig,
    ObjectiveConfig,
    QueriesConfig,
    ReplayConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    UpdateConfig,
)
from bandit_rft.tasks import task_option_model
from bandit_rft.text import html_table

#: Keys whose own keys are up to the task, the advantage or the chat template.
FREE = ("task_options", "advantage_options", "chat_template_kwargs")


class ConfigError(ValueError):
    """A configuration that cannot be used, with the key and what was expected in its message."""


@dataclass(config=STRICT)
class Config(Section):
    """A training run."""

    preset: str | None = Key(None, "start from these values: " + " | ".join(PRESETS), may_change=True, design=False)
    model_name_or_path: str = Key(
        "", "a Hugging Face causal LM: folder, hub name, or arithmetic-base (built in)",
        also=("model",),
    )  # fmt: skip
    task: str = Key(
        "", "arithmetic | countdown | gsm8k | math | summarize | dataset | reasoning_gym", also=("dataset",)
    )
    data_path: str | None = Key(
        None, "folder or file with the task's data; null: where the task gets it by default", may_change=True
    )
    task_options: dict[str, Any] = Key({}, "options of the task, e.g. --task_options.prompt_column text")
    output_dir: str = Key(
        "", "the run folder; empty: runs/<task>", also=("logging_dir",), may_change=True, design=False
    )
    seed: int = Key(0, "seed of data order, sampling and evaluation", ge=0, le=2**63 - 1)
    max_rounds: int = Key(1000, "rounds of training", also=("max_steps",), may_change=True, design=False, ge=0)
    num_train_epochs: float | None = Key(
        None, "passes over the training prompts, if they come before max_rounds; 0.5: half a pass; null: any",
        also=("total_epochs",), may_change=True, design=False, gt=0,
    )  # fmt: skip
    batch_size: int = Key(32, "queries a round", also=("per_device_train_batch_size",), design=False, ge=1)
    num_generations: int = Key(1, "rollouts a query", also=("n",), design=False, ge=1)
    learning_rate: float = Key(1e-6, "learning rate of AdamW after the warm-up", also=("lr",), ge=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Key(
        "constant", "how the learning rate falls after the warm-up"
    )
    warmup_rounds: int = Key(
        0, "rounds in which the learning rate rises in equal steps", also=("warmup_steps", "lr_warmup_steps"), ge=0
    )
    warmup_ratio: float = Key(
        0.0, "the same as a share of the learning rate's whole course", also=("lr_warmup_steps_ratio",), ge=0, lt=1
    )
    min_lr_ratio: float = Key(0.0, "what a falling learning rate ends at, relative to learning_rate", ge=0, le=1)
    lr_scheduler_rounds: int | None = Key(
        None, "rounds of the learning rate's whole course; null: those of the run", may_change=True, ge=1
    )
    weight_decay: float = Key(0.01, "weight decay of AdamW", ge=0)
    adam_beta1: float = Key(0.9, "first moment decay of AdamW", ge=0, le=1)
    adam_beta2: float = Key(0.999, "second moment decay of AdamW", ge=0, le=1)
    adam_epsilon: float = Key(1e-8, "epsilon of AdamW", gt=0)
    max_grad_norm: float = Key(1.0, "gradients are scaled down to this norm; 0: never", ge=0)
    temperature: float = Key(
        1.0, "sampling temperature; the update uses log-probabilities at the same temperature", gt=0
    )
    max_prompt_length: int = Key(512, "longer prompts (in tokens) are left out and counted", ge=1)
    max_completion_length: int = Key(
        1024, "completions are cut off after so many tokens",
        also=("max_new_tokens", "max_response_length", "max_tokens"), ge=1,
    )  # fmt: skip
    chat_template: Literal["auto", "never"] = Key(
        "auto", "plain prompts to a chat model become user messages, or are sent as they are"
    )
    chat_template_kwargs: dict[str, Any] = Key({}, "what else the chat template reads, e.g. enable_thinking: false")
    max_generated_tokens: int | None = Key(
        None, "stop after the round in which so many tokens were drawn; null: never",
        may_change=True, design=False, ge=1,
    )  # fmt: skip
    max_seconds: float | None = Key(
        None, "stop after the round in which rounds took so long, evaluation not counted",
        may_change=True, design=False, gt=0,
    )  # fmt: skip
    advantage: str = Key("reward", " | ".join(ADVANTAGES))
    advantage_options: dict[str, Any] = Key({}, "options of the advantage, e.g. --advantage_options.half_life 0.1")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    kl: KLConfig = Field(default_factory=KLConfig)
    update: UpdateConfig = Field(default_factory=UpdateConfig)
    queries: QueriesConfig = Field(default_factory=QueriesConfig)
    replay: ReplayConfig = Field(default_factory=ReplayConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    tokens_per_microbatch: int = Key(
        16384, "prompt and completion tokens of one forward and backward pass", may_change=True, design=False, ge=1
    )
    gradient_checkpointing: bool = Key(
        False, "keep no activations within a layer; the update computes a third more", may_change=True, design=False
    )
    verify_steps: int = Key(
        100, "rounds between checks of one rollout's loss and gradient by plain PyTorch, from the first on; 0: never",
        may_change=True, design=False, ge=0,
    )  # fmt: skip
    max_verify_error: float | None = Key(
        None, "largest relative error of such a check; null: 0.001 in float32, 0.2 in bfloat16",
        may_change=True, design=False, gt=0,
    )  # fmt: skip
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Key(
        "auto",
        "of the weights; auto: bfloat16 on a GPU, else float32. bfloat16 keeps float32 master weights in the optimizer",
    )
    device: str | None = Key(
        None, "cpu, cuda, cuda:1, ...; null: cuda where there is one", may_change=True, design=False
    )
    thread_wait: Literal["bounded", "active", "passive"] = Key(
        "bounded", "how idle CPU threads wait: bounded (spin briefly, then sleep) | active (spin: for a machine of "
        "one's own) | passive (sleep). OMP_WAIT_POLICY and GOMP_SPINCOUNT of the environment go first",
        may_change=True, design=False,
    )  # fmt: skip
    save_steps: int = Key(100, "rounds between checkpoints; 0: only at the end", may_change=True, design=False, ge=0)
    save_total_limit: int = Key(2, "checkpoints kept, the newest; 0: all", may_change=True, design=False, ge=0)
    eval_steps: int = Key(
        100, "rounds between evaluations; 0: only before and after", may_change=True, design=False, ge=0
    )
    log_rollouts_steps: int = Key(1, "rounds between saved rollouts; 0: none", may_change=True, design=False, ge=0)
    resume: str = Key(
        "auto", "auto: continue the run in output_dir | never: refuse a used folder | a checkpoint folder",
        also=("resume_from_checkpoint",), may_change=True, design=False,
    )  # fmt: skip
    report_to: list[str] = Key(
        [], "trackers besides metrics.jsonl: tensorboard, wandb, trackio", may_change=True, design=False
    )

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value!r}' for name, value, _ in self._chosen())})"

    def _repr_html_(self) -> str:
        return html_table(("key", "value", "default"), self._chosen(), "what differs from the defaults")

    def _chosen(self) -> Iterator[tuple[str, Any, Any]]:
        """(dotted key, value, default) of what differs from the default."""
        for name, key in keys().items():
            value: Any = self
            for part in name.split("."):
                value = getattr(value, part)
            if value != key.default:
                yield name, value, key.default

    @field_validator("advantage")
    @classmethod
    def _registered(cls, value: str) -> str:
        if value not in ADVANTAGES:  # looked up now: more may be registered than when this class was made
            theirs = answer_to_value("advantage", value)
            hint = f": {theirs}" if theirs else nearest(value, ADVANTAGES)
            raise ValueError(f"must be one of {', '.join(ADVANTAGES)}; got {shown(value)}{hint}")
        return value

    @field_validator("report_to")
    @classmethod
    def _trackers(cls, value: list[str]) -> list[str]:
        for tracker in value:
            if tracker not in ("tensorboard", "wandb", "trackio"):
                raise ValueError(f"knows tensorboard, wandb and trackio; got {shown(tracker)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        _check_advantage(self)
        check_schedule(self)
        if (model := task_option_model(self.task)) is not None:
            check_options("task_options", f"task={self.task}", model, self.task_options, {})
        check_json("chat_template_kwargs", self.chat_template_kwargs)
        for section in (self.replay, self.rollout, self.update, self.kl, self.reward, self.objective):
            section.fits(self)
        return self


# --- what the advantage and the task ask for --------------------------------------------------------------------------


def _check_advantage(config: Config) -> None:
    """Raise ValueError where the advantage cannot do with the rest, or with its options."""
    name, advantage, n = config.advantage, ADVANTAGES[config.advantage], config.num_generations
    if advantage.needs_groups and n < 2:
        raise ValueError(
            f"advantage={name} compares the rollouts of one query: num_generations must be >= 2, got {n} "
            "(advantage=reward, batch_mean or history_norm work with one)"
        )
    if advantage.needs_batch and config.batch_size * n < 2:
        raise ValueError(
            f"advantage={name} compares the rollouts of a round, and is 0 for one alone: batch_size * num_generations "
            "must be >= 2 (advantage=reward or history_mean work with one)"
        )
    hints = {"window": "; the window is replay.window"}
    check_options("advantage_options", f"advantage={name}", advantage.option_model, config.advantage_options, hints)
    try:
        advantage.make_memory(advantage_options(config))
    except ValueError as error:  # what its options say to each other
        raise ValueError(f"advantage={name}: {error}") from None


def advantage_options(config: Config) -> dict[str, Any]:
    """The options of the configured advantage, as compute_advantages takes them."""
    window = {"window": config.replay.window} if "window" in ADVANTAGES[config.advantage].options else {}
    return {**window, **config.advantage_options}


# --- what there is ----------------------------------------------------------------------------------------------------


@plain_dataclass(frozen=True)
class KeyInfo:
    """A key as its section declares it (sections.Key)."""

    name: str  # dotted
    kind: Any  # its type
    default: Any
    help: str
    also: tuple[str, ...]
    may_change: bool
    design: bool

    @property
    def switch(self) -> bool:
        """Whether `--key` alone says true."""
        return self.kind is bool


@functools.cache
def keys() -> dict[str, KeyInfo]:
    """Every key by its dotted name, in the order of `--help`."""
    return {key.name: key for key in _keys_of(Config, "")}


def _keys_of(section: type, prefix: str) -> Iterator[KeyInfo]:
    for name, field in fields_of(section).items():
        kind: Any = field.annotation
        if fields_of(kind):
            yield from _keys_of(kind, f"{prefix}{name}.")
            continue
        extra: Any = field.json_schema_extra
        help = (field.description or "") + (f": {' | '.join(choices(kind))}" if choices(kind) else "")
        default = field.get_default(call_default_factory=True)
        yield KeyInfo(
            f"{prefix}{name}", kind, default, help, tuple(extra["also"]), extra["may_change"], extra["design"]
        )


def key_help() -> Iterator[tuple[str, str, Any, str]]:
    """(dotted key, type, default, help) of every key."""
    for key in keys().values():
        yield key.name, getattr(key.kind, "__name__", str(key.kind)), key.default, key.help


#: Keys that may change between a run and its continuation; any other would make it another run.
MAY_CHANGE = frozenset(key.name for key in keys().values() if key.may_change)
#: Keys that say how, or how long, a run is carried out; and batch_size and num_generations, a study's axes.
NOT_DESIGN = frozenset(key.name for key in keys().values() if not key.design)


def unknown_key(dotted: str, *given: object) -> str:
    """That there is no such key, and which one may be meant; of a section also what it was given."""
    if of_section := [name for name in keys() if name.startswith(f"{dotted}.")]:
        got = "".join(f"; got {shown(value)}" for value in given)
        return f"{dotted}: expected a mapping of keys, such as {of_section[0]}{got}"
    meant = [key.name for key in keys().values() if dotted in key.also]
    own = [name for name in keys() if name.rpartition(".")[2] == dotted.rpartition(".")[2]]
    in_section = any(name.startswith(dotted.partition(".")[0] + ".") for name in keys())
    if (row := answer_to_name(dotted, alike=not in_section)) is not None and ("." in dotted or meant or not own):
        meant += [row[0]] if row[0] else []
        return f"unknown key {dotted!r}" + (f" (did you mean {meant[0]}?)" if meant else "") + f": {row[1]}"
    meant += own
    return f"unknown key {dotted!r}" + (f" (did you mean {meant[0]}?)" if meant else nearest(dotted, keys()))


# --- from preset, file and overrides ----------------------------------------------------------------------------------


def build_config(
    overrides: Mapping[str, Any] | None = None, file: str | Path | None = None, *, check: bool = True
) -> Config:
    """The configuration from a preset (named in the overrides or the file), then the file, then dotted overrides.

    Args:
        overrides: {"objective.clip_low": 0.3, ...}; texts are read as their key's type.
        file: a YAML file of keys, nested or dotted; paths in it start at its folder.
        check: whether model and task must be given; everything else is checked in any case.

    Raises:
        ConfigError: for every value that cannot work, a line each.
    """
    in_file = list(_flatten(_read_file(file)))
    in_file = [(key, from_folder(Path(file or "").parent, key, value)) for key, value in in_file]
    from_file, given = dict(in_file), dict(_flatten(overrides or {}))
    if twice := {key for key, _ in in_file if sum(key == other for other, _ in in_file) > 1}:
        raise ConfigError(f"--config {file}: {min(twice)} is given twice, dotted and nested")
    preset = read_value(str | None, given.get("preset", from_file.get("preset")))
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}; got {shown(preset)}{nearest(preset, PRESETS)}")
    flat = {**dict(_flatten(PRESETS.get(preset, {}))), **from_file, **given}
    if unknown := [key for key in flat if key not in keys() and key.partition(".")[0] not in FREE]:
        raise ConfigError("\n".join(unknown_key(key, flat[key]) for key in unknown))
    tree: dict[str, Any] = {}
    texts = {key for key, value in given.items() if isinstance(value, str)}
    for key, value in flat.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {part} is given a value of its own, {node!r}")
        node[last] = read_value(Any, value) if len(path) > 1 and path[0] in FREE and key in texts else value
    advantage = ADVANTAGES.get(tree.get("advantage", Config.advantage))
    task, own = task_option_model(tree.get("task", "")), advantage.option_model if advantage else None
    for key, model in zip(FREE, (task, own, None), strict=True):
        if isinstance(options := tree.get(key), dict):
            options |= read_given(model, {k: v for k, v in options.items() if f"{key}.{k}" in texts})
    config = _from_tree(tree)
    if not config.output_dir:
        config.output_dir = f"runs/{config.task or 'run'}"
    if check:
        _check_given(config)
    return config


def check_config(config: Config) -> None:
    """Check every value again, those too that were assigned since the configuration was made.

    Raises:
        ConfigError: naming the values that cannot work.
    """
    _from_tree(asdict(config))
    _check_given(config)


def _check_given(config: Config) -> None:
    for key in ("model_name_or_path", "task"):
        if not getattr(config, key):
            raise ConfigError(f"--{key} is missing (or choose a --preset that names one: demo)")


def _from_tree(tree: Mapping[str, Any]) -> Config:
    """The configuration of a nested mapping of known keys.

    Raises:
        ConfigError: naming everything that is wrong at once.
    """
    found, values = list[str](), dict(tree)
    for name, field in fields_of(Config).items():
        section: Any = field.annotation
        if fields_of(section):
            try:
                values[name] = section(**values.get(name, {}))
            except ValidationError as error:
                found += map(str, problems(error, section, f"{name}."))
                del values[name]
    try:
        config = Config(**values)
    except ValidationError as error:
        of_keys = [problem for problem in problems(error, Config) if problem.name or not found]
        found = [*map(str, of_keys), *found]  # rules between sections can wait until each is right
    if found:
        raise ConfigError("\n".join(found))
    return config


def _read_file(file: str | Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        loaded = read_yaml(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError) as error:  # a name with a null byte, text that is not UTF-8
        raise ConfigError(f"--config {file}: {error}") from None
    if not isinstance(loaded, dict | None):
        raise ConfigError(f"--config {file}: expected keys and values, got a {type(loaded).__name__}")
    return loaded or {}


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value); the options of a task and an advantage too, whose values may be mappings themselves."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in FREE and isinstance(value, str):
            value = read_value(dict, value)
        section = value or name in FREE or any(key.startswith(f"{name}.") for key in keys())
        if isinstance(value, Mapping) and section and prefix.rstrip(".") not in FREE:
            yield from _flatten(value, f"{name}.")
        else:
            yield name, value


def to_yaml(config: Config, folder: Path | None = None) -> str:
    """The configuration as YAML that `--config` reads back to the same values.

    Args:
        config: any.
        folder: the run folder, where the YAML is to be saved in it: paths then start there, and the run stays the same
            wherever the folder is moved.
    """
    tree = asdict(config)
    if folder is not None:
        tree = {**saved_tree(tree, relative_to(folder)), "output_dir": ".", "resume": "auto"}
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
