"""How the raw outputs of a head become level probabilities: one output per level, per threshold, or a single one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moslim.levels import expected_level

LinkName = Literal["softmax", "corn", "regression"]


class Link(ABC):
    """What stands between a head's raw scores ``[B, D, S]`` and its level probabilities.

    ``S`` is the largest width of a head; ``-inf`` fills up the narrower ones.
    """

    @abstractmethod
    def width(self, levels: int) -> int:
        """Number of outputs of a head with ``levels`` levels."""

    @abstractmethod
    def logits(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """Logits ``[B, D, K]`` whose softmax are the level probabilities; ``-inf`` on levels that a head lacks.

        Args:
            scores: ``[B, D, S]``.
            sizes: Number of levels of each of the ``D`` heads.
        """

    def expected(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """Expected level ``[B, D]`` of scores ``[B, D, S]``."""
        return expected_level(self.logits(scores, sizes).softmax(-1))


class SoftmaxLink(Link):
    """One output per level: scores are logits."""

    def width(self, levels: int) -> int:
        """See the base class."""
        return levels

    def logits(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        return scores


class CornLink(Link):
    """One output ``z_k`` per threshold: ``sigmoid(z_k) = P(y > k | y >= k)`` (CORN, arXiv 2111.08851).

    ``P(y > k)`` is the product of ``sigmoid(z_0) .. sigmoid(z_k)``, and ``P(y = k)`` the difference of two successive
    ones, ``P(y > k-1) * sigmoid(-z_k)``: as a product, it is exact in logarithms.
    """

    def width(self, levels: int) -> int:
        """See the base class."""
        return levels - 1

    def logits(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class; these logits are log-probabilities."""
        # A threshold that a head lacks has z = -inf: no level is above it, and its level itself is certain.
        reached = F.pad(F.logsigmoid(scores).cumsum(-1), (1, 0))
        stopped = F.pad(F.logsigmoid(-scores), (0, 1))
        return reached + stopped


class RegressionLink(Link):
    """A single output: the level, as distance from the middle of the scale, so that 0 is a neutral start.

    Its distribution is on the two levels next to it and has the output, clamped to the scale, as its expectation. Other
    levels keep a probability of 1e-7, so that logits are finite.
    """

    def width(self, levels: int) -> int:
        """See the base class."""
        return 1

    def logits(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class; these logits are log-probabilities."""
        highest = scores.new_tensor(sizes) - 1
        level = self.expected(scores, sizes).clamp(min=0).minimum(highest)[..., None]
        distance = (level - torch.arange(max(sizes), device=scores.device)).abs()
        return (1 - distance).clamp(min=1e-7).log().masked_fill(lacking(sizes, scores.device), -torch.inf)

    def expected(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """The level as it was put out; not clamped, as the gradient would vanish beyond the ends of the scale."""
        return scores[..., 0] + (scores.new_tensor(sizes) - 1) / 2


LINKS: Mapping[LinkName, Link] = {"softmax": SoftmaxLink(), "corn": CornLink(), "regression": RegressionLink()}


def lacking(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Returns ``[D, K]`` bool: True where a dimension has no such level."""
    return torch.arange(max(sizes), device=device) >= torch.tensor(sizes, device=device)[:, None]
