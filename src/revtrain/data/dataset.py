"""A data set: its two splits, in memory as uint8 or read when needed, fixed subsets of them, and its statistics.

B images of a batch, N images of a split, H x W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from revtrain.config import DataConfig, ImageSize, registry, typed
from revtrain.data.streamed import StreamedSplit
from revtrain.errors import RevtrainError

# Subsets are the same in every run, whatever its seed: two runs on 1,000 images see the same 1,000.
SUBSET_SEED = 1910_11127
COUNTED_PIXELS = 2**26  # of streamed images, for mean and deviation
LEAST_PIXELS, MOST_ROUNDS = 2**22, 64  # of parts of them
NO_EPOCH = 2**32  # no run comes to it: its parts are others than those of training


@dataclass(frozen=True)
class Split:
    """Images (N, 3, H, W) uint8 and labels, (N,) int64 of images or (N, H, W) uint8 of pixels."""

    images: Tensor
    labels: Tensor
    is_uniform = True  # all images are of one size

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> ImageSize:
        """Of all images, in pixels."""
        return ImageSize(*self.images.shape[-2:])

    @property
    def least(self) -> ImageSize:
        """The least height and the least width."""
        return self.image_size

    @property
    def greatest(self) -> ImageSize:
        """The greatest height and the greatest width."""
        return self.image_size

    @property
    def files(self) -> int:
        """How many images there are."""
        return len(self)

    @property
    def class_labels(self) -> Tensor:
        """(N,) int64: the classes of the images, all 0 where pixels have classes instead."""
        return self.labels if self.labels.dim() == 1 else torch.zeros(len(self), dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """In memory."""
        return self.images.nbytes + self.labels.nbytes

    def read(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        """The images (B, 3, H, W) and labels of `picked` (B,)."""
        return self.images[picked], self.labels[picked]

    def batches(self, size: int, turn: int = 0, turns: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """All images with their labels, `size` at a time; of `turns` processes that take turns, the batches of one."""
        parts = list(zip(self.images.split(size), self.labels.split(size), strict=True))
        yield from parts[turn::turns]

    def subset(self, chosen: Tensor) -> Split:
        """Of the images `chosen` (n,)."""
        return Split(self.images[chosen], self.labels[chosen])

    def on(self, device: torch.device) -> Split:
        """The same on a device."""
        return Split(self.images.to(device), self.labels.to(device))


AnySplit = Split | StreamedSplit


@dataclass(frozen=True)
class Dataset:
    """Two splits, the names of their classes, and the statistics of the training images alone.

    `mean` and `std` are (3,) float32, per channel, in units of the full scale (0..1).
    """

    train: AnySplit
    test: AnySplit
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor

    @property
    def image_size(self) -> ImageSize:
        """Of all training images, in pixels, or of the largest one."""
        return self.train.image_size


def load_data(cfg: DataConfig[Any], divisor: int = 1, seed: int = 0) -> Dataset:
    """The data set that the `data` part of the configuration describes.

    Args:
        divisor: images that are streamed as large as they are come to sides that it divides.
        seed: of the parts that are cut out of streamed images.

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
        raise RevtrainError(
            f"data.image_size={typed(cfg.image_size)} is no number of pixels.\nGive 1 or more, or null."
        )

    train, test, classes = source.load(cfg)
    if isinstance(train, StreamedSplit):
        train, test = (replace(split, divisor=divisor, seed=seed) for split in (train, test))
    if cfg.classes is not None and cfg.classes != len(classes):
        raise RevtrainError(
            f"data.classes={cfg.classes}, but the data set has {len(classes)} classes.\nLeave it out (null)."
        )
    train = _subset(train, len(classes), cfg.train_limit, "train")
    test = _subset(test, len(classes), cfg.test_limit, "test")
    mean, std = _statistics(train)
    return Dataset(train, test, tuple(classes), mean, std)


def _statistics(train: AnySplit) -> tuple[Tensor, Tensor]:
    """Mean and deviation of all images in memory, or of as many evenly chosen ones as have COUNTED_PIXELS; of parts of
    images that an epoch may take, several times where they are few."""
    if isinstance(train, Split):
        return channel_statistics(train.images)
    pixels = train.image_size.pixels
    count = max(1, min(len(train), COUNTED_PIXELS // pixels))
    chosen = torch.linspace(0, len(train) - 1, count).long().unique()
    rounds = 1 if train.settings.crop is None else max(1, min(MOST_ROUNDS, LEAST_PIXELS // (len(chosen) * pixels)))

    def chunks() -> Iterator[Tensor]:
        for epoch in range(NO_EPOCH, NO_EPOCH + rounds):
            for few in chosen.split(train.settings.workers):
                yield from (each.result()[0][None] for each in train.begin(few, epoch))

    return _statistics_of_chunks(chunks())


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) standard deviation per channel of uint8 images (N, 3, H, W).

    Returns two (3,) float32 tensors in units of the full scale (0..1).

    Counts of the 256 levels are gathered chunk by chunk: exact, and no float copy of the images exists.
    """
    return _statistics_of_chunks(images.split(4096))


def _statistics_of_chunks(chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for chunk in chunks:
        for channel in range(len(counts)):
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
            f"{there / 2**30:,.1f} GiB.\nUse smaller ones, as in data.image_size=32, or fewer; "
            "data=imagefolder can read them when they are needed: data.stream=true."
        )


def _subset(split: AnySplit, classes: int, limit: int | None, name: str) -> AnySplit:
    """`limit` images, as balanced as the split allows; a smaller subset lies within a larger one."""
    if limit is None:
        return split
    if not 1 <= limit <= split.files:
        raise RevtrainError(
            f"data.{name}_limit={limit}, but the {name} set has {split.files} images.\n"
            f"Give 1 to {split.files}, or null for all."
        )
    shuffled = torch.randperm(split.files, generator=torch.Generator().manual_seed(SUBSET_SEED))
    labels = split.class_labels
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = torch.bincount(labels, minlength=classes)
    rank = torch.cat([torch.arange(size) for size in sizes.tolist()])  # place of each image within its class
    chosen = by_class[rank.argsort(stable=True)[:limit]].sort().values
    return split.subset(chosen)
