"""One row with two dialogues that part at their last turn."""

from __future__ import annotations

from moslim.data.sources.chats import split_turns
from moslim.data.sources.fields import require
from moslim.data.sources.layouts.base import Layout
from moslim.data.sources.notices import Notices
from moslim.data.sources.records import Record
from moslim.data.types import Message
from moslim.errors import UsageError
from moslim.literals import quoted


class Dialogues(Layout):
    """Two whole dialogues, of which people preferred one, as in HH-RLHF.

    The new rows have the columns ``question`` (the turns that both share, as messages), ``answer`` and ``rejected``
    (their last turns). Dialogues that part earlier are left out, since no single answer was compared, and counted in a
    warning.

    Args:
        chosen: Column of the preferred dialogue.
        rejected: Column of the other.
        user: What stands before a user turn.
        assistant: What stands before an assistant turn.
    """

    def __init__(
        self,
        chosen: str = "chosen",
        rejected: str = "rejected",
        user: str = "\n\nHuman:",
        assistant: str = "\n\nAssistant:",
    ) -> None:
        self.chosen = chosen
        self.rejected = rejected
        self.user = user
        self.assistant = assistant

    def rows(self, records: list[Record]) -> list[Record]:
        """See the base class."""
        notices = Notices()
        rows = []
        for record in records:
            chosen = self._turns(record, self.chosen, "layout.chosen")
            rejected = self._turns(record, self.rejected, "layout.rejected")
            if not _part_at_the_last_answer(chosen, rejected):
                notices.add("left out, since the two dialogues do not part at their last answer", record.place)
                continue
            new = {"question": chosen[:-1], "answer": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
            rows.append(Record(record.place, {**record.fields, **new}))
        notices.warn(len(records))
        return rows

    def _turns(self, record: Record, column: str, argument: str) -> list[Message]:
        text = require(record, column, argument)
        if not isinstance(text, str):
            raise UsageError(f"{record.place}, field '{column}': the dialogue is {quoted(text)}, not a text")
        return split_turns(text, self.user, self.assistant)


def _part_at_the_last_answer(chosen: list[Message], rejected: list[Message]) -> bool:
    ends = [message["role"] for message in (*chosen[-2:], *rejected[-2:])]
    return ends == ["user", "assistant"] * 2 and chosen[:-1] == rejected[:-1]
