"""The plan's arithmetic against counted bytes and parameters, and its page against the program that wrote it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_bytes import SavedBytes
from paths import SUPPORT
from tiny_models import character_tokenizer, save_tiny_llama, tiny_llama

from bandit_rft.model import Policy

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

TINY = Model("tiny", 3, 32, 64, 4, 2, 8, 64)
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


@pytest.mark.slow
def test_bytes_and_memory_of_two_ranks_that_train(tmp_path: Path) -> None:
    """Three rounds, a micro-batch each; what rank 0 counts in the second, the first that begins with a gather."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    model = save_tiny_llama(tmp_path / "model", **sizes)  # TINY: all of its tensors divide by two, so nothing is padded
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(SUPPORT / "counted_trainer.py"), str(model), str(tmp_path)]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE)
        for rank in "01"
    ]
    said = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    found: dict[str, Any] = json.loads(said[0])

    sent = sent_a_round(TINY, 2, passes=1, steps=1, mesh="fsdp", size=FLOAT)
    round_, head = found["fsdp"]["rounds"][2], TINY.embedding * 4 / 2
    assert round_["gather"] == sent["forward"] + sent["backward"] + head + sent["whole"]
    assert round_["scatter"] == sent["gradients"] + head
    assert sent["head"] == 2 * head
    assert round_["sum"] + round_["other"] < 3000, "counts, norms, rewards, rollouts"
    assert found["fsdp"]["optimizer"] == memory_of_a_rank(TINY, 2, 40, Machine(), FLOAT)["optimizer"]

    sent = sent_a_round(TINY, 2, passes=1, steps=1, mesh="ddp", size=FLOAT)
    assert 0 <= found["ddp"]["rounds"][2]["sum"] - sent["gradients"] < 500
    assert found["ddp"]["optimizer"] == TINY.parameters * FLOAT.kept


def test_a_layer_that_is_computed_again_keeps_its_input() -> None:
    tokens, policy = 40, Policy(tiny_llama(hidden_size=32, num_hidden_layers=3), character_tokenizer())
    policy.enable_gradient_checkpointing()
    with (saved := SavedBytes(tokens)):
        policy.hidden_states(torch.randint(3, 20, (tokens,)), [tokens])
    inputs = tokens * TINY.layers * TINY.hidden * 4
    assert inputs <= sum(saved.kept.values()) <= inputs + 3 * tokens * TINY.hidden * 4, "and the last norm's"
    assert inputs < memory_of_a_rank(TINY, 2, tokens, Machine(), FLOAT)["activations"]


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
