"""Runs that differ only in the seed, taken together: mean, standard deviation, Pareto front, compute overhead."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from revtrain.config import flatten, registry, typed
from revtrain.runs.read import Run

# keys without influence on what a run computes: two runs that differ in them repeat each other
INCIDENTAL = ("seed", "resume", "plan", "memory_limit", "graph", "experiment", "data.cache")
# and those without influence on a training step's time either, so that `store` can be the measure for `invert`
OF_THE_PROBE = ("backward", "probe.batch", "probe.every")


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None of one value) and the number of values."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None where there is no value."""
        found = [value for value in values if value is not None]
        if not found:
            return None
        return cls(mean(found), stdev(found) if len(found) > 1 else None, len(found))


@dataclass
class Group:
    """Runs of one configuration, whatever their seeds.

    `counted` are the runs that figures are taken from: the completed ones, one for each seed (the latest); where
    none is completed, the one that came furthest. `settings` are the keys that tell the group from others of its
    architecture.
    """

    number: int
    arch: str
    settings: dict[str, str]
    task: str  # the data, as far as it tells groups apart
    runs: list[Run]
    counted: list[Run]
    colour: int = 0  # a number for its architecture, the same on every page
    overhead: float | None = None  # step time relative to `backward=store`

    @property
    def described(self) -> str:
        """The settings as on the command line; empty where the architecture says it all."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())

    @property
    def label(self) -> str:
        return f"{self.arch} {self.described}".strip()

    @property
    def completed(self) -> bool:
        return self.counted[0].completed

    @property
    def status(self) -> str:
        """`completed` where all are, else as in `2 completed, 1 failed`."""
        counts = Counter(run.status for run in self.runs)
        if len(counts) == 1:
            return self.runs[0].status
        return ", ".join(f"{count} {status}" for status, count in counts.most_common())

    @property
    def progress(self) -> str:
        """The status, and how far it came where no run is completed: `interrupted, epoch 14 of 500`."""
        furthest = self.counted[0]
        return (
            self.status if self.completed or not furthest.epochs_done else f"{self.status}, epoch {furthest.progress}"
        )

    def spread(self, value: Callable[[Run], float | None]) -> Spread | None:
        return Spread.of(value(run) for run in self.counted)

    def mean(self, name: str) -> float | None:
        """The mean of one of the values of `Run`."""
        spread = self.spread(lambda run: getattr(run, name))
        return spread.mean if spread else None


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """All groups, by architecture and settings, numbered from 1."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(configuration_key(run, INCIDENTAL), []).append(run)
    flat = {key: flatten(each[0].config) for key, each in members.items()}
    groups = [
        Group(
            0, each[0].arch, {}, "", sorted(each, key=lambda run: (_sortable(run.seed), str(run.path))), _counted(each)
        )
        for each in members.values()
    ]
    _name(groups, list(flat.values()))
    groups.sort(key=_order)
    colours = _colours({group.arch for group in groups})
    for number, group in enumerate(groups, start=1):
        group.number, group.colour = number, colours[group.arch]
    _compare(groups)
    return groups


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points (cost, gain) to which no other is preferable, by cost: less costs at least one gain.

    Returns indices into `points`.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def show(value: Any, length: int = 40) -> str:
    """A setting as on the command line, in at most `length` characters."""
    if isinstance(value, list):
        text = f"[{','.join(show(each, length) for each in value)}]"
    else:
        text = f"{value:g}" if isinstance(value, float) else typed(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _counted(runs: list[Run]) -> list[Run]:
    completed = [run for run in runs if run.completed]
    if not completed:
        return [max(runs, key=lambda run: (run.epochs_done, run.modified))]
    by_seed: dict[str, Run] = {}
    for run in sorted(completed, key=lambda run: run.modified):
        by_seed[json.dumps(run.seed)] = run
    return list(by_seed.values())


def _name(groups: list[Group], configs: list[dict[str, Any]]) -> None:
    """Give each group its task, and the settings in which it differs from others of its task and architecture."""
    tasks: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        tasks.setdefault(str(config.get("data.name", "?")), []).append(index)
    for name, indices in tasks.items():
        varying = _varying([_data(configs[index]) for index in indices])
        for index in indices:
            words = [f"{key.removeprefix('data.')} {show(configs[index].get(key))}" for key in varying]
            groups[index].task = ", ".join([name, *words])
    peers: dict[tuple[str, str], list[int]] = {}
    for index, group in enumerate(groups):
        peers.setdefault((group.task, group.arch), []).append(index)
    for indices in peers.values():
        own = [{k: v for k, v in configs[index].items() if k not in INCIDENTAL} for index in indices]
        for key in _varying(own):
            for index in indices:
                if key in configs[index]:
                    groups[index].settings[key] = show(configs[index][key])


def _data(config: dict[str, Any]) -> dict[str, Any]:
    """What makes two accuracies comparable: the images, but not how they are augmented."""
    return {
        key: value
        for key, value in config.items()
        if key.startswith("data.") and not key.startswith("data.augment") and key not in INCIDENTAL
    }


def _varying(configs: list[dict[str, Any]]) -> list[str]:
    """The keys that do not have one and the same value in all `configs`, in the order of the first that has them."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]


def _compare(groups: list[Group]) -> None:
    """The compute overhead: seconds of a step over those with `backward=store`, on the same kind of device."""
    stored: dict[tuple[str, str], float] = {}

    def of(group: Group) -> tuple[str, str]:
        devices = {run.device for run in group.counted}
        return configuration_key(group.counted[0], (*INCIDENTAL, *OF_THE_PROBE)), json.dumps(sorted(map(str, devices)))

    for group in groups:
        seconds = group.mean("step_seconds")
        if group.completed and seconds and group.counted[0].config.get("backward") == "store":
            stored[of(group)] = seconds
    for group in groups:
        seconds, reference = group.mean("step_seconds"), stored.get(of(group))
        group.overhead = seconds / reference if seconds and reference else None


def configuration_key(run: Run, apart: tuple[str, ...]) -> str:
    """The configuration as text, but for the keys in `apart`; that of a run without one equals no other."""
    config = {key: value for key, value in flatten(run.config).items() if key not in apart}
    if len(config) < 2:  # the architecture alone
        config["path"] = str(run.path)
    if isinstance(config.get("device"), str):  # the runs of a sweep may be shared out over several GPUs
        config["device"] = config["device"].split(":")[0]
    return json.dumps(config, sort_keys=True)


def _colours(arches: set[str]) -> dict[str, int]:
    """Those that are found here first; then those of runs from elsewhere, or of before."""
    found = registry.names("models")
    return {arch: number for number, arch in enumerate([*found, *sorted(arches - {*found})])}


def _order(group: Group) -> tuple[Any, ...]:
    config = flatten(group.counted[0].config)
    settings = [_sortable(config.get(key)) for key in group.settings]
    return group.task, group.arch, settings, str(group.runs[0].path)


def _sortable(value: Any) -> tuple[int, float, str]:
    """Numbers by size, before everything else by its text."""
    if isinstance(value, int | float):
        return 0, value, ""
    return 1, 0.0, json.dumps(value)
