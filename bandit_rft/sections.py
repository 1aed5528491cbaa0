"""The sections of the configuration. Everything about a key stands beside it: default, rule, help, other names for it.

A rule about two keys of one section is a validator of the section; one about another section too is in its `fits`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from bandit_rft.advantages import ADVANTAGES
from bandit_rft.options import STRICT, fields_of, read_value
from bandit_rft.presets import PRESETS
from bandit_rft.tasks.files import named_files

if TYPE_CHECKING:
    from bandit_rft.config import Config


def Key(
    default: Any, help: str, *, also: Iterable[str] = (), may_change: bool = False, design: bool = True, **rules: Any
) -> Any:
    """A key of the configuration.

    Args:
        default: its value where nothing else is said.
        help: one line for `--help`; the choices of a Literal are added to it.
        also: what other trainers call it, for suggestions.
        may_change: whether a run may be continued with another value; otherwise it would be another run.
        design: whether it says what a run does, and not only how, or how long, it is carried out.
        rules: constraints as pydantic's Field takes them (gt, ge, lt, le).
    """
    extra: dict[str, Any] = {"also": list(also), "may_change": may_change, "design": design}
    made = {"default_factory": default.copy} if isinstance(default, list | dict) else {"default": default}
    return Field(**made, description=help, json_schema_extra=extra, **rules)


@dataclass(config=STRICT)
class Section:
    """Part of the configuration. Values are read as their key's type (options.read_value), then checked."""

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: Any) -> Any:
        return read_value(fields_of(cls)[info.field_name].annotation, value)

    def fits(self, config: Config) -> None:
        """Raise ValueError where this section contradicts another. What is merely questionable, audit.py explains."""


#: Which kinds of objective these keys act on; elsewhere only their default is taken.
CLIPPED_BY = {
    "clip_low": ("ppo", "cispo", "gspo"), "clip_high": ("ppo", "cispo", "gspo"),
    "importance_floor": ("importance_mask",), "importance_cap": ("importance", "importance_mask"),
}  # fmt: skip


@dataclass(config=STRICT)
class ObjectiveConfig(Section):
    """What the update minimizes (bandit_rft.ops.PolicyObjective)."""

    kind: Literal["reinforce", "importance", "importance_mask", "ppo", "cispo", "gspo"] = Key(
        "reinforce", "form of the policy loss", also=("loss_type",)
    )
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = Key(
        "token-mean", "from token losses to the loss (verl's names)"
    )
    clip_low: float = Key(
        0.2, "the ratio is clipped below at 1 - clip_low (ppo, cispo, gspo)", also=("epsilon", "epsilon_low"),
        ge=0, le=1,
    )  # fmt: skip
    clip_high: float = Key(
        0.2, "the ratio is clipped above at 1 + clip_high (ppo, cispo, gspo)", also=("epsilon_high",), ge=0
    )
    dual_clip: float | None = Key(None, "bound on the loss of negative advantages (ppo, gspo)", gt=1)
    importance_floor: float = Key(0.5, "tokens of a smaller ratio are dropped (importance_mask)", ge=0, le=1)
    importance_cap: float = Key(
        2.0, "largest importance ratio (importance); tokens of a larger one are dropped (importance_mask)", gt=0
    )
    kl: Literal["none", "k1", "k2", "k3"] = Key("none", "estimator of the KL to the initial model")
    kl_coef: float = Key(0.0, "its coefficient (TRL's beta); 0 loads no reference model", also=("beta",), ge=0)
    entropy_coef: float = Key(0.0, "coefficient of the entropy bonus", also=("entropy_coeff",))
    norm_length: int | None = Key(None, "the constant length of seq-mean-token-sum-norm", ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        if self.kl == "none" and self.kl_coef:
            raise ValueError(
                f"objective.kl_coef={self.kl_coef} has no effect with objective.kl=none; choose k1, k2 or k3"
            )
        if (self.aggregation == "seq-mean-token-sum-norm") != (self.norm_length is not None):
            raise ValueError(
                "objective.norm_length belongs to objective.aggregation=seq-mean-token-sum-norm, which needs one"
            )
        if self.kind == "importance_mask" and self.importance_cap < 1:
            raise ValueError(
                "objective.importance_cap must be >= 1 with objective.kind=importance_mask, which keeps the tokens of "
                f"an unchanged policy (ratio 1); got {self.importance_cap:g}"
            )
        if self.dual_clip is not None and self.kind not in ("ppo", "gspo"):
            setting = [name for name, tree in PRESETS.items() if tree["objective"]["dual_clip"] == self.dual_clip]
            origin = f" (of preset {', '.join(setting)}; objective.dual_clip=null takes it away)" if setting else ""
            raise ValueError(
                f"objective.dual_clip={self.dual_clip:g} cannot act with objective.kind={self.kind}: it belongs to "
                f"ppo, gspo{origin}"
            )
        return self

    def fits(self, config: Config) -> None:
        of_preset = PRESETS.get(config.preset or "", {}).get("objective", {})
        for name, kinds in CLIPPED_BY.items():
            default = fields_of(type(self))[name].default
            if self.kind not in kinds and (value := getattr(self, name)) != default:
                origin = f" (of preset {config.preset}; objective.{name}={default:g} takes it away)"
                raise ValueError(
                    f"objective.{name}={value:g} cannot act with objective.kind={self.kind}: it belongs to "
                    f"{', '.join(kinds)}{origin if of_preset.get(name) == value else ''}"
                )


@dataclass(config=STRICT)
class RolloutConfig(Section):
    """How completions are drawn for training."""

    engine: Literal["embedded", "vllm"] = Key(
        "embedded", "what draws: this process, or vLLM servers (docs/scaling.md)", design=False
    )
    urls: list[str] = Key([], "addresses of vLLM servers that run already (vllm)", may_change=True, design=False)
    server_python: str = Key(
        "", "Python of an environment with vLLM, by which the run starts a server (vllm)", may_change=True, design=False
    )
    server_command: str = Key("", "or the whole command, with {model} and {port} (vllm)", may_change=True, design=False)
    push: Literal["auto", "folder", "lora", "nccl"] = Key(
        "auto",
        "how weights reach a server (vllm); auto: lora with adapters, else folder",
        may_change=True,
        design=False,
    )
    push_folder: str = Key(
        "", "where a server finds them; empty: weights/ in the run folder (vllm)", may_change=True, design=False
    )
    ahead: int = Key(
        0, "1: the next round is drawn while this one is trained on, by a policy one round older (vllm)", ge=0, le=1
    )
    canary_prompts: int = Key(
        4, "prompts whose completions are compared with the trainer after every push (vllm)", may_change=True,
        design=False, ge=0,
    )  # fmt: skip
    max_requests: int = Key(64, "completions asked for at a time (vllm)", may_change=True, design=False, ge=1)
    request_timeout_s: float = Key(
        600.0, "seconds for one answer of a server, and for its taking new weights (vllm)", may_change=True,
        design=False, gt=0,
    )  # fmt: skip
    retry_s: float = Key(
        600.0, "seconds that a server may fail before the run stops, with a checkpoint (vllm)", may_change=True,
        design=False, gt=0,
    )  # fmt: skip
    batch_size: int = Key(256, "sequences decoded together (size of the KV cache)", may_change=True, design=False, ge=1)
    top_k: int = Key(0, "sample among the k most likely tokens; 0: all (biases the policy gradient)", ge=0)
    top_p: float = Key(
        1.0, "sample among the most likely tokens that make up this mass (biases the policy gradient)", gt=0, le=1
    )
    min_p: float = Key(
        0.0, "sample among tokens at least this likely relative to the first (biases the gradient)", ge=0, le=1
    )
    keep: int = Key(0, "train on so many of a query's rollouts, those of greatest reward variance (PODS); 0: all", ge=0)
    dynamic_sampling: int = Key(
        0,
        "replace queries whose rollouts all earned the same by new ones, at most so many times a round (DAPO); 0: off",
        ge=0,
    )
    stop_hopeless: int = Key(
        0, "tokens between two looks at a rollout, which ends once its reward can only be 0 (countdown); 0: none", ge=0
    )
    mask_truncated: bool = Key(
        False, "completions cut off by the length limit are left out of the loss and normalizer",
        also=("mask_truncated_completions",),
    )  # fmt: skip
    max_logprob_gap: float | None = Key(
        None,
        "stop when a rollout's log-probabilities at sampling and in the update differ by more (nats a token, mean over "
        "the rollout); null: 0.01 in float32, 0.25 in bfloat16; 0: never", may_change=True, design=False, ge=0,
    )  # fmt: skip
    on_logprob_gap: Literal["stop", "correct"] = Key(
        "stop", "past max_logprob_gap: end the run, or weigh rollouts by their ratios to the sampler (vllm)",
        may_change=True,
    )  # fmt: skip

    @field_validator("urls")
    @classmethod
    def _addresses(cls, value: list[str]) -> list[str]:
        for url in value:
            if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
                raise ValueError(f"must be addresses such as http://host:8000; got {url!r}")
        return value

    def fits(self, config: Config) -> None:
        self._fits_engine(config)
        n, advantage = config.num_generations, ADVANTAGES[config.advantage]
        if self.keep and not 2 <= self.keep < n:
            raise ValueError(
                f"rollout.keep={self.keep} chooses among a query's rollouts by their variance: it must be at least 2 "
                f"and less than num_generations={n}"
            )
        if self.keep and advantage.trains_on_first:
            raise ValueError(
                f"advantage={config.advantage} trains on one rollout of a query; rollout.keep has no meaning then"
            )
        if self.dynamic_sampling and n < 2:
            raise ValueError(
                "rollout.dynamic_sampling replaces queries whose rollouts all earned the same; with num_generations=1 "
                "that is every query"
            )
        if self.dynamic_sampling and advantage.memory is not None:
            raise ValueError(
                f"advantage={config.advantage} learns from a group of equal rewards through the query's past; "
                "rollout.dynamic_sampling would drop it"
            )
        counted = {
            "reward.length_penalty": config.reward.length_penalty, "objective.kl_coef": config.objective.kl_coef,
            "objective.entropy_coef": config.objective.entropy_coef, "rollout.mask_truncated": self.mask_truncated,
        }  # fmt: skip
        if self.stop_hopeless and (others := [name for name, value in counted.items() if value]):
            raise ValueError(
                f"rollout.stop_hopeless does not go with {others[0]}, which needs the tokens that would have followed"
            )

    def _fits_engine(self, config: Config) -> None:
        """What only a server, or only the embedded engine, can do."""
        fields = fields_of(type(self))
        changed = {
            name
            for name, field in fields.items()
            if getattr(self, name) != field.get_default(call_default_factory=True)
        }
        if self.engine == "embedded":
            if foreign := sorted(changed & {name for name, x in fields.items() if "(vllm)" in (x.description or "")}):
                raise ValueError(
                    f"rollout.{foreign[0]} belongs to rollout.engine=vllm; the embedded engine has no server"
                )
            return
        why = {
            "batch_size": "makes its own batches (rollout.max_requests)", "stop_hopeless": "draws whole completions",
            **dict.fromkeys(("top_k", "top_p", "min_p"), "has the log-probabilities of the tokens that are left"),
        }  # fmt: skip
        if foreign := sorted(changed & why.keys()):
            raise ValueError(f"rollout.{foreign[0]} does not go with rollout.engine=vllm: a server {why[foreign[0]]}")
        if [bool(self.urls), bool(self.server_python), bool(self.server_command)].count(True) != 1:
            raise ValueError(
                "rollout.engine=vllm needs one of rollout.urls (servers that run), rollout.server_python and "
                "rollout.server_command (a server that the run starts)"
            )
        if self.push != "auto" and (self.push == "lora") != bool(config.lora.rank):
            raise ValueError(
                f"rollout.push={self.push} with lora.rank={config.lora.rank}: adapters are pushed as adapters (lora), "
                "whole weights as a folder or over nccl"
            )
        if config.dtype == "float64":
            raise ValueError("dtype=float64 does not go with rollout.engine=vllm, which has no such kernels")
        if self.ahead and (self.dynamic_sampling or config.replay.capacity):
            other = "rollout.dynamic_sampling" if self.dynamic_sampling else "replay.capacity"
            raise ValueError(
                f"{other} does not go with rollout.ahead: which rollouts it takes, the next round depends on"
            )
        if self.on_logprob_gap == "correct" and config.objective.kind == "reinforce":
            raise ValueError(
                "rollout.on_logprob_gap=correct needs an objective with a ratio to the sampler (importance, "
                "importance_mask, ppo, cispo, gspo); objective.kind=reinforce has none"
            )


@dataclass(config=STRICT)
class QueriesConfig(Section):
    """Which queries a round asks (bandit_rft.queries)."""

    order: Literal["epochs", "learnable"] = Key(
        "epochs",
        "shuffled passes, or drawn by past rewards, more often where the next one is less certain (curriculum)",
    )
    floor: float = Key(0.02, "added to every query's p (1 - p), p its chance of a reward (learnable)", gt=0)
    half_life: float = Key(5.0, "passes after which a reward counts half in p (learnable)", gt=0)


@dataclass(config=STRICT)
class ReplayConfig(Section):
    """What of the past is learned from again."""

    window: int = Key(
        8, "rewards a query remembers (advantage history_norm and history_mean: the paper's replay)", ge=1
    )
    capacity: int = Key(0, "rollouts kept to be trained on again, newest first; 0: none", also=("buffer_size",), ge=0)
    ratio: float = Key(1.0, "replayed rollouts for every fresh one", gt=0)
    sampling: Literal["uniform", "recent", "positive", "prioritized"] = Key("uniform", "which of those kept")
    max_staleness: int | None = Key(
        None, "rounds after which a rollout is not replayed any more; null: never too old", ge=1
    )
    correction: Literal["token", "sequence", "none"] = Key(
        "token", "importance weights of replayed rollouts, truncated, by token or by sequence"
    )
    importance_cap: float = Key(2.0, "largest importance weight", gt=0)

    def fits(self, config: Config) -> None:
        if "window" in ADVANTAGES[config.advantage].options and self.window < config.num_generations:
            raise ValueError(
                f"replay.window={self.window} forgets rollouts of its own round: num_generations="
                f"{config.num_generations}"
            )
        if not self.capacity:
            return
        narrowed = config.rollout.top_k or config.rollout.top_p < 1 or config.rollout.min_p
        if self.correction != "none" and narrowed:
            raise ValueError(
                f"replay.correction={self.correction} needs the log-probabilities of the distribution that was drawn "
                "from; with rollout.top_k, top_p or min_p those of the full softmax are kept. Use "
                "replay.correction=none, or sample from the full softmax"
            )
        if self.correction == "token" and config.objective.kind == "gspo":
            raise ValueError(
                "objective.kind=gspo has one ratio a sequence; replay.correction=token would weigh its tokens apart. "
                "Use replay.correction=sequence"
            )


@dataclass(config=STRICT)
class UpdateConfig(Section):
    """How many optimizer steps a round makes. With one, ratio and clipping cannot act."""

    epochs: int = Key(1, "passes over the round's rollouts", also=("num_iterations", "ppo_epochs"), ge=1)
    minibatches: int = Key(
        1, "parts of the round's rollouts, one optimizer step each", also=("num_mini_batches",), ge=1
    )

    def fits(self, config: Config) -> None:
        rollouts = config.batch_size * (config.rollout.keep or config.num_generations)
        if self.minibatches > rollouts:
            raise ValueError(f"update.minibatches={self.minibatches} is more than the {rollouts} rollouts of a round")


@dataclass(config=STRICT)
class KLConfig(Section):
    """Where the KL to the initial model goes (its estimator and coefficient: objective.kl, objective.kl_coef)."""

    where: Literal["loss", "reward"] = Key("loss", "a term of the objective, or subtracted from the rollout's reward")
    target: float | None = Key(
        None, "adapt the coefficient to keep the KL here (nats a token); null: fixed", also=("target_kl",), gt=0
    )
    horizon: int = Key(10000, "rollouts over which an adaptive coefficient moves (arXiv 1909.08593)", ge=1)

    def fits(self, config: Config) -> None:
        if self.where == "reward" and not config.objective.kl_coef:
            raise ValueError("kl.where=reward needs objective.kl_coef > 0 and an estimator objective.kl")
        if self.target is not None and not config.objective.kl_coef:
            raise ValueError("kl.target adapts objective.kl_coef: start it above 0 and choose objective.kl")


@dataclass(config=STRICT)
class LoraConfig(Section):
    """Low-rank adapters instead of full fine-tuning (bandit_rft[lora])."""

    rank: int = Key(0, "rank of the adapters; 0: none, every weight is trained", also=("lora_r",), ge=0)
    alpha: float = Key(16.0, "scale of the adapters, alpha / rank", also=("lora_alpha",), gt=0)
    targets: list[str] = Key(["all-linear"], "names of the modules that get one; the head never does")
    dropout: float = Key(
        0.0, "must be 0: with dropout the sampler and the trainer would be two policies", also=("lora_dropout",)
    )

    @field_validator("dropout")
    @classmethod
    def _none(cls, value: float) -> float:
        if value:
            raise ValueError(f"must be 0: the sampler and the trainer would be two different policies; got {value:g}")
        return value


@dataclass(config=STRICT)
class DistributedConfig(Section):
    """How several processes train together (docs/scaling.md); torchrun starts them. For one process it does nothing."""

    shard: Literal["fsdp", "ddp"] = Key(
        "fsdp", "weights, gradients and optimizer state split over the processes, or all of them on each",
        may_change=True, design=False,
    )  # fmt: skip
    timeout_s: float = Key(
        3600.0,
        "seconds that processes wait for each other in one call: more than rewards, a checkpoint or a round's rollouts "
        "from servers take",
        may_change=True, design=False, gt=0,
    )  # fmt: skip


@dataclass(config=STRICT)
class RewardConfig(Section):
    """Which rewards, and what a reward may cost (bandit_rft.rewards)."""

    functions: list[str] = Key([], "replaces the task's rewards: names or module.py:function", also=("reward_funcs",))
    weights: list[float] = Key([], "one weight a function; empty: all 1", also=("reward_weights",))
    timeout_s: float = Key(30.0, "seconds after which a reward call is killed", may_change=True, gt=0)
    memory_mb: int = Key(2048, "memory a reward worker may use", may_change=True, ge=64)
    workers: int = Key(1, "worker processes", may_change=True, design=False, ge=1)
    on_error: Literal["raise", "none"] = Key("raise", "stop the run, or leave that rollout out and count it")
    length_penalty: float = Key(0.0, "subtracted from the reward of a completion of max_completion_length tokens", ge=0)
    length_penalty_from: int = Key(0, "length from which the penalty grows, linearly (DAPO's overlong buffer)", ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> RewardConfig:
        if self.weights and self.functions and len(self.weights) != len(self.functions):
            raise ValueError(
                f"reward.weights has {len(self.weights)} entries for {len(self.functions)} reward.functions"
            )
        if self.length_penalty_from and not self.length_penalty:
            raise ValueError("reward.length_penalty_from has no effect without reward.length_penalty")
        return self

    def fits(self, config: Config) -> None:
        if self.length_penalty_from >= config.max_completion_length:
            raise ValueError(
                f"reward.length_penalty_from={self.length_penalty_from} must be less than max_completion_length="
                f"{config.max_completion_length}"
            )


@dataclass(config=STRICT)
class EvaluationConfig(Section):
    """What is measured before training, every eval_steps rounds, and at the end."""

    splits: list[str] = Key([], "splits to evaluate; empty: all the task has, and the files", may_change=True)
    files: list[str] = Key([], "further splits, name=path each, read as the task reads its own files", may_change=True)
    num_samples: int = Key(
        1, "samples a question at evaluation.temperature; pass@1 needs one, pass@k needs k", may_change=True, ge=0
    )
    greedy: bool = Key(True, "also decode greedily, once a question", may_change=True)
    temperature: float = Key(1.0, "temperature of the samples", may_change=True, gt=0)
    max_queries: int | None = Key(
        None, "use only the first so many questions of each split; null: all", may_change=True, ge=1
    )

    @field_validator("files")
    @classmethod
    def _named(cls, value: list[str]) -> list[str]:
        named_files(value)
        return value
