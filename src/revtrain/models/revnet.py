"""RevNet (Gomez et al. 2017): reversible blocks between residual blocks that halve the image.

Legend: B batch, c = width, N = depth reversible blocks in all, one stage more than pooling has
entries; every entry is "stride"; s = residual_scale.

    images (B, 3, 32, 32)
      stem        conv 3x3                           (B, c, 32, 32)
      stage 1     N / 4 x block                      y1 = x1 + s F(x2), y2 = x2 + s G(y1)
      down        residual block, stride 2           (B, 2c, 16, 16)    not invertible: stores its input
      stage 2     N / 4 x block
      down        residual block, stride 2           (B, 4c, 8, 8)
      stage 3     N / 4 x block
      down        residual block, stride 2           (B, 8c, 4, 4)
      stage 4     N / 4 x block
      head        BN, ReLU, mean over pixels, linear (B, classes)

    F, G:  2 x [ BN, ReLU, conv 3x3 ]  on half of the channels
    down:  torchvision's BasicBlock with a 1x1 convolution on its shortcut

The blocks start with BN and ReLU, so the stem is a convolution alone: what it would store at full resolution
is not worth a second pair. With c = 64 and N = 8 it has about as many parameters as ResNet-18. Each stage is a
chain of its own; what the down-sampling blocks store is the paper's global bottleneck, and with channels
doubling per pool the first stage peaks.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from revtrain.config import CouplingSettings, Network
from revtrain.errors import RevtrainError
from revtrain.models import Images, Traits

if TYPE_CHECKING:
    from torch import nn

TRAITS = Traits()


@dataclass
class Settings(CouplingSettings):
    """Coupling blocks of ordinary functions."""


def build(network: Network[Settings], images: Images) -> nn.Sequential:
    """`depth` reversible blocks; see the module's legend."""
    from torch import nn

    from revtrain.core.chain import InvertibleChain
    from revtrain.layers import AdditiveCoupling, Head, check_pooling
    from revtrain.models.common import conv3x3, down_sampling, preactivated, spread_depth, state_format

    if network.width < 2 or network.width % 2:
        raise RevtrainError(
            f"width={network.width} cannot be split into two equal halves.\n"
            f"Expected an even number of channels, e.g. width={max(2, network.width + network.width % 2)}."
        )
    if any(kind != "stride" for kind in network.pooling):
        raise RevtrainError(
            f"pooling={list(network.pooling)} does not fit arch=revnet.\n"
            "Expected only stride entries, e.g. pooling=[stride,stride,stride]; invertible pooling is arch=irevnet."
        )
    check_pooling(network.pooling, images.size)
    channels, stream, scale = network.width, state_format(network), network.own.residual_scale
    stages: list[nn.Module] = []
    for stage, blocks in enumerate(spread_depth(network.depth, len(network.pooling) + 1)):
        if stage > 0:
            stages.append(down_sampling(channels, 2 * channels))
            channels *= 2
        if blocks:
            half = channels // 2
            stages.append(
                InvertibleChain(
                    [
                        AdditiveCoupling(
                            channels,
                            preactivated(half),
                            preactivated(half),
                            scale=scale,
                            state_format=stream,
                        )
                        for _ in range(blocks)
                    ],
                    backward=network.backward,
                    state_format=stream,
                    reuse_output=True,  # whoever stored it has done its backward pass by then
                )
            )
    head = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), Head(channels, images.classes))
    return nn.Sequential(OrderedDict(stem=conv3x3(3, network.width), stages=nn.Sequential(*stages), head=head))
