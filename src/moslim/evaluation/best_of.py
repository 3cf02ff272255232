"""Best-of-n evaluation in the form of RMGAP (arXiv 2605.01831).

One of several answers of distinct character fits a request, and the reward should pick it; in RMGAP, each prompt has
four answers and two paraphrases. A preference classifier never reads the request; the mapping function does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moslim.data.loader import share
from moslim.data.prompts import as_messages
from moslim.data.sources.records import Record, read_file
from moslim.data.types import Question
from moslim.evaluation.classifier_records import bootstrap_interval, question_number
from moslim.mapping.base import MappingFunction
from moslim.mapping.distance import ExpectedDistance
from moslim.preferences import Preference, PreferenceSet
from moslim.training.distributed import gathered, process_count, process_rank
from moslim.utils.errors import MissingFileError, UsageError, as_whole_number, quoted
from moslim.utils.files import Result


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


Score = Callable[[Sequence[Question], Sequence[str]], Tensor]
"""From ``N`` questions and ``N`` answers to level probabilities ``[N, D, K]``."""


@dataclass
class BestOf:
    """A best-of-n evaluation, as part of the test of a classifier.

    Args:
        path: JSON Lines in the format of :func:`~moslim.evaluation.best_of.read_choices`.
        mapping: What makes rewards of level probabilities and the preference: best the one that a policy is to be
            trained with. None = :class:`~moslim.mapping.ExpectedDistance`, normalised, which keeps no statistics.
    """

    path: str
    mapping: MappingFunction | None = None

    def choices(self, preferences: PreferenceSet) -> list[Candidates]:
        """Reads the file; see :func:`~moslim.evaluation.best_of.read_choices`."""
        return read_choices(self.path, preferences)

    def __call__(self, choices: Sequence[Candidates], score: Score, preferences: PreferenceSet) -> Result:
        """Scores the answers, each process its share, and measures; every process must call it.

        Args:
            choices: What :meth:`choices` read.
            score: The classifier.
            preferences: Its ``D`` dimensions.

        Returns:
            See :func:`best_of_n`; besides, ``mapping``, the mapping's name.
        """
        mapping = self.mapping or ExpectedDistance(normalize=True)
        mapping.bind(preferences)
        own = [choices[i] for i in share(list(range(len(choices))), process_rank(), process_count())]
        shape = len(choices[0].answers), len(preferences), max(preferences.sizes)
        probs = torch.cat(gathered(_scored(own, shape, score)))
        return {"mapping": type(mapping).__name__, **best_of_n(choices, probs, mapping)}


def best_of_n(choices: Sequence[Candidates], probs: Tensor, mapping: MappingFunction) -> Result:
    """Best-of-n accuracy over the questions as they were asked, and under their paraphrases.

    Args:
        choices: ``P`` prompts, with ``F >= P`` forms of a question among them.
        probs: ``[F, n, D, K]``, of every form in turn, and every answer to it.
        mapping: What makes rewards of them.

    Returns:
        ``n_prompts``, ``n_answers``; ``chance``, the accuracy of a blind pick; ``accuracy`` and its ``interval`` over
        questions; ``paraphrases``, None where there are none: their number ``n``, the ``accuracy`` over them alone, and
        ``every``, the share of prompts that are right as asked and in every paraphrase.
    """
    prompt = torch.tensor([i for i, choice in enumerate(choices) for _ in choice.questions])
    asked = torch.tensor([place == 0 for choice in choices for place in range(len(choice.questions))])
    targets = torch.stack([choice.target for choice in choices])[prompt]
    right = torch.tensor([choice.right for choice in choices])[prompt]
    picks = right_picks(probs, targets, right, mapping)
    keys = torch.tensor([question_number(choice.questions[0]) for choice in choices])
    questions, question = keys.unique(return_inverse=True)

    def accuracy(weights: Tensor) -> Tensor:
        drawn = weights[:, question]
        return (drawn @ picks[asked]) / drawn.sum(1)

    missed = picks.new_zeros(len(choices)).index_add_(0, prompt, (picks < 1).to(picks.dtype))
    return {
        "n_prompts": len(choices),
        "n_answers": probs.shape[1],
        "chance": 1 / probs.shape[1],
        "accuracy": picks[asked].mean(),
        "interval": bootstrap_interval(accuracy, len(questions)),
        "paraphrases": None
        if bool(asked.all())
        else {
            "n": int((~asked).sum()),
            "accuracy": picks[~asked].mean(),
            "every": (missed == 0).double().mean(),
        },
    }


def right_picks(probs: Tensor, targets: Tensor, right: Tensor, mapping: MappingFunction) -> Tensor:
    """Mask of the prompts whose answer with the highest reward is the one that fits.

    Args:
        probs: ``[P, n, D, K]``, level probabilities of ``n`` answers to each prompt.
        targets: ``[P, D]`` int64, the levels asked for, -1 = not asked for.
        right: ``[P]`` int64, which answer fits.
        mapping: What makes rewards of them; each prompt's answers are a group.

    Returns:
        ``[P]`` float64: 1 where it is, 0 where it is not, and 1 over the number of answers that share the highest
        reward where it is among several.
    """
    prompts, n = probs.shape[:2]
    groups = torch.arange(prompts, device=probs.device).repeat_interleave(n)
    rewards = mapping(probs.flatten(0, 1), targets.repeat_interleave(n, dim=0), groups).total.reshape(prompts, n)
    best = rewards == rewards.amax(1, keepdim=True)
    return best.gather(1, right[:, None])[:, 0].double() / best.sum(1)


def _scored(choices: Sequence[Candidates], shape: tuple[int, int, int], score: Score) -> Tensor:
    """``[F, n, D, K]`` on CPU, given ``n, D, K``; empty where a process has no prompts."""
    asked = [(q, answer) for choice in choices for q in choice.questions for answer in choice.answers]
    probs = score([q for q, _ in asked], [answer for _, answer in asked])
    return probs.cpu().reshape(-1, *shape)
