"""Work in pieces: a pass in place goes through a tensor part by part: no temporary grows with batch or image.

    pieces     for functions that need all channels of a pixel and its neighbours: slices of the batch; where one sample
               is too large, tiles of it, each read with a halo as wide as the function reaches
    points     for passes that look at each value alone: slices of the batch; where one sample is too large, some of its
               channels, or some rows of one channel. Each lies in memory as one run

Each piece allocates and frees the same. Whoever asks for nothing but the memory of a step may therefore leave out most
of them: under `few_rounds` the loops end early, and `join` makes what they put together at its full size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import islice, product
from math import prod
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIB = 2**20
Round = TypeVar("Round")
Index = tuple[slice, ...]  # into a tensor (B, C, ...)

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
    yield from rounds(_slices(len(x), piece_bytes // _sample_bytes(x)))


def _slices(length: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _sample_bytes(x: Tensor) -> int:
    return max(1, prod(x.shape[1:]) * x.element_size())


# ---- values on their own ---------------------------------------------------------------------------


def points(x: Tensor, piece_bytes: int) -> Iterator[Index]:
    """Pieces of `x` (B, C, ...) for a pass that looks at each value alone, each of at most `piece_bytes` but a row:
    samples; or samples and channels; or samples, channels and rows."""
    if not is_large(x, piece_bytes):
        for samples in batch_pieces(x, piece_bytes):
            yield (samples,)
        return
    channel_bytes = max(1, _sample_bytes(x) // x.shape[1])
    if channel_bytes <= piece_bytes or x.dim() == 3:
        parts: list[tuple[slice, ...]] = [(each,) for each in _slices(x.shape[1], piece_bytes // channel_bytes)]
    else:
        rows = list(_slices(x.shape[2], piece_bytes * x.shape[2] // channel_bytes))
        parts = list(product(_slices(x.shape[1], 1), rows))
    yield from rounds((slice(b, b + 1), *part) for b in range(len(x)) for part in parts)


def channels_of(index: Index) -> slice:
    """The channels that a piece has."""
    return index[1] if len(index) > 1 else slice(None)


def is_large(x: Tensor, piece_bytes: int) -> bool:
    """Whether one sample of `x` is more than a piece."""
    return bool(len(x)) and x.dim() > 2 and _sample_bytes(x) > piece_bytes


# ---- pixels and their neighbours -------------------------------------------------------------------

MOST_HALO = 0.15  # of a tile's own pixels: by so much a convolution may have more work in tiles
CUT_ROWS = 0.05  # of a convolution's work: what it costs that a tile has not the whole width of the image


class Piece(NamedTuple):
    """What a function works on at a time, of a tensor (B, C, ...)."""

    own: Index  # where its results belong
    read: Index  # what they depend on: `own` and a halo, which ends at the border of the image
    inner: tuple[slice, ...] | None = None  # where `own` lies in what is read; None: it is all of it
    margins: tuple[int, ...] = ()  # the width of the halo: before and behind, from the last dimension to the first

    @property
    def samples(self) -> slice:
        return self.own[0]

    def crop(self, result: Tensor) -> Tensor:
        """Of the function's result on what was read, the values that are right."""
        return result if self.inner is None else result[self.inner]

    def pad(self, gradient: Tensor) -> Tensor:
        """The gradient of `crop`: nothing comes from the halo."""
        return F.pad(gradient, self.margins) if self.margins else gradient

    def clear_halo_(self, gradient: Tensor) -> None:
        """`pad` in place, where there is room for the halo."""
        for dim, own in enumerate(self.inner or ()):
            if own != slice(None):
                size = gradient.shape[dim]
                gradient.narrow(dim, 0, own.start).zero_()
                gradient.narrow(dim, own.stop, size - own.stop).zero_()


WHOLE = Piece((slice(None),), (slice(None),))


def pieces(x: Tensor, piece_bytes: int, reach: Sequence[int] | None = ()) -> Iterator[Piece]:
    """Pieces of `x` (B, C, ...) of about `piece_bytes`: one sample at least or, where that is more, tiles of it.

    Args:
        reach: of the function, in pixels, for each dimension (the last one for all that follow); (): it looks at no
            neighbours; None: it is not known, and samples stay whole.

    Tiles are as large as keeps their halos under `MOST_HALO`, even where that is more than `piece_bytes`. The largest
    come first.
    """
    if reach is None or not is_large(x, piece_bytes):
        for samples in batch_pieces(x, piece_bytes):
            yield Piece((samples,), (samples,))
        return
    sides = tuple(x.shape[2:])
    wide = tuple(reach[min(dim, len(reach) - 1)] if reach else 0 for dim in range(len(sides)))
    tiles = _tiles(sides, wide, piece_bytes // (x.shape[1] * x.element_size()))
    yield from rounds(tile.of_sample(b) for b in range(len(x)) for tile in tiles)


def pixel_pieces(x: Tensor, piece_bytes: int, dim: int = 1) -> Iterator[Piece]:
    """`pieces` of `x` for a pass that needs all channels of a pixel, which are in dimension `dim`."""
    return pieces(x, piece_bytes, () if dim == 1 else None)


class _Tile(NamedTuple):
    """Of an image: what a `Piece` is of a tensor."""

    own: tuple[slice, ...]
    read: tuple[slice, ...]
    before: tuple[int, ...]  # the width of the halo, for each dimension
    behind: tuple[int, ...]

    def of_sample(self, b: int) -> Piece:
        own, read = ((slice(b, b + 1), slice(None), *each) for each in (self.own, self.read))
        if self.own == self.read:
            return Piece(own, own)
        inner = (slice(width, width + o.stop - o.start) for o, width in zip(self.own, self.before, strict=True))
        pairs = zip(reversed(self.before), reversed(self.behind), strict=True)
        return Piece(own, read, (slice(None), slice(None), *inner), tuple(width for pair in pairs for width in pair))


@lru_cache(maxsize=64)
def _tiles(sides: tuple[int, ...], reach: tuple[int, ...], pixels: int) -> list[_Tile]:
    """Tiles of an image, each of about so many pixels, the largest first."""
    cuts = [_even_slices(side, count) for side, count in zip(sides, _cut(sides, reach, pixels), strict=True)]
    found = []
    for own in product(*cuts):
        before = tuple(min(each.start, wide) for each, wide in zip(own, reach, strict=True))
        behind = tuple(min(side - each.stop, wide) for each, wide, side in zip(own, reach, sides, strict=True))
        read = tuple(slice(o.start - b, o.stop + e) for o, b, e in zip(own, before, behind, strict=True))
        found.append(_Tile(own, read, before, behind))
    return sorted(found, key=lambda tile: -prod(each.stop - each.start for each in tile.read))


def _cut(sides: tuple[int, ...], reach: tuple[int, ...], pixels: int) -> tuple[int, ...]:
    """Into how many slices to cut each side: for tiles of at most so many pixels, or as few as `MOST_HALO` allows; of
    all ways to do so that of the least work."""

    def growth(counts: Sequence[int]) -> float:  # with k slices a side is read as if it were 2 (k - 1) reach longer
        return prod(1 + 2 * wide * (k - 1) / side for k, wide, side in zip(counts, reach, sides, strict=False))

    def useful(side: int) -> list[int]:  # the least count for each length of the longest slice
        return sorted({_ceil_divide(side, length) for length in range(1, side + 1)})

    def cost(counts: tuple[int, ...]) -> tuple[float, ...]:  # at equal work few tiles, cut through the outermost sides
        excess = max(0, prod(map(_ceil_divide, sides, counts)) - pixels)
        return excess, growth(counts) + CUT_ROWS * (counts[-1] > 1), prod(counts), *(-each for each in counts)

    found = [(1,) * len(sides)]
    for outer in product(*map(useful, sides[:-1])):
        room = (1 + MOST_HALO) / growth(outer) - 1
        if room >= 0:
            fitting = max(1, pixels // prod(map(_ceil_divide, sides, outer)))
            most = 1 + int(room * sides[-1] / (2 * reach[-1])) if reach[-1] else sides[-1]
            found.append((*outer, min(_ceil_divide(sides[-1], fitting), most)))
    return min(found, key=cost)


def _ceil_divide(whole: int, part: int) -> int:
    return -(-whole // part)


def _even_slices(length: int, count: int) -> list[slice]:
    """`count` slices of nearly one length."""
    return [slice(i * length // count, (i + 1) * length // count) for i in range(count)]


# ---- what a loop over pieces has made ----------------------------------------------------------------


def join(parts: Sequence[Tensor], length: int, dim: int = 0) -> Tensor:
    """What the rounds of a loop have made, as one tensor of `length` along `dim`.

    Under `few_rounds` it has that size, too, and no values.
    """
    if _most_rounds.get() is None:
        if len(parts) == 1:
            return parts[0]
        return torch.cat(list(parts), dim)
    shape = list(parts[0].shape)
    shape[dim] = length
    return parts[0].new_empty(shape)


def set_chunk_mib(model: nn.Module, chunk_mib: float) -> None:
    """Let every layer of `model` that works in pieces use temporaries of at most `chunk_mib` MiB."""
    for module in model.modules():
        if hasattr(module, "piece_bytes"):
            module.piece_bytes = max(1, int(chunk_mib * MIB))  # type: ignore[assignment]  # any module's attribute
