"""The last layer of a language model, packed for the few rows of a sampling step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moslim.ops.transformers_compat import can_pack_linear, packed_linear

_LARGE = 1 << 20
"""Weights from which on a copy pays. A smaller layer stays in a CPU's cache."""


@contextmanager
def packed_head(model: Any, rows: int) -> Iterator[None]:
    """Lets a model on a CPU read a copy of its last layer in oneDNN's packed order, as Inductor's frozen models do.

    Torch's own product of few rows with ``[V, H]`` weights is limited by how they lie in memory. The weights must not
    change meanwhile.

    Args:
        model: Causal language model in the Hugging Face form. Heads of a kind of their own, and other types of numbers
            than float32, are left alone.
        rows: How many rows to pack for; others work, too.
    """
    head = model.get_output_embeddings()
    weight = head.weight if type(head) is nn.Linear and head.bias is None else None
    if type(weight) is not nn.Parameter or not _packs(weight):
        yield
        return
    head.forward = packed_linear(weight, rows)
    try:
        yield
    finally:
        del head.forward


def _packs(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    large = weight.dtype == torch.float32 and weight.numel() >= _LARGE
    return on_cpu and large and can_pack_linear()
