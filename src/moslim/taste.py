"""Fits a person's taste to a few dozen of their choices between two answers.

    python -m moslim.taste --choices choices.jsonl --classifier outputs/quickstart/reward/classifier --output taste.json

Every line of the file is ``{"question": ..., "chosen": ..., "rejected": ...}``. The result is an argument of
:class:`~moslim.mapping.TasteWeights`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moslim.data.prompts import as_messages
from moslim.data.sources.records import read_file
from moslim.data.types import Question
from moslim.errors import MissingFileError, UsageError
from moslim.failures import reported, without_flag
from moslim.levels import expected_level
from moslim.literals import quoted
from moslim.mapping.taste import Taste
from moslim.parser import MoslimParser
from moslim.reward.scorer import Scorer

_STEPS = 100
_TOLERANCE = 1e-10


@dataclass
class UserChoice:
    """One answer was preferred to another."""

    question: Question
    chosen: str
    rejected: str


def read_choices(path: str) -> list[UserChoice]:
    """Reads a JSON Lines file (or another table, see :func:`~moslim.data.sources.records.read_file`).

    Raises:
        MissingFileError: There is no such file.
        UsageError: A line lacks a field or holds something else than text; the message names file, line and field.
    """
    choices = []
    for record in read_file(path):
        for name in ("chosen", "rejected"):
            if not isinstance(record.fields.get(name), str):
                raise UsageError(f"{record.place}, field '{name}': {quoted(record.fields.get(name))} is not a text")
        question: Any = record.fields.get("question")
        try:
            as_messages(question)
        except ValueError as error:
            raise UsageError(f"{record.place}, field 'question': {error}") from error
        choices.append(UserChoice(question, record.fields["chosen"], record.fields["rejected"]))
    return choices


def logistic_weights(differences: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Bradley-Terry weights: the maximum of ``sum_i log sigmoid(w . x_i) - l2/2 |w|^2``, by Newton's method.

    The objective is strictly concave, so the result depends on neither start nor machine. Standard errors are those
    of the normal approximation at the maximum (Laplace): the root of the diagonal of the inverse Hessian.

    Args:
        differences: ``[N, D]``, features of the chosen answer less those of the rejected one.
        l2: Strength of the regularisation, above 0: the precision of a normal prior on each weight.

    Returns:
        Weights and their standard errors, ``[D]`` float64 each.
    """
    if l2 <= 0:
        raise UsageError(f"l2 is {l2}: give a positive number, choices that all agree have no finite weights without")
    x = differences.double().cpu()
    prior = l2 * torch.eye(x.shape[1], dtype=x.dtype)

    def objective(weights: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(x @ weights).sum() - 0.5 * l2 * weights @ weights

    def curvature(weights: Tensor) -> Tensor:
        chosen = (x @ weights).sigmoid()
        return x.T @ ((chosen * (1 - chosen))[:, None] * x) + prior

    weights = torch.zeros(x.shape[1], dtype=x.dtype)
    for _ in range(_STEPS):
        gradient = x.T @ (-(x @ weights)).sigmoid() - l2 * weights
        step = torch.linalg.solve(curvature(weights), gradient)
        while objective(weights + step) < objective(weights) and step.abs().max() > _TOLERANCE:
            step = step / 2
        weights = weights + step
        if step.abs().max() <= _TOLERANCE:
            break
    return weights, torch.linalg.inv(curvature(weights)).diagonal().sqrt()


def foretold(differences: Tensor, l2: float, folds: int = 50) -> float:
    """Share of choices that weights fitted to other ones foretell.

    Args:
        differences: ``[N, D]``, as :func:`logistic_weights` takes them.
        l2: See there.
        folds: Parts that are left out in turn; with fewer choices than that, each choice.
    """
    differences = differences.double().cpu()
    right = torch.zeros(len(differences), dtype=torch.bool)
    part = torch.arange(len(differences)) % folds
    for fold in part.unique():
        weights, _ = logistic_weights(differences[part != fold], l2)
        right[part == fold] = differences[part == fold] @ weights > 0
    return right.double().mean().item()


def fit_taste(choices: list[UserChoice], scorer: Scorer, l2: float = 0.1) -> Taste:
    """Fits the weights of all of a classifier's dimensions.

    Args:
        choices: ``N`` choices of one person; 30 tell the large weights from the small ones.
        scorer: The classifier.
        l2: See :func:`logistic_weights`; the prior's standard deviation is ``l2 ** -0.5``.
    """
    preferences = scorer.preferences
    questions = [choice.question for choice in choices]
    chosen = scorer.probabilities(questions, [choice.chosen for choice in choices])
    rejected = scorer.probabilities(questions, [choice.rejected for choice in choices])
    top = torch.tensor(preferences.sizes) - 1
    differences = (expected_level(chosen) - expected_level(rejected)).double().cpu() / top
    weights, errors = logistic_weights(differences, l2)
    return Taste(
        weights=dict(zip(preferences.names, weights.tolist(), strict=True)),
        standard_errors=dict(zip(preferences.names, errors.tolist(), strict=True)),
        levels=preferences.to_dict(),
        choices=len(choices),
        l2=l2,
        agreement=foretold(differences, l2),
    )


def fit_file(choices: str, classifier: str, output: str, l2: float = 0.1) -> None:
    """Fits a taste to a file of choices and writes it.

    Args:
        choices: JSON Lines of question, chosen and rejected answer.
        classifier: Folder or Hub name of a reward classifier.
        output: JSON file to write.
        l2: Strength of the regularisation; the prior of a weight has a standard deviation of l2 ** -0.5.
    """
    if not Path(choices).is_file():
        raise MissingFileError(f"--choices {choices}: there is no such file")
    taste = fit_taste(read_choices(choices), Scorer(classifier), l2)
    taste.save(output)
    print(f"{taste.choices} choices, {taste.agreement:.0%} foretold by the others; weights in log-odds per full range:")
    for name, weight in sorted(taste.weights.items(), key=lambda item: -abs(item[1])):
        print(f"  {name:20} {weight:+6.2f} +- {taste.standard_errors[name]:.2f}")
    print(f"written to {output}: use it with --model.mapping moslim.mapping.TasteWeights --model.mapping.path {output}")


def main(args: list[str] | None = None) -> None:
    """The command line; see the module."""
    from jsonargparse import auto_cli

    arguments = without_flag(sys.argv[1:] if args is None else args)
    with reported():
        auto_cli(fit_file, args=arguments, as_positional=False, parser_class=MoslimParser)


if __name__ == "__main__":
    main()
