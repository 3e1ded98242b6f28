"""How good a trained network is: accuracy in all, by class, and what it takes for what."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from revtrain.data import Split
from revtrain.errors import RevtrainError
from revtrain.inference.restore import Trained, own_data
from revtrain.report.tables import clean

SHOWN_CLASSES = 20  # a matrix of more does not fit a terminal


@dataclass(frozen=True)
class Evaluation:
    """K classes; `confusion[t, p]` counts images of class t that were taken for class p, (K, K) int64."""

    source: str  # where the images come from
    classes: tuple[str, ...]
    confusion: Tensor
    loss: float  # mean cross-entropy

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of images whose class was found, 0..1."""
        return int(self.confusion.trace()) / self.images

    @property
    def class_accuracy(self) -> list[float]:
        """The same for each class."""
        return (self.confusion.diagonal() / self.confusion.sum(1)).tolist()

    def table(self) -> str:
        """For the terminal: a line a class; then the matrix, if it is not too wide."""
        names = [clean(name, 24) for name in self.classes]
        width = max(len("class"), *map(len, names))
        lines = [f"{'class':<{width}}  images  accuracy  most often taken for"]
        for index, (name, accuracy) in enumerate(zip(names, self.class_accuracy, strict=True)):
            wrong = self.confusion[index].clone()
            wrong[index] = 0
            worst = int(wrong.argmax())
            taken = f"{names[worst]} ({int(wrong[worst]):,})" if wrong[worst] else "-"
            lines.append(f"{name:<{width}}  {int(self.confusion[index].sum()):>6,}  {100 * accuracy:6.2f} %  {taken}")
        if len(names) <= SHOWN_CLASSES:
            cell = max(6, len(f"{int(self.confusion.max()):,}"))
            lines += ["", "confusion matrix: a row for each true class, a column for each predicted one"]
            lines.append(" " * width + "".join(f"  {name[:cell]:>{cell}}" for name in names))
            for name, row in zip(names, self.confusion.tolist(), strict=True):
                lines.append(f"{name:<{width}}" + "".join(f"  {count:>{cell},}" for count in row))
        lines += ["", f"accuracy {100 * self.accuracy:.2f} % of {self.images:,} images, loss {self.loss:.4f}"]
        return "\n".join(lines)

    def comma_separated(self) -> str:
        """A line for each true class: name, images, accuracy (0..1), and a column for each predicted class."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["true class", "images", "accuracy", *(f"taken for {name}" for name in self.classes)])
        for name, accuracy, counts in zip(self.classes, self.class_accuracy, self.confusion.tolist(), strict=True):
            rows.writerow([name, sum(counts), f"{accuracy:.6f}", *counts])
        return text.getvalue()

    def write_picture(self, path: Path) -> None:
        """The confusion matrix as PNG, SVG or PDF, by the suffix of `path`.

        Raises `RevtrainError` without matplotlib.
        """
        from revtrain.figures import confusion_figure

        title = f"{100 * self.accuracy:.2f} % of {self.images:,} images"
        confusion_figure(self.confusion.tolist(), self.classes, title).savefig(path)


def evaluate(trained: Trained, data: str | None = None, batch: int | None = None) -> Evaluation:
    """The confusion matrix over a whole test set, unaugmented.

    Args:
        data: a folder that holds test/CLASS/* or CLASS/*; None: the test set of the run's own data set.
        batch: images at a time; None: as in the run.

    Raises:
        RevtrainError: the images cannot be read, or their classes are not those that the network was trained on.
    """
    split, classes, source = _images(trained, data)
    if set(classes) != set(trained.classes):
        missing = [name for name in trained.classes if name not in classes]
        extra = [name for name in classes if name not in trained.classes]
        raise RevtrainError(
            f"The classes of {source} are not those that {trained.path} was trained on.\n"
            f"Only in the run: {_few(missing)}. Only in the data: {_few(extra)}.\n"
            "Give a folder with the same class folders, also where one has few images."
        )
    place = torch.tensor([trained.classes.index(name) for name in classes])  # folders come in alphabetical order
    count = len(classes)
    confusion = torch.zeros(count * count, dtype=torch.int64)
    loss = 0.0
    batch = batch or int(trained.config.training.batch)
    for images, labels in zip(split.images.split(batch), split.labels.split(batch), strict=True):
        labels, logits = place[labels], trained.logits(images)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        confusion += torch.bincount(labels * count + logits.argmax(1), minlength=count * count)
    return Evaluation(source, trained.classes, confusion.view(count, count), loss / len(split.labels))


def _images(trained: Trained, data: str | None) -> tuple[Split, list[str], str]:
    """The split, the names of its classes, and its name."""
    if data is not None:
        from revtrain.data.imagefolder import load_labelled

        split, classes = load_labelled(data, trained.image_size)
        return split, classes, data
    own = own_data(trained)
    if own.image_size != trained.image_size:
        raise RevtrainError(
            f"The images of this run's data set now have {own.image_size} pixels; {trained.path} was trained "
            f"on {trained.image_size}.\nGive those it was trained on with --data FOLDER."
        )
    config = trained.config.data
    source = f"data={config.name}" + (f" ({config.root})" if config.root else "")
    return own.test, list(own.classes), source


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(clean(name, 30) for name in names[:5] or ["none"]) + more
