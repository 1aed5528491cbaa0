"""A whole round: against TRL's GRPOTrainer on the same model and tokens, and what rollouts of reward 0 save.

TRL refuses one generation a prompt, so it runs at two, its minimum; 32 rollouts of 32 tokens a step on both sides. It
is not among the project's requirements: `pip install trl==1.16.0`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RESULTS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from bandit_rft.config import build_config
from bandit_rft.metrics import read_metrics
from bandit_rft.tasks import Example, Task
from bandit_rft.trainer import Trainer

WORDS = 1024
PROMPT = " ".join(f"w{i}" for i in range(16))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 1.1M parameters with random weights, and a tokenizer of 1024 words."""
    folder = tmp_path_factory.mktemp("llama-1m")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(WORDS - 3))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def always(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def thirty_percent(completions: list[str], **columns: Any) -> list[float]:
    return [float(i % 10 in (0, 3, 6)) for i in range(len(completions))]  # 10 of 32: 22 earn nothing, 69%


def ours(
    folder: Path, output: Path, reward: Callable[..., list[float]], rounds: int = 30, skip: int = 8
) -> list[dict[str, Any]]:
    """The metrics of each round after the first `skip`."""
    task = Task("words", {"train": [Example(PROMPT, {"answer": str(i)}) for i in range(64)]}, [reward])
    config = build_config(
        {
            "preset": "minimal", "model_name_or_path": str(folder), "task": "arithmetic", "output_dir": str(output),
            "max_rounds": rounds, "max_prompt_length": 64, "max_completion_length": 32, "eval_steps": 0,
            "save_steps": 0, "device": "cpu", "log_rollouts_steps": 0, "learning_rate": 1e-6,
            "evaluation.max_queries": 1, "resume": "never",
        }
    )  # fmt: skip
    Trainer(config, task=task).run()
    return [line for line in read_metrics(output) if line["round"] > skip]


def trl_steps(folder: Path, output: Path, steps: int = 12) -> list[float]:
    trl = pytest.importorskip("trl", reason="pip install trl==1.16.0 to compare with it")
    from datasets import Dataset
    from transformers import TrainerCallback

    seconds: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    arguments = trl.GRPOConfig(
        output_dir=str(output), per_device_train_batch_size=32, num_generations=2, max_completion_length=32,
        max_steps=steps, learning_rate=1e-6, beta=0.0, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        logging_steps=1000, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder), reward_funcs=always, args=arguments,
        train_dataset=Dataset.from_list([{"prompt": PROMPT}] * 64),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder), callbacks=[Clock()],
    ).train()  # fmt: skip
    return seconds[3:]


def test_round_against_trl(model_folder: Path, tmp_path: Path, benchmark: Any) -> None:
    pytest.importorskip("trl", reason="pip install trl==1.16.0 to compare with it")
    mine: list[float] = []
    theirs: list[float] = []
    for turn in range(3):  # in turns, so that the machine's mood is shared
        mine += [line["seconds/round"] for line in ours(model_folder, tmp_path / f"ours{turn}", always)]
        theirs += trl_steps(model_folder, tmp_path / f"trl{turn}")
    benchmark.pedantic(lambda: None)
    record("a round of 32 x 32 tokens, all rewards 1 / TRL GRPOTrainer step", mine, theirs, bar=0.5)


def test_update_with_zero_rewards(model_folder: Path, tmp_path: Path, benchmark: Any) -> None:
    sparse: list[float] = []
    full: list[float] = []
    for turn in range(8):
        for seconds, reward, name in ((full, always, "full"), (sparse, thirty_percent, "sparse")):
            lines = ours(model_folder, tmp_path / f"{name}{turn}", reward, 14, 4)
            seconds += [line["seconds/update"] for line in lines]
    benchmark.pedantic(lambda: None)
    record("update when 70% of rollouts earn 0 / update when none does", sparse, full, bar=0.45)


def record(label: str, mine: list[float], baseline: list[float], bar: float) -> None:
    reference = statistics.median(baseline)
    RESULTS.append((label, statistics.median(mine) / reference, bar, reference))


MEMORY = """
import re, sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from bandit_rft import PolicyObjective, linear_policy_loss
def peak(reset=False):  # MiB; the high-water mark starts again from what is used now
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
tokens = int(sys.argv[1])
config = LlamaConfig(
    vocab_size=50257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
model = AutoModelForCausalLM.from_config(config)
def update(n):
    model.zero_grad()
    ids = torch.randint(50257, (n // 128, 128))
    hidden = model.base_model(ids).last_hidden_state.flatten(0, 1)
    cu = torch.arange(0, n + 1, 128)
    weight, advantages = model.get_output_embeddings().weight, torch.ones(n // 128)
    linear_policy_loss(hidden, weight, ids.flatten(), advantages, cu, objective=PolicyObjective()).loss.backward()
update(128)
before = peak(reset=True)
update(tokens)
print(peak() - before)
"""


def test_memory_of_an_update(benchmark: Any) -> None:
    """Peak above what is held before, MiB; the [tokens x V] tensor would take 196 MiB for every 1,024 tokens."""
    for tokens in (1024, 4096, 8192):
        out = subprocess.run([sys.executable, "-c", MEMORY, str(tokens)], check=True, capture_output=True, text=True)
        print(f"update at V = 50257, {tokens} tokens: peak {float(out.stdout):.0f} MiB above rest")
    benchmark.pedantic(lambda: None)
