"""Settings of every test: one thread, no network, no noise."""

import gc
import os

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", TOKENIZERS_PARALLELISM="false")

import pytest
import torch
from transformers.utils import logging as transformers_logging

gc.disable()  # until the tests are collected: imports create many objects and hardly any garbage
torch.set_num_threads(1)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _default_dtype_and_threads() -> None:
    """A test that changes a global setting must not change the next test."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no core waits for them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Excludes modules and tests from garbage collection, which would traverse them again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()
