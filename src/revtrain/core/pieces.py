"""Work in pieces: a pass in place goes through the batch in slices, so that no temporary grows with the batch.

Each piece allocates and frees the same. Whoever asks for nothing but the memory of a step may therefore leave out most
of them: under `few_rounds` the loops end early, and `join` makes what they put together at its full size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn

MIB = 2**20
Round = TypeVar("Round")

_most_rounds: ContextVar[int | None] = ContextVar("most_rounds", default=None)  # None: all of them


@contextmanager
def few_rounds(most: int) -> Iterator[None]:
    """Inside, every loop over equal pieces of work ends after `most` of them: for tensors without values.

    Only the thread that enters the block is concerned.
    """
    token = _most_rounds.set(most)
    try:
        yield
    finally:
        _most_rounds.reset(token)


def rounds(pieces: Iterable[Round]) -> Iterator[Round]:
    """All `pieces` of a loop in which each makes the same work; under `few_rounds`, the first of them."""
    return islice(pieces, _most_rounds.get())


def batch_pieces(x: Tensor, piece_bytes: int) -> Iterator[slice]:
    """Slices over the batch of `x` (B, ...), each of at most `piece_bytes` bytes but one sample at least."""
    if not len(x):  # a batch of no samples is one piece: what is made of it has its shape and type
        yield slice(0, 0)
        return
    sample_bytes = max(1, x[0].numel() * x.element_size())
    step = max(1, piece_bytes // sample_bytes)
    for start in rounds(range(0, x.shape[0], step)):
        yield slice(start, min(start + step, x.shape[0]))


def join(parts: Sequence[Tensor], length: int, dim: int = 0) -> Tensor:
    """What the rounds of a loop have made, as one tensor of `length` along `dim`.

    Under `few_rounds` it has that size, too, and no values.
    """
    if _most_rounds.get() is None:
        return torch.cat(list(parts), dim)
    shape = list(parts[0].shape)
    shape[dim] = length
    return parts[0].new_empty(shape)


def set_chunk_mib(model: nn.Module, chunk_mib: float) -> None:
    """Let every layer of `model` that works in pieces use temporaries of at most `chunk_mib` MiB."""
    for module in model.modules():
        if hasattr(module, "piece_bytes"):
            module.piece_bytes = max(1, int(chunk_mib * MIB))  # type: ignore[assignment]  # any module's attribute
