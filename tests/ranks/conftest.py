"""One process that has imported everything, and the models that its runs train."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from architectures import CONFIGS
from rank_world import World
from tiny_models import character_tokenizer, save_tiny_llama
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("ranks"))
    yield world
    os.killpg(world.process.pid, signal.SIGKILL)


def _save_biased(folder: Path) -> Path:
    """Phi, whose head has a bias that is trained."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["phi"])
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models by what their head is; V is odd, and no multiple of the ranks."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "untied": str(save_tiny_llama(folder / "untied", vocab_size=49)),
        "tied": str(save_tiny_llama(folder / "tied", vocab_size=49, tie_word_embeddings=True)),
        "biased": str(_save_biased(folder / "biased")),
    }
