"""What the tests of the engine's promise share: one step in both modes, and all that it leaves behind compared.

The promise (docs/engine.md): for every F, G, layer and caller that plain autograd accepts, `invert` gives what `store`
gives, to rounding, or raises an error that names the module, what was found and what to do.

    assert_promise(make, x)             the two modes agree: output, gradients, buffers, random numbers afterwards
    assert_equal_or_refused(make, x)    they agree, or `invert` refuses; never silently something else
    with refused("Shift", "eval()"):    a RevtrainError with these words, two to five lines

`make` builds the model, the same one each time that the seeds are. `HOLDERS` are the places in a chain where a module
of the user's can stand.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from revtrain.core.chain import InvertibleChain
from revtrain.core.layer import InvertibleLayer
from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import MIB, set_chunk_mib
from revtrain.layers import AdditiveCoupling, InvertibleLeakyReLU, PreNorm

CHANNELS = 8  # of every state here; F and G of a coupling see half of them
SINGLE_IMAGES = 1  # bytes a piece: every piece is one image
Make = Callable[[], nn.Module]
MakeFunction = Callable[[int], nn.Module]  # channels -> a module that keeps the shape (B, channels, H, W)


def seed(number: int) -> None:
    """Every global generator of random numbers."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def values(*shape: int) -> Tensor:
    """Normally distributed, in float64, always the same."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def images(batch: int = 4, channels: int = CHANNELS, side: int = 4) -> Tensor:
    """(batch, channels, side, side)."""
    return values(batch, channels, side, side)


# ---- where a module of the user's can stand ------------------------------------------------------


class OwnCoupling(InvertibleLayer):
    """A layer of a user's, forward and inverse only: y1 = x1 + F(x2), y2 = x2."""

    def __init__(self, f: nn.Module):
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        return torch.cat([x1 + self.f(x2.clone()), x2], dim=1)

    def inverse(self, y: Tensor, saved: Any = None) -> Tensor:
        y1, y2 = y.chunk(2, dim=1)
        return torch.cat([y1 - self.f(y2.clone()), y2], dim=1)


def _inside(make: MakeFunction, channels: int) -> InvertibleChain:
    return InvertibleChain([InvertibleLeakyReLU(0.5), AdditiveCoupling(channels, make(channels // 2), nn.Tanh())])


@dataclass(frozen=True)
class Holder:
    """A layer of `CHANNELS` channels around functions of the user's."""

    name: str
    build: Callable[[MakeFunction], InvertibleLayer]

    def chain(self, make: MakeFunction, **options: Any) -> InvertibleChain:
        """The layer between two others that write into the state they are given."""
        return InvertibleChain([InvertibleLeakyReLU(0.7), self.build(make), InvertibleLeakyReLU(0.6)], **options)


_HALF = CHANNELS // 2
ANY = Holder("any-module", lambda make: AdditiveCoupling(CHANNELS, make(_HALF), make(_HALF)))
SCALED = Holder("scaled", lambda make: AdditiveCoupling(CHANNELS, make(_HALF), make(_HALF), scale=0.3))
PER_SAMPLE = Holder("per-sample", lambda make: AdditiveCoupling(CHANNELS, make(_HALF), make(_HALF), per_sample=True))
PRENORM = Holder(
    "prenorm", lambda make: AdditiveCoupling(CHANNELS, PreNorm(_HALF, make(_HALF)), PreNorm(_HALF, make(_HALF)))
)
NESTED = Holder("nested", lambda make: InvertibleChain([InvertibleChain([ANY.build(make)])]))
# an invertible function, which is walked back layer by layer; in a chain inside the chain, and scaled
INSIDE = Holder(
    "inside",
    lambda make: InvertibleChain([AdditiveCoupling(CHANNELS, _inside(make, _HALF), _inside(make, _HALF), scale=0.3)]),
)
OWN = Holder("own-layer", lambda make: OwnCoupling(make(_HALF)))
HOLDERS = [ANY, PER_SAMPLE, PRENORM, INSIDE, OWN]
WHOLE_BATCH_HOLDERS = [ANY, INSIDE, OWN]  # where F may look at the whole batch

in_every_holder = pytest.mark.parametrize("holder", HOLDERS, ids=lambda holder: holder.name)
in_whole_batch_holders = pytest.mark.parametrize("holder", WHOLE_BATCH_HOLDERS, ids=lambda holder: holder.name)
in_pieces = pytest.mark.parametrize("piece_bytes", [SINGLE_IMAGES, None], ids=["single-images", "whole-batch"])


# ---- one step in both modes ----------------------------------------------------------------------


def set_backward(model: nn.Module, backward: str) -> nn.Module:
    """Let every chain inside `model` use this mode."""
    for module in model.modules():
        if isinstance(module, InvertibleChain):
            module.backward_mode = backward
    return model


def loss_of(y: Tensor) -> Tensor:
    """A number whose gradient differs from value to value."""
    return (y.square() + y.sin()).sum()


def backward_of_loss(model: nn.Module, *inputs: Tensor) -> Tensor:
    """The usual step; returns the output."""
    y = model(*inputs)
    loss_of(y).backward()
    return y


def run(
    make: Make,
    *inputs: Tensor,
    backward: str,
    step: Callable[..., Any] = backward_of_loss,
    piece_bytes: int | None = None,
) -> dict[str, Any]:
    """What a step with this backward mode leaves behind, by name.

    Args:
        make: builds the model, in any floating point; it is then put into float64.
        inputs: tensors, copied; those in floating point ask for a gradient.
        step: `step(model, *inputs)`; the tensors that it returns are compared, too.
        piece_bytes: most bytes of a piece; None: what the library chooses.
    """
    seed(0)
    model = set_backward(make().double(), backward)
    if piece_bytes is not None:
        set_chunk_mib(model, piece_bytes / MIB)
    inputs = tuple(x.detach().clone().requires_grad_(x.is_floating_point() or x.is_complex()) for x in inputs)
    seed(1)
    returned = step(model, *inputs)
    returned = returned if isinstance(returned, tuple | list) else (returned,)
    left = {f"returned {i}": value for i, value in enumerate(returned)}
    left |= {f"gradient of input {i}": x.grad for i, x in enumerate(inputs)}
    left |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    left |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    left["random numbers afterwards"] = torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])
    return {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in left.items()}


def assert_same(invert: dict[str, Any], store: dict[str, Any], tolerance: float = 1e-9) -> None:
    """Both have left the same things behind, each within `tolerance`, absolute and relative; NaN equals NaN."""
    assert invert.keys() == store.keys()
    for name, expected in store.items():
        actual = invert[name]
        if isinstance(expected, Tensor) and isinstance(actual, Tensor):
            torch.testing.assert_close(
                actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert type(actual) is type(expected) and actual == expected, f"{name}: {actual} instead of {expected}"


def assert_promise(make: Make, *inputs: Tensor, tolerance: float = 1e-9, **how: Any) -> None:
    """`invert` leaves behind what `store` does; see `run` for the arguments."""
    store = run(make, *inputs, backward="store", **how)
    assert_same(run(make, *inputs, backward="invert", **how), store, tolerance)


def assert_equal_or_refused(
    make: Make, *inputs: Tensor, words: tuple[str, ...] = (), also: tuple[type[Exception], ...] = (), **how: Any
) -> None:
    """`invert` leaves behind what `store` does, or raises a RevtrainError with these words (or one of `also`)."""
    store = run(make, *inputs, backward="store", **how)
    try:
        invert = run(make, *inputs, backward="invert", **how)
    except RevtrainError as error:
        assert_message(str(error), *words)
    except also:
        pass
    else:
        assert_same(invert, store)


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """The block raises a RevtrainError whose message has these words."""
    with pytest.raises(RevtrainError) as caught:
        yield
    assert_message(str(caught.value), *words)


def assert_message(message: str, *words: str) -> None:
    """Two to five lines, with all these words in it, in upper or lower case."""
    assert 2 <= len(message.splitlines()) <= 5, message
    for word in words:
        assert word.lower() in message.lower(), f"{word!r} is missing in: {message}"
