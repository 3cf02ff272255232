"""The file of a best-of-n evaluation: questions with several answers of which one fits what is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moslim.data.prompts import as_messages
from moslim.data.sources.records import Record, read_file
from moslim.data.types import Question
from moslim.errors import MissingFileError, UsageError
from moslim.literals import as_whole_number, quoted
from moslim.preferences import Preference, PreferenceSet


@dataclass(frozen=True)
class Candidates:
    """One prompt of a best-of-n evaluation.

    Args:
        questions: The question as it was asked, then its paraphrases.
        answers: ``n`` answers.
        target: ``[D]`` int64, the levels asked for, -1 = not asked for.
        right: Which answer fits, from 0.
    """

    questions: tuple[Question, ...]
    answers: tuple[str, ...]
    target: Tensor
    right: int


def read_choices(path: str, preferences: PreferenceSet) -> list[Candidates]:
    """Reads JSON Lines, one prompt a line.

        {"question": "How do I grow the fern?", "paraphrases": ["What is the best way to grow the fern?"],
         "answers": ["...", "...", "...", "..."], "preference": {"warmth": 4, "verbosity": 1}, "right": 2}

    ``question`` and ``paraphrases`` are texts or chats; ``paraphrases`` may be left out. ``preference`` holds the
    levels asked for (0 = lowest), which do not stand in the question. ``right`` is the number of the one answer that
    fits, from 0. All lines have the same number of answers, two or more.

    Raises:
        MissingFileError: There is no such file.
        UsageError: A line cannot be used; the message names file, line and field.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"best_of.path: there is no file '{path}' (looked in {Path.cwd()})")
    records = read_file(path)
    choices = [_choice(record, preferences) for record in records]
    n = len(choices[0].answers)
    for record, choice in zip(records, choices, strict=True):
        if len(choice.answers) != n:
            raise UsageError(f"{record.place}: {len(choice.answers)} answers, where the first line has {n}")
    return choices


def _choice(record: Record, preferences: PreferenceSet) -> Candidates:
    fields = record.fields
    asked: Any = fields.get("question")
    answers: Any = fields.get("answers")
    levels: Any = fields.get("preference")
    right: Any = fields.get("right")
    try:
        paraphrases: Any = fields.get("paraphrases") or []
        _check(isinstance(paraphrases, list), "paraphrases", paraphrases, "a list of questions")
        questions = [asked, *paraphrases]
        for question in questions:
            as_messages(question)
        several = isinstance(answers, list) and len(answers) > 1 and all(isinstance(a, str) for a in answers)
        _check(several, "answers", answers, "two or more texts")
        _check(isinstance(levels, dict) and bool(levels), "preference", levels, 'levels by dimension: {"warmth": 4}')
        asked_for = {name: _whole(level, f"preference.{name}") for name, level in levels.items()}
        target = preferences.encode(Preference(asked_for))
        right = _whole(right, "right")
        _check(0 <= right < len(answers), "right", right, f"0 to {len(answers) - 1}")
    except (KeyError, ValueError) as error:
        raise UsageError(f"{record.place}: {error.args[0]}") from None
    return Candidates(tuple(questions), tuple(answers), target, right)


def _check(holds: bool, field: str, value: Any, wanted: str) -> None:
    if not holds:
        raise UsageError(f"field '{field}' is {quoted(value)}: give {wanted}")


def _whole(value: Any, field: str) -> int:
    try:
        return as_whole_number(value)
    except UsageError as error:
        raise UsageError(f"field '{field}' is {quoted(value)}: give a whole number from 0 ({error})") from None
