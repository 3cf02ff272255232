"""Communication between the processes of a run, and sharded weights (PyTorch's FSDP2).

Lightning's ``ModelParallelStrategy`` leaves the sharding to modules. Functions marked as collective must be called by
every process.
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
    """Returns the number of processes of the run."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_distributed else 1


def process_rank() -> int:
    """Returns the rank of this process."""
    return torch.distributed.get_rank() if process_count() > 1 else 0


def warn(message: str) -> None:
    """Warns on rank 0."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # a slow import

    rank_zero_warn(message, stacklevel=5)


def inform(message: str) -> None:
    """Logs a message on rank 0."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_info

    rank_zero_info(message)


def of_all_processes(values: Tensor) -> Tensor:
    """Concatenates rows ``[N, ..]`` of all processes in rank order. Collective, with equal shapes."""
    if process_count() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(process_count())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def gathered(value: Any) -> list[Any]:
    """Returns the value of every process, in rank order. Collective."""
    count = process_count()
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    torch.distributed.all_gather_object(values, value)
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process. Collective."""
    if process_count() == 1:
        return flag
    maximum = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(maximum, torch.distributed.ReduceOp.MAX)
    return bool(maximum)


def mean_over_processes(values: Tensor) -> Tensor:
    """Returns the mean of a tensor over all processes, without gradient, in float32 or finer. Collective.

    Gradients are averaged over processes. So a loss that is a sum divided by the mean count has the gradient of the
    mean over the whole batch, also if processes hold different numbers of tokens.

    Args:
        values: Tensor of the same shape in every process.
    """
    mean = values.detach().to(at_least_float32(values.dtype), copy=True)
    count = process_count()
    if count > 1:
        torch.distributed.all_reduce(mean)
    return mean / count


def averaged(metrics: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
    """Returns the mean of each scalar over the processes that have it. Collective."""
    if process_count() == 1:
        return dict(metrics)
    values_by_name: dict[str, list[float]] = {}
    for process_metrics in gathered({name: float(value) for name, value in metrics.items()}):
        for name, value in process_metrics.items():
            values_by_name.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in values_by_name.items()}


def shared_count(mask: Tensor) -> Tensor:
    """Returns the mean number of true entries per process, the denominator of a loss sum. Collective.

    See :func:`mean_over_processes`. At least one entry is counted in all processes together, so the mean is never 0.

    Args:
        mask: Bool, any shape.
    """
    return mean_over_processes(mask.sum()).clamp(min=1 / process_count())


def shard_mesh(module: LightningModule) -> DeviceMesh | None:
    """Returns the mesh of processes that share a module's weights; None if the strategy does not shard them.

    Raises:
        UsageError: The strategy uses tensor parallelism.
    """
    if module.device_mesh is None:
        return None
    size = module.device_mesh["tensor_parallel"].size()
    if size > 1:
        raise UsageError(
            f"trainer.strategy.tensor_parallel_size is {size}, but models are sharded over data-parallel processes "
            "only: set it to 1, and data_parallel_size to the number of all processes (configs/trainer/fsdp.yaml)"
        )
    return module.device_mesh["data_parallel"]


def shard(model: nn.Module, mesh: DeviceMesh, between_passes: bool = True) -> None:
    """Shards a model's weights block by block, in place.

    Args:
        model: The model; a transformers model declares its blocks (``_no_split_modules``).
        mesh: Processes that share the weights.
        between_passes: Whether to reshard each block after its forward and backward pass. All processes must then make
            the same number of passes. Otherwise :class:`StepShards` reshards.

    Raises:
        UsageError: A transformers model does not declare its blocks.
    """
    block_classes = block_kinds(model)
    blocks = [module for module in model.modules() if type(module).__name__ in (block_classes or ())]
    if not blocks and block_classes is not None:
        raise UsageError(
            f"{type(model).__name__} does not name its blocks (_no_split_modules), so that its weights cannot be "
            "sharded: set trainer.strategy to ddp"
        )
    for module in (*blocks, model):
        sharded: Any = fully_shard(module, mesh=mesh, reshard_after_forward=between_passes)
        if mesh.device_type == "cpu":  # gloo has no mean; torch 2.8 would use the sum
            sharded.set_force_sum_reduction_for_comms(True)
    if not between_passes:
        model.set_reshard_after_backward(False)  # type: ignore[operator]  # an FSDPModule after fully_shard


class StepShards:
    """Model whose weights are whole in every process during a training step, and sharded between steps.

    So processes can make different numbers of passes, since they sample completions of different lengths. Gradients are
    reduced and sharded once per block, after the backward pass of the last pass through it.

    Args:
        model: The model, changed in place.
        mesh: Processes that share the weights.
    """

    def __init__(self, model: Any, mesh: DeviceMesh) -> None:
        shard(model, mesh, between_passes=False)
        self._model = model
        self._parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._has_root = len(self._parts) == 1
        self.whole = False

    def gather(self) -> None:
        """Gathers the whole weights; does nothing if they are whole. Collective."""
        if not self._has_root:
            self._make_root()
        for part in self._parts:
            part.unshard()
        self.whole = True

    def release(self) -> None:
        """Frees the shards of other processes."""
        for part in self._parts:
            part.reshard()
        self.whole = False

    @torch.no_grad()
    def _make_root(self) -> None:
        """Runs the whole model once, since FSDP makes the first module that runs the root.

        If the backbone ran first, it would become the root.
        """
        self._model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._model.device), use_cache=False)
        self._has_root = True


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are sharded."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def outline(model: Any) -> Any:
    """Returns a copy of an unsharded model with weights on the meta device; the configuration is shared."""
    meta_tensors = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    meta_tensors |= {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    return deepcopy(model, {**meta_tensors, id(model.config): model.config})


def fill(outlined: Any, model: nn.Module) -> Any:
    """Loads the whole weights of a sharded model into its :func:`outline`, on rank 0. Collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if process_rank() == 0:
        outlined.load_state_dict(weights, assign=True)
    return outlined


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor. Collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
