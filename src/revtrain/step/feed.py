"""How the images of a batch come to the device: N images of a split, B of a batch, H = W pixels a side."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from revtrain.data import Split


class Feed(Protocol):
    """Images of a split for one step after the other.

    `device_bytes` is what the whole split holds of the device's memory, 0 where it stays outside.
    """

    device_bytes: int

    def load(self, picked: Tensor) -> None:
        """Before a step: see to it that `take` finds the images `picked` (B,), given on the CPU."""

    def take(self, part: slice, picked: Tensor) -> tuple[Tensor, Tensor]:
        """Within a step: uint8 images (b, 3, H, W) and labels (b,) of one part of the batch, on the device.

        Args:
            part: of the batch. picked: (b,), the same images, given on the device.
        """

    def prefetch(self, picked: Tensor) -> None:
        """While a step runs: begin with what the next one will `load`."""


def make_feed(split: Split, batch: int, device: torch.device, room_bytes: int) -> Feed:
    """All images on the device where they fit, otherwise a batch at a time.

    Args:
        batch: B, of this process.
        room_bytes: what the device has left beside the training step; on the CPU it plays no part.
    """
    if device.type == "cpu" or split.images.nbytes + split.labels.nbytes <= room_bytes:
        return OnDevice(split, device)
    return FromHost(split, batch, device)


class OnDevice:
    """The whole split as uint8 on the device: a batch is an index."""

    def __init__(self, split: Split, device: torch.device):
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.device_bytes = 0 if device.type == "cpu" else self.images.nbytes + self.labels.nbytes

    def load(self, picked: Tensor) -> None:
        pass

    def take(self, part: slice, picked: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[picked], self.labels[picked]

    def prefetch(self, picked: Tensor) -> None:
        pass


class FromHost:
    """The split stays where it is; a batch is gathered and copied while the step before it runs.

    Two buffers: the one that a step reads stays as it is until the step's end, the other is filled meanwhile, on CUDA
    from pinned memory and on a stream of its own.
    """

    device_bytes = 0

    def __init__(self, split: Split, batch: int, device: torch.device):
        self.split, self.device = split, device
        self.images = torch.empty(batch, *split.images.shape[1:], dtype=torch.uint8, device=device)
        self.labels = torch.empty(batch, dtype=torch.int64, device=device)
        self._next = torch.empty_like(self.images), torch.empty_like(self.labels)
        self._next_picked: Tensor | None = None
        self._pinned = device.type == "cuda"
        if self._pinned:
            self._stream = torch.cuda.Stream(device)
            self._copied, self._read = torch.cuda.Event(), torch.cuda.Event()
            self._read.record(torch.cuda.current_stream(device))  # what had this memory before may still be under way

    def load(self, picked: Tensor) -> None:
        if self._next_picked is None or not torch.equal(self._next_picked, picked):
            self.prefetch(picked)
        if self._pinned:
            torch.cuda.current_stream(self.device).wait_event(self._copied)
        self.images.copy_(self._next[0])
        self.labels.copy_(self._next[1])
        if self._pinned:
            self._read.record(torch.cuda.current_stream(self.device))
        self._next_picked = None

    def take(self, part: slice, picked: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[part], self.labels[part]

    def prefetch(self, picked: Tensor) -> None:
        gathered = self._gathered(self.split.images, picked), self._gathered(self.split.labels, picked)
        if not self._pinned:
            self._copy(gathered)
        else:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._read)
                self._copy(gathered)
                self._copied.record(self._stream)
        self._next_picked = picked.clone()

    def _gathered(self, values: Tensor, picked: Tensor) -> Tensor:
        # pinned memory is taken again only when the copy from it has ended: the allocator sees to that
        into = torch.empty(len(picked), *values.shape[1:], dtype=values.dtype, pin_memory=self._pinned)
        return torch.index_select(values, 0, picked, out=into)

    def _copy(self, gathered: tuple[Tensor, Tensor]) -> None:
        for into, values in zip(self._next, gathered, strict=True):
            into.copy_(values, non_blocking=True)
