"""Steerability: judges of achieved levels, measures and reports."""

from typing import TYPE_CHECKING

from moslim.utils import lazy_exports

if TYPE_CHECKING:
    from moslim.evaluation.best_of import BestOf as BestOf
    from moslim.evaluation.judges import ClassifierJudge as ClassifierJudge
    from moslim.evaluation.judges import GoldJudge as GoldJudge
    from moslim.evaluation.judges import Judge as Judge
    from moslim.evaluation.judges import JudgeInfo as JudgeInfo

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "BestOf": "moslim.evaluation.best_of",
        "ClassifierJudge": "moslim.evaluation.judges",
        "GoldJudge": "moslim.evaluation.judges",
        "Judge": "moslim.evaluation.judges",
        "JudgeInfo": "moslim.evaluation.judges",
    },
)
