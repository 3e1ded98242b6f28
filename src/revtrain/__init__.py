"""Reversible CNN training: activations are recomputed from the layer above instead of stored.

What this page lists is stable; everything else may change between versions.

In a model of your own:

    InvertibleChain     invertible layers in a row, trained without storing their activations
    AdditiveCoupling    the reversible block y1 = x1 + F(x2), y2 = x2 + G(y1); F and G are modules of yours
    PreNorm             F or G = a batch norm, then a function of each sample alone, over pieces of the batch
    InvertibleBatchNorm2d, InvertibleLeakyReLU, CouplingConv2d, ChannelPooling, BatchPooling
                        layers that are inverted each on its own
    InvertibleLayer     what a layer of your own inherits from
    verify              whether `invert` computes what ordinary autograd does in a model of yours, and what both cost
    StateFormat         the number format of a chain's states: floating point, or fixed point that is undone exactly

As the command line does it:

    compose             the configuration that `revtrain key=value ...` would run, from the same words
    build_model         the network that a configuration describes
    plan                what its training step needs of memory, and the largest batch that fits a limit
    train               train it and write everything into a folder

    >>> import revtrain
    >>> cfg = revtrain.compose(["arch=hybrid", "data=synthetic", "epochs=1"])
    >>> result = revtrain.train(cfg, "outputs/mine")

`RevtrainError` is what every one of these raises where the caller can mend something.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from revtrain.errors import RevtrainError

if TYPE_CHECKING:
    from revtrain.conf import compose
    from revtrain.core.chain import InvertibleChain
    from revtrain.core.layer import InvertibleLayer
    from revtrain.core.state_format import StateFormat
    from revtrain.layers import (
        AdditiveCoupling,
        BatchPooling,
        ChannelPooling,
        CouplingConv2d,
        InvertibleBatchNorm2d,
        InvertibleLeakyReLU,
        PreNorm,
    )
    from revtrain.models import build_model
    from revtrain.numerics.verify import verify
    from revtrain.planning.plan import plan
    from revtrain.training.run import train

__version__ = "0.2.0"

# Imported when first asked for: torch takes seconds, Hydra a moment.
_PLACES = {
    "compose": "conf",
    "InvertibleChain": "core.chain",
    "InvertibleLayer": "core.layer",
    "StateFormat": "core.state_format",
    "AdditiveCoupling": "layers",
    "BatchPooling": "layers",
    "ChannelPooling": "layers",
    "CouplingConv2d": "layers",
    "InvertibleBatchNorm2d": "layers",
    "InvertibleLeakyReLU": "layers",
    "PreNorm": "layers",
    "build_model": "models",
    "plan": "planning.plan",
    "train": "training.run",
    "verify": "numerics.verify",
}

__all__ = [
    "AdditiveCoupling",
    "BatchPooling",
    "ChannelPooling",
    "CouplingConv2d",
    "InvertibleBatchNorm2d",
    "InvertibleChain",
    "InvertibleLayer",
    "InvertibleLeakyReLU",
    "PreNorm",
    "RevtrainError",
    "StateFormat",
    "__version__",
    "build_model",
    "compose",
    "plan",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
