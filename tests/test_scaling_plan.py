"""The plan's arithmetic against counted bytes and parameters, and its page against the program that wrote it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import SUPPORT

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from scaling_plan import (  # noqa: E402
    LLAMA_70B,
    PAGE,
    QWEN_7B,
    Bytes,
    Machine,
    Mesh,
    Model,
    Round,
    draw_seconds,
    memory_of_a_rank,
    sent_a_round,
    train_seconds,
    with_section,
)  # fmt: skip

TINY = Model("tiny", 3, 32, 64, 4, 2, 8, 64)  # that of counted_rank.py
FLOAT = Bytes(computed=4, summed=4, kept=16)


def test_the_page_has_the_tables() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_section(text) == text, "run tools/scaling_plan.py --write"
    assert "**Everything in this section is predicted" in text


@pytest.mark.parametrize(("model", "kind"), [(QWEN_7B, "Qwen2"), (LLAMA_70B, "Llama")])
def test_the_models_have_as_many_parameters_as_transformers_makes(model: Model, kind: str) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        num_hidden_layers=2, hidden_size=model.hidden, intermediate_size=model.intermediate,
        vocab_size=model.vocabulary, num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, 
        tie_word_embeddings=model.tied,
    )  # fmt: skip
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config)
    whole = made.num_parameters() + (model.layers - 2) * sum(p.numel() for p in made.model.layers[0].parameters())
    assert model.parameters == whole
    assert model.kv == 2 * model.layers * made.model.layers[0].self_attn.k_proj.out_features


def count(mesh: str, passes: int, tokens: int) -> dict[str, int]:
    """What rank 0 of two counted."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(SUPPORT / "counted_rank.py"), mesh, str(passes), str(tokens)]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    found: dict[str, int] = json.loads(said[0])
    return found


@pytest.mark.slow
def test_bytes_and_memory_are_those_of_two_ranks() -> None:
    """FSDP with three micro-batches of 40 tokens: every tensor divides by two, so nothing is padded."""
    found, sent = count("fsdp", 3, 40), sent_a_round(TINY, 2, passes=3, steps=1, mesh="fsdp", size=FLOAT)
    head = TINY.embedding * 4 / 2
    assert found["gather"] == sent["forward"] + sent["backward"] + head + sent["whole"]
    assert found["scatter"] == sent["gradients"] + head
    assert not set(found) - {"gather", "scatter", "other", "kept", "saved"}
    memory = memory_of_a_rank(TINY, 2, 40, Machine(), FLOAT)
    assert found["kept"] * FLOAT.kept == memory["optimizer"]
    inputs = 40 * TINY.layers * TINY.hidden * 4
    assert inputs <= found["saved"] <= inputs + 3 * 40 * TINY.hidden * 4, "of a layer its input, and the last norm's"
    assert found["saved"] < memory["activations"]


@pytest.mark.slow
def test_bytes_of_data_parallel_ranks() -> None:
    found = count("ddp", 2, 40)
    assert found["sum"] == sent_a_round(TINY, 2, passes=2, steps=1, mesh="ddp", size=FLOAT)["gradients"]
    assert found["kept"] == TINY.parameters


def test_the_simulator_keeps_to_its_bounds() -> None:
    """Training is never faster than its computation, nor than its sending; more bandwidth never hurts."""
    work, free = Round(rollouts=512), Machine(nvlink=float("inf"), network=float("inf"), hop=0.0)
    for model, mesh in (
        (QWEN_7B, Mesh("fsdp", 16, 1)),
        (QWEN_7B, Mesh("hsdp", 8, 2)),
        (LLAMA_70B, Mesh("fsdp", 64, 1)),
    ):
        tokens = work.tokens / mesh.ranks
        least = 8 * (model.layers * model.layer) * tokens / Machine().flops
        passes = -(-work.tokens // (work.microbatch * mesh.ranks))
        sent = sent_a_round(model, mesh.shards, passes, 1, "fsdp")
        rate = Machine().nvlink if mesh.shards <= 8 else Machine().network
        sending = (
            (sent["forward"] + sent["backward"] + sent["gradients"]) / rate * model.layers * model.layer / model.base
        )
        alone, real = train_seconds(model, mesh, work, free), train_seconds(model, mesh, work, Machine())
        assert least < alone < 1.5 * least
        assert max(alone, sending) <= real <= alone + 1.3 * sending


def test_drawing_takes_at_least_the_longest_completion() -> None:
    few, many = (draw_seconds(QWEN_7B, gpus, Round(), Machine()) for gpus in (1, 256))
    assert few[0] > many[0] > Round().longest * 2 * QWEN_7B.parameters / Machine().reading
    assert draw_seconds(LLAMA_70B, 1, Round(), Machine())[0] == float("inf")
    assert draw_seconds(LLAMA_70B, 8, Round(), Machine())[1] in (4, 8), "GPUs a replica"
