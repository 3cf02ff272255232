"""Communication between the processes of a run, and sharded weights (PyTorch's FSDP2).

Lightning's ``ModelParallelStrategy`` asks modules to shard their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from moslim.ops.numerics import at_least_float32
from moslim.ops.transformers_compat import block_kinds
from moslim.utils.errors import UsageError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


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


def shard_mesh(module: LightningModule) -> DeviceMesh | None:
    """The processes that share a module's weights; None where its strategy leaves them whole.

    Raises:
        UsageError: The strategy is to divide computations too.
    """
    if module.device_mesh is None:
        return None
    divided = module.device_mesh["tensor_parallel"].size()
    if divided > 1:
        raise UsageError(
            f"trainer.strategy.tensor_parallel_size is {divided}, but models are sharded over data-parallel processes "
            "only: set it to 1, and data_parallel_size to the number of all processes (configs/trainer/fsdp.yaml)"
        )
    return module.device_mesh["data_parallel"]


def shard(model: nn.Module, mesh: DeviceMesh, between_passes: bool = True) -> None:
    """Puts a model's weights into shards, block by block.

    Args:
        model: The model; transformers' say which of their modules are blocks. It is changed in place.
        mesh: The processes.
        between_passes: Whether each block's weights are whole only while it computes. All processes must then make the
            same number of passes. Otherwise :class:`StepShards` says when.

    Raises:
        UsageError: A transformer does not say which of its modules are blocks.
    """
    kinds = block_kinds(model)
    blocks = [module for module in model.modules() if type(module).__name__ in (kinds or ())]
    if not blocks and kinds is not None:
        raise UsageError(
            f"{type(model).__name__} does not name its blocks (_no_split_modules), so that its weights cannot be "
            "sharded: take trainer.strategy ddp"
        )
    for part in (*blocks, model):
        sharded: Any = fully_shard(part, mesh=mesh, reshard_after_forward=between_passes)
        if mesh.device_type == "cpu":  # gloo has no mean, and torch 2.8 would take its sum for one
            sharded.set_force_sum_reduction_for_comms(True)
    if not between_passes:
        model.set_reshard_after_backward(False)  # type: ignore[operator]  # it is an FSDPModule now


class StepShards:
    """A model whose weights are whole in every process during a training step, and in shards between steps.

    So processes may make different numbers of passes: they sample answers of different lengths. Gradients are summed up
    over processes, and cut into shards, once per block, after the backward pass of the last pass through it.

    Args:
        model: The model, which is changed in place.
        mesh: The processes.
    """

    def __init__(self, model: Any, mesh: DeviceMesh) -> None:
        shard(model, mesh, between_passes=False)
        self._model = model
        self._parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._rooted = len(self._parts) == 1
        self.whole = False

    def gather(self) -> None:
        """Makes the weights whole; nothing happens where they are. Every process must ask."""
        if not self._rooted:
            self._make_root()
        for part in self._parts:
            part.unshard()
        self.whole = True

    def release(self) -> None:
        """Gives up what belongs to other processes."""
        for part in self._parts:
            part.reshard()
        self.whole = False

    @torch.no_grad()
    def _make_root(self) -> None:
        """Makes a pass through the whole model: FSDP takes the first module that makes one for the root of the rest.

        A pass through the backbone alone would make the backbone the root.
        """
        self._model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._model.device), use_cache=False)
        self._rooted = True


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are kept in shards."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def outline(model: Any) -> Any:
    """A copy of a model that is not sharded yet, with the same configuration and without the numbers in its weights."""
    tensors = {id(b): b.to("meta") for b in model.buffers()}
    tensors |= {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    return deepcopy(model, {**tensors, id(model.config): model.config})


def fill(outlined: Any, model: nn.Module) -> Any:
    """Collects a sharded model's weights in the first process, in an outline of it. Every process must ask."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if process_rank() == 0:
        outlined.load_state_dict(weights, assign=True)
    return outlined


def whole(tensor: Tensor) -> Tensor:
    """A tensor without other processes' part missing; where it is in shards, every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
