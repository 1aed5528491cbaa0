"""A whole round beside the reference loop and TRL's trainers, by phase; what rollouts of reward 0 save.

The same model and as many tokens: 32 rollouts of up to 32 tokens after prompts of 16, all rewards 1. TRL refuses one
generation a prompt, so it runs at two, its minimum: with equal rewards its advantages are 0, but its work is the same.
"""

from __future__ import annotations

import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import models, record, round_profile
from comparison.decoders import THREADS
from comparison.record import OURS
from reference_loop import Loop
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from bandit_rft.config import build_config
from bandit_rft.metrics import read_metrics
from bandit_rft.tasks import Example, Task
from bandit_rft.trainer import Trainer

pytestmark = pytest.mark.timeout(900)  # the reference loop is compiled

PROMPT = " ".join(f"w{i}" for i in range(16))
EAGER, COMPILED = "reference loop, eager", "reference loop, compiled"
TURNS = 3


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-1m")
    models.make("1.1M", folder)
    return folder


def always(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def thirty_percent(completions: list[str], **columns: Any) -> list[float]:
    return [float(i % 10 in (0, 3, 6)) for i in range(len(completions))]  # 10 of 32: 22 earn nothing, 69%


def our_trainer(folder: Path, output: Path, reward: Callable[..., list[float]], rounds: int) -> Trainer:
    task = Task("words", {"train": [Example(PROMPT, {"answer": str(i)}) for i in range(64)]}, [reward])
    config = build_config(
        {
            "preset": "minimal", "model_name_or_path": str(folder), "task": "arithmetic", "output_dir": str(output),
            "max_rounds": rounds, "max_prompt_length": 64, "max_completion_length": 32, "eval_steps": 0,
            "save_steps": 0, "device": "cpu", "log_rollouts_steps": 0, "learning_rate": 1e-6,
            "evaluation.max_queries": 1, "resume": "never",
        }
    )  # fmt: skip
    return Trainer(config, task=task)


def ours(
    folder: Path, output: Path, reward: Callable[..., list[float]], rounds: int = 24, skip: int = 8
) -> list[dict[str, float]]:
    """Seconds of each phase of each round after the first `skip`.

    In a process of its own: a trainer changes what the C library does with freed memory, which is not to help others.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=(THREADS,)) as pool:
        return pool.submit(our_rounds, folder, output, reward, rounds, skip).result()


def our_rounds(
    folder: Path, output: Path, reward: Callable[..., list[float]], rounds: int, skip: int
) -> list[dict[str, float]]:
    our_trainer(folder, output, reward, rounds).run()
    lines = [line for line in read_metrics(output) if line["round"] > skip]
    return [
        {k.removeprefix("seconds/"): v for k, v in line.items() if k.startswith("seconds/") and v} for line in lines
    ]


def trl_steps(trainer_name: str, folder: Path, output: Path, steps: int = 10) -> list[dict[str, float]]:
    """Seconds of a step, and of what it does before its loss (drawing and rewards)."""
    trl = pytest.importorskip("trl", reason="pip install trl==1.16.0 to compare with it")
    from datasets import Dataset
    from transformers import TrainerCallback

    seconds: list[dict[str, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start, self.rollout = time.perf_counter(), 0.0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            whole = time.perf_counter() - self.start
            seconds.append({"rollout": self.rollout, "update": whole - self.rollout, "round": whole})

    clock = Clock()
    arguments = getattr(trl, f"{trainer_name}Config")(
        output_dir=str(output), per_device_train_batch_size=32, num_generations=2, max_completion_length=32,
        max_steps=steps, learning_rate=1e-6, beta=0.0, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        logging_steps=1000, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = getattr(trl, f"{trainer_name}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(folder), reward_funcs=always, args=arguments,
        train_dataset=Dataset.from_list([{"prompt": PROMPT}] * 64),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder), callbacks=[clock],
    )  # fmt: skip
    draw = trainer._generate_and_score_completions

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        found = draw(*args)
        clock.rollout += time.perf_counter() - start
        return found

    trainer._generate_and_score_completions = timed
    trainer.train()
    return seconds[3:]


def reference(loop: Loop, folder: Path, rounds: int = 16, skip: int = 3) -> list[dict[str, float]]:
    ids = PreTrainedTokenizerFast.from_pretrained(folder)(PROMPT).input_ids
    return [loop.round(torch.tensor([ids] * 32)) for _ in range(rounds)][skip:]


def products_alone(config: Any, rounds: int = 16, skip: int = 3) -> list[dict[str, float]]:
    """Seconds of an update's matrix products in PyTorch, forward and backward, in their own shapes."""
    shapes = models.update_products(config, 32 * 47, 32 * 32)
    operands = [(torch.randn(n, i), torch.randn(o, i), torch.randn(n, o)) for n, i, o in shapes]
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for x, weight, gradient in operands:
            for a, b in ((x, weight.T), (gradient, weight), (gradient.T, x)):
                torch.mm(a, b)
        seconds = time.perf_counter() - start
        found.append({"update": seconds, "round": seconds})
    return found[skip:]


def case_of(found: dict[str, list[dict[str, float]]], unit: str = "round") -> dict[str, Any]:
    """Sides with the seconds of a round, and the median of each phase."""
    sides = {}
    for side, rounds in found.items():
        phases = sorted({phase for one in rounds for phase in one} - {"round"})
        sides[side] = {
            "role": {OURS: "ours", record.UPDATE_PRODUCTS: "reference"}.get(side, "peer"),
            "seconds": [one[unit] for one in rounds],
            "phases": {phase: statistics.median(one.get(phase, 0.0) for one in rounds) for phase in phases},
        }  # fmt: skip
    return sides


def summary(sides: dict[str, Any]) -> str:
    middle = {side: statistics.median(found["seconds"]) for side, found in sides.items()}
    ratios = {side: record.ratio({"sides": sides}, OURS, side).median for side in sides}
    return "".join(
        f"\n    / {side:<40} {ratios[side]:6.3f}, itself {middle[side] * 1e3:.1f} ms" for side in sides if side != OURS
    )


def test_round(model_folder: Path, tmp_path: Path, benchmark: Any, keep: Callable[..., None]) -> None:
    found: dict[str, list[dict[str, float]]] = {}
    missing: dict[str, str] = {}
    config = AutoConfig.from_pretrained(model_folder)
    prompts = torch.full((32, 16), 5)
    loops = {EAGER: Loop(model_folder, 32, lambda drawn: torch.ones(len(drawn)))}
    start = time.perf_counter()
    loops[COMPILED] = Loop(model_folder, 32, lambda drawn: torch.ones(len(drawn)), compiled=True)
    loops[COMPILED].round(prompts)
    compile_seconds = time.perf_counter() - start
    for turn in range(TURNS):  # in turns, so that the machine's mood is shared
        found.setdefault(record.UPDATE_PRODUCTS, []).extend(products_alone(config))
        for side, loop in loops.items():
            found.setdefault(side, []).extend(reference(loop, model_folder))
        for trainer in ("GRPO", "RLOO"):
            side = f"TRL {trainer}Trainer step"
            try:
                found.setdefault(side, []).extend(trl_steps(trainer, model_folder, tmp_path / f"{trainer}{turn}"))
            except pytest.skip.Exception as reason:
                missing[side] = str(reason)
                found.pop(side)
        found.setdefault(OURS, []).extend(ours(model_folder, tmp_path / f"ours{turn}", always))
    benchmark.pedantic(lambda: None)
    sides = case_of(found)
    sides[COMPILED]["figures"] = {"seconds to compile": compile_seconds}
    bars = [
        {"over": OURS, "under": "TRL GRPOTrainer step", "at_most": 0.30},
        {"over": OURS, "under": COMPILED, "at_most": 0.60},
    ]
    flop = 4 * models.flop(config, 32 * 47, 32 * 32)  # once to draw, three times to learn; the last token is not read
    case = {"group": "round", "sides": sides, "bars": bars, "missing": missing, "shape": [32, 16, 32], "flop": flop}
    keep("a round of 32 x (16 + 32) tokens, 1.1M parameters", case, summary(sides))


def test_profile(
    model_folder: Path, tmp_path: Path, benchmark: Any, keep: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = our_trainer(model_folder, tmp_path / "profiled", always, 28)
    found = round_profile.by_kind(trainer, 28, 8, monkeypatch.setattr)
    benchmark.pedantic(lambda: None)
    case = {"group": "profile", "sides": {OURS: {"role": "ours", "figures": found}}}
    keep("a round by kind of work", case, "".join(f"\n    {kind:<55} {ms:6.2f} ms" for kind, ms in found.items()))
    assert all(ms > 0 for ms in found.values()), found


def test_update_with_zero_rewards(
    model_folder: Path, tmp_path: Path, benchmark: Any, keep: Callable[..., None]
) -> None:
    found: dict[str, list[dict[str, float]]] = {}
    against = "the update when none does"
    for turn in range(12):  # a process may be slower than the next from its first round to its last
        for side, reward in ((against, always), (OURS, thirty_percent)):
            found.setdefault(side, []).extend(ours(model_folder, tmp_path / f"{side}{turn}", reward, 14, 4))
    benchmark.pedantic(lambda: None)
    sides = case_of(found, "update")
    bars = [{"over": OURS, "under": against, "at_most": 0.45}]
    case = {"group": "update", "sides": sides, "bars": bars}
    keep("the update when 69% of rollouts earn 0", case, summary(sides))


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


def test_memory_of_an_update(benchmark: Any, keep: Callable[..., None]) -> None:
    """Peak above what is held before, MiB; the [tokens x V] tensor would take 196 MiB for every 1,024 tokens."""
    for tokens in (1024, 4096, 8192):
        out = subprocess.run([sys.executable, "-c", MEMORY, str(tokens)], check=True, capture_output=True, text=True)
        peak = float(out.stdout)
        sides = {OURS: {"role": "ours", "peak_mib": peak, "figures": {"logits MiB": tokens * 50257 * 4 / 2**20}}}
        name = f"memory of an update of {tokens} tokens, V = 50257"
        keep(name, {"group": "update memory", "sides": sides, "shape": [tokens, 64, 50257]}, f"\n    {peak:.0f} MiB")
    benchmark.pedantic(lambda: None)
