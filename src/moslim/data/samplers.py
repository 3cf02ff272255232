"""Samplers of preferences: which levels are requested during training.

Running statistics of every level that is asked for.

The interface of every sampler: which preferences are asked for during training.

Preferences drawn uniformly.

Preferences that name more and more dimensions.

Preferences drawn more often where control is worst.
"""

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
"""Draws after which a sampler gives up."""


def draw_levels(preferences: PreferenceSet, count: int, generator: random.Random) -> Preference:
    """Draws ``count`` different dimensions and a level for each, all uniformly."""
    chosen = sorted(generator.sample(range(len(preferences)), count))
    return Preference({preferences.names[i]: generator.randrange(preferences.sizes[i]) for i in chosen})


class PreferenceSampler(ABC):
    """Draws the preference of one training prompt. Subclass it, and name the subclass under ``data.sampler``.

    A sampler may learn from the run. What it learns takes effect at the start of the next epoch: within an epoch,
    what :meth:`draw` returns is a function of the generator alone. Workers may then draw as far ahead as they like,
    every process draws the same, and a resumed run goes on with the same draws. Make epochs as short as the sampler
    is to be quick, with ``trainer.limit_train_batches``.
    """

    @abstractmethod
    def draw(self, preferences: PreferenceSet, generator: random.Random, source: Source) -> Preference:
        """Returns a preference; an empty one makes a prompt without an instruction.

        Args:
            preferences: The dimensions in use.
            generator: The only source of randomness to use; its seed is a function of seed, epoch and row.
            source: Says what is reachable, and what is held out: a held-out preference must not be returned.
        """

    def start_epoch(self, epoch: int, preferences: PreferenceSet) -> None:  # noqa: B027 (optional)
        """The only place where what :meth:`draw` depends on may change.

        Called in every process before an epoch's first draw and before workers, which copy the sampler, are started;
        again with the same epoch when a run is resumed in the middle of it, after :meth:`load_state_dict`: nothing
        may change then.
        """

    def observe(self, preferences: PreferenceSet, probs: Tensor, targets: Tensor) -> None:  # noqa: B027 (optional)
        """Takes in the answers of a training rollout, those of all processes, for the next :meth:`start_epoch`.

        Args:
            preferences: The ``D`` dimensions.
            probs: ``[N, D, K]`` level probabilities.
            targets: ``[N, D]`` int64, requested level, -1 where none was.
        """

    def metrics(self) -> dict[str, float]:
        """What to log with every rollout, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold, as plain data; empty for nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (optional)
        """Inverse of :meth:`state_dict`."""


class Uniform(PreferenceSampler):
    """Draws how many dimensions are named, then which, then their levels, the last two uniformly.

    A combination that the source holds out is drawn again.

    Args:
        active: ``active[k]`` is the probability that ``k`` dimensions are named, so ``active[0]`` is the share of
            prompts without an instruction. The sum is 1. Default: 0.2 without, the rest spread evenly over the
            other numbers.

    Raises:
        UsageError: ``active`` holds a negative number or does not add up to 1.
    """

    def __init__(self, active: Sequence[float] | None = None) -> None:
        if active is not None and (min(active, default=-1.0) < 0 or abs(sum(active) - 1) > 1e-6):
            raise UsageError(f"sampler.active is {list(active)}: give probabilities that add up to 1")
        self.active = None if active is None else tuple(active)

    def draw(self, preferences: PreferenceSet, generator: random.Random, source: Source) -> Preference:
        """See the base class.

        Raises:
            UsageError: ``active`` counts more dimensions than there are, or no allowed preference was found.
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
        """Whether a preference that was drawn may be asked for."""
        return not source.held_out(preference)

    def counts(self, dimensions: int) -> tuple[float, ...]:
        """Weights of the numbers of named dimensions, from 0 to at most ``dimensions``."""
        if self.active is None:
            return (0.2, *[0.8 / dimensions] * dimensions)
        if len(self.active) > dimensions + 1 and any(self.active[dimensions + 1 :]):
            raise UsageError(
                f"sampler.active has {len(self.active)} entries, for 0 to {len(self.active) - 1} named dimensions, "
                f"but there are only {dimensions} dimensions"
            )
        return self.active[: dimensions + 1]


class Reachable(Uniform):
    """Like :class:`Uniform`, but draws again until some answer can have the levels at once."""

    def allows(self, preference: Preference, source: Source) -> bool:
        """See the base class."""
        return source.reachable(preference) and super().allows(preference, source)


class Curriculum(Reachable):
    """Like :class:`Reachable`, but prompts name few dimensions at first: at most ``start + epoch // every``.

    Numbers of dimensions above that are not drawn; the others share their probability in proportion to ``active``,
    and the share of prompts without an instruction stays. Set ``trainer.limit_train_batches``, so that epochs are
    short: the schedule is a function of the epoch, and so of nothing that a resumed run or a worker could miss.

    Args:
        active: See :class:`Uniform`: what holds once all dimensions may be named.
        start: Most dimensions in the first epoch.
        every: Epochs after which one more is allowed.
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
            UsageError: ``active`` gives no probability to what may be drawn now.
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
        """``sampler/dimensions``: the most that a prompt may name."""
        return {"sampler/dimensions": float(self._most)}


class ErrorWeighted(Reachable):
    """Like :class:`Reachable`, but dimensions and levels that the policy misses are drawn more often.

    The error of a level is the running mean, over the answers that were to have it, of the expected distance
    ``E|level - target| / (K - 1)``, as the classifier sees it; a level that was not asked for yet counts as the worst
    one. A dimension is drawn with probability ``uniform / D + (1 - uniform) error_d / sum_j error_j``, with the mean
    error of its levels, and one of its levels in the same way. How many are named is drawn as in :class:`Uniform`.

    The probabilities are set anew at the start of each epoch, see :class:`PreferenceSampler`. So an epoch must be
    short: set ``trainer.limit_train_batches`` to 20, for example.

    Args:
        active: See :class:`Uniform`.
        uniform: Part of the probability that is spread evenly, so that nothing is forgotten.
        decay: Weight that the past keeps per answer; 0.98 remembers about 50 answers of each level.
    """

    def __init__(self, active: Sequence[float] | None = None, uniform: float = 0.3, decay: float = 0.98) -> None:
        super().__init__(active)
        if not 0 < uniform <= 1:
            raise UsageError(f"sampler.uniform is {uniform}: give more than 0, at most 1")
        self.uniform = uniform
        self._errors = RunningLevels(decay)
        self._epoch: int | None = None
        self._shares: dict[str, float] = {}  # "dimension/level" -> probability among all, in this epoch

    def propose(self, preferences: PreferenceSet, count: int, generator: random.Random) -> Preference:
        """Draws different dimensions one after the other, and a level of each."""
        if not self._shares:  # no epoch was started
            return super().propose(preferences, count, generator)
        left = {d.name: [self._shares[key] for key in level_keys(d)] for d in preferences.dimensions}
        found = {}
        for _ in range(count):
            name = generator.choices(list(left), [sum(shares) for shares in left.values()])[0]
            shares = left.pop(name)
            found[name] = generator.choices(range(len(shares)), shares)[0]
        return Preference({name: found[name] for name in preferences.names if name in found})

    def start_epoch(self, epoch: int, preferences: PreferenceSet) -> None:
        """Sets the probabilities by the errors as they are now, unless this epoch has its own already."""
        keys = {key for dimension in preferences.dimensions for key in level_keys(dimension)}
        if epoch == self._epoch and keys <= self._shares.keys():
            return
        count, mean, _ = self._errors.moments(preferences)
        worst = mean.max().item() if count.any() else 1.0
        rows = mean.masked_fill(count == 0, worst).tolist()
        errors = [row[:size] for row, size in zip(rows, preferences.sizes, strict=True)]
        of_dimension = _shares([sum(row) / len(row) for row in errors], self.uniform)
        self._epoch, self._shares = epoch, {}
        for dimension, row, share in zip(preferences.dimensions, errors, of_dimension, strict=True):
            of_level = _shares(row, self.uniform)
            self._shares |= {key: share * part for key, part in zip(level_keys(dimension), of_level, strict=True)}

    def observe(self, preferences: PreferenceSet, probs: Tensor, targets: Tensor) -> None:
        """See the base class."""
        top = torch.tensor(preferences.sizes, device=probs.device) - 1
        self._errors.update(preferences, expected_distance(probs, targets) / top, targets)

    def metrics(self) -> dict[str, float]:
        """``sampler/dimension/level``: probability that a prompt of one dimension asks for this level."""
        return {f"sampler/{key}": share for key, share in self._shares.items()}

    def state_dict(self) -> dict[str, Any]:
        """The errors so far, and the probabilities of the epoch that runs."""
        return {"errors": self._errors.state_dict(), "epoch": self._epoch, "shares": dict(self._shares)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._errors.load_state_dict(state["errors"])
        self._epoch, self._shares = state["epoch"], dict(state["shares"])


def _shares(errors: Sequence[float], uniform: float) -> list[float]:
    """Probabilities proportional to the errors, mixed with ``uniform`` parts of an even spread."""
    total, even = sum(errors), 1 / len(errors)
    return [uniform * even + (1 - uniform) * (error / total if total else even) for error in errors]
