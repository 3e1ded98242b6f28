"""How well a network does on a whole split, during training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revtrain.data import Split
from revtrain.machine import device as devices
from revtrain.machine.processes import ALONE, Processes

MOST_AT_ONCE = 8  # more are no faster


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    batch: int,
    prepare: Callable[[Tensor], Tensor],
    precision: str,
    device: torch.device,
    processes: Processes = ALONE,
    after_batch: Callable[[], None] = lambda: None,
    at_once: int = 1,
) -> tuple[float, float]:
    """Mean loss and accuracy (0..1) over a whole split, unaugmented, in eval mode.

    Args:
        batch: images that all processes take together at a time.
        prepare: uint8 images (B, 3, H, W) of the split -> normalised ones on `device`.
        processes: take turns at the batches; all return the whole split's figures.
        after_batch: is called after each batch and may raise, to stop.
        at_once: so many batches go through the network together. Losses are taken of each: the figures are the same.
    """
    model.eval()
    share = processes.share(batch)
    losses: list[Tensor] = []  # on the device: nothing waits before the end
    hits = torch.zeros((), dtype=torch.int64, device=device)
    batches = list(zip(split.images.split(at_once * share), split.labels.split(at_once * share), strict=True))
    for images, labels in batches[processes.rank :: processes.size]:
        labels = labels.to(device)
        with devices.autocast(device, precision):
            logits = model(prepare(images)).float()
        losses += [
            F.cross_entropy(own, wanted, reduction="sum")
            for own, wanted in zip(logits.split(share), labels.split(share), strict=True)
        ]
        hits += (logits.argmax(1) == labels).sum()
        after_batch()
    loss = sum(torch.stack(losses).tolist()) if losses else 0.0
    total = processes.add_up({"loss": loss, "correct": int(hits)})
    return total["loss"] / len(split), total["correct"] / len(split)


class MirrorAveraged(nn.Module):
    """The mean of a network's logits for an image (B, C, H, W) and for its mirror image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return (self.model(images) + self.model(images.flip(3))) / 2


def batches_at_once(predict: Callable[[int], int], share: int, images: int, peak_bytes: int) -> int:
    """How many batches of `share` images evaluation can take together within the memory that a training step takes.

    Args:
        predict: images -> most bytes that are alive while a network evaluates them; grows in a straight line.
        images: of the split; more are never taken.
        peak_bytes: of a training step.
    """
    one, two = predict(share), predict(2 * share)
    fits = 1 + (peak_bytes - one) // max(1, two - one)
    return max(1, min(fits, -(-images // share), MOST_AT_ONCE))
