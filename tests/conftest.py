"""Shared fixtures. Real data are found through BANDIT_RFT_DATA (default: ../shared/data beside the repository)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import browser  # noqa: F401  (a fixture)

from bandit_rft.ops import backends  # first: in a source tree that is not installed, it finds bandit_rft.kernels

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A backend that somebody registered need not serve every dtype that the tests ask it for."""
    try:
        return (yield)
    except ValueError as error:
        own = [entry.backend.name for entry in backends.BACKENDS if entry.backend.name not in backends.BUILT_IN]
        if any(f"BANDIT_RFT_BACKEND={name} cannot serve this call" in str(error) for name in own):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets and models, or a visible skip."""
    folder = Path(os.environ.get("BANDIT_RFT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set BANDIT_RFT_DATA")
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a few thousand random weights, as a Hugging Face folder that tests read and never write."""
    from tiny_models import save_tiny_llama  # imports transformers, which `make gpu-check` does without

    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
