"""A small random copy of a model whose limits are short enough to be crossed in a probe.

What a model computes may change at some length: where a window begins, where rotary frequencies change, where sparse
attention runs out of its budget. Such limits are integers in its config. In a twin they are a few dozen tokens, and
the widths are small: what it shows about packing and decoding holds for the model, for it is the same code.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from bandit_rft.model.split import Split

logger = logging.getLogger(__name__)

#: Names of config entries that a length may cross.
LIMITS = re.compile(
    r"window|(^|_)chunk|_topk|topk_blocks|block_size|block_multiple|position|seq_len|n_ctx|context|ctx_|local_att"
    r"|max_distance|rel_extent|floor|kernel|conv|compress|keep_|log_scaling"
)
NOT_LIMITS = re.compile(r"feed_forward|lm_head|num_|_token|group|_layers$|pattern|bias_num|_dim$|layer_id|offset")
#: Limits up to this many tokens are crossed as they are.
CROSSED = 64
#: A model with fewer parameters than this is its own measure; a twin with more is not made.
SMALL, LARGE = 2_000_000, 60_000_000
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "num_kv_heads", "kv_n_heads")
WIDTHS = re.compile(r"intermediate|ffn_dim|n_inner|d_ff$|ffn_hidden|dim_ff")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers")


@dataclass
class Twin:
    """A twin and the limits that it has in place of the model's.

    Attributes:
        model: random weights, on the CPU, float32.
        limits: the model's limits and, for each, the twin's; both ascending.
        sequences: token ids on both sides of every limit, each [length], ascending.
        hidden: what the twin gives for each alone, [length, H].
    """

    model: PreTrainedModel
    limits: dict[int, int]
    sequences: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    verdicts: dict[Any, str | None] = field(default_factory=dict)  # of what was tried on it

    def scaled(self, limit: int | None) -> int | None:
        """The twin's limit in place of the model's; None for None."""
        return None if limit is None else self.limits.get(limit, limit)

    def fresh(self) -> PreTrainedModel:
        """A copy that has computed nothing yet: some rotary embeddings remember the longest text so far."""
        return copy.deepcopy(self.model)


def limits_of(config: PreTrainedConfig) -> list[int]:
    """The integers in a config that a length may cross, ascending."""
    return sorted({holder[key] for holder, key in _limits(config.get_text_config())})


def twin_of(model: PreTrainedModel) -> Twin | None:
    """The model's twin; None where none can be made that is small and computes. Made once for each config."""
    text = model.config.to_json_string(use_diff=False)
    kind: Any = type(model)
    return _twin(kind, text, str(model.config._attn_implementation), _Held(model))


class _Held:
    """A model that counts for nothing in a cache's key."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=4)
def _twin(kind: Any, config_text: str, implementation: str, held: _Held) -> Twin | None:
    model, held.model = held.model, None  # type: ignore[assignment]  # the cache must not keep it
    size = sum(p.numel() for p in model.parameters())
    for shrink in (True, False) if size > SMALL else (False,):
        config = copy.deepcopy(model.config)
        try:
            with _quietly(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                limits = _scale(config, layers=size > SMALL, widths=shrink)
                with torch.device("meta"):
                    parameters = sum(p.numel() for p in kind(config).parameters())
                if parameters > max(LARGE, SMALL):
                    logger.debug("twin of %s: %d parameters are too many", kind.__name__, parameters)
                    continue
                small: Any = kind(config)
                twin = Twin(small.float().train(False), limits)
                _spread(twin.model)
                _measure(twin)
        except Exception as error:  # whatever a config that was never meant so leads to
            logger.debug("twin of %s, shrunk %s: %s: %s", kind.__name__, shrink, type(error).__name__, error)
            continue
        if twin.sequences:
            return twin
    return None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' advice on configs that are odd on purpose."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _limits(config: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """(holder, key) of every limit in a config, its dictionaries and what is nested in it."""
    holder = config if isinstance(config, dict) else vars(config)
    for key, value in list(holder.items()):
        if isinstance(value, dict | PreTrainedConfig):
            yield from _limits(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1 and _is_limit(str(key)):
            yield holder, key


def _is_limit(key: str) -> bool:
    return LIMITS.search(key) is not None and NOT_LIMITS.search(key) is None


def _scale(config: PreTrainedConfig, *, layers: bool, widths: bool) -> dict[int, int]:
    """Make a config small in place; its limits, and what became of them."""
    text = config.get_text_config()
    values = vars(text)
    places = list(_limits(text))
    large = sorted({holder[key] for holder, key in places if holder[key] > CROSSED})
    # In their order, a few tokens apart, even (some are halved); more than the small ones, which stay.
    small = {holder[key] for holder, key in places} - set(large)
    first = max(CROSSED // 2, 8 * (max(small, default=0) // 8) + 16)
    scaled = {limit: first + 8 * i for i, limit in enumerate(large)}
    for holder, key in places:
        holder[key] = scaled.get(holder[key], holder[key])
    if layers:
        _fewer_layers(text)
        for key in ("vocab_size", "vocab_size_per_layer_input"):
            if isinstance(values.get(key), int):
                values[key] = min(values[key], 128)
    for key, value in list(values.items()):
        if key.endswith("token_id") and isinstance(value, int) and value >= 128 and layers:
            values[key] = 127
    if widths:
        _narrower(values)
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    return {**{limit: limit for limit in sorted(small)}, **scaled}


def _fewer_layers(text: PreTrainedConfig) -> None:
    """As few layers as have one of each kind, in the order in which they come."""
    values = vars(text)
    derived = [getattr(text, name, None) for name in ("layer_types", "layers_block_type")]
    for name in LAYERS:
        count = values.get(name)
        if not isinstance(count, int):
            continue
        enough = 2
        for value in [*values.values(), *derived]:
            if isinstance(value, list | tuple) and len(value) == count and value:
                kinds = [json.dumps(kind, default=str) for kind in value]
                if len(set(kinds)) < 5:
                    enough = max(enough, 1 + max(kinds.index(kind) for kind in set(kinds)))
        for key, value in values.items():  # every so many layers, or these alone, are of another kind
            if re.search(r"pattern|period|every|interval|first_k|group_size|_offset", key) and isinstance(value, int):
                enough = max(enough, value + 1 if value < 8 else 2)
            elif re.search(r"indices|idxs|layer_ids", key) and isinstance(value, list) and value:
                enough = max(enough, 1 + min(i for i in value if isinstance(i, int)))
        fewer = min(count, enough)
        for key, value in list(values.items()):
            if isinstance(value, list) and len(value) == count:
                values[key] = value[:fewer]
            elif isinstance(value, list) and re.search(r"indices|idxs|layer_ids", key):
                values[key] = [i for i in value if i < fewer]
        values[name] = fewer


def _narrower(values: dict[str, Any]) -> None:
    heads = [values[name] for name in HEADS if isinstance(values.get(name), int)]
    factor = math.gcd(*heads) if heads else 1
    explicit = isinstance(values.get("head_dim"), int) or any("_head_dim" in key for key in values)
    for name in HEADS:
        if isinstance(values.get(name), int):
            values[name] //= factor
    for key, value in list(values.items()):
        if key in ("hidden_size", "n_embd", "d_model") and isinstance(value, int):
            values[key] = min(value, 256) if explicit else value // factor
        elif WIDTHS.search(key) and isinstance(value, int) and value > 128:
            values[key] = 128


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Weights that make every part of the model count; freshly initialized ones hardly attend."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                parameter.normal_(0, 1)
            elif parameter.ndim >= 2 and parameter.is_floating_point():
                parameter.normal_(0, 1.5 / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)


@torch.no_grad()
def _measure(twin: Twin) -> None:
    """Sequences on both sides of every limit, each with what the twin gives for it alone."""
    model = twin.fresh()
    base = Split.of(model).base
    limits = sorted({limit for limit in twin.limits.values() if limit > 8})
    lengths = {2, 7, 24, *(limit + more for limit in limits for more in (0, 1, 9))}
    embeddings: Any = model.get_input_embeddings()
    vocabulary = int(embeddings.weight.shape[0])
    for length in sorted(lengths):
        ids = torch.randint(3, vocabulary, (length,)) if vocabulary > 3 else torch.zeros(length, dtype=torch.int64)
        try:
            hidden = base(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        except Exception as error:  # longer than its table of positions
            logger.debug("a twin does not take %d tokens: %s", length, error)
            continue
        if bool(hidden.isfinite().all()):
            twin.sequences.append(ids)
            twin.hidden.append(hidden)
