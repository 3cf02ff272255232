"""Two processes that find each other as those of torchrun do.

They are forks of a server that runs nothing else: a fork of the tests' own process inherits the locks of threads that
it does not have, and sometimes crashed in FSDP.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import ModelParallelStrategy


def in_two(function: Callable[..., Any], *arguments: Any) -> None:
    """Calls a function of a module in both; what it finds, it must write to files.

    Raises:
        ProcessRaisedException: It failed in one of them.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(
        ["moslim.cli", "moslim.policy.policy_trainer", "moslim.reward.reward_classifier"]
    )
    mp.start_processes(_become, (port, function, arguments), nprocs=2, start_method="forkserver")


def sharded() -> ModelParallelStrategy:
    """FSDP2 over both, with checkpoints as configs/trainer/fsdp.yaml has them."""
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)


def _become(rank: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "fork"}
    os.environ.update({name: str(value) for name, value in (own | found).items()})
    torch.set_num_threads(1)
    function(*arguments)
