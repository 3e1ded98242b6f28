"""iRevNet: reversible blocks with ordinary F and G, and pooling that loses nothing.

Legend: B batch, c = cfg.width, N = cfg.depth blocks in all, stages separated by cfg.pooling,
s = cfg.residual_scale.

    images (B, 3, 32, 32)
      stem        conv 3x3                           (B, c, 32, 32)
      trunk       N / 4 x block                      y1 = x1 + s F(x2), y2 = x2 + s G(y1)
                  channel pooling                    (B, 4c, 16, 16)
                  N / 4 x block
                  channel pooling                    (B, 16c, 8, 8)
                  N / 4 x block
                  channel pooling                    (B, 64c, 4, 4)
                  N / 4 x block
      readout     BN, LeakyReLU, mean over pixels, linear   (B, classes)

    F, G:  2 x [ BN, ReLU, conv 3x3 ]  on half of the channels: the two modules of each channel split

The trunk is invertible from end to end, but channels grow fourfold per pooling and weights sixteenfold:
about 76 M parameters in the last stage at c = 32. Alive in the backward pass besides the two states: all
activations inside one F or G (the local bottleneck).
"""

from __future__ import annotations

from torch import nn

from revtrain.layers import AdditiveCoupling
from revtrain.models.parts import ReversibleNet, build_reversible, conv3x3, stream_of


def residual(channels: int) -> nn.Sequential:
    """Two pre-activated convolutions, (B, channels, H, W) -> the same shape."""
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        conv3x3(channels, channels),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        conv3x3(channels, channels),
    )


def build(cfg, classes: int, image_size: int) -> ReversibleNet:
    """`cfg.depth` reversible blocks in a fully invertible trunk; see the module's legend."""

    stream = stream_of(cfg)

    def block(channels: int, stage: int):
        return [
            AdditiveCoupling(
                channels,
                residual(channels // 2),
                residual(channels // 2),
                scale=cfg.residual_scale,
                stream=stream,
            )
        ]

    return build_reversible(cfg, classes, image_size, block, stream)
