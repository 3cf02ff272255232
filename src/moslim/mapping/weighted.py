"""Weights of dimensions: a wrapper of other mapping functions, user weights, and their fit to choices.

Another mapping's rewards, some dimensions counting more than others.

A user's weights: weights over the dimensions, as a file, and as a mapping.

Fits a user's weights to a few dozen of their choices between two answers.

    python -m moslim.mapping.weighted --choices choices.jsonl --classifier outputs/quickstart/reward/classifier \\
        --output user_weights.json

Every line of the file is ``{"question": ..., "chosen": ..., "rejected": ...}``. The result is an argument of
:class:`~moslim.mapping.UserWeights`.
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
    """``sum_d w_d r_d / sum_d w_d`` over the dimensions that a prompt names, with another mapping's rewards ``r_d``.

    A policy optimizer with ``normalize_then_sum`` weighs the normalised rewards so, whatever their scales (GDPO, arXiv
    2601.05242, with weights). A weight may depend on the level asked for, and so differs between the answers of a
    batch: where it matters most that answers are harmless, ``{harm: [4, 1]}`` insists on requests for the lowest level.

    Args:
        objective: What rewards each dimension. Its scalar must be a mean, see :attr:`is_mean`.
        weights: By dimension name: a number, or one per requested level; 1 for those not named.

    Raises:
        UsageError: A weight is not above 0, or the objective makes a scalar of its own.
    """

    def __init__(self, objective: MappingFunction, weights: Mapping[str, float | list[float]]) -> None:
        if not objective.is_mean:
            raise UsageError(f"{type(objective).__name__} makes a scalar of its own, which Weighted would not follow")
        for name, own in weights.items():
            if min(own if isinstance(own, list) else [own], default=0.0) <= 0:
                raise UsageError(f"the weight of '{name}' is {own}: give a number above 0, or one per level")
        self.objective = objective
        self.by_name = dict(weights)

    @property
    def children(self) -> Sequence[Plugin]:
        """The objective: its hooks are called and its state is saved, too."""
        return (self.objective,)

    def bind(self, preferences: PreferenceSet) -> None:
        """See the base class.

        Raises:
            UsageError: ``weights`` names an unknown dimension.
            UsageError: A dimension has not as many levels as weights.
        """
        super().bind(preferences)
        self.objective.bind(preferences)
        for name, own in self.by_name.items():
            levels = preferences[name].levels
            if isinstance(own, list) and len(own) != len(levels):
                raise UsageError(
                    f"'{name}' has {len(levels)} levels, but {len(own)} weights: give one number per level"
                )

    def observe(self, probs: Tensor, targets: Tensor) -> None:
        """Lets the objective observe."""
        self.objective.observe(probs, targets)

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """The objective's rewards."""
        return self.objective.per_dimension(probs, targets, groups)

    def weights(self, targets: Tensor) -> Tensor:
        """Those of the requested levels, times the objective's own."""
        found = self.objective.weights(targets)
        factors = torch.ones_like(found)
        for column, name in enumerate(self.preferences.names):
            own = self.by_name.get(name, 1.0)
            table = found.new_tensor(own if isinstance(own, list) else [own] * self.preferences.sizes[column])
            factors[:, column] = table[targets[:, column].clamp(min=0)]
        return found * factors.masked_fill(targets == INACTIVE, 1.0)


@dataclass(frozen=True)
class FittedWeights:
    """Weights of a utility ``sum_d w_d E[level_d] / (K_d - 1)``, fitted by :mod:`moslim.mapping.weighted`.

    Args:
        weights: By dimension name. In log-odds: an answer that is better by the whole range of a dimension is
            chosen with probability ``sigmoid(w_d)``.
        standard_errors: Of the weights.
        levels: Names of the levels of each dimension that they were fitted for.
        choices: Number of choices that they rest on.
        l2: Strength of the regularisation.
        agreement: Share of these choices that weights fitted to the others foretell.
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
        """Inverse of :meth:`save`.

        Raises:
            MissingFileError: There is no such file.
            UsageError: It was not written by :meth:`save`.
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
    """``sum_d w_d E[level_d] / (K_d - 1)``: what somebody likes, whatever the prompt asks for.

    The heads' outputs are reward features, a person is a vector of weights over them (Barreto et al. 2025, "Capturing
    Individual Human Preferences with Reward Features"). The request is not read, so these rewards also reach prompts
    without instruction; a policy trained on them needs none.

    Args:
        path: File that ``python -m moslim.mapping.weighted`` wrote from somebody's choices.
        weights: By dimension name, in place of a file; dimensions that are not named do not count.
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
            UsageError: A dimension with a weight is unknown, or has other levels than those the user weights were
                fitted for.
        """
        super().bind(preferences)
        for name in self.utility:
            if name not in preferences.names:
                raise UsageError(
                    f"there is a user weight for '{name}', but `preferences` names only: {', '.join(preferences.names)}"
                )
            now = list(preferences[name].levels)
            if self.user_weights is not None and self.user_weights.levels[name] != now:
                raise UsageError(
                    f"the user weight for '{name}' was fitted with "
                    f"{', '.join(self.user_weights.levels[name])}; "
                    f"now they are {', '.join(now)}: fit it again"
                )

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """See the base class: ``w_d E[level_d] / (K_d - 1)``, NaN for dimensions without a weight."""
        weights = probs.new_tensor([self.utility.get(name, float("nan")) for name in self.preferences.names])
        return weights * expected_level(probs) / (self.sizes(probs) - 1)

    def scalarize(self, per_dimension: Tensor, weights: Tensor) -> Tensor:
        """The utility: the sum; ``w_d`` is in them already."""
        return per_dimension.nansum(-1)


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


def fit_user_weights(choices: list[UserChoice], scorer: Scorer, l2: float = 0.1) -> FittedWeights:
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
        l2: Strength of the regularisation; the prior of a weight has a standard deviation of l2 ** -0.5.
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
    """The command line; see the module."""
    from jsonargparse import auto_cli

    from moslim.training.command_errors import reported, without_flag
    from moslim.training.config_files import MoslimParser

    arguments = without_flag(sys.argv[1:] if args is None else args)
    with reported():
        auto_cli(fit_file, args=arguments, as_positional=False, parser_class=MoslimParser)


if __name__ == "__main__":
    main()
