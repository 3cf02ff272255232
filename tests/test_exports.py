"""The public names of the package, which configs, docs and messages use."""

from collections import defaultdict
from importlib import import_module

import pytest

PACKAGES = (
    "moslim",
    "moslim.algorithms",
    "moslim.callbacks",
    "moslim.data",
    "moslim.evaluation",
    "moslim.generation",
    "moslim.mapping",
    "moslim.ops",
    "moslim.policy",
    "moslim.reward",
    "moslim.supervised",
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
    assert len(names) > 50
    assert {name: packages for name, packages in names.items() if len(packages) > 1} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_unknown_names_are_attribute_errors(package: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Nothing'"):
        import_module(package).Nothing  # noqa: B018
    assert set(import_module(package).__all__) <= set(dir(import_module(package)))
