"""Models whose layers are of the one kind that the compiled core knows: Llama's, and what differs little from it.

    x += o(attention(rotate(q h), rotate(k h), v h)),  h = norm(x);    x += down(silu(gate h1) * up h1),  h1 = norm(x)

with biases and norms of heads where a model has them. The core decodes such models (rollout/native.py); here it
computes their hidden states for the update, a layer a node of autograd (ops/decoder_layer.py). A model is recognized by
the classes of its modules and their numbers, each time anew: all must be transformers' own, for what a subclass does to
longer texts no probe would see. Besides, what is computed is compared with the model's own before it is relied on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bandit_rft.ops.decoder_layer import LayerWeights, Layout, decoder_layer, rms_norm, serves

#: Models whose layers are what the core computes (config.model_type); olmo2, which normalizes what comes out of its
#: parts, only while it decodes.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "olmo2")
#: Rotary embeddings that are a table of the position: others change with the length of the text.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Shape(NamedTuple):
    """What the core has to know of a model beside its weights, in the order in which it takes it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    head_size: int
    eps: float
    scaling: float
    norms_over_all_heads: bool


def shape_of(base: Any) -> Shape:
    """The shape of a model whose layers the core computes.

    Args:
        base: the part of the model that gives hidden states.

    Raises:
        NotImplementedError: saying why the core does not.
    """
    config = base.config.get_text_config()
    refuse_unless(config.model_type in MODEL_TYPES, f"{config.model_type} is not one of {', '.join(MODEL_TYPES)}")
    refuse_unless(config.hidden_act == "silu", f"its activation is {config.hidden_act}")
    rope = base.rotary_emb.rope_type
    refuse_unless(rope in STATIC_ROPE, f"its rotary embedding is {rope}")
    refuse_unless(len(base.layers) == config.num_hidden_layers, "not all of its layers are computed")
    activations = {type(layer.mlp.act_fn).__name__ for layer in base.layers}
    refuse_unless(activations <= {"SiLU", "SiLUActivation"}, f"its activations are {', '.join(sorted(activations))}")
    epsilons = {m.variance_epsilon for m in _modules_of(base) if type(m).__name__.endswith("RMSNorm")}
    refuse_unless(len(epsilons) == 1, f"its norms have several epsilons: {epsilons}")
    scalings = {layer.self_attn.scaling for layer in base.layers}
    refuse_unless(len(scalings) == 1, f"its layers scale attention differently: {scalings}")
    attention = base.layers[0].self_attn
    size: int = attention.head_dim
    over_all_heads = hasattr(attention, "q_norm") and attention.q_norm.weight.numel() != size
    return Shape(
        config.vocab_size, config.hidden_size, config.intermediate_size, config.num_attention_heads,
        config.num_key_value_heads, size, epsilons.pop(), scalings.pop(), over_all_heads,
    )  # fmt: skip


def window_of(base: Any) -> int | None:
    """How many tokens a token sees in the layer that sees fewest; None: all."""
    config = base.config.get_text_config()
    windows = {getattr(layer.self_attn, "sliding_window", None) for layer in base.layers}
    if config.model_type == "mistral":
        windows.add(config.sliding_window)
    return min((w for w in windows if w is not None), default=None)


def numbers_of(modules: Sequence[nn.Module]) -> list[tuple[Any, ...]]:
    """What `shape_of` and `layer_weights` read of modules: equal to an earlier answer, they need not look again."""
    names = ("variance_epsilon", "scaling", "rope_type", "max_norm")
    return [(type(m), len(m._modules), *map(vars(m).get, names)) for m in modules]


def plain_modules(base: Any) -> list[nn.Module]:
    """All modules of a model that computes nothing but what transformers' classes do.

    Raises:
        NotImplementedError: naming those with hooks, of another class, or with another forward than their class.
    """
    modules = _modules_of(base)
    hooked = [m for m in modules if "forward" in (own := vars(m)) or any(map(own.get, HOOKS))]
    if hooked:
        names = [name for name, module in base.named_modules() if module in hooked]
        raise NotImplementedError(f"modules {names} have hooks or another forward than their class")
    refuse_unless(not nn.modules.module._has_any_global_hook(), "all modules have a hook")
    kind = base.config.get_text_config().model_type
    theirs = (f"transformers.models.{kind}.modeling_{kind}", "transformers.activations")
    others = {k for k in set(map(type, modules)) if k.__module__ not in theirs and not _is_torchs(k)}
    refuse_unless(not others, f"it has modules of {', '.join(sorted(map(str, others)))}")
    return modules


def _modules_of(base: Any) -> list[Any]:
    """As `base.modules()`, without names, which take most of its time: this is asked several times a round."""
    found, seen = [base], {id(base)}
    for module in found:  # which grows meanwhile
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def _is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.modules.")


def outside_weights(base: Any) -> dict[str, Tensor]:
    """The weights that are in no layer, by the names that the core knows."""
    refuse_unless(base.embed_tokens.max_norm is None, "its embeddings are scaled down to a norm")
    return {"embed_tokens": _weight(base.embed_tokens), "norm": _weight(base.norm)}


def layer_weights(layer: Any) -> dict[str, Tensor | None]:
    """The layer's weights by the names that the core knows; norms by where they stand."""
    attention = layer.self_attn
    weights: dict[str, Tensor | None] = {name: _weight(getattr(attention, name)) for name in PROJECTIONS}
    weights |= {f"{name[0]}_bias": getattr(attention, name).bias for name in PROJECTIONS}
    for name in ("gate_proj", "up_proj", "down_proj"):
        weights[name] = _weight(getattr(layer.mlp, name))
        refuse_unless(getattr(layer.mlp, name).bias is None, f"{name} has a bias")
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            weights[name] = _weight(getattr(attention, name))
    if hasattr(layer, "input_layernorm"):
        places = {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"}
    else:  # OLMo-2 normalizes what comes out
        places = {"after_attention": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"}
    return weights | {place: _weight(getattr(layer, name)) for place, name in places.items()}


class LlamaLayers:
    """Hidden states of packed sequences, layer by layer in the core.

    The base is given with each call: what was sharded or adapted since is another one, or not the same any more.

    Raises:
        NotImplementedError: saying why, for a model that it does not serve.
    """

    def __init__(self, base: Any):
        plain_modules(base)
        self._shape = shape_of(base)
        refuse_unless(self._shape.head_size % 2 == 0, "its heads cannot be cut in halves")
        _weights_of_layers(base)

    def weights(self, base: Any, lengths: Sequence[int]) -> list[LayerWeights] | None:
        """Of every layer; None where these sequences cannot be computed here, as model and backends are now."""
        try:
            window = window_of(base)
            refuse_unless(window is None or max(lengths) <= window, f"it sees {window} tokens")
            layers, outside = _weights_of_layers(base), outside_weights(base)
            refuse_unless(shape_of(base) == self._shape, "it was changed")
        except (NotImplementedError, AttributeError):  # parts that another kind of module does not have
            return None
        served = serves(*outside.values(), *(weight for layer in layers for weight in layer))
        return layers if served else None

    def hidden_states(
        self, base: Any, layers: Sequence[LayerWeights], input_ids: Tensor, lengths: Sequence[int],
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Last hidden states [T, H] of packed token ids [T], or [N, H] of the tokens `rows`; differentiable.

        `layers` are what `weights` gave for this base and these lengths.
        """
        positions = torch.cat([torch.arange(n) for n in lengths])
        x: Tensor = base.embed_tokens(input_ids)
        cos, sin = (angles[0].contiguous() for angles in base.rotary_emb(x[None], positions[None]))
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        layout = Layout(cu_seqlens, cos, sin, self._shape.scaling, self._shape.eps)
        for i, weights in enumerate(layers):
            x = decoder_layer(x, layout, weights, rows if i == len(layers) - 1 else None)
        return rms_norm(x, base.norm.weight, self._shape.eps)


def _weights_of_layers(base: Any) -> list[LayerWeights]:
    plain_modules(base)
    layers = [layer_weights(layer) for layer in base.layers]
    others = {name for layer in layers for name in layer} - set(LayerWeights._fields)
    refuse_unless(not others, f"it has {', '.join(sorted(others))}")
    return [LayerWeights(**layer) for layer in layers]  # type: ignore[arg-type]


def _weight(module: Any) -> Tensor:
    plain = type(module) in (nn.Linear, nn.Embedding) or type(module).__name__.endswith("RMSNorm")
    refuse_unless(plain, f"{type(module).__name__} is not a plain module")
    weight: Tensor = module.weight
    return weight


def refuse_unless(condition: bool, reason: str) -> None:
    """Raises NotImplementedError with a reason."""
    if not condition:
        raise NotImplementedError(reason)
