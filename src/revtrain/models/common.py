"""What several architectures share: the stem, ordinary residual functions, and the fully invertible network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from revtrain.config import CouplingSettings, Network
from revtrain.core.chain import InvertibleChain
from revtrain.core.layer import InvertibleLayer
from revtrain.core.names import former_names
from revtrain.core.state_format import PLAIN, StateFormat
from revtrain.errors import RevtrainError
from revtrain.layers import BatchPooling, ChannelPooling, Head, check_pooling
from revtrain.models import Images, units_of_stages


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


def preactivated(channels: int) -> nn.Sequential:
    """2 x [BN, ReLU, conv 3x3], (B, channels, H, W) -> the same shape."""
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        conv3x3(channels, channels),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        conv3x3(channels, channels),
    )


def down_sampling(channels_in: int, channels_out: int) -> nn.Module:
    """torchvision's residual block of stride 2, its shortcut a 1x1 convolution; stored by autograd.

    (B, channels_in, H, W) -> (B, channels_out, H/2, W/2).
    """
    from torchvision.models.resnet import BasicBlock

    shortcut = nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride=2, bias=False), nn.BatchNorm2d(channels_out)
    )
    return BasicBlock(channels_in, channels_out, stride=2, downsample=shortcut)


class ReversibleNet(nn.Module):
    """Stem and one invertible trunk that ends in the head: all from the stem's output on is rebuilt."""

    def __init__(self, stem: nn.Module, trunk: InvertibleChain):
        super().__init__()
        self.stem, self.trunk = stem, trunk

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(self.stem(images))


@former_names(stream="state_format")
def build_reversible(
    network: Network[Any],
    images: Images,
    unit: Callable[[int, int], Sequence[InvertibleLayer]],
    state_format: StateFormat = PLAIN,
    normalise_last: bool = True,
) -> ReversibleNet:
    """A fully invertible trunk: `depth` units over stages that `pooling` separates.

    Args:
        unit: (channels, stage) -> the layers of one repeated unit; stages count from 0.
        state_format: the number format of the trunk's states. Formerly `stream`.
        normalise_last: whether a BN and a LeakyReLU of slope `slope` come before the mean over pixels.

    Raises `RevtrainError` for an odd width, a pooling entry that is not invertible, or an image size that
    the pooling cannot divide.
    """
    if network.width < 2 or network.width % 2:
        raise RevtrainError(
            f"width={network.width} cannot be split into two equal halves.\n"
            f"Expected an even number of channels, e.g. width={max(2, network.width + network.width % 2)}."
        )
    check_pooling(network.pooling, images.size)
    channels, sub_images = network.width, 1
    layers: list[InvertibleLayer] = []
    for stage, units in enumerate(units_of_stages(network)):
        if stage > 0:
            kind = network.pooling[stage - 1]
            if kind == "channel":
                layers.append(ChannelPooling())
                channels *= 4
            elif kind == "batch":
                layers.append(BatchPooling())
                sub_images *= 4
            else:
                raise RevtrainError(
                    f"pooling={list(network.pooling)}: {kind!r} cannot be inverted in arch={network.arch}.\n"
                    "Expected a list of: channel, batch."
                )
        for _ in range(units):
            layers.extend(unit(channels, stage))
    head = Head(channels, images.classes, sub_images, network.slope if normalise_last else None)
    trunk = InvertibleChain(layers, backward=network.backward, state_format=state_format, head=head)
    return ReversibleNet(conv3x3(3, network.width), trunk)


def state_format(network: Network[CouplingSettings]) -> StateFormat:
    """The number format of the coupling blocks' states: `stream`, or by precision 32 or 16 bit."""
    return StateFormat(network.own.state_format(network.precision), network.own.grid_bits)
