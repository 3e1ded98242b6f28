"""Memory as a count of live storages: the same figure on any machine and device.

`LiveStorages` sees every tensor that torch makes. A storage counts from the operation that returns it until
its last reference is gone. Scratch inside a kernel (a convolution's workspace) is not seen.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages made inside its `with` block: `live_bytes` now, `peak_bytes` at most.

    Enter it before the tensors of interest exist; it may be entered again and goes on counting.

    Args:
        record: append `live_bytes` to the list `timeline` after each allocation and each release.
    """

    def __init__(self, record: bool = False):
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.timeline: list[int] = []
        self._record = record
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def reset_peak(self) -> None:
        """Start a new phase: the peak so far is forgotten."""
        self.peak_bytes = self.live_bytes

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self._change(size)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._change(-size)

    def _change(self, size: int) -> None:
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if self._record:
            self.timeline.append(self.live_bytes)
