"""Layouts: what makes question-answer rows of a table whose rows are something else."""

from moslim.data.sources.layouts.base import Layout
from moslim.data.sources.layouts.dialogues import Dialogues
from moslim.data.sources.layouts.each import Each
from moslim.data.sources.layouts.escaped import Escaped
from moslim.data.sources.layouts.pattern import Pattern
from moslim.data.sources.layouts.replies import Replies
from moslim.data.sources.layouts.two_answers import TwoAnswers, Verdict

__all__ = ["Dialogues", "Each", "Escaped", "Layout", "Pattern", "Replies", "TwoAnswers", "Verdict"]
