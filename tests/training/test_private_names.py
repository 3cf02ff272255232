"""No module uses a private or undocumented name of another library, apart from the two that collect such uses."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "src"
COLLECT = ("moslim/training/lightning_compat.py", "moslim/ops/transformers_compat.py")
FILES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.glob("moslim/**/*.py"))}

EXEMPT = {"_init_weights", "_supports_flash_attn", "_supports_sdpa"}
"""Members of ``PreTrainedModel`` that transformers documents for authors of models, who must override them."""
NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}
"""Public members of named tuples, whose underscore only keeps them apart from fields."""
UNDOCUMENTED_MODULES = (
    "lightning.pytorch.loops",
    "lightning.pytorch.trainer.connectors",
    "peft.utils.constants",
    "peft.utils.other",
    "transformers.integrations",
    "transformers.models",
)
UNDOCUMENTED_ATTRIBUTES = ("batch_progress", "epoch_loop", "epoch_progress", "fit_loop", "predict_loop")


def is_private(name: str) -> bool:
    return name.startswith("_") and name.strip("_") != "" and not name.endswith("__")


def defined(tree: ast.Module) -> set[str]:
    """Names that a module defines: functions, classes, variables, and attributes of ``self`` and ``cls``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign_names(tree: ast.Module, everywhere: set[str]) -> Iterator[tuple[str, int]]:
    """Yields private or undocumented names of other libraries in a module, with their lines.

    Args:
        tree: The module.
        everywhere: Names that some module of the package defines; a mixin may use those of another on ``self``.
    """
    here = defined(tree)
    inside_texts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            own = here | everywhere if is_self(node.value) else here
            on_super = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
            if node.attr in UNDOCUMENTED_ATTRIBUTES or (is_private(node.attr) and (on_super or node.attr not in own)):
                yield node.attr, node.lineno
        elif isinstance(node, ast.Import | ast.ImportFrom):
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                path = f"{start}{alias.name}"
                private = not path.startswith("moslim.") and any(map(is_private, path.split(".")))
                if private or f"{path}.".startswith(tuple(f"{module}." for module in UNDOCUMENTED_MODULES)):
                    yield path, node.lineno
        elif isinstance(node, ast.keyword) and node.arg and is_private(node.arg) and node.arg not in everywhere:
            yield node.arg, node.value.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside_texts:
            names = {node.value} if node.value.isidentifier() and is_private(node.value) else set()
            yield from ((name, node.lineno) for name in names - here - everywhere)


EVERYWHERE = set().union(*(defined(tree) for name, tree in FILES.items() if name not in COLLECT))


@pytest.mark.slow
def test_private_names_of_other_libraries_are_in_two_modules():
    found = [
        f"src/{file}:{line} uses `{name}`"
        for file, tree in FILES.items()
        if file not in COLLECT
        for name, line in foreign_names(tree, EVERYWHERE)
        if name not in EXEMPT | NAMED_TUPLES
    ]
    assert found == [], f"put it into one of {', '.join(COLLECT)}, with a test"


def test_no_class_overrides_a_private_member_of_another_library():
    found = set()
    for file in FILES:
        module = importlib.import_module(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        if file in COLLECT:
            continue
        for kind in vars(module).values():
            if not isinstance(kind, type) or kind.__module__ != module.__name__:
                continue
            bases = [base for base in kind.__mro__ if not base.__module__.startswith("moslim")]
            foreign = [base for base in bases if base.__module__.partition(".")[0] not in sys.stdlib_module_names]
            found |= {
                f"{file}: {kind.__name__}.{name} of {base.__module__}.{base.__name__}"
                for name in filter(is_private, vars(kind).keys() & defined(FILES[file]))
                for base in foreign
                if name in vars(base) and name not in EXEMPT
            }
    assert sorted(found) == [], f"put it into one of {', '.join(COLLECT)}, as a method with a public name"


@pytest.mark.parametrize("name", sorted(EXEMPT))
def test_every_exemption_is_needed(name):
    assert name in EVERYWHERE


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("trainer._loop", "_loop"),
        ("self._loop", "_loop"),
        ("super()._own()\ndef _own(): ...", "_own"),
        ("from torch._C import Node", "torch._C.Node"),
        ("from torch import _VF", "torch._VF"),
        ("import torch._dynamo", "torch._dynamo"),
        ("from transformers.integrations.liger import apply", "transformers.integrations.liger.apply"),
        ("getattr(model, '_loop', None)", "_loop"),
        ("load(path, _raise=False)", "_raise"),
        ("trainer.fit_loop.max_epochs", "fit_loop"),
    ],
)
def test_a_private_name_is_found(code, name):
    assert [found for found, _ in foreign_names(ast.parse(code), {"_other"})] == [name]


@pytest.mark.parametrize(
    "code",
    [
        "class A:\n    def f(self):\n        self._x = 1\n        return self._x",
        "self._other",
        "from moslim.data.data_module import _rows",
        "f'limit{stage}_batches'",
        "__version__\ntorch.__version__",
        "_other = 1\nmodule._other",
    ],
)
def test_own_names_are_left_alone(code):
    assert list(foreign_names(ast.parse(code), {"_other"})) == []
