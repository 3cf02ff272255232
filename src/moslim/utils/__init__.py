"""Helpers that are independent of models, and the lazy import of a package's public names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, names: Mapping[str, str]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Returns ``__all__``, ``__getattr__`` and ``__dir__`` of a package that imports its public names on first access.

    An eager import would be slow or circular, since the import of a submodule runs the package's ``__init__`` first.

    Args:
        package: Name of the package.
        names: Defining module by public name.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(names[name]), name)

    public = sorted(names)
    return public, get, lambda: public
