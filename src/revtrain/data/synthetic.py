"""Embedded images: ten shapes, drawn by signed distance functions over random textures.

Each image has one shape of random place, size and rotation before a textured background with distractors (a
stroke and specks), under noise. The class survives a flip, a crop and a cutout. The shape's colour leans, more or
less, towards a colour of its class: a hint that speeds the first epochs up and that alone is not enough. So no
linear model of the pixels gets half of the images right, while a small CNN learns them in a few epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from revtrain.config import DataConfig, ImageSize, key, typed
from revtrain.data import Facts
from revtrain.errors import RevtrainError

if TYPE_CHECKING:
    from revtrain.data import Split

SAME_IMAGES_ANYWHERE = True  # they are drawn
IMAGE_SIZE = 32
CLASSES = 10  # the shapes of `revtrain.data.shapes`


@dataclass
class Settings:
    """How many images are drawn, and which."""

    train_images: int = key(10_000, "how many training images are drawn", at_least=1)
    test_images: int = key(2_000, "how many test images are drawn", at_least=1)
    seed: int = key(0, "of the images", at_least=0, at_most=2**63 - 1)


def facts(cfg: DataConfig[Settings]) -> Facts:
    """All of them."""
    return Facts(CLASSES, cfg.image_size or IMAGE_SIZE, cfg.own.train_images)


def load(cfg: DataConfig[Settings]) -> tuple[Split, Split, list[str]]:
    """`train_images` and `test_images` images of `image_size` (default 32), from disjoint random streams.

    Raises:
        RevtrainError: too few images, a negative seed, or a size below 16 pixels.
    """
    from revtrain.data.shapes import SHAPES

    return *drawn(cfg), [shape.__name__ for shape in SHAPES]


def drawn(cfg: DataConfig[Settings], masks: bool = False) -> tuple[Split, Split]:
    """Training and test set; `masks`: with labels of pixels, see `shapes.draw`."""
    import numpy as np

    from revtrain.data import check_room
    from revtrain.data.shapes import draw

    size = ImageSize.of(cfg.image_size or IMAGE_SIZE)
    if min(size) < 16:
        raise RevtrainError(
            f"data.image_size={typed(cfg.image_size)} is too small for the synthetic shapes.\nGive 16 or more."
        )
    if cfg.own.seed < 0:
        raise RevtrainError(f"data.seed={cfg.own.seed} is negative.\nGive 0 or more.")
    for name in ("train_images", "test_images"):
        if getattr(cfg.own, name) < CLASSES:
            raise RevtrainError(f"data.{name}={getattr(cfg.own, name)} leaves a class empty.\nGive {CLASSES} or more.")
    check_room(cfg.own.train_images + cfg.own.test_images, size, "data.train_images and data.test_images")
    train_stream, test_stream = np.random.default_rng(cfg.own.seed).spawn(2)
    return (
        draw(cfg.own.train_images, size, train_stream, masks),
        draw(cfg.own.test_images, size, test_stream, masks),
    )
