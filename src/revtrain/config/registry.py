"""Architectures and data sets are found, not listed: one file in `revtrain/models` or `revtrain/data` each.

Folders in the environment variable REVTRAIN_PATH (separated as in PATH) may hold more of them, beside the package:
`FOLDER/models/NAME.py` with `FOLDER/conf/arch/NAME.yaml`, `FOLDER/data/NAME.py` with `FOLDER/conf/data/NAME.yaml`.

Neither torch nor Hydra is imported here, nor by the files found: what they need of torch they import where they build.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from revtrain.machine import files

VARIABLE = "REVTRAIN_PATH"


def plugin_folders() -> list[Path]:
    """The folders of REVTRAIN_PATH, absolute, in its order."""
    folders = (files.place(each, VARIABLE) for each in os.environ.get(VARIABLE, "").split(os.pathsep) if each)
    return [folder if folder.is_absolute() else files.working_folder() / folder for folder in folders]


def fix_plugin_folders() -> None:
    """Let the folders of REVTRAIN_PATH mean the same wherever this process and those that it starts go."""
    if VARIABLE in os.environ:
        os.environ[VARIABLE] = os.pathsep.join(map(str, plugin_folders()))


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


def tasks(package: str, name: str) -> tuple[str, ...]:
    """What an architecture is for, or the labels of a data set: of `revtrain.config.schema.TASKS`."""
    module = load(package, name)
    return (module.TRAITS.task,) if package == "models" else getattr(module, "TASKS", ("classify",))


def preset(group: str, name: str) -> dict[str, Any]:
    """What `conf/GROUP/NAME.yaml` sets, and the yamls that it builds on; {} where there is no such file.

    In the order of Hydra's search: the package's own folder, then those of REVTRAIN_PATH.
    """
    values = _yaml(group, name)
    bases = [each for each in values.pop("defaults", ()) if isinstance(each, str) and each != "_self_"]
    below: dict[str, Any] = {}
    for base in bases:
        below |= preset(group, base)
    return below | values


def chosen_by(group: str, name: str) -> dict[str, str]:
    """The files of other groups that `conf/GROUP/NAME.yaml` chooses, as {"arch": "layerwise"}."""
    entries = [each for each in _yaml(group, name).get("defaults", ()) if isinstance(each, dict)]
    return {key.split("/")[-1]: value for each in entries for key, value in each.items() if isinstance(value, str)}


def _yaml(group: str, name: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    for folder in (*_own_conf(), *(each / "conf" for each in plugin_folders())):
        place = folder / group / f"{name}.yaml"
        if place.is_file():
            values: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(place))  # type: ignore[assignment]
            return values
    return {}


def default(group: str) -> str | None:
    """What `conf/config.yaml` chooses of a group; None: nothing."""
    from omegaconf import OmegaConf

    (folder,) = _own_conf()
    entries: list[Any] = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))["defaults"]  # type: ignore
    return next((each[group] for each in entries if isinstance(each, dict) and group in each), None)


def _own_conf() -> list[Path]:
    spec = find_spec("revtrain.conf")  # found, not imported: that would need Hydra
    return [Path(each) for each in (spec and spec.submodule_search_locations) or ()]


def _package(name: str) -> ModuleType:
    package = import_module(f"revtrain.{name}")
    for folder in plugin_folders():
        place = str(folder / name)
        if place not in package.__path__:
            package.__path__.append(place)
    return package
