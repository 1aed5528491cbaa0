"""The random words: known answers, and equality of every implementation."""

from __future__ import annotations

import pytest
import torch
from ops_cases import BACKENDS

from bandit_rft.ops import backends
from bandit_rft.ops.philox import gumbel_noise, philox4x32, random_words

#: philox4x32-10 lines of kat_vectors in the Random123 distribution: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    words = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(w) for w in words) == answer
    if backends.native is not None:
        assert backends.native.philox(*counter, key[0] | key[1] << 32) == answer


def test_noise_is_the_same_to_the_last_bits() -> None:
    if backends.native is None:
        pytest.skip("needs the compiled core")
    words = torch.cat(
        [torch.randint(2**32, (2000,)), torch.tensor([0, 1, 2**24, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1])]
    )
    native = torch.tensor([backends.native.gumbel(int(w)) for w in words])
    torch.testing.assert_close(native, gumbel_noise(words), rtol=5e-7, atol=5e-7)
    assert torch.isfinite(gumbel_noise(words)).all()
    torch.testing.assert_close(gumbel_noise(words).double(), gumbel_noise(words, torch.float64), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [1, 3, 4, 63, 769, 1601])
def test_draws_use_these_words(vocabulary: int, backend: str) -> None:
    """With equal logits the token drawn is the one with the smallest word: words are compared, not statistics."""
    from bandit_rft import sample_from_logits
    from bandit_rft.ops import use_backend

    rows = 64
    ids = torch.randint(-(2**63), 2**63 - 1, (rows,))
    positions = torch.randint(2**32, (rows,))
    seed = -0x1234_5678_9ABC_DEF0
    with use_backend(backend):
        drawn = sample_from_logits(torch.zeros(rows, vocabulary), seed=seed, sequence_ids=ids, positions=positions)
    words = random_words(torch.tensor(seed), ids, positions, vocabulary)
    noise = gumbel_noise(words)
    assert torch.equal(drawn.tokens, noise.argmax(-1))
