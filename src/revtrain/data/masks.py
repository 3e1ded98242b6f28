"""Image files whose pixels are classes: 0, 1, 2, ..., and IGNORED for those that count for nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from revtrain.config import IGNORED, ImageSize
from revtrain.data import imagefiles
from revtrain.errors import RevtrainError, printable

if TYPE_CHECKING:
    import numpy as np

MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # Pillow's: one whole number a pixel; of a palette its indices


def read(path: str, size: ImageSize, resize: bool, classes: int, binary: bool) -> np.ndarray:
    """The classes of an image's pixels, upright, (H, W) uint8.

    Args:
        size: of its image, H x W.
        resize: let it cover that, by the nearest pixels, and cut out the centre; otherwise another size is refused.
        classes: how many there are; other numbers are refused.
        binary: whatever is not 0 is of class 1.

    Raises:
        RevtrainError: it cannot be read, is damaged, in colours, of another size, or names other classes.
    """
    import numpy as np

    values = _numbers(path, size if resize else None)
    if values.shape != tuple(size):
        raise RevtrainError(
            f"{printable(path)} has {values.shape[1]}x{values.shape[0]} pixels, its image {size.width}x{size.height}.\n"
            "Give each image a mask of the same size."
        )
    if binary:
        return (values != 0).astype(np.uint8)
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
    import numpy as np

    return set(np.unique(_numbers(path, None)).tolist())


def _numbers(path: str, fitted: ImageSize | None) -> np.ndarray:
    """(H, W), upright; `fitted`: what it is resized to cover."""
    import numpy as np

    with imagefiles.opened(path) as image:
        if image.mode not in MODES:
            raise RevtrainError(
                f"{printable(path)} is no mask: its pixels are colours (PIL mode {image.mode}).\n"
                "Give one number a pixel, its class: 8 bits in grey, or the indices of a palette."
            )
        try:
            image = ImageOps.exif_transpose(image)
            if image.mode == "1":
                image = image.convert("L").point(lambda value: value > 0)
            if fitted is not None:
                image = ImageOps.fit(image, (fitted.width, fitted.height), Image.Resampling.NEAREST)
            return np.asarray(image)
        except MemoryError:
            raise
        except Exception as error:  # the decoders raise nearly anything on a damaged file
            raise imagefiles.unusable(path, error) from error
