"""Compose and read every preset, and print the help: all of revtrain that needs no torch.

    python scripts/check_configuration.py

For another Python version, or before a longer job; exits with 0 if every preset can be read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import revtrain.conf
from revtrain.conf import compose
from revtrain.config import read
from revtrain.config.help import keys_help


def main() -> None:
    folder = Path(revtrain.conf.__file__).parent
    presets = [
        f"{group}={path.stem}"
        for group in ("arch", "data", "scale", "experiment")
        for path in sorted((folder / group).glob("*.yaml"))
    ]
    for preset in presets:
        read(compose([preset, "data.root=."]))
    if "torch" in sys.modules:
        raise SystemExit("torch was imported")
    print(f"Python {sys.version.split()[0]}: {len(presets)} presets, {len(keys_help().splitlines())} lines of help")


if __name__ == "__main__":
    main()
