"""What a step of ours consists of, and how fast its matrix products alone could be; part of throughput.py."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback
from racers import ours
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from torch.utils.flop_counter import FlopCounterMode
from worlds import World, save

SHOWN = 12
"""Operations in the table; the rest is added up."""


Shape = tuple[int, ...]


def _in_place(_: Any, left: Shape, right: Shape, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _packed(hidden: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(hidden) * weight[0]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


def _attention_backward(_: Any, query: Shape, key: Shape, value: Shape, *__: Any, **___: Any) -> int:
    return 5 * _attention(query, key, value) // 2  # five products of that size, in place of two


COUNTED = {
    torch.ops.aten.addmm_: _in_place,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.mkldnn._linear_pointwise: _packed,
}
"""What the counter does not know by itself."""


class Steps(Callback):
    """Profiles the third step, counts the operations of the fourth, and times those that follow, undisturbed."""

    def __init__(self) -> None:
        self.profiler = torch_profile(activities=[ProfilerActivity.CPU])
        self.counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        watch = {2: self.profiler, 3: self.counter}.get(trainer.global_step)
        if watch is not None:
            watch.__enter__()
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        watch = {3: self.profiler, 4: self.counter}.get(trainer.global_step)
        if watch is not None:
            watch.__exit__(None, None, None)


def profile(world: World) -> dict[str, Any]:
    """Where the time of a step goes, operation by operation, and its floor.

    Returns:
        ``operations``: name to share of the time and number of calls; ``gflop`` of matrix products in a step,
        ``gflops_per_s`` of the fastest product found, ``floor_s`` that they would take at that rate, ``step_s``.
    """
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:
        save(world, Path(folder))
        ours(world, Path(folder), 9, [steps], {})
    found = [event for event in steps.profiler.key_averages() if event.self_cpu_time_total > 0]
    found.sort(key=lambda event: event.self_cpu_time_total, reverse=True)
    whole = sum(event.self_cpu_time_total for event in found)
    shown = {
        _name(event.key): {"share": event.self_cpu_time_total / whole, "calls": event.count} for event in found[:SHOWN]
    }
    others = found[SHOWN:]
    shown["others"] = {
        "share": sum(event.self_cpu_time_total for event in others) / whole,
        "calls": sum(event.count for event in others),
    }
    work, rate = steps.counter.get_total_flops() / 1e9, fastest_product()
    return {
        "operations": {name: {**own, "share": round(own["share"], 4)} for name, own in shown.items()},
        "gflop": round(work, 2),
        "gflops_per_s": round(rate, 1),
        "floor_s": round(work / rate, 3),
        "step_s": round(median(steps.seconds[4:]), 3),
    }


def _name(key: str) -> str:
    """What an event of the profiler is; the optimizer's holds all of a step's Python, as Lightning runs it in there."""
    return "Python, between operations" if key.startswith("Optimizer.step") else key


def fastest_product() -> float:
    """GFLOP per second of float32 matrix products, the best of several shapes and repetitions."""
    rates = []
    for rows, inner, columns in ((512, 256, 768), (1024, 256, 1024), (1024, 1024, 1024), (2048, 512, 2048)):
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        for _ in range(10):
            start = time.perf_counter()
            torch.mm(left, right)
            rates.append(2 * rows * inner * columns / (time.perf_counter() - start) / 1e9)
    return max(rates)
