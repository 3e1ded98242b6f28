"""What is attached to modules: hooks, which a call of a module fires and the lean forms of a layer would pass by."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from revtrain.core.layer import InvertibleLayer, is_for_backward
from revtrain.errors import RevtrainError


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of `module` does more than its `forward`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def forward_(
    layer: InvertibleLayer, x: Tensor, context: tuple[Tensor, ...], decode: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Any]:
    """layer.forward_(x, *context), and the forward hooks of `layer`, which see copies in floating point.

    Args:
        decode: a state -> its values: a copy.

    Raises:
        RevtrainError: a hook changes what the layer computes, or waits for gradients, which the layer takes itself;
            or `forward` is another than the one that `forward_` stands for.
    """
    kind: type = type(layer)
    if is_replaced(kind) or "forward" in vars(layer):
        _refuse_another_forward(layer)
    if not has_hooks(layer):
        return layer.forward_(x, *context)
    backward = layer._backward_hooks or layer._backward_pre_hooks
    everywhere = torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks
    if is_for_backward() and (backward or everywhere):
        raise RevtrainError(
            f"{type(layer).__name__} has a backward hook, but its gradient is not taken by autograd: in a chain it "
            "would never fire.\nAttach it to the chain, or to F or G inside of a coupling; or use "
            'backward="store".'
        )
    inputs = (decode(x), *context)
    versions = [each._version for each in inputs]
    for name, hook in _hooks(torch_module._global_forward_pre_hooks, layer._forward_pre_hooks):
        with_keywords = name in layer._forward_pre_hooks_with_kwargs
        changed = hook(layer, inputs, {}) if with_keywords else hook(layer, inputs)
        _refuse_a_change(layer, changed is not None or versions != [each._version for each in inputs])
    y, saved = layer.forward_(x, *context)
    output = decode(y)
    version = output._version
    for name, hook in _hooks(torch_module._global_forward_hooks, layer._forward_hooks):
        with_keywords = name in layer._forward_hooks_with_kwargs
        changed = hook(layer, inputs, {}, output) if with_keywords else hook(layer, inputs, output)
        _refuse_a_change(layer, changed is not None or output._version != version)
    return y, saved


def _hooks(*kinds: dict[int, Callable[..., Any]]) -> list[tuple[int, Callable[..., Any]]]:
    return [entry for kind in kinds for entry in kind.items()]


def _refuse_a_change(layer: nn.Module, changed: bool) -> None:
    if changed:
        raise RevtrainError(
            f"A forward hook of {type(layer).__name__} returns another value, or writes into what it is given.\n"
            "The inverse of the layer knows nothing of it: in a chain, hooks may only look on. Attach it to F or G "
            'inside of a coupling, to the chain itself, or use backward="store".'
        )


@cache
def is_replaced(kind: type) -> bool:
    """Whether a class has another `forward` than the class above it whose `forward_` it inherits."""
    forward, lean = (next(c for c in kind.__mro__ if name in vars(c)) for name in ("forward", "forward_"))
    return lean is not InvertibleLayer and forward is not lean and issubclass(forward, lean)


def _refuse_another_forward(layer: InvertibleLayer) -> None:
    lean = next(c for c in type(layer).__mro__ if "forward_" in vars(c))
    if lean is not InvertibleLayer:
        raise RevtrainError(
            f"{type(layer).__name__} has a `forward` of its own, but computes with the `forward_`, `inverse_` and "
            f"`backward_` of {lean.__name__}.\n"
            "Override these as well; or derive it from InvertibleLayer, where forward and inverse are enough."
        )
