"""The layer-wise invertible network: every layer is inverted on its own.

Legend: B batch, c = cfg.width, N = cfg.depth units in all, stages separated by cfg.pooling.

    images (B, 3, 32, 32)
      stem        conv 3x3                           (B, c, 32, 32)
      trunk       N / 3 x [ coupling conv 3x3, BN, LeakyReLU ]
                  channel pooling                    (B, 4c, 16, 16)
                  N / 3 x [ ... ]
                  channel pooling                    (B, 16c, 8, 8)
                  N / 3 x [ ... ]
      readout     mean over pixels, linear           (B, classes)

With c = 32 and N = 6 the stages are 32, 128 and 512 channels wide. Only the trunk's output survives the
forward pass; the backward pass lives in that buffer and one gradient of the same size.
"""

from __future__ import annotations

from revtrain.layers import CouplingConv2d, InvertibleBatchNorm2d, InvertibleLeakyReLU
from revtrain.models.parts import ReversibleNet, build_reversible


def build(cfg, classes: int, image_size: int) -> ReversibleNet:
    """`cfg.depth` units of coupling convolution, BN and LeakyReLU; see the module's legend."""

    def unit(channels: int, stage: int):
        return (
            CouplingConv2d(channels, init_gain=cfg.init_gain, max_gain=cfg.max_gain),
            InvertibleBatchNorm2d(channels, cfg.epsilon_i, sign=cfg.norm_sign),
            InvertibleLeakyReLU(cfg.slope),
        )

    return build_reversible(cfg, classes, image_size, unit, normalise_last=False)
