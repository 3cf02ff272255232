"""Operations on tensors and models."""

from typing import TYPE_CHECKING

from moslim.utils import lazy_exports

if TYPE_CHECKING:
    from moslim.ops.logprobs import ForwardConfig as ForwardConfig
    from moslim.ops.lora import LoraOptions as LoraOptions
    from moslim.ops.models import Architecture as Architecture
    from moslim.ops.models import PretrainedTokenizer as PretrainedTokenizer
    from moslim.ops.models import TokenizerSource as TokenizerSource
    from moslim.ops.models import WorkbenchTokenizer as WorkbenchTokenizer

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Architecture": "moslim.ops.models",
        "PretrainedTokenizer": "moslim.ops.models",
        "TokenizerSource": "moslim.ops.models",
        "WorkbenchTokenizer": "moslim.ops.models",
        "ForwardConfig": "moslim.ops.logprobs",
        "LoraOptions": "moslim.ops.lora",
    },
)
