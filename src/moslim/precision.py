"""The precision of what is computed from a model's outputs: float32, or the model's own where that is finer."""

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
