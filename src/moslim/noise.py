"""Randomness without state: every draw is a function of what it is for, so that a run can be cut and resumed."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA, _MUL1, _MUL2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def derive_seed(*keys: int) -> int:
    """Mixes integers into one seed in ``[0, 2**63)`` (SplitMix64's finaliser; Steele et al. 2014)."""
    h = _GAMMA
    for key in keys:
        h = (h ^ ((key + _GAMMA) & _MASK)) & _MASK
        h = ((h ^ (h >> 30)) * _MUL1) & _MASK
        h = ((h ^ (h >> 27)) * _MUL2) & _MASK
        h ^= h >> 31
    return h >> 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own is arithmetic on int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(row_seeds: Tensor, length: int) -> Tensor:
    """Uniform numbers in ``[0, 1)``, one per row and token.

    A row's numbers depend on its seed alone: neither the batch it is in, nor its place there, nor the number
    of processes changes them.

    Args:
        row_seeds: ``[B]`` int64, e.g. from :func:`derive_seed`.
        length: Number of tokens ``T``.

    Returns:
        ``[B, T]`` float32 with 24 random bits each.
    """
    counter = torch.arange(1, length + 1, dtype=torch.int64, device=row_seeds.device)
    x = row_seeds[:, None] + counter * _signed(_GAMMA)
    x = (x ^ _shift(x, 30)) * _signed(_MUL1)
    x = (x ^ _shift(x, 27)) * _signed(_MUL2)
    x = x ^ _shift(x, 31)
    return _shift(x, 40).float() * 2.0**-24
