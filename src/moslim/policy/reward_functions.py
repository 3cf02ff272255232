"""Plain Python functions as rewards beside the classifier: format, length, whatever a program can check."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moslim.data.prompts import as_messages
from moslim.mapping.base import MappedReward
from moslim.policy.answering import Answers
from moslim.preferences import PreferenceSet

Function = Callable[..., Sequence[float | None]]


@dataclass
class RewardFunction:
    """A function with TRL's calling contract, and how much it counts.

    It is called with keywords: ``prompts`` and ``completions``, as ``N`` texts, ``completion_ids``, as ``N`` lists of
    token ids, end token included, and ``levels``, the ``N`` requests as dimension name to level (0 = lowest). Further
    keywords may be added, so it should end in ``**columns``. Prompts are shown without their instruction. It returns
    ``N`` numbers, None where it does not apply.

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
            raise ValueError(f"reward function '{self.name}' has weight {self.weight}: give a number above 0")

    def __call__(self, answers: Answers, levels: Sequence[dict[str, int]]) -> list[float]:
        """Calls the function; NaN stands for None.

        Args:
            answers: ``N`` answers.
            levels: The ``N`` requests.

        Raises:
            ValueError: It does not return ``N`` finite numbers or Nones.
        """
        found = answers.completions
        prompts = [as_messages(q) for q in answers.questions] if self.messages else list(answers.questions)
        texts = [[{"role": "assistant", "content": t}] for t in answers.texts] if self.messages else list(answers.texts)
        ids = [row[keep].tolist() for row, keep in zip(found.tokens.cpu(), found.mask.cpu(), strict=True)]
        values = list(self.function(prompts=prompts, completions=texts, completion_ids=ids, levels=list(levels)))
        if len(values) != len(texts):
            raise ValueError(f"reward function '{self.name}' returned {len(values)} values for {len(texts)} answers")
        for number, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                raise ValueError(
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
        ValueError: Two functions, or a function and a dimension, have one name.
    """

    def __init__(self, functions: Sequence[RewardFunction], preferences: PreferenceSet) -> None:
        self.functions = tuple(functions)
        self.preferences = preferences
        names = [*preferences.names, *self.names]
        for name in self.names:
            if names.count(name) > 1:
                raise ValueError(f"reward_functions: the name '{name}' is taken; give the function another `name`")

    @property
    def names(self) -> list[str]:
        """Names of the ``F`` columns."""
        return [str(function.name) for function in self.functions]

    def weights(self, like: Tensor) -> Tensor:
        """Weight of every reward in a matrix ``[N, D + F]``: 1 for dimensions, and those of the functions."""
        row = [1.0] * len(self.preferences) + [function.weight for function in self.functions]
        return like.new_tensor(row).expand(len(like), -1)

    def __call__(self, answers: Answers, targets: Tensor) -> Tensor:
        """Rewards of ``N`` answers, ``[N, F]`` float32 on the device of ``targets``, NaN where one does not apply."""
        levels = [dict(self.preferences.decode(target).levels) for target in targets.cpu()]
        columns = [function(answers, levels) for function in self.functions]
        return torch.tensor(columns, device=targets.device).reshape(len(columns), len(levels)).T

    def join(self, mapped: MappedReward, values: Tensor, is_mean: bool) -> MappedReward:
        """Adds the functions' columns to what the mapping function found.

        The new total is the weighted mean over the columns that count for an answer, ``sum w r / sum w``. A mapping
        whose scalar is not the mean of its dimensions enters it as one column, with weight 1.

        Args:
            mapped: Rewards of ``N`` answers on ``D`` dimensions.
            values: ``[N, F]`` from :meth:`__call__`.
            is_mean: See :attr:`~moslim.mapping.MappingFunction.is_mean`.

        Returns:
            ``[N]`` and ``[N, D + F]``.
        """
        if not self.functions:
            return mapped
        everything = torch.cat([mapped.per_dimension, values], dim=1)
        columns, weights = everything, self.weights(everything)
        if not is_mean:
            nothing = mapped.per_dimension.isnan().all(dim=1)
            columns = torch.cat([mapped.total.masked_fill(nothing, torch.nan)[:, None], values], dim=1)
            weights = weights[:, len(self.preferences) - 1 :]
        weights = weights * ~columns.isnan()
        total = (columns.nan_to_num() * weights).sum(1) / weights.sum(1).clamp(min=1e-12)
        return MappedReward(total, everything)

    def metrics(self, per_dimension: Tensor) -> dict[str, Tensor]:
        """Mean reward of each function, over the answers it applies to, of the matrix ``[N, D + F]``."""
        means = per_dimension[:, len(self.preferences) :].nanmean(dim=0)
        named = zip(self.names, means, strict=True)
        return {f"train/reward/{name}": mean for name, mean in named if not mean.isnan()}
