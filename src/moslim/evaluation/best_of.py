"""Best-of-n evaluation in the form of RMGAP (arXiv 2605.01831).

Each prompt has several answers, and the one that meets the requested preference should get the highest reward. RMGAP
has four answers and two paraphrases per prompt. The classifier does not read the preference; the mapping function does.
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
        questions: The original question, then its paraphrases.
        answers: ``n`` answers.
        target: ``[D]`` int64, requested levels, -1 = not requested.
        right: Index of the answer that meets the request.
    """

    questions: tuple[Question, ...]
    answers: tuple[str, ...]
    target: Tensor
    right: int


def read_choices(path: str, preferences: PreferenceSet) -> list[Candidates]:
    """Reads prompts from a JSON Lines file, one per line.

        {"question": "How do I grow the fern?", "paraphrases": ["What is the best way to grow the fern?"],
         "answers": ["...", "...", "...", "..."], "preference": {"warmth": 4, "verbosity": 1}, "right": 2}

    ``question`` and ``paraphrases`` are texts or chats; ``paraphrases`` is optional. ``preference`` holds the requested
    levels (0 = lowest), which the question does not mention. ``right`` is the index of the only answer that meets them.
    All lines have the same number of answers, two or more.

    Raises:
        MissingFileError: The file does not exist.
        UsageError: A line is invalid; the message names file, line and field.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"best_of.path: there is no file '{path}' (looked in {Path.cwd()})")
    records = read_file(path)
    choices = [_choice(record, preferences) for record in records]
    num_answers = len(choices[0].answers)
    for record, choice in zip(records, choices, strict=True):
        if len(choice.answers) != num_answers:
            raise UsageError(
                f"{record.place}: {len(choice.answers)} answers, where the first line has {num_answers}: "
                "give every prompt the same number"
            )
    return choices


def _choice(record: Record, preferences: PreferenceSet) -> Candidates:
    fields = record.fields
    question: Any = fields.get("question")
    answers: Any = fields.get("answers")
    levels: Any = fields.get("preference")
    right: Any = fields.get("right")
    try:
        paraphrases: Any = fields.get("paraphrases") or []
        _check(isinstance(paraphrases, list), "paraphrases", paraphrases, "a list of questions")
        questions = [question, *paraphrases]
        for wording in questions:
            as_messages(wording)
        valid = isinstance(answers, list) and len(answers) > 1 and all(isinstance(text, str) for text in answers)
        _check(valid, "answers", answers, "two or more texts")
        _check(isinstance(levels, dict) and bool(levels), "preference", levels, 'levels by dimension: {"warmth": 4}')
        requested = {name: _whole_number(level, f"preference.{name}") for name, level in levels.items()}
        target = preferences.encode(Preference(requested))
        right = _whole_number(right, "right")
        _check(0 <= right < len(answers), "right", right, f"0 to {len(answers) - 1}")
    except (KeyError, ValueError) as error:
        raise UsageError(f"{record.place}: {error.args[0]}") from None
    return Candidates(tuple(questions), tuple(answers), target, right)


def _check(valid: bool, field: str, value: Any, remedy: str) -> None:
    if not valid:
        raise UsageError(f"field '{field}' is {quoted(value)}: give {remedy}")


def _whole_number(value: Any, field: str) -> int:
    try:
        return as_whole_number(value)
    except UsageError as error:
        raise UsageError(f"field '{field}' is {quoted(value)}: give a whole number from 0 ({error})") from None


Score = Callable[[Sequence[Question], Sequence[str]], Tensor]
"""Function of ``N`` questions and ``N`` answers that returns level probabilities ``[N, D, K]``."""


@dataclass
class BestOf:
    """Best-of-n evaluation in the test of a classifier.

    Args:
        path: JSON Lines in the format of :func:`~moslim.evaluation.best_of.read_choices`.
        mapping: Mapping function from level probabilities to rewards, preferably that of the policy's training.
            None = normalised :class:`~moslim.mapping.ExpectedDistance`, which keeps no statistics.
    """

    path: str
    mapping: MappingFunction | None = None

    def choices(self, preferences: PreferenceSet) -> list[Candidates]:
        """Reads the file; see :func:`~moslim.evaluation.best_of.read_choices`."""
        return read_choices(self.path, preferences)

    def __call__(self, choices: Sequence[Candidates], score: Score, preferences: PreferenceSet) -> Result:
        """Scores the answers, a share in each process, and measures the accuracy; a collective call.

        Args:
            choices: Prompts from :meth:`choices`.
            score: The classifier.
            preferences: Its ``D`` dimensions.

        Returns:
            The result of :func:`best_of_n`, and the name of the ``mapping``.
        """
        mapping = self.mapping or ExpectedDistance(normalize=True)
        mapping.bind(preferences)
        indices = share(list(range(len(choices))), process_rank(), process_count())
        shape = len(choices[0].answers), len(preferences), max(preferences.sizes)
        probs = torch.cat(gathered(_score_answers([choices[i] for i in indices], shape, score)))
        return {"mapping": type(mapping).__name__, **best_of_n(choices, probs, mapping)}


def best_of_n(choices: Sequence[Candidates], probs: Tensor, mapping: MappingFunction) -> Result:
    """Best-of-n accuracy over original questions and over paraphrases.

    Args:
        choices: ``P`` prompts with ``W >= P`` wordings, which are original questions and paraphrases.
        probs: ``[W, n, D, K]``, level probabilities of every answer to every wording.
        mapping: Mapping function from level probabilities to rewards.

    Returns:
        ``n_prompts``, ``n_answers``; ``chance``, the accuracy of a random choice; ``accuracy`` over original questions
        and its ``interval`` over questions; ``paraphrases``, None without any: their number ``n``, ``accuracy`` over
        paraphrases, and ``every``, the share of prompts with a correct choice in all wordings.
    """
    prompt_indices = torch.tensor([i for i, choice in enumerate(choices) for _ in choice.questions])
    is_original = torch.tensor([i == 0 for choice in choices for i in range(len(choice.questions))])
    targets = torch.stack([choice.target for choice in choices])[prompt_indices]
    right = torch.tensor([choice.right for choice in choices])[prompt_indices]
    correct = correct_choices(probs, targets, right, mapping)
    question_ids = torch.tensor([question_number(choice.questions[0]) for choice in choices])
    questions, question_indices = question_ids.unique(return_inverse=True)

    def accuracy(question_counts: Tensor) -> Tensor:
        prompt_counts = question_counts[:, question_indices]
        return (prompt_counts @ correct[is_original]) / prompt_counts.sum(1)

    failures = correct.new_zeros(len(choices)).index_add_(0, prompt_indices, (correct < 1).to(correct.dtype))
    return {
        "n_prompts": len(choices),
        "n_answers": probs.shape[1],
        "chance": 1 / probs.shape[1],
        "accuracy": correct[is_original].mean(),
        "interval": bootstrap_interval(accuracy, len(questions)),
        "paraphrases": None
        if bool(is_original.all())
        else {
            "n": int((~is_original).sum()),
            "accuracy": correct[~is_original].mean(),
            "every": (failures == 0).double().mean(),
        },
    }


def correct_choices(probs: Tensor, targets: Tensor, right: Tensor, mapping: MappingFunction) -> Tensor:
    """Indicator of the prompts whose correct answer has the highest reward.

    Args:
        probs: ``[P, n, D, K]``, level probabilities of ``n`` answers to each prompt.
        targets: ``[P, D]`` int64, requested levels, -1 = not requested.
        right: ``[P]`` int64, index of the correct answer.
        mapping: Mapping function from level probabilities to rewards; the answers to a prompt are a group.

    Returns:
        ``[P]`` float64, 0 or 1; ``1 / m`` where the correct answer shares the highest reward with ``m - 1`` others.
    """
    num_prompts, num_answers = probs.shape[:2]
    groups = torch.arange(num_prompts, device=probs.device).repeat_interleave(num_answers)
    rewards = mapping(probs.flatten(0, 1), targets.repeat_interleave(num_answers, dim=0), groups).total
    rewards = rewards.reshape(num_prompts, num_answers)
    is_best = rewards == rewards.amax(1, keepdim=True)
    return is_best.gather(1, right[:, None])[:, 0].double() / is_best.sum(1)


def _score_answers(choices: Sequence[Candidates], shape: tuple[int, int, int], score: Score) -> Tensor:
    """Level probabilities ``[W, n, D, K]`` on CPU, for a ``shape`` of ``n, D, K``; empty without prompts."""
    texts = [(question, answer) for choice in choices for question in choice.questions for answer in choice.answers]
    probs = score([question for question, _ in texts], [answer for _, answer in texts])
    return probs.cpu().reshape(-1, *shape)
