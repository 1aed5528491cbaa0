"""Random numbers that depend on what is drawn, never on how: Philox4x32-10 (Salmon et al., SC 2011).

key = the 64-bit seed; counter = (token id / 4, position, sequence id low, sequence id high); word j belongs to token
id 4k + j. u = float32(word) * 2^-32 + 2^-33, at most 1 - 2^-24; Gumbel noise g = -log(-log1p(-u)).
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
#: float32(word) rounds up to 2^32 for the last 128 words; u = 1 would make the noise -inf and a lone token undrawable.
LARGEST_UNIFORM = 1 - 2.0**-24


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds over four counter words and two key words: int64 tensors holding values below 2^32, broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The products wrap around in int64; their upper and lower 32 bits are right all the same.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def random_words(seed: Tensor, sequence_ids: Tensor, positions: Tensor, vocabulary: int, first: int = 0) -> Tensor:
    """The words of V token ids from `first` on, [B, V] int64. seed is 0-d int64; sequence_ids, positions int64 [B]."""
    quads = torch.arange(first // 4, (first + vocabulary + 3) // 4, device=sequence_ids.device)
    counter = (
        quads[None, :],
        positions[:, None] & WORD,
        sequence_ids[:, None] & WORD,
        (sequence_ids[:, None] >> 32) & WORD,
    )
    words = philox4x32(counter, (seed & WORD, (seed >> 32) & WORD))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, first % 4 :][:, :vocabulary]


def gumbel_noise(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel noise from 32-bit words; the uniform is float32 whatever `dtype` the logarithms are taken in."""
    uniform = (words.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp(max=LARGEST_UNIFORM)
    return -torch.log(-torch.log1p(-uniform.to(dtype)))
