"""Methods whose gain has not been measured where they are meant to run. No other package imports them."""

from typing import TYPE_CHECKING

from moslim.utils.exports import lazy_exports

if TYPE_CHECKING:
    from moslim.experimental.one_step_off import OneStepOff as OneStepOff
    from moslim.experimental.static_decoding import StaticTorchEngine as StaticTorchEngine

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {"OneStepOff": "moslim.experimental.one_step_off", "StaticTorchEngine": "moslim.experimental.static_decoding"},
)
