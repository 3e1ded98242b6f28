"""Architectures and data sets are found, not listed: one file in `revtrain/models` or `revtrain/data` each.

Folders in the environment variable REVTRAIN_PATH (separated as in PATH) may hold more of them, beside the package:
`FOLDER/models/NAME.py` with `FOLDER/conf/arch/NAME.yaml`, `FOLDER/data/NAME.py` with `FOLDER/conf/data/NAME.yaml`.

Neither torch nor Hydra is imported here, nor by the files found: what they need of torch they import where they build.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

VARIABLE = "REVTRAIN_PATH"


def plugin_folders() -> list[Path]:
    """The folders of REVTRAIN_PATH, absolute, in its order."""
    return [Path(each).expanduser().absolute() for each in os.environ.get(VARIABLE, "").split(os.pathsep) if each]


def names(package: str) -> list[str]:
    """What the package `models` or `data` offers, sorted: its modules but for those that it lists as SHARED."""
    found = _package(package)
    return sorted(module.name for module in iter_modules(found.__path__) if module.name not in found.SHARED)


def load(package: str, name: str) -> ModuleType:
    """The module of one architecture or data set.

    Raises:
        ImportError: a package that it needs is missing.
    """
    return import_module(f"{_package(package).__name__}.{name}")


def settings(package: str, name: str) -> type | None:
    """The dataclass of the keys that this architecture or data set has besides the common ones; None: none."""
    return getattr(load(package, name), "Settings", None)


def _package(name: str) -> ModuleType:
    package = import_module(f"revtrain.{name}")
    for folder in plugin_folders():
        place = str(folder / name)
        if place not in package.__path__:
            package.__path__.append(place)
    return package
