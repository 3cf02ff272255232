"""Heads that are networks of their own, as an alternative to slices of one linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moslim.errors import UsageError


class HeadLinear(nn.Linear):
    """A layer whose weights are drawn by its width, as in torch; transformers' 0.02 is too little for a narrow one."""


@dataclass(frozen=True)
class HeadShape:
    """The network of one head.

    Args:
        outputs: Number of outputs.
        hidden: Width of its hidden layer; None = a single linear layer.
        dropout: Dropout on the hidden layer.
    """

    outputs: int
    hidden: int | None = None
    dropout: float = 0.0


class OwnHeads(nn.ModuleDict):
    """One network per dimension, under the dimension's name.

    Args:
        inputs: Width ``H`` of the features.
        shapes: The network's shape, by dimension name.

    Raises:
        UsageError: A dimension has a name that a module cannot have.
    """

    def __init__(self, inputs: int, shapes: Mapping[str, HeadShape]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            try:
                self[name] = _network(inputs, shape)
            except KeyError as error:
                raise UsageError(f"the head of dimension '{name}' cannot bear its name, rename it: {error}") from None

    def forward(self, features: Tensor) -> Tensor:
        """Returns the outputs of all heads, side by side, of features ``[B, H]``."""
        return torch.cat([head(features) for head in self.values()], dim=-1)


def _network(inputs: int, shape: HeadShape) -> nn.Module:
    if shape.hidden is None:
        return HeadLinear(inputs, shape.outputs)
    return nn.Sequential(
        HeadLinear(inputs, shape.hidden), nn.GELU(), nn.Dropout(shape.dropout), HeadLinear(shape.hidden, shape.outputs)
    )
