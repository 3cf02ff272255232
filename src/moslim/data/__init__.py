"""Data: sources, layouts of their rows, samplers of preferences, and the data module."""

from typing import TYPE_CHECKING

from moslim.utils.exports import lazy_exports

if TYPE_CHECKING:
    from moslim.data.requests import EvaluationKind as EvaluationKind
    from moslim.data.sources.base import Source as Source
    from moslim.data.sources.chats import ChatFormat as ChatFormat
    from moslim.data.sources.chats import Messages as Messages
    from moslim.data.sources.chats import PlainText as PlainText
    from moslim.data.sources.chats import Turns as Turns
    from moslim.data.sources.layouts import Dialogues as Dialogues
    from moslim.data.sources.layouts import Each as Each
    from moslim.data.sources.layouts import Escaped as Escaped
    from moslim.data.sources.layouts import Layout as Layout
    from moslim.data.sources.layouts import Pattern as Pattern
    from moslim.data.sources.layouts import Replies as Replies
    from moslim.data.sources.layouts import TwoAnswers as TwoAnswers
    from moslim.data.sources.layouts import Verdict as Verdict
    from moslim.data.sources.rivals import ComparisonsFromRatings as ComparisonsFromRatings
    from moslim.data.sources.several import ConcatSource as ConcatSource
    from moslim.data.sources.table import Table as Table
    from moslim.data.sources.workbench import Workbench as Workbench
    from moslim.data.types import Example as Example
    from moslim.data.types import RowKind as RowKind
    from moslim.data.types import Split as Split
    from moslim.data.views import BatchView as BatchView
    from moslim.data.views import InstructedTextView as InstructedTextView
    from moslim.data.views import PolicyView as PolicyView
    from moslim.data.views import RewardView as RewardView
    from moslim.data.views import ServedModule as ServedModule
    from moslim.data.views import TextView as TextView
    from moslim.sampling import Curriculum as Curriculum
    from moslim.sampling import ErrorWeighted as ErrorWeighted
    from moslim.sampling import PreferenceSampler as PreferenceSampler
    from moslim.sampling import Reachable as Reachable
    from moslim.sampling import Uniform as Uniform

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "BatchView": "moslim.data.views",
        "ChatFormat": "moslim.data.sources.chats",
        "ComparisonsFromRatings": "moslim.data.sources.rivals",
        "ConcatSource": "moslim.data.sources.several",
        "Curriculum": "moslim.sampling",
        "Dialogues": "moslim.data.sources.layouts",
        "Each": "moslim.data.sources.layouts",
        "ErrorWeighted": "moslim.sampling",
        "Escaped": "moslim.data.sources.layouts",
        "EvaluationKind": "moslim.data.requests",
        "Example": "moslim.data.types",
        "InstructedTextView": "moslim.data.views",
        "Layout": "moslim.data.sources.layouts",
        "Messages": "moslim.data.sources.chats",
        "Pattern": "moslim.data.sources.layouts",
        "PlainText": "moslim.data.sources.chats",
        "PolicyView": "moslim.data.views",
        "PreferenceSampler": "moslim.sampling",
        "Reachable": "moslim.sampling",
        "Replies": "moslim.data.sources.layouts",
        "RewardView": "moslim.data.views",
        "RowKind": "moslim.data.types",
        "ServedModule": "moslim.data.views",
        "Source": "moslim.data.sources.base",
        "Split": "moslim.data.types",
        "Table": "moslim.data.sources.table",
        "TextView": "moslim.data.views",
        "Turns": "moslim.data.sources.chats",
        "TwoAnswers": "moslim.data.sources.layouts",
        "Uniform": "moslim.sampling",
        "Verdict": "moslim.data.sources.layouts",
        "Workbench": "moslim.data.sources.workbench",
    },
)
