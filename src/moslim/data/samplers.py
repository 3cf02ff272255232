"""Samplers of preferences, which choose the levels that training prompts request."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moslim.data.types import Source
from moslim.mapping.base import RunningLevels, level_keys
from moslim.preferences import Preference, PreferenceSet, expected_distance
from moslim.utils.errors import UsageError

TRIES = 1000
"""Most draws of a sampler that searches for an allowed preference."""


def draw_levels(preferences: PreferenceSet, count: int, generator: random.Random) -> Preference:
    """Draws ``count`` different dimensions and a level of each, uniformly."""
    dimensions = sorted(generator.sample(range(len(preferences)), count))
    return Preference({preferences.names[i]: generator.randrange(preferences.sizes[i]) for i in dimensions})


class PreferenceSampler(ABC):
    """Base class of samplers. Subclass it, and name the subclass under ``data.sampler``.

    A sampler may adapt to the run, but only at the start of an epoch: within an epoch, :meth:`draw` depends only on the
    generator. Workers can thus draw ahead, all processes draw the same, and a resumed run repeats the same draws.
    Shorten epochs with ``trainer.limit_train_batches`` to make a sampler adapt faster.
    """

    @abstractmethod
    def draw(self, preferences: PreferenceSet, generator: random.Random, source: Source) -> Preference:
        """Returns the preference of a training prompt; an empty one makes a prompt without an instruction.

        Args:
            preferences: Dimensions in use.
            generator: Only source of randomness to use; seeded by seed, epoch and row.
            source: Source of the rows. A preference that it holds out must not be returned.
        """

    def start_epoch(self, epoch: int, preferences: PreferenceSet) -> None:  # noqa: B027 (optional)
        """Updates the state that :meth:`draw` depends on; no other method may change it.

        Called in every process before the first draw of an epoch and before workers copy the sampler. A run that is
        resumed within an epoch calls it again for this epoch, after :meth:`load_state_dict`; the state must not change
        then.
        """

    def observe(self, preferences: PreferenceSet, probs: Tensor, targets: Tensor) -> None:  # noqa: B027 (optional)
        """Records the completions of a training rollout, from all processes, for the next :meth:`start_epoch`.

        Args:
            preferences: ``D`` dimensions.
            probs: ``[N, D, K]`` level probabilities of the completions.
            targets: ``[N, D]`` int64, requested level, -1 = not requested.
        """

    def metrics(self) -> dict[str, float]:
        """Returns metrics to log with every rollout, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for checkpoints, as plain data; empty if there is none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (optional)
        """Inverse of :meth:`state_dict`."""


class Uniform(PreferenceSampler):
    """Draws the number of requested dimensions, then uniformly the dimensions and their levels.

    A combination that the source holds out is drawn again.

    Args:
        active: ``active[k]`` is the probability that ``k`` dimensions are requested; ``active[0]`` is the share of
            prompts without an instruction. The sum is 1. Default: 0.2 for ``k = 0``, the rest spread evenly.

    Raises:
        UsageError: ``active`` has a negative entry or does not add up to 1.
    """

    def __init__(self, active: Sequence[float] | None = None) -> None:
        if active is not None and (min(active, default=-1.0) < 0 or abs(sum(active) - 1) > 1e-6):
            raise UsageError(f"sampler.active is {list(active)}: give probabilities that add up to 1")
        self.active = None if active is None else tuple(active)

    def draw(self, preferences: PreferenceSet, generator: random.Random, source: Source) -> Preference:
        """See the base class.

        Raises:
            UsageError: ``active`` has entries for more dimensions than exist, or no draw is allowed.
        """
        weights = self.counts(len(preferences))
        count = generator.choices(range(len(weights)), weights)[0]
        for _ in range(TRIES):
            preference = self.propose(preferences, count, generator)
            if not preference or self.allows(preference, source):
                return preference
        raise UsageError(
            f"{type(self).__name__} found no preference of {count} dimensions to ask for in {TRIES} draws: "
            f"{type(source).__name__} calls all of them unreachable or held out; set sampler.active[{count}] to 0"
        )

    def propose(self, preferences: PreferenceSet, count: int, generator: random.Random) -> Preference:
        """Draws ``count`` dimensions and their levels."""
        return draw_levels(preferences, count, generator)

    def allows(self, preference: Preference, source: Source) -> bool:
        """Whether a drawn preference may be requested."""
        return not source.held_out(preference)

    def counts(self, dimensions: int) -> tuple[float, ...]:
        """Returns the weights of requesting 0, 1, ... dimensions, up to at most ``dimensions``."""
        if self.active is None:
            return (0.2, *[0.8 / dimensions] * dimensions)
        if len(self.active) > dimensions + 1 and any(self.active[dimensions + 1 :]):
            raise UsageError(
                f"sampler.active has {len(self.active)} entries, for 0 to {len(self.active) - 1} named dimensions, "
                f"but there are only {dimensions} dimensions"
            )
        return self.active[: dimensions + 1]


class Reachable(Uniform):
    """Sampler like :class:`Uniform` that draws again until some answer can have all levels at once."""

    def allows(self, preference: Preference, source: Source) -> bool:
        """See the base class."""
        return source.reachable(preference) and super().allows(preference, source)


class Curriculum(Reachable):
    """Sampler like :class:`Reachable` whose prompts request at most ``start + epoch // every`` dimensions.

    Larger numbers of dimensions are not drawn; their probability is shared among the allowed numbers in proportion to
    ``active``. The share of prompts without an instruction stays the same. The schedule depends only on the epoch, so
    shorten epochs with ``trainer.limit_train_batches``.

    Args:
        active: Probabilities once all dimensions are allowed, see :class:`Uniform`.
        start: Most dimensions in the first epoch.
        every: Number of epochs after which one more dimension is allowed.

    Raises:
        UsageError: ``start`` or ``every`` is below 1.
    """

    def __init__(self, active: Sequence[float] | None = None, start: int = 1, every: int = 1) -> None:
        super().__init__(active)
        if start < 1 or every < 1:
            raise UsageError(f"sampler.start is {start}, sampler.every {every}: give 1 or more")
        self.start = start
        self.every = every
        self._most = start

    def start_epoch(self, epoch: int, preferences: PreferenceSet) -> None:
        """See the base class."""
        self._most = min(self.start + epoch // self.every, len(preferences))

    def counts(self, dimensions: int) -> tuple[float, ...]:
        """See the base class.

        Raises:
            UsageError: ``active`` is 0 for all allowed numbers of dimensions.
        """
        none, *named = super().counts(dimensions)
        allowed = named[: self._most]
        if sum(named) == 0:
            return (none,)
        if sum(allowed) == 0:
            raise UsageError(
                f"sampler.active is 0 for 1 to {self._most} dimensions: raise sampler.start or sampler.active"
            )
        return (none, *(share * sum(named) / sum(allowed) for share in allowed))

    def metrics(self) -> dict[str, float]:
        """Returns ``sampler/dimensions``, the most dimensions that a prompt may request."""
        return {"sampler/dimensions": float(self._most)}


class ErrorWeighted(Reachable):
    """Sampler like :class:`Reachable` that draws dimensions and levels more often the worse the policy follows them.

    The error of a level is the running mean of the expected distance ``E|level - target| / (K - 1)`` under the
    classifier, over the completions for which the level was requested. A level that was not requested yet has the
    largest error of all levels. A dimension is drawn with probability ``uniform / D + (1 - uniform) error_d / sum_j
    error_j``, where ``error_d`` is the mean error of its levels; its level is drawn in the same way. The number of
    dimensions is drawn as in :class:`Uniform`.

    The probabilities change at the start of each epoch only, so keep epochs short, e.g. with
    ``trainer.limit_train_batches: 20``.

    Args:
        active: See :class:`Uniform`.
        uniform: Share of the probability that is spread evenly.
        decay: Decay of the running mean per completion; 0.98 averages over about 50 completions of each level.

    Raises:
        UsageError: ``uniform`` is not in (0, 1].
    """

    def __init__(self, active: Sequence[float] | None = None, uniform: float = 0.3, decay: float = 0.98) -> None:
        super().__init__(active)
        if not 0 < uniform <= 1:
            raise UsageError(f"sampler.uniform is {uniform}: give more than 0, at most 1")
        self.uniform = uniform
        self._errors = RunningLevels(decay)
        self._epoch: int | None = None
        self._shares: dict[str, float] = {}  # "dimension/level" -> probability in this epoch

    def propose(self, preferences: PreferenceSet, count: int, generator: random.Random) -> Preference:
        """Draws different dimensions one after the other, and a level of each."""
        if not self._shares:  # no epoch has started
            return super().propose(preferences, count, generator)
        remaining = {d.name: [self._shares[key] for key in level_keys(d)] for d in preferences.dimensions}
        levels = {}
        for _ in range(count):
            name = generator.choices(list(remaining), [sum(shares) for shares in remaining.values()])[0]
            shares = remaining.pop(name)
            levels[name] = generator.choices(range(len(shares)), shares)[0]
        return Preference({name: levels[name] for name in preferences.names if name in levels})

    def start_epoch(self, epoch: int, preferences: PreferenceSet) -> None:
        """Sets the probabilities from the current errors, unless they are already set for this epoch."""
        keys = {key for dimension in preferences.dimensions for key in level_keys(dimension)}
        if epoch == self._epoch and keys <= self._shares.keys():
            return
        count, mean, _ = self._errors.moments(preferences)
        worst = mean.max().item() if count.any() else 1.0
        padded = mean.masked_fill(count == 0, worst).tolist()
        errors = [of_levels[:size] for of_levels, size in zip(padded, preferences.sizes, strict=True)]
        dimension_shares = _shares([sum(of_levels) / len(of_levels) for of_levels in errors], self.uniform)
        self._epoch, self._shares = epoch, {}
        for dimension, of_levels, share in zip(preferences.dimensions, errors, dimension_shares, strict=True):
            level_shares = _shares(of_levels, self.uniform)
            self._shares |= {key: share * part for key, part in zip(level_keys(dimension), level_shares, strict=True)}

    def observe(self, preferences: PreferenceSet, probs: Tensor, targets: Tensor) -> None:
        """See the base class."""
        top = torch.tensor(preferences.sizes, device=probs.device) - 1
        self._errors.update(preferences, expected_distance(probs, targets) / top, targets)

    def metrics(self) -> dict[str, float]:
        """Returns ``sampler/dimension/level``, the probability of each level in prompts with one dimension."""
        return {f"sampler/{key}": share for key, share in self._shares.items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns the running errors, and the probabilities of the current epoch."""
        return {"errors": self._errors.state_dict(), "epoch": self._epoch, "shares": dict(self._shares)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._errors.load_state_dict(state["errors"])
        self._epoch, self._shares = state["epoch"], dict(state["shares"])


def _shares(errors: Sequence[float], uniform: float) -> list[float]:
    """Returns probabilities proportional to the errors, mixed with the uniform distribution."""
    total, even = sum(errors), 1 / len(errors)
    return [uniform * even + (1 - uniform) * (error / total if total else even) for error in errors]
