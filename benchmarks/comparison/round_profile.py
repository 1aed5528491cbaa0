"""Where the time of a round goes, by torch's profiler: the calling thread's, each moment given to one kind of work.

The profiler itself takes some time, most of it where there are many small operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from bandit_rft.ops import decoder_layer, registry
from bandit_rft.optimizer import PolicyOptimizer
from bandit_rft.rollout.native import NativeDecoder
from bandit_rft.trainer import Trainer

PROMPTS, TOKENS, LOSS = "reading prompts", "drawing tokens", "head and loss"
ATTENTION, PRODUCTS, OPTIMIZER = "rotations and attention", "products of the layers", "clipping and optimizer"
ELEMENTS, REST = "norms, activations, residuals, copies", "autograd, rewards, metrics, Python"
KINDS = (PROMPTS, TOKENS, PRODUCTS, ATTENTION, ELEMENTS, LOSS, OPTIMIZER, REST)
ROUND = "a round"
#: The parts of a layer in the core.
PARTS = {
    "_linear": PRODUCTS, "_input_gradient": PRODUCTS, "_weight_gradient": PRODUCTS, "attend": ATTENTION,
    "attend_backward": ATTENTION, "_norm": ELEMENTS, "_norm_backward": ELEMENTS,
    "_gated_silu": ELEMENTS, "_gated_silu_backward": ELEMENTS,
}  # fmt: skip
OPERATIONS = {"aten::mm": PRODUCTS, "aten::addmm": PRODUCTS, "aten::bmm": PRODUCTS}


def by_kind(trainer: Trainer, rounds: int, skip: int, patch: Callable[..., None]) -> dict[str, float]:
    """Milliseconds a round of each kind, of the rounds after the first `skip` but the last, which evaluates and saves.

    Args:
        trainer: of so many rounds, not yet run.
        rounds: of the run.
        skip: rounds that warm it up.
        patch: sets an attribute for as long as this takes (pytest's `monkeypatch.setattr`).
    """
    whole, record, seen = Trainer.train_round, profile(activities=[ProfilerActivity.CPU]), [0]

    def train_round(self: Trainer) -> None:
        seen[0] += 1
        if seen[0] == skip + 1:
            record.__enter__()
        with record_function(ROUND):
            whole(self)
        if seen[0] == rounds - 1:
            record.__exit__(None, None, None)

    patch(Trainer, "train_round", train_round)
    patch(PolicyOptimizer, "step", _named(OPTIMIZER, PolicyOptimizer.step))
    for name, kind in (("prefill", PROMPTS), ("draw", TOKENS), ("step", TOKENS)):
        patch(NativeDecoder, name, _named(kind, getattr(NativeDecoder, name)))
    for name, kind in PARTS.items():
        patch(decoder_layer, name, _named(kind, getattr(decoder_layer, name)))
    loss = "linear_policy_loss_into"
    patch(registry, "implementations", registry.implementations | {loss: _named(LOSS, registry.implementations[loss])})
    trainer.run()
    found = Counter(dict.fromkeys(KINDS, 0.0))
    for event in record.events():
        if (work := _kind_of(event)) is not None:
            found[work] += event.self_cpu_time_total / 1e3 / (rounds - 1 - skip)
    return dict(found)


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(name):
            return function(*arguments, **options)

    return call


def _kind_of(event: Any) -> str | None:
    """Of the outermost operation that has one; None for what runs beside the round, in other threads."""
    above = [event]
    while above[-1].cpu_parent is not None:
        above.append(above[-1].cpu_parent)
    if above[-1].name != ROUND:
        return None
    for outer in reversed(above):
        if outer.name in KINDS:
            return str(outer.name)
        if outer.name.startswith(("_PackedAttention", "autograd::engine::evaluate_function: _PackedAttention")):
            return ATTENTION
        if outer.name in OPERATIONS:
            return OPERATIONS[outer.name]
    return ELEMENTS if event.name.startswith("aten::") else REST
