"""What is said when something is wrong: two to five lines for each error that the user can mend.

Hydra and OmegaConf raise errors that speak of their own insides; here they become what was given, what was expected and
what to do.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from revtrain.config import all_keys, did_you_mean, expected, flatten, registry, sections
from revtrain.errors import RevtrainError
from revtrain.machine import files

GROUPS = ("arch", "data", "scale", "experiment")
_REMOVED = "~{key} was given; a key cannot be removed.\nGive it another value instead."


def explain(error: BaseException, folders: Sequence[Path] = ()) -> str | None:
    """Two to five lines for an error that the user can mend; None for any other.

    Args:
        folders: absolute, of runs and sweeps that were about to begin.
    """
    if isinstance(error, RevtrainError):
        return str(error)
    if isinstance(error, MissingConfigException):
        return _explain_group(error)
    if match := re.search(r"Unknown plugin class : '(hydra_plugins\.\w+)", str(error)):
        return (
            f"A launcher or sweeper was chosen that is not installed ({match[1]}).\n"
            'Install the launchers with: pip install -e ".[sweep]"'
        )
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} was given; expected key=value, as in depth=8 or pooling=[channel,batch].\n"
            f"({first_line(error)})\n"
            "Quote a value with special characters, as in \"data.root='/a b'\"."
        )
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _explain_composition(error)
    if isinstance(error, ValueError) and "Config group override" in str(error):
        return (
            f"A group ({', '.join(GROUPS)}) takes the name of one of its files, "
            f"as in arch={registry.default('arch')}.\n"
            "revtrain --help lists them."
        )
    return _explain_system(error, folders)


def _explain_group(error: MissingConfigException) -> str | None:
    group, _, given = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return f"{first_line(error)}\nSee revtrain --help for the groups and keys."
    options = list(error.options or ())
    return (
        f"{group}={given} was given; expected one of: {', '.join(options)}.{did_you_mean(given, options)}\n"
        f"Choose one, as in {group}={(options or ['...'])[0]}."
    )


def _explain_composition(error: BaseException) -> str:
    text = str(error)
    if match := re.search(r"Ambiguous value for argument '(.+)'", text):
        return (
            f"{match[1]} was given; one run takes one value.\n"
            f"To sweep over them: revtrain -m {shlex.quote(match[1])}\n"
            f"To give a list: {shlex.quote(match[1].replace('=', '=[', 1) + ']')}"
        )
    if match := re.search(r"Error merging override ([^=\s]+)(=.*)?", text):
        key = match[1].lstrip("+~")
        if match[1].startswith("~"):
            return _REMOVED.format(key=key.lstrip("~"))
        if key in (*all_keys(), *sections()):
            return f"{key}{match[2]} was given; expected {expected(key)}.\nrevtrain --help shows the defaults."
    if match := re.search(r"Could not (?:override|append to config\. An item is already at) '(\S+?)'", text):
        return _unknown_key(match[1])
    if match := re.search(r"Could not delete from config\. '(\S+)'", text):
        return _unknown_key(match[1])
    if match := re.search(r"Key '(\S+)' not in '", text):  # ~key
        return _REMOVED.format(key=match[1])
    key = getattr(error, "full_key", None)
    lines = [line for line in text.splitlines() if line.strip()][: 1 if key else 3]
    return "\n".join([f"{key}: {lines[0]}" if key else lines[0], *lines[1:], "See revtrain --help."])


def _unknown_key(key: str) -> str:
    known = [*all_keys(), *GROUPS]
    if key in known:
        return f"{key} exists already.\nGive it plainly, as in {key}=VALUE."
    return f"{key} was given; there is no such key.{did_you_mean(key, known)}\nrevtrain --help lists all keys."


def check_keys(cfg: DictConfig) -> None:
    """Refuse keys that `+key=value` added, since nothing would read them, and what `~key` took away."""
    given, known = flatten(cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))), all_keys()
    for key in given:
        if key not in (*known, *GROUPS):
            raise RevtrainError(_unknown_key(key))
    for key in known:
        if key not in given:
            raise RevtrainError(_REMOVED.format(key=key))


def _explain_system(error: BaseException, folders: Sequence[Path]) -> str | None:
    """An error of the system, or what a library made of one; `folders` are those that Hydra makes for the runs."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__
    if link is None:
        return None
    if link.filename is not None and any(files.is_about(link, folder) for folder in folders):
        return (
            f"The run directory cannot be written: {files.refused(link)}.\n"
            "Choose another folder, as in hydra.run.dir=FOLDER (hydra.sweep.dir=FOLDER in a sweep)."
        )
    return files.told(link)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
