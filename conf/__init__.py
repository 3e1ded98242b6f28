"""The configuration: one small yaml each, typed by `revtrain.config`, composed by Hydra.

Importing this package tells Hydra the schema and the resolvers that the yamls use, so that the command
line and `compose` see the same configuration.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from revtrain.config import registry, schema
from revtrain.config.help import keys_help
from revtrain.runs import sweeps


def slug(text: str, length: int = 80) -> str:
    """A name for a folder: letters, digits, dots, dashes and underscores only, at most `length` of them."""
    return re.sub(r"[^\w.]+", "-", str(text), flags=re.ASCII)[:length].strip("-.")


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that `revtrain OVERRIDES` would run, for use from Python.

    >>> cfg = compose(["arch=hybrid", "depth=4"])
    """
    with initialize_config_module("revtrain.conf", version_base="1.3"):
        return hydra_compose("config", overrides=[*overrides, *search_path()])


def search_path() -> list[str]:
    """The words that let Hydra find the yamls of the folders in REVTRAIN_PATH (see `revtrain.config.registry`)."""
    paths = [str(folder / "conf").replace("\\", "\\\\").replace("'", "\\'") for folder in registry.plugin_folders()]
    places = [f"'file://{path}'" for path in paths]
    return [f"hydra.searchpath=[{','.join(places)}]"] if places else []


def constant_keys(config: DictConfig) -> list[str]:
    """The keys that the words of a sweep give one value, where another word is swept over."""
    overrides = _parsed(config.hydra.overrides.task)
    return sorted({each.key_or_group for each in overrides} - set(_swept(overrides)))


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
    constant = job.config.override_dirname.exclude_keys
    swept = {each.key_or_group for each in _parsed(_root_.hydra.overrides.task)} - set(constant)
    config = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"])
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:  # the job will say so
        values = OmegaConf.to_container(config, resolve=False)
    mark = sweeps.fingerprint(cast(dict[str, Any], values), swept)
    return sweeps.job_folder(_root_.hydra.sweep.dir, slug(f"{job.num}-{job.override_dirname}"), mark)


def _parsed(words: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides([str(each) for each in words])


def _swept(overrides: list[Override]) -> list[str]:
    return list(dict.fromkeys(each.key_or_group for each in overrides if each.is_sweep_override()))


ConfigStore.instance().store(name="schema", node=schema(), provider="revtrain")
# cached: one token for a run, one name for a sweep and all its jobs, however often it is resolved
OmegaConf.register_new_resolver("revtrain.token", lambda: secrets.token_hex(3), use_cache=True, replace=True)
OmegaConf.register_new_resolver("revtrain.sweep_name", sweep_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("revtrain.job_name", job_name, replace=True)
for resolver in (sweeps.gpu_count, sweeps.parallel_jobs):
    OmegaConf.register_new_resolver(f"revtrain.{resolver.__name__}", resolver, replace=True)
OmegaConf.register_new_resolver("revtrain.slug", slug, replace=True)
OmegaConf.register_new_resolver("revtrain.keys", keys_help, replace=True)
