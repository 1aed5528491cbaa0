"""One decoding step of a small model without the interpreter between its operations.

A decoding step of a million-parameter model is some 200 small operations, and calling them through modules costs more
than they do. A step that is taken often with the same shapes is recorded once as the operations it consists of
(make_fx), and replayed by TorchScript's executor: the same kernels on the same data in the same order, hence bits.
The weights are those of the model, not copies. Anything unusual (an operation that is not on the list, a result that is
not bit for bit the eager one) means that the shape is decoded eagerly for good.

Measured on two cores, 1M-parameter Llama, 32 rows: 3.6 -> 2.3 ms a step.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bandit_rft.policy import Policy, attention_function

logger = logging.getLogger(__name__)

HOT = 200  # steps of one shape before it is recorded: recording takes as long as some 200 steps save
MOST = 48  # recorded shapes kept
#: Operations whose result's shape and course do not depend on values: what was recorded holds for every input.
_OPERATIONS = """
embedding mm addmm bmm baddbmm matmul linear add add_ sub rsub mul mul_ div div_ neg pow sqrt rsqrt reciprocal
exp mean sum amax var cat stack slice select split split_with_sizes chunk narrow view _unsafe_view reshape
expand repeat transpose permute unsqueeze squeeze t clone contiguous detach alias lift_fresh_copy _to_copy to
copy_ cos sin tanh gelu silu relu sigmoid erf softmax _softmax native_layer_norm layer_norm rms_norm
_fused_rms_norm index_copy_ index_copy masked_fill where zeros_like ones_like arange scalar_tensor full
scaled_dot_product_attention clamp unbind minimum maximum getitem _scaled_dot_product_flash_attention_for_cpu
_scaled_dot_product_attention_math
"""
ALLOWED = frozenset(_OPERATIONS.split())
#: Rotary embeddings that change with the length look at values.
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


class _BoundLayer(DynamicLayer):
    """A cache layer over given tensors [rows, heads, visible, width]: writes the new column `slot` and returns all."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor):
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.slot = keys, values, slot
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values


def _decoding_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token, with the signature of transformers' attention functions.

    Two small batched products: at these sizes the CPU's flash kernel takes 4 times as long (measured: 250 -> 60 us).
    """
    if attention_mask is None or query.shape[2] != 1 or kwargs.get("s_aux") is not None:
        raise NotImplementedError("decoding attention serves one new token with a ready mask")
    rows, heads, _, width = query.shape
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], width)
    scores = torch.matmul(grouped, key.transpose(-1, -2)).mul(width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores + attention_mask, -1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value).view(rows, 1, heads, value.shape[-1]), None


# No mask function goes with this name: a ready mask is passed on as it is.
ALL_ATTENTION_FUNCTIONS.register("bandit_rft_decoding", _decoding_attention)


class DecodingStep:
    """hidden [rows, H] = step(tokens [rows, 1], place [rows, 1], slot [1], mask [rows, 1, 1, visible], kv).

    place is each row's position, slot the column of the cache that this token is written to, mask additive; kv
    are keys and values of each layer, 2 x layers tensors [rows, heads, visible, width], written in place.
    """

    def __init__(self, policy: Policy):
        self._policy, self._base = policy, policy.base
        self._recorded: dict[tuple[int, ...], Callable[..., Tensor]] = {}
        self._taken: dict[tuple[int, ...], int] = {}
        rope = getattr(policy.model.config.get_text_config(), "rope_parameters", None) or {}
        kinds = [r.get("rope_type", "default") for r in (rope, *rope.values()) if isinstance(r, dict)]
        self._may_record = all(kind in STATIC_ROPE for kind in kinds)
        self._addresses: list[int] = []

    def begin(self) -> None:
        """To be called before a batch: forgets what was recorded if the weights are elsewhere in memory now."""
        addresses = [parameter.data_ptr() for parameter in self._base.parameters()]
        if addresses != self._addresses:
            self._recorded.clear()
            self._taken.clear()
            self._addresses = addresses

    def __call__(self, tokens: Tensor, place: Tensor, slot: Tensor, mask: Tensor, kv: Sequence[Tensor]) -> Tensor:
        shape = tuple(mask.shape)
        recorded = self._recorded.get(shape)
        if recorded is not None:
            return recorded(tokens, place, slot, mask, *kv)
        taken = self._taken[shape] = self._taken.get(shape, 0) + 1
        if taken == HOT and self._may_record and len(self._recorded) < MOST:
            self._record(shape, tokens, place, slot, mask, kv)
        return self._eager(tokens, place, slot, mask, *kv)

    def _eager(self, tokens: Tensor, place: Tensor, slot: Tensor, mask: Tensor, *kv: Tensor) -> Tensor:
        layers: list[Any] = [_BoundLayer(keys, values, slot) for keys, values in zip(kv[::2], kv[1::2], strict=True)]
        with attention_function(self._policy.model, "bandit_rft_decoding"):
            output = self._base(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=place,
                past_key_values=Cache(layers=layers),
                use_cache=True,
            )
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden

    def _record(
        self, shape: tuple[int, ...], tokens: Tensor, place: Tensor, slot: Tensor, mask: Tensor, kv: Sequence[Tensor]
    ) -> None:
        # Recorded and tried on copies, with another column than the one it was recorded with.
        inputs = [x.clone() for x in (tokens, place, slot, mask, *kv)]
        try:
            with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                inputs = [x.clone() for x in inputs]
                graph = make_fx(self._eager)(*inputs)
                names = {n.target.__name__.split(".")[0] for n in graph.graph.nodes if n.op == "call_function"}
                if not names <= ALLOWED:
                    raise ValueError(f"operations {sorted(names - ALLOWED)}")
                for name, parameter in list(graph._parameters.items()):
                    del graph._parameters[name]
                    if parameter is not None:
                        graph.register_buffer(name, parameter.detach())
                recorded: Callable[..., Tensor] = torch.jit.trace(graph, tuple(inputs), check_trace=False)
                inputs[2] = (inputs[2] + 1) % shape[-1]
                inputs[3] = inputs[3].index_fill(3, inputs[2], 0.0)
                for _ in range(3):  # the executor specializes in its first runs
                    ours, theirs = ([x.clone() for x in inputs] for _ in range(2))
                    if not torch.equal(recorded(*ours), self._eager(*theirs)):
                        raise ValueError("the result is not bit for bit the eager one")
                    if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
                        raise ValueError("the cache is not bit for bit the eager one")
        except Exception as error:  # whatever a model does that recording does not survive
            logger.debug("decoding %s stays eager: %s", shape, error)
            self._may_record = False
            return
        self._recorded[shape] = recorded
