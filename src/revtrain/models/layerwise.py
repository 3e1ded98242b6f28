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
from revtrain.memory.closed_form import EQ_STORED, FLOAT, Module, Term, Work
from revtrain.memory.formulas import (
    Stage,
    Symbols,
    Unit,
    both_functions,
    convolution,
    invertible_layers_bytes,
    invertible_trunk,
    local,
    scratch,
    scratch_of_convolution,
    statistics_bytes,
)
from revtrain.models import Images, Traits, advise_on_invertible_layers, units_of_stages

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


def memory(network: Network[Settings], images: Images) -> list[Module]:
    """The closed form (Eq. 30): one state, one gradient, and a chunk of temporaries. Symbols: memory.formulas."""
    symbols = Symbols(network)
    a, v = symbols.a, symbols.v

    def unit(stage: Stage, of_state: Term) -> Unit:
        half, h = stage.channels // 2, stage.half
        return Unit(
            parameters=2 * convolution(half, half) + 2 * stage.channels,
            buffer_bytes=statistics_bytes(stage.channels) + invertible_layers_bytes(network.own, half, convolutions=2),
            rebuilt=(Work("backward", (of_state, scratch(scratch_of_convolution(symbols, FLOAT, half)))),),
            stored=both_functions("inputs of F and G, of BN (centred) and LeakyReLU", "h (2 v + a)", h * (2 * v + a)),
            storing=(
                Work(
                    "forward",
                    (local("BN: its input, and the product before the sum", EQ_STORED, "2 E v", 4 * h * v),),
                ),
            ),
        )

    return invertible_trunk(
        symbols, *images, units_of_stages(network), unit, "Eq. 30", unit_name="unit", normalise_last=False
    )


def advise(network: Network[Settings]) -> list[str]:
    """Noise piles up from layer to layer: every layer should amplify less of it."""
    return advise_on_invertible_layers(network.slope, network.own)
