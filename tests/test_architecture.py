"""The order of imports, as ``docs/architecture.md`` states it, is the one that the code keeps."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (SOURCE / "moslim").rglob("*.py")
}
LEVELS = {
    f"moslim.{name}": level
    for level, names in enumerate(
        re.findall(r"^\| \d+ \| (.*?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    )
    for name in re.findall(r"`([\w.]+)`", names)
}


def imports(module: str) -> Iterator[str]:
    """The modules of moslim that a module imports when it is imported itself."""
    for node in ast.parse(FILES[module].read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moslim"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else str(node.module)


def level(module: str) -> int:
    """The level of the longest name in the table that a module lies under."""
    return LEVELS[max((name for name in LEVELS if f"{module}.".startswith(f"{name}.")), key=len)]


def test_every_module_is_in_the_table() -> None:
    missing = [module for module in FILES if not any(f"{module}.".startswith(f"{name}.") for name in LEVELS)]
    assert missing == ["moslim"]  # the public names, imported when they are asked for
    assert [name for name in LEVELS if name not in FILES] == []


def test_imports_run_one_way() -> None:
    upward = [
        f"{module} imports {other}"
        for module in FILES
        if module != "moslim"
        for other in imports(module)
        if level(other) > level(module)
    ]
    assert upward == []


@pytest.mark.slow
def test_no_module_imports_itself_by_others() -> None:
    list(TopologicalSorter({module: set(imports(module)) - {module} for module in FILES}).static_order())
