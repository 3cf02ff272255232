"""Heads that are networks of their own, as an alternative to slices of one linear layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class HeadLinear(nn.Linear):
    """A layer whose weights are drawn by its width, as in torch; transformers' 0.02 is too little for a narrow one."""


class MlpHeads(nn.ModuleDict):
    """One network with a hidden layer per dimension, under the dimension's name.

    Args:
        inputs: Width ``H`` of the features.
        hidden: Width of each hidden layer.
        outputs: Number of outputs by dimension name.
        dropout: Dropout on the hidden layers.

    Raises:
        ValueError: A dimension has a name that a module cannot have.
    """

    def __init__(self, inputs: int, hidden: int, outputs: Mapping[str, int], dropout: float = 0.0) -> None:
        super().__init__()
        for name, width in outputs.items():
            layers = HeadLinear(inputs, hidden), nn.GELU(), nn.Dropout(dropout), HeadLinear(hidden, width)
            try:
                self[name] = nn.Sequential(*layers)
            except KeyError as error:
                raise ValueError(f"the head of dimension '{name}' cannot bear its name, rename it: {error}") from None

    def forward(self, features: Tensor) -> Tensor:
        """Returns the outputs of all heads, side by side, of features ``[B, H]``."""
        return torch.cat([head(features) for head in self.values()], dim=-1)
