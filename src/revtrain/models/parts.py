"""What the architectures share: the stem, the spread of depth over stages, and the reversible net itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from revtrain.chain import InvertibleChain
from revtrain.errors import RevtrainError
from revtrain.invertible import InvertibleLayer
from revtrain.layers import BatchPooling, ChannelPooling, Readout, check_pooling
from revtrain.stream import PLAIN, Stream


def spread_depth(depth: int, stages: int) -> list[int]:
    """`depth` units over `stages` stages, as evenly as can be, earlier stages first: (7, 3) -> [3, 2, 2]."""
    if depth < 1:
        raise RevtrainError(f"depth={depth} leaves nothing to train.\nExpected 1 or more repeated units.")
    return [depth // stages + (stage < depth % stages) for stage in range(stages)]


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


class ReversibleNet(nn.Module):
    """Stem and one invertible trunk that ends in the readout: all from the stem's output on is rebuilt."""

    def __init__(self, stem: nn.Module, trunk: InvertibleChain):
        super().__init__()
        self.stem, self.trunk = stem, trunk

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(self.stem(images))


def build_reversible(
    cfg,
    classes: int,
    image_size: int,
    unit: Callable[[int, int], Sequence[InvertibleLayer]],
    stream: Stream = PLAIN,
    normalise_last: bool = True,
) -> ReversibleNet:
    """A fully invertible trunk: `cfg.depth` units over stages that `cfg.pooling` separates.

    Args:
        unit: (channels, stage) -> the layers of one repeated unit; stages count from 0.
        stream: the number format of the trunk.
        normalise_last: whether a BN and a LeakyReLU of slope `cfg.slope` come before the mean over pixels.

    Raises `RevtrainError` for an odd width, a pooling entry that is not invertible, or an image size that
    the pooling cannot divide.
    """
    if cfg.width < 2 or cfg.width % 2:
        raise RevtrainError(
            f"width={cfg.width} cannot be split into two equal halves.\n"
            f"Expected an even number of channels, e.g. width={max(2, cfg.width + cfg.width % 2)}."
        )
    check_pooling(cfg.pooling, image_size)
    channels, sub_images = cfg.width, 1
    layers: list[InvertibleLayer] = []
    for stage, units in enumerate(spread_depth(cfg.depth, len(cfg.pooling) + 1)):
        if stage > 0:
            kind = cfg.pooling[stage - 1]
            if kind == "channel":
                layers.append(ChannelPooling())
                channels *= 4
            elif kind == "batch":
                layers.append(BatchPooling())
                sub_images *= 4
            else:
                raise RevtrainError(
                    f"pooling={list(cfg.pooling)}: {kind!r} cannot be inverted in arch={cfg.arch}.\n"
                    "Expected a list of: channel, batch."
                )
        for _ in range(units):
            layers.extend(unit(channels, stage))
    readout = Readout(channels, classes, sub_images, cfg.slope if normalise_last else None)
    trunk = InvertibleChain(layers, backward=cfg.backward, stream=stream, readout=readout)
    return ReversibleNet(conv3x3(3, cfg.width), trunk)


def stream_of(cfg) -> Stream:
    """The number format of the couplings' streams: `cfg.stream`, or by precision 32 or 16 bit."""
    name = cfg.stream
    if name == "auto":
        name = "float32" if cfg.precision == "fp32" else "int16"
    return Stream(name, cfg.grid_bits)
