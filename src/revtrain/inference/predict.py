"""What a trained network sees in image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from revtrain.errors import RevtrainError
from revtrain.inference.restore import Trained

BATCH = 64  # files decoded and looked at together


@dataclass(frozen=True)
class Prediction:
    """Of one file: the most probable classes with their probabilities (0..1), or why it could not be read."""

    path: Path
    classes: tuple[tuple[str, float], ...]
    error: str | None = None


def predict(trained: Trained, files: Sequence[Path], top: int = 1) -> Iterator[Prediction]:
    """The `top` most probable classes of each file, in the order given.

    An image is resized by its shorter side to what the network was trained on, and its centre is cut out.
    """
    from revtrain.data.imagefolder import read_image

    for start in range(0, len(files), BATCH):
        images, errors = [], {}
        for path in files[start : start + BATCH]:
            try:
                images.append(read_image(path, trained.image_size))
            except RevtrainError as error:
                errors[path] = str(error).splitlines()[0]
        probabilities = iter(trained.logits(torch.stack(images)).softmax(1) if images else ())
        for path in files[start : start + BATCH]:
            if path in errors:
                yield Prediction(path, (), errors[path])
                continue
            values, indices = next(probabilities).topk(min(top, len(trained.classes)))
            found = zip((trained.classes[i] for i in indices.tolist()), values.tolist(), strict=True)
            yield Prediction(path, tuple(found))
