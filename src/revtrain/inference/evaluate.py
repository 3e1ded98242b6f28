"""How good a trained network is: accuracy in all, by class, and what it takes for what; of images or of pixels."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from revtrain import objective
from revtrain.config import IGNORED
from revtrain.data import AnySplit
from revtrain.errors import RevtrainError
from revtrain.inference.restore import Trained, own_data
from revtrain.report.tables import clean

SHOWN_CLASSES = 20  # a matrix of more does not fit a terminal


@dataclass(frozen=True)
class Evaluation:
    """K classes; `confusion[t, p]` counts images of class t that were taken for class p, (K, K) int64.

    With `is_dense` it counts pixels, those that have a class.
    """

    source: str  # where the images come from
    classes: tuple[str, ...]
    confusion: Tensor
    loss: float  # mean cross-entropy
    images: int
    is_dense: bool = False

    @property
    def counted(self) -> int:
        """Images, or pixels."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of images, or of pixels, whose class was found, 0..1."""
        return objective.accuracy(self.confusion if self.is_dense else self.confusion.trace(), self.images)

    @property
    def class_accuracy(self) -> list[float | None]:
        """The same for each class; of one without images it is not a number, of one without pixels None."""
        shares = (self.confusion.diagonal() / self.confusion.sum(1)).tolist()
        return [None if self.is_dense and share != share else share for share in shares]

    @property
    def class_iou(self) -> list[float | None]:
        """Of pixels: intersection over union of each class, 0..1; None where neither truth nor network has any."""
        return objective.iou_of_classes(self.confusion)

    @property
    def mean_iou(self) -> float | None:
        """Of pixels: the mean of all classes but the first one, the background."""
        return objective.mean_iou(self.confusion)

    @property
    def summary(self) -> str:
        """The figures of all classes together, the loss apart."""
        if not self.is_dense:
            return f"{100 * self.accuracy:.2f} % of {self.images:,} images"
        iou, background = _percent(self.mean_iou).strip(), clean(self.classes[0], 24)
        pixels = f"{100 * self.accuracy:.2f} % of {self.counted:,} pixels in {self.images:,} images"
        return f"{pixels}, mean IoU {iou} without {background}"

    def table(self) -> str:
        """For the terminal: a line a class; then the matrix, if it is not too wide."""
        names = [clean(name, 24) for name in self.classes]
        width = max(len("class"), *map(len, names))
        cell = max(6, len(f"{int(self.confusion.max()):,}"))
        counts = self.confusion.sum(1).tolist()
        figure = max(6, len(f"{max(counts):,}"))
        unit, iou = ("pixels", f"  {'IoU':>8}") if self.is_dense else ("images", "")
        lines = [f"{'class':<{width}}  {unit:>{figure}}  accuracy{iou}  most often taken for"]
        for index, (name, accuracy, count) in enumerate(zip(names, self.class_accuracy, counts, strict=True)):
            wrong = self.confusion[index].clone()
            wrong[index] = 0
            worst = int(wrong.argmax())
            taken = f"{names[worst]} ({int(wrong[worst]):,})" if wrong[worst] else "-"
            iou = f"  {_percent(self.class_iou[index])}" if self.is_dense else ""
            lines.append(f"{name:<{width}}  {count:>{figure},}  {_percent(accuracy)}{iou}  {taken}")
        if len(names) <= SHOWN_CLASSES:
            lines += ["", "confusion matrix: a row for each true class, a column for each predicted one"]
            lines.append(" " * width + "".join(f"  {name[:cell]:>{cell}}" for name in names))
            for name, row in zip(names, self.confusion.tolist(), strict=True):
                lines.append(f"{name:<{width}}" + "".join(f"  {count:>{cell},}" for count in row))
        lines += ["", f"accuracy {self.summary}, loss {self.loss:.4f}"]
        return "\n".join(lines)

    def comma_separated(self) -> str:
        """A line for each true class: name, images, accuracy (0..1), and a column for each predicted class.

        Of pixels: name, pixels, accuracy, IoU (both 0..1, empty where there is none), and the same columns.
        """
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        heads = ["true class", "pixels", "accuracy", "iou"] if self.is_dense else ["true class", "images", "accuracy"]
        rows.writerow([*heads, *(f"taken for {name}" for name in self.classes)])
        figures = [self.class_accuracy, self.class_iou] if self.is_dense else [self.class_accuracy]
        for name, counts, *shares in zip(self.classes, self.confusion.tolist(), *figures, strict=True):
            written = ["" if share is None else f"{share:.6f}" for share in shares]
            rows.writerow([name, sum(counts), *written, *counts])
        return text.getvalue()

    def write_picture(self, path: Path) -> None:
        """The confusion matrix as PNG, SVG or PDF, by the suffix of `path`; of pixels in percent of each row.

        Raises `RevtrainError` without matplotlib.
        """
        from revtrain.figures import confusion_figure

        cells = self.confusion
        if self.is_dense:  # numbers of pixels have too many figures for a cell
            cells = (100 * cells / cells.sum(1, keepdim=True).clamp(min=1)).round().long()
        confusion_figure(cells.tolist(), self.classes, self.summary).savefig(path)


def evaluate(trained: Trained, data: str | None = None, batch: int | None = None) -> Evaluation:
    """The confusion matrix over a whole test set, unaugmented.

    Args:
        data: a folder that holds test/CLASS/* or CLASS/*, with task=segment images/ and masks/ in test/ or itself;
            None: the test set of the run's own data set.
        batch: images at a time; None: as in the run. Of different sizes they come one at a time.

    Raises:
        RevtrainError: the images cannot be read, or their classes are not those that the network was trained on.
    """
    split, classes, source = _images(trained, data)
    if not (classes == list(trained.classes) if trained.is_dense else set(classes) == set(trained.classes)):
        missing = [name for name in trained.classes if name not in classes]
        extra = [name for name in classes if name not in trained.classes]
        raise RevtrainError(
            f"The classes of {source} are not those that {trained.path} was trained on.\n"
            f"Only in the run: {_few(missing)}. Only in the data: {_few(extra)}.\n"
            + (
                "Name them in classes.txt as they were, or give images and masks with --data FOLDER."
                if trained.is_dense
                else "Give a folder with the same class folders, also where one has few images."
            )
        )
    place = torch.tensor([trained.classes.index(name) for name in classes])  # folders come in alphabetical order
    count = len(classes)
    confusion = torch.zeros(count, count, dtype=torch.int64)
    loss = 0.0
    for images, labels in split.batches(batch or int(trained.config.training.batch)):
        if trained.is_dense:
            own_loss, found = trained.loss_and_confusion(images, labels)
        else:
            labels, logits = place[labels], trained.logits(images)
            own_loss = F.cross_entropy(logits, labels, reduction="sum").item()
            found = torch.bincount(labels * count + logits.argmax(1), minlength=count * count).view(count, count)
        loss += own_loss
        confusion += found
    judged = int(confusion.sum())
    if not judged:
        raise RevtrainError(
            f"No pixel of {source} has a class: all masks hold {IGNORED}, which counts for nothing.\n"
            "If they tell something from its background, the network must be trained with data.binary=true."
        )
    return Evaluation(source, trained.classes, confusion, loss / judged, split.files, trained.is_dense)


def _images(trained: Trained, data: str | None) -> tuple[AnySplit, list[str], str]:
    """The split, the names of its classes, and its name."""
    if data is not None:
        return *_other_images(trained, data), data
    own = own_data(trained)
    if own.train.is_uniform and own.image_size != trained.image_size:
        raise RevtrainError(
            f"The images of this run's data set now have {own.image_size} pixels; {trained.path} was trained "
            f"on {trained.image_size}.\nGive those it was trained on with --data FOLDER."
        )
    config = trained.config.data
    source = f"data={config.name}" + (f" ({config.root})" if config.root else "")
    return own.test, list(own.classes), source


def _other_images(trained: Trained, folder: str) -> tuple[AnySplit, list[str]]:
    """Those of a folder, read as the test images of the run were, and the names of their classes."""
    if trained.is_dense:
        from revtrain.data import maskfolder

        own = trained.streaming or maskfolder.Settings()
        classes = len(trained.classes)
        split = maskfolder.load_pairs(folder, own, trained.resized, trained.divisor, classes, trained.binary)
        return split, list(trained.classes)  # masks know numbers alone
    from revtrain.data.imagefolder import load_labelled

    return load_labelled(folder, trained.resized, trained.streaming, trained.divisor)


def _percent(share: float | None) -> str:
    """0..1, eight letters wide."""
    return f"{'-':>8}" if share is None else f"{100 * share:6.2f} %"


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(clean(name, 30) for name in names[:5] or ["none"]) + more
