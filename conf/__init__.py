"""The configuration: one small yaml each, typed by `revtrain.config`, composed by Hydra.

Importing this package tells Hydra the schema and the two resolvers that the yamls use, so that the command
line and `compose` see the same configuration.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from revtrain.config import Config


def slug(text: str, length: int = 80) -> str:
    """A name for a folder: letters, digits, dots, dashes and underscores only, at most `length` of them."""
    return re.sub(r"[^\w.]+", "-", str(text), flags=re.ASCII)[:length].strip("-.")


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that `revtrain OVERRIDES` would run, for use from Python.

    >>> cfg = compose(["arch=hybrid", "depth=4"])
    """
    with initialize_config_module("revtrain.conf", version_base="1.3"):
        return hydra_compose("config", overrides=list(overrides))


ConfigStore.instance().store(name="schema", node=Config, provider="revtrain")
# cached: one token for a run or a sweep, however often its folder's name is resolved
OmegaConf.register_new_resolver("revtrain.token", lambda: secrets.token_hex(3), use_cache=True, replace=True)
OmegaConf.register_new_resolver("revtrain.slug", slug, replace=True)
