"""The public names of the package, which configs, docs and messages use."""

import ast
import inspect
from collections import Counter, defaultdict
from importlib import import_module
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

import moslim

PACKAGES = (
    "moslim",
    "moslim.algorithms",
    "moslim.callbacks",
    "moslim.data",
    "moslim.evaluation",
    "moslim.experimental",
    "moslim.generation",
    "moslim.mapping",
    "moslim.ops",
    "moslim.policy",
    "moslim.reward",
    "moslim.training",
)


def public() -> dict[str, list[str]]:
    """Public classes by name, each with the packages that export it."""
    found = defaultdict(list)
    for package in PACKAGES:
        module = import_module(package)
        for name in module.__all__:
            assert getattr(module, name).__name__ == name
            found[name].append(package)
    return found


def test_every_public_name_stands_for_one_class_in_one_package() -> None:
    names = public()
    assert {"PolicyTrainer", "RLOO"} <= names.keys()
    assert {name: packages for name, packages in names.items() if len(packages) > 1} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_unknown_names_are_attribute_errors(package: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Nothing'"):
        import_module(package).Nothing  # noqa: B018
    assert set(import_module(package).__all__) <= set(dir(import_module(package)))


def test_no_two_classes_of_the_package_have_one_name() -> None:
    """Checkpoints know them by their names."""
    trees = [ast.parse(file.read_text()) for file in Path(moslim.__file__).parent.rglob("*.py")]
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert len(names) > 100 and [name for name, count in names.items() if count > 1] == []


def test_printed_configs_name_classes_by_their_public_paths() -> None:
    checked = 0
    for name, (package,) in public().items():
        kind = getattr(import_module(package), name)
        if not inspect.isclass(kind) or inspect.isabstract(kind):
            continue
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--kind", type=type[object])
        given = parser.parse_args([f"--kind={kind.__module__}.{name}"])
        assert parser.dump(given).strip() == f"kind: {package}.{name}"
        checked += 1
    assert checked > 40
