"""Methods whose gain is not measured yet on the hardware that they are meant for. No other package imports them."""

from typing import TYPE_CHECKING

from moslim.utils import lazy_exports

if TYPE_CHECKING:
    from moslim.experimental.faster_generation import OneStepOff as OneStepOff
    from moslim.experimental.faster_generation import StaticTorchEngine as StaticTorchEngine

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "OneStepOff": "moslim.experimental.faster_generation",
        "StaticTorchEngine": "moslim.experimental.faster_generation",
    },
)
