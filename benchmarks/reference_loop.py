"""The whole method in plain PyTorch, as fast as two pages of it get: what a round of bandit_rft is compared with.

    python benchmarks/reference_loop.py MODEL_FOLDER            eager
    python benchmarks/reference_loop.py MODEL_FOLDER --compile  every step through torch.compile

One rollout a query, an outcome reward, one update. A Llama from a Hugging Face folder, its KV cache a fixed buffer so
that a decoding step has one shape; prompts of one length (no padding, which spares it work that a real loop has). The
logits [tokens, vocabulary] exist, in the draw and in the loss. Nothing here imports bandit_rft.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig

Reward = Callable[[Tensor], Tensor]  # completions [B, T] -> rewards [B]


class Layer(nn.Module):
    def __init__(self, c: AutoConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.before, self.after = nn.RMSNorm(c.hidden_size, c.rms_norm_eps), nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.q = nn.Linear(c.hidden_size, self.heads * self.size, bias=False)
        self.k, self.v = (nn.Linear(c.hidden_size, self.kv_heads * self.size, bias=False) for _ in range(2))
        self.o = nn.Linear(self.heads * self.size, c.hidden_size, bias=False)
        self.gate, self.up = (nn.Linear(c.hidden_size, c.intermediate_size, bias=False) for _ in range(2))
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor | None, at: Tensor) -> Tensor:
        """x [B, L, H] at positions `at` [L]; cache [2, B, kv_heads, capacity, size] is written there."""
        y = self.before(x)
        q, k, v = (f(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = q * cos + turned(q) * sin, k * cos + turned(k) * sin
        mask = None
        if cache is not None:
            cache[0].index_copy_(2, at, k)
            cache[1].index_copy_(2, at, v)
            k, v = cache[0], cache[1]
            mask = torch.arange(k.shape[2], device=x.device) <= at[:, None]  # [L, capacity]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.after(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def turned(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


class Llama(nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        c = self.config = AutoConfig.from_pretrained(folder)
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.head.weight = self.embed.weight
        theta = c.rope_parameters["rope_theta"] ** -(torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        angles = torch.arange(c.max_position_embeddings)[:, None] * torch.cat((theta, theta))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        names = {
            "input_layernorm": "before", "post_attention_layernorm": "after", "_proj": "", "self_attn.": "", "mlp.": "",
            "model.": "", "embed_tokens": "embed", "lm_head": "head",
        }  # fmt: skip
        for name, tensor in load_file(Path(folder) / "model.safetensors").items():
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            self.get_parameter(name).data.copy_(tensor)

    def forward(self, ids: Tensor, caches: list[Tensor] | None, at: Tensor) -> Tensor:
        """Tokens [B, L] at positions [L] -> hidden states [B, L, H]."""
        x, cos, sin = self.embed(ids), self.cos[at], self.sin[at]
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, caches[i] if caches else None, at)
        return self.norm(x)

    def draw(self, ids: Tensor, caches: list[Tensor], at: Tensor) -> Tensor:
        """One token [B] after tokens [B, L]."""
        logits = self.head(self(ids, caches, at)[:, -1])  # [B, V]
        noise = torch.empty_like(logits).exponential_()  # argmax(p / e) is a draw from p, and needs no host
        return (logits.softmax(-1) / noise).argmax(-1)

    def loss(self, ids: Tensor, weights: Tensor, prompt: int) -> Tensor:
        """-sum(weight log p) over completions; ids [B, P + T], weights [B, T]."""
        at = torch.arange(ids.shape[1] - 1, device=ids.device)
        logits = self.head(self(ids[:, :-1], None, at)[:, prompt - 1 :])  # [B, T, V]
        return -(logits.log_softmax(-1).gather(-1, ids[:, prompt:, None])[..., 0] * weights).sum()


class Loop:
    """Rounds over a model: `round` returns the seconds of its phases."""

    def __init__(self, folder: Path, new: int, reward: Reward, compiled: bool = False, lr: float = 1e-6) -> None:
        self.model, self.new, self.reward, self.stop = Llama(folder), new, reward, 2
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.0, fused=True)
        wrap = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self.draw, self.loss, self.compiled = wrap(self.model.draw), wrap(self.model.loss), compiled

    @torch.no_grad()
    def roll_out(self, prompts: Tensor) -> Tensor:
        """Prompts [B, P] -> prompts and completions [B, P + T]."""
        (b, p), c = prompts.shape, self.model.config
        shape = (2, b, c.num_key_value_heads, p + self.new, c.head_dim)
        caches = [prompts.new_zeros(shape, dtype=torch.float32) for _ in range(c.num_hidden_layers)]
        ids = [prompts, self.draw(prompts, caches, torch.arange(p))[:, None]]
        while len(ids) <= self.new:
            ids.append(self.draw(ids[-1], caches, torch.tensor([p + len(ids) - 2]))[:, None])
        return torch.cat(ids, 1)

    def round(self, prompts: Tensor) -> dict[str, float]:
        """Draw, reward, update."""
        times, prompt = [time.perf_counter()], prompts.shape[1]
        ids = self.roll_out(prompts)
        times.append(time.perf_counter())
        drawn = ids[:, prompt:]
        counted = ((drawn == self.stop).cumsum(1) - (drawn == self.stop).long() == 0).float()  # up to the first stop
        advantages = self.reward(drawn)
        times.append(time.perf_counter())
        self.loss(ids, advantages[:, None] * counted / counted.sum(), prompt).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        times.append(time.perf_counter())
        a, b, c, d = times
        return {"rollout": b - a, "reward": c - b, "update": d - c, "round": d - a}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    loop = Loop(given.model, 32, lambda drawn: torch.ones(len(drawn)), given.compile)
    for _ in range(given.rounds):
        print({phase: round(seconds, 4) for phase, seconds in loop.round(torch.randint(3, 1024, (32, 16))).items()})
