"""The loop that rounds are compared with runs the same model and the same method; llama.cpp gets the same weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from comparison import gguf_model, models
from reference_loop import Llama, Loop
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    assert models.make("1.1M", folder) == 1_054_080
    return folder


def test_it_is_150_lines_without_bandit_rft() -> None:
    text = (ROOT / "benchmarks" / "reference_loop.py").read_text()
    assert len(text.splitlines()) <= 150
    assert "import bandit_rft" not in text and "from bandit_rft" not in text


def test_its_model_is_transformers(folder: Path) -> None:
    theirs, mine = AutoModelForCausalLM.from_pretrained(folder), Llama(folder)
    ids = torch.randint(3, 1024, (2, 20))
    right = theirs(ids).logits
    torch.testing.assert_close(mine.head(mine(ids, None, torch.arange(20))), right, atol=1e-5, rtol=1e-4)
    shape = (2, 2, 4, 20, 16)  # through a cache, in two parts
    caches = [torch.zeros(shape) for _ in mine.layers]
    mine(ids[:, :12], caches, torch.arange(12))
    parts = [mine(ids[:, i : i + 1], caches, torch.tensor([i])) for i in range(12, 20)]
    torch.testing.assert_close(mine.head(torch.cat(parts, 1)), right[:, 12:], atol=1e-5, rtol=1e-4)


def test_a_round_raises_what_was_rewarded(folder: Path) -> None:
    torch.manual_seed(0)
    rewarded = 7
    loop = Loop(folder, 8, lambda drawn: (drawn == rewarded).any(1).float(), lr=3e-3)
    prompts = torch.randint(3, 1024, (64, 4))
    before = (loop.roll_out(prompts)[:, 4:] == rewarded).any(1).float().mean()
    seconds = [loop.round(prompts) for _ in range(25)]
    after = (loop.roll_out(prompts)[:, 4:] == rewarded).any(1).float().mean()
    assert before < 0.1 and after > 0.5
    assert all(abs(one["round"] - one["rollout"] - one["reward"] - one["update"]) < 1e-6 for one in seconds)


def test_what_comes_after_the_stop_token_is_not_learned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(folder, 4, lambda drawn: torch.ones(len(drawn)))
    drawn = torch.tensor([[5, 2, 6, 7], [5, 6, 7, 8]])
    monkeypatch.setattr(loop, "roll_out", lambda prompts: torch.cat([prompts, drawn], 1))
    seen = []
    monkeypatch.setattr(loop, "loss", lambda ids, weights, prompt: seen.append(weights) or loop.model.norm.weight.sum())
    loop.round(torch.full((2, 3), 9))
    assert torch.equal(seen[0] * 6, torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]]))


def test_llama_cpp_gets_the_same_weights(folder: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install gguf to write llama.cpp's format")
    gguf_model.write(folder, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {one.name: torch.tensor(one.data.copy()) for one in reader.tensors}
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert len(tensors) == len(weights) - 1  # the head is tied
    torch.testing.assert_close(tensors["blk.1.ffn_down.weight"], weights["model.layers.1.mlp.down_proj.weight"])
    query = weights["model.layers.0.self_attn.q_proj.weight"].view(8, 2, 8, -1)  # heads of two halves of pairs
    torch.testing.assert_close(tensors["blk.0.attn_q.weight"].view(8, 8, 2, -1), query.transpose(1, 2))
    assert reader.fields["llama.vocab_size"].contents() == 1024
