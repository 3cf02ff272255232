"""Instructions: the text that requests a preference in a prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from string import Formatter

from moslim.data.types import Message
from moslim.preferences import Preference, PreferenceSet
from moslim.utils.errors import UsageError

OPENING, CLOSING = "[[", "]]"
"""Delimiters of the shipped instructions. Elsewhere in questions and answers they are ordinary text."""

_SAMPLE_QUESTION = "a question in the place of all"


def level_words(preference: Preference, preferences: PreferenceSet) -> list[tuple[str, str]]:
    """Returns (dimension name, level name) of each requested level, in the order of the set.

    Raises:
        UsageError: See :meth:`PreferenceSet.check`.
    """
    preferences.check(preference)
    return [
        (d.name, d.levels[preference.levels[d.name]]) for d in preferences.dimensions if d.name in preference.levels
    ]


class PreferenceInstruction(ABC):
    """Base class of instructions. Subclass it, and name the subclass under ``data.instruction``."""

    reserved: tuple[str, ...] = ()
    """Strings that mark the instruction. They are removed from every question and answer."""

    @abstractmethod
    def render(self, messages: list[Message], preference: Preference, preferences: PreferenceSet) -> list[Message]:
        """Returns a new chat with the instruction. An empty preference leaves the chat unchanged.

        Args:
            messages: Sanitised question, which ends with a user turn.
            preference: Requested levels.
            preferences: Dimensions in use, with the names of their levels.
        """

    def forms(self, preferences: PreferenceSet) -> dict[str, str]:
        """Returns further texts that read as this instruction, each with its replacement in questions and answers.

        ``reserved`` and the output of :meth:`render` for single levels are always replaced, too. Case, white space and
        look-alike characters are ignored in the comparison.

        Args:
            preferences: Dimensions in use.
        """
        return {}


def instruction_forms(instruction: PreferenceInstruction, preferences: PreferenceSet) -> dict[str, str]:
    """Returns every text that reads as an instruction, with its replacement in questions and answers.

    These are the ``forms`` of the instruction, and the texts that it writes for some but not for all single levels.
    """
    texts_by_level: list[list[str]] = []
    with suppress(UsageError):  # the prompts of the run raise the same error
        for dimension in preferences.dimensions:
            for level in range(len(dimension.levels)):
                chat: list[Message] = [{"role": "user", "content": _SAMPLE_QUESTION}]
                messages = instruction.render(chat, Preference({dimension.name: level}), preferences)
                texts = [part.strip() for message in messages for part in message["content"].split(_SAMPLE_QUESTION)]
                texts_by_level.append([text for text in texts if text])
    all_texts = [text for texts in texts_by_level for text in texts]
    distinctive = {text: "" for text in all_texts if not all(text in texts for texts in texts_by_level)}
    return distinctive | instruction.forms(preferences)


class SystemMessage(PreferenceInstruction):
    """A system message such as ``[[Preferences]] verbosity: short, warmth: friendly``.

    An existing system message is kept, and the instruction is appended to it. If the chat template has no system role,
    the renderer moves the message into the first user turn.
    """

    def render(self, messages: list[Message], preference: Preference, preferences: PreferenceSet) -> list[Message]:
        """See the base class."""
        if not preference:
            return list(messages)
        levels = ", ".join(f"{name}: {level}" for name, level in level_words(preference, preferences))
        text = f"{OPENING}Preferences{CLOSING} {levels}"
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": text}, *messages]
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]

    def forms(self, preferences: PreferenceSet) -> dict[str, str]:
        """Returns ``[[Preferences]]``, which loses its brackets."""
        return {f"{OPENING}Preferences{CLOSING}": "Preferences"}


class Tags(PreferenceInstruction):
    """Compact tags before the last user turn, such as ``[[verbosity: short]] [[warmth: friendly]] How do I ...``.

    Args:
        names: Whether a tag names its dimension. ``[[short]]`` is enough where no two dimensions share a level name.
    """

    def __init__(self, names: bool = True) -> None:
        self.names = names

    def text(self, preference: Preference, preferences: PreferenceSet) -> str:
        """Returns the tags, separated by spaces.

        Raises:
            UsageError: ``names`` is false, and two dimensions share a level name.
        """
        if not self.names:
            _refuse_shared_level_names(preferences)
        words = level_words(preference, preferences)
        return " ".join(f"{OPENING}{f'{name}: ' if self.names else ''}{level}{CLOSING}" for name, level in words)

    def render(self, messages: list[Message], preference: Preference, preferences: PreferenceSet) -> list[Message]:
        """See the base class."""
        if not preference:
            return list(messages)
        *before, last = messages
        return [*before, {"role": last["role"], "content": f"{self.text(preference, preferences)} {last['content']}"}]

    def forms(self, preferences: PreferenceSet) -> dict[str, str]:
        """Returns each tag, which loses its brackets; also half-open tags if they name their dimension."""
        forms = {}
        for dimension in preferences.dimensions:
            for level in dimension.levels:
                text = f"{dimension.name}: {level}" if self.names else level
                forms[f"{OPENING}{text}{CLOSING}"] = text
                if self.names:
                    forms |= {f"{OPENING}{text}": text, f"{text}{CLOSING}": text}
        return forms


class Template(PreferenceInstruction):
    """Custom wording around the last user turn, e.g. ``Please answer like this: {preferences}. {question}``.

    ``{preferences}`` becomes ``verbosity: short, warmth: friendly``. There are no other placeholders.

    Args:
        text: Wording with ``{question}`` and ``{preferences}`` once each; ``{{`` and ``}}`` are literal braces.
        reserved: Strings of the wording to remove from every question and answer.

    Raises:
        UsageError: A placeholder is missing, repeated or unknown, or has an attribute, item or format.
    """

    def __init__(self, text: str, reserved: Sequence[str] = ()) -> None:
        self.wording = text
        self.reserved = tuple(reserved)
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise UsageError(
                f"instruction template {text!r}: {error}; write a literal brace as '{{{{' or '}}}}'"
            ) from error
        fields = [name for _, name, _, _ in parts if name is not None]
        unformatted = all(not spec and not conversion for _, _, spec, conversion in parts)
        if sorted(fields) != ["preferences", "question"] or not unformatted:
            raise UsageError(
                f"instruction template {text!r} has placeholders {fields}: "
                "give {question} and {preferences} once each, without a format, and no other"
            )
        self._parts = [(literal, name) for literal, name, _, _ in parts]
        literals = [""]  # before, between and after the two placeholders
        for literal, name in self._parts:
            literals[-1] += literal
            literals += [""] if name else []
        place = fields.index("preferences")
        self._around = literals[place].strip(), literals[place + 1].strip()

    def render(self, messages: list[Message], preference: Preference, preferences: PreferenceSet) -> list[Message]:
        """See the base class."""
        if not preference:
            return list(messages)
        *before, last = messages
        levels = ", ".join(f"{name}: {level}" for name, level in level_words(preference, preferences))
        values = {"question": last["content"], "preferences": levels}
        content = "".join(literal + (values[name] if name else "") for literal, name in self._parts)
        return [*before, {"role": last["role"], "content": content}]

    def forms(self, preferences: PreferenceSet) -> dict[str, str]:
        """Returns each level after the text before ``{preferences}``, or else before the text that follows it."""
        before, after = self._around
        levels = [f"{dimension.name}: {level}" for dimension in preferences.dimensions for level in dimension.levels]
        if before:
            return {f"{before} {level}": level for level in levels}
        return {f"{level} {after}": level for level in levels} if after else dict.fromkeys(levels, "")


def sample_prompts(
    instruction: PreferenceInstruction, preferences: PreferenceSet
) -> dict[str, dict[str, list[Message]]]:
    """Returns sample prompts, by which a checkpoint detects a changed instruction.

    Returns:
        ``prompts``: chat by requested levels. Empty if the instruction has random wording.
    """
    highest = {dimension.name: len(dimension.levels) - 1 for dimension in preferences.dimensions}
    single_levels = [{name: level} for name, last in highest.items() for level in range(last + 1)]
    question: list[Message] = [{"role": "user", "content": "How do I make tea?"}]
    dialogue = [
        {"role": "system", "content": "Be kind."},
        *question,
        {"role": "assistant", "content": "So."},
        *question,
    ]

    def render() -> dict[str, list[Message]]:
        chats = {str(levels): instruction.render(question, Preference(levels), preferences) for levels in single_levels}
        return {**chats, "all": instruction.render(dialogue, Preference(highest), preferences)}

    prompts = render()
    return {"prompts": prompts} if prompts == render() else {}


def _refuse_shared_level_names(preferences: PreferenceSet) -> None:
    """Raises an error if two dimensions have a level of the same name."""
    dimension_by_level: dict[str, str] = {}
    for dimension in preferences.dimensions:
        for level in dimension.levels:
            if level in dimension_by_level:
                raise UsageError(
                    f"dimensions '{dimension_by_level[level]}' and '{dimension.name}' both have a level '{level}': "
                    "rename one, or use Tags with names: true"
                )
            dimension_by_level[level] = dimension.name
