"""Where the time of a step goes."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Seconds per phase.

    Args:
        device: Waits for this device's queue at every lap; CUDA would otherwise be timed while it still works.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self.laps: dict[str, float] = {}
        self._last = self._now()

    def lap(self, name: str) -> None:
        """Ends a phase that began with the last lap."""
        now = self._now()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

    def read(self) -> float:
        """Seconds since the last lap, which goes on."""
        return self._now() - self._last

    def _now(self) -> float:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
