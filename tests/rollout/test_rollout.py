"""The embedded engine: streams that do not depend on the batch, stop tokens, and honest log-probabilities."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch
import transformers
from architectures import COMMON, CONFIGS
from packaging.version import Version
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, Olmo2Config, PreTrainedConfig

from bandit_rft import ops
from bandit_rft.config import Config
from bandit_rft.model import Policy, UnsupportedModelError
from bandit_rft.model.surroundings import plain_surroundings
from bandit_rft.rollout import RolloutEngine, Sampling, Watch, sequence_ids
from bandit_rft.rollout.engine import COMPLETION_LENGTH
from bandit_rft.rollout.native import NativeDecoder
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.update import training_inputs


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(tiny_llama())


PROMPTS = [[1, 5, 6], [1, 9], [1, 7, 8, 9, 10, 11], [1, 20, 21, 22], [1, 5, 6]]


def trainer_logprobs(policy: Policy, rollouts: RolloutBatch, temperature: float = 1.0) -> torch.Tensor:
    inputs = training_inputs(rollouts, policy.device)
    with torch.no_grad():
        hidden = policy.hidden_states(inputs.input_ids, inputs.lengths)[inputs.predicting]
        return ops.linear_logprobs(
            hidden, policy.weight, rollouts.tokens, temperature=temperature, **policy.head_options
        )


def test_first_rollout_is_the_same_whether_one_or_eight_are_drawn(policy: Policy) -> None:
    engine = RolloutEngine(policy, max_completion_length=20)
    queries = list(range(len(PROMPTS)))
    one = engine.generate(PROMPTS, sequence_ids(0, 3, queries, 0), seed=7)
    ids = sequence_ids(0, 3, [q for q in queries for _ in range(8)], list(range(8)) * len(PROMPTS))
    eight = engine.generate(PROMPTS, ids, seed=7, n=8)
    assert [eight.token_lists()[8 * q] for q in queries] == one.token_lists()
    assert len({tuple(tokens) for tokens in eight.token_lists()}) > 30  # the other streams are others
    torch.testing.assert_close(eight.split(eight.logprobs)[16], one.split(one.logprobs)[2], atol=1e-5, rtol=1e-5)


def test_an_engine_says_what_it_is(policy: Policy) -> None:
    said = repr(RolloutEngine(policy, max_completion_length=20))
    assert said == f"RolloutEngine({policy!r}, max_completion_length=20, batch_size=256)" and len(said) < 200


@pytest.mark.parametrize(("positions", "tokens"), [(64, 32), (4096, COMPLETION_LENGTH)])
def test_a_length_need_not_be_given(positions: int, tokens: int) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=positions,
    )  # fmt: skip
    engine = RolloutEngine(LlamaForCausalLM(config))
    assert engine.max_completion_length == tokens <= COMPLETION_LENGTH == Config().max_completion_length
    if positions == 64:
        assert max(engine.generate(PROMPTS, sequence_ids(range(len(PROMPTS))), seed=0).lengths) == tokens
    with pytest.raises(ValueError, match="max_completion_length and batch_size must be >= 1; got 0"):
        RolloutEngine(LlamaForCausalLM(config), max_completion_length=0)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 256])
def test_a_rollout_is_the_same_alone_and_in_a_batch(policy: Policy, batch_size: int) -> None:
    ids = sequence_ids(0, 1, list(range(len(PROMPTS))), 0)
    together = RolloutEngine(policy, max_completion_length=24).generate(PROMPTS, ids, seed=1)
    engine = RolloutEngine(policy, max_completion_length=24, batch_size=batch_size)
    split = engine.generate(PROMPTS, ids, seed=1)
    alone = [engine.generate([PROMPTS[i]], ids[i : i + 1], seed=1) for i in range(len(PROMPTS))]
    assert split.token_lists() == together.token_lists() == [rollout.token_lists()[0] for rollout in alone]
    assert split.prompt_lists() == together.prompt_lists() == PROMPTS
    assert torch.equal(split.truncated, together.truncated)
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
    if Version(transformers.__version__) < Version("5"):
        with pytest.raises(UnsupportedModelError, match="position_ids"):
            RolloutEngine(policy, max_completion_length=6)
        return
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
    assert int(rollouts.lengths.sum()) == len(rollouts.tokens) == len(rollouts.logprobs) == len(rollouts.entropy)


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
    assert sum(sizes) < 1.7 * int(rollouts.lengths.sum())


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


NATIVE = ["llama", "qwen2", "qwen3", "olmo2", "mistral"]


def native_engine(name: str, **options: int) -> RolloutEngine:
    """An engine over a tiny model that the compiled core decodes, norms and biases moved from their initial values."""
    torch.manual_seed(2)
    config = copy.deepcopy(CONFIGS[name])
    config.sliding_window = None
    policy = Policy(AutoModelForCausalLM.from_config(config))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    engine = RolloutEngine(policy, **{"max_completion_length": 20, **options})
    assert engine._native is not None
    return engine


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("name", NATIVE)
def test_native_decoding_is_the_models_own(name: str) -> None:
    engine = native_engine(name, max_completion_length=70)
    for size in (5, 45, 1):  # ragged prompts; one panel, several, and less than a SIMD vector
        prompts = (PROMPTS * 9)[:size]
        ids = sequence_ids(0, 1, list(range(size)), 0)
        native = engine.generate(prompts, ids, seed=1)
        engine._native, kept = None, engine._native
        model = engine.generate(prompts, ids, seed=1)
        engine._native = kept
        assert native.token_lists() == model.token_lists() and torch.equal(native.truncated, model.truncated)
        torch.testing.assert_close(native.logprobs, model.logprobs, atol=5e-5, rtol=0)
        torch.testing.assert_close(native.entropy, model.entropy, atol=5e-5, rtol=0)
        torch.testing.assert_close(trainer_logprobs(engine.policy, native), native.logprobs, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("name", NATIVE)
def test_native_decoding_does_not_depend_on_batch_or_threads_by_a_bit(name: str) -> None:
    engine = native_engine(name)
    native, hidden = engine._native, dict[tuple[int, int], torch.Tensor]()
    prompts = PROMPTS * 120  # enough that three threads share a step
    lengths = torch.tensor([len(p) for p in prompts])
    tokens = torch.randint(0, 97, (8, 600), generator=torch.Generator().manual_seed(1))
    everyone, some, last = torch.arange(600), torch.tensor([3, 4, 66]), torch.tensor([599])
    pair, four = torch.tensor([7, 311]), torch.arange(300, 304)
    dozen = torch.arange(70, 82)
    default = torch.get_num_threads()
    try:
        for chosen, threads in ((everyone, 1), (everyone, 3), (some, 1), (last, 2), (pair, 2), (four, 2), (dozen, 2)):
            torch.set_num_threads(threads)
            out = native.prefill([prompts[i] for i in chosen], len(chosen), 15)
            for t in range(9):
                for row, which in zip(out, chosen.tolist(), strict=True):
                    assert torch.equal(hidden.setdefault((t, which), row), row)
                out = native.step(tokens[t % 8, chosen], lengths[chosen] + t)
    finally:
        torch.set_num_threads(default)
    assert len(hidden) == 9 * 600


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("family", [Olmo2Config, LlamaConfig])
@pytest.mark.parametrize("heads", [16, 4])
def test_threads_that_share_a_models_heads_give_its_bits(family: type[PreTrainedConfig], heads: int) -> None:
    """A model that is worth more threads, and a prompt of several panels, so that two threads share one's heads.

    A norm over all heads must be of none that another thread has rotated; where each thread has as many heads, it waits
    for no other before it attends.
    """
    sizes = {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": heads, "intermediate_size": 512}
    torch.manual_seed(0)
    config = family(**{**COMMON, **sizes, "max_position_embeddings": 128})
    native = NativeDecoder(Policy(AutoModelForCausalLM.from_config(config)))
    tokens = torch.randint(0, 97, (96,)).tolist()
    default = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 2, 4):
            torch.set_num_threads(threads)
            read = native.prefill([tokens], 1, 100)
            found.append([read, native.step(torch.ones(1, dtype=torch.int64), torch.tensor([96]))])
    finally:
        torch.set_num_threads(default)
    assert all(torch.equal(*pair) for other in found for pair in zip(found[0], other, strict=True))


def test_native_decoding_computes_whole_vectors() -> None:
    """What the engine goes by when it shrinks a batch: a few sequences must not cost what a whole panel does."""
    computed = native_engine("llama")._native.computed
    costs = [computed(n) for n in range(1, 129)]
    assert all(n <= cost < n + 32 for n, cost in enumerate(costs, 1)) and costs == sorted(costs)
    assert all(computed(cost) == cost for cost in costs) and costs[0] <= 8


def test_native_decoding_goes_on_with_those_that_are_left() -> None:
    engine = native_engine("qwen3")
    native, lanes = engine._native, 16
    prompts = (PROMPTS * 40)[: 5 * lanes]
    lengths, everyone = torch.tensor([len(p) for p in prompts]), torch.arange(5 * lanes)
    tokens = torch.randint(0, 97, (6, 5 * lanes), generator=torch.Generator().manual_seed(1))
    native.prefill(prompts, 9 * lanes, 12)
    expected = [native.step(tokens[t], lengths + t) for t in range(6)]
    native.prefill(prompts, 9 * lanes, 12)
    left = everyone
    for t in range(6):
        assert torch.equal(native.step(tokens[t, left], lengths[left] + t), expected[t][left])
        if t == 2:  # and several of each, as for n rollouts of a prompt
            keep = torch.arange(len(left)).repeat_interleave(3)
        else:
            keep = torch.arange(len(left))[torch.arange(len(left)) % 4 != t % 3]
        native.select(keep)
        left = left[keep]
    assert 2 * lanes < len(left) < 5 * lanes


def test_native_decoding_follows_the_weights() -> None:
    engine = native_engine("llama")
    ids = sequence_ids(0, 1, list(range(5)), 0)
    for change in range(3):
        rollouts = engine.generate(PROMPTS, ids, seed=1)
        torch.testing.assert_close(trainer_logprobs(engine.policy, rollouts), rollouts.logprobs, atol=1e-4, rtol=0)
        with torch.no_grad():
            for parameter in engine.policy.parameters():
                if change:  # another memory
                    parameter.data = parameter.data * 1.1
                else:  # the optimizer's way: in place
                    parameter.mul_(1.1)


@pytest.mark.parametrize("count", [5, 3])  # three have caches of their own
def test_native_decoding_forgets_an_earlier_batch(count: int) -> None:
    """NaN, too: a column that a sequence does not see has the weight 0, and 0 * NaN is NaN."""
    engine = native_engine("llama")
    prompts = PROMPTS[:count]
    native, token = engine._native, torch.ones(count, dtype=torch.int64)
    lengths = torch.tensor([len(p) for p in prompts])
    expected = native.prefill(prompts, count, 12), native.step(token, lengths)
    kept = engine.policy.base.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        engine.policy.base.embed_tokens.weight.fill_(torch.nan)
        assert native.prefill([[1] * 11] * count, count, 12).isnan().all()
        engine.policy.base.embed_tokens.weight.copy_(kept)
    assert torch.equal(native.prefill(prompts, count, 12), expected[0])
    assert torch.equal(native.step(token, lengths), expected[1])


def test_changed_model_is_decoded_by_its_own_forward() -> None:
    """A hook, or another forward than the class's: what the core computes is no longer what the model computes."""
    for change in ("hook", "forward"):
        engine = native_engine("llama")
        layer = engine.policy.base.layers[0].mlp
        if change == "hook":
            layer.register_forward_hook(lambda module, inputs, output: output * 0.5)
        else:
            layer.forward = lambda x, forward=layer.forward: forward(x) * 0.5
        rollouts = engine.generate(PROMPTS, sequence_ids(0, 1, list(range(5)), 0), seed=1)
        torch.testing.assert_close(trainer_logprobs(engine.policy, rollouts), rollouts.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*sorted(set(CONFIGS) - set(NATIVE)), "bfloat16", "forced"])
def test_other_models_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[name]) if name in CONFIGS else tiny_llama()
    policy = Policy(model.to(torch.bfloat16) if name == "bfloat16" else model)
    if name == "forced":
        monkeypatch.setenv("BANDIT_RFT_BACKEND", "torch")
    with pytest.raises(NotImplementedError, match=r"is not one of|bfloat16|another backend"):
        NativeDecoder(policy)
    assert RolloutEngine(policy, max_completion_length=2)._native is None


def test_bad_input_to_the_core_is_refused() -> None:
    native, one = native_engine("llama")._native, torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="the cache is full"):
        native.prefill([[1, 2, 3]], 1, 2)
    native.prefill([[1, 2, 3]], 1, 5)
    with pytest.raises(ValueError, match="tokens must lie in the vocabulary"):
        native.step(one * 97, one * 3)
    with pytest.raises(ValueError, match="positions must lie in the table"):
        native.step(one, one * 5)
    with pytest.raises(ValueError, match="tokens must have length 1"):
        native.step(torch.ones(2, dtype=torch.int64), one)
    with pytest.raises(ValueError, match="which names a sequence that is not there"):
        native.select(torch.tensor([0, 1]))
    native.prefill([[1, 2, 3]] * 4, 4, 5)
    for which in ([1, 0], [0, 2, 2, 2], [1, 1, 1, 1]):  # not in order, or neither leaving out nor repeating
        with pytest.raises(ValueError, match="which must be ascending"):
            native.select(torch.tensor(which))
    with pytest.raises(ValueError, match="no more than there is room for"):
        native.select(torch.zeros(64, dtype=torch.int64))


def test_a_decoder_without_the_memory_it_asked_for_refuses_to_step() -> None:
    """It had the new sizes and the old memory."""
    native = native_engine("llama")._native
    one = torch.ones(1, dtype=torch.int64)
    expected = native.prefill([[1, 2, 3]], 1, 9), native.step(one, one * 3)
    with pytest.raises(MemoryError):
        native.prefill([[1, 2, 3]], 2**40, 9)  # a petabyte
    for step in (lambda: native.step(one, one * 3), lambda: native.select(one * 0)):
        with pytest.raises(ValueError, match=r"the cache is full|must have length 0|a sequence that is not there"):
            step()
    assert torch.equal(native.prefill([[1, 2, 3]], 1, 9), expected[0])
    assert torch.equal(native.step(one, one * 3), expected[1])


@pytest.mark.parametrize("static", [False, True], ids=["the core's", "static"])
def test_several_threads_draw_with_one_engine(policy: Policy, static: bool) -> None:
    """The decoders that stay hold one batch: who comes meanwhile goes without them."""
    engine = RolloutEngine(policy, max_completion_length=12, static_cache=static)
    sizes = range(1, 5)
    alone = {n: engine.generate([[5, 6] * n], sequence_ids(0, n, range(n)), seed=1, n=n).token_lists() for n in sizes}

    def draw(n: int) -> bool:
        drawn = engine.generate([[5, 6] * n], sequence_ids(0, n, range(n)), seed=1, n=n)
        return drawn.token_lists() == alone[n]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(draw, list(sizes) * 15))


def test_threads_restore_the_default_dtype() -> None:
    """It is the whole process's: the first to leave must not restore it for the others, nor the last another's."""
    inside, left = Barrier(2), Event()
    torch.set_default_dtype(torch.bfloat16)
    try:

        def first() -> None:
            with plain_surroundings():
                inside.wait()
            left.set()

        def second() -> torch.dtype:
            with plain_surroundings():
                inside.wait()
                left.wait()
                return torch.get_default_dtype()

        with ThreadPoolExecutor(2) as pool:
            pool.submit(first)
            assert pool.submit(second).result() == torch.float32
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_tokens_that_can_only_be_read_are_read() -> None:
    model = tiny_llama()
    model.model.embed_tokens = torch.nn.Embedding(50, 32)  # the head has 45 rows
    engine = RolloutEngine(Policy(model), max_completion_length=4)
    assert len(engine.generate([[3, 48]], sequence_ids(0, [0]), seed=1)) == 1
    with pytest.raises(ValueError, match="prompt 0 has the token 50; the model's are 0 to 49"):
        engine.generate([[3, 50]], sequence_ids(0, [0]), seed=1)


def test_who_is_called_by_a_watch_may_draw(policy: Policy) -> None:
    engine = RolloutEngine(policy, max_completion_length=12)
    ids, plain, other = sequence_ids(0, range(4)), list[RolloutBatch](), sequence_ids(1, range(2))

    def told(rows: list[int], tokens: list[list[int]]) -> list[bool]:
        plain.append(engine.generate([[9, 10, 11]], other, seed=2, n=2))
        return [False] * len(rows)

    watched = engine.generate([[5, 6, 7]], ids, seed=1, n=4, watch=Watch(4, told))
    assert watched.token_lists() == engine.generate([[5, 6, 7]], ids, seed=1, n=4).token_lists()
    assert plain[0].token_lists() == engine.generate([[9, 10, 11]], other, seed=2, n=2).token_lists()


def test_a_window_that_was_narrowed_is_heeded(policy: Policy) -> None:
    config = copy.copy(CONFIGS["mistral"])
    config.sliding_window = 30
    narrowed = Policy(AutoModelForCausalLM.from_config(config))
    engine = RolloutEngine(narrowed, max_completion_length=12)
    for window in (30, 4):
        narrowed.model.config.sliding_window = window
        rollouts = engine.generate(PROMPTS[:2], sequence_ids(0, range(8)), seed=1, n=4)
        torch.testing.assert_close(rollouts.logprobs, trainer_logprobs(narrowed, rollouts), atol=1e-5, rtol=0)


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
    two = sequence_ids(0, 1, [0, 1], 0)
    for prompts, ids, options, message in (
        ([[1], []], two, {}, "prompt 1 has no tokens"),
        ([[1], [3, 97]], two, {}, "prompt 1 has the token 97; the model's are 0 to 44"),
        ([[1], [-1]], two, {}, "prompt 1 has the token -1"),
        (["1+1=", [1]], two, {}, "prompts must be lists of token ids, whole numbers; prompt 0 is '1"),
        ([], two[:0], {}, "prompts must hold at least one"),
        (PROMPTS[:2], [0, 1], {}, r"ids must be int64 \[2\], a tensor .*; got \[0, 1\]"),
        ([3], two, {}, "prompts must be lists of token ids; prompt 0 is 3"),
        (PROMPTS[:1], two, {"n": True}, "n must be a whole number >= 1; got True"),
        (PROMPTS[:2], two, {"n": 0}, "n must be a whole number >= 1; got 0"),
        (PROMPTS[:2], two, {"sampling": 3}, "sampling must be a Sampling; got 3"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            engine.generate(prompts, ids, seed=0, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_completion_length"):
        RolloutEngine(policy, max_completion_length=0)


def test_the_engine_wraps_a_transformers_model() -> None:
    model = tiny_llama()
    policy = Policy(tiny_llama())
    ids = sequence_ids(0, [0, 1])
    batches = [RolloutEngine(m, max_completion_length=5).generate([[4, 5], [6]], ids, seed=3) for m in (model, policy)]
    assert batches[0].token_lists() == batches[1].token_lists()
    assert RolloutEngine(policy, max_completion_length=5).policy is policy
    for wrong, hint in (
        (torch.nn.Linear(2, 2), "got Linear"),
        ("a/b", "got str; Policy.load takes a name or a folder"),
    ):
        with pytest.raises(TypeError, match=f"model must be a Policy or a transformers model; {hint}"):
            RolloutEngine(wrong, max_completion_length=5)  # type: ignore[arg-type]
