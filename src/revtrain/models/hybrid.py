"""The hybrid network: coupling blocks whose F and G are themselves layer-wise chains.

Legend: B batch, c = cfg.width, N = cfg.depth blocks in all, stages separated by cfg.pooling,
s = cfg.residual_scale.

    images (B, 3, 32, 32)
      stem        conv 3x3                           (B, c, 32, 32)
      trunk       N / 3 x block                      y1 = x1 + s F(x2), y2 = x2 + s G(y1)
                  channel pooling                    (B, 4c, 16, 16)
                  N / 3 x block
                  channel pooling                    (B, 16c, 8, 8)
                  N / 3 x block
      readout     BN, LeakyReLU, mean over pixels, linear   (B, classes)

    F, G:  2 x [ BN, LeakyReLU, coupling conv 3x3 ]  on half of the channels, an invertible chain each

The block's own inverse carries the signal across the network with little noise; the layer-wise inverse
serves inside one block only, at the same time as the gradient. It costs two more forward passes.
"""

from __future__ import annotations

from revtrain.chain import InvertibleChain
from revtrain.errors import RevtrainError
from revtrain.layers import AdditiveCoupling, CouplingConv2d, InvertibleBatchNorm2d, InvertibleLeakyReLU
from revtrain.models.parts import ReversibleNet, build_reversible, stream_of

UNITS_PER_BRANCH = 2


def build(cfg, classes: int, image_size: int) -> ReversibleNet:
    """`cfg.depth` hybrid blocks; see the module's legend. Widths must be divisible by four."""
    if cfg.width % 4:
        raise RevtrainError(
            f"width={cfg.width} cannot be split twice: a hybrid block halves its channels, and the coupling "
            f"convolutions inside halve them again.\n"
            f"Expected a multiple of four, e.g. width={max(4, 4 * round(cfg.width / 4))}."
        )

    def activation(channels: int):
        return InvertibleBatchNorm2d(channels, cfg.epsilon_i, sign=cfg.norm_sign), InvertibleLeakyReLU(cfg.slope)

    def branch(channels: int) -> InvertibleChain:
        layers = [
            layer
            for _ in range(UNITS_PER_BRANCH)
            for layer in (
                *activation(channels),
                CouplingConv2d(channels, init_gain=cfg.init_gain, max_gain=cfg.max_gain),
            )
        ]
        return InvertibleChain(layers, backward=cfg.backward)

    stream = stream_of(cfg)

    def block(channels: int, stage: int):
        return [
            AdditiveCoupling(
                channels,
                branch(channels // 2),
                branch(channels // 2),
                scale=cfg.residual_scale,
                stream=stream,
            )
        ]

    return build_reversible(cfg, classes, image_size, block, stream)
