"""Compose and read every preset, and print the help: all of revtrain that needs no torch.

    python scripts/check_configuration.py

For another Python version, or before a longer job; exits with 0 if every preset can be read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import revtrain.conf
from revtrain.conf import compose
from revtrain.config import read, registry
from revtrain.config.help import keys_help


def task_of(group: str, name: str) -> list[str]:
    """The word that goes before an architecture or a data set that is not for the usual task."""
    packages = {"arch": ("models", "arch"), "data": ("data", "name")}
    if group not in packages:
        return []
    package, key = packages[group]
    return [f"task={registry.tasks(package, registry.preset(group, name)[key])[0]}"]


def main() -> None:
    folder = Path(revtrain.conf.__file__).parent
    presets = [
        f"{group}={path.stem}"
        for group in ("arch", "data", "task", "recipe", "scale", "size", "experiment")
        for path in sorted((folder / group).glob("*.yaml"))
    ]
    for preset in presets:
        read(compose([*task_of(*preset.split("=")), preset, "data.root=."]))
    if "torch" in sys.modules:
        raise SystemExit("torch was imported")
    print(f"Python {sys.version.split()[0]}: {len(presets)} presets, {len(keys_help().splitlines())} lines of help")


if __name__ == "__main__":
    main()
