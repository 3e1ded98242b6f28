"""What several architectures share: the stem, ordinary residual functions, and the fully invertible network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revtrain.config import CouplingSettings, Network, typed
from revtrain.core.chain import InvertibleChain
from revtrain.core.layer import InvertibleLayer
from revtrain.core.names import former_names
from revtrain.core.state_format import PLAIN, StateFormat
from revtrain.errors import RevtrainError
from revtrain.layers import AdditiveCoupling, BatchPooling, ChannelPooling, CouplingConv2d, Head, Stem, check_pooling
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


class StridedBlock(nn.Module):
    """The first block of a stage of Gomez et al.'s RevNet, stored by autograd: y1 = P(x1) + F(x2), y2 = P(x2) + G(y1).

    F halves the image in its first convolution; P is the mean of 2x2 pixels, with channels of zeros on both sides.
    (B, channels_in, H, W) -> (B, channels_out, H/2, W/2).
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        before, after = channels_in // 2, channels_out // 2
        self.padding = (after - before) // 2, after - before - (after - before) // 2
        self.f = nn.Sequential(
            nn.BatchNorm2d(before), nn.ReLU(inplace=True), conv3x3(before, after, stride=2), *preactivated(after)[3:]
        )
        self.g = preactivated(after)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        p1, p2 = (F.pad(F.avg_pool2d(each, 2), (0, 0, 0, 0, *self.padding)) for each in (x1, x2))
        y1 = p1 + self.f(x2)
        return torch.cat([y1, p2 + self.g(y1)], dim=1)


def start_at_zero(model: nn.Module) -> None:
    """Set the last convolution of every F and G to zero (`zero_last`): a coupling of ordinary functions is the identity
    then. Where F is a chain of invertible layers, its last coupling convolution is."""
    for block in model.modules():
        if isinstance(block, AdditiveCoupling) and not isinstance(block, CouplingConv2d):
            for function in block.hands_context_to():
                couplings = [each for each in function.modules() if isinstance(each, CouplingConv2d)]
                last = couplings[-1] if couplings else function
                convolutions = [each for each in last.modules() if isinstance(each, nn.Conv2d)]
                for conv in convolutions if couplings else convolutions[-1:]:
                    nn.init.zeros_(conv.weight)


class ReversibleNet(nn.Module):
    """Stem and one invertible trunk that ends in the head: all from the stem's output on is rebuilt.

    `model(images)` are the logits; with a head for pixels `model(images, labels)` is the loss of each image.
    """

    def __init__(self, stem: nn.Module, trunk: InvertibleChain):
        super().__init__()
        self.stem, self.trunk = stem, trunk

    def forward(self, images: Tensor, *labels: Tensor) -> Tensor:
        return self.trunk(self.stem(images), *labels)


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
                    f"pooling={typed(network.pooling)}: {kind!r} cannot be inverted in arch={network.arch}.\n"
                    "Expected a list of: channel, batch."
                )
        for _ in range(units):
            layers.extend(unit(channels, stage))
    head = Head(channels, images.classes, sub_images, network.slope if normalise_last else None)
    trunk = InvertibleChain(layers, backward=network.backward, state_format=state_format, head=head)
    return ReversibleNet(Stem(3, network.width, 3, padding=1, bias=False), trunk)


def state_format(network: Network[CouplingSettings]) -> StateFormat:
    """The number format of the coupling blocks' states: `stream`, or by precision 32 or 16 bit."""
    return StateFormat(network.own.state_format(network.precision), network.own.grid_bits)
