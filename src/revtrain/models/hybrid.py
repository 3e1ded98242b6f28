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

F and G have identity paths: a coupling convolution adds to what it is given, so F(x2) is about p x2 and G(y1) about
q y1, p and q the signs of the BNs' gains multiplied. With p = q = 1, as in the paper, a block is near
[[1, s], [s, 1 + s^2]], which stretches along x1 = x2 and shrinks across it: the halves become copies of each other, and
the network learns as one of half its channels. `opposed_paths` gives G's first BN the sign that makes q = -p. The block
is then near [[1, s p], [-s p, 1 - s^2]], of determinant 1 and trace 2 - s^2: a rotation, which takes the halves into
each other and stretches neither.

The block's own inverse carries the signal across the network with little noise; the layer-wise inverse
serves inside one block only, at the same time as the gradient. Convolutions run one and a half times more than they do
under ordinary autograd in the forward pass: F is computed once more up to its last convolution, which is then
differentiated from its own input; the first convolution is computed again as it is inverted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from revtrain.config import CouplingSettings, InvertibleSettings, Network, key
from revtrain.errors import RevtrainError
from revtrain.memory.closed_form import Module, Term, Work
from revtrain.memory.formulas import (
    Stage,
    Symbols,
    Unit,
    both_functions,
    convolution,
    gradient,
    invertible_layers_bytes,
    invertible_trunk,
    local,
    scratch,
    scratch_of_convolution,
    scratch_of_last_convolution,
    scratch_of_sum,
    statistics_bytes,
    sum_of_coupling,
)
from revtrain.models import Images, Traits, advise_on_couplings, advise_on_invertible_layers, units_of_stages

if TYPE_CHECKING:
    from revtrain.core.chain import InvertibleChain
    from revtrain.models.common import ReversibleNet

TRAITS = Traits(noise="in blocks")
UNITS_PER_FUNCTION = 2


@dataclass
class Settings(CouplingSettings, InvertibleSettings):
    """Coupling blocks of invertible layers."""

    opposed_paths: bool = key(
        True, "G's identity path has the sign opposite to F's; false: the paper's, whose halves become copies"
    )
    keep_signs: bool = key(
        True, "keep the true signs of activations, a bit each, while a block is walked back; false: the paper's"
    )
    recompute_leading: bool = key(
        True,
        "F's first BN and LeakyReLU, and its last convolution, start from what is at hand; false: all are inverted",
    )


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
        norm = InvertibleBatchNorm2d(channels, own.epsilon_i, sign=own.norm_sign)
        return norm, InvertibleLeakyReLU(network.slope, keep_signs=own.keep_signs)

    def function(channels: int) -> InvertibleChain:
        layers = [
            layer
            for _ in range(UNITS_PER_FUNCTION)
            for layer in (
                *activation(channels),
                CouplingConv2d(channels, init_gain=own.init_gain, max_gain=own.max_gain),
            )
        ]
        chain = InvertibleChain(layers, backward=network.backward)
        chain.recompute_leading = own.recompute_leading
        return chain

    def block(channels: int, stage: int):
        f, g = function(channels // 2), function(channels // 2)
        if own.opposed_paths:
            _oppose(f, g)
        return [AdditiveCoupling(channels, f, g, scale=own.residual_scale, state_format=stream)]

    return build_reversible(network, images, block, stream)


def _oppose(f: InvertibleChain, g: InvertibleChain) -> None:
    """Give the first BN of `g` the signs that make its identity path's the opposite of that of `f`."""
    from revtrain.layers import InvertibleBatchNorm2d

    (f1, f2), (g1, g2) = ([each for each in chain if isinstance(each, InvertibleBatchNorm2d)] for chain in (f, g))
    g1.set_signs(-f1.signs * f2.signs * g2.signs)


def memory(network: Network[Settings], images: Images) -> list[Module]:
    """The closed form (section 4.2): two states, F's own state and its gradient. Symbols: memory.formulas, and

        d   bytes of a value of the state inside F: 4, or a where the stream is of integers

    Leading BN and LeakyReLU are recomputed from the source, so signs of the second LeakyReLU only are kept; of both
    with `recompute_leading=false`, of none with `keep_signs=false`.
    """
    symbols, equation = Symbols(network), "section 4.2"
    a, g, v = symbols.a, symbols.g, symbols.v
    d = g

    def unit(stage: Stage, of_state: Term) -> Unit:
        half, quarter, h = stage.channels // 2, stage.channels // 4, stage.half
        functions = 2 * UNITS_PER_FUNCTION  # units of layers in F and G
        inside = [local("inside F: its state", equation, "h d", h * d)]
        if network.own.keep_signs and network.own.recompute_leading:
            inside.append(local("inside F: signs of LeakyReLU 2, a bit each", equation, "h / 8", h / 8))
        elif network.own.keep_signs:
            inside.append(local("inside F: signs of both LeakyReLUs, a bit each", equation, "h / 4", h / 4))
        of_inside = gradient("inside F: gradient of its state", equation, "h g", h * g)
        taken_off = scratch(scratch_of_sum(symbols, symbols.chunk_bytes / d, d))
        of_convolution = scratch_of_last_convolution if network.own.recompute_leading else scratch_of_convolution
        at_convolution = scratch(of_convolution(symbols, d, quarter))
        return Unit(
            parameters=functions * (2 * convolution(quarter, quarter) + 2 * half),
            buffer_bytes=statistics_bytes(functions * half, counters=symbols.on_grid)
            + functions * invertible_layers_bytes(network.own, quarter, convolutions=2),
            rebuilt=(
                Work("backward", (of_state, *inside, taken_off)),
                Work("backward", (of_state, *inside, of_inside, at_convolution)),
            ),
            stored=both_functions(
                "inputs of the layers of F and G",
                f"{UNITS_PER_FUNCTION} h (2 v + a)",
                UNITS_PER_FUNCTION * h * (2 * v + a),
            ),
            storing=(sum_of_coupling(symbols, stage, v, y1_is_saved=False),),
        )

    return invertible_trunk(symbols, *images, units_of_stages(network), unit, equation)


def advise(network: Network[Settings]) -> list[str]:
    """Noise piles up inside a block only, from layer to layer of F and G."""
    return advise_on_couplings(network.own) + advise_on_invertible_layers(network.slope, network.own)


def advise_on_halves(network: Network[Settings]) -> list[str]:
    """Identity paths of F and G that oppose each other; else gains that do not all agree."""
    ways = [] if network.own.opposed_paths else ["opposed_paths=true"]
    return ways if network.own.norm_sign == "mixed" else [*ways, "norm_sign=mixed"]
