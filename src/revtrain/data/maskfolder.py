"""Images and masks in folders, for task=segment: `data.root` holds `train/images`, `train/masks`, and `test/` likewise.

A mask is an image file of one number a pixel, its class: 0 the background, 1, 2, ...; 255 counts for nothing. It has
the size of its image and the same name, but for the suffix. Masks of 0 and 255 alone, and any with `data.binary=true`,
say what is background and what is not. A file `classes.txt` in `data.root` may name the classes, one a line.

Images are read while the network trains, see `streamed`. Test images are judged whole, or with `data.crop` in windows
of that size, which cover each image and in which every pixel is judged once.
"""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revtrain.config import IGNORED, DataConfig, ImageSize, StreamSettings, check_parts, key
from revtrain.data import Facts
from revtrain.errors import RevtrainError, printable
from revtrain.machine import files

if TYPE_CHECKING:
    from revtrain.data.streamed import Item, StreamedSplit

TASKS = ("segment",)
LAYOUT = "data.root must hold train/images, train/masks, test/images and test/masks, a mask for each image."
OTHER = "Give a folder that holds test/images and test/masks, or images and masks, a mask for each image."
LOOKED_AT = 500  # training masks, for the classes
NAMES = "classes.txt"
MANY = 30  # classes that nobody has named: perhaps they are objects

log = logging.getLogger(__name__)


@dataclass
class Settings(StreamSettings):
    """What masks mean, and how images are read."""

    binary: bool = key(False, "masks say 0 for the background and anything else for the one class, as for objects")


def facts(cfg: DataConfig[Settings]) -> Facts:
    """What the configuration says: the folder is not looked at."""
    return Facts(cfg.classes, (cfg.own or Settings()).crop or cfg.image_size)


def check(cfg: DataConfig[Settings]) -> str:
    """The folder; a configuration without one is refused."""
    if not cfg.root:
        raise RevtrainError(f"data=maskfolder was given without data.root.\nAdd data.root=FOLDER. {LAYOUT}")
    check_parts(cfg.own)
    return cfg.root


def load(cfg: DataConfig[Settings]) -> tuple[StreamedSplit, StreamedSplit, list[str]]:
    """Training set, test set and class names of the folder `data.root`.

    Raises:
        RevtrainError: missing or empty folders, an image without a mask, a mask or image that cannot be used.
    """
    from revtrain.data import imagefiles, streamed

    own = cfg.own or Settings()
    root = imagefiles.root_folder(check(cfg), LAYOUT)
    train, test = (_pairs(root / split, own) for split in ("train", "test"))
    names, binary = _classes(cfg, own, root, train, test)
    split = partial(streamed.split, settings=own, resized=cfg.size, root=root, classes=len(names), binary=binary)
    return split(train, repeats=own.crops), split(test, in_windows=True), names


def load_pairs(
    folder: str | Path, own: StreamSettings, image_size: ImageSize | None, divisor: int, classes: int, binary: bool
) -> StreamedSplit:
    """FOLDER/test/images with FOLDER/test/masks, or FOLDER/images with FOLDER/masks where there is no such folder, for
    a network that is trained already; read as the test images of a run are.

    Args:
        own: how the run read its images.
        image_size: what it resized them to cover; None: they stay as they are.
        divisor: of the sides of whole images.
        classes: that it knows, by the same numbers.
        binary: whatever is not 0 is of class 1, as it was in training.

    Raises:
        RevtrainError: missing or empty folders, an image without a mask, an image that cannot be used.
    """
    from revtrain.data import streamed

    root = files.place(folder, "--data")
    items = _pairs(root / "test" if files.is_folder(root / "test") else root, own, OTHER)
    split = streamed.split(items, own, image_size, root, in_windows=True, classes=classes, binary=binary)
    return replace(split, divisor=divisor)


def _pairs(folder: Path, own: StreamSettings, expected: str = LAYOUT) -> list[Item]:
    """The images of `folder`/images with their masks in `folder`/masks."""
    from revtrain.data import imagefiles, regions
    from revtrain.data.streamed import Item

    found = []
    for part in ("images", "masks"):
        place = folder / part
        if not files.is_folder(place):
            raise RevtrainError(f"There is no folder {printable(place)}.\n{expected}")
        listing = imagefiles.list_images(place, by_class=False, suffixes=regions.suffixes(part == "images"))
        if not listing.images:
            raise imagefiles.no_images(listing, expected)
        imagefiles.say_left_out(place, [listing])
        found.append(_by_stem(listing.images, place))
    images, masks = found
    bare = sorted(images.keys() - masks.keys())
    if bare:
        raise RevtrainError(
            f"{len(bare)} of {len(images)} images in {printable(folder / 'images')} have no mask of their name, as "
            f"{printable(bare[0])}.\nPut one into {printable(folder / 'masks')}: the same name, but for the suffix."
        )
    return [Item(images[name], mask=masks[name]) for name in sorted(images)]


def _by_stem(paths: Sequence[str], folder: Path) -> dict[str, str]:
    """The files by their names in `folder`, without suffix."""
    found: dict[str, str] = {}
    for path in paths:
        name = unicodedata.normalize("NFC", os.path.splitext(os.path.relpath(path, folder))[0])
        if name in found:
            raise RevtrainError(
                f"{printable(found[name])} and {printable(path)} have one name, but for the suffix; images and masks "
                "find each other by it.\nRename one of them, and its mask."
            )
        found[name] = path
    return found


def _classes(
    cfg: DataConfig[Any], own: Settings, root: Path, train: Sequence[Item], test: Sequence[Item]
) -> tuple[list[str], bool]:
    """(names of the classes, whether all but 0 is class 1), from classes.txt, `data.classes`, or the masks."""
    named = root / NAMES
    names = [line.strip() for line in named.read_text().splitlines() if line.strip()] if named.is_file() else []
    numbers = _numbers_in(train, own.workers)
    binary = own.binary or (numbers == {0, IGNORED} and (cfg.classes or len(names) or 2) == 2)
    numbers |= _numbers_in(test, own.workers)
    if binary and not own.binary:
        log.info("masks      of 0 and 255 alone: 255 is taken for class 1")
    count = cfg.classes or len(names) or (2 if binary else max(2, 1 + max(numbers - {IGNORED}, default=1)))
    if count > IGNORED:
        raise RevtrainError(
            f"The masks in {printable(root / 'train/masks')} hold numbers up to {count - 1}; classes are at most "
            f"{IGNORED}.\nIf the numbers tell objects apart, data.binary=true makes one class of them."
        )
    if count > MANY and not names and cfg.classes is None:
        log.warning("masks      name %d classes; if their numbers tell objects apart, data.binary=true makes one class "
                    "of them", count)  # fmt: skip
    if names and len(names) != count:
        raise RevtrainError(
            f"{printable(named)} names {len(names)} classes, data.classes={count}.\nLeave one of the two out."
        )
    beyond = max(numbers - {IGNORED}, default=0)
    if beyond >= count and not binary:
        raise RevtrainError(
            f"The masks in {printable(root)} hold {beyond}; of {count} classes the last is {count - 1}.\n"
            f"Give data.classes={beyond + 1} (or name as many in {NAMES}), or data.binary=true: all but 0 is one class."
        )
    return names or ["background", *map(str, range(1, count))], binary


def _numbers_in(items: Sequence[Item], workers: int) -> set[int]:
    """The different numbers of their masks, of which `LOOKED_AT` or fewer are looked at."""
    from revtrain.data.masks import numbers_in

    masks = [item.mask for item in items if item.mask]
    with ThreadPoolExecutor(workers) as pool:
        return set().union(*pool.map(numbers_in, masks[:: -(-len(masks) // LOOKED_AT)]))
