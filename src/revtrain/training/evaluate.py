"""How well a network does on a whole split, during training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from revtrain.data import AnySplit
from revtrain.machine import device as devices
from revtrain.machine.processes import ALONE, Processes
from revtrain.objective import judged, loss_sum_and_hits, no_hits

MOST_AT_ONCE = 8  # more are no faster


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: AnySplit,
    batch: int,
    prepare: Callable[[Tensor], Tensor],
    precision: str,
    device: torch.device,
    hits: Tensor | None = None,
    processes: Processes = ALONE,
    after_batch: Callable[[], None] = lambda: None,
    at_once: int = 1,
) -> tuple[float, Tensor]:
    """Mean loss and hits (see `revtrain.objective`) over a whole split, unaugmented, in eval mode.

    Args:
        batch: images that all processes take together at a time.
        prepare: uint8 images (B, 3, H, W) of the split -> normalised ones on `device`.
        hits: zeros to add to, on `device`; None: of images.
        processes: take turns at the batches; all return the whole split's figures.
        after_batch: is called after each batch and may raise, to stop.
        at_once: so many batches go through the network together. Losses are taken of each: the figures are the same.
    """
    model.eval()
    share = processes.share(batch)
    losses: list[Tensor] = []  # on the device: nothing waits before the end
    hits = no_hits("classify", 0, device) if hits is None else hits
    for images, labels in split.batches(at_once * share, processes.rank, processes.size):
        with devices.autocast(device, precision):
            found, right = loss_sum_and_hits(model, prepare(images), labels.to(device), share)
        losses += found
        hits += right
        after_batch()
    loss = sum(torch.stack(losses).tolist()) if losses else 0.0
    hits = processes.sum(hits)
    return processes.add_up({"loss": loss})["loss"] / judged(hits, len(split)), hits


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
