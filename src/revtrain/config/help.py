"""The part of `revtrain --help` that lists the keys, made from what is stated of them."""

from __future__ import annotations

import textwrap

from revtrain.config.door import own_keys
from revtrain.config.keys import Key, keys_of, typed
from revtrain.config.schema import DataConfig, Machine, Network, ProbeConfig, Training

CHOSEN = ("arch", "data.name")  # by the groups, which have a list of their own
WIDTH, COLUMN = 118, 24


def keys_help() -> str:
    """A line or two for each key: its meaning, and its default in brackets. Keys that only some architectures or data
    sets have stand below a line that names those."""
    lines = [
        "THE NETWORK",
        *_entries(keys_of(Network)),
        *_own_entries("models", "arch"),
        "OPTIMISATION",
        *_entries(keys_of(Training)),
        "THE MACHINE",
        *_entries(keys_of(Machine)),
        "DATA",
        *_entries(keys_of(DataConfig, "data.")),
        *_own_entries("data", "data"),
        "THE PROBE of reconstruction errors",
        *_entries(keys_of(ProbeConfig, "probe.")),
    ]
    return "\n".join(lines)


def _entries(keys: dict[str, Key], indent: int = 2) -> list[str]:
    return [line for name, key in keys.items() if name not in CHOSEN for line in _entry([key], indent)]


def _own_entries(package: str, group: str) -> list[str]:
    """The keys that only some architectures or data sets have, in the order of those that share most."""
    shared: dict[tuple[str, ...], list[list[Key]]] = {}
    for owners in own_keys(package).values():
        shared.setdefault(tuple(owners), []).append(list(owners.values()))
    lines = []
    for names, keys in sorted(shared.items(), key=lambda each: (-len(each[0]), each[0])):
        lines += [f"  with {group}={' or '.join(names)}", *(line for of_all in keys for line in _entry(of_all, 4))]
    return lines


def _entry(keys: list[Key], indent: int) -> list[str]:
    """Of one key, as each of its owners states it: the words of the first, and all defaults where they differ."""
    key = keys[0]
    default = " or ".join(dict.fromkeys(each.rule.shown or typed(each.default) for each in keys))
    words = [choice for choice in key.rule.choices if choice not in key.rule.help]
    choices = f": {', '.join(key.rule.choices)}" if words else ""
    first, *rest = textwrap.wrap(f"{key.rule.help}{choices} [{default}]", WIDTH - COLUMN - 2)
    return [f"{' ' * indent + key.name:<{COLUMN}}  {first}", *(" " * (COLUMN + 2) + line for line in rest)]
