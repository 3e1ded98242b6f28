"""What a trained network sees in image files: the class of each image, or that of each of its pixels."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from revtrain.config import ImageSize, StreamSettings
from revtrain.data import imagefiles, regions
from revtrain.data.streamed import Item, Sample, StreamedSplit, windows
from revtrain.errors import RevtrainError
from revtrain.inference.restore import Trained
from revtrain.machine.files import write_result_file

BATCH = 64  # files decoded and looked at together


@dataclass(frozen=True)
class Prediction:
    """Of one file: the most probable classes with their probabilities (0..1), with task=segment the most frequent ones
    with their shares of the pixels; or why it could not be read."""

    path: Path
    classes: tuple[tuple[str, float], ...]
    error: str | None = None
    mask: np.ndarray | None = None  # (H, W) uint8, the class of each pixel, where it was asked for


def predict(
    trained: Trained, files: Sequence[Path], top: int = 1, batch: int | None = None, masks: bool = False
) -> Iterator[Prediction]:
    """The `top` most probable or most frequent classes of each file, in the order given.

    An image is read as the test images of the run were. One that was resized there is resized by its shorter side, and
    of one whose class is asked for the centre is cut out. Pixels are looked at in windows where the run had
    `data.crop`, otherwise all together, the image mirrored at its borders until the network can halve its sides.

    Args:
        batch: images or windows of one size at a time; None: as in the run, and 64 of images that it had in memory.
        masks: keep the class of every pixel, for a network with task=segment.
    """
    batch = batch or (BATCH if trained.streaming is None else int(trained.config.training.batch))
    return _of_pixels(trained, files, top, batch, masks) if trained.is_dense else _of_images(trained, files, top, batch)


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write classes (H, W) uint8 as a PNG of as many pixels, in grey, a class a pixel; folders are made.

    Raises:
        OSError: it cannot be written.
    """
    content = io.BytesIO()
    Image.fromarray(mask).save(content, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_result_file(path, content.getvalue())


# ---- the class of an image ---------------------------------------------------------------------------------


def _of_images(trained: Trained, files: Sequence[Path], top: int, batch: int) -> Iterator[Prediction]:
    settings = trained.streaming or StreamSettings()
    items = [Item(str(path)) for path in files]
    split = StreamedSplit(items, settings, resized=trained.resized, divisor=trained.divisor)
    for picked in torch.arange(len(files)).split(batch if split.is_uniform else 1):
        with imagefiles.pillow_quiet() as said:
            samples = [_result(each) for each in split.begin(picked)]
        imagefiles.say_remarks(said)
        images = [sample[0] for sample in samples if not isinstance(sample, RevtrainError)]
        probabilities = iter(trained.logits(torch.stack(images)).softmax(1) if images else ())
        for index, sample in zip(picked.tolist(), samples, strict=True):
            if isinstance(sample, RevtrainError):
                yield _unread(files[index], sample)
            else:
                yield Prediction(files[index], _first(trained, next(probabilities), top))


def _result(begun: Future[Sample]) -> Sample | RevtrainError:
    try:
        return begun.result()
    except RevtrainError as error:
        return error


def _unread(path: Path, error: RevtrainError) -> Prediction:
    return Prediction(path, (), str(error).splitlines()[0])


def _first(trained: Trained, shares: Tensor, top: int) -> tuple[tuple[str, float], ...]:
    values, indices = shares.topk(min(top, len(trained.classes)))
    return tuple(zip((trained.classes[i] for i in indices.tolist()), values.tolist(), strict=True))


# ---- the classes of its pixels -----------------------------------------------------------------------------


def _of_pixels(trained: Trained, files: Sequence[Path], top: int, batch: int, masks: bool) -> Iterator[Prediction]:
    for path in files:
        try:
            with imagefiles.pillow_quiet() as said:
                counts, mask = _looked_at(trained, str(path), batch, masks)
        except RevtrainError as error:
            yield _unread(path, error)
            continue
        imagefiles.say_remarks(said)
        found = _first(trained, torch.from_numpy(counts / counts.sum()), top)
        yield Prediction(path, tuple((name, share) for name, share in found if share), mask=mask)


def _looked_at(trained: Trained, path: str, batch: int, wanted: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """How many pixels of the image are of each class, (K,); and the classes of its pixels, (H, W), if wanted."""
    settings, resized = trained.streaming or StreamSettings(), trained.resized
    original = regions.size_of(path, settings.level)
    whole = original if resized is None else _scaled(original, resized)
    size = settings.crop_size or whole.covering(trained.divisor)
    places = windows(whole, size)
    split = StreamedSplit(
        [Item(path, window=window) for window in places],
        replace(settings, crop=list(size)),  # a whole image is one window, which may reach beyond it
        resized=None if resized is None else whole,
    )
    inside = ImageSize(*map(min, zip(whole, size, strict=True)))
    above, before = ((side - own) // 2 for side, own in zip(size, inside, strict=True))  # mirrored
    counts = np.zeros(len(trained.classes), np.int64)
    mask = np.empty(whole, np.uint8) if wanted else None
    following = iter(places)
    for images, _ in split.batches(batch):
        for classes, window in zip(trained.classes_of_pixels(images).numpy(), following, strict=False):
            own = classes[above : above + inside.height, before : before + inside.width]
            own = own[window.seen_rows :, window.seen_columns :]
            counts += np.bincount(own.ravel(), minlength=len(counts))
            if mask is not None:
                top, left = window.top + window.seen_rows, window.left + window.seen_columns
                mask[top : top + own.shape[0], left : left + own.shape[1]] = own
    if mask is not None and whole != original:
        fitted = Image.fromarray(mask).resize((original.width, original.height), Image.Resampling.NEAREST)
        mask = np.asarray(fitted)
    return counts, mask


def _scaled(size: ImageSize, covered: ImageSize) -> ImageSize:
    """`size` made larger or smaller, as a whole, until it just covers another."""
    scale = max(covered.height / size.height, covered.width / size.width)
    return ImageSize(*(max(1, round(side * scale)) for side in size))
