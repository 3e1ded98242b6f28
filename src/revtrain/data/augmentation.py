"""Per-sample augmentation of a batch, vectorised, on the device of the images.

What is random is drawn on the CPU (`draw_augmentation`) and applied wherever the images are (`augment`), so
that a run sees the same images on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revtrain.config import ImageSize
from revtrain.errors import RevtrainError


class Draws(NamedTuple):
    """The random choices for B images; small tensors on the CPU."""

    offsets: Tensor  # (B, 2) int64: top and left of the crop in the padded image, 0 .. 2*pad
    flips: Tensor  # (B,) bool: mirror left and right
    centres: Tensor  # (B, 2) int64: row and column of the cutout's centre, within the image


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) to float32 of zero mean and unit deviation; mean, std (3,) in 0..1."""
    mean, std = (value.to(images.device, torch.float32).view(-1, 1, 1) for value in (mean, std))
    return images.float().div_(255).sub_(mean).div_(std)


def draw_augmentation(batch: int, image_size: int | Sequence[int], cfg: Any, generator: torch.Generator) -> Draws:
    """The choices for `batch` images of `image_size`, a side or [height, width] in pixels, from a CPU generator.

    `cfg` is the `data.augment` node. The same numbers are drawn whatever is switched off, so that switching
    one kind of augmentation off leaves the others as they were.

    Raises:
        RevtrainError: a pad that reflection cannot fill, or a negative pad or cutout.
    """
    size = ImageSize.of(image_size)
    if not 0 <= cfg.pad < min(size):
        raise RevtrainError(
            f"data.augment.pad={cfg.pad} does not fit images of {size} pixels.\n"
            f"Reflection can fill 0 to {min(size) - 1} pixels; 0 switches the crop off."
        )
    if cfg.cutout < 0:
        raise RevtrainError(f"data.augment.cutout={cfg.cutout} is no side in pixels.\nGive 0 (off) or more.")
    offsets = torch.randint(0, 2 * cfg.pad + 1, (batch, 2), generator=generator)
    flips = torch.rand(batch, generator=generator) < (0.5 if cfg.flip else 0.0)
    if size.height == size.width:
        centres = torch.randint(0, size.width, (batch, 2), generator=generator)
    else:
        centres = torch.stack([torch.randint(0, side, (batch,), generator=generator) for side in size], 1)
    return Draws(offsets, flips, centres)


def first_flips(images: int, seed: int) -> Tensor:
    """(images,) bool: which images of a training set the first epoch mirrors, where flips alternate by epochs."""
    return torch.rand(images, generator=torch.Generator().manual_seed(seed)) < 0.5


def augment(images: Tensor, draws: Draws, mean: Tensor, std: Tensor, cfg: Any) -> Tensor:
    """Reflect-pad and crop, flip, normalise, cut out: uint8 (B, 3, H, W) to float32 (B, 3, H, W).

    Crop and flip are one gather, without a padded copy. The cutout is a square of `cfg.cutout` pixels around
    its centre, clipped at the borders and set to the mean of the training set (0 after normalisation).
    """
    offsets, flips, centres = (draw.to(images.device, non_blocking=True) for draw in draws)
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)

    if cfg.pad or cfg.flip:
        source_rows = _reflect(rows + offsets[:, :1] - cfg.pad, height)  # (B, H)
        from_left = torch.where(flips[:, None], width - 1 - columns, columns)  # (B, W)
        source_columns = _reflect(from_left + offsets[:, 1:] - cfg.pad, width)
        source = source_rows[:, :, None] * width + source_columns[:, None, :]  # (B, H, W)
        source = source.flatten(1)[:, None].expand(-1, images.shape[1], -1)
        images = images.flatten(2).gather(2, source).view_as(images)

    output = normalise(images, mean, std)
    if cfg.cutout:
        top, left = (centres - cfg.cutout // 2).split(1, dim=1)  # (B, 1) each
        in_rows = (rows >= top) & (rows < top + cfg.cutout)
        in_columns = (columns >= left) & (columns < left + cfg.cutout)
        output.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)
    return output


def _reflect(index: Tensor, size: int) -> Tensor:
    """Fold indices from -(size-1) .. 2*(size-1) into 0 .. size-1 by reflection; the edge is not repeated."""
    last = size - 1
    return last - (last - index.abs()).abs()
