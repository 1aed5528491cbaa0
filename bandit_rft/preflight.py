"""What `--dry_run` checks: what would make a run fail, found before a model is loaded; torch only where needed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bandit_rft.audit import disk_estimate, model_folder, shown_bytes
from bandit_rft.budget import planned_rounds
from bandit_rft.config import Config, ConfigError
from bandit_rft.hub import check_place
from bandit_rft.inputs import check_use, reward_records
from bandit_rft.rewards import RewardError, RewardRunner
from bandit_rft.tasks import HUB_SIZES, Task, load_task
from bandit_rft.tasks.checks import check_filtered

#: Distributions that only some configurations need, with the extra they come with.
EXTRAS = {"peft": "lora", "tensorboard": "tracking", "wandb": "tracking", "trackio": "tracking"}


@dataclass
class Preflight:
    """What was found.

    Attributes:
        lines: (what, whether it is well, in words); None: it could not be looked at here.
        task: loaded, where its data are here.
        sizes: rows of each split, as far as they are known.
    """

    lines: list[tuple[str, bool | None, str]] = field(default_factory=list)
    task: Task | None = None
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """What would fail."""
        return [what for what, well, _ in self.lines if well is False]


def preflight(config: Config) -> Preflight:
    """Check what a run of this configuration will need; nothing is written or downloaded."""
    found = Preflight()
    checks: list[tuple[str, Callable[[Config, Preflight], Iterator[tuple[bool | None, str]]]]] = [
        ("model", _model), ("positions", _positions), ("data", _data), ("prompts", _prompts), ("rewards", _rewards),
        ("device", _device), ("libraries", _libraries), ("run folder", _folder), ("disk", _disk),
    ]  # fmt: skip
    for what, check in checks:
        try:
            found.lines += [(what, well, text) for well, text in check(config, found)]
        except (ValueError, OSError, ImportError, RewardError, TypeError) as error:
            found.lines.append((what, False, str(error) or repr(error)))
    return found


def _model(config: Config, found: Preflight) -> Iterator[tuple[bool | None, str]]:
    check_place("model_name_or_path", config.model_name_or_path)
    folder = model_folder(config)
    if folder is None:
        yield None, f"{config.model_name_or_path} is no folder here: it will be asked of the Hugging Face hub"
    elif not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        yield False, f"{folder} has neither config.json nor adapter_config.json"
    elif not any(folder.glob("*.safetensors")):
        yield False, f"{folder} has no weights in safetensors; pickles are not read"
    else:
        yield True, str(folder)


def _positions(config: Config, found: Preflight) -> Iterator[tuple[bool | None, str]]:
    folder, total = model_folder(config), config.max_prompt_length + config.max_completion_length
    try:
        settings = json.loads(((folder or Path("none")) / "config.json").read_text())
        positions = settings.get("text_config", settings).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        positions = None
    lengths = f"max_prompt_length={config.max_prompt_length} + max_completion_length={config.max_completion_length}"
    if not isinstance(positions, int):
        yield None, f"{lengths}; the model's positions are not known here"
    elif total > positions:
        yield False, f"{lengths} is more than the model's {positions} positions; lower one of them"
    else:
        yield True, f"{lengths} of the model's {positions}"


def _data(config: Config, found: Preflight) -> Iterator[tuple[bool | None, str]]:
    key, local = config.task.replace("-", "_"), config.data_path
    if local is not None:
        check_place("data_path", local)
    if local is None and key in HUB_SIZES:
        found.sizes = dict(HUB_SIZES[key])
        yield None, f"{config.task} without data_path is loaded from the Hugging Face hub"
        return
    if local is not None and not Path(local).expanduser().exists():
        yield None, f"{local} is no file or folder here: it will be asked of the Hugging Face hub"
        return
    task = load_task(
        config.task, data_path=local, seed=config.seed, reward=config.reward.functions or None,
        options=config.task_options, evaluation_files=config.evaluation.files,
    )  # fmt: skip
    found.sizes = {name: len(examples) for name, examples in task.splits.items()}
    shown = ", ".join(f"{size:,} of {name}" for name, size in found.sizes.items())
    check_use(task, config.evaluation.splits, config.batch_size)
    found.task = task
    yield True, f"rows: {shown}"


def _prompts(config: Config, found: Preflight) -> Iterator[tuple[bool | None, str]]:
    folder = model_folder(config)
    if found.task is None or folder is None or not (folder / "tokenizer.json").is_file():
        yield None, "not counted: that takes the data and the model's tokenizer.json here"
        return
    for name in dict.fromkeys(("train", *(config.evaluation.splits or found.task.splits))):
        examples = found.task.splits[name]
        messages = not all(isinstance(example.prompt, str) for example in examples)
        if messages or config.chat_template_kwargs or (config.chat_template == "auto" and _has_chat_template(folder)):
            from transformers import AutoTokenizer

            from bandit_rft.data import PromptSet

            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            kept = PromptSet(
                name, examples, tokenizer,
                chat_template=config.chat_template,
                chat_template_kwargs=config.chat_template_kwargs, max_prompt_length=config.max_prompt_length,
            )  # fmt: skip
            longest, filtered, how = max(kept.lengths), kept.filtered, "with the chat template"
        else:  # by the tokenizer's own library, which loads in no time
            from tokenizers import Tokenizer

            encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(
                [str(e.prompt) for e in examples]
            )
            lengths = [len(encoding.ids) for encoding in encoded]
            filtered = check_filtered(name, config.max_prompt_length, lengths)
            longest, how = max(lengths), "without a chat template"
        yield True, f"{name}: up to {longest} tokens, {how}; {filtered:,} of {len(examples):,} left out"


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _rewards(config: Config, found: Preflight) -> Iterator[tuple[bool | None, str]]:
    task, r = found.task, config.reward
    if task is None and not r.functions:
        yield None, "not loaded: the data are not here, and none are named"
        return
    rewards, weights = (r.functions, None) if task is None else (task.rewards, task.reward_weights)
    columns = None if task is None else task.columns
    with RewardRunner(
        rewards, r.weights or weights, timeout_s=r.timeout_s, memory_mb=r.memory_mb, columns=columns
    ) as runner:
        shown = "columns that cannot be compared: the data are not here"
        if columns is not None:
            shown = f"the columns {', '.join(columns) or 'none'}"
        yield True, f"{', '.join(runner.names)}, with {shown}"


def _device(config: Config, found: Preflight) -> Iterator[tuple[bool | None, str]]:
    if config.device in (None, "cpu"):
        yield True, config.device or "cuda where there is one, else cpu"
        return
    import torch

    try:
        torch.empty(0, device=config.device)
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise ConfigError(f"device={config.device!r} cannot be used: {lines[0] if lines else error!r}") from error
    yield True, str(config.device)


def _libraries(config: Config, found: Preflight) -> Iterator[tuple[bool | None, str]]:
    needed = ["transformers", "safetensors", "pyarrow", *["peft"] * (config.lora.rank > 0), *config.report_to]
    for name in needed:
        if importlib.util.find_spec(name) is None:
            yield False, f"{name} is not installed: pip install 'bandit_rft[{EXTRAS.get(name, 'train')}]'"
    if all(importlib.util.find_spec(name) for name in needed):
        yield True, ", ".join(needed)


def _folder(config: Config, found: Preflight) -> Iterator[tuple[bool | None, str]]:
    folder = Path(config.output_dir)
    place = _nearest(folder)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(f"output_dir={folder} cannot be written: {place} is no folder that may be written to")
    if config.resume in ("auto", "never") and not (folder / "checkpoints").exists():
        yield True, f"{folder}, a new run" + (", in a folder that exists" if folder.exists() else "")
        return
    from bandit_rft.assemble import resolve_dtype
    from bandit_rft.run_folder import RunFolder

    settings = asdict(replace(config, dtype=resolve_dtype(config)))
    rewards = reward_records(found.task, config, in_python=False) if found.task else ()
    checkpoint = RunFolder(folder).find_checkpoint(config.resume, settings, rewards)
    if checkpoint is None:
        yield True, f"{folder}, a new run"
    else:
        yield True, f"{folder}, to be continued from {checkpoint[0]}"


def _disk(config: Config, found: Preflight) -> Iterator[tuple[bool | None, str]]:
    free = shutil.disk_usage(_nearest(Path(config.output_dir))).free
    rounds = planned_rounds(config, found.sizes.get("train"))
    estimate = disk_estimate(config, rounds, found.sizes.values())
    if estimate is None:
        yield None, f"{shown_bytes(free)} free; what checkpoints take is not known here"
        return
    checkpoint, count, logs = estimate
    needed = checkpoint * count + logs
    text = (
        f"about {shown_bytes(needed)} ({count} checkpoint(s) of {shown_bytes(checkpoint)}, rollouts and evaluations "
        f"up to {shown_bytes(logs)}); {shown_bytes(free)} free"
    )
    yield needed <= free, text + ("" if needed <= free else ": lower save_total_limit, or log_rollouts_steps=0")


def _nearest(folder: Path) -> Path:
    """The folder itself, or what is there above it."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
