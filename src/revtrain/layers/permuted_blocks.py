"""A permutation in place, by its cycles: blocks of values change places with scratch of a few blocks alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from revtrain.kernels.pieces import rounds


def permute_blocks_(blocks: Tensor, order: tuple[int, ...], piece_bytes: int) -> None:
    """blocks[k] = blocks[order[k]] for all k at once, in place.

    Args:
        blocks: (blocks, values of a block), contiguous.
        order: a permutation of the blocks' numbers.
        piece_bytes: bound of the scratch, one block for each of two temporaries at least.
    """
    most = max(1, piece_bytes // (2 * max(1, blocks[:1].numel()) * blocks.element_size()))
    for cycles in rounds(_groups(order, most)):
        places = torch.tensor(cycles, device=blocks.device)  # (length of a cycle, cycles)
        first = blocks[places[0]]
        for step in range(len(cycles) - 1):
            blocks[places[step]] = blocks[places[step + 1]]
        blocks[places[-1]] = first
        del first


def _groups(order: tuple[int, ...], most: int) -> Iterator[list[list[int]]]:
    """Cycles of one length, at most so many together, transposed; the largest groups first."""
    groups = [
        of_length[start : start + most] for of_length in _cycles(order) for start in range(0, len(of_length), most)
    ]
    for group in sorted(groups, key=len, reverse=True):
        yield [list(places) for places in zip(*group, strict=True)]


@lru_cache(maxsize=16)
def _cycles(order: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
    """The cycles of a permutation, those of one length in one list; what stays in its place is left out."""
    by_length: dict[int, list[tuple[int, ...]]] = {}
    seen = [False] * len(order)
    for start in range(len(order)):
        cycle, place = [], start
        while not seen[place]:
            seen[place] = True
            cycle.append(place)
            place = order[place]
        if len(cycle) > 1:
            by_length.setdefault(len(cycle), []).append(tuple(cycle))
    return list(by_length.values())


@lru_cache(maxsize=16)
def inverse_order(order: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes `order`."""
    inverse = [0] * len(order)
    for place, source in enumerate(order):
        inverse[source] = place
    return tuple(inverse)
