"""The compiled core's kernels, called one after another on one thread: the program that valgrind counts.

    python benchmarks/comparison/counted_kernels.py CORE.so INSTRUCTION_SET     (benchmarks/instructions.py starts it)

It imports numpy and the core alone; torch would take valgrind a minute. Before and after each kernel it calls
os.getsid, which does nothing but is a function that valgrind can be told to begin a new count at. What is counted is
printed: a line a kernel, with its tokens.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from typing import Any

import numpy as np

V, ROWS, HIDDEN = 4096, 8, 128
HEADS, KV_HEADS, SIZE, LAYERS, INTERMEDIATE, WORDS = 8, 4, 16, 5, 352, 1024  # the 1.1M-parameter model of test_round.py
SEQUENCES, PROMPT, NEW = 16, 16, 16
Kernel = tuple[str, int, Callable[[], Any]]  # name, tokens, call
random = np.random.default_rng(0)


def load(path: str) -> Any:
    loader = ExtensionFileLoader("_C", path)
    spec = spec_from_loader("_C", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (random.standard_normal(shape) * scale).astype(np.float32)


def dl(array: np.ndarray) -> Any:
    return array.__dlpack__()


def floats(count: int) -> Any:
    return dl(np.empty(count, np.float32))


def row_kernels(core: Any, logits: np.ndarray, tag: str = "") -> Iterator[Kernel]:
    rows, words = logits.shape
    targets, advantages, ones = random.integers(words, size=rows), normal(rows), np.ones(rows, np.float32)
    work, positions = logits.copy(), np.zeros(rows, np.int64)

    def shared(z: np.ndarray) -> list[Any]:
        return [dl(z), dl(targets), 1.0, None, 0.0, 1.0]

    def policy(entropy: float) -> Any:
        inputs = [dl(advantages), dl(ones), None, None, floats(rows), floats(rows), 1]
        return core.policy_rows(*shared(work), 1, 0.8, 1.2, 0.0, 0, 0.0, entropy, *inputs)

    def sample(top_k: int, top_p: float) -> Any:
        stream = [1, dl(np.arange(rows)), dl(positions), top_k, top_p, 0.0]
        out = [dl(np.empty(rows, np.int64)), *(floats(rows) for _ in range(4)), 1]
        return core.sample_rows(dl(logits), 1.0, None, 0.0, 1.0, *stream, *out)

    yield f"logprob_rows{tag}", rows, lambda: core.logprob_rows(*shared(logits), floats(rows), floats(rows), 1)
    yield f"policy_rows{tag}", rows, lambda: policy(0.0)
    yield f"sample_rows{tag}", rows, lambda: sample(0, 1.0)
    if not tag:
        np.copyto(work, logits)
        yield "policy_rows, entropy bonus", rows, lambda: policy(0.01)
        yield "sample_rows, top_p 0.9", rows, lambda: sample(0, 0.9)
        yield "sample_rows, top_k 50", rows, lambda: sample(50, 1.0)
        gradients = [dl(advantages), None, floats(rows), floats(rows), 1]
        yield "gradient_rows", rows, lambda: core.gradient_rows(*shared(work), *gradients)


def head_kernels(core: Any) -> Iterator[Kernel]:
    weight = normal(V, HIDDEN, scale=0.05)
    for rows in (1, 8, 32):
        hidden, out = normal(rows, HIDDEN), np.empty((rows, V), np.float32)
        yield (
            f"head_logits, {rows} rows", rows,
            lambda h=hidden, z=out: core.head_logits(dl(h), dl(weight), None, dl(z), 1),
        )  # fmt: skip


def product_kernels(core: Any) -> Iterator[Kernel]:
    rows = 64
    hidden, weight, dz = normal(rows, HIDDEN), normal(V, HIDDEN, scale=0.05), normal(rows, V)
    z, to_hidden, to_weight = np.empty_like(dz), np.empty_like(hidden), np.empty_like(weight)
    yield "logits_product", rows, lambda: core.logits_product(dl(hidden), dl(weight), dl(z), 1)
    yield (
        "hidden_gradient_product",
        rows,
        lambda: core.hidden_gradient_product(dl(dz), dl(weight), dl(to_hidden), False, 1),
    )
    yield (
        "weight_gradient_product", rows,
        lambda: core.weight_gradient_product(dl(dz), dl(hidden), dl(to_weight), True, 1),
    )  # fmt: skip


def attention_kernels(core: Any, sequences: int, length: int) -> Iterator[Kernel]:
    tokens = sequences * length
    q, k, v = (normal(tokens, heads * SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    bounds, out, lse = np.arange(sequences + 1) * length, np.empty_like(q), np.empty((tokens, HEADS), np.float32)
    angles = np.tile(normal(tokens, SIZE // 2), 2)
    cos, sin = np.cos(angles), np.sin(angles)
    gradients = [np.empty_like(x) for x in (q, k, v)]

    def inputs() -> list[Any]:
        return [*map(dl, (q, k, v, bounds)), SIZE, SIZE**-0.5, dl(cos), dl(sin), dl(out), dl(lse)]

    yield "attention_forward", tokens, lambda: core.attention_forward(*inputs(), 1)
    yield "attention_backward", tokens, lambda: core.attention_backward(*inputs(), dl(q), *map(dl, gradients), 1)


def layer_kernels(core: Any, tokens: int) -> Iterator[Kernel]:
    x, dy, weight, out = normal(tokens, HIDDEN), normal(tokens, HIDDEN), normal(HIDDEN), np.empty(HIDDEN, np.float32)
    y = np.empty_like(x)
    gate, up, grad = (normal(tokens, INTERMEDIATE) for _ in range(3))
    results = [np.empty_like(gate) for _ in range(3)]
    yield "norm_forward", tokens, lambda: core.norm_forward(dl(x), dl(weight), 1e-6, dl(y), 1)
    yield (
        "norm_backward", tokens,
        lambda: core.norm_backward(dl(x), dl(weight), 1e-6, dl(dy), dl(dy), dl(y), dl(out), 1),
    )  # fmt: skip
    yield "gated_silu_forward", tokens, lambda: core.gated_silu_forward(dl(gate), dl(up), dl(results[0]), 1)
    yield (
        "gated_silu_backward", tokens,
        lambda: core.gated_silu_backward(*map(dl, (gate, up, grad, *results)), 1),
    )  # fmt: skip


def layer_products(core: Any, tokens: int) -> Callable[[], None]:
    """The products of a layer, forward and backward."""
    q, kv = HEADS * SIZE, KV_HEADS * SIZE
    shapes = [
        (q, HIDDEN),
        (kv, HIDDEN),
        (kv, HIDDEN),
        (HIDDEN, q),
        *2 * [(INTERMEDIATE, HIDDEN)],
        (HIDDEN, INTERMEDIATE),
    ]
    operands = [(normal(tokens, i), normal(o, i), normal(tokens, o)) for o, i in shapes]

    def multiply() -> None:
        for x, weight, z in operands:
            to_x, to_weight = np.empty_like(x), np.empty_like(weight)
            core.hidden_gradient_product(dl(z), dl(weight), dl(to_x), False, 1)
            core.weight_gradient_product(dl(z), dl(x), dl(to_weight), False, 1)
            core.logits_product(dl(x), dl(weight), dl(z), 1)

    return multiply


class Model:
    """A Llama-shaped decoder with random weights, drawing as the engine does."""

    def __init__(self, core: Any) -> None:
        self.core = core
        h, q, kv = HIDDEN, HEADS * SIZE, KV_HEADS * SIZE
        shapes = {
            "q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q), "gate_proj": (INTERMEDIATE, h),
            "up_proj": (INTERMEDIATE, h), "down_proj": (h, INTERMEDIATE),
        }  # fmt: skip
        self.ones = ones = np.ones(h, np.float32)  # the core keeps addresses, not arrays
        self.embed = normal(WORDS, h, scale=0.05)
        self.layers = [{name: normal(*shape, scale=0.05) for name, shape in shapes.items()} for _ in range(LAYERS)]
        layers = [
            {name: dl(x) for name, x in layer.items()} | {"before_attention": dl(ones), "before_mlp": dl(ones)}
            for layer in self.layers
        ]
        outside = {"embed_tokens": dl(self.embed), "norm": dl(ones)}
        sizes = [WORDS, h, INTERMEDIATE, HEADS, KV_HEADS, SIZE, 1e-6, SIZE**-0.5, False]
        self.decoder = core.Decoder(outside, layers, *sizes)
        angles = np.arange(PROMPT + NEW)[:, None] * 10000.0 ** -(np.arange(SIZE) // 2 * 2 / SIZE)
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def prefill(self, count: int) -> np.ndarray:
        tokens, lengths = random.integers(WORDS, size=count * PROMPT), np.full(count, PROMPT)
        hidden = np.empty((count, HIDDEN), np.float32)
        room = [count, PROMPT + NEW, dl(self.cos), dl(self.sin), dl(hidden), 1]
        self.decoder.prefill(dl(tokens), dl(lengths), *room)
        return hidden

    def step(self, tokens: np.ndarray, position: int) -> np.ndarray:
        hidden = np.empty((len(tokens), HIDDEN), np.float32)
        self.decoder.step(dl(tokens), dl(np.full(len(tokens), position)), dl(hidden), 1)
        return hidden

    def roll_out(self, count: int, new: int) -> None:
        hidden, positions = self.prefill(count), np.zeros(count, np.int64)
        logits, tokens = np.empty((count, WORDS), np.float32), np.empty((new, count), np.int64)
        stream = [1, dl(np.arange(count)), dl(positions), 0, 1.0, 0.0, dl(positions + PROMPT)]
        going, table = np.ones(count, np.int64), [dl(np.empty((new, count), np.float32)) for _ in range(2)]
        head = [dl(hidden), dl(self.embed), None, 1.0, 0.0, 1.0]
        self.decoder.draw(*head, *stream, [], dl(going), dl(logits), dl(tokens), *table, 1)


def kernels(core: Any) -> Iterator[Kernel]:
    yield from row_kernels(core, normal(ROWS, V) * 4)
    yield from head_kernels(core)
    yield from product_kernels(core)
    update = list(attention_kernels(core, SEQUENCES, PROMPT + NEW - 1))
    yield from update
    parts = list(layer_kernels(core, SEQUENCES * (PROMPT + NEW - 1)))
    yield from parts
    multiply = layer_products(core, SEQUENCES * (PROMPT + NEW - 1))
    model = Model(core)
    yield "decoder.prefill", SEQUENCES * PROMPT, lambda: model.prefill(SEQUENCES)
    for count in (1, SEQUENCES):
        model.prefill(count)
        tokens = random.integers(WORDS, size=count)
        yield f"decoder.step, {count} sequences", count, lambda t=tokens: model.step(t, PROMPT)
    yield "decoder.draw, 1 sequences, with its prompt", NEW, lambda: model.roll_out(1, NEW)
    *_, policy, _ = row_kernels(core, normal(SEQUENCES * NEW, WORDS), " of a round")

    def a_round() -> None:
        model.roll_out(SEQUENCES, NEW)
        for _ in range(LAYERS):
            multiply()
            for _, _, call in [*update, *parts, *parts[:3], *2 * parts[2:3]]:  # two norms; q and k, forth and back
                call()
        policy[2]()

    yield "one round, all of the core's part", SEQUENCES * NEW, a_round


def main() -> None:
    core = load(sys.argv[1])
    core.use_instruction_set(sys.argv[2])
    for name, tokens, call in kernels(core):
        os.getsid(0)  # what came before is no kernel's
        call()
        os.getsid(0)
        print(f"KERNEL\t{name}\t{tokens}", flush=True)


if __name__ == "__main__":
    main()
