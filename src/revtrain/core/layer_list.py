"""The layers of a chain: a list that takes nothing which the chain could not walk back through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from revtrain.core.layer import InvertibleLayer
from revtrain.core.state_format import PLAIN, StateFormat
from revtrain.errors import RevtrainError

BACK = ("inverse", "inverse_", "backward_")  # a layer with one of these can be walked back through


class LayerList(nn.ModuleList):
    """An `nn.ModuleList` of `InvertibleLayer`s that fit the number format of a chain's states.

    Whatever is put in, in whatever way, is checked first; what is refused leaves the list as it was.

    Raises `RevtrainError` for something that is not an `InvertibleLayer`, that has no inverse, or whose number format
    is another one.
    """

    def __init__(self, layers: Iterable[nn.Module] | None = None, state_format: StateFormat = PLAIN):
        super().__init__()
        self.state_format = state_format
        self.extend(layers if layers is not None else [])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return LayerList(list(self._modules.values())[index], self.state_format)
        return super().__getitem__(index)

    def extend(self, modules: Iterable[nn.Module]) -> LayerList:
        modules = list(modules)
        for index, module in enumerate(modules, len(self)):
            check_layer(module, self.state_format, index)
        super().extend(modules)
        return self

    def insert(self, index: int, module: nn.Module) -> None:
        check_layer(module, self.state_format, index)
        super().insert(index, module)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        check_layer(module, self.state_format, name)
        super().add_module(name, module)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.isdecimal():
            check_layer(value, self.state_format, name)
        super().__setattr__(name, value)


def check_layer(layer: Any, state_format: StateFormat, index: int | str) -> None:
    """Raise `RevtrainError` unless `layer` can stand at `index` in a chain of this number format."""
    kind = type(layer).__name__
    if not isinstance(layer, InvertibleLayer):
        raise RevtrainError(
            f"Layer {index} of the chain is a {kind}, which has no inverse.\n"
            "Expected InvertibleLayer objects; put other modules inside F and G of an AdditiveCoupling, into a "
            "StoredStep, or outside of the chain."
        )
    if all(getattr(type(layer), name) is getattr(InvertibleLayer, name) for name in BACK):
        raise RevtrainError(
            f"Layer {index} of the chain is a {kind}, an InvertibleLayer without an inverse.\n"
            f"Expected a method {kind}.inverse(y, saved) that returns x."
        )
    if state_format.is_integer and not layer.passes_integers:
        of_layer = "floating point" if layer.state_format is None else layer.state_format.name
        raise RevtrainError(
            f"stream={state_format.name} cannot pass layer {index} of the chain, a {kind} of {of_layer} states.\n"
            f"Expected couplings of state_format={state_format.name} and poolings; use stream=float32 for other layers."
        )
    if layer.state_format is not None and layer.state_format != state_format:
        raise RevtrainError(
            f"Layer {index} of the chain is a {kind} of {layer.state_format}; the states of the chain are "
            f"{state_format}.\n"
            "Expected the same number format: give both the same state_format (stream)."
        )
