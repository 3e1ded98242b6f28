"""The synthetic images with the outlines of their shapes, for task=segment: background (0) and ten shapes (1 to 10)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from revtrain.config import DataConfig
from revtrain.data import Facts, synthetic
from revtrain.data.synthetic import Settings

if TYPE_CHECKING:
    from revtrain.data import Split

__all__ = ["Settings", "facts", "load"]

TASKS = ("segment",)
SAME_IMAGES_ANYWHERE = True  # they are drawn


def facts(cfg: DataConfig[Settings]) -> Facts:
    """All of them."""
    return synthetic.facts(cfg)._replace(classes=synthetic.CLASSES + 1)


def load(cfg: DataConfig[Settings]) -> tuple[Split, Split, list[str]]:
    """`train_images` and `test_images` images of `image_size` (default 32) with masks, from disjoint random streams.

    Raises:
        RevtrainError: as `synthetic.load`.
    """
    from revtrain.data.shapes import SHAPES

    return *synthetic.drawn(cfg, masks=True), ["background", *(shape.__name__ for shape in SHAPES)]
