"""A split whose images stay on disk: each is read, or a part of it, when it is needed, by threads and one batch ahead.

    file --(region of it, upright, RGB)--> part --(mirrored at its borders where it is too small)--> (3, H, W) uint8

Which part: with `crop` one of that size, in training anywhere, by chance, otherwise the centre; with `image_size` the
image resized to cover it, its centre, and a crop of that; without both the whole image, mirrored until `divisor`
divides its sides. Parts by chance follow from the seed, the epoch and the number of the image alone, so that reading
ahead, resuming, and the number of threads change nothing.

B images of a batch, N of the split, H x W pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from revtrain.config import IGNORED, ImageSize, StreamSettings
from revtrain.data import imagefiles, masks, regions
from revtrain.errors import RevtrainError, printable

Sample = tuple[Tensor, Tensor]  # an image (3, H, W) uint8 and its label, () int64 or (H, W) uint8
Cut = Callable[[int, int, ImageSize], np.ndarray]  # top, left, size -> values (..., H, W)


class Window(NamedTuple):
    """A part of an image that is always the same, and how far its pixels belong to windows before it."""

    top: int
    left: int
    seen_rows: int  # the first ones, which belong to the window above
    seen_columns: int  # the first ones, which belong to the window to the left


@dataclass(frozen=True)
class Item:
    """An image file with its label: the class of the image, or another file that holds those of its pixels."""

    path: str
    label: int = 0
    mask: str | None = None
    window: Window | None = None


@dataclass(frozen=True)
class StreamedSplit:
    """Images of a folder that are read when they are needed.

    Args:
        items: the files, N / `repeats` of them.
        settings: `crop`, `workers` and `level` of the data set.
        sizes: of the files, upright, in pixels, where the images are taken whole; None: not needed.
        resized: what every image is resized to cover before anything else; None: it stays as it is.
        repeats: so many images, with parts of their own, each file stands for.
        divisor: of the sides of whole images.
        seed: of the parts.
        classes: that masks may name.
        binary: in masks whatever is not 0 is of class 1.
    """

    items: Sequence[Item]
    settings: StreamSettings
    sizes: Sequence[ImageSize] | None = None
    resized: ImageSize | None = None
    repeats: int = 1
    divisor: int = 1
    seed: int = 0
    classes: int = 2
    binary: bool = False

    def __len__(self) -> int:
        return len(self.items) * self.repeats

    @cached_property
    def _files(self) -> list[list[int]]:
        """The items of each file: one, or its windows."""
        found: dict[str, list[int]] = {}
        for index, item in enumerate(self.items):
            found.setdefault(item.path, []).append(index)
        return list(found.values())

    @property
    def files(self) -> int:
        """How many image files there are."""
        return len(self._files)

    @property
    def _one_size(self) -> ImageSize | None:
        """Of all images, where the configuration gives it."""
        return self.settings.crop_size or self.resized

    @property
    def _whole(self) -> list[ImageSize]:
        return [size.covering(self.divisor) for size in self.sizes or ()]

    @property
    def is_uniform(self) -> bool:
        """Whether all images are of one size."""
        return self._one_size is not None or len(set(self._whole)) == 1

    @property
    def image_size(self) -> ImageSize:
        """Of all images, or of the one with the most pixels."""
        return self._one_size or max(self._whole, key=lambda size: size.pixels)

    @property
    def least(self) -> ImageSize:
        """The least height and the least width."""
        return self._one_size or ImageSize(*map(min, zip(*self._whole, strict=True)))

    @property
    def greatest(self) -> ImageSize:
        """The greatest height and the greatest width, perhaps of two images."""
        return self._one_size or ImageSize(*map(max, zip(*self._whole, strict=True)))

    @property
    def class_labels(self) -> Tensor:
        """(files,) int64: the classes of the images, all 0 where pixels have classes instead."""
        return torch.tensor([self.items[indices[0]].label for indices in self._files])

    def subset(self, chosen: Tensor) -> StreamedSplit:
        """Of the files `chosen` (n,), with all of their parts."""
        indices = [index for file in chosen.tolist() for index in self._files[file]]
        sizes = None if self.sizes is None else [self.sizes[index] for index in indices]
        return replace(self, items=[self.items[index] for index in indices], sizes=sizes)

    # ---- batches -----------------------------------------------------------------------------------------

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        # Filters are those of all threads. What Pillow doubts it reads nevertheless; a file that claims to be huge is
        # refused.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        return ThreadPoolExecutor(self.settings.workers, thread_name_prefix="read")

    def begin(self, picked: Tensor, epoch: int | None = None) -> list[Future[Sample]]:
        """Begin to read the images `picked` (B,), in the background.

        Args:
            epoch: of training, from 1 on: decides which parts; None: the centre.

        Results raise `RevtrainError` for a file that cannot be used.
        """
        return [self._pool.submit(self._sample, index, epoch) for index in picked.tolist()]

    def read(self, picked: Tensor, epoch: int | None = None) -> tuple[Tensor, Tensor]:
        """The images (B, 3, H, W) uint8 and labels, (B,) int64 or (B, H, W) uint8, of `picked` (B,), of one size.

        Where sizes differ, all are cut down to their least height and width, around the centre.
        """
        samples = [each.result() for each in self.begin(picked, epoch)]
        least = ImageSize(*(min(image.shape[axis] for image, _ in samples) for axis in (1, 2)))
        return stacked([_centre(image, label, least) for image, label in samples])

    def batches(self, size: int, turn: int = 0, turns: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """All images with their labels, `size` at a time (one where sizes differ), the next ones read meanwhile; of
        `turns` processes that take turns, the batches of one."""
        parts = torch.arange(len(self)).split(size if self.is_uniform else 1)[turn::turns]
        ahead = self.begin(parts[0]) if parts else []
        try:
            for following in (*parts[1:], None):
                ready, ahead = ahead, self.begin(following) if following is not None else []
                if ready:
                    yield stacked([each.result() for each in ready])
        finally:
            give_up(ahead)

    # ---- one image ---------------------------------------------------------------------------------------

    def _sample(self, index: int, epoch: int | None) -> Sample:
        item = self.items[index // self.repeats]
        draw = None if epoch is None else np.random.default_rng([self.seed, epoch, index])
        level = self.settings.level
        own = regions.size_of(item.path, level)
        if self.sizes is not None and own != self.sizes[index // self.repeats]:
            raise _changed(item.path)
        whole = self.resized or own
        cut: Cut = partial(regions.region, item.path, level=level)
        if self.resized is not None:
            cut = partial(_cut_out, _resized(item.path, own, self.resized, level))
        wanted = self.settings.crop_size or self.resized or whole.covering(self.divisor)
        inside = ImageSize(*map(min, zip(whole, wanted, strict=True)))
        place = _place(whole, inside, item.window, draw)
        if any(first + side > most for first, side, most in zip(place, inside, whole, strict=True)):
            raise _changed(item.path)
        image = torch.from_numpy(_mirrored(cut(*place, inside), wanted))
        if item.mask is None:
            return image, torch.tensor(item.label)
        values = masks.read(item.mask, own, self.resized, self.classes, self.binary)
        labels = _filled(_cut_out(values, *place, inside), wanted)
        if item.window is not None:
            labels[: item.window.seen_rows] = IGNORED
            labels[:, : item.window.seen_columns] = IGNORED
        return image, torch.from_numpy(labels)


def give_up(reading: Sequence[Future[Sample]]) -> None:
    """Let threads not begin with what nobody waits for any more: a program ends when they have."""
    for each in reading:
        each.cancel()


def stacked(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Samples of one size as a batch."""
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(labels)


def windows(whole: ImageSize, size: ImageSize) -> list[Window]:
    """Windows of `size` that cover an image, each pixel the own one of exactly one of them.

    They stand side by side, the last ones of a row and of a column moved back into the image.
    """

    def along(length: int, side: int) -> list[tuple[int, int]]:
        """(beginning, how much of it was seen before) of each window along one side."""
        starts = [*range(0, max(1, length - side + 1), side)]
        if starts[-1] + side < length:
            starts.append(length - side)
        return [(0, 0), *((start, before + side - start) for before, start in pairwise(starts))]

    rows, columns = along(whole.height, size.height), along(whole.width, size.width)
    return [Window(top, left, seen, also) for top, seen in rows for left, also in columns]


def _place(
    whole: ImageSize, part: ImageSize, window: Window | None, draw: np.random.Generator | None
) -> tuple[int, int]:
    """Top and left of a part: of its window, by chance, or in the centre."""
    if window is not None:
        return window.top, window.left
    top, left = (int(side) - int(own) for side, own in zip(whole, part, strict=True))
    if draw is None:
        return top // 2, left // 2
    return int(draw.integers(top + 1)), int(draw.integers(left + 1))


def _changed(path: str) -> RevtrainError:
    return RevtrainError(
        f"{printable(path)} has another size than it had when the run began.\n"
        "Leave images alone while a network trains on them; put it back, or begin anew."
    )


def _resized(path: str, whole: ImageSize, size: ImageSize, level: int) -> np.ndarray:
    """A whole image (3, H, W) that was let cover `size`, its centre."""
    if not regions.is_slide(path):
        return imagefiles.pixels(path, size, resize=True)
    pixels = regions.region(path, 0, 0, whole, level)
    fitted = ImageOps.fit(Image.fromarray(pixels.transpose(1, 2, 0)), (size.width, size.height), imagefiles.SMOOTH)
    return np.asarray(fitted).transpose(2, 0, 1)


def _cut_out(values: np.ndarray, top: int, left: int, size: ImageSize) -> np.ndarray:
    return values[..., top : top + size.height, left : left + size.width]


def _around(part: np.ndarray, size: ImageSize) -> list[tuple[int, int]]:
    """What is missing on both sides of the last two axes, half of it on each."""
    missing = [side - own for side, own in zip(size, part.shape[-2:], strict=True)]
    return [(0, 0)] * (part.ndim - 2) + [(each // 2, each - each // 2) for each in missing]


def _mirrored(part: np.ndarray, size: ImageSize) -> np.ndarray:
    """(3, h, w) as (3, H, W): what is missing is mirrored at the borders."""
    return np.ascontiguousarray(np.pad(part, _around(part, size), mode="symmetric"))


def _filled(part: np.ndarray, size: ImageSize) -> np.ndarray:
    """(h, w) as (H, W): what is missing counts for nothing."""
    return np.ascontiguousarray(np.pad(part, _around(part, size), constant_values=IGNORED))


def _centre(image: Tensor, label: Tensor, size: ImageSize) -> Sample:
    top, left = ((own - side) // 2 for own, side in zip(image.shape[1:], size, strict=True))
    part = (..., slice(top, top + size.height), slice(left, left + size.width))
    return image[part], label[part] if label.dim() else label


# ---- what data sets make of their files --------------------------------------------------------------------


def split(
    items: Sequence[Item],
    settings: StreamSettings,
    resized: ImageSize | None,
    root: Path,
    repeats: int = 1,
    in_windows: bool = False,
    classes: int = 2,
    binary: bool = False,
) -> StreamedSplit:
    """The split of these files, whose headers are looked at where their sizes decide something.

    Args:
        resized, repeats, classes, binary: see `StreamedSplit`; without a crop `repeats` does nothing.
        root: named where files cannot be used.
        in_windows: with a crop, take all of each image, in windows of its size.

    Raises:
        RevtrainError: some files cannot be opened.
    """
    crop = settings.crop_size
    sizes = None
    if resized is None and (crop is None or in_windows):
        sizes = _sizes_of(items, settings, root)
    if crop is not None and in_windows:
        wholes = sizes or [resized or crop] * len(items)
        items = [
            replace(item, window=window)
            for item, whole in zip(items, wholes, strict=True)
            for window in windows(whole, crop)
        ]
        sizes = None
    return StreamedSplit(items, settings, sizes, resized, repeats if crop else 1, classes=classes, binary=binary)


def _sizes_of(items: Sequence[Item], settings: StreamSettings, root: Path) -> list[ImageSize]:
    """Height and width of every file, upright; pixels are not read."""

    def size(item: Item) -> ImageSize | RevtrainError:
        try:
            return regions.size_of(item.path, settings.level)
        except RevtrainError as error:
            return error

    with imagefiles.pillow_quiet() as said, ThreadPoolExecutor(settings.workers) as pool:
        found = list(pool.map(size, items))
    imagefiles.refuse([each for each in found if isinstance(each, RevtrainError)], root)
    imagefiles.say_remarks(said)
    return [each for each in found if not isinstance(each, RevtrainError)]
