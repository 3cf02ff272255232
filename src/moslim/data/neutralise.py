"""Takes out of a text whatever could be read as a special token or as an instruction."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from moslim.data.types import Message, Question


def fold(text: str) -> str:
    """The form in which texts are compared: compatibility-normalised (NFKC) and case-folded."""
    return text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def special_strings(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """All strings that the tokenizer turns into a special token."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | {str(token) for token in tokenizer.all_special_tokens}


class Neutraliser:
    """Removes strings from a text, however they are written, until none is left.

    Args:
        forbidden: What must not be left. Strings of white space only are ignored.
    """

    def __init__(self, forbidden: Iterable[str]) -> None:
        folded = {fold(string) for string in forbidden}
        folded = {string for string in folded if string.strip()}
        self._longest = max(map(len, folded), default=0)
        # No string at all: a pattern that never matches.
        self._pattern = re.compile("|".join(re.escape(s) for s in sorted(folded, key=len, reverse=True)) or r"(?!)")

    def text(self, text: str) -> str:
        """Returns the text without any forbidden string; one that has none is returned as it is."""
        if not self._found(text):
            return text
        text = self._strip(text)
        while self._found(text):  # it was spelt with combining characters: continue on the composed form
            text = self._strip(unicodedata.normalize("NFKC", text))
        return text

    def question(self, question: Question) -> Question:
        """Applies :meth:`text` to a question, or to the content of each of its messages."""
        if isinstance(question, str):
            return self.text(question)
        return [self.message(message) for message in question]

    def message(self, message: Message) -> Message:
        """Applies :meth:`text` to the content of one message."""
        return {"role": message["role"], "content": self.text(message["content"])}

    def _found(self, text: str) -> bool:
        return self._pattern.search(fold(text)) is not None

    def _strip(self, text: str) -> str:
        """One pass with a stack: what closes up over a removed string is looked at again, in linear time."""
        kept: list[str] = []
        starts: list[int] = []  # where each kept character begins in `folded`
        folded = ""
        for character in text:
            piece = fold(character)
            kept.append(character)
            starts.append(len(folded))
            folded += piece
            offset = max(0, len(folded) - self._longest - len(piece))
            match = self._pattern.search(folded, offset)
            if match:
                while starts and starts[-1] + len(fold(kept[-1])) > match.start():
                    folded = folded[: starts.pop()]
                    kept.pop()
        return "".join(kept)
