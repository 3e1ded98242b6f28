"""The layer-wise invertible network: every layer is inverted on its own.

Legend: B batch, c = width, N = depth units in all, stages separated by pooling.

    images (B, 3, 32, 32)
      stem        conv 3x3                           (B, c, 32, 32)
      trunk       N / 3 x [ coupling conv 3x3, BN, LeakyReLU ]
                  channel pooling                    (B, 4c, 16, 16)
                  N / 3 x [ ... ]
                  channel pooling                    (B, 16c, 8, 8)
                  N / 3 x [ ... ]
      head        mean over pixels, linear           (B, classes)

With c = 32 and N = 6 the stages are 32, 128 and 512 channels wide. Only the trunk's output survives the
forward pass; the backward pass lives in that buffer and one gradient of the same size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from revtrain.config import InvertibleSettings, Network
from revtrain.models import Images, Traits

if TYPE_CHECKING:
    from revtrain.models.common import ReversibleNet

TRAITS = Traits(noise="along the chain")


@dataclass
class Settings(InvertibleSettings):
    """Every layer is an invertible one."""


def build(network: Network[Settings], images: Images) -> ReversibleNet:
    """`depth` units of coupling convolution, BN and LeakyReLU; see the module's legend."""
    from revtrain.layers import CouplingConv2d, InvertibleBatchNorm2d, InvertibleLeakyReLU
    from revtrain.models.common import build_reversible

    own = network.own

    def unit(channels: int, stage: int):
        return (
            CouplingConv2d(channels, init_gain=own.init_gain, max_gain=own.max_gain),
            InvertibleBatchNorm2d(channels, own.epsilon_i, sign=own.norm_sign),
            InvertibleLeakyReLU(network.slope),
        )

    return build_reversible(network, images, unit, normalise_last=False)
