"""The chunked network: wide residual functions that are never alive as a whole.

Legend: B batch, c = width, N = depth blocks in all, stages separated by pooling, e = expansion
of the stage (hidden channels of F per channel of its input; 2, 1, then 1/2 if not given), s = residual_scale.

    images (B, 3, 32, 32)
      stem        conv 3x3                           (B, c, 32, 32)
      trunk       N / 3 x block                      y1 = x1 + s F(x2), y2 = x2 + s G(y1)
                  channel pooling                    (B, 4c, 16, 16)
                  N / 3 x block
                  channel pooling                    (B, 16c, 8, 8)
                  N / 3 x block
      head        BN, LeakyReLU, mean over pixels, linear   (B, classes)

    F, G with h half of the stage's channels:
      norm=input    BN, conv 3x3 (h -> e h), activation, conv 3x3 (e h -> h)     over chunks of the batch
      norm=hidden   conv 3x3 (h -> e h), BN, activation, conv 3x3 (e h -> h)     over chunks of hidden channels

Alive in the backward pass: the two states, 2c values a pixel, and scratch of one chunk. A chunk of the batch does
not grow with the batch; one of k = hidden_chunk hidden channels takes 2k values a pixel, and k is four times
as large in a stage with four times the channels on a quarter of the pixels, for the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from revtrain.config import CouplingSettings, Network, key
from revtrain.errors import RevtrainError
from revtrain.models import Images, Traits

if TYPE_CHECKING:
    from revtrain.layers import PreNorm
    from revtrain.models.common import ReversibleNet

TRAITS = Traits()


@dataclass
class Settings(CouplingSettings):
    """Wide residual functions."""

    activation: str = key("relu", "between the convolutions of F", choices=("relu", "gelu", "silu", "leaky_relu"))
    norm: str = key("input", "BN at the input of F, or between its convolutions: hidden", choices=("input", "hidden"))
    expansion: list[float] = key([], "hidden channels per channel, for each stage or one for all; []: 2, 1, then 1/2")
    hidden_chunk: int = key(
        8,
        "with norm=hidden: hidden channels alive at a time, at full resolution",
        at_least=1,
        remark="hidden channels alive at a time",
    )


def residual(channels: int, hidden: int, activation: str) -> PreNorm:
    """BN, conv, activation, conv: (B, channels, H, W) -> the same shape."""
    from torch import nn

    from revtrain.layers import Activation, PreNorm

    body = nn.Sequential(
        nn.Conv2d(channels, hidden, 3, padding=1),
        Activation(activation, inplace=True),
        nn.Conv2d(hidden, channels, 3, padding=1, bias=False),
    )
    for conv in (body[0], body[2]):
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return PreNorm(channels, body)


def expansions(network: Network[Settings]) -> list[float]:
    """e of every stage: `expansion`, one number for all, or none for 2, 1, then 1/2.

    Late stages have many channels: narrower functions there keep the weights from exploding.
    Raises `RevtrainError` for another count, or numbers that are not positive.
    """
    stages, given = len(network.pooling) + 1, list(network.own.expansion)
    if not given:
        return [max(0.5, 2.0 ** (1 - stage)) for stage in range(stages)]
    found = given * stages if len(given) == 1 else given
    if len(found) != stages or any(e <= 0 for e in found):
        raise RevtrainError(
            f"expansion={given} does not fit {stages} stages (pooling={list(network.pooling)}).\n"
            f"Expected {stages} positive numbers, one for all stages as in expansion=[1], or none: expansion=[]."
        )
    return found


def build(network: Network[Settings], images: Images) -> ReversibleNet:
    """`depth` blocks; see the module's legend."""
    from revtrain.layers import AdditiveCoupling, HiddenChunkCoupling
    from revtrain.models.common import build_reversible, state_format

    own, widths, stream = network.own, expansions(network), state_format(network)

    def block(channels: int, stage: int):
        half = channels // 2
        hidden = max(1, round(widths[stage] * half))
        if own.norm == "input":
            f, g = (residual(half, hidden, own.activation) for _ in range(2))
            return [AdditiveCoupling(channels, f, g, scale=own.residual_scale, state_format=stream, channels_last=True)]
        chunk = own.hidden_chunk * channels // network.width
        return [
            HiddenChunkCoupling(channels, hidden, chunk, own.activation, scale=own.residual_scale, state_format=stream)
        ]

    return build_reversible(network, images, block, stream)
