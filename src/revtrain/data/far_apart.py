"""Two marks far apart: the class says whether they are of the same kind, so no part of the image holds it.

    +------+-------------+------+     One mark stands anywhere in the left quarter of the image, the other anywhere
    |      |             | ##   |     in the right quarter: half as tall as the image, 3/16 as wide. A mark is
    |  ..  |             | ##   |     lighter (kind 1) or darker (kind 0) than the ground, which is grey noise.
    |  ..  |             | ##   |     Class "same": both are of one kind; "different": one of each.
    |  ..  |             |      |
    +------+-------------+------+

The four pairs of kinds are equally frequent, so either mark alone says nothing about the class. A square of up to half
the side meets at most one of them: whoever sees such patches has nothing to learn, and a sum over patches of whatever
they show is right about three of the four pairs at best (a + a > 0 and b + b > 0 make a + b > 0). The marks are large
and plain on purpose: what is hard is the distance. A copy of the image that was shrunk holds the answer, too.

Mirroring leaves kinds and class as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from revtrain.config import DataConfig, ImageSize, key, typed
from revtrain.data import Facts
from revtrain.errors import RevtrainError

if TYPE_CHECKING:
    import numpy as np

    from revtrain.data import Split

SAME_IMAGES_ANYWHERE = True  # they are drawn
IMAGE_SIZE = 1024  # pixels
UNIT = 16  # a side is a whole number of sixteenths: marks are 8 of them tall and 3 wide
PAIRS = 4  # of kinds, left and right: the class is whether they agree
NAMES = ["different", "same"]
GREY, CONTRAST, NOISE = 128, 64, 16  # levels of 0..255: the ground, a mark's distance to it, the greatest noise


@dataclass
class Settings:
    """How many images are drawn, and which."""

    train_images: int = key(256, "how many training images are drawn", at_least=1)
    test_images: int = key(128, "how many test images are drawn", at_least=1)
    seed: int = key(0, "of the images", at_least=0, at_most=2**63 - 1)


def facts(cfg: DataConfig[Settings]) -> Facts:
    """All of them."""
    return Facts(len(NAMES), cfg.image_size or IMAGE_SIZE, cfg.own.train_images)


def load(cfg: DataConfig[Settings]) -> tuple[Split, Split, list[str]]:
    """`train_images` and `test_images` images of `image_size` (default 1,024), from disjoint random streams.

    Raises:
        RevtrainError: too few images, a negative seed, or a size that is no multiple of 16 pixels.
    """
    import numpy as np

    from revtrain.data import check_room

    size = ImageSize.of(cfg.image_size or IMAGE_SIZE)
    if size.height % UNIT or size.width % UNIT:
        raise RevtrainError(
            f"data.image_size={typed(cfg.image_size)} does not fit the marks, sixteenths of a side tall and wide.\n"
            f"Give a multiple of {UNIT}, such as data.image_size={typed(size.nearest(UNIT).plain)}."
        )
    if cfg.own.seed < 0:
        raise RevtrainError(f"data.seed={cfg.own.seed} is negative.\nGive 0 or more.")
    for name in ("train_images", "test_images"):
        if getattr(cfg.own, name) < PAIRS:
            raise RevtrainError(
                f"data.{name}={getattr(cfg.own, name)} leaves out a pair of kinds, of which there are {PAIRS}.\n"
                f"Give {PAIRS} or more."
            )
    check_room(cfg.own.train_images + cfg.own.test_images, size, "data.train_images and data.test_images")
    train_stream, test_stream = np.random.default_rng(cfg.own.seed).spawn(2)
    return draw(cfg.own.train_images, size, train_stream), draw(cfg.own.test_images, size, test_stream), NAMES


def draw(count: int, size: ImageSize, rng: np.random.Generator) -> Split:
    """`count` images (count, 3, H, W), the pairs of kinds balanced and in random order."""
    import numpy as np
    import torch

    from revtrain.data import Split

    pairs = rng.permutation(np.arange(count) % PAIRS)
    kinds = pairs // 2, pairs % 2  # (count,) left, right
    tall, wide, quarter = 8 * size.height // UNIT, 3 * size.width // UNIT, size.width // 4
    images = np.empty((count, 3, *size), np.uint8)
    for index in range(count):
        images[index] = rng.integers(GREY - NOISE, GREY + NOISE + 1, (3, *size), np.uint8)
        for side, kind in enumerate(kinds):
            top, left = (int(each) for each in rng.integers(0, (size.height - tall + 1, quarter - wide + 1)))
            left += side * (size.width - quarter)
            mark = images[index, :, top : top + tall, left : left + wide]
            if kind[index]:
                mark += np.uint8(CONTRAST)
            else:
                mark -= np.uint8(CONTRAST)
    labels = torch.from_numpy((kinds[0] == kinds[1]).astype(np.int64))
    return Split(torch.from_numpy(images), labels)
