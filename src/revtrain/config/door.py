"""The door: from the composed configuration, flat and not yet checked, to `Config`, typed and in parts.

What needs the data or the network (a batch larger than the data set, an image size that the pooling cannot divide) is
refused later, by those who know them, but always before the first step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Optional, cast, get_args, get_origin, get_type_hints

from revtrain.config import registry
from revtrain.config.keys import Key, absolute, check, did_you_mean, in_words, keys_of
from revtrain.config.memory_size import parse_memory
from revtrain.config.schema import Config, DataConfig, Machine, Network, ProbeConfig, StreamSettings, Training
from revtrain.errors import RevtrainError

if TYPE_CHECKING:
    from omegaconf import DictConfig

SIDE_BY_SIDE = (Network, Training, Machine)  # parts whose keys have no prefix


# ---- all keys, and the schema for Hydra ----------------------------------------------------------


def own_keys(package: str) -> dict[str, dict[str, Key]]:
    """The keys that only some architectures (`models`) or data sets (`data`) have: key -> {who has it: the key}."""
    prefix = "data." if package == "data" else ""
    found: dict[str, dict[str, Key]] = {}
    for owner in registry.names(package):
        kind = registry.settings(package, owner)
        for name, key in (keys_of(kind, prefix) if kind else {}).items():
            found.setdefault(name, {})[owner] = key
    return found


def all_keys() -> dict[str, Key]:
    """Every key of the command line, dotted. One that several architectures have stands as the first states it."""
    common = {name: key for part in SIDE_BY_SIDE for name, key in keys_of(part).items()}
    own = {name: next(iter(owners.values())) for each in ("models", "data") for name, owners in own_keys(each).items()}
    return common | own | keys_of(DataConfig, "data.") | keys_of(ProbeConfig, "probe.")


def sections() -> tuple[str, ...]:
    """The names below which keys stand: data, data.augment, probe."""
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in all_keys() if "." in name))


def expected(name: str) -> str:
    """What must stand behind `name=`, in words."""
    return f"one of its keys, as in {name}.KEY=VALUE" if name in sections() else in_words(all_keys()[name])


def schema() -> type:
    """The dataclass that Hydra types the command line with.

    What only some architectures or data sets have is null until somebody gives it: the default is then theirs.
    """
    common = [each for part in SIDE_BY_SIDE for each in _schema_fields(part)]
    data = make_dataclass("Data", [*_schema_fields(DataConfig), *_own_fields("data")])
    return make_dataclass(
        "Schema",
        [
            *common,
            *_own_fields("models"),
            ("data", data, field(default_factory=data)),
            ("probe", ProbeConfig, field(default_factory=ProbeConfig)),
            ("experiment", Any, None),
        ],
    )


def _schema_fields(part: type) -> list[tuple[str, Any, Any]]:
    hints, found = get_type_hints(part), []
    for item in fields(part):
        if item.name != "own":
            # what must be given by a yaml, as depth is by each architecture's, is null before that
            kind = Optional[hints[item.name]] if item.default is None else hints[item.name]
            found.append((item.name, _kind_for_omegaconf(kind), _same_default(item)))
    return found


def _kind_for_omegaconf(kind: Any) -> Any:
    """It knows no choice between a number and a list: those are checked here alone."""
    is_choice_with_list = len(get_args(kind)) > 1 and any(get_origin(each) is list for each in get_args(kind))
    return Any if is_choice_with_list and int in get_args(kind) else kind


def _same_default(item: Field[Any]) -> Any:
    if item.default_factory is MISSING:
        return field(default=item.default)
    return field(default_factory=item.default_factory)


def _own_fields(package: str) -> list[tuple[str, Any, Any]]:
    found = []
    for name, owners in own_keys(package).items():
        kinds = {key.type for key in owners.values()}
        if len(kinds) > 1:
            raise TypeError(f"{name} has different types in {', '.join(owners)}: {kinds}")
        found.append((name.rpartition(".")[2], _kind_for_omegaconf(Optional[kinds.pop()]), None))
    return found


# ---- the door ------------------------------------------------------------------------------------


def read(cfg: DictConfig | Mapping[str, Any] | Config, stored: bool = False) -> Config:
    """The configuration in parts, every value checked.

    Args:
        cfg: as Hydra or `revtrain.conf.compose` returns it; a `Config` is returned as it is.
        stored: it comes from a run of before. Keys that its architecture does not have are then left out: earlier
            versions wrote them all; and the run that it resumed need not exist any more.

    Returns:
        Paths in it are absolute: what was typed in one folder is read in another, later.

    Raises:
        RevtrainError: names the key, the value given, the values expected and a remedy.
    """
    if isinstance(cfg, Config):
        return cfg
    values = _plain(cfg)
    data, probe = dict(values["data"]), dict(values["probe"])
    _check_found("arch", values["arch"], "models")
    _check_found("data", data["name"], "data")
    own = _own(values, "models", values["arch"], "arch", stored)
    own_of_data = _own(data, "data", data["name"], "data", stored)
    config = Config(
        network=Network(**_of(Network, values), own=own),
        training=Training(**_of(Training, values)),
        machine=Machine(**_of(Machine, {**values, "resume": None} if stored else values)),
        data=DataConfig(**_of(DataConfig, data, "data."), own=own_of_data),
        probe=ProbeConfig(**_of(ProbeConfig, probe, "probe.")),
        experiment=values.get("experiment"),
    )
    _check_together(config)
    return config if stored else _with_absolute_paths(config)


def _with_absolute_paths(config: Config) -> Config:
    def changed(part: Any) -> Any:
        kind: Any = type(part)
        paths = {name: getattr(part, name) for name, key in keys_of(kind).items() if key.rule.path}
        return replace(part, **{name: absolute(path) for name, path in paths.items() if path is not None})

    network, data = config.network, config.data
    return replace(
        config,
        network=replace(network, own=changed(network.own)) if network.own is not None else network,
        machine=changed(config.machine),
        data=changed(replace(data, own=changed(data.own)) if data.own is not None else data),
    )


def _plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(cfg, dict):
        return dict(cfg)
    from omegaconf import OmegaConf  # the report does without

    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def flat(config: Config) -> dict[str, Any]:
    """Plain containers with the keys as the command line has them: what a run records of its configuration."""

    def plain(part: Any) -> dict[str, Any]:
        values = asdict(part)
        own = values.pop("own", None) or {}
        return values | own

    parts = (config.network, config.training, config.machine)
    found = {key: value for part in parts for key, value in plain(part).items()}
    return found | {"data": plain(config.data), "probe": plain(config.probe), "experiment": config.experiment}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"name": ...}} as {"data.name": ...}."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _of(part: type, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The checked values of one part."""
    found: dict[str, Any] = {}
    hints = get_type_hints(part)
    for item in fields(part):
        if item.name == "own" or item.name not in values:
            continue
        value, name = values[item.name], prefix + item.name
        if is_dataclass(hints[item.name]) and isinstance(value, Mapping):
            found[item.name] = hints[item.name](**_of(hints[item.name], value, f"{name}."))
            continue
        key = keys_of(part, prefix)[name]
        check(key, value)
        found[item.name] = value
    return found


def _check_found(key: str, name: str, package: str) -> None:
    check(Key(key, str, None, keys_of(Network)["arch"].rule), name, choices=registry.names(package))


def _own(values: Mapping[str, Any], package: str, owner: str, group: str, stored: bool) -> Any:
    """The settings of one architecture or data set; others' keys are refused by name."""
    kind, prefix = registry.settings(package, owner), "data." if package == "data" else ""
    mine = keys_of(kind, prefix) if kind else {}
    for name, owners in own_keys(package).items():
        short = name.removeprefix(prefix)
        if name in mine or values.get(short) is None or stored:
            continue
        listed = shorten(", ".join(mine), 80, placeholder=" ...")
        has = f"its own keys are {listed}" if mine else "it has no keys of its own"
        raise RevtrainError(
            f"{name}={values[short]} was given; {group}={owner} has no such key: {has}.\n"
            f"Leave {name} out, or choose one that has it: {', '.join(f'{group}={each}' for each in owners)}."
        )
    given = {short: values[short] for name in mine if values.get(short := name.removeprefix(prefix)) is not None}
    for short, value in given.items():
        check(mine[prefix + short], value)
    return kind(**given) if kind else None


# ---- what one rule a key cannot say --------------------------------------------------------------


def _check_together(config: Config) -> None:
    network, machine = config.network, config.machine
    if registry.load("models", network.arch).TRAITS.reversible and (network.width or 0) % 2:
        width = network.width or 0
        raise RevtrainError(
            f"width={width} was given; expected an even number: {network.arch} halves its channels.\n"
            f"Use width={width - 1 or 2} or width={width + 1}."
        )
    _check_task(config)
    _check_slope(network.slope)
    check_micro_batches(config.training.batch, config.training.accumulate)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", machine.device):
        raise RevtrainError(
            f"device={machine.device} was given; expected auto, cpu, cuda, cuda:N or mps."
            f"{did_you_mean(machine.device, ('auto', 'cpu', 'cuda', 'mps'))}\n"
            "device=auto takes the first GPU, or the CPU where there is none."
        )
    if machine.memory_limit is not None:
        parse_memory(machine.memory_limit)
    if machine.resume is not None and not Path(machine.resume).exists():
        raise RevtrainError(
            f"resume={machine.resume} was given; there is no such file or run directory.\n"
            "Give the directory of an earlier run, or the last.pt in it, as in resume=outputs/DATE/RUN."
        )
    check_data = getattr(registry.load("data", config.data.name), "check", None)
    if check_data is not None:
        check_data(config.data)


def _check_task(config: Config) -> None:
    task, training = config.network.task, config.training
    for group, package, name in (("arch", "models", config.network.arch), ("data", "data", config.data.name)):
        tasks = {each: registry.tasks(package, each) for each in registry.names(package)}
        if task not in tasks[name]:
            others = ", ".join(f"{group}={each}" for each, its in tasks.items() if task in its)
            raise RevtrainError(
                f"{group}={name} was given with task={task}; it is for task={tasks[name][0]}.\n"
                f"Add task={tasks[name][0]}, or choose one for task={task}: {others}."
            )
    if task == "segment":
        for name in ("label_smoothing", "test_flip"):
            if value := getattr(training, name):
                raise RevtrainError(
                    f"{name}={value} was given with task=segment; it is for the classes of images.\nLeave {name} out."
                )


def check_micro_batches(batch: int | str, accumulate: int, processes: int = 1) -> None:
    """Refuse a batch that `accumulate` does not cut into equal micro-batches for each process."""
    unit = accumulate * processes
    if isinstance(batch, str) or accumulate == 1 or batch % unit == 0:
        return
    shared = f" for each of {processes} processes" if processes > 1 else ""
    near = max(1, round(batch / unit)) * unit
    raise RevtrainError(
        f"accumulate={accumulate} was given with batch={batch}; expected as many equal micro-batches{shared}.\n"
        f"Use batch={near}, or another accumulate."
    )


def check_parts(own: StreamSettings | None) -> None:
    """Refuse several parts of each image where no parts are cut out."""
    if own is not None and own.crops > 1 and own.crop is None:
        raise RevtrainError(
            f"data.crops={own.crops} was given without data.crop; it is how many parts an epoch takes of each image.\n"
            "Add the side of a part, as in data.crop=512."
        )


def _check_slope(slope: float) -> None:
    if 0 < slope <= 1:
        return
    message = f"slope={slope:g} was given; expected 0 < slope <= 1: LeakyReLU multiplies negative values by it.\n"
    if 1 < slope < math.inf:
        message += f"Where the slope is written as a divisor (y = x/n), use its inverse: slope={1 / slope:.4g}."
    elif slope == 0:
        message += "A slope of 0 (ReLU) cannot be inverted, and a small one lowers the SNR. Try slope=0.2."
    else:
        message += "Try slope=0.2."
    raise RevtrainError(message)
