"""The most memory that was in use for a while."""

from __future__ import annotations

from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


class PeakMemory:
    """Largest memory in use since the last reset: of tensors on a CUDA device, else of the whole process.

    Resetting sets torch's own peak statistics of the device back, too.

    Args:
        device: The device that is used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Begins anew."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._known:
            (_PROCESS / "clear_refs").write_text("5", encoding="ascii")  # the kernel's way to say so

    def read(self) -> int | None:
        """Bytes; None on systems that do not tell (those without ``/proc``)."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._known:
            return None
        lines = (_PROCESS / "status").read_text(encoding="ascii").splitlines()
        (peak,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024

    @property
    def _known(self) -> bool:
        return (_PROCESS / "clear_refs").exists()
