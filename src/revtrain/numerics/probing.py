"""A training step on the side: what a probe computes leaves no trace in the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from revtrain.core.chain import InvertibleChain
from revtrain.objective import loss_and_hits

FLOAT16_LOSS_SCALE = 2.0**12


@contextmanager
def on_the_side(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Training mode inside; parameters' gradients, buffers, mode and random numbers are as before afterwards."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            model.train()
            yield
    finally:
        model.train(was_training)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


def loss_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor | None]:
    """Gradients of the loss (`revtrain.objective`), one for each parameter that asks for one; `.grad` stays as it is.

    Under autocast to float16 they are computed from a scaled loss, as training does, or most of them would be 0.
    """
    kind = images.device.type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    scale = FLOAT16_LOSS_SCALE if half else 1.0
    loss = loss_and_hits(model, images, labels)[0] * scale
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return [None if gradient is None else gradient / scale for gradient in gradients]


def inverts(model: nn.Module) -> bool:
    """Whether anything in `model` is rebuilt in the backward pass."""
    return any(m.backward_mode == "invert" for m in model.modules() if isinstance(m, InvertibleChain))


@contextmanager
def storing(model: nn.Module) -> Iterator[None]:
    """Every chain of `model` with backward=store."""
    chains = [m for m in model.modules() if isinstance(m, InvertibleChain)]
    modes = [chain.backward_mode for chain in chains]
    for chain in chains:
        chain.backward_mode = "store"
    try:
        yield
    finally:
        for chain, mode in zip(chains, modes, strict=True):
            chain.backward_mode = mode
