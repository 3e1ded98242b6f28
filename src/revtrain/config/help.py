"""The part of `revtrain --help` that lists the keys, made from what is stated of them."""

from __future__ import annotations

import textwrap

from revtrain.config.door import own_keys
from revtrain.config.keys import Key, keys_of
from revtrain.config.schema import DataConfig, Machine, Network, ProbeConfig, Training

CHOSEN = ("arch", "data.name")  # by the groups, which have a list of their own
WIDTH, COLUMN = 118, 21


def keys_help() -> str:
    """A line or two for each key, with its default; those of single architectures and data sets name them."""
    sections = (
        ("THE NETWORK", [keys_of(Network), own_keys("models")]),
        ("OPTIMISATION", [keys_of(Training)]),
        ("THE MACHINE", [keys_of(Machine)]),
        ("DATA", [keys_of(DataConfig, "data."), own_keys("data")]),
        ("THE PROBE of reconstruction errors", [keys_of(ProbeConfig, "probe.")]),
    )
    lines = []
    for title, groups in sections:
        lines.append(title)
        for name, key in (entry for group in groups for entry in group.items()):
            if name not in CHOSEN:
                lines += _entry(name, key)
    return "\n  ".join(lines)


def _entry(name: str, key: Key | dict[str, Key]) -> list[str]:
    owners = ""
    if isinstance(key, dict):  # of some architectures only
        owners, key = f" ({', '.join(key)})", next(iter(key.values()))
    default = key.rule.shown or _shown(key.default)
    text = f"{default}; {key.rule.help}{owners}"
    wrapped = textwrap.wrap(text, WIDTH - COLUMN - 4)
    first, *rest = wrapped
    return [f"  {name:<{COLUMN}} {first}", *(" " * (COLUMN + 3) + line for line in rest)]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
