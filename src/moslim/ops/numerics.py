"""Precision of values computed from model outputs, stateless random numbers, and evenly spaced indices.

Values are computed in float32, or in the model's type where that is finer. Each random draw is a function of its seed
alone, so that an interrupted run can be resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The finer of a type and float32, in which losses, log-probabilities and rewards are held."""
    return torch.promote_types(dtype, torch.float32)


def widened(values: Tensor) -> Tensor:
    """Values in float32, or as they are where they are float64."""
    return values.to(at_least_float32(values.dtype))


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes as outside any precision of the run: in the type of the operands, and with float32 for new tensors.

    Autocast makes every matrix product, also one that counts rows, a product in bfloat16 or float16, and Lightning's
    ``bf16-true`` and ``16-true`` make tensors without a given type so. Can be used as a decorator.
    """
    default = torch.get_default_dtype()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    with ExitStack() as stack:
        for kind in {"cpu", *([accelerator.type] if accelerator else [])}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if default != at_least_float32(default):
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, default)
        yield


def apply_wide(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Applies a layer in float32 or finer, whatever the run's precision, also where its weights are held in less.

    Args:
        layer: A module of linear layers, with weights of one type.
        inputs: Its input, in any type.
    """
    weights = dict(layer.named_parameters())
    dtype = at_least_float32(next(iter(weights.values())).dtype)
    coarse = {name: weight.to(dtype) for name, weight in weights.items() if weight.dtype != dtype}
    with full_precision():
        found: Tensor = functional_call(layer, coarse, (inputs.to(dtype),)) if coarse else layer(inputs.to(dtype))
    return found


def nonfinite(name: str, values: Tensor) -> str | None:
    """Finds NaN and infinity in a tensor of any shape."""
    bad = int((~values.isfinite()).sum())
    return f"{name} is not finite in {bad} of {values.numel()} places" if bad else None


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


def evenly_spaced(total: int, count: int) -> list[int]:
    """Returns ``count`` of ``total`` indices at equal distances, the first included, or all if there are fewer."""
    count = min(count, total)
    return [number * total // count for number in range(count)]
