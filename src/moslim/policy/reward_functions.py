"""Scores of completions by the classifier, and by plain Python functions: whatever a program can check."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moslim.data.prompts import as_messages
from moslim.mapping.base import MappedReward, weighted_mean
from moslim.ops.logprobs import ForwardConfig
from moslim.policy.generation import Generations
from moslim.preferences import PreferenceSet
from moslim.reward.scorer import Scorer
from moslim.utils.errors import UsageError

Function = Callable[..., Sequence[float | None]]


@dataclass
class RewardFunction:
    """A function with TRL's calling contract, and how much it counts.

    It is called with keywords: ``prompts`` and ``completions``, as ``N`` texts, ``completion_ids``, as ``N`` lists of
    token ids, end token included, ``levels``, the ``N`` requests as dimension name to level (0 = lowest), and what the
    source keeps of the data's columns (``keep`` of a table), ``N`` values each. Further keywords may be added, so it
    should end in ``**columns``. Prompts are shown without their instruction. It returns ``N`` numbers, None where it
    does not apply.

    Args:
        function: Import path of a function, or of a class (``class_path`` and ``init_args``) whose objects are called.
        weight: Its weight where that of a dimension is 1. Above 0: what is to be rare gets negative rewards.
        name: Under which it is logged; None = the function's own.
        messages: Pass prompts and completions as lists of chat messages, as TRL does for chat data sets.
    """

    function: Function
    weight: float = 1.0
    name: str | None = None
    messages: bool = False

    def __post_init__(self) -> None:
        if self.name is None:
            self.name = getattr(self.function, "__name__", type(self.function).__name__)
        if not self.weight > 0:
            raise UsageError(f"reward function '{self.name}' has weight {self.weight}: give a number above 0")

    def __call__(
        self, answers: Generations, levels: Sequence[dict[str, int]], columns: Mapping[str, list[Any]]
    ) -> list[float]:
        """Calls the function; NaN stands for None.

        Args:
            answers: ``N`` answers.
            levels: The ``N`` requests.
            columns: The data's own, ``N`` values each.

        Raises:
            UsageError: It does not return ``N`` finite numbers or Nones, or a column has the name of something else.
        """
        found = answers.completions
        prompts = [as_messages(q) for q in answers.questions] if self.messages else list(answers.questions)
        texts = [[{"role": "assistant", "content": t}] for t in answers.texts] if self.messages else list(answers.texts)
        ids = [row[keep].tolist() for row, keep in zip(found.tokens.cpu(), found.mask.cpu(), strict=True)]
        known = {"prompts": prompts, "completions": texts, "completion_ids": ids, "levels": list(levels)}
        if taken := sorted(known.keys() & columns.keys()):
            raise UsageError(
                f"the column '{taken[0]}' of the data is named as what every reward function gets: rename it"
            )
        values = list(self.function(**known, **columns))
        if len(values) != len(texts):
            raise UsageError(f"reward function '{self.name}' returned {len(values)} values for {len(texts)} answers")
        for number, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                raise UsageError(
                    f"reward function '{self.name}' returned {value} for {texts[number]!r}: give a finite number, or "
                    "None where it does not apply"
                )
        return [math.nan if value is None else float(value) for value in values]


class RewardFunctions:
    """The reward functions of a run: further columns, after the dimensions, of the matrix of rewards.

    Args:
        functions: ``F`` functions; may be empty.
        preferences: The ``D`` dimensions.

    Raises:
        UsageError: Two functions, or a function and a dimension, have one name.
    """

    def __init__(self, functions: Sequence[RewardFunction], preferences: PreferenceSet) -> None:
        self.functions = tuple(functions)
        self.preferences = preferences
        names = [*preferences.names, *self.names]
        for name in self.names:
            if names.count(name) > 1:
                raise UsageError(f"reward_functions: the name '{name}' is taken; give the function another `name`")

    @property
    def names(self) -> list[str]:
        """Names of the ``F`` columns."""
        return [str(function.name) for function in self.functions]

    def __call__(self, answers: Generations, targets: Tensor, rows: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        """Calls all of them.

        Args:
            answers: ``N`` answers.
            targets: ``[N, D]`` requested levels.
            rows: The own columns of the prompts' rows, of which ``N`` is a multiple; none if they have none.

        Returns:
            ``[N, F]`` float32 on the device of ``targets``, NaN where a function does not apply.
        """
        levels = [dict(self.preferences.decode(target).levels) for target in targets.cpu()]
        samples = len(levels) // max(1, len(rows))
        names = {name for row in rows for name in row}
        columns = {name: [row.get(name) for row in rows for _ in range(samples)] for name in names}
        found = [function(answers, levels, columns) for function in self.functions]
        values = torch.tensor(found, dtype=torch.float32, device=targets.device)  # whatever the run's precision
        return values.reshape(len(found), len(levels)).T

    def join(self, mapped: MappedReward, values: Tensor, is_mean: bool) -> MappedReward:
        """Adds the functions' columns to what the mapping function found.

        The new total is the weighted mean over the columns that count for an answer, ``sum w r / sum w``, with the
        mapping's own weights for its dimensions. A mapping whose scalar is something else enters as one column, with
        weight 1.

        Args:
            mapped: Rewards of ``N`` answers on ``D`` dimensions.
            values: ``[N, F]`` from :meth:`__call__`.
            is_mean: See :attr:`~moslim.mapping.MappingFunction.is_mean`.

        Returns:
            ``[N]``, and twice ``[N, D + F]``.
        """
        if not self.functions:
            return mapped
        everything = torch.cat([mapped.per_dimension, values], dim=1)
        own = values.new_tensor([function.weight for function in self.functions]).expand(len(values), -1)
        weights = torch.cat([mapped.weights, own], dim=1)
        columns, counts = everything, weights
        if not is_mean:
            nothing = mapped.per_dimension.isnan().all(dim=1)
            columns = torch.cat([mapped.total.masked_fill(nothing, torch.nan)[:, None], values], dim=1)
            counts = torch.cat([torch.ones_like(mapped.total)[:, None], own], dim=1)
        return MappedReward(weighted_mean(columns, counts), everything, weights)

    def metrics(self, per_dimension: Tensor) -> dict[str, Tensor]:
        """Mean reward of each function, over the answers it applies to, of the matrix ``[N, D + F]``."""
        means = per_dimension[:, len(self.preferences) :].nanmean(dim=0)
        named = zip(self.names, means, strict=True)
        return {f"train/reward/{name}": mean for name, mean in named if not mean.isnan()}


class LevelScorer:
    """Scores completions by the training classifier.

    Args:
        scorer: The classifier.
        columns: Its columns that hold the ``D`` dimensions of the run, in the order of the run.
        forward_config: How forward passes are made.
    """

    def __init__(self, scorer: Scorer, columns: Sequence[int], forward_config: ForwardConfig) -> None:
        self._scorer, self._columns, self._passes = scorer, list(columns), forward_config

    def __call__(self, answers: Generations) -> Tensor:
        """Returns the level probabilities ``[N, D, K]`` of ``N`` completions."""
        forward_config = self._passes
        probs = self._scorer.probabilities(
            answers.questions, answers.texts, share_prefixes=forward_config.share_prefixes, tokens=forward_config.tokens
        )
        return probs[:, self._columns]
