"""The pieces in which an in-place pass works through a batch, so that no temporary grows with it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

MIB = 2**20


def batch_pieces(x: Tensor, piece_bytes: int) -> Iterator[slice]:
    """Slices over the batch of `x` (B, ...), each of at most `piece_bytes` bytes but one sample at least."""
    sample_bytes = max(1, x[0].numel() * x.element_size())
    step = max(1, piece_bytes // sample_bytes)
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))


def set_chunk_mib(model: nn.Module, chunk_mib: float) -> None:
    """Let every layer of `model` that works in chunks use temporaries of at most `chunk_mib` MiB."""
    for module in model.modules():
        if hasattr(module, "piece_bytes"):
            module.piece_bytes = max(1, int(chunk_mib * MIB))
