"""Weighted dimensions: a wrapper of another mapping, and user weights with their fit to choices between answers.

The command fits the weights of a user to a few dozen of their choices::

    python -m moslim.mapping.weighted --choices choices.jsonl --classifier outputs/quickstart/reward/classifier \\
        --output user_weights.json

Each line of the file of choices is ``{"question": ..., "chosen": ..., "rejected": ...}``.
:class:`~moslim.mapping.UserWeights` reads the output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moslim.data.prompts import as_messages
from moslim.data.sources.records import parse_object, read_file
from moslim.data.types import Question
from moslim.mapping.base import MappingFunction
from moslim.plugin import Plugin
from moslim.preferences import INACTIVE, PreferenceSet, expected_level
from moslim.utils.errors import MissingFileError, UsageError, as_number, quoted
from moslim.utils.files import write_text

if TYPE_CHECKING:
    from moslim.reward.scorer import Scorer


class Weighted(MappingFunction):
    """Weighted mean ``sum_d w_d r_d / sum_d w_d`` of another mapping's rewards ``r_d`` over the active dimensions.

    A policy optimizer with ``normalize_then_sum`` applies the weights to the normalised rewards (GDPO, arXiv
    2601.05242, with weights). Weights may depend on the requested level: ``{harm: [4, 1]}`` weights requests for the
    lowest level of ``harm`` by 4.

    Args:
        objective: Mapping that rewards each dimension; its scalar must be a mean, see :attr:`is_mean`.
        weights: By dimension name, one number, or one per requested level; 1 for dimensions that are not named.

    Raises:
        UsageError: A weight is not positive, or the scalar of the objective is not a weighted mean.
    """

    def __init__(self, objective: MappingFunction, weights: Mapping[str, float | list[float]]) -> None:
        if not objective.is_mean:
            raise UsageError(f"{type(objective).__name__} makes a scalar of its own, which Weighted would not follow")
        for name, weight in weights.items():
            if min(weight if isinstance(weight, list) else [weight], default=0.0) <= 0:
                raise UsageError(f"the weight of '{name}' is {weight}: give a number above 0, or one per level")
        self.objective = objective
        self.by_name = dict(weights)

    @property
    def children(self) -> Sequence[Plugin]:
        """The objective, whose hooks are called and whose state is saved, too."""
        return (self.objective,)

    def bind(self, preferences: PreferenceSet) -> None:
        """See the base class.

        Raises:
            UsageError: ``weights`` names an unknown dimension, or lists another number of weights than of levels.
        """
        super().bind(preferences)
        self.objective.bind(preferences)
        for name, weight in self.by_name.items():
            levels = preferences[name].levels
            if isinstance(weight, list) and len(weight) != len(levels):
                raise UsageError(
                    f"'{name}' has {len(levels)} levels, but {len(weight)} weights: give one number per level"
                )

    def observe(self, probs: Tensor, targets: Tensor) -> None:
        """Updates the statistics of the objective."""
        self.objective.observe(probs, targets)

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """Rewards of the objective."""
        return self.objective.per_dimension(probs, targets, groups)

    def weights(self, targets: Tensor) -> Tensor:
        """Weights of the requested levels, times the weights of the objective."""
        objective_weights = self.objective.weights(targets)
        factors = torch.ones_like(objective_weights)
        for d, name in enumerate(self.preferences.names):
            weight = self.by_name.get(name, 1.0)
            by_level = weight if isinstance(weight, list) else [weight] * self.preferences.sizes[d]
            factors[:, d] = objective_weights.new_tensor(by_level)[targets[:, d].clamp(min=0)]
        return objective_weights * factors.masked_fill(targets == INACTIVE, 1.0)


@dataclass(frozen=True)
class FittedWeights:
    """Weights of a utility ``sum_d w_d E[level_d] / (K_d - 1)``, fitted by :func:`fit_user_weights`.

    Args:
        weights: Log-odds by dimension name: an answer that is higher by the whole range of a dimension is chosen with
            probability ``sigmoid(w_d)``.
        standard_errors: Standard errors of the weights by dimension name.
        levels: Level names of each dimension at the time of the fit.
        choices: Number of choices.
        l2: Strength of the regularisation.
        agreement: Share of the choices that cross-validated weights predict, see :func:`foretold`.
    """

    weights: dict[str, float]
    standard_errors: dict[str, float]
    levels: dict[str, list[str]]
    choices: int
    l2: float
    agreement: float

    def save(self, path: str | Path) -> None:
        """Writes a JSON file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(path), json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> FittedWeights:
        """Reads a file that :meth:`save` wrote.

        Raises:
            MissingFileError: There is no such file.
            UsageError: The file holds no user weights.
        """
        try:
            fields = parse_object(Path(path).read_text(encoding="utf-8"), str(path))
            weights = {name: float(as_number(weight)) for name, weight in fields["weights"].items()}
            return cls(**{**fields, "weights": weights})
        except FileNotFoundError:
            raise MissingFileError(f"there is no file '{path}' (looked in {Path.cwd()})") from None
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise UsageError(
                f"{path} holds no user weights ({error}): make one with `python -m moslim.mapping.weighted`"
            ) from error


class UserWeights(MappingFunction):
    """Utility of a user, ``sum_d w_d E[level_d] / (K_d - 1)``, independent of the requested levels.

    The expected levels are reward features, and a user is a vector of weights over them (Barreto et al. 2025,
    "Capturing Individual Human Preferences with Reward Features"). Prompts without an instruction are rewarded, too,
    and a policy trained on this mapping needs no instruction.

    Args:
        path: File of fitted weights, written by ``python -m moslim.mapping.weighted``.
        weights: Weights by dimension name, in place of a file; dimensions that are not named have no weight.
    """

    def __init__(self, path: str | None = None, weights: Mapping[str, float] | None = None) -> None:
        if (path is None) == (weights is None):
            raise UsageError("UserWeights takes either `path`, a fitted file, or `weights`: give one of them")
        self.user_weights = None if path is None else FittedWeights.load(path)
        self.utility = dict(weights or {}) if self.user_weights is None else self.user_weights.weights
        if not self.utility:
            raise UsageError("UserWeights has no weights: name at least one dimension")

    def bind(self, preferences: PreferenceSet) -> None:
        """See the base class.

        Raises:
            UsageError: A dimension with a weight is unknown, or its levels differ from those of the fit.
        """
        super().bind(preferences)
        for name in self.utility:
            if name not in preferences.names:
                raise UsageError(
                    f"there is a user weight for '{name}', but `preferences` names only: {', '.join(preferences.names)}"
                )
            levels = list(preferences[name].levels)
            if self.user_weights is not None and self.user_weights.levels[name] != levels:
                raise UsageError(
                    f"the user weight for '{name}' was fitted with the levels "
                    f"{', '.join(self.user_weights.levels[name])}; now they are {', '.join(levels)}: fit it again"
                )

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """See the base class: ``w_d E[level_d] / (K_d - 1)``, NaN for dimensions without a weight."""
        weights = probs.new_tensor([self.utility.get(name, float("nan")) for name in self.preferences.names])
        return weights * expected_level(probs) / (self.sizes(probs) - 1)

    def scalarize(self, per_dimension: Tensor, weights: Tensor) -> Tensor:
        """Sum over the dimensions; ``weights`` is not used."""
        return per_dimension.nansum(-1)


_STEPS = 100
_TOLERANCE = 1e-10


@dataclass
class UserChoice:
    """A user's choice between two answers to one question."""

    question: Question
    chosen: str
    rejected: str


def read_choices(path: str) -> list[UserChoice]:
    """Reads choices from JSON Lines or another table, see :func:`~moslim.data.sources.records.read_file`.

    Raises:
        MissingFileError: There is no such file.
        UsageError: A field is missing or is not a text; the message names file, line and field.
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
    """Fits Bradley-Terry weights: maximises ``sum_i log sigmoid(w . x_i) - l2/2 |w|^2`` by Newton's method.

    The objective is strictly concave, so the result does not depend on the start. Standard errors are the roots of
    the diagonal of the inverse Hessian at the maximum (Laplace approximation).

    Args:
        differences: ``[N, D]``, features of the chosen minus features of the rejected answers.
        l2: Strength of the regularisation, positive: the precision of a normal prior on each weight.

    Returns:
        Weights and their standard errors, ``[D]`` float64 each.

    Raises:
        UsageError: ``l2`` is not positive.
    """
    if l2 <= 0:
        raise UsageError(f"l2 is {l2}: give a positive number, choices that all agree have no finite weights without")
    x = differences.double().cpu()
    prior = l2 * torch.eye(x.shape[1], dtype=x.dtype)

    def objective(weights: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(x @ weights).sum() - 0.5 * l2 * weights @ weights

    def negative_hessian(weights: Tensor) -> Tensor:
        probs = (x @ weights).sigmoid()
        return x.T @ ((probs * (1 - probs))[:, None] * x) + prior

    weights = torch.zeros(x.shape[1], dtype=x.dtype)
    for _ in range(_STEPS):
        gradient = x.T @ (-(x @ weights)).sigmoid() - l2 * weights
        step = torch.linalg.solve(negative_hessian(weights), gradient)
        while objective(weights + step) < objective(weights) and step.abs().max() > _TOLERANCE:
            step = step / 2
        weights = weights + step
        if step.abs().max() <= _TOLERANCE:
            break
    return weights, torch.linalg.inv(negative_hessian(weights)).diagonal().sqrt()


def foretold(differences: Tensor, l2: float, folds: int = 50) -> float:
    """Share of choices that are predicted by weights fitted to the other folds (cross-validation).

    Args:
        differences: ``[N, D]``, see :func:`logistic_weights`.
        l2: Strength of the regularisation, see :func:`logistic_weights`.
        folds: Number of folds; with fewer choices, each choice is a fold.
    """
    differences = differences.double().cpu()
    correct = torch.zeros(len(differences), dtype=torch.bool)
    fold_index = torch.arange(len(differences)) % folds
    for fold in fold_index.unique():
        weights, _ = logistic_weights(differences[fold_index != fold], l2)
        correct[fold_index == fold] = differences[fold_index == fold] @ weights > 0
    return correct.double().mean().item()


def fit_user_weights(choices: list[UserChoice], scorer: Scorer, l2: float = 0.1) -> FittedWeights:
    """Fits user weights for all dimensions of a classifier.

    Args:
        choices: Choices of one user; about 30 separate large weights from small ones.
        scorer: Reward classifier.
        l2: Strength of the regularisation; the standard deviation of the prior is ``l2 ** -0.5``.
    """
    preferences = scorer.preferences
    questions = [choice.question for choice in choices]
    chosen = scorer.probabilities(questions, [choice.chosen for choice in choices])
    rejected = scorer.probabilities(questions, [choice.rejected for choice in choices])
    top = torch.tensor(preferences.sizes) - 1
    differences = (expected_level(chosen) - expected_level(rejected)).double().cpu() / top
    weights, errors = logistic_weights(differences, l2)
    return FittedWeights(
        weights=dict(zip(preferences.names, weights.tolist(), strict=True)),
        standard_errors=dict(zip(preferences.names, errors.tolist(), strict=True)),
        levels=preferences.to_dict(),
        choices=len(choices),
        l2=l2,
        agreement=foretold(differences, l2),
    )


def fit_file(choices: str, classifier: str, output: str, l2: float = 0.1) -> None:
    """Fits user weights to a file of choices and writes them.

    Args:
        choices: JSON Lines of question, chosen and rejected answer.
        classifier: Folder or Hub name of a reward classifier.
        output: JSON file to write.
        l2: Strength of the regularisation; the standard deviation of the prior is l2 ** -0.5.
    """
    from moslim.reward.scorer import Scorer

    if not Path(choices).is_file():
        raise MissingFileError(f"--choices {choices}: there is no such file")
    user_weights = fit_user_weights(read_choices(choices), Scorer(classifier), l2)
    user_weights.save(output)
    print(
        f"{user_weights.choices} choices, {user_weights.agreement:.0%} predicted by the others; "
        "weights in log-odds per full range:"
    )
    for name, weight in sorted(user_weights.weights.items(), key=lambda item: -abs(item[1])):
        print(f"  {name:20} {weight:+6.2f} +- {user_weights.standard_errors[name]:.2f}")
    print(f"written to {output}: use it with --model.mapping moslim.mapping.UserWeights --model.mapping.path {output}")


def main(args: list[str] | None = None) -> None:
    """Runs the command of the module docstring."""
    from jsonargparse import auto_cli

    from moslim.training.command_errors import reported, without_flag
    from moslim.training.config_files import MoslimParser

    arguments = without_flag(sys.argv[1:] if args is None else args)
    with reported():
        auto_cli(fit_file, args=arguments, as_positional=False, parser_class=MoslimParser)


if __name__ == "__main__":
    main()
