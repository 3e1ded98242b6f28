"""Weights that torch's `fully_shard` (FSDP2) has dealt out to several processes: whole while a layer works.

`fully_shard` gathers the weights of a module in a hook before its `forward`, and hands their gradients on in another.
The lean forms of a layer have no such call. A chain therefore gathers the weights of one layer at a time itself, sums
their gradients over the processes and keeps each process's share of them: what `fully_shard` on the chain as a whole
needs no help for, this does for `fully_shard` on its layers, on F and G, or on parts of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from revtrain.core.gradients import Gradients
from revtrain.errors import RevtrainError


@contextmanager
def whole_weights(layer: nn.Module, grads: Gradients | None = None) -> Iterator[None]:
    """Inside, the weights of `layer` are whole. Gradients that are added for them go to `grads` for those dealt out.

    Raises:
        RevtrainError: `fully_shard` with a precision of its own (mp_policy) inside of the layer.
    """
    places: list[tuple[dict[str, Any], str, Any]] = [
        (module._parameters, name, tensor)
        for module in layer.modules()
        for name, tensor in module._parameters.items()  # (the type first: it is asked for in every step)
        if type(tensor) is not nn.Parameter and hasattr(tensor, "full_tensor")
    ]
    if not places:
        yield
        return
    whole: dict[int, tuple[Tensor, Tensor]] = {}
    for _, _, dealt in places:
        if id(dealt) not in whole:
            gathered = dealt.full_tensor().detach().requires_grad_(dealt.requires_grad)
            whole[id(dealt)] = dealt, gathered
    hooks = _set_aside_hooks(layer)
    for held, name, dealt in places:
        held[name] = whole[id(dealt)][1]  # no nn.Parameter, for the time being
    try:
        with grads.standing_for(_shares(whole)) if grads is not None else _nothing():
            yield
    finally:
        for held, name, dealt in places:
            held[name] = dealt
        for held_hooks, before in hooks:
            held_hooks.clear()
            held_hooks.update(before)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _shares(whole: dict[int, tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Any]]:
    return [(gathered, dealt, _share_of(dealt)) for dealt, gathered in whole.values()]


def _share_of(dealt: Any) -> Any:
    """The gradient of whole weights in this process -> the mean over all processes, dealt out as the weights are."""
    from torch.distributed.tensor import DTensor, Partial

    mesh = dealt.device_mesh

    def share(gradient: Tensor) -> Tensor:
        mean = (gradient / mesh.size()).to(dealt.dtype)
        return DTensor.from_local(mean, mesh, [Partial()] * mesh.ndim).redistribute(placements=dealt.placements)

    return share


def _set_aside_hooks(layer: nn.Module) -> list[tuple[dict[int, Any], dict[int, Any]]]:
    """Take the hooks of `fully_shard` off all modules inside; (where, what was there) for each."""
    before = []
    for module in layer.modules():
        state_of = getattr(module, "_get_fsdp_state", None)
        if state_of is None:
            continue
        precision = getattr(state_of(), "_mp_policy", None)
        own = next((each.dtype for each in module.parameters()), torch.float32)
        computed = getattr(precision, "param_dtype", None)
        if computed not in (None, own):
            raise RevtrainError(
                f"{type(layer).__name__}: fully_shard was given a mixed precision, {computed}, for a part "
                "of a chain.\nA chain keeps its states in float32 at least: use fully_shard with an mp_policy on the "
                "chain as a whole only, or torch.autocast around it."
            )
        for held in (module._forward_pre_hooks, module._forward_hooks):
            before.append((held, dict(held)))
            for name in [name for name, hook in held.items() if _is_of_fully_shard(hook)]:
                del held[name]
    return before


def _is_of_fully_shard(hook: Any) -> bool:
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp")
