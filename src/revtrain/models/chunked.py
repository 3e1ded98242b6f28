"""The chunked network: wide residual functions whose hidden channels are never alive all at once.

Legend: B batch, c = cfg.width, N = cfg.depth blocks in all, stages separated by cfg.pooling, e = cfg.expansion
of the stage (hidden channels of F per channel of its input), k = cfg.hidden_chunk, s = cfg.residual_scale.

    images (B, 3, 32, 32)
      stem        conv 3x3                           (B, c, 32, 32)
      trunk       N / 3 x block                      y1 = x1 + s F(x2), y2 = x2 + s G(y1)
                  channel pooling                    (B, 4c, 16, 16)
                  N / 3 x block
                  channel pooling                    (B, 16c, 8, 8)
                  N / 3 x block
                  BN, LeakyReLU
      head        mean over pixels, linear           (B, classes)

    F, G:  conv 3x3 (h -> e h), BN, activation, conv 3x3 (e h -> h)  with h half of the stage's channels

Alive in the backward pass: the two states, 2c values a pixel, and 2k of a chunk of hidden channels. A stage
with four times the channels on a quarter of the pixels takes chunks of four times k for the same bytes.
"""

from __future__ import annotations

from revtrain.errors import RevtrainError
from revtrain.layers import ChunkedCoupling, InvertibleBatchNorm2d, InvertibleLeakyReLU
from revtrain.models.parts import ReversibleNet, build_reversible


def build(cfg, classes: int, image_size: int) -> ReversibleNet:
    """`cfg.depth` chunked blocks; see the module's legend."""
    stages = len(cfg.pooling) + 1
    expansions = list(cfg.expansion) * (stages if len(cfg.expansion) == 1 else 1)
    if len(expansions) != stages or any(e <= 0 for e in expansions):
        raise RevtrainError(
            f"expansion={list(cfg.expansion)} does not fit {stages} stages (pooling={list(cfg.pooling)}).\n"
            f"Expected {stages} positive numbers, or one for all stages, e.g. expansion=[1]."
        )

    def block(channels: int, stage: int):
        half = channels // 2
        return [
            ChunkedCoupling(
                channels,
                hidden=max(1, round(expansions[stage] * half)),
                hidden_chunk=cfg.hidden_chunk * channels // cfg.width,
                activation=cfg.activation,
                scale=cfg.residual_scale,
                grid_bits=cfg.grid_bits,
            )
        ]

    def final(channels: int):
        return InvertibleBatchNorm2d(channels, cfg.epsilon_i), InvertibleLeakyReLU(cfg.slope)

    return build_reversible(cfg, classes, image_size, block, final)
