"""Operations on tensors and models."""

from typing import TYPE_CHECKING

from moslim.utils.exports import lazy_exports

if TYPE_CHECKING:
    from moslim.ops.lora import LoraOptions as LoraOptions

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "LoraOptions": "moslim.ops.lora",
    },
)
