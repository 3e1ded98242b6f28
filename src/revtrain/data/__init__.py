"""Data sets: one file here and one yaml in `conf/data/` each; they are found, not listed.

A data set's file defines

    Settings   a dataclass: the keys `data.KEY` that it has besides those of every data set (left out: none)
    load       (data) -> (training split, test split, names of the classes); `data` is a `revtrain.config.DataConfig`
    facts      (data) -> `Facts`, as far as they are known without looking at the images (left out: none)
    check      (data): refuses values before anything is loaded (left out: nothing to refuse)
    TASKS      what its labels are for: ("classify",), ("segment",) or both (left out: the first)
    SAME_IMAGES_ANYWHERE   True where `data.root` does not decide which images these are (left out: it does)

Neither torch nor anything that needs it is imported at the head of such a file: the command line reads the `Settings`
of all of them before torch is there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from revtrain.config import registry

if TYPE_CHECKING:
    from revtrain.data.augmentation import (
        Draws,
        augment,
        augment_masks,
        check_pad,
        draw_augmentation,
        draw_columns,
        first_flips,
        normalise,
    )
    from revtrain.data.dataset import AnySplit, Dataset, Split, channel_statistics, check_room, load_data
    from revtrain.data.streamed import StreamedSplit

__all__ = [
    "AnySplit",
    "Dataset",
    "Draws",
    "Facts",
    "Split",
    "StreamedSplit",
    "augment",
    "augment_masks",
    "channel_statistics",
    "check_pad",
    "check_room",
    "datasets",
    "draw_augmentation",
    "draw_columns",
    "first_flips",
    "load_data",
    "normalise",
    "user_cache",
]

# modules of this package that are no data set
SHARED = (
    "augmentation",
    "dataset",
    "imagefiles",
    "masks",
    "regions",
    "shapes",
    "streamed",
)
_MODULES = {
    "augmentation": (
        "Draws",
        "augment",
        "augment_masks",
        "check_pad",
        "draw_augmentation",
        "draw_columns",
        "first_flips",
        "normalise",
    ),
    "dataset": ("AnySplit", "Dataset", "Split", "channel_statistics", "check_room", "load_data"),
    "streamed": ("StreamedSplit",),
}


class Facts(NamedTuple):
    """What is known of a data set before it is looked at; None: not known."""

    classes: int | None = None
    image_size: int | Sequence[int] | None = None  # side in pixels, or [height, width]
    training_images: int | None = None


def datasets() -> list[str]:
    """The names that `data=` accepts, sorted."""
    return registry.names("data")


def user_cache() -> Path | None:
    """The folder for downloads and decoded images: $XDG_CACHE_HOME/revtrain, else ~/.cache/revtrain; None for a user
    without a home directory."""
    with suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "revtrain"
    return None


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is first asked for."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
