"""iRevNet: reversible blocks with ordinary F and G, and pooling that loses nothing.

Legend: B batch, c = width, N = depth blocks in all, stages separated by pooling,
s = residual_scale.

    images (B, 3, 32, 32)
      stem        conv 3x3                           (B, c, 32, 32)
      trunk       N / 4 x block                      y1 = x1 + s F(x2), y2 = x2 + s G(y1)
                  channel pooling                    (B, 4c, 16, 16)
                  N / 4 x block
                  channel pooling                    (B, 16c, 8, 8)
                  N / 4 x block
                  channel pooling                    (B, 64c, 4, 4)
                  N / 4 x block
      head        BN, LeakyReLU, mean over pixels, linear   (B, classes)

    F, G:  2 x [ BN, ReLU, conv 3x3 ]  on half of the channels: the two modules of each channel split

The trunk is invertible from end to end, but channels grow fourfold per pooling and weights sixteenfold:
about 76 M parameters in the last stage at c = 32. Alive in the backward pass besides the two states: all
activations inside one F or G (the local bottleneck).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from revtrain.config import CouplingSettings, Network
from revtrain.memory.closed_form import Module, Term
from revtrain.memory.formulas import (
    Stage,
    Symbols,
    Unit,
    invertible_trunk,
    preactivated_parameters,
    preactivated_rebuilt,
    preactivated_stored,
    preactivated_storing,
    statistics_bytes,
)
from revtrain.models import Images, Traits, advise_on_couplings, units_of_stages

if TYPE_CHECKING:
    from revtrain.models.common import ReversibleNet

TRAITS = Traits(hardly_uses={"slope": "only its readout has a LeakyReLU"})


@dataclass
class Settings(CouplingSettings):
    """Coupling blocks of ordinary functions."""


def build(network: Network[Settings], images: Images) -> ReversibleNet:
    """`depth` reversible blocks in a fully invertible trunk; see the module's legend."""
    from revtrain.layers import AdditiveCoupling
    from revtrain.models.common import build_reversible, preactivated, state_format

    stream = state_format(network)

    def block(channels: int, stage: int):
        return [
            AdditiveCoupling(
                channels,
                preactivated(channels // 2),
                preactivated(channels // 2),
                scale=network.own.residual_scale,
                state_format=stream,
            )
        ]

    return build_reversible(network, images, block, stream)


def memory(network: Network[Settings], images: Images) -> list[Module]:
    """The closed form (Eqs. 12, 13): two states, and all activations inside one F. Symbols: memory.formulas."""
    symbols, equation = Symbols(network), "Eqs. 12, 13"

    def unit(stage: Stage, of_state: Term) -> Unit:
        return Unit(
            parameters=preactivated_parameters(stage.channels),
            buffer_bytes=statistics_bytes(2 * stage.channels, torch_norms=4, counters=symbols.on_grid),
            rebuilt=preactivated_rebuilt(symbols, stage, equation, (of_state,)),
            stored=preactivated_stored(symbols, stage),
            storing=preactivated_storing(symbols, stage),
        )

    return invertible_trunk(symbols, *images, units_of_stages(network), unit, equation)


def advise(network: Network[Settings]) -> list[str]:
    """Only the sums of coupling blocks can be off."""
    return advise_on_couplings(network.own)
