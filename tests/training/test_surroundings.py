"""What is set around a run (autocast, the default dtype), given to it, or chosen for its weights changes no number."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_llama, sums

from bandit_rft.config import Config, build_config
from bandit_rft.metrics import read_metrics
from bandit_rft.model import Policy
from bandit_rft.rollout import RolloutEngine, Sampling, sequence_ids
from bandit_rft.trainer import Trainer

#: The tokenizer has 45 tokens: the head's other rows are padding.
VOCABULARY, TOKENS = 64, 45


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Config]:
    model = save_tiny_llama(tmp_path / "model", vocab_size=VOCABULARY)

    def make(name: str, **overrides: Any) -> Config:
        values = {
            "preset": "minimal", "model_name_or_path": str(model), "task": "arithmetic", "batch_size": 12,
            "output_dir": str(tmp_path / name), "learning_rate": 1e-2, "max_prompt_length": 12, "max_rounds": 4,
            "max_completion_length": 12, "eval_steps": 4, "evaluation.max_queries": 4, "device": "cpu",
            "verify_steps": 1, "log_rollouts_steps": 1, **overrides,
        }  # fmt: skip
        return build_config(values)

    return make


def run(config: Config, policy: Policy | None = None) -> Path:
    trainer = Trainer(config, task=sums(), policy=policy)
    trainer.run()
    return trainer.folder


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith("seconds/")} for line in read_metrics(folder)]


def same_run(one: Path, other: Path, rounds: int = 4) -> bool:
    names = [folder / "checkpoints" / f"checkpoint-{rounds}" / "model.safetensors" for folder in (one, other)]
    return numbers(one) == numbers(other) and names[0].read_bytes() == names[1].read_bytes()


def drawn(folder: Path) -> list[int]:
    pq = pytest.importorskip("pyarrow.parquet")
    files = sorted((folder / "rollouts").glob("*.parquet"))
    return [token for file in files for row in pq.read_table(file)["token_ids"].to_pylist() for token in row]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_run_is_the_same_whatever_is_set_around_it(configure: Callable[..., Config], name: str) -> None:
    expected = run(configure("plain"))
    with SURROUNDINGS[name]():
        before = torch.is_autocast_enabled("cpu"), torch.get_default_dtype()
        found = run(configure("other"))
        assert (torch.is_autocast_enabled("cpu"), torch.get_default_dtype()) == before
    assert same_run(expected, found)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_policy_draws_the_same_whatever_is_set_around_it(name: str, model_folder: Path) -> None:
    def draw() -> Any:
        engine = RolloutEngine(Policy.load(str(model_folder), device="cpu"), max_completion_length=9)
        return engine.generate([[1, 5], [1]], sequence_ids(0, 1, [0, 1], 0), seed=2)

    expected = draw()
    with SURROUNDINGS[name]():
        found = draw()
    assert found.logprobs.dtype == torch.float32 and torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.logprobs, expected.logprobs) and torch.equal(found.entropy, expected.entropy)


def test_a_float64_model_is_trained_in_float64_and_continued_exactly(configure: Callable[..., Config]) -> None:
    whole = run(configure("whole", dtype="float64"))
    for rounds in (2, 4):
        parts = run(configure("parts", dtype="float64", max_rounds=rounds))
    assert numbers(whole)[3:] == numbers(parts)[3:]
    folders = [of / "checkpoints" / "checkpoint-4" for of in (whole, parts)]
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(folder / file) for folder in folders)
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert all(x.dtype == torch.float64 for key, x in one.items() if not key.endswith("|step"))
    assert 0 < numbers(whole)[1]["verify/gradient_error"] < 1e-12  # no product on the way was in float32


CHOICES = {
    "plain": {}, "lora": {"lora.rank": 4}, "kl": {"objective.kl": "k3", "objective.kl_coef": 0.1},
    "lora and kl": {"lora.rank": 4, "objective.kl": "k3", "objective.kl_coef": 0.1}, "filters": {"rollout.top_k": 50},
    "bfloat16": {"dtype": "bfloat16"},
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_padding_tokens_are_never_drawn_in_a_run_and_after_resuming(
    configure: Callable[..., Config], name: str
) -> None:
    choices = CHOICES[name]
    if "lora.rank" in choices:
        pytest.importorskip("peft", reason="needs the extra lora")
    whole = run(configure("whole", **choices))
    for rounds in (2, 4):
        parts = run(configure("parts", max_rounds=rounds, **choices))
    assert len(drawn(whole)) > 200 and max(drawn(whole)) < TOKENS
    assert drawn(whole) == drawn(parts)


@pytest.mark.parametrize("sampling", [Sampling.greedy(), Sampling(), Sampling(top_p=0.5), Sampling(min_p=0.9)], ids=str)
def test_padding_tokens_that_the_model_likes_best_are_not_drawn(sampling: Sampling, model_folder: Path) -> None:
    policy = Policy.load(str(model_folder), device="cpu")
    with torch.no_grad():  # one of these two has the largest logit, whatever the hidden state
        policy.weight[40:42] = torch.stack([policy.weight[:40].sum(0), -policy.weight[:40].sum(0)]) * 20
    streams = sequence_ids(0, 1, list(range(20)), 0)
    engine = RolloutEngine(policy, max_completion_length=8)
    prompts = [[1, 5 + i] for i in range(20)]
    assert set(engine.generate(prompts, streams, seed=1, sampling=sampling).tokens.tolist()) & {40, 41}
    policy.mask_padding_tokens([40, 41])
    rollouts = engine.generate(prompts, streams, seed=1, sampling=sampling)
    assert not set(rollouts.tokens.tolist()) & {40, 41} and rollouts.logprobs.isfinite().all()


def test_padding_tokens_of_a_policy_that_a_program_made(configure: Callable[..., Config], tmp_path: Path) -> None:
    """They are masked as those of a loaded one are: resuming would else go on with another policy."""

    def given() -> Policy:
        return Policy.load(str(tmp_path / "model"), device="cpu")

    whole, loaded = run(configure("whole"), given()), run(configure("loaded"))
    for rounds in (2, 4):
        parts = run(configure("parts", max_rounds=rounds), given())
    assert max(drawn(whole)) < TOKENS and drawn(whole) == drawn(parts) == drawn(loaded)
    chosen = given()
    chosen.mask_padding_tokens([7, *range(TOKENS, VOCABULARY)])
    assert 7 not in drawn(run(configure("chosen", max_rounds=1), chosen))
