"""The parts of a run as its configuration names them: policy, optimizer, updater, rewards."""

from __future__ import annotations

import json
import logging
import shlex
import socket
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedTokenizerBase

from bandit_rft import ops
from bandit_rft.budget import schedule_rounds
from bandit_rft.config import Config, ConfigError
from bandit_rft.data import padding_token_ids
from bandit_rft.distributed import Ranks, join_ranks
from bandit_rft.gates import LOGPROB_GAP
from bandit_rft.hopeless import Hopeless
from bandit_rft.hub import asking, check_place
from bandit_rft.launched import launched_rank
from bandit_rft.lr_schedule import LearningRate
from bandit_rft.model import Policy
from bandit_rft.model.policy import align
from bandit_rft.optimizer import PolicyOptimizer
from bandit_rft.queries import Epochs, Learnable
from bandit_rft.rewards import RewardFunction, RewardRunner
from bandit_rft.rollout import RolloutEngine, ServerEngine
from bandit_rft.rollout.client import VllmClient
from bandit_rft.rollout.process import ServerProcess, vllm_command, vllm_environment
from bandit_rft.rollout.push import FolderPush, LoraPush, NcclPush, WeightPush
from bandit_rft.tasks import Task, load_task
from bandit_rft.text import LIMIT, printable
from bandit_rft.update import PolicyUpdater

logger = logging.getLogger(__name__)


def load_policy(name_or_path: str, config: Config, *, base: str | None = None) -> Policy:
    """The policy a config names; arithmetic-base is the model that comes with the package.

    Args:
        name_or_path: a folder or a hub name.
        config: says where and in what precision.
        base: of an adapter whose own config names a folder that is not there any more.

    Raises:
        ConfigError: for a device that torch does not know or have.
        ValueError, OSError: for a model that cannot be loaded, whatever its libraries raise over it.
    """
    if config.device is not None:
        try:
            torch.empty(0, device=config.device)
        except Exception as error:
            raise ConfigError(f"device={config.device!r} cannot be used: {_first_line(error)}") from error
    name_or_path = model_place(name_or_path)
    check_place("model_name_or_path", name_or_path)
    moved = _moved_base(Path(name_or_path), model_place(base or config.model_name_or_path))
    try:
        with asking(name_or_path):
            policy = Policy.load(name_or_path, dtype=resolve_dtype(config), device=config.device, base=moved)
    except (ValueError, OSError, ImportError) as error:
        if Path(name_or_path).exists() or not isinstance(error, OSError | HFValidationError):
            raise
        raise OSError(  # on one line: a study keeps the last lines of what a run printed
            f"model_name_or_path={name_or_path!r} could not be loaded: it is no folder here, and the Hugging Face hub "
            f"did not give it ({type(error).__name__}: {printable(' '.join(str(error).split()), LIMIT)})"
        ) from error
    except Exception as error:  # a torn file of weights, a tokenizer that is none, sizes that differ, no memory
        raise ValueError(f"the model in {name_or_path} could not be loaded: {_first_line(error)}") from error
    return prepare(policy, config)


def prepare(policy: Policy, config: Config) -> Policy:
    """A policy as it is sampled from and trained: no token without a text, activations kept or not."""
    align(policy.model)
    if policy.tokenizer is not None and not policy.padding_token_ids:
        _mask_padding(policy, policy.tokenizer)
    if config.gradient_checkpointing and not policy.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    return policy


def model_place(name_or_path: str) -> str:
    """A model's folder or hub name."""
    return (
        str(Path(__file__).parent / "assets" / "arithmetic-base") if name_or_path == "arithmetic-base" else name_or_path
    )


def _moved_base(adapter: Path, base: str) -> str | None:
    """`base`, for an adapter that names a folder as its base where there is none; None: what it names will do."""
    try:
        named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    usable = Path(base).is_dir() and not (Path(base) / "adapter_config.json").is_file()
    return base if usable and isinstance(named, str) and not Path(named).is_dir() else None


def resolve_dtype(config: Config) -> Literal["float32", "bfloat16", "float64"]:
    """The dtype of the weights: what the configuration says, or what suits the device."""
    if config.dtype != "auto":
        return config.dtype
    on_gpu = torch.cuda.is_available() if config.device is None else config.device.startswith("cuda")
    return "bfloat16" if on_gpu else "float32"


def _mask_padding(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rows of the head that no token has are never drawn, and said to be."""
    padding = padding_token_ids(tokenizer, policy.vocab_size, keep=policy.stop_tokens)
    if not padding:
        return
    try:
        policy.mask_padding_tokens(padding)
    except ValueError as error:
        logger.warning("%d entries of the head have no token, and may be drawn: %s", len(padding), error)
    else:
        logger.info("%d entries of the head have no token: they are never drawn", len(padding))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0] if lines else '', LIMIT)}"


def new_policy(config: Config, given: Policy | None = None) -> Policy:
    """The policy that a new run trains: `given` or the configured one, with an adapter where the config has one."""
    policy = prepare(given, config) if given else load_policy(config.model_name_or_path, config)
    if not config.lora.rank:
        return policy
    from bandit_rft.model.lora import add_adapter

    c = config.lora
    return add_adapter(policy, rank=c.rank, alpha=c.alpha, targets=c.targets, seed=config.seed)


def configured_ranks(config: Config) -> AbstractContextManager[Ranks]:
    """The processes that train together, for as long as the block runs; a process that is alone meets nobody.

    Raises:
        ConfigError: for what several processes cannot do.
    """
    (_, world), r, patience = launched_rank(), config.rollout, config.distributed.timeout_s
    if world > 1 and r.push == "nccl":
        raise ConfigError(
            f"rollout.push=nccl is for one process; there are {world}. A folder (or lora) is pushed with any number"
        )
    longest = r.retry_s + 2 * r.request_timeout_s  # the first try ends late, and so may the last
    if world > 1 and r.engine == "vllm" and patience <= longest:
        raise ConfigError(
            f"distributed.timeout_s={patience:g} must be more than rollout.retry_s + 2 * rollout.request_timeout_s = "
            f"{longest:g}: so long may the first rank wait for a server before it gives up, and the others for the "
            "first rank"
        )
    if world > 1 and config.device not in (None, "cpu", "cuda"):
        raise ConfigError(f"device={config.device} is one of them; with {world} processes each takes its own: leave it")
    return join_ranks(
        sharded=config.distributed.shard == "fsdp", timeout_s=patience,
        gpu=torch.cuda.is_available() and config.device != "cpu",
    )  # fmt: skip


def make_optimizer(policy: Policy, config: Config, ranks: Ranks | None = None) -> PolicyOptimizer:
    """AdamW over the policy's trainable parameters."""
    return (ranks or Ranks()).optimizer(
        policy, learning_rate=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2), epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
    )  # fmt: skip


def make_learning_rate(config: Config, rounds: int) -> LearningRate:
    """The learning rate of each round, in a run of so many rounds.

    Raises:
        ConfigError: for a warm-up that leaves nothing to fall from.
    """
    course, warmup = schedule_rounds(config, rounds)
    if warmup >= course and rounds:
        message = f"warmup_rounds={warmup} leaves none of the {course} rounds at the full learning rate"
        if config.lr_scheduler_type != "constant":
            raise ConfigError(f"{message}; lower it")
        logger.warning("%s", message)  # the run may be continued with more rounds
    return LearningRate(
        config.learning_rate, config.lr_scheduler_type, rounds=max(course, warmup + 1), warmup=warmup,
        end=config.min_lr_ratio,
    )  # fmt: skip


def check_course(checkpoint: Path, saved: dict[str, int] | None, now: LearningRate) -> None:
    """Refuse to go on with another course of the learning rate than a checkpoint was made with (ConfigError).

    Args:
        checkpoint: its folder.
        saved: `LearningRate.course` as the checkpoint keeps it; None: of a version that knew a constant rate alone.
        now: of the run that is about to continue.
    """
    before = saved or {"rounds": 0, "warmup": 0}
    if before != now.course:
        raise ConfigError(
            f"{checkpoint} was made with a learning rate planned for {before['rounds'] or 'any number of'} rounds, "
            f"{before['warmup']} of warm-up; now it would be {now.course['rounds'] or 'any number'} and "
            f"{now.course['warmup']}: this would be neither run. To train on after the end of that course, give "
            f"lr_scheduler_rounds={before['rounds'] or 1}"
        )


def make_updater(
    policy: Policy, optimizer: PolicyOptimizer, reference: Policy | None, config: Config, kl_coef: float,
    ranks: Ranks | None = None,
) -> PolicyUpdater:  # fmt: skip
    """What takes the steps. The reference is for a KL in the loss; a KL in the rewards is subtracted before."""
    objective = ops.PolicyObjective(**asdict(config.objective))
    term = {"kl": "none", "kl_coef": 0.0} if reference is None else {"kl_coef": kl_coef}
    return PolicyUpdater(
        policy, optimizer, replace(objective, **term), reference=reference, temperature=config.temperature,
        tokens_per_microbatch=config.tokens_per_microbatch, epochs=config.update.epochs,
        minibatches=config.update.minibatches, seed=config.seed,
        max_logprob_gap=0.0 if takes_ratios(config) else logprob_gap_limit(policy, config), ranks=ranks,
    )  # fmt: skip


def logprob_gap_limit(policy: Policy, config: Config) -> float:
    """Nats a token by which sampler and trainer may differ; 0: any."""
    gap = config.rollout.max_logprob_gap
    return LOGPROB_GAP[policy.weight.dtype] if gap is None else gap


def takes_ratios(config: Config) -> bool:
    """Whether a round's rollouts may be another policy's, so that every update takes ratios to their sampler."""
    return bool(config.rollout.ahead) or config.rollout.on_logprob_gap == "correct"


def make_queries(config: Config) -> Epochs:
    """What chooses the queries of each round."""
    q = config.queries
    if q.order == "learnable":
        return Learnable(config.batch_size, config.seed, floor=q.floor, half_life=q.half_life)
    return Epochs(config.batch_size, config.seed)


def make_hopeless(task: Task, config: Config) -> Hopeless | None:
    """What ends rollouts that will earn nothing; None where nothing does.

    Raises:
        ConfigError: the task's reward does not tell.
    """
    if not config.rollout.stop_hopeless:
        return None
    try:
        return Hopeless(task, config.rollout.stop_hopeless)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def configured_task(config: Config) -> Task:
    """The task that a configuration names, with its further evaluation files."""
    return load_task(
        config.task, data_path=config.data_path, seed=config.seed, reward=config.reward.functions or None,
        options=config.task_options, evaluation_files=config.evaluation.files,
    )  # fmt: skip


def make_scorer(task: Task, config: Config) -> RewardRunner:
    """The worker processes that score a task's completions; forks of this one where a reward cannot be imported."""
    r = config.reward
    inherited = any(isinstance(reward, RewardFunction) and reward.function is not None for reward in task.rewards)
    return RewardRunner(
        task.rewards, r.weights or task.reward_weights, timeout_s=r.timeout_s, memory_mb=r.memory_mb, workers=r.workers,
        on_error=r.on_error, columns=task.columns, isolation="fork" if inherited else "process",
    )  # fmt: skip


def make_engine(policy: Policy, config: Config) -> RolloutEngine | ServerEngine:
    """What draws completions.

    Raises:
        ConfigError: for lengths that the model cannot decode or be packed at.
    """
    if config.rollout.engine == "embedded":
        return embedded_engine(policy, config)
    engine = _server_engine(policy, config, Path(config.output_dir))
    check_lengths(policy, engine, config)
    return engine


def embedded_engine(policy: Policy, config: Config) -> RolloutEngine:
    """The engine of this process, whatever draws a run's rollouts (ConfigError as above)."""
    engine = RolloutEngine(
        policy, max_completion_length=config.max_completion_length, batch_size=config.rollout.batch_size
    )
    check_lengths(policy, engine, config)
    return engine


def _server_engine(policy: Policy, config: Config, folder: Path) -> ServerEngine:
    r, rank = config.rollout, config.lora.rank
    root = Path(r.push_folder) if r.push_folder else folder / "weights"
    kind = ("lora" if rank else "folder") if r.push == "auto" else r.push
    push: WeightPush
    if kind == "nccl":
        if policy.device.type != "cuda":
            raise ConfigError(f"rollout.push=nccl sends from a GPU; the policy is on {policy.device}")
        push = NcclPush(policy.model, socket.gethostbyname(socket.gethostname()), r.request_timeout_s)
    elif kind == "lora":
        push = LoraPush(policy.save, root, _base_folder(config))
    else:
        push = FolderPush(policy.save, root)
    process = None
    if not r.urls:
        command = shlex.split(r.server_command) or vllm_command(
            r.server_python, dtype=resolve_dtype(config), lora_rank=rank,
            max_length=config.max_prompt_length + config.max_completion_length,
        )  # fmt: skip
        process = ServerProcess(command, vllm_environment(bool(rank)), folder / "server.log")
    clients = [VllmClient(url, r.request_timeout_s) for url in r.urls or [process.url if process else ""]]
    return ServerEngine(
        policy, clients, push, max_completion_length=config.max_completion_length, concurrency=r.max_requests,
        retry_seconds=r.retry_s, temperature=config.temperature, process=process,
    )  # fmt: skip


def _base_folder(config: Config) -> Path:
    """The model under the adapters, as a server is told it."""
    name = config.model_name_or_path
    return Path(__file__).parent / "assets" / "arithmetic-base" if name == "arithmetic-base" else Path(name)


def check_lengths(policy: Policy, engine: RolloutEngine | ServerEngine, config: Config) -> None:
    """Refuse prompts and completions that together are longer than the model is served for (ConfigError)."""
    total = config.max_prompt_length + config.max_completion_length
    lengths = f"max_prompt_length={config.max_prompt_length} + max_completion_length={config.max_completion_length}"
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and total > positions:
        raise ConfigError(f"{lengths} is more than the model's {positions} positions; lower one of them")
    served = min((n for n in (engine.max_length, policy.plan.max_length) if n is not None), default=None)
    if served is not None and total > served:
        raise ConfigError(
            f"{lengths} is more than the {served} tokens up to which {type(policy.model).__name__} is served exactly "
            "(docs/models.md); lower one of them"
        )
