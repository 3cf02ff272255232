"""Training tools that know nothing of preferences."""

from typing import TYPE_CHECKING

from moslim.utils.exports import lazy_exports

if TYPE_CHECKING:
    from moslim.optim import FiniteWeights as FiniteWeights
    from moslim.optim import PlateauSteps as PlateauSteps
    from moslim.optim import WarmupDecay as WarmupDecay
    from moslim.trainer import MoslimTrainer as MoslimTrainer

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "FiniteWeights": "moslim.optim",
        "MoslimTrainer": "moslim.trainer",
        "PlateauSteps": "moslim.optim",
        "WarmupDecay": "moslim.optim",
    },
)
