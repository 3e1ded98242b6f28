"""A data set in memory, as uint8: its two splits, fixed subsets of them, and its statistics.

B images of a batch, N images of a split, H = W pixels a side.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from revtrain.config import DataConfig, ImageSize, registry
from revtrain.errors import RevtrainError

# Subsets are the same in every run, whatever its seed: two runs on 1,000 images see the same 1,000.
SUBSET_SEED = 1910_11127


@dataclass(frozen=True)
class Split:
    """Images (N, 3, H, W) uint8 and labels (N,) int64, both on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """Two splits, the names of their classes, and the statistics of the training images alone.

    `mean` and `std` are (3,) float32, per channel, in units of the full scale (0..1).
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor

    @property
    def image_size(self) -> ImageSize:
        """Of all images, in pixels."""
        return ImageSize(*self.train.images.shape[-2:])


def load_data(cfg: DataConfig[Any]) -> Dataset:
    """The data set that the `data` part of the configuration describes.

    Raises:
        RevtrainError: unknown name, missing or damaged files, a class count or a limit that does not fit.
    """
    names = registry.names("data")
    if cfg.name not in names:
        raise RevtrainError(f"data.name={cfg.name} is no data set.\nThere are: {', '.join(names)}.")
    source = registry.load("data", cfg.name)
    try:
        for package in getattr(source, "NEEDS", ()):
            import_module(package)
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
        free = [name for name in names if not getattr(registry.load("data", name), "NEEDS", ())]
        raise RevtrainError(
            f"data={cfg.name} needs torchvision, which cannot be imported beside torch {torch.__version__}:\n"
            f"{str(error).partition(chr(10))[0]}\n"
            f"Install torch and torchvision together, from one index; data={', '.join(free)} needs no torchvision."
        ) from error
    if cfg.size is not None and min(cfg.size) < 1:
        raise RevtrainError(f"data.image_size={cfg.image_size} is no number of pixels.\nGive 1 or more, or null.")

    train, test, classes = source.load(cfg)
    if cfg.classes is not None and cfg.classes != len(classes):
        raise RevtrainError(
            f"data.classes={cfg.classes}, but the data set has {len(classes)} classes.\nLeave it out (null)."
        )
    train = _subset(train, len(classes), cfg.train_limit, "train")
    test = _subset(test, len(classes), cfg.test_limit, "test")
    mean, std = channel_statistics(train.images)
    return Dataset(train, test, tuple(classes), mean, std)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) standard deviation per channel of uint8 images (N, 3, H, W).

    Returns two (3,) float32 tensors in units of the full scale (0..1).

    Counts of the 256 levels are gathered chunk by chunk: exact, and no float copy of the images exists.
    """
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for chunk in images.split(4096):
        for channel in range(images.shape[1]):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    shares = counts.double() / counts.sum(1, keepdim=True)
    mean = shares @ levels
    variance = (shares * (levels - mean[:, None]) ** 2).sum(1)
    # A constant channel has no spread to normalise by; one grey level keeps it finite.
    return mean.float(), variance.sqrt().clamp(min=1 / 255).float()


def check_room(count: int, image_size: int | Sequence[int], what: str) -> None:
    """Refuse images that would not fit into the memory of this machine.

    Args:
        count: of images, 3 bytes a pixel.
        image_size: side in pixels, or [height, width].
        what: where they come from.

    Raises:
        RevtrainError: they need more than there is.
    """
    size = ImageSize.of(image_size)
    needed, there = count * 3 * size.pixels, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise RevtrainError(
            f"{count} images of {size} pixels ({what}) need {needed / 2**30:,.1f} GiB; this machine has "
            f"{there / 2**30:,.1f} GiB.\nUse smaller ones, as in data.image_size=32, or fewer."
        )


def _subset(split: Split, classes: int, limit: int | None, name: str) -> Split:
    """`limit` images, as balanced as the split allows; a smaller subset lies within a larger one."""
    if limit is None:
        return split
    if not 1 <= limit <= len(split):
        raise RevtrainError(
            f"data.{name}_limit={limit}, but the {name} set has {len(split)} images.\n"
            f"Give 1 to {len(split)}, or null for all."
        )
    shuffled = torch.randperm(len(split), generator=torch.Generator().manual_seed(SUBSET_SEED))
    by_class = shuffled[split.labels[shuffled].argsort(stable=True)]
    sizes = torch.bincount(split.labels, minlength=classes)
    rank = torch.cat([torch.arange(size) for size in sizes.tolist()])  # place of each image within its class
    chosen = by_class[rank.argsort(stable=True)[:limit]].sort().values
    return Split(split.images[chosen], split.labels[chosen])
