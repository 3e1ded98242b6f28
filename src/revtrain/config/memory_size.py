"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from revtrain.errors import RevtrainError

_UNITS = {"b": 1} | {
    f"{letter}{i}b": base**power
    for power, letter in enumerate("kmgt", start=1)
    for i, base in (("", 1000), ("i", 1024))
}


def parse_memory(text: str) -> int:
    """Bytes of a size with its unit: "500MiB", "1.5 GiB", "2GB"; MiB = 2^20 bytes, MB = 10^6 bytes.

    Raises:
        RevtrainError: no unit, no such unit, or nothing at all.
    """
    words = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text), re.IGNORECASE)
    unit = words[2].lower() if words else ""
    size = int(float(words[1]) * _UNITS[unit]) if words and unit in _UNITS else 0
    if size < 1:
        number = words[1] if words and float(words[1]) else "1"
        near = {"": "MiB", "t": "TiB", "g": "GiB", "m": "MiB", "k": "KiB"}.get(unit)
        hint = f" Did you mean {number}{near}?" if words and near and float(words[1]) else ""
        raise RevtrainError(
            f"memory_limit={text} was given; expected a size with its unit.{hint}\n"
            "As in memory_limit=500MiB or memory_limit=2GB; KiB, MiB, GiB, TiB are powers of 1024, "
            "kB, MB, GB, TB of 1000."
        )
    return size
