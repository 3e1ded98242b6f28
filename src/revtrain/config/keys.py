"""A key of the configuration, stated once.

A key is a field of a dataclass: its annotation is the type, its default the default, and `key` adds what it means, its
choices and its bounds. The schema that Hydra types the command line with, `revtrain --help` and the refusals of wrong
values all follow from that one statement.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from revtrain.errors import RevtrainError

LARGEST_INT = 2**31 - 1


@dataclass(frozen=True)
class Rule:
    """What a key means and which values it takes, besides its type.

    `choices` are for words, the bounds for numbers; `remark` is the second line of a refusal.
    """

    help: str
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float = LARGEST_INT
    remark: str = ""
    count: int | None = None  # of a list of numbers, which may stand for a number
    shown: str | None = None  # the default in `--help`; None: as it is
    path: bool = False  # the value names a file or folder; a relative one means where the command was typed


@dataclass(frozen=True)
class Key:
    """A key with all that was stated of it."""

    name: str  # dotted, as on the command line
    type: Any  # its annotation
    default: Any
    rule: Rule

    @property
    def types(self) -> tuple[type, ...]:
        """The types of its values, without None."""
        options = get_args(self.type) if get_origin(self.type) in (Union, UnionType) else (self.type,)
        return tuple(option for option in options if option is not NoneType)

    @property
    def takes_auto(self) -> bool:
        """Whether the word auto may stand for a number."""
        return str in self.types and len(self.types) > 1

    @property
    def is_optional(self) -> bool:
        return NoneType in get_args(self.type)


def key(default: Any, help: str, **bounds: Any) -> Any:
    """A field of a configuration's dataclass; `bounds` are the other attributes of `Rule`."""
    metadata = {"rule": Rule(help, **bounds)}
    if isinstance(default, list):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@cache
def keys_of(part: type, prefix: str = "") -> dict[str, Key]:
    """The keys that a dataclass states, those of nested ones included: {"data.augment.pad": Key(...), ...}."""
    hints = get_type_hints(part)
    found: dict[str, Key] = {}
    for item in fields(part):
        name = prefix + item.name
        if is_dataclass(hints[item.name]):
            found |= keys_of(hints[item.name], f"{name}.")
        elif "rule" in item.metadata:
            default = item.default if item.default_factory is MISSING else item.default_factory()
            found[name] = Key(name, hints[item.name], default, item.metadata["rule"])
    return found


def in_words(key: Key) -> str:
    """What a value of `key` must be, in words."""
    if key.takes_auto:
        return "a number, or auto" if float in key.types else "a whole number, or auto"
    if key.rule.count is not None:
        numbers = ",".join(["480", "640", "64"][: key.rule.count])
        return f"a whole number, a list of {key.rule.count}, as in {key.name}=[{numbers}], or null"
    if get_origin(key.types[0]) is list:
        return f"a list, as in {key.name}=[{','.join(key.rule.choices[:2]) or '1,2'}]"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return " or ".join([*(words[kind] for kind in key.types), *(["null"] if key.default is None else [])])


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """' Did you mean hybrid?', or '' when nothing is near."""
    near = get_close_matches(str(word).lower(), [str(choice) for choice in choices], n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def word(name: str, value: str) -> str:
    """`name=value` as Hydra's grammar takes it, whatever text the value is; a shell may need more (`shlex.quote`)."""
    if re.fullmatch(r"[A-Za-z0-9_/.+:%@-]*/[A-Za-z0-9_/.+:%@-]*", value):  # with a slash it is no number, nor null
        return f"{name}={value}"
    # backslashes count only where a quote follows
    quoted = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + (r"\'" if found[2] else ""), value)
    return f"{name}='{quoted}'"


def typed(value: object) -> str:
    """A value as one types it on the command line: null, true, [1,2]."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(typed, value))}]"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else str(value)
    return str(value)


def absolute(path: str) -> str:
    """The path from the root on. What begins with a home (~) stays, and all where the working folder is gone."""
    if not path or path.startswith("~"):
        return path
    try:
        return str(Path(path).absolute())
    except OSError:
        return path


def check(key: Key, value: Any, choices: Iterable[str] | None = None) -> None:
    """Refuse a value that `key` cannot take.

    Args:
        choices: in the place of those stated: what is found rather than written.

    Raises:
        RevtrainError: names the key, the value given, the values expected and a remedy.
    """
    if value is None and key.is_optional:
        return
    if value is not None and not _has_type(key, value):
        raise RevtrainError(
            f"{key.name}={typed(value)} was given; expected {in_words(key)}.\nrevtrain --help shows the defaults."
        )
    if key.takes_auto and isinstance(value, str) and value != "auto":
        raise RevtrainError(
            f"{key.name}={typed(value)} was given; expected {in_words(key)}.{did_you_mean(value, ['auto'])}\n"
            f"{key.name}=auto: {key.rule.help.partition('auto: ')[2]}."
        )
    words = tuple(choices if choices is not None else key.rule.choices)
    if words:
        for each in value if isinstance(value, list) else [value]:
            _check_choice(key, each, words)
    elif float in key.types and not isinstance(value, str):
        _check_number(key, value)
    elif int in key.types and not isinstance(value, str | bool):
        for each in value if isinstance(value, list) else [value]:
            _check_whole_number(key, each)


def _has_type(key: Key, value: Any) -> bool:
    kinds = tuple(get_origin(kind) or kind for kind in key.types)
    if key.rule.count is not None and isinstance(value, list):
        return len(value) == key.rule.count and all(type(each) is int for each in value)
    return isinstance(value, (*kinds, int) if float in kinds else kinds)


def _check_choice(key: Key, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RevtrainError(
            f"{key.name}={typed(value)} was given; expected one of: {', '.join(choices)}."
            f"{did_you_mean(value, choices)}\n"
            + (f"{key.name}: {key.rule.remark}." if key.rule.remark else f"Choose one, as in {key.name}={choices[0]}.")
        )


def _check_whole_number(key: Key, value: int | None) -> None:
    rule, least = key.rule, int(key.rule.at_least or 0)
    if value is not None and value > rule.at_most:
        raise RevtrainError(
            f"{key.name}={value} was given; expected a whole number of at most {int(rule.at_most)}.\nUse a smaller one."
        )
    if value is None or value < least:
        remark = f"{rule.remark[:1].upper()}{rule.remark[1:]}" if rule.remark else f"Use {key.name}={least} or more"
        raise RevtrainError(
            f"{key.name}={typed(value)} was given; expected a whole number of at least {least}.\n{remark}."
        )


def _check_number(key: Key, value: float | None) -> None:
    rule, wanted = key.rule, []
    if rule.at_least is not None:
        wanted.append((f"at least {rule.at_least:g}", value is not None and value >= rule.at_least))
    if rule.above is not None:
        wanted.append((f"greater than {rule.above:g}", value is not None and value > rule.above))
    if rule.below is not None:
        wanted.append((f"below {rule.below:g}", value is not None and value < rule.below))
    if not wanted and value is not None:
        return  # its owner has more to say than a bound
    if value is None or not math.isfinite(value) or not all(holds for _, holds in wanted):
        wish = f" {' and '.join(text for text, _ in wanted)}" if wanted else ""
        default = "null (off)" if key.default is None else typed(key.default)
        raise RevtrainError(
            f"{key.name}={typed(value)} was given; expected a number{wish}.\n"
            + (f"{rule.remark}." if rule.remark else f"The default is {key.name}={default}.")
        )
