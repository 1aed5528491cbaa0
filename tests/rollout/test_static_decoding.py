"""Decoding over a static cache in steps that can be replayed: the draws of the engine's other ways.

On a CPU the same steps run uncaptured, or through a recording that keeps the host's numbers as a CUDA graph does.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from architectures import CONFIGS
from recorded_graph import record
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, MambaConfig

from bandit_rft.model import Policy
from bandit_rft.rollout import RolloutEngine, Sampling, sequence_ids
from bandit_rft.rollout.graphs import CapturedDecoder, StopCheck, bucket
from bandit_rft.rollout.static import StaticDecoder, has_plain_cache, static_cache_serves
from bandit_rft.rollout_batch import RolloutBatch

PROMPTS = [[1, 5, 6], [1, 9], [1, 7, 8, 9, 10, 11], [1, 20, 21, 22], [1, 5, 6]]


def engines(policy: Policy, length: int, *, span: int = 8, **options: Any) -> tuple[RolloutEngine, RolloutEngine]:
    """One that decodes as on a CPU, through the model, and one over a static cache of narrow views."""
    usual = RolloutEngine(policy, max_completion_length=length)
    usual._native = None
    static = RolloutEngine(policy, max_completion_length=length, static_cache=True)
    assert static._static is not None and usual._static is None
    use(static, span=span, **options)
    return usual, static


def use(engine: RolloutEngine, *, span: int, recorded: bool = False, **options: Any) -> None:
    decoder = StaticDecoder(engine.policy.base, engine.policy.model.config, engine.padding, span=span)
    engine._static = CapturedDecoder(
        engine.policy, decoder, engine._stop, engine.max_completion_length,
        **{"capture": recorded, "check_every": 1, "lag": 0, **options},
    )  # fmt: skip
    engine._static._record = record  # type: ignore[assignment]


def draw(engine: RolloutEngine, n: int = 1, *, repeat: int = 1, seed: int = 5, **options: float) -> RolloutBatch:
    prompts = PROMPTS * repeat
    ids = sequence_ids(0, 1, list(range(len(prompts) * n)), 0)
    return engine.generate(prompts, ids, seed=seed, n=n, sampling=Sampling(**options))


def assert_same_draws(a: RolloutBatch, b: RolloutBatch) -> None:
    assert a.token_lists() == b.token_lists() and torch.equal(a.truncated, b.truncated)
    assert a.prompt_lists() == b.prompt_lists()
    torch.testing.assert_close(a.logprobs, b.logprobs, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(a.entropy, b.entropy, atol=2e-5, rtol=2e-5)


def made(name: str) -> Policy:
    torch.manual_seed(2)
    return Policy(AutoModelForCausalLM.from_config(CONFIGS[name]))


@pytest.mark.parametrize("recorded", [False, True], ids=["uncaptured", "recorded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_draws_are_the_same(name: str, recorded: bool) -> None:
    """Ragged prompts, several of each, windows crossed, the view of the cache growing, early stops and shrinking."""
    usual, static = engines(made(name), 30, recorded=recorded)
    expected = draw(usual, n=5)
    assert 0 < int(expected.truncated.sum()) < len(expected)
    assert_same_draws(draw(static, n=5), expected)
    assert_same_draws(draw(static, n=5), expected)  # the same memory again, and steps recorded before
    assert static._static is not None and static._static.capture == recorded
    assert bool(static._static._graphs) == recorded


@pytest.mark.parametrize("span", [1, 4, 7, 64])
@pytest.mark.parametrize("check_every,lag", [(1, 0), (1, 2), (4, 1), (16, 1), (100, 1)])
def test_draws_do_not_depend_on_when_the_host_looks(check_every: int, lag: int, span: int) -> None:
    usual, static = engines(Policy(tiny_llama()), 40, span=span, recorded=True, check_every=check_every, lag=lag)
    for seed in (3, 2**64 - 5):
        assert_same_draws(draw(static, repeat=5, seed=seed), draw(usual, repeat=5, seed=seed))


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8, "min_p": 0.01}], ids=str)
def test_draws_with_filters_are_the_same(options: dict[str, float]) -> None:
    usual, static = engines(Policy(tiny_llama()), 20, recorded=True)
    for _ in range(2):
        assert_same_draws(draw(static, **options), draw(usual, **options))
        assert_same_draws(draw(static), draw(usual))  # another step than the one with filters


def test_batches_of_other_sizes_share_the_memory() -> None:
    usual, static = engines(Policy(tiny_llama()), 20, recorded=True)
    captured = static._static
    assert captured is not None
    for n, repeat in ((2, 1), (1, 1), (9, 2), (1, 1), (2, 1)):  # it grows once: what was recorded before is void
        assert_same_draws(draw(static, n, repeat=repeat), draw(usual, n, repeat=repeat))
    assert captured.decoder.memory == 2
    longer = [[1, *range(3, 20), *range(3, 20)], [1, 4]]
    ids = sequence_ids(0, 2, [0, 1], 0)
    assert_same_draws(static.generate(longer, ids, seed=1), usual.generate(longer, ids, seed=1))
    assert captured.decoder.memory == 3
    assert_same_draws(draw(static), draw(usual))


def test_recorded_steps_follow_the_weights_and_the_padding_mask() -> None:
    policy = Policy(tiny_llama())
    usual, static = engines(policy, 20, recorded=True)
    for change in ("nothing", "in place", "moved", "masked", "masked otherwise"):
        with torch.no_grad():
            for parameter in policy.parameters():
                if change == "in place":  # the optimizer's way
                    parameter.mul_(1.2)
                elif change == "moved":
                    parameter.data = parameter.data * 1.1
        if change.startswith("masked"):
            policy.mask_padding_tokens([7, 8] if change == "masked" else [9, 10, 11])
        for _ in range(2):
            assert_same_draws(draw(static, 3), draw(usual, 3))


def test_an_earlier_batch_leaves_nothing_behind() -> None:
    """NaN, too: a hidden column still takes part with the weight 0, and 0 * NaN is NaN."""
    policy = Policy(tiny_llama())
    usual, static = engines(policy, 20, recorded=True)
    expected = draw(usual)
    kept = policy.base.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        policy.base.embed_tokens.weight.fill_(torch.nan)
        draw(static, 4)
        policy.base.embed_tokens.weight.copy_(kept)
    assert_same_draws(draw(static), expected)


def test_finished_sequences_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tiny_llama())
    _, static = engines(policy, 100)
    sizes: list[int] = []
    forward = policy.base.forward

    def counted(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        sizes.append(input_ids.shape[0])
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(policy.base, "forward", counted)
    rollouts = static.generate([PROMPTS[0]] * 64, sequence_ids(0, 1, list(range(64)), 0), seed=3)
    assert sizes[0] == 64 and sizes[-1] < 32
    assert all(size == bucket(size) for size in sizes)
    assert sum(sizes) < 1.7 * int(rollouts.lengths.sum())


def test_model_in_float64_and_a_completion_of_one_token() -> None:
    usual, static = engines(Policy(tiny_llama().double()), 1, recorded=True)
    assert_same_draws(draw(static, 3), draw(usual, 3))


def test_what_cannot_be_captured_is_said_once_and_runs_uncaptured(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(tiny_llama())
    usual, static = engines(policy, 12, recorded=True)
    layer = policy.base.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: (float(inputs[0].sum()), output)[1])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert_same_draws(draw(static, 2), draw(usual, 2))
    assert [record.message for record in caplog.records] == [
        "decoding steps are not captured as CUDA graphs, they run uncaptured: "
        "RuntimeError: aten.item.default waits for the device"
    ]


def test_a_step_captured_within_the_window_is_not_replayed_beyond_it() -> None:
    """Both see the same view of the cache, by other masks."""
    policy = made("mistral")  # a window of 6
    usual, static = engines(policy, 3, span=64, recorded=True)
    for prompt in ([1, 5, 6], [1, *range(3, 20)], [1, 5, 6]):
        for _ in range(2):
            ids = sequence_ids(0, 1, list(range(4)), 0)
            assert_same_draws(*(e.generate([prompt] * 4, ids, seed=1) for e in (static, usual)))


def test_only_so_many_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bandit_rft.rollout.graphs.GRAPHS", 2)
    usual, static = engines(Policy(tiny_llama()), 30, recorded=True)
    for _ in range(3):
        assert_same_draws(draw(static, 4), draw(usual, 4))
    assert static._static is not None and len(static._static._graphs) == 2


def test_models_without_columns_keep_the_usual_way() -> None:
    """Mamba's state is no cache of columns: asked for, refused by the probe."""
    torch.manual_seed(0)
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    )
    engine = RolloutEngine(Policy(mamba), max_completion_length=6, static_cache=True)
    assert engine._static is None
    assert draw(engine).token_lists() == draw(RolloutEngine(Policy(mamba), max_completion_length=6)).token_lists()


def test_longer_texts_than_the_probe_has_shown_go_the_usual_way() -> None:
    usual, static = engines(made("mistral"), 12)
    plan: Any = static._static_plan
    static._static_plan = type(plan)(plan.padding, 17)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("longer than was shown")

    static._static.decode = fail  # type: ignore[union-attr, method-assign]
    assert_same_draws(draw(static), draw(usual))  # six tokens and twelve
    with pytest.raises(AssertionError, match="longer"):
        static.generate([[1, 2]], sequence_ids(0, 1, [0], 0), seed=1)


def test_who_is_served() -> None:
    assert static_cache_serves("cuda", "ready", True)
    assert static_cache_serves("cuda", "plain", True)
    assert not static_cache_serves("cpu", "ready", True)  # nothing is launched there
    assert not static_cache_serves("cuda", None, True)
    assert not static_cache_serves("cuda", "ready", False)
    assert has_plain_cache(CONFIGS["gemma3"]) and has_plain_cache(CONFIGS["llama"])
    assert not has_plain_cache(MambaConfig(num_hidden_layers=2))
    assert RolloutEngine(Policy(tiny_llama()), max_completion_length=2)._static is None  # on a CPU


def test_buckets() -> None:
    sizes = [1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    for count in range(1, 257):
        assert bucket(count) == min(size for size in sizes if size >= count)
    assert bucket(257) == 384


def test_the_stop_check_waits_for_the_stream_that_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a second GPU, too, while the first is the current device: an event there would be over at once."""
    recorded = []

    class Event:
        def record(self, stream: object = "of the current device") -> None:
            recorded.append(stream)

    class Alive:
        device = torch.device("cuda", 1)

        def sum(self) -> torch.Tensor:
            return torch.tensor(3)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"of {device}")
    assert StopCheck(1)(Alive()) is None  # type: ignore[arg-type]
    assert recorded == ["of cuda:1"]


def test_stop_check_answers_late() -> None:
    alive = torch.ones(5, dtype=torch.bool)
    late, at_once = StopCheck(2), StopCheck(0)
    answers = []
    for i in range(5):
        assert at_once(alive) == 5 - i
        answers.append(late(alive))
        alive[i] = False
    assert answers == [None, None, 5, 4, 3]
