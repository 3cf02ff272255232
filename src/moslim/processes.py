"""What the processes of a run tell each other; with one process there is nothing to tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moslim.precision import at_least_float32


def process_count() -> int:
    """Number of processes that train together."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if several else 1


def process_rank() -> int:
    """Number of this process, from 0."""
    return torch.distributed.get_rank() if process_count() > 1 else 0


def warn(message: str) -> None:
    """Warns in the first process."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # takes seconds, so not with this package

    rank_zero_warn(message, stacklevel=5)


def inform(message: str) -> None:
    """Logs a message in the first process."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_info

    rank_zero_info(message)


def of_all_processes(values: Tensor) -> Tensor:
    """The rows ``[N, ..]`` of all processes, in their order; every process must ask, with as many rows."""
    if process_count() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(process_count())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def gathered(value: Any) -> list[Any]:
    """The value of every process, in their order; every process must ask."""
    count = process_count()
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    torch.distributed.all_gather_object(values, value)
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in one of the processes; every process must ask."""
    if process_count() == 1:
        return flag
    found = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean of a tensor over all processes (float32 or finer, no gradient); every process must ask, with its shape.

    Gradients are averaged over processes. So a loss that is a sum divided by the mean count has the gradient of the
    mean over the whole batch, though processes hold different numbers of tokens.
    """
    mean = values.detach().to(at_least_float32(values.dtype), copy=True)
    count = process_count()
    if count > 1:
        torch.distributed.all_reduce(mean)
    return mean / count


def averaged(metrics: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
    """Means over all processes of scalars to log; a process that lacks one does not count. Every process must ask."""
    if process_count() == 1:
        return dict(metrics)
    found: dict[str, list[float]] = {}
    for part in gathered({name: float(value) for name, value in metrics.items()}):
        for name, value in part.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def shared_count(counted: Tensor) -> Tensor:
    """Mean over all processes of how many entries are true: what to divide a sum by, see :func:`mean_over_processes`.

    It is below 1 where there are fewer than processes, and never 0: if there are none at all, one is counted.

    Args:
        counted: Any shape, bool; every process must ask.
    """
    return mean_over_processes(counted.sum()).clamp(min=1 / process_count())
