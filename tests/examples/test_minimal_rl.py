"""examples/minimal_rl.py: short enough to be read at once, and it does what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "examples" / "minimal_rl.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_rl", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_fits_on_a_few_screens_and_needs_no_trainer() -> None:
    text = PATH.read_text()
    assert len(text.splitlines()) <= 150
    assert "bandit_rft.trainer" not in text


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_six_rounds_teach_the_built_in_model_to_work(
    example: ModuleType, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    before, after = example.main(["--rounds", "6", "--seed", str(seed)])
    assert 0.25 < before < 0.40  # the built-in model mostly guesses
    assert after > before + 0.3
    printed = capsys.readouterr().out
    assert "round    5" in printed and "ratio to the sampler 1.0000" in printed
    assert f"test Pass@1: {before:.3f} before, {after:.3f} after" in printed


def test_its_step_follows_the_gradient_of_the_whole_rounds_loss(example: ModuleType) -> None:
    """Rollouts left out before the forward pass change nothing: compared with autograd over all logits in float64."""
    model, tokenizer = example.load(example.BUILT_IN)
    queries = example.load_task("arithmetic", seed=3).splits["train"][:24]
    rollouts = example.roll_out(model, tokenizer, queries, max_tokens=48, seed=5)
    rewards, drawn = rollouts.rewards, rollouts.drawn
    assert 0 < rewards.sum() < len(queries) and set(rewards.tolist()) == {0.0, 1.0}

    gradients: dict[str, torch.Tensor] = {}

    class Recorder(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})

    stats = example.update(model, Recorder(model.parameters(), lr=0.0), rollouts)
    assert int(stats["tokens_computed"]) == int(drawn[rewards != 0].sum())

    truth = model.double()
    logits = truth(
        input_ids=rollouts.ids,
        attention_mask=rollouts.attended,
        position_ids=example.positions_of(rollouts.attended),
    ).logits[:, -drawn.shape[1] - 1 : -1]
    chosen = rollouts.ids[:, -drawn.shape[1] :, None]
    logprobs = logits.log_softmax(-1).gather(-1, chosen)[..., 0]
    torch.testing.assert_close(rollouts.logprobs[drawn].double(), logprobs.detach()[drawn], atol=1e-4, rtol=0)
    (-(rewards[:, None] * logprobs)[drawn].sum() / drawn.sum()).backward()
    norm = torch.nn.utils.clip_grad_norm_(truth.parameters(), 1.0)
    assert norm > 0
    for name, p in truth.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(gradients[name].double(), p.grad, atol=1e-5, rtol=1e-3)


def test_a_round_that_earned_nothing_changes_nothing(example: ModuleType) -> None:
    model, tokenizer = example.load(example.BUILT_IN)
    queries = example.load_task("arithmetic").splits["train"][:4]
    rollouts = example.roll_out(model, tokenizer, queries, max_tokens=1, seed=0)
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert example.update(model, optimizer, rollouts._replace(rewards=torch.zeros(4))) == {}
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_what_is_drawn_ends_with_the_end_of_sequence(example: ModuleType) -> None:
    model, tokenizer = example.load(example.BUILT_IN)
    queries = example.load_task("arithmetic").splits["train"][:16]
    rollouts = example.roll_out(model, tokenizer, queries, max_tokens=48, seed=0)
    for ids, drawn in zip(rollouts.ids[:, -rollouts.drawn.shape[1] :], rollouts.drawn, strict=True):
        tokens = ids[drawn]
        assert (tokens[:-1] != tokenizer.eos_token_id).all()
        assert len(tokens) == 48 or tokens[-1] == tokenizer.eos_token_id
        assert (ids[~drawn] == tokenizer.pad_token_id).all()
