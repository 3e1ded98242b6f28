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

from revtrain.config import CouplingSettings, Network, key, typed
from revtrain.errors import RevtrainError
from revtrain.memory.closed_form import FLOAT, Module, Term, Work
from revtrain.memory.formulas import (
    Stage,
    Symbols,
    Unit,
    both_functions,
    convolution,
    gradient,
    invertible_trunk,
    local,
    scratch,
    scratch_of_sum,
    statistics_bytes,
    sum_of_coupling,
)
from revtrain.models import Images, Traits, advise_on_couplings, units_of_stages

if TYPE_CHECKING:
    from revtrain.layers import PreNorm
    from revtrain.models.common import ReversibleNet

TRAITS = Traits(hardly_uses={"slope": "only its readout has a LeakyReLU"})


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

    first = nn.Conv2d(channels, hidden, 3, padding=1)
    second = nn.Conv2d(hidden, channels, 3, padding=1, bias=False)
    for conv in (first, second):
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return PreNorm(channels, nn.Sequential(first, Activation(activation, inplace=True), second))


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
            f"expansion={typed(given)} does not fit {stages} stages (pooling={typed(network.pooling)}).\n"
            f"Expected {stages} positive numbers, one for all stages as in expansion=[1], or none: expansion=[]."
        )
    return found


def hidden_channels(network: Network[Settings], stage: int, channels: int) -> int:
    """Hidden channels of F in a stage of so many channels."""
    return max(1, round(expansions(network)[stage] * (channels // 2)))


def build(network: Network[Settings], images: Images) -> ReversibleNet:
    """`depth` blocks; see the module's legend."""
    from revtrain.layers import AdditiveCoupling, HiddenChunkCoupling
    from revtrain.models.common import build_reversible, state_format

    own, stream = network.own, state_format(network)

    def block(channels: int, stage: int):
        half = channels // 2
        hidden = hidden_channels(network, stage, channels)
        if own.norm == "input":
            f, g = (residual(half, hidden, own.activation) for _ in range(2))
            return [AdditiveCoupling(channels, f, g, scale=own.residual_scale, state_format=stream, channels_last=True)]
        chunk = own.hidden_chunk * channels // network.width
        return [
            HiddenChunkCoupling(channels, hidden, chunk, own.activation, scale=own.residual_scale, state_format=stream)
        ]

    return build_reversible(network, images, block, stream)


def memory(network: Network[Settings], images: Images) -> list[Module]:
    """The closed form (not in the paper): two states and scratch. Symbols: memory.formulas, and

        e   expansion: hidden channels per channel of a half
        k   hidden channels alive at a time (norm=hidden)

    With norm=input everything inside F is alive for one chunk of the batch only; with norm=hidden a chunk of hidden
    channels is, for the whole batch.
    """
    symbols, own, equation = Symbols(network), network.own, "not in the paper"
    a, g, s, v = symbols.a, symbols.g, symbols.s, symbols.v
    tensors = 1 if own.activation == "relu" else 2  # ReLU's output is conv 2's input, too

    def norm_at_input(stage: Stage, of_state: Term) -> Unit:
        half, h, hidden = stage.channels // 2, stage.half, hidden_channels(network, stage.index, stage.channels)
        e, values = hidden / half, symbols.chunk_bytes / FLOAT
        inside = FLOAT + symbols.cast(FLOAT) + tensors * e * a  # BN, conv 1, conv 2
        taken_off = values * (inside + a) + scratch_of_sum(symbols, values, a)
        backward = values * (inside + 2 * e * a + a * (symbols.scaled or g != a))
        return Unit(
            parameters=4 * convolution(half, hidden) + 2 * hidden + 4 * half,  # conv 1 has a bias
            buffer_bytes=statistics_bytes(2 * half, torch_norms=2, counters=symbols.on_grid),
            rebuilt=(Work("backward", (of_state, scratch(max(taken_off, backward)))),),
            stored=both_functions(
                "inputs of BN, conv 1 and conv 2", f"h (v + a + {tensors} e a)", h * (v + a + tensors * e * a)
            ),
            storing=(sum_of_coupling(symbols, stage, a, y1_is_saved=False),),
        )

    def norm_inside(stage: Stage, of_state: Term) -> Unit:
        half, h, hidden = stage.channels // 2, stage.half, hidden_channels(network, stage.index, stage.channels)
        e, values = hidden / half, symbols.chunk_bytes / s
        chunk = min(own.hidden_chunk * stage.channels // network.width, hidden)
        k = chunk * stage.values / stage.channels
        inside = (
            local("inside F: z of a chunk of hidden channels", equation, "k a", k * a),
            gradient("inside F: its gradient", equation, "k a", k * a),
            scratch(scratch_of_sum(symbols, values, a) + values * a * (1 + 2 * k / h)),
        )
        return Unit(
            parameters=4 * convolution(half, hidden) + 4 * hidden,
            buffer_bytes=statistics_bytes(2 * hidden, torch_norms=2, counters=symbols.on_grid),
            rebuilt=(Work("backward", (of_state, *inside)),),
            stored=both_functions(
                "inputs of F and G, of BN and conv 2", f"h a (1 + {tensors + 1} e)", h * a * (1 + (tensors + 1) * e)
            ),
            storing=(sum_of_coupling(symbols, stage, a, y1_is_saved=not symbols.cast(v)),),
        )

    unit = norm_inside if own.norm == "hidden" else norm_at_input
    return invertible_trunk(symbols, *images, units_of_stages(network), unit, equation)


def advise(network: Network[Settings]) -> list[str]:
    """Only the sums of coupling blocks can be off."""
    return advise_on_couplings(network.own)
