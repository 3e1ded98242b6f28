"""The one list of layers, and the architectures; the tests are parametrised over them.

A new layer adds its row here and is then held to everything the others are; a new architecture is found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from revtrain.core.chain import InvertibleChain
from revtrain.core.layer import InvertibleLayer
from revtrain.layers import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    BatchPooling,
    ChannelPermutation,
    ChannelPooling,
    CouplingConv2d,
    HaarPooling,
    HalfSwap,
    HiddenChunkCoupling,
    InvertibleBatchNorm2d,
    InvertibleConv1x1,
    InvertibleLeakyReLU,
    MomentumCoupling,
    PreNorm,
)
from revtrain.models import build_model, for_task, traits
from revtrain.models.common import ReversibleNet


@dataclass(frozen=True)
class LayerCase:
    name: str
    make: Callable[[], InvertibleLayer]
    shape: tuple[int, int, int, int] = (6, 4, 4, 4)  # of x: B, C, H, W


def plain(channels: int, dropout: float = 0.0) -> nn.Sequential:
    """An ordinary residual function with a batch norm of torch's own inside."""
    return nn.Sequential(
        nn.Conv2d(channels, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.SiLU(),
        nn.Dropout(dropout),
        nn.Conv2d(3, channels, 1),
    )


def inner_chain(channels: int) -> InvertibleChain:
    return InvertibleChain(
        [InvertibleBatchNorm2d(channels), InvertibleLeakyReLU(0.3), CouplingConv2d(channels, kernel_size=1)]
    )


def prenorm(channels: int, dropout: float = 0.0) -> PreNorm:
    """A batch norm, then a function of each sample alone."""
    return PreNorm(
        channels,
        nn.Sequential(
            nn.Conv2d(channels, 5, 3, padding=1), nn.GELU(), nn.Dropout(dropout), nn.Conv2d(5, channels, 3, padding=1)
        ),
    )


def scale_and_shift(channels: int, result: int, dropout: float = 0.0) -> nn.Sequential:
    """An ordinary function for an affine coupling, from `channels` to `result` channels."""
    return nn.Sequential(plain(channels, dropout), nn.Conv2d(channels, result, 1))


def everything() -> InvertibleChain:
    """All layers once, nested chains included: (B, 4, 4, 4) -> (4 B, 16, 1, 1)."""
    return InvertibleChain(
        [
            CouplingConv2d(4),
            InvertibleBatchNorm2d(4),
            InvertibleLeakyReLU(0.2),
            ChannelPooling(),
            AdditiveCoupling(16, inner_chain(8), plain(8, dropout=0.5)),
            BatchPooling(),
            AdditiveCoupling(16, plain(8), inner_chain(8)),
        ]
    )


LAYERS = [
    LayerCase("batchnorm", lambda: InvertibleBatchNorm2d(4)),
    LayerCase("batchnorm-epsilon-0", lambda: InvertibleBatchNorm2d(4, epsilon_i=0.0)),
    LayerCase("batchnorm-mixed", lambda: InvertibleBatchNorm2d(4, sign="mixed")),
    LayerCase("batchnorm-negative", lambda: InvertibleBatchNorm2d(4, sign="negative")),
    LayerCase("leakyrelu-0.2", lambda: InvertibleLeakyReLU(0.2)),
    LayerCase("leakyrelu-1", lambda: InvertibleLeakyReLU(1.0)),
    LayerCase("coupling-conv3x3", lambda: CouplingConv2d(4)),
    LayerCase("coupling-bounded", lambda: CouplingConv2d(4, max_gain=0.5)),
    LayerCase("coupling-conv1x1", lambda: CouplingConv2d(4, kernel_size=1)),
    LayerCase("coupling-plain", lambda: AdditiveCoupling(4, plain(2), plain(2))),
    LayerCase("coupling-dropout", lambda: AdditiveCoupling(4, plain(2, 0.5), plain(2, 0.5))),
    LayerCase("coupling-chains", lambda: AdditiveCoupling(4, inner_chain(2), inner_chain(2))),
    LayerCase("chunked-relu", lambda: HiddenChunkCoupling(4, hidden=5, hidden_chunk=2, scale=0.5)),
    LayerCase("chunked-gelu", lambda: HiddenChunkCoupling(4, hidden=4, hidden_chunk=1, activation="gelu")),
    LayerCase("chunked-silu", lambda: HiddenChunkCoupling(4, hidden=3, hidden_chunk=8, activation="silu")),
    LayerCase("prenorm", lambda: AdditiveCoupling(4, prenorm(2), prenorm(2), scale=0.5)),
    LayerCase("prenorm-dropout", lambda: AdditiveCoupling(4, prenorm(2, 0.5), prenorm(2, 0.5))),
    LayerCase("channel-pooling", ChannelPooling),
    LayerCase("batch-pooling", BatchPooling),
    LayerCase("channel-pooling-wide", ChannelPooling, (3, 2, 6, 4)),
    LayerCase("batch-pooling-wide", BatchPooling, (3, 2, 6, 4)),
    LayerCase("affine", lambda: AffineCoupling(4, scale_and_shift(2, 4))),
    LayerCase("affine-uneven", lambda: AffineCoupling((1, 3), scale_and_shift(3, 2), max_log_scale=0.5)),
    LayerCase("affine-dropout", lambda: AffineCoupling(4, scale_and_shift(2, 4, 0.5))),
    LayerCase("momentum", lambda: MomentumCoupling(4, plain(2))),
    LayerCase("momentum-dropout", lambda: MomentumCoupling(4, plain(2, 0.5), momentum=0.5)),
    LayerCase("half-swap", HalfSwap),
    LayerCase("half-swap-uneven", lambda: HalfSwap(channels=(1, 3))),
    LayerCase("permutation", lambda: ChannelPermutation(4)),
    LayerCase("conv1x1", lambda: InvertibleConv1x1(4)),
    LayerCase("actnorm", lambda: ActNorm(4)),
    LayerCase("haar-pooling", HaarPooling),
    LayerCase("haar-pooling-wide", HaarPooling, (3, 2, 6, 4)),
    LayerCase("chain-of-everything", everything),
]


@dataclass(frozen=True)
class ArchCase:
    arch: str
    small: tuple[str, ...]  # overrides for a network that trains in a moment
    reversible: bool
    invertible_trunk: bool  # from the stem's output to the head's input


def arch_case(arch: str) -> ArchCase:
    """Narrow, and one unit a stage where depth is free: those that rebuild nothing have standard depths."""
    reversible, stages = traits(arch).reversible, len(compose(f"arch={arch}").pooling) + 1
    small = ("width=4", f"depth={stages}") if reversible else ("width=4",)
    model = build_model(compose(f"arch={arch}", *small))
    return ArchCase(arch, small, reversible, isinstance(model, ReversibleNet))


def ids(cases) -> list[str]:
    return [getattr(case, "name", None) or case.arch for case in cases]


def compose(*overrides: str):
    """The configuration that `revtrain OVERRIDES` would run, on data that needs no download."""
    from revtrain.conf import compose

    dense = any(f"arch={arch}" in overrides for arch in for_task("segment"))
    return compose(["task=segment" if dense else "data=synthetic", *overrides])


ARCHS = [arch_case(arch) for arch in for_task("classify")]
REVERSIBLE = [case for case in ARCHS if case.reversible]
INVERTIBLE_TRUNKS = [case for case in ARCHS if case.invertible_trunk]
