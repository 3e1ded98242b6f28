"""Per-sample augmentation of a batch, vectorised, on the device of the images.

What is random is drawn on the CPU (`draw_augmentation`) and applied wherever the images are (`augment`), so
that a run sees the same images on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revtrain.config import IGNORED, ImageSize
from revtrain.errors import RevtrainError

STEPS = 2**16  # of a draw between 0 and 1 that travels as a whole number
GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue (ITU-R BT.601)


class Draws(NamedTuple):
    """The random choices for B images; small tensors on the CPU, all of whole numbers."""

    offsets: Tensor  # (B, 2) int64: top and left of the crop in the padded image, 0 .. 2*pad
    flips: Tensor  # (B,) bool: mirror left and right
    centres: Tensor  # (B, 2) int64: row and column of the cutout's centre, in an image of its size modulo that
    upside_down: Tensor | None = None  # (B,) bool: mirror top and bottom
    colours: Tensor | None = None  # (B, 3) int64, 0 .. STEPS: of brightness, contrast and saturation

    def each(self, change: Callable[[Tensor], Tensor]) -> Draws:
        """With `change` made to every tensor."""
        changed: Any = [None if draw is None else change(draw) for draw in self]
        return Draws(*changed)

    def packed(self) -> Tensor:
        """As one tensor (B, columns) int64."""
        columns = [self.offsets, self.flips[:, None], self.centres]
        if self.upside_down is not None:
            columns.append(self.upside_down[:, None])
        if self.colours is not None:
            columns.append(self.colours)
        return torch.cat([each.long() for each in columns], 1)

    @classmethod
    def unpacked(cls, columns: Tensor, cfg: Any) -> Draws:
        """What `packed` made of draws for the `data.augment` node `cfg`."""
        upside_down = columns[:, 5].bool() if cfg.flip_vertical else None
        colours = columns[:, -3:] if cfg.colour else None
        return cls(columns[:, 0:2], columns[:, 2].bool(), columns[:, 3:5], upside_down, colours)


def draw_columns(cfg: Any) -> int:
    """How many columns `Draws.packed` has."""
    return 5 + bool(cfg.flip_vertical) + 3 * bool(cfg.colour)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) to float32 of zero mean and unit deviation; mean, std (3,) in 0..1."""
    return _standardised(images.float().div_(255), mean, std)


def _standardised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    mean, std = (value.to(images.device, torch.float32).view(-1, 1, 1) for value in (mean, std))
    return images.sub_(mean).div_(std)


def check_pad(cfg: Any, image_size: int | Sequence[int]) -> None:
    """Refuse a pad that reflection cannot fill in images of this size, a side or [height, width] in pixels."""
    size = ImageSize.of(image_size)
    if not 0 <= cfg.pad < min(size):
        raise RevtrainError(
            f"data.augment.pad={cfg.pad} does not fit images of {size} pixels.\n"
            f"Reflection can fill 0 to {min(size) - 1} pixels; 0 switches the crop off."
        )


def draw_augmentation(batch: int, image_size: int | Sequence[int], cfg: Any, generator: torch.Generator) -> Draws:
    """The choices for `batch` images of `image_size`, a side or [height, width] in pixels, or smaller, from a CPU
    generator.

    `cfg` is the `data.augment` node. The same numbers are drawn whatever is switched off, so that switching
    one kind of augmentation off leaves the others as they were; those of `flip_vertical` and `colour` come last.

    Raises:
        RevtrainError: a pad that reflection cannot fill, or a negative pad or cutout.
    """
    check_pad(cfg, image_size)
    size = ImageSize.of(image_size)
    if cfg.cutout < 0:
        raise RevtrainError(f"data.augment.cutout={cfg.cutout} is no side in pixels.\nGive 0 (off) or more.")
    offsets = torch.randint(0, 2 * cfg.pad + 1, (batch, 2), generator=generator)
    flips = torch.rand(batch, generator=generator) < (0.5 if cfg.flip else 0.0)
    if size.height == size.width:
        centres = torch.randint(0, size.width, (batch, 2), generator=generator)
    else:
        centres = torch.stack([torch.randint(0, side, (batch,), generator=generator) for side in size], 1)
    upside_down = torch.rand(batch, generator=generator) < 0.5 if cfg.flip_vertical else None
    colours = torch.randint(0, STEPS + 1, (batch, 3), generator=generator) if cfg.colour else None
    return Draws(offsets, flips, centres, upside_down, colours)


def first_flips(images: int, seed: int) -> Tensor:
    """(images,) bool: which images of a training set the first epoch mirrors, where flips alternate by epochs."""
    return torch.rand(images, generator=torch.Generator().manual_seed(seed)) < 0.5


def augment(images: Tensor, draws: Draws, mean: Tensor, std: Tensor, cfg: Any) -> Tensor:
    """Reflect-pad and crop, flip, change colours, normalise, cut out: uint8 (B, 3, H, W) to float32 (B, 3, H, W).

    Crop and flips are one gather, without a padded copy. The cutout is a square of `cfg.cutout` pixels around
    its centre, clipped at the borders and set to the mean of the training set (0 after normalisation).
    """
    draws = _on(draws, images)
    output = _moved(images, draws, cfg).float().div_(255)
    if draws.colours is not None:
        output = _recoloured(output, 1 + cfg.colour * (2 * draws.colours / STEPS - 1))
    output = _standardised(output, mean, std)
    if cfg.cutout:
        output.masked_fill_(_hidden(draws, output, cfg.cutout)[:, None], 0.0)
    return output


def augment_masks(masks: Tensor, draws: Draws, cfg: Any) -> Tensor:
    """The labels (B, H, W) of what `augment` makes of images: moved as they are, IGNORED where a cutout hides them."""
    draws = _on(draws, masks)
    moved = _moved(masks[:, None], draws, cfg)[:, 0]
    return moved.masked_fill(_hidden(draws, moved, cfg.cutout), IGNORED) if cfg.cutout else moved


def _on(draws: Draws, images: Tensor) -> Draws:
    return draws.each(lambda draw: draw.to(images.device, non_blocking=True))


def _moved(images: Tensor, draws: Draws, cfg: Any) -> Tensor:
    """Crop and flips of images (B, C, H, W)."""
    if not (cfg.pad or cfg.flip or cfg.flip_vertical):
        return images
    height, width = images.shape[-2:]
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    from_top = rows if draws.upside_down is None else torch.where(draws.upside_down[:, None], height - 1 - rows, rows)
    source_rows = _reflect(from_top + draws.offsets[:, :1] - cfg.pad, height)  # (B, H)
    from_left = torch.where(draws.flips[:, None], width - 1 - columns, columns)  # (B, W)
    source_columns = _reflect(from_left + draws.offsets[:, 1:] - cfg.pad, width)
    source = source_rows[:, :, None] * width + source_columns[:, None, :]  # (B, H, W)
    source = source.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, source).view_as(images)


def _recoloured(images: Tensor, factors: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0..1 with brightness, contrast and saturation times `factors` (B, 3)."""
    brightness, contrast, saturation = factors.float()[:, :, None, None, None].unbind(1)
    weights = torch.tensor(GREY, device=images.device).view(1, 3, 1, 1)
    images = images.mul_(brightness)
    mean = (images.mean((2, 3), keepdim=True) * weights).sum(1, keepdim=True)
    images = images.sub_(mean).mul_(contrast).add_(mean)
    grey = (images * weights).sum(1, keepdim=True)
    return images.sub_(grey).mul_(saturation).add_(grey).clamp_(0, 1)


def _hidden(draws: Draws, images: Tensor, side: int) -> Tensor:
    """(B, H, W) bool: what the cutouts of `side` pixels hide of images (B, ..., H, W)."""
    rows, columns = (torch.arange(each, device=images.device) for each in images.shape[-2:])
    centres = draws.centres % torch.tensor(images.shape[-2:], device=images.device)  # drawn for a larger image
    top, left = (centres - side // 2).split(1, dim=1)  # (B, 1) each
    in_rows = (rows >= top) & (rows < top + side)
    in_columns = (columns >= left) & (columns < left + side)
    return in_rows[:, :, None] & in_columns[:, None, :]


def _reflect(index: Tensor, size: int) -> Tensor:
    """Fold indices from -(size-1) .. 2*(size-1) into 0 .. size-1 by reflection; the edge is not repeated."""
    last = size - 1
    return last - (last - index.abs()).abs()
