"""Data: sources, layouts of their rows, samplers of preferences, and the data module."""

from typing import TYPE_CHECKING

from moslim.utils import lazy_exports

if TYPE_CHECKING:
    from moslim.data.prompt_batches import EvaluationKind as EvaluationKind
    from moslim.data.samplers import Curriculum as Curriculum
    from moslim.data.samplers import ErrorWeighted as ErrorWeighted
    from moslim.data.samplers import PreferenceSampler as PreferenceSampler
    from moslim.data.samplers import Reachable as Reachable
    from moslim.data.samplers import Uniform as Uniform
    from moslim.data.sources.combined import ComparisonsFromRatings as ComparisonsFromRatings
    from moslim.data.sources.combined import ConcatSource as ConcatSource
    from moslim.data.sources.conversations import ChatFormat as ChatFormat
    from moslim.data.sources.conversations import Messages as Messages
    from moslim.data.sources.conversations import PlainText as PlainText
    from moslim.data.sources.conversations import Turns as Turns
    from moslim.data.sources.layouts import Dialogues as Dialogues
    from moslim.data.sources.layouts import Each as Each
    from moslim.data.sources.layouts import Escaped as Escaped
    from moslim.data.sources.layouts import Layout as Layout
    from moslim.data.sources.layouts import Pattern as Pattern
    from moslim.data.sources.layouts import Replies as Replies
    from moslim.data.sources.layouts import SideBySide as SideBySide
    from moslim.data.sources.layouts import Verdict as Verdict
    from moslim.data.sources.table import Table as Table
    from moslim.data.sources.workbench import Workbench as Workbench
    from moslim.data.types import Example as Example
    from moslim.data.types import RowKind as RowKind
    from moslim.data.types import Source as Source
    from moslim.data.types import Split as Split
    from moslim.data.views import BatchView as BatchView
    from moslim.data.views import InstructedTextView as InstructedTextView
    from moslim.data.views import PolicyView as PolicyView
    from moslim.data.views import RewardView as RewardView
    from moslim.data.views import ServedModule as ServedModule
    from moslim.data.views import TextView as TextView

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "BatchView": "moslim.data.views",
        "ChatFormat": "moslim.data.sources.conversations",
        "ComparisonsFromRatings": "moslim.data.sources.combined",
        "ConcatSource": "moslim.data.sources.combined",
        "Curriculum": "moslim.data.samplers",
        "Dialogues": "moslim.data.sources.layouts",
        "Each": "moslim.data.sources.layouts",
        "ErrorWeighted": "moslim.data.samplers",
        "Escaped": "moslim.data.sources.layouts",
        "EvaluationKind": "moslim.data.prompt_batches",
        "Example": "moslim.data.types",
        "InstructedTextView": "moslim.data.views",
        "Layout": "moslim.data.sources.layouts",
        "Messages": "moslim.data.sources.conversations",
        "Pattern": "moslim.data.sources.layouts",
        "PlainText": "moslim.data.sources.conversations",
        "PolicyView": "moslim.data.views",
        "PreferenceSampler": "moslim.data.samplers",
        "Reachable": "moslim.data.samplers",
        "Replies": "moslim.data.sources.layouts",
        "RewardView": "moslim.data.views",
        "RowKind": "moslim.data.types",
        "ServedModule": "moslim.data.views",
        "Source": "moslim.data.types",
        "Split": "moslim.data.types",
        "Table": "moslim.data.sources.table",
        "TextView": "moslim.data.views",
        "Turns": "moslim.data.sources.conversations",
        "SideBySide": "moslim.data.sources.layouts",
        "Uniform": "moslim.data.samplers",
        "Verdict": "moslim.data.sources.layouts",
        "Workbench": "moslim.data.sources.workbench",
    },
)
