"""How well a network does on a whole split, during training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revtrain.data import Split
from revtrain.machine import device as devices
from revtrain.machine.processes import ALONE, Processes


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
) -> tuple[float, float]:
    """Mean loss and accuracy (0..1) over a whole split, unaugmented, in eval mode.

    Args:
        batch: images that all processes take together at a time.
        prepare: uint8 images (B, 3, H, W) on the CPU -> normalised ones on `device`.
        processes: take turns at the batches; all return the whole split's figures.
        after_batch: is called after each batch and may raise, to stop.
    """
    model.eval()
    loss, correct = torch.zeros((), dtype=torch.float64), 0
    share = processes.share(batch)
    batches = list(zip(split.images.split(share), split.labels.split(share), strict=True))
    for images, labels in batches[processes.rank :: processes.size]:
        labels = labels.to(device)
        with devices.autocast(device, precision):
            logits = model(prepare(images)).float()
        loss += F.cross_entropy(logits, labels, reduction="sum").cpu()
        correct += int((logits.argmax(1) == labels).sum())
        after_batch()
    total = processes.add_up({"loss": loss.item(), "correct": correct})
    return total["loss"] / len(split), total["correct"] / len(split)
