"""Memory and time of one step of TRL's GRPOTrainer, before and after `bandit_rft.integrations.trl.fuse`.

    python benchmarks/trl_step.py --shape 16,256,1024,151936 --zero 0,0.5

A step is the trainer's own loss of a batch and its backward pass: no generation, no optimizer. Each side runs in a
fresh process, in turn, so that its peak is its own. Writes trl_step.json and trl_step.md to --output. On a CPU the peak
is the process's resident memory above that before the first step; on a GPU the allocator's peak likewise.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

PROMPT = 16  # tokens of each prompt


def measure(options: argparse.Namespace, fused: bool, zero: float) -> dict[str, Any]:
    """One side, in this process: seconds of each repetition, and MiB above what stood before."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from bandit_rft.integrations.trl import fuse

    sequences, length, hidden, vocabulary = options.shape
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=options.layers,
            num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=length + PROMPT, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(
            output_dir=folder, per_device_train_batch_size=sequences, num_generations=2, max_completion_length=length,
            report_to=[], use_cpu=options.device == "cpu", bf16=options.device != "cpu", gradient_checkpointing=False,
            loss_type=options.loss_type, disable_tqdm=True,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
            train_dataset=Dataset.from_list([{"prompt": "a"}]), processing_class=_tokenizer(PreTrainedTokenizerFast),
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    head = fuse(trainer) if fused else None
    inputs = _batch(sequences, length, vocabulary, zero, trainer.args.device)
    before = _memory(options.device)
    peak, seconds = _Peak(options.device), []
    with peak:
        for _ in range(options.repetitions):
            trainer.model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            trainer._compute_loss(trainer.model, inputs).backward()
            if options.device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return {
        "fused": fused, "zero": zero, "seconds": seconds, "peak_mib": (peak.bytes - before) / 2**20,
        "gradients_ready": None if head is None else head.outcome.came_true, "trl": trl.__version__,
    }  # fmt: skip


def _tokenizer(kind: Any) -> Any:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<pad>"))
    return kind(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left")


def _batch(sequences: int, length: int, vocabulary: int, zero: float, device: Any) -> dict[str, torch.Tensor]:
    """Completions of a half to the whole length; a share of them with advantage 0."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(length / 2, length, sequences).long()
    advantages = torch.randn(sequences, generator=generator)
    advantages[torch.randperm(sequences, generator=generator)[: round(zero * sequences)]] = 0
    found = {
        "prompt_ids": torch.randint(3, vocabulary, (sequences, PROMPT), generator=generator),
        "prompt_mask": torch.ones(sequences, PROMPT, dtype=torch.int64),
        "completion_ids": torch.randint(3, vocabulary, (sequences, length), generator=generator),
        "completion_mask": (torch.arange(length) < lengths[:, None]).long(),
        "advantages": advantages, "num_items_in_batch": lengths.sum(),
    }  # fmt: skip
    return {name: tensor.to(device) for name, tensor in found.items()}


def _memory(device: str) -> int:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class _Peak:
    """The most memory in use within a `with`."""

    def __init__(self, device: str) -> None:
        self.device, self.bytes, self._stop = device, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        if self.device == "cpu":
            self._thread.start()

    def __exit__(self, *unused: object) -> None:
        if self.device == "cpu":
            self._stop.set()
            self._thread.join()
        else:
            self.bytes = torch.cuda.max_memory_allocated()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, _memory("cpu"))


def markdown(results: dict[str, Any]) -> str:
    """The table: a row a share of advantages that are 0."""
    sequences, length, hidden, vocabulary = results["shape"]
    lines = [
        f"One step of TRL {results['trl']}'s GRPOTrainer (`{results['loss_type']}`), {sequences} completions of up to "
        f"{length} tokens, H = {hidden}, V = {vocabulary}, {results['layers']} layers, {results['device']} "
        f"({results['machine']}, {results['threads']} threads, torch {results['torch']}): median of "
        f"{max(1, results['repetitions'] - 1)} steps after a first, peak memory above what stood before. "
        "`python benchmarks/trl_step.py`.",
        "", "| advantages that are 0 | TRL, s | fused, s | TRL, MiB | fused, MiB |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for zero in dict.fromkeys(run["zero"] for run in results["runs"]):
        sides = {run["fused"]: run for run in results["runs"] if run["zero"] == zero}
        both = [sides[False], sides[True]]
        times = [f"{statistics.median(run['seconds'][1:] or run['seconds']):.3g}" for run in both]
        peaks = [f"{run['peak_mib']:,.0f}" for run in both]
        lines.append(f"| {zero:.0%} | " + " | ".join([*times, *peaks]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    numbers = lambda text: tuple(int(part) for part in text.split(","))  # noqa: E731
    shares = lambda text: tuple(float(part) for part in text.split(","))  # noqa: E731
    parser.add_argument("--shape", type=numbers, default=(8, 128, 512, 32000), help="completions,tokens,H,V")
    parser.add_argument("--zero", type=shares, default=(0.0, 0.5), help="shares of completions with advantage 0")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--loss_type", default="dapo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repetitions", type=int, default=4, help="steps; the first is left out of the median")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--side", choices=("trl", "fused"), help=argparse.SUPPRESS)  # a process of its own
    options = parser.parse_args()
    if options.side:
        print("RESULT" + json.dumps(measure(options, options.side == "fused", options.zero[0])))
        return
    runs = []
    for zero in options.zero:
        for side in ("trl", "fused"):
            command = [sys.executable, __file__, "--side", side, "--zero", str(zero)]
            command += ["--shape", ",".join(map(str, options.shape))]
            for name in ("layers", "loss_type", "device", "repetitions"):
                command += [f"--{name}", str(getattr(options, name))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            runs.append(json.loads(done.stdout.rpartition("RESULT")[2]))
    results = {
        "shape": options.shape, "layers": options.layers, "loss_type": options.loss_type, "device": options.device,
        "repetitions": options.repetitions, "machine": platform.machine(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "trl": runs[0]["trl"], "runs": runs,
    }  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "trl_step.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output / "trl_step.md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
