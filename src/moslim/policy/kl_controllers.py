"""What changes the weight of the KL divergence during training; without one it stays as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from moslim.errors import UsageError
from moslim.plugin import Plugin


class KLController(Plugin, ABC):
    """Multiplies ``kl_coef`` by a factor that follows the divergence. Its state goes into every checkpoint."""

    role: ClassVar[str] = "kl_controller"

    factor: float = 1.0
    """What ``kl_coef`` is multiplied by at present."""

    @abstractmethod
    def observe(self, sequence_kl: float) -> None:
        """Called once per training rollout: the place to change ``factor``.

        Args:
            sequence_kl: Mean over all processes' answers of KL(policy || reference), in nats per answer.
        """

    def state_dict(self) -> dict[str, float]:
        return {"factor": self.factor}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.factor = state_dict["factor"]


class AdaptiveKL(KLController):
    """Steers the divergence to a target by a proportional controller in log space (Ziegler et al. 2019, section 2.2).

    ``error = clip((KL - target) / target, -0.2, 0.2)``, ``factor *= 1 + gain * error`` (arXiv 1909.08593). TRL and
    OpenRLHF write the gain as answers per rollout over a horizon.

    Args:
        target: Wanted divergence in nats per answer.
        gain: Step per rollout, the paper's ``K_beta``.
    """

    def __init__(self, target: float = 6.0, gain: float = 0.1) -> None:
        if target <= 0 or not 0 < gain < 5:
            raise UsageError(
                f"kl_controller: target is {target}, gain is {gain}: give a target above 0, a gain in (0, 5)"
            )
        self.target = target
        self.gain = gain

    def observe(self, sequence_kl: float) -> None:
        error = min(0.2, max(-0.2, (sequence_kl - self.target) / self.target))
        self.factor *= 1 + self.gain * error
