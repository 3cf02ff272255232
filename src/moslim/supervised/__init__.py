"""Plain language-model fine-tuning: starter models and baselines."""

from typing import TYPE_CHECKING

from moslim.utils.exports import lazy_exports

if TYPE_CHECKING:
    from moslim.models import Architecture as Architecture
    from moslim.models import PretrainedTokenizer as PretrainedTokenizer
    from moslim.models import TokenizerSource as TokenizerSource
    from moslim.models import WorkbenchTokenizer as WorkbenchTokenizer

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Architecture": "moslim.models",
        "PretrainedTokenizer": "moslim.models",
        "TokenizerSource": "moslim.models",
        "WorkbenchTokenizer": "moslim.models",
    },
)
