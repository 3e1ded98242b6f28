"""A reversible U-Net: a class for every pixel, in one invertible chain whose skips cost nothing.

Legend: B batch, c = width, L levels below the first, one for each pooling, N = depth blocks in all, spread over the
2 L + 1 places in the order that data meet them: the ways down, the lowest level, the ways up; s = residual_scale,
n = slope.

    images (B, 3, H, W)
      stem      conv 3x3                               (B, c, H, W)
      trunk     level 0
      head      BN, LeakyReLU, conv 1x1                (B, classes, H, W)

    level l     blocks                                 (B, 2^l c, H / 2^l, W / 2^l)
                half of the channels:                  the other half passes, as a skip does
                  channel pooling
                  level l + 1                          (B, 2^(l+1) c, H / 2^(l+1), W / 2^(l+1))
                  channel unpooling
                blocks
    level L     blocks only

    level 0  o-- blocks -----------------------------------------------------> blocks --> head
                     \\ pooling                                    unpooling /
    level 1           o-- blocks ----------------------------------> blocks
                              \\ pooling                 unpooling /
    level 2                    o--------- blocks ----------------o

    block    y1 = x1 + s F(x2), y2 = x2 + s G(y1)
    F, G     BN, LeakyReLU, conv 3x3, LeakyReLU, conv 3x3, on half of the channels and over pieces of the batch

Given labels as well, the network returns the loss of each image, (B,), and makes no logits of full size. Alive in the
backward pass: the two states of level 0, 2c values a pixel, the images, the labels, and scratch of one piece. States of
lower levels lie inside of those, so that neither depth nor the number of levels adds anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from revtrain.config import CouplingSettings, Network, typed
from revtrain.errors import RevtrainError
from revtrain.memory.closed_form import EQ_STORED, EQ_TOTAL, FLOAT, Module, Term, Work
from revtrain.memory.formulas import (
    COUNTER_BYTES,
    Stage,
    Symbols,
    both_functions,
    convolution,
    gradient,
    linear,
    local,
    per_pixel,
    scratch,
    scratch_of_sum,
    statistics_bytes,
    stem,
    sum_of_coupling,
)
from revtrain.models import Images, Traits, advise_on_couplings, spread_depth

if TYPE_CHECKING:
    from revtrain.core.layer import InvertibleLayer
    from revtrain.layers import PreNorm
    from revtrain.models.common import ReversibleNet

TRAITS = Traits(task="segment")


@dataclass
class Settings(CouplingSettings):
    """Coupling blocks of ordinary functions."""


def residual(channels: int, slope: float) -> PreNorm:
    """BN, 2 x [LeakyReLU, conv 3x3]: (B, channels, H, W) -> the same shape."""
    from torch import nn

    from revtrain.layers import PreNorm
    from revtrain.models.common import conv3x3

    first, second = (conv3x3(channels, channels) for _ in range(2))
    return PreNorm(channels, nn.Sequential(nn.LeakyReLU(slope), first, nn.LeakyReLU(slope, inplace=True), second))


def build(network: Network[Settings], images: Images) -> ReversibleNet:
    """`depth` reversible blocks on `len(pooling) + 1` levels; see the module's legend.

    Returns:
        A module: `model(images)` are the logits (B, classes, H, W), `model(images, labels)` the mean cross-entropy over
        the pixels of each image, (B,); labels (B, H, W) of any type of whole numbers, 255 for pixels that do not count.

    Raises `RevtrainError` for an odd width, poolings other than into channels, or image sizes that these cannot halve.
    """
    from revtrain.core.chain import InvertibleChain
    from revtrain.layers import (
        AdditiveCoupling,
        ChannelPooling,
        ChannelUnpooling,
        DenseHead,
        PartialChain,
        Stem,
        check_pooling,
    )
    from revtrain.models.common import ReversibleNet, state_format

    if any(kind != "channel" for kind in network.pooling):
        raise RevtrainError(
            f"pooling={typed(network.pooling)} does not fit arch=unet, whose way up undoes what its way down did.\n"
            "Expected only channel entries, one for each level below the first, e.g. pooling=[channel,channel]."
        )
    check_pooling(network.pooling, images.size)
    places, numbers = blocks_of_places(network), state_format(network)

    def blocks(channels: int, count: int) -> list[InvertibleLayer]:
        return [
            AdditiveCoupling(
                channels,
                residual(channels // 2, network.slope),
                residual(channels // 2, network.slope),
                scale=network.own.residual_scale,
                state_format=numbers,
                channels_last=True,
            )
            for _ in range(count)
        ]

    def level(index: int) -> list[InvertibleLayer]:
        channels = network.width * 2**index
        down = blocks(channels, places[index])
        if index == len(network.pooling):
            return down
        below = [ChannelPooling(), *level(index + 1), ChannelUnpooling()]
        return [*down, PartialChain(channels, below, numbers), *blocks(channels, places[-1 - index])]

    head = DenseHead(network.width, images.classes, network.slope)
    trunk = InvertibleChain(level(0), backward=network.backward, state_format=numbers, head=head)
    return ReversibleNet(Stem(3, network.width, 3, padding=1, bias=False), trunk)


def blocks_of_places(network: Network[Settings]) -> list[int]:
    """How many blocks each place has: the ways down, the lowest level, the ways up."""
    return spread_depth(network.depth, 2 * len(network.pooling) + 1)


def memory(network: Network[Settings], images: Images) -> list[Module]:
    """The closed form (not in the paper): two states, scratch, and a byte for the label of each pixel.

    Symbols: memory.formulas, and

        E_l   values of a state of level l: c / 2^l, since half of the channels pass each level by
        K     classes

    Where autograd stores, the last block or the head decides: logits, log-softmax and labels in int64, of all pixels.
    """
    symbols, equation = Symbols(network), "not in the paper"
    places, lowest = blocks_of_places(network), len(network.pooling)
    s, g, v, c = symbols.s, symbols.g, symbols.v, float(symbols.c)
    state = per_pixel("state of the trunk", equation, "c s", c * s)
    of_state = gradient("gradient of the state", equation, "c g", c * g, None)
    levels = [Stage(index, network.width * 2**index, c / 2**index, 0) for index in range(lowest + 1)]

    def row_of(place: int) -> list[Module]:
        level = levels[min(place, 2 * lowest - place)]
        return [
            _block(symbols, level, f"level {level.index}, {_way(place, lowest)}, block {count + 1}", state, of_state)
            for count in range(places[place])
        ]

    def crossing(above: Stage, name: str, buffer_bytes: int = 0, ends: bool = False) -> Module:
        """A pooling or an unpooling of the second half of a level's state."""
        if symbols.inverts:
            return Module(name, above.index, 0, buffer_bytes, (state,), (Work("backward", (of_state,)),))
        E = above.values
        joined = local("the state of a level, its second half, both joined", EQ_STORED, "2.5 E_l v", 2.5 * E * v)
        return Module(name, above.index, 0, buffer_bytes, work=(Work("forward", (joined,) if ends else ()),))

    # a byte each; the 8 bytes an image that every closed form counts for its label weigh next to nothing beside them
    first = stem(symbols, counters=symbols.on_grid)
    labels = per_pixel("labels of the pixels", EQ_TOTAL, "1", 1)
    modules = [replace(first, stored=(labels,)), *row_of(0)]
    for place in range(1, 2 * lowest + 1):
        above = levels[min(place - 1, 2 * lowest - place)]
        if place <= lowest:
            modules.append(crossing(above, f"pooling {place}", COUNTER_BYTES * symbols.on_grid))  # of a chain inside
        else:
            modules.append(crossing(above, f"unpooling {2 * lowest - place + 1}", ends=True))
        modules += row_of(place)
    return [*modules, _head(symbols, images.classes, state, of_state)]


def _way(place: int, lowest: int) -> str:
    return "lowest" if place == lowest else "down" if place < lowest else "up"


def _block(symbols: Symbols, level: Stage, name: str, state: Term, of_state: Term) -> Module:
    a, v, h, half = symbols.a, symbols.v, level.half, level.channels // 2
    parameters = 4 * convolution(half, half) + 4 * half
    buffers = statistics_bytes(2 * half, torch_norms=2, counters=symbols.on_grid)
    if symbols.inverts:
        values = symbols.chunk_bytes / FLOAT
        inside = FLOAT + 2 * a  # inputs of LeakyReLU 1, conv 1 and conv 2
        taken_off = values * (inside + a) + scratch_of_sum(symbols, values, a)
        backward = values * (inside + 2 * a + a * (symbols.scaled or symbols.g != a))
        work = Work("backward", (of_state, scratch(max(taken_off, backward))))
        return Module(name, level.index, parameters, buffers, (state,), (work,), by_autograd=False)
    nbytes = h * (2 * v + 2 * a)
    stored = both_functions("inputs of BN, LeakyReLU 1, conv 1 and conv 2", "h (2 v + 2 a)", nbytes)
    stored = replace(stored, name=f"{name}: {stored.name}")
    at_sum = sum_of_coupling(symbols, level, a, y1_is_saved=False)
    if level.index:
        above = sum(symbols.c / 2**index for index in range(level.index))
        held = local("states of the levels above", EQ_STORED, "(E_0 + ... + E_l-1) v", above * v)
        at_sum = replace(at_sum, terms=(*at_sum.terms, held))
    return Module(name, level.index, parameters, buffers, (stored,), (at_sum,))


def _head(symbols: Symbols, classes: int, state: Term, of_state: Term) -> Module:
    a, v, c, K = symbols.a, symbols.v, symbols.c, classes
    parameters, buffers = linear(c, K) + 2 * c, statistics_bytes(c, 1) + COUNTER_BYTES * K**2
    if symbols.inverts:
        # of BN, LeakyReLU and the loss: log-softmax, its gradient, that of logits; or gradients of the first two
        inside = symbols.chunk_bytes / FLOAT * max(FLOAT + a + 3 * K * FLOAT / c, 3 * FLOAT)
        work = (Work("forward", (scratch(inside),)), Work("backward", (of_state, scratch(inside))))
        return Module("head", 0, parameters, buffers, (state,), work, by_autograd=False)
    cast = "" if a == FLOAT else " + 4 K"
    logits = K * (a + symbols.cast(FLOAT) // a * FLOAT)
    stored = per_pixel("head: inputs of BN, LeakyReLU and conv", EQ_STORED, "c (2 v + a)", c * (2 * v + a))
    counted = local("labels in int64, logits, and what counts hits", EQ_STORED, f"33 + K a{cast}", 33 + logits)
    lost = local(
        "labels in int64, logits, log-softmax, loss, hits", EQ_STORED, f"21 + K a + 4 K{cast}", 21 + logits + 4 * K
    )
    begun = gradient("log-softmax, its gradient, that of logits", EQ_STORED, "12 K", 12 * K)
    of_conv = gradient("gradients of the head's conv", EQ_STORED, "(K + c) a", (K + c) * a)
    what = "gradients of the head's LeakyReLU, less the conv's input"
    of_activation = gradient(what, EQ_STORED, "c (2 v - a)", c * (2 * v - a))
    forward = [Work("forward", (each,)) for each in (counted, lost)]
    backward = [Work("backward", (each,)) for each in (begun, of_conv, of_activation)]
    return Module("head", 0, parameters, buffers, (stored,), (*forward, *backward))


def advise(network: Network[Settings]) -> list[str]:
    """Only the sums of coupling blocks can be off."""
    return advise_on_couplings(network.own)
