"""How the images of a batch come to the device: N images of a split, B of a batch, H x W pixels.

Labels are those of images, (B,) int64, or of pixels, (B, H, W) uint8.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

import torch
from torch import Tensor

from revtrain.data import AnySplit, Split, StreamedSplit
from revtrain.data.streamed import Sample, give_up, stacked
from revtrain.errors import ImageError, RevtrainError


class Feed(Protocol):
    """Images of a split for one step after the other.

    `device_bytes` is what the whole split holds of the device's memory, 0 where it stays outside.
    """

    device_bytes: int

    def load(self, picked: Tensor, epoch: int) -> None:
        """Before a step: see to it that `take` finds the images `picked` (B,), given on the CPU.

        Args:
            epoch: under way, which decides what part of an image that is streamed is taken.
        """

    def take(self, part: slice, picked: Tensor) -> tuple[Tensor, Tensor]:
        """Within a step: uint8 images (b, 3, H, W) and labels of one part of the batch, on the device.

        Args:
            part: of the batch. picked: (b,), the same images, given on the device.
        """

    def begin(self, picked: Tensor, epoch: int) -> None:
        """Before a step runs: begin to read what the next one will `load`, in the background."""

    def close(self) -> None:
        """After the last step, or in its place: end what is under way."""

    def prefetch(self, picked: Tensor) -> None:
        """While a step runs on a GPU: begin to copy what the next one will `load`."""


def make_feed(split: AnySplit, batch: int, device: torch.device, room_bytes: int) -> Feed:
    """All images on the device where they fit, otherwise a batch at a time, from main memory or from disk.

    Args:
        batch: B, of this process.
        room_bytes: what the device has left beside the training step; on the CPU it plays no part.
    """
    if isinstance(split, StreamedSplit):
        return FromDisk(split, device)
    if device.type == "cpu" or split.nbytes <= room_bytes:
        return OnDevice(split, device)
    return FromHost(split, batch, device)


class OnDevice:
    """The whole split as uint8 on the device: a batch is an index."""

    def __init__(self, split: Split, device: torch.device):
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.device_bytes = 0 if device.type == "cpu" else self.images.nbytes + self.labels.nbytes

    def load(self, picked: Tensor, epoch: int) -> None:
        pass

    def take(self, part: slice, picked: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[picked], self.labels[picked]

    def begin(self, picked: Tensor, epoch: int) -> None:
        pass

    def close(self) -> None:
        pass

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
        self.labels = torch.empty(batch, *split.labels.shape[1:], dtype=split.labels.dtype, device=device)
        self._next = torch.empty_like(self.images), torch.empty_like(self.labels)
        self._next_picked: Tensor | None = None
        self._pinned = device.type == "cuda"
        if self._pinned:
            self._stream = torch.cuda.Stream(device)
            self._copied, self._read = torch.cuda.Event(), torch.cuda.Event()
            self._read.record(torch.cuda.current_stream(device))  # what had this memory before may still be under way

    def load(self, picked: Tensor, epoch: int) -> None:
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

    def begin(self, picked: Tensor, epoch: int) -> None:
        pass

    def close(self) -> None:
        pass

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


class FromDisk:
    """A batch is read from files by threads, while the step before it runs.

    Images of one size lie in the same memory of the device at every step, as a graph needs them. Images of different
    sizes can only be taken one by one.
    """

    device_bytes = 0

    def __init__(self, split: StreamedSplit, device: torch.device):
        self.split, self.device = split, device
        self._batch: tuple[Tensor, Tensor] | list[Sample] = []
        self._next: tuple[Tensor, int, list[Future[Sample]]] | None = None

    def load(self, picked: Tensor, epoch: int) -> None:
        ahead = self._next
        if ahead is None or ahead[1] != epoch or not torch.equal(ahead[0], picked):
            ahead = self._began(picked, epoch)
        self._next = ahead  # until all is there: who stops before that closes it
        try:
            samples = [each.result() for each in ahead[2]]
        except RevtrainError as error:
            raise ImageError(str(error)) from error
        self._next = None
        if not self.split.is_uniform:
            self._batch = samples
            return
        batch = stacked(samples)
        if isinstance(self._batch, tuple):
            for into, values in zip(self._batch, batch, strict=True):
                into.copy_(values)
        else:
            self._batch = batch[0].to(self.device), batch[1].to(self.device)

    def take(self, part: slice, picked: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self._batch, tuple):
            return self._batch[0][part], self._batch[1][part]
        images, labels = stacked(self._batch[part])
        return images.to(self.device), labels.to(self.device)

    def begin(self, picked: Tensor, epoch: int) -> None:
        self._next = self._began(picked, epoch)

    def close(self) -> None:
        if self._next is not None:
            give_up(self._next[2])

    def _began(self, picked: Tensor, epoch: int) -> tuple[Tensor, int, list[Future[Sample]]]:
        return picked.clone(), epoch, self.split.begin(picked, epoch)

    def prefetch(self, picked: Tensor) -> None:
        pass
