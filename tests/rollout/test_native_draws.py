"""Many tokens drawn in one call of the compiled core are those that head, draw and step give one after another."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama

from bandit_rft.model import Policy
from bandit_rft.ops import backends, head
from bandit_rft.rollout import RolloutEngine, Sampling
from bandit_rft.rollout.decoding import Batch, Drawn, ModelDecoder, Source
from bandit_rft.rollout.native import AT_ONCE, NativeDecoder

PLAIN = {"bias": None, "softcap": None, "logit_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "head": {"softcap": 3.0, "logit_scale": 1.4, "temperature": 0.7, "bias": torch.linspace(-1, 1, 45)},
    "filters": {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "greedy": {"top_k": 1},
}
SEED = 2**63 + 11


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(tiny_llama())


def start(policy: Policy, size: int, steps: int) -> tuple[NativeDecoder, torch.Tensor, Batch]:
    native = NativeDecoder(policy)
    prompts = [[1, *range(3, 4 + i % 5)] for i in range(size)]
    hidden = native.prefill(prompts, size, 8 + steps)
    rows, places = torch.arange(size), torch.tensor([len(p) for p in prompts])
    return native, hidden, Batch(rows, rows * 77, torch.zeros_like(rows), places, torch.ones(size, dtype=torch.bool))


def source(policy: Policy, stop: list[int], **options: Any) -> Source:
    ends = torch.zeros(policy.vocab_size, dtype=torch.bool)
    ends[stop] = True
    return Source(policy.weight, {**PLAIN, **options}, SEED, ends, 1)


def both(policy: Policy, size: int, steps: int, of: Source) -> tuple[tuple[Drawn, Batch], tuple[Drawn, Batch]]:
    native, hidden, batch = start(policy, size, steps)
    at_once = native.draw(hidden, batch, of, steps)
    native, hidden, other = start(policy, size, steps)
    return (at_once, batch), (ModelDecoder.draw(native, hidden, other, of, steps), other)  # type: ignore[arg-type]


def equal(a: tuple[Drawn, Batch], b: tuple[Drawn, Batch]) -> None:
    for x, y in zip(a[0], b[0], strict=True):
        assert torch.equal(x, y)
    for name, x in vars(a[1]).items():
        assert torch.equal(x, vars(b[1])[name]), name


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, 40])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.usefixtures("each_instruction_set")
def test_one_call_draws_the_same_bits(policy: Policy, options: str, size: int) -> None:
    at_once, one_by_one = both(policy, size, 12, source(policy, [], **OPTIONS[options]))
    assert at_once[0].tokens.shape == (12, size) and len(at_once[0].tokens.unique()) > (1 if size == 1 else 4)
    equal(at_once, one_by_one)


def test_logits_of_some_rows_at_a_time(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = both(policy, 40, 6, source(policy, []))
    seen = head.chunks

    def small(rows: int, *rest: Any, **options: Any) -> list[slice]:
        return seen(min(rows, 7), *rest, **options)

    monkeypatch.setattr(head, "chunks", small)
    native, hidden, batch = start(policy, 40, 6)
    equal((native.draw(hidden, batch, source(policy, []), 6), batch), expected)


@pytest.mark.parametrize("size", [1, 9, 40])
def test_a_call_ends_where_a_quarter_idles(policy: Policy, size: int) -> None:
    at_once, one_by_one = both(policy, size, 30, source(policy, list(range(3, 20)), temperature=2.0))
    drawn, batch = at_once
    assert len(drawn.tokens) < 30 and not batch.alive.all()
    equal(at_once, one_by_one)


def test_a_call_draws_so_many_that_it_can_be_interrupted(policy: Policy) -> None:
    native, hidden, batch = start(policy, 2, 100)
    assert native.draw(hidden, batch, source(policy, []), 100).tokens.shape == (AT_ONCE, 2)
    assert batch.positions.tolist() == [AT_ONCE] * 2


def test_checked_mode_names_the_row(policy: Policy) -> None:
    broken = copy.deepcopy(policy)
    with torch.no_grad():
        broken.base.embed_tokens.weight[4] = torch.nan
    native, hidden, batch = start(broken, 3, 4)
    with backends.checked(), pytest.raises(ValueError, match="the logits must be finite; row 1 is nan"):
        native.draw(hidden, batch, source(broken, []), 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be"),
        ({"temperature": -1.0}, ValueError, "temperature must be"),
        ({"top_p": 1.5}, ValueError, "top_p must"),
        ({"min_p": 2.0}, ValueError, "min_p must"),
        ({"top_k": -1}, ValueError, "top_k must"),
        ({"seed": 2**64}, ValueError, "seed must fit 64 bits"),
        ({"seed": True}, TypeError, "seed must be an int"),
    ],
    ids=str,
)
def test_numbers_are_checked_as_the_operation_checks_them(
    policy: Policy, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    seed = options.pop("seed", 1)
    engine = RolloutEngine(policy, max_completion_length=3)
    assert engine._native is not None
    with pytest.raises(error, match=message):
        engine.generate([[1, 5]], torch.tensor([1]), seed=seed, sampling=Sampling(**options))


def test_a_tensor_and_a_negative_number_are_seeds(policy: Policy) -> None:
    native, hidden, batch = start(policy, 3, 4)
    expected = native.draw(hidden, batch, source(policy, [])._replace(seed=2**64 - 5), 4)
    for seed in (-5, torch.tensor(-5)):
        native, hidden, batch = start(policy, 3, 4)
        assert torch.equal(native.draw(hidden, batch, source(policy, [])._replace(seed=seed), 4)[0], expected[0])


def test_another_backend_is_asked_for_later(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, drawn = RolloutEngine(policy, max_completion_length=3), []
    monkeypatch.setattr(NativeDecoder, "draw", lambda *arguments: drawn.append(1))
    with backends.use_backend("torch"):
        engine.generate([[1, 5]], torch.tensor([1]), seed=1)
    assert not drawn


def test_a_head_that_is_not_contiguous(policy: Policy) -> None:
    expected, _ = both(policy, 3, 6, source(policy, [], bias=torch.linspace(-1, 1, 45)))
    of = source(policy, [], bias=torch.linspace(-1, 1, 45).double().repeat_interleave(2)[::2])
    native, hidden, batch = start(policy, 3, 6)
    strided = of._replace(weight=policy.weight.detach().T.contiguous().T)
    equal((native.draw(hidden, batch, strided, 6), batch), expected)


def test_a_signal_ends_a_long_call(policy: Policy) -> None:
    """Ctrl-C is heard within a fraction of a second, not after all tokens of the call."""
    script = """
import signal, time, torch
from tiny_models import tiny_llama
from bandit_rft.model import Policy
from bandit_rft.rollout import RolloutEngine
policy = Policy(tiny_llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4))
engine = RolloutEngine(policy, max_completion_length=32)
policy.stop_tokens = []
engine._stop.zero_()
prompts, ids = [[1, 5]] * 100, torch.arange(100)
assert engine._native is not None
signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
seen = []
draw = engine._native.draw
def timed(*arguments):
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    start = time.perf_counter()
    try:
        return draw(*arguments)
    finally:
        seen.append(time.perf_counter() - start)
engine._native.draw = timed
try:
    engine.generate(prompts, ids, seed=1)
except KeyboardInterrupt:
    start = time.perf_counter()
    engine._native.step(ids % 40, ids * 0 + 2)
    print("HEARD", seen[0], time.perf_counter() - start)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")},
    )  # fmt: skip
    assert done.stdout.startswith("HEARD"), done.stderr[-2000:]
    heard, step = map(float, done.stdout.split()[1:])
    assert heard < 16 * step, "the call is of 32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": (2, 32)}, "hidden must be a contiguous float32"),
        ({"weight": (45, 31)}, "weight must be a float32"),
        ({"bias": (44,)}, "bias must have length 45; got 44"),
        ({"logits": (1, 44)}, "logits must be a contiguous float32"),
        ({"logprobs": (1, 3)}, "logprobs must be a contiguous float32"),
    ],
    ids=str,
)
def test_bad_input_is_refused(policy: Policy, change: dict[str, tuple[int, ...]], message: str) -> None:
    native, hidden, batch = start(policy, 3, 4)
    shapes = {"weight": (45, 32), "bias": (45,), "logits": (2, 45), "logprobs": (4, 3), "entropy": (4, 3)}
    given = {"hidden": hidden, "tokens": torch.zeros(4, 3, dtype=torch.int64)}
    given |= {name: torch.zeros(shape) for name, shape in (shapes | change).items()}
    given |= {"sequence_ids": batch.ids, "positions": batch.positions, "places": batch.places, "going": batch.ids * 0}
    numbers = {**PLAIN, "softcap": 0.0, "seed": 1}
    tensors = {name: torch.utils.dlpack.to_dlpack(x) for name, x in given.items()}
    with pytest.raises(ValueError, match=message):
        native._core.draw(**(numbers | tensors), stops=[], threads=1)
