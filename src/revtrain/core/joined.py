"""Neighbours in a chain that are run as one layer, where there is one for the two (`InvertibleLayer.joined_with`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from revtrain.core.hooks import has_hooks, is_replaced
from revtrain.core.layer import InvertibleLayer

Steps = list[tuple[InvertibleLayer, Any]]


def joined(layers: Sequence[InvertibleLayer], saved: Sequence[Any]) -> Steps:
    """The layers with what each has saved; two that are joined are one, and have saved a pair."""
    steps: Steps = []
    index = 0
    while index < len(layers):
        both = _join(layers[index], layers[index + 1]) if index + 1 < len(layers) else None
        if both is None:
            steps.append((layers[index], saved[index]))
            index += 1
        else:
            steps.append((both, (saved[index], saved[index + 1])))
            index += 2
    return steps


def separate(steps: Steps, layers: Sequence[InvertibleLayer]) -> list[Any]:
    """What each of the layers has saved, of the steps that `joined` made of them."""
    saved: list[Any] = []
    for step, each in steps:
        saved += [each] if len(saved) < len(layers) and step is layers[len(saved)] else list(each)
    return saved


def _join(first: InvertibleLayer, second: InvertibleLayer) -> InvertibleLayer | None:
    both = first.joined_with(second)
    return None if both is None or _does_more(first) or _does_more(second) else both


def _does_more(layer: InvertibleLayer) -> bool:
    """Whether a call of `layer` does more than its class says: hooks, another forward."""
    kind: type = type(layer)
    return has_hooks(layer) or "forward" in vars(layer) or is_replaced(kind)
