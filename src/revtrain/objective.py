"""What a network is trained for, the key `task`: its loss, and what it gets right.

B images of H x W pixels, K classes. Labels are the classes of images, (B,) int64, or those of pixels, (B, H, W) of any
type of whole numbers, `revtrain.config.IGNORED` where nothing is to be said. Hits are counted in a tensor that adds up
over batches: how many images were right, () int64, or the pixels of class i that were taken for class j, (K, K) int64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revtrain.config import IGNORED
from revtrain.layers import DenseHead, intersection_over_union


def is_dense(labels: Tensor) -> bool:
    """Whether labels are those of pixels."""
    return labels.dim() > 1


def no_hits(task: str, classes: int, device: torch.device | None = None) -> Tensor:
    """Where hits are added up: () or (K, K) int64, zeros."""
    return torch.zeros((classes, classes) if task == "segment" else (), dtype=torch.int64, device=device)


def no_labels(task: str, shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Labels for images (B, 3, H, W) of `shape`, all of class 0: of images, or of pixels in 8 bits."""
    if task == "segment":
        return torch.zeros(shape[0], *shape[2:], dtype=torch.uint8, device=device)
    return torch.zeros(shape[0], dtype=torch.int64, device=device)


def loss_and_hits(
    model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The mean loss of a batch, (), to call `backward` on, and its hits.

    That of an image with labels for its pixels is the mean over those that count.

    Args:
        images: (B, 3, H, W), normalised.
        label_smoothing: share of the label of an image that is spread over all classes.
    """
    if not is_dense(labels):
        logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum()
    losses, hits = _dense(model, images, labels)
    return losses.float().mean(), hits


def loss_sum_and_hits(model: nn.Module, images: Tensor, labels: Tensor, at_a_time: int) -> tuple[list[Tensor], Tensor]:
    """The losses of a batch, each of `at_a_time` images added up, and its hits. Where pixels have classes, those of
    all pixels that count are added up.

    The sums of several batches that go through the network together are those of each alone.
    """
    if is_dense(labels):
        losses, hits = _dense(model, images, labels)
        losses = losses.float() * (labels != IGNORED).flatten(1).sum(1)
        return [part.sum() for part in losses.split(at_a_time)], hits
    logits = model(images).float()
    parts = zip(logits.split(at_a_time), labels.split(at_a_time), strict=True)
    return [F.cross_entropy(*part, reduction="sum") for part in parts], (logits.argmax(1) == labels).sum()


def _dense(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each image, (B,), worked out without logits of full size; hits (K, K)."""
    head = next(module for module in model.modules() if isinstance(module, DenseHead))
    head.confusion.zero_()
    losses = model(images, labels)
    return losses, head.confusion.clone()


def judged(hits: Tensor, images: int) -> int:
    """How many losses `loss_sum_and_hits` adds up: `images`, or the pixels that count, 1 or more."""
    return images if hits.dim() == 0 else max(1, int(hits.sum()))


def accuracy(hits: Tensor, images: int) -> float:
    """The share of `images`, or of the pixels that count, that were right: 0..1."""
    if hits.dim() == 0:
        return hits.item() / images
    return hits.trace().item() / judged(hits, images)


def iou_of_classes(hits: Tensor) -> list[float | None]:
    """Intersection over union of each class, 0..1; None where neither the truth nor the network has a pixel of it."""
    found = intersection_over_union(hits).tolist()
    return [None if value != value else value for value in found]


def mean_iou(hits: Tensor) -> float | None:
    """The mean of all classes but the first one, the background; None for hits of images, or where none is there."""
    if hits.dim() == 0:
        return None
    known = [value for value in iou_of_classes(hits)[1:] if value is not None]
    return sum(known) / len(known) if known else None
