"""Philox 4x32-10 (Salmon et al. 2011) in plain torch: random words as a function of integers."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product; in parts, since int64 holds 63 bits."""
    low_part, high_part = x & 0xFFFF, x >> 16
    low, high = factor * low_part, factor * high_part
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def words(seed: int, items: Tensor, sample: Tensor, step: Tensor, last: int) -> Tensor:
    """The first word of each item.

    Args:
        seed: 64 bits of key.
        items: int64, first word of the counter.
        sample: int64 that broadcasts against it, second word.
        step: int64 of one element, third word.
        last: Fourth word.

    Returns:
        int64 in 0 to 2^32 - 1, of the broadcast shape.
    """
    c0, c1 = torch.broadcast_tensors(items & _WORD, sample & _WORD)
    c2 = (step.reshape(()) & _WORD).expand_as(c0)
    c3 = torch.full_like(c0, last & _WORD)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _product(_M0, c0), _product(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return c0


def gumbel(word: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gumbel noise of random words; u is exact in fp32 and never 0 or 1."""
    u = ((word >> 9).to(dtype) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))
