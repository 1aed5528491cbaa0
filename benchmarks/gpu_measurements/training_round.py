"""A whole training round of a random 0.5B-shaped Qwen2, 32 rollouts, bfloat16; and TRL's step on the same model."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .operations import Result, Setting

ROLLOUTS, PROMPT = 32, "One question of sixty-four bytes, whatever it asks of the model."
#: (words, completion tokens, Qwen2Config): Qwen2.5-0.5B's shape; and one that a CPU runs in seconds.
FULL = (151936, 128, {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2,
})  # fmt: skip
SMALL = (512, 8, {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
})  # fmt: skip


def always(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def shape_of(setting: Setting) -> tuple[int, int, dict[str, int]]:
    return SMALL if setting.small else FULL


def make_model(setting: Setting, folder: Path) -> None:
    """Random weights, and a tokenizer of bytes with names for the other tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2Tokenizer

    words, _, shape = shape_of(setting)
    tokens = ["<pad>", "</s>", *sorted(ByteLevel.alphabet())]
    tokens += [f"w{i}" for i in range(words - len(tokens))]
    Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token=None, eos_token="</s>",
        pad_token="<pad>", padding_side="left",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=words, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
        pad_token_id=0, **shape,
    )  # fmt: skip
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config)
    model.to(setting.dtype).save_pretrained(folder)


def rounds(setting: Setting, model: Path, output: Path, count: int = 6, skip: int = 2) -> list[dict[str, float]]:
    """The metrics of the rounds after the first `skip`."""
    from bandit_rft.config import build_config
    from bandit_rft.metrics import read_metrics
    from bandit_rft.tasks import Example, Task
    from bandit_rft.trainer import Trainer

    task = Task("words", {"train": [Example(PROMPT, {"answer": str(i)}) for i in range(2 * ROLLOUTS)]}, [always])
    config = build_config(
        {
            "preset": "minimal", "model_name_or_path": str(model), "task": "arithmetic", "output_dir": str(output),
            "batch_size": ROLLOUTS, "max_rounds": count, "max_prompt_length": 128,
            "max_completion_length": shape_of(setting)[1], "eval_steps": 0, "save_steps": 0,
            "device": str(setting.device), "dtype": str(setting.dtype).removeprefix("torch."), "log_rollouts_steps": 0,
            "evaluation.max_queries": 1, "resume": "never",
        }
    )  # fmt: skip
    Trainer(config, task=task).run()
    return [line for line in read_metrics(output) if line["round"] > skip]


def training_round(setting: Setting) -> Iterator[Result]:
    """Our round by phase, and over TRL's step: as many rollouts of as many tokens, but two a prompt, TRL's minimum."""
    case, shape = "a round", f"{ROLLOUTS} x {shape_of(setting)[1]} tokens"
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(setting, model)
        lines = rounds(setting, model, Path(folder) / "run")
        phases = sorted({key for line in lines for key in line if key.startswith("seconds/") and line[key]})
        yield {"round": {phase: statistics.median(line.get(phase) or 0.0 for line in lines) for phase in phases}}
        try:
            theirs = _trl_steps(setting, model, Path(folder) / "trl")
        except Exception as error:  # whatever a peer raises, its text is the result
            text = f"{type(error).__name__}: {error}"[:500]
            yield {"case": case, "shape": shape, "against": "TRL GRPOTrainer step", "missing": text}
            return
    a, b = statistics.median(line["seconds/round"] for line in lines) * 1e3, statistics.median(theirs) * 1e3
    yield {
        "case": case, "shape": shape, "against": "TRL GRPOTrainer step", "ours_ms": a, "other_ms": b, "ratio": a / b,
        "bar": None if setting.small else 0.5,
    }  # fmt: skip


def _trl_steps(setting: Setting, model: Path, output: Path, steps: int = 6, skip: int = 2) -> list[float]:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    seconds: list[float] = []
    cuda = setting.device.type == "cuda"

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.start)

    arguments = trl.GRPOConfig(
        output_dir=str(output), per_device_train_batch_size=ROLLOUTS, num_generations=2,
        max_completion_length=shape_of(setting)[1], max_steps=steps, learning_rate=1e-6, beta=0.0, report_to=[],
        use_cpu=not cuda, bf16=cuda, save_strategy="no", logging_steps=1000, gradient_checkpointing=False,
        disable_tqdm=True,
    )  # fmt: skip
    trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=setting.dtype), reward_funcs=always, args=arguments,
        train_dataset=Dataset.from_list([{"prompt": PROMPT}] * 64),
        processing_class=AutoTokenizer.from_pretrained(model), callbacks=[Clock()],
    ).train()  # fmt: skip
    return seconds[skip:]
