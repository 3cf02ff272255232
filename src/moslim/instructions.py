"""How a preference is written into a prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from string import Formatter

from moslim.data.types import Message
from moslim.preferences import Preference, PreferenceSet
from moslim.utils.errors import UsageError

OPENING, CLOSING = "[[", "]]"
"""Delimiters of the shipped instructions. They are ordinary text but for what an instruction in use writes in them."""

_PROBE = "a question in the place of all"


def level_words(preference: Preference, preferences: PreferenceSet) -> list[tuple[str, str]]:
    """Returns (dimension name, level name) of what a preference asks for, in the order of the set.

    Raises:
        UsageError: See :meth:`PreferenceSet.check`.
    """
    preferences.check(preference)
    return [
        (d.name, d.levels[preference.levels[d.name]]) for d in preferences.dimensions if d.name in preference.levels
    ]


class PreferenceInstruction(ABC):
    """Writes a preference into a chat. Subclass it, and name the subclass under ``data.instruction``."""

    reserved: tuple[str, ...] = ()
    """Strings by which the policy recognises the instruction. They are taken out of every question and answer."""

    @abstractmethod
    def render(self, messages: list[Message], preference: Preference, preferences: PreferenceSet) -> list[Message]:
        """Returns a new chat that holds the instruction. An empty preference returns the chat as it is.

        Args:
            messages: The neutralised question; its last message is a user turn.
            preference: The levels asked for.
            preferences: The dimensions in use, which name the levels.
        """

    def forms(self, preferences: PreferenceSet) -> dict[str, str]:
        """Returns further texts that read as this instruction, with what is left of each in questions and answers.

        What :meth:`render` writes for a single level, and ``reserved``, are known without it (:func:`readings`). Case,
        white space and look-alike characters do not count.

        Args:
            preferences: The dimensions in use.
        """
        return {}


def readings(instruction: PreferenceInstruction, preferences: PreferenceSet) -> dict[str, str]:
    """Returns every text that reads as an instruction, with what is left of it in questions and answers.

    It is what the instruction writes for each single level, without what it writes for all of them, and its ``forms``.
    """
    written: list[list[str]] = []
    with suppress(UsageError):  # the run's own prompts will say it, if there are any
        for dimension in preferences.dimensions:
            for level in range(len(dimension.levels)):
                chat: list[Message] = [{"role": "user", "content": _PROBE}]
                messages = instruction.render(chat, Preference({dimension.name: level}), preferences)
                texts = [part.strip() for message in messages for part in message["content"].split(_PROBE)]
                written.append([text for text in texts if text])
    found = {text: "" for texts in written for text in texts if not all(text in others for others in written)}
    return found | instruction.forms(preferences)


class SystemMessage(PreferenceInstruction):
    """A system message such as ``[[Preferences]] verbosity: short, warmth: friendly``.

    A system message that the question already has is kept, and the instruction is appended to it. Where the chat
    template knows no system role, the renderer moves it to the first user turn.
    """

    def render(self, messages: list[Message], preference: Preference, preferences: PreferenceSet) -> list[Message]:
        """See the base class."""
        if not preference:
            return list(messages)
        words = ", ".join(f"{name}: {level}" for name, level in level_words(preference, preferences))
        text = f"{OPENING}Preferences{CLOSING} {words}"
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": text}, *messages]
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]

    def forms(self, preferences: PreferenceSet) -> dict[str, str]:
        """``[[Preferences]]``, which loses its brackets."""
        return {f"{OPENING}Preferences{CLOSING}": "Preferences"}


class Tags(PreferenceInstruction):
    """Compact tags before the last user turn, such as ``[[verbosity: short]] [[warmth: friendly]] How do I ...``.

    Args:
        names: Whether a tag names its dimension. ``[[short]]`` is enough where no two dimensions share a level name.
    """

    def __init__(self, names: bool = True) -> None:
        self.names = names

    def text(self, preference: Preference, preferences: PreferenceSet) -> str:
        """Returns the tags alone, one space between two.

        Raises:
            UsageError: ``names`` is off, and two dimensions share a level name.
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
        """Each tag, which loses its brackets; also one that is open at an end, if it names its dimension."""
        forms = {}
        for dimension in preferences.dimensions:
            for level in dimension.levels:
                words = f"{dimension.name}: {level}" if self.names else level
                forms[f"{OPENING}{words}{CLOSING}"] = words
                if self.names:
                    forms |= {f"{OPENING}{words}": words, f"{words}{CLOSING}": words}
        return forms


class Template(PreferenceInstruction):
    """The user's own wording around the last user turn, e.g. ``Please answer like this: {preferences}. {question}``.

    ``{preferences}`` becomes ``verbosity: short, warmth: friendly``. Nothing else can be filled in.

    Args:
        text: The wording, with ``{question}`` and ``{preferences}`` once each; ``{{`` and ``}}`` stand for braces.
        reserved: Strings of the wording that are to be taken out of every question and answer.

    Raises:
        UsageError: A placeholder is missing, repeated or unknown, or asks for an attribute, item or format.
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
        plain = all(not spec and not conversion for _, _, spec, conversion in parts)
        if sorted(fields) != ["preferences", "question"] or not plain:
            raise UsageError(
                f"instruction template {text!r} has placeholders {fields}: "
                "it must hold {question} and {preferences}, each exactly once and plain, and no other"
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
        words = ", ".join(f"{name}: {level}" for name, level in level_words(preference, preferences))
        values = {"question": last["content"], "preferences": words}
        content = "".join(literal + (values[name] if name else "") for literal, name in self._parts)
        return [*before, {"role": last["role"], "content": content}]

    def forms(self, preferences: PreferenceSet) -> dict[str, str]:
        """Each level in the wording: behind what stands before ``{preferences}`` or else before what follows it."""
        before, after = self._around
        words = [f"{dimension.name}: {level}" for dimension in preferences.dimensions for level in dimension.levels]
        if before:
            return {f"{before} {level}": level for level in words}
        return {f"{level} {after}": level for level in words} if after else dict.fromkeys(words, "")


def sample_prompts(
    instruction: PreferenceInstruction, preferences: PreferenceSet
) -> dict[str, dict[str, list[Message]]]:
    """Prompts by which another instruction, or another wording of the same one, is noticed.

    Returns:
        ``prompts``, a chat by what it asks for; nothing where an instruction is worded anew each time.
    """
    tops = {dimension.name: len(dimension.levels) - 1 for dimension in preferences.dimensions}
    single = [{name: level} for name, top in tops.items() for level in range(top + 1)]
    question: list[Message] = [{"role": "user", "content": "How do I make tea?"}]
    longer = [{"role": "system", "content": "Be kind."}, *question, {"role": "assistant", "content": "So."}, *question]

    def render() -> dict[str, list[Message]]:
        chats = {str(levels): instruction.render(question, Preference(levels), preferences) for levels in single}
        return {**chats, "all": instruction.render(longer, Preference(tops), preferences)}

    prompts = render()
    return {"prompts": prompts} if prompts == render() else {}


def _refuse_shared_level_names(preferences: PreferenceSet) -> None:
    owner: dict[str, str] = {}
    for dimension in preferences.dimensions:
        for level in dimension.levels:
            if level in owner:
                raise UsageError(
                    f"dimensions '{owner[level]}' and '{dimension.name}' both have a level '{level}': "
                    "rename one, or use Tags with names: true"
                )
            owner[level] = dimension.name
