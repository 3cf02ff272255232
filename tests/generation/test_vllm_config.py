"""configs/engine/vllm.yaml over the quickstart's policy, by the command in its first line."""

import contextlib
import shlex
import sys
from pathlib import Path

import pytest

from moslim.cli import run
from moslim.generation.vllm_engine import VLLMEngine
from tests.helpers.small_server import SmallServer
from tests.helpers.tiny_world import FEW_STEPS, ONE_EACH, SMALL_POLICY, save_world

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_layer_runs_by_its_own_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = (ROOT / "configs/engine/vllm.yaml").read_text().splitlines()[0].removeprefix("# python main.py ")
    save_world(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "argv", ["main.py"])
    server = SmallServer(str(tmp_path / "outputs/quickstart/starter/model"))
    try:
        with contextlib.chdir(tmp_path):
            small = shlex.split(f"{FEW_STEPS} {SMALL_POLICY} {ONE_EACH} --data.source.policy_rows 64")
            cli = run([*shlex.split(command), *small, "--model.engine.urls", f"[{server.url}]"])
    finally:
        server.stop()
    engine = cli.model.engine
    assert isinstance(engine, VLLMEngine) and engine.max_new_tokens == 6  # kept from what was layered under it
    assert cli.trainer.global_step == 2 and engine.difference < 1e-5
    pushed = [Path(body["kwargs"]["weights_path"]) for body in server.bodies("/collective_rpc")]
    assert len(set(pushed)) == 3  # at the start, after each step
    assert set((tmp_path / "outputs/vllm").iterdir()) == set(pushed[-2:])
