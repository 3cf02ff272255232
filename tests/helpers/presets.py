"""Presets of ``configs/data``: their launch commands, and the sources that these build."""

import contextlib
import functools
import io
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from moslim.cli import run
from moslim.data.types import Source

ROOT = Path(__file__).parents[2]


def command(name: str) -> list[str]:
    """The launch command in a preset's first lines."""
    lines = (ROOT / f"configs/data/{name}.yaml").read_text().split("#\n")[0].replace("\\\n#", "").splitlines()
    return shlex.split(lines[0].removeprefix("# python main.py ").split("  (")[0])


@functools.cache
def printed_config(*args: str) -> str:
    printed = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        run([*args, "--print_config"])
    assert stop.value.code == 0
    return printed.getvalue()


def parsed(args: list[str]) -> dict[str, Any]:
    """The config that the command line makes of arguments, without building anything."""
    return yaml.safe_load(printed_config(*args))


def built(source: dict[str, Any]) -> Source:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--source", type=Source)
    return parser.instantiate(parser.parse_object({"source": source})).source
