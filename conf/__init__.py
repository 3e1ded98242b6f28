"""The configuration: one small yaml each, typed by `revtrain.config`, composed by Hydra.

Importing this package tells Hydra the schema and the resolvers that the yamls use, so that the command
line and `compose` see the same configuration.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from revtrain.config import all_keys, flat, flatten, own_keys, read, registry, schema
from revtrain.config.help import keys_help
from revtrain.errors import RevtrainError
from revtrain.runs import sweeps
from revtrain.runs.read import read_result

GROUPS = ("arch", "data", "task", "recipe", "scale", "size", "experiment")


def slug(text: str, length: int = 80) -> str:
    """A name for a folder: letters, digits, dots, dashes and underscores only, at most `length` of them."""
    return re.sub(r"[^\w.]+", "-", str(text), flags=re.ASCII)[:length].strip("-.")


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that `revtrain OVERRIDES` would run, for use from Python, also within a Hydra application.

    >>> cfg = compose(["arch=hybrid", "depth=4"])
    """
    with _host_set_aside(), initialize_config_module("revtrain.conf", version_base="1.3"):
        cfg = hydra_compose("config", overrides=[*overrides, *search_path()])
    with suppress(RevtrainError, OmegaConfBaseException):  # who reads it is told what is wrong
        take_from_run(cfg, overrides)
    return cfg


@contextmanager
def _host_set_aside() -> Iterator[None]:
    """Hydra knows one application at a time: set the one that is running aside, and bring it back untouched."""
    of_an_application = (GlobalHydra, HydraConfig, JobRuntime, VersionBase)
    instances: dict[Any, Any] = Singleton._instances
    host = {kind: instances.pop(kind) for kind in of_an_application if kind in instances}
    try:
        yield
    finally:
        for kind in of_an_application:
            instances.pop(kind, None)
        instances.update(host)


def take_from_run(cfg: DictConfig, words: Sequence[str]) -> list[str]:
    """Let `resume=RUN` continue that run as it was: what `words` do not set is taken from the run, into `cfg`.

    Returns:
        What the words change, as "lr=0.2, before 0.1"; nothing happens where no run is resumed.

    Raises:
        RevtrainError: its checkpoint cannot be read.
    """
    if cfg.resume is None or not Path(cfg.resume).exists():
        return []
    from revtrain.runs import checkpoint

    before = flatten(flat(read(checkpoint.config_of(cfg.resume), stored=True)))
    given = _given(words)
    named = [key for key in all_keys() if key in given and key in before and key not in ("resume", "plan")]
    now = {key: OmegaConf.select(cfg, key) for key in named}
    changed = [f"{key}={now[key]}, before {before[key]}" for key in named if now[key] != before[key]]
    for group, key in (("models", "arch"), ("data", "data.name")):
        if key not in given:
            OmegaConf.update(cfg, key, before[key])
        owner = OmegaConf.select(cfg, key)
        for name, owners in own_keys(group).items():  # what a preset has set for another owner goes with that
            if name not in given and owner not in owners:
                OmegaConf.update(cfg, name, None)
    for key in (*all_keys(), "experiment"):
        if key in before and key not in given and _belongs(key, cfg):
            OmegaConf.update(cfg, key, before[key])
    return changed


def _belongs(key: str, cfg: DictConfig) -> bool:
    """Whether the architecture and the data set of `cfg` have this key."""
    owners = [(cfg.arch, own_keys("models").get(key)), (cfg.data.name, own_keys("data").get(key))]
    return all(having is None or name in having for name, having in owners)


def _given(words: Sequence[str]) -> set[str]:
    """The keys that words of the command line set, those in the files that they choose included."""
    known, given, chosen = all_keys(), {"resume"}, []
    for each in _parsed(words):
        key = each.key_or_group
        if key in GROUPS and isinstance(each.value(), str):
            chosen.append((key, str(each.value())))
            given.add(key)
        given |= {name for name in known if name == key or name.startswith(f"{key}.")} if key not in GROUPS else set()
    while chosen:
        group, name = chosen.pop()
        chosen += registry.chosen_by(group, name).items()
        prefix = "data." if group == "data" else ""
        given |= {prefix + key for key in flatten(registry.preset(group, name))}
    return given


def run_arch(_root_: DictConfig) -> str:
    """The architecture, for the name of a run's folder: with `resume=RUN` alone that of the run."""
    words = [str(each) for each in _root_.hydra.overrides.task]
    if _root_.resume and not any(word.startswith(("arch=", "experiment=")) for word in words):
        path = Path(_root_.resume)
        result = read_result(path.parent if path.is_file() else path)
        if result and isinstance(result.get("arch"), str):
            return slug(str(result["arch"]))
    return str(_root_.arch)


def search_path() -> list[str]:
    """The words that let Hydra find the yamls of the folders in REVTRAIN_PATH (see `revtrain.config.registry`)."""
    paths = [str(folder / "conf").replace("\\", "\\\\").replace("'", "\\'") for folder in registry.plugin_folders()]
    places = [f"'file://{path}'" for path in paths]
    return [f"hydra.searchpath=[{','.join(places)}]"] if places else []


def of_arch(arch: str, values: Mapping[str, Any]) -> Any:
    """The value for this architecture, of one for each: for yamls that give several a size.

    Raises:
        RevtrainError: there is none for it.
    """
    return _entry(
        values,
        arch,
        f"size= was given with arch={arch}, for which it has no width and depth",
        "Leave size out and give width and depth; python scripts/equal_sizes.py finds some.",
    )


def of_depth(depth: int, widths: Mapping[int, int]) -> int:
    """The width for this depth, of one for each: for yamls that vary depth at one number of parameters.

    Raises:
        RevtrainError: there is none for it.
    """
    return _entry(
        widths,
        depth,
        f"depth={depth} was given, for which this experiment has no width",
        "Give width, too: the number of parameters is then as it comes.",
    )


def _entry(values: Mapping[Any, Any], name: Any, complaint: str, remedy: str) -> Any:
    if name not in values:
        raise RevtrainError(f"{complaint}; expected one of: {', '.join(map(str, values))}.\n{remedy}")
    return values[name]


def if_has(arch: str, key: str, value: Any) -> Any:
    """The value where this architecture has a key of that name, else null: for yamls that serve all architectures."""
    return value if arch in own_keys("models").get(key, {}) else None


def constant_keys(config: DictConfig) -> list[str]:
    """The keys that the words of a sweep give one value, where another word is swept over."""
    overrides = _parsed(config.hydra.overrides.task)
    return sorted({each.key_or_group for each in overrides} - set(_swept(overrides)))


def varied(config: DictConfig) -> dict[str, set[str]]:
    """Each architecture that a sweep visits, and the keys that it varies there."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    words = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    swept = {each.key_or_group: each for each in _parsed(words) if each.is_sweep_override()}
    arches = [str(config.arch)]
    if "arch" in swept and swept["arch"].is_discrete_sweep():
        arches = list(swept["arch"].sweep_string_iterator())
    return {arch: set(swept) - {"arch"} for arch in arches}


def sweep_name(words: Sequence[str], params: Mapping[str, str] | None) -> str:
    """A name for the folder of a sweep, the same for the same words in any order: `depth-seed-1a2b3c4d`.

    Args:
        words: the command line.
        params: hydra.sweeper.params, which a sweep may be written in, too.
    """
    overrides = _parsed([*words, *(f"{key}={value}" for key, value in (params or {}).items())])
    swept = _swept(overrides)
    kept = [each.input_line for each in overrides if each.key_or_group not in {*sweeps.NEUTRAL} - {*swept}]
    return f"{slug('-'.join(swept)) or 'single'}-{sweeps.digest(sorted(kept))}"


def job_name(_root_: DictConfig) -> str:
    """The name of a job's folder: `0-depth-4_seed-1-1a2b3c4d`."""
    job = _root_.hydra.job
    config = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"])
    mark = sweeps.digest(job_identity(config, _root_.hydra))
    return sweeps.job_folder(_root_.hydra.sweep.dir, slug(f"{job.num}-{job.override_dirname}"), mark)


def job_identity(config: DictConfig, hydra: DictConfig) -> dict[str, Any]:
    """What decides the result of one job of a sweep (`revtrain.runs.sweeps.identity`)."""
    constant = hydra.job.config.override_dirname.exclude_keys
    swept = {each.key_or_group for each in _parsed(hydra.overrides.task)} - set(constant)
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:  # the job will say so
        values = OmegaConf.to_container(config, resolve=False)
    return sweeps.identity(cast(dict[str, Any], values), swept)


def _parsed(words: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides([str(each) for each in words])


def _swept(overrides: list[Override]) -> list[str]:
    return list(dict.fromkeys(each.key_or_group for each in overrides if each.is_sweep_override()))


# a name of its own: within a Hydra application there is one store for all
ConfigStore.instance().store(name="revtrain_schema", node=schema(), provider="revtrain")
# cached: one token for a run, one name for a sweep and all its jobs, however often it is resolved
OmegaConf.register_new_resolver("revtrain.token", lambda: secrets.token_hex(3), use_cache=True, replace=True)
OmegaConf.register_new_resolver("revtrain.sweep_name", sweep_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("revtrain.job_name", job_name, replace=True)
OmegaConf.register_new_resolver("revtrain.of_arch", of_arch, replace=True)
OmegaConf.register_new_resolver("revtrain.of_depth", of_depth, replace=True)
OmegaConf.register_new_resolver("revtrain.if_has", if_has, replace=True)
OmegaConf.register_new_resolver("revtrain.run_arch", run_arch, replace=True)
for resolver in (sweeps.gpu_count, sweeps.parallel_jobs):
    OmegaConf.register_new_resolver(f"revtrain.{resolver.__name__}", resolver, replace=True)
OmegaConf.register_new_resolver("revtrain.slug", slug, replace=True)
OmegaConf.register_new_resolver("revtrain.keys", keys_help, replace=True)
