"""Scores of completions: rewards by Python functions, and level probabilities by the reward classifier."""

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
    """A reward function with TRL's signature, and its weight.

    It is called with keyword arguments and returns ``N`` numbers, None where it does not apply:

    - ``prompts``, ``completions``: ``N`` texts each; prompts without instruction.
    - ``completion_ids``: ``N`` lists of token ids, the end-of-sequence token included.
    - ``levels``: ``N`` dicts from dimension name to requested level (0 = lowest).
    - the data fields that the source keeps (``keep`` of a table): ``N`` values each.

    Its signature should end in ``**kwargs``, as arguments may be added.

    Args:
        function: Import path of a function, or of a class (``class_path`` and ``init_args``) whose objects are called.
        weight: Weight relative to that of a dimension, 1. It must be above 0; return negative numbers to penalise.
        name: Name in the logs; None = that of the function.
        messages: Whether prompts and completions are passed as lists of chat messages, as TRL does for chat data.
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
        self, generations: Generations, levels: Sequence[dict[str, int]], columns: Mapping[str, list[Any]]
    ) -> list[float]:
        """Calls the function.

        Args:
            generations: ``N`` completions.
            levels: ``N`` requests.
            columns: Further data fields, ``N`` values each.

        Returns:
            ``N`` rewards, NaN for None.

        Raises:
            UsageError: The function does not return ``N`` finite numbers or Nones, or a data field has the name of an
                argument.
        """
        completions = generations.completions
        prompts: list[Any] = list(generations.questions)
        texts: list[Any] = list(generations.texts)
        if self.messages:
            prompts = [as_messages(question) for question in prompts]
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        ids = [row[keep].tolist() for row, keep in zip(completions.tokens.cpu(), completions.mask.cpu(), strict=True)]
        known = {"prompts": prompts, "completions": texts, "completion_ids": ids, "levels": list(levels)}
        if taken := sorted(known.keys() & columns.keys()):
            raise UsageError(
                f"the column '{taken[0]}' of the data is named as what every reward function gets: rename it"
            )
        values = list(self.function(**known, **columns))
        if len(values) != len(texts):
            raise UsageError(
                f"reward function '{self.name}' returned {len(values)} values for {len(texts)} completions"
            )
        for number, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                raise UsageError(
                    f"reward function '{self.name}' returned {value} for {texts[number]!r}: give a finite number, or "
                    "None where it does not apply"
                )
        return [math.nan if value is None else float(value) for value in values]


class RewardFunctions:
    """The reward functions of a run. Their rewards follow those of the dimensions in ``per_dimension``.

    Args:
        functions: ``F`` functions; may be empty.
        preferences: The ``D`` dimensions.

    Raises:
        UsageError: Two functions, or a function and a dimension, have the same name.
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
        """Names of the ``F`` functions."""
        return [str(function.name) for function in self.functions]

    def __call__(self, generations: Generations, targets: Tensor, rows: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        """Calls all functions.

        Args:
            generations: ``N`` completions.
            targets: ``[N, D]`` requested levels.
            rows: Further data fields of the ``G`` prompts; empty without any.

        Returns:
            ``[N, F]`` float32 on the device of ``targets``, NaN where a function does not apply.
        """
        levels = [dict(self.preferences.decode(target).levels) for target in targets.cpu()]
        samples = len(levels) // max(1, len(rows))
        names = {name for row in rows for name in row}
        columns = {name: [row.get(name) for row in rows for _ in range(samples)] for name in names}
        rewards = [function(generations, levels, columns) for function in self.functions]
        values = torch.tensor(rewards, dtype=torch.float32, device=targets.device)  # in any precision of the run
        return values.reshape(len(rewards), len(levels)).T

    def join(self, mapped: MappedReward, values: Tensor, is_mean: bool) -> MappedReward:
        """Adds the rewards by functions to those by the mapping function.

        The total is the weighted mean ``sum w r / sum w`` over the dimensions and functions that apply to a completion.
        If the mapping's scalar is not such a mean, it enters as a single reward of weight 1.

        Args:
            mapped: Rewards of ``N`` completions on ``D`` dimensions.
            values: ``[N, F]`` rewards from :meth:`__call__`.
            is_mean: See :attr:`~moslim.mapping.MappingFunction.is_mean`.

        Returns:
            Total ``[N]``, rewards and weights ``[N, D + F]``.
        """
        if not self.functions:
            return mapped
        per_dimension = torch.cat([mapped.per_dimension, values], dim=1)
        function_weights = values.new_tensor([function.weight for function in self.functions]).expand(len(values), -1)
        weights = torch.cat([mapped.weights, function_weights], dim=1)
        if is_mean:
            return MappedReward(weighted_mean(per_dimension, weights), per_dimension, weights)
        neutral = mapped.per_dimension.isnan().all(dim=1)
        terms = torch.cat([mapped.total.masked_fill(neutral, torch.nan)[:, None], values], dim=1)
        term_weights = torch.cat([torch.ones_like(mapped.total)[:, None], function_weights], dim=1)
        return MappedReward(weighted_mean(terms, term_weights), per_dimension, weights)

    def metrics(self, per_dimension: Tensor) -> dict[str, Tensor]:
        """Mean reward of each function over the completions it applies to, from rewards ``[N, D + F]``."""
        means = per_dimension[:, len(self.preferences) :].nanmean(dim=0)
        named = zip(self.names, means, strict=True)
        return {f"train/reward/{name}": mean for name, mean in named if not mean.isnan()}


class LevelScorer:
    """Scores completions by the training classifier.

    Args:
        scorer: The classifier.
        columns: Positions of the ``D`` dimensions of the run among the heads of the classifier.
        forward_config: Options of forward passes.
    """

    def __init__(self, scorer: Scorer, columns: Sequence[int], forward_config: ForwardConfig) -> None:
        self._scorer, self._heads, self._forward_config = scorer, list(columns), forward_config

    def __call__(self, generations: Generations) -> Tensor:
        """Returns the level probabilities ``[N, D, K]`` of ``N`` completions."""
        config = self._forward_config
        probs = self._scorer.probabilities(
            generations.questions, generations.texts, share_prefixes=config.share_prefixes, tokens=config.tokens
        )
        return probs[:, self._heads]
