"""One process that has imported everything, and the models that its runs train."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from rank_world import World
from tiny_models import save_tiny_llama


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("ranks"))
    yield world
    os.killpg(world.process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models by what their head is; V is odd, and no multiple of the ranks."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "untied": str(save_tiny_llama(folder / "untied", vocab_size=49)),
        "tied": str(save_tiny_llama(folder / "tied", vocab_size=49, tie_word_embeddings=True)),
    }
