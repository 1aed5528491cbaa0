"""What several ranks cost: the demo on one rank with K threads and on K ranks of one thread, runs alternate.

python benchmarks/ranks.py --repeat 3
python benchmarks/ranks.py --rounds 160 --seeds 3      # and how well the whole demo learns on either
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def demo(ranks: int, threads: int, shard: str, rounds: int, seed: int, questions: int) -> list[dict[str, Any]]:
    """The lines of a demo run on so many ranks with so many threads each."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        keys = [
            "--device=cpu", f"--max_rounds={rounds}", "--eval_steps=0", f"--evaluation.max_queries={questions}",
            f"--seed={seed}", f"--output_dir={folder}", f"--distributed.shard={shard}",
        ]  # fmt: skip
        subprocess.run(
            [sys.executable, *several, "-m", "bandit_rft", "train", "--preset", "demo", "--quiet", *keys],
            env=environment, check=True, capture_output=True,
        )  # fmt: skip
        return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="K [2]")
    parser.add_argument("--rounds", type=int, default=40, help="[40]")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each, with one seed [3]")
    parser.add_argument("--seeds", type=int, default=0, help="instead, one run of each of so many seeds, evaluated")
    parser.add_argument("--shard", nargs="+", choices=("ddp", "fsdp"), default=["ddp", "fsdp"], help="[both]")
    given = parser.parse_args()
    layouts = {"one rank": (1, given.ranks, "ddp")}
    layouts |= {f"{given.ranks} ranks, {shard}": (given.ranks, 1, shard) for shard in given.shard}
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    passes: dict[str, list[float]] = {name: [] for name in layouts}
    for run in range(given.seeds or given.repeat):
        for name, (ranks, threads, shard) in layouts.items():
            seed, questions = (run, 500) if given.seeds else (0, 5)
            lines = demo(ranks, threads, shard, given.rounds, seed, questions)
            seconds[name].append(statistics.median(line["seconds/round"] for line in lines[6:]))
            passes[name].append(lines[-1]["eval/test/pass@1"])
    print(f"{os.cpu_count()} cores, {given.ranks} in use; {given.rounds} rounds of the demo, {run + 1} runs of each")
    base = seconds["one rank"]
    for name, values in seconds.items():
        ratio = statistics.median(value / one for value, one in zip(values, base, strict=True))
        print(
            f"{name:<14} {statistics.median(values):.4f} s a round ({min(values):.4f}-{max(values):.4f}), "
            f"{ratio:.2f} of one rank" + (f"; test Pass@1 {passes[name]}" if given.seeds else "")
        )


if __name__ == "__main__":
    main()
