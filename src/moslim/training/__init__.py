"""Training tools that know nothing of preferences."""

from typing import TYPE_CHECKING

from moslim.utils import lazy_exports

if TYPE_CHECKING:
    from moslim.training.optim import FiniteWeights as FiniteWeights
    from moslim.training.optim import PlateauSteps as PlateauSteps
    from moslim.training.optim import WarmupDecay as WarmupDecay
    from moslim.training.trainer import MoslimTrainer as MoslimTrainer

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "FiniteWeights": "moslim.training.optim",
        "MoslimTrainer": "moslim.training.trainer",
        "PlateauSteps": "moslim.training.optim",
        "WarmupDecay": "moslim.training.optim",
    },
)
