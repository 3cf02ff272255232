"""A working folder with a small config, for tests of commands."""

import sys
from pathlib import Path

import pytest

PARTS = "tests.helpers.cli_parts"
CONFIG = """
preferences:
  dimensions:
    warmth: [cold, warm]
    length: [short, middling, long]
model: {class_path: tests.helpers.cli_parts.Model}
data: {class_path: tests.helpers.cli_parts.Data}
trainer:
  max_epochs: 1
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  accelerator: cpu
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A fresh working folder with ``config.yaml``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    Path("config.yaml").write_text(CONFIG)
    return tmp_path
