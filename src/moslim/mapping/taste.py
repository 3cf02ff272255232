"""A person's taste: weights over the dimensions, as a file, and as a mapping."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from moslim.data.sources.records import parse_object
from moslim.errors import MissingFileError, UsageError
from moslim.levels import expected_level
from moslim.literals import as_number
from moslim.mapping.base import MappingFunction
from moslim.preferences import PreferenceSet
from moslim.utils.files import write_text


@dataclass(frozen=True)
class Taste:
    """Weights of a utility ``sum_d w_d E[level_d] / (K_d - 1)``, fitted by :mod:`moslim.taste`.

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
    def load(cls, path: str | Path) -> Taste:
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
            raise UsageError(f"{path} holds no taste ({error}): make one with `python -m moslim.taste`") from error


class TasteWeights(MappingFunction):
    """``sum_d w_d E[level_d] / (K_d - 1)``: what somebody likes, whatever the prompt asks for.

    The heads' outputs are reward features, a person is a vector of weights over them (Barreto et al. 2025, "Capturing
    Individual Human Preferences with Reward Features"). The request is not read, so these rewards also reach prompts
    without instruction; a policy trained on them needs none.

    Args:
        path: File that ``python -m moslim.taste`` wrote from somebody's choices.
        weights: By dimension name, in place of a file; dimensions that are not named do not count.
    """

    def __init__(self, path: str | None = None, weights: Mapping[str, float] | None = None) -> None:
        if (path is None) == (weights is None):
            raise UsageError("TasteWeights takes either `path`, a fitted taste, or `weights`: give one of them")
        self.taste = None if path is None else Taste.load(path)
        self.utility = dict(weights or {}) if self.taste is None else self.taste.weights
        if not self.utility:
            raise UsageError("TasteWeights has no weights: name at least one dimension")

    def bind(self, preferences: PreferenceSet) -> None:
        """See the base class.

        Raises:
            UsageError: A dimension with a weight is unknown, or has other levels than those the taste was fitted for.
        """
        super().bind(preferences)
        for name in self.utility:
            if name not in preferences.names:
                raise UsageError(
                    f"there is a taste for '{name}', but `preferences` names only: {', '.join(preferences.names)}"
                )
            now = list(preferences[name].levels)
            if self.taste is not None and self.taste.levels[name] != now:
                raise UsageError(
                    f"the taste for '{name}' was fitted with the levels {', '.join(self.taste.levels[name])}; now "
                    f"they are {', '.join(now)}: fit it again"
                )

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """See the base class: ``w_d E[level_d] / (K_d - 1)``, NaN for dimensions without a weight."""
        weights = probs.new_tensor([self.utility.get(name, float("nan")) for name in self.preferences.names])
        return weights * expected_level(probs) / (self.sizes(probs) - 1)

    def scalarize(self, per_dimension: Tensor, weights: Tensor) -> Tensor:
        """The utility: the sum; ``w_d`` is in them already."""
        return per_dimension.nansum(-1)
