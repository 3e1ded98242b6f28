"""Image files whose pixels are classes: 0, 1, 2, ..., and IGNORED for those that count for nothing."""

from __future__ import annotations

import os
from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps

from revtrain.config import IGNORED, ImageSize
from revtrain.data import imagefiles
from revtrain.errors import RevtrainError, printable

LOSSY = ("JPEG", "AVIF")  # Pillow's formats
KEPT = 4  # masks in memory
MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # Pillow's: one whole number a pixel; of a palette its indices


def read(path: str, size: ImageSize, resized: ImageSize | None, classes: int, binary: bool) -> np.ndarray:
    """The classes of an image's pixels, upright, (H, W) uint8, not to be written to.

    Args:
        size: of its image; another one is refused.
        resized: what it is let cover after that, by the nearest pixels, the centre cut out.
        classes: how many there are; other numbers are refused.
        binary: whatever is not 0 is of class 1.

    Raises:
        RevtrainError: it cannot be read, is damaged, in colours, of another size, or names other classes.
    """
    with imagefiles.reading(path):
        status = os.stat(path)
    values = _numbers_of(path, status.st_mtime_ns, status.st_size)
    if values.shape != tuple(size):
        raise RevtrainError(
            f"{printable(path)} has {values.shape[1]}x{values.shape[0]} pixels, its image {size.width}x{size.height}.\n"
            "Give each image a mask of the same size."
        )
    found = (values != 0).astype(np.uint8) if binary else _classes(path, values, classes)
    if resized is None:
        return found
    return np.asarray(ImageOps.fit(Image.fromarray(found), (resized.width, resized.height), Image.Resampling.NEAREST))


def _classes(path: str, values: np.ndarray, classes: int) -> np.ndarray:
    """Numbers (H, W) as uint8, those that are no class refused."""
    wrong = values[(values < 0) | ((values >= classes) & (values != IGNORED))]
    if wrong.size:
        raise RevtrainError(
            f"{printable(path)} holds {int(wrong.max())}; classes go from 0 to {classes - 1}, {IGNORED} is for none.\n"
            "Give data.classes, one more than the highest; or data.binary=true, which makes one class of all but 0."
        )
    return values.astype(np.uint8)


def numbers_in(path: str) -> set[int]:
    """The different numbers of a mask.

    Raises:
        RevtrainError: it cannot be read, is damaged, or in colours.
    """
    return set(np.unique(_numbers(path)).tolist())


@lru_cache(maxsize=KEPT)
def _numbers_of(path: str, changed_ns: int, size_bytes: int) -> np.ndarray:
    """Of a file in one state of it: parts of one image follow each other, and a mask is decoded as a whole."""
    return _numbers(path)


def _numbers(path: str) -> np.ndarray:
    """(H, W), upright."""
    with imagefiles.opened(path) as image:
        if image.format in LOSSY:
            raise RevtrainError(
                f"{printable(path)} is no mask: {image.format} changes numbers when it is written.\n"
                "Make it anew from what it was made of, as PNG or TIFF."
            )
        if image.mode not in MODES:
            raise RevtrainError(
                f"{printable(path)} is no mask: its pixels are colours (PIL mode {image.mode}).\n"
                "Give one number a pixel, its class: 8 bits in grey, or the indices of a palette."
            )
        step = _step(image)
        with imagefiles.reading(path):
            image = ImageOps.exif_transpose(image)
            values = np.asarray(image).astype(np.uint8) if image.mode == "1" else np.asarray(image)
            return values // step if step > 1 else values


def _step(image: Image.Image) -> int:
    """By how much Pillow multiplies the numbers of greys of 2 or 4 bits, so that the highest is white."""
    tiles = getattr(image, "tile", None)
    if image.mode != "L" or not tiles:
        return 1
    layout = tiles[0].args
    name = layout if isinstance(layout, str) else layout[0]
    return {"L;2": 85, "L;4": 17}.get(name, 1)
