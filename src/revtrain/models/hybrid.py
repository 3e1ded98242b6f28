"""The hybrid network: coupling blocks whose F and G are themselves layer-wise chains.

Legend: B batch, c = width, N = depth blocks in all, stages separated by pooling,
s = residual_scale.

    images (B, 3, 32, 32)
      stem        conv 3x3                           (B, c, 32, 32)
      trunk       N / 3 x block                      y1 = x1 + s F(x2), y2 = x2 + s G(y1)
                  channel pooling                    (B, 4c, 16, 16)
                  N / 3 x block
                  channel pooling                    (B, 16c, 8, 8)
                  N / 3 x block
      head        BN, LeakyReLU, mean over pixels, linear   (B, classes)

    F, G:  2 x [ BN, LeakyReLU, coupling conv 3x3 ]  on half of the channels, an invertible chain each

The block's own inverse carries the signal across the network with little noise; the layer-wise inverse
serves inside one block only, at the same time as the gradient. It costs two more forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from revtrain.config import CouplingSettings, InvertibleSettings, Network
from revtrain.errors import RevtrainError
from revtrain.models import Images, Traits

if TYPE_CHECKING:
    from revtrain.core.chain import InvertibleChain
    from revtrain.models.common import ReversibleNet

TRAITS = Traits(noise="in blocks")
UNITS_PER_FUNCTION = 2


@dataclass
class Settings(CouplingSettings, InvertibleSettings):
    """Coupling blocks of invertible layers."""


def build(network: Network[Settings], images: Images) -> ReversibleNet:
    """`depth` hybrid blocks; see the module's legend. Widths must be divisible by four."""
    from revtrain.core.chain import InvertibleChain
    from revtrain.layers import AdditiveCoupling, CouplingConv2d, InvertibleBatchNorm2d, InvertibleLeakyReLU
    from revtrain.models.common import build_reversible, state_format

    if network.width % 4:
        raise RevtrainError(
            f"width={network.width} cannot be split twice: a hybrid block halves its channels, and the coupling "
            f"convolutions inside halve them again.\n"
            f"Expected a multiple of four, e.g. width={max(4, 4 * round(network.width / 4))}."
        )

    own, stream = network.own, state_format(network)

    def activation(channels: int):
        return InvertibleBatchNorm2d(channels, own.epsilon_i, sign=own.norm_sign), InvertibleLeakyReLU(network.slope)

    def function(channels: int) -> InvertibleChain:
        layers = [
            layer
            for _ in range(UNITS_PER_FUNCTION)
            for layer in (
                *activation(channels),
                CouplingConv2d(channels, init_gain=own.init_gain, max_gain=own.max_gain),
            )
        ]
        return InvertibleChain(layers, backward=network.backward)

    def block(channels: int, stage: int):
        return [
            AdditiveCoupling(
                channels,
                function(channels // 2),
                function(channels // 2),
                scale=own.residual_scale,
                state_format=stream,
            )
        ]

    return build_reversible(network, images, block, stream)
