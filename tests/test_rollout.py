"""The embedded engine: streams that do not depend on the batch, stop tokens, and honest log-probabilities."""

from __future__ import annotations

import pytest
import torch
from test_policy import CONFIGS
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, MambaConfig

from bandit_rft import ops
from bandit_rft.policy import Policy
from bandit_rft.rollout import RolloutEngine, Rollouts, Sampling, sequence_ids, trace
from bandit_rft.update import pack_for_training


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(tiny_llama())


PROMPTS = [[1, 5, 6], [1, 9], [1, 7, 8, 9, 10, 11], [1, 20, 21, 22], [1, 5, 6]]


def trainer_logprobs(policy: Policy, rollouts: Rollouts, temperature: float = 1.0) -> torch.Tensor:
    pack = pack_for_training(range(len(rollouts)), rollouts, policy.device)
    with torch.no_grad():
        hidden = policy.hidden_states(pack.input_ids, pack.lengths)[pack.predicting]
        return ops.linear_logprobs(hidden, policy.weight, pack.targets, temperature=temperature, **policy.head_options)


def test_first_rollout_is_the_same_whether_one_or_eight_are_drawn(policy: Policy) -> None:
    engine = RolloutEngine(policy, max_completion_length=20)
    queries = list(range(len(PROMPTS)))
    one = engine.generate(PROMPTS, sequence_ids(0, 3, queries, 0), seed=7)
    ids = sequence_ids(0, 3, [q for q in queries for _ in range(8)], list(range(8)) * len(PROMPTS))
    eight = engine.generate(PROMPTS, ids, seed=7, n=8)
    assert [eight.token_lists()[8 * q] for q in queries] == one.token_lists()
    assert len({tuple(tokens) for tokens in eight.token_lists()}) > 30  # the other streams are others
    torch.testing.assert_close(eight.logprobs[eight.slice_of(16)], one.logprobs[one.slice_of(2)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 256])
def test_a_rollout_is_the_same_alone_and_in_a_batch(policy: Policy, batch_size: int) -> None:
    ids = sequence_ids(0, 1, list(range(len(PROMPTS))), 0)
    together = RolloutEngine(policy, max_completion_length=24).generate(PROMPTS, ids, seed=1)
    engine = RolloutEngine(policy, max_completion_length=24, batch_size=batch_size)
    split = engine.generate(PROMPTS, ids, seed=1)
    alone = [engine.generate([PROMPTS[i]], ids[i : i + 1], seed=1) for i in range(len(PROMPTS))]
    assert split.token_lists() == together.token_lists() == [rollout.token_lists()[0] for rollout in alone]
    assert split.prompts == together.prompts == PROMPTS
    assert split.truncated == together.truncated
    torch.testing.assert_close(split.logprobs, together.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([a.entropy for a in alone]), together.entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree(name: str, temperature: float) -> None:
    torch.manual_seed(2)
    policy = Policy(AutoModelForCausalLM.from_config(CONFIGS[name]))
    engine = RolloutEngine(policy, max_completion_length=12)
    ids = sequence_ids(0, 1, list(range(10)), 0)
    rollouts = engine.generate([*PROMPTS, *PROMPTS], ids, seed=5, sampling=Sampling(temperature))
    difference = (trainer_logprobs(policy, rollouts, temperature) - rollouts.logprobs).abs()
    assert float(difference.max()) < 1e-4
    if temperature != 1.0:  # the temperature is in the log-probabilities, not only in the draw
        assert float((trainer_logprobs(policy, rollouts, 1.0) - rollouts.logprobs).abs().max()) > 1e-2


def test_top_k_still_reports_the_full_softmax(policy: Policy) -> None:
    engine = RolloutEngine(policy, max_completion_length=12)
    ids = sequence_ids(0, 1, list(range(5)), 0)
    rollouts = engine.generate(PROMPTS, ids, seed=5, sampling=Sampling(top_k=3, top_p=0.8))
    torch.testing.assert_close(trainer_logprobs(policy, rollouts), rollouts.logprobs, atol=1e-4, rtol=0)


def test_models_that_cannot_be_left_padded_are_batched_by_length() -> None:
    torch.manual_seed(0)
    policy = Policy(
        AutoModelForCausalLM.from_config(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4))
    )
    engine = RolloutEngine(policy, max_completion_length=6)
    rollouts = engine.generate(PROMPTS, sequence_ids(0, 1, list(range(5)), 0), seed=5)
    torch.testing.assert_close(trainer_logprobs(policy, rollouts), rollouts.logprobs, atol=1e-4, rtol=0)


def test_stop_token_ends_a_completion_and_belongs_to_it(policy: Policy) -> None:
    engine = RolloutEngine(policy, max_completion_length=40)
    rollouts = engine.generate([PROMPTS[0]] * 64, sequence_ids(0, 1, list(range(64)), 0), seed=3)
    stopped = [tokens for tokens, cut in zip(rollouts.token_lists(), rollouts.truncated, strict=True) if not cut]
    cut = [tokens for tokens, cut in zip(rollouts.token_lists(), rollouts.truncated, strict=True) if cut]
    assert len(stopped) > 10 and cut
    assert all(tokens[-1] == 2 and 2 not in tokens[:-1] for tokens in stopped)
    assert all(len(tokens) == 40 and 2 not in tokens for tokens in cut)
    assert sum(rollouts.lengths) == len(rollouts.tokens) == len(rollouts.logprobs) == len(rollouts.entropy)


def test_several_stop_tokens() -> None:
    policy = Policy(tiny_llama())
    policy.stop_tokens = [2, 9, 30]
    rollouts = RolloutEngine(policy, max_completion_length=40).generate(
        [PROMPTS[0]] * 32, sequence_ids(0, 1, list(range(32)), 0), seed=3
    )
    ends = {t[-1] for t, cut in zip(rollouts.token_lists(), rollouts.truncated, strict=True) if not cut}
    assert ends == {2, 9, 30}


def test_finished_sequences_leave_the_batch(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = policy.base.forward

    def counted(*args, input_ids, **kwargs):  # type: ignore[no-untyped-def]
        sizes.append(input_ids.shape[0])
        return forward(*args, input_ids=input_ids, **kwargs)

    engine = RolloutEngine(policy, max_completion_length=100)
    monkeypatch.setattr(policy.base, "forward", counted)
    rollouts = engine.generate([PROMPTS[0]] * 64, sequence_ids(0, 1, list(range(64)), 0), seed=3)
    assert sizes[0] == 64 and sizes[-1] < 32
    assert len(sizes) == max(rollouts.lengths) or rollouts.truncated.count(True) > 0
    assert sum(sizes) < 1.7 * sum(rollouts.lengths)


def test_prompt_is_read_once_for_all_its_rollouts(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    forward = policy.base.forward

    def seen(*args, input_ids, **kwargs):  # type: ignore[no-untyped-def]
        shapes.append(tuple(input_ids.shape))
        return forward(*args, input_ids=input_ids, **kwargs)

    engine = RolloutEngine(policy, max_completion_length=3)
    monkeypatch.setattr(policy.base, "forward", seen)
    engine.generate(PROMPTS[:2], sequence_ids(0, 1, [0] * 4 + [1] * 4, [0, 1, 2, 3] * 2), seed=3, n=4)
    assert shapes[0] == (2, 3)


def test_greedy_takes_the_most_likely_token(policy: Policy) -> None:
    engine = RolloutEngine(policy, max_completion_length=5)
    rollouts = engine.generate(PROMPTS[:1], sequence_ids(0, 0, [0], 0), seed=3, sampling=Sampling.greedy())
    ids = torch.tensor(PROMPTS[0])
    for token in rollouts.token_lists()[0]:
        assert int(policy.model(input_ids=ids[None]).logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([token])])


def test_recorded_steps_are_bit_for_bit_the_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is replayed follows the weights, and changes neither tokens nor a bit of what is known of them."""
    monkeypatch.setattr(trace, "HOT", 10**9)
    policy = Policy(tiny_llama(max_position_embeddings=512))
    eager = RolloutEngine(policy, max_completion_length=90)
    monkeypatch.setattr(trace, "HOT", 5)
    engine = RolloutEngine(policy, max_completion_length=90)
    for number in range(3):
        ids = sequence_ids(0, number, list(range(40)), 0)
        monkeypatch.setattr(trace, "HOT", 10**9)
        expected = eager.generate(PROMPTS * 8, ids, seed=1)
        monkeypatch.setattr(trace, "HOT", 5)
        rollouts = engine.generate(PROMPTS * 8, ids, seed=1)
        assert rollouts.token_lists() == expected.token_lists()
        assert torch.equal(rollouts.logprobs, expected.logprobs) and torch.equal(rollouts.entropy, expected.entropy)
        with torch.no_grad():
            for parameter in policy.parameters():  # the optimizer's way: in place
                parameter.mul_(1.01)
    assert not eager._step._recorded
    assert len(engine._step._recorded) >= 3 and engine._step._may_record  # several row counts, both widths
    assert {shape[-1] for shape in engine._step._recorded} == {64, 128}
    for parameter in policy.parameters():  # another memory: what was recorded must not be used
        parameter.data = parameter.data * 1.5
    again = engine.generate(PROMPTS * 8, ids, seed=1)
    torch.testing.assert_close(trainer_logprobs(policy, again), again.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2", "gpt2", "cohere", "granite", "phi"])
def test_common_architectures_are_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "HOT", 2)
    torch.manual_seed(2)
    engine = RolloutEngine(Policy(AutoModelForCausalLM.from_config(CONFIGS[name])), max_completion_length=8)
    rollouts = engine.generate(PROMPTS, sequence_ids(0, 1, list(range(5)), 0), seed=5)
    assert len(engine._step._recorded) == 1
    torch.testing.assert_close(trainer_logprobs(engine.policy, rollouts), rollouts.logprobs, atol=1e-4, rtol=0)


def test_model_that_looks_at_values_is_never_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "HOT", 2)
    policy = Policy(tiny_llama())
    engine = RolloutEngine(policy, max_completion_length=8)
    forward = policy.base.forward

    def sorts(*args, **kwargs):  # type: ignore[no-untyped-def]
        output = forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + 0 * output.last_hidden_state.sort(-1).values
        return output

    monkeypatch.setattr(policy.base, "forward", sorts)
    rollouts = engine.generate(PROMPTS, sequence_ids(0, 1, list(range(5)), 0), seed=5)
    assert not engine._step._recorded and not engine._step._may_record
    torch.testing.assert_close(trainer_logprobs(policy, rollouts), rollouts.logprobs, atol=1e-4, rtol=0)


def test_seed_and_round_change_the_draw(policy: Policy) -> None:
    engine = RolloutEngine(policy, max_completion_length=16)
    draws = [
        engine.generate(PROMPTS, sequence_ids(0, number, list(range(5)), 0), seed=seed).token_lists()
        for number, seed in ((1, 0), (2, 0), (1, 1), (1, 0))
    ]
    assert draws[0] == draws[3]
    assert draws[0] != draws[1] and draws[0] != draws[2]


def test_sequence_ids_do_not_collide() -> None:
    queries, rollouts = torch.meshgrid(torch.arange(2000), torch.arange(16), indexing="ij")
    ids = torch.cat([sequence_ids(0, r, queries.flatten().numpy(), rollouts.flatten().numpy()) for r in (1, 2)])
    assert len(ids.unique()) == 64000
    assert sequence_ids(0, 1, 5, 0).tolist() != sequence_ids(0, 5, 1, 0).tolist() != sequence_ids(1, 5, 1, 0).tolist()


def test_bad_arguments(policy: Policy) -> None:
    engine = RolloutEngine(policy, max_completion_length=4)
    with pytest.raises(ValueError, match="ids must be int64"):
        engine.generate(PROMPTS, sequence_ids(0, 1, [0, 1], 0), seed=0)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        engine.generate([[1], []], sequence_ids(0, 1, [0, 1], 0), seed=0)
    with pytest.raises(ValueError, match="max_completion_length"):
        RolloutEngine(policy, max_completion_length=0)
