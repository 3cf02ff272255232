"""Preferences that name more and more dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from moslim.errors import UsageError
from moslim.preferences import PreferenceSet
from moslim.sampling.uniform import Reachable


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
