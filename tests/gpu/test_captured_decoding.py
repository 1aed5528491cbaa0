"""Decoding steps captured as CUDA graphs draw what the same steps draw uncaptured."""

from __future__ import annotations

import pytest
import torch
from architectures import CONFIGS
from transformers import AutoModelForCausalLM

from bandit_rft.model import Policy
from bandit_rft.rollout import RolloutEngine, Sampling, sequence_ids
from bandit_rft.rollout.graphs import _CudaRecorder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

PROMPTS = [[1, 5, 6], [1, 9], [1, 7, 8, 9, 10, 11], [1, 20, 21, 22], [1, 5, 6]]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_captured_steps_draw_what_uncaptured_ones_draw(name: str, dtype: torch.dtype, sampling: Sampling) -> None:
    torch.manual_seed(2)
    policy = Policy(AutoModelForCausalLM.from_config(CONFIGS[name]).to("cuda", dtype))
    engine = RolloutEngine(policy, max_completion_length=50)
    captured = engine._static
    assert captured is not None and captured.capture
    ids = sequence_ids(0, 1, list(range(40)), 0)
    drawn = [engine.generate(PROMPTS, ids, seed=5, n=8, sampling=sampling) for _ in range(3)]
    assert captured.capture and captured._graphs
    captured.capture = False
    expected = engine.generate(PROMPTS, ids, seed=5, n=8, sampling=sampling)
    for rollouts in drawn:  # the first run is uncaptured for the most part, the last replayed alone
        assert rollouts.token_lists() == expected.token_lists()
        torch.testing.assert_close(rollouts.logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_steps_are_captured_anew_where_the_cache_has_moved() -> None:
    """A larger batch voids all that was captured, and with it the memory that the graphs shared."""
    torch.manual_seed(2)
    policy = Policy(AutoModelForCausalLM.from_config(CONFIGS["llama"]).to("cuda"))
    engine = RolloutEngine(policy, max_completion_length=50)
    captured = engine._static
    assert captured is not None
    for n in (2, 2, 8, 8, 8):
        engine.generate(PROMPTS, sequence_ids(0, 1, list(range(5 * n)), 0), seed=5, n=n, sampling=Sampling())
        assert captured.capture
    assert captured._graphs


def test_a_step_that_cannot_be_captured_leaves_the_device_usable() -> None:
    x = torch.ones(1000, device="cuda")
    record = _CudaRecorder(x.device)
    drawn: list[float] = []
    with pytest.raises(RuntimeError):
        record(lambda: drawn.append(float(x.sum())))  # waits for the device
    assert float((x + torch.randn(1000, device="cuda")).isfinite().sum()) == 1000
    y = torch.empty(1 << 20, device="cuda").fill_(2)
    replay = record(lambda: y.mul_(2))
    replay()
    assert float(y.sum()) == 4 * (1 << 20)
