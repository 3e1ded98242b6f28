"""What the closed forms of several networks share: their symbols, their stages, and what common blocks store and need.

Symbols of the formulas, per input pixel (bytes / (batch * height * width)):

    c     width: channels at full resolution
    E_t   values of one activation of stage t: channels * sub-images / 4^t. Both invertible poolings keep E = c;
          striding doubles the channels on a quarter of the pixels: E_t = c / 2^t
    h     E / 2, one half of a coupling
    a     bytes of a value that a convolution computes, and of the images: 4, or 2 where precision is 16 bit
    s, g  bytes of a value of a chain's state, and of its gradient (core.state_format): 4 and 4 in floating point,
          2 and a in int16
    v     bytes of a value between two blocks where autograd stores

A network that needs more of them says so in its own file. See `revtrain.memory.closed_form` for what a module is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from revtrain.config import CouplingSettings, ImageSize, InvertibleSettings, Network
from revtrain.memory.closed_form import (
    CONVOLUTION_BYTES,
    EQ_STORED,
    EQ_TOTAL,
    FLOAT,
    Bottleneck,
    Module,
    Term,
    Work,
)

COUNTER_BYTES = 8


# ---------------------------------------------------------------- terms


def per_pixel(name: str, equation: str, formula: str, nbytes: float, bottleneck: Bottleneck = "global") -> Term:
    """Activations that are kept over the pass."""
    return Term(name, equation, formula, "activation", bottleneck, nbytes)


def local(name: str, equation: str, formula: str, nbytes: float) -> Term:
    """Activations that are alive inside one module only."""
    return per_pixel(name, equation, formula, nbytes, "local")


def gradient(name: str, equation: str, formula: str, nbytes: float, bottleneck: Bottleneck = "local") -> Term:
    """The gradient of an activation."""
    return Term(name, equation, formula, "gradient", bottleneck, nbytes)


def scratch(nbytes: float) -> Term:
    """Temporaries of a pass over batch chunks: bounded by `chunk_mib` each, whatever the batch."""
    return Term("scratch of a chunk", EQ_TOTAL, "a few times chunk_mib", "activation", "local", bytes=int(nbytes))


# ---------------------------------------------------------------- the symbols


@dataclass(frozen=True)
class Symbols:
    """The symbols of the formulas, of one network: see the docstring of this module."""

    network: Network[Any]

    @property
    def stream(self) -> str:
        """The number format of the coupling blocks' states, one of `revtrain.config.schema.STATE_FORMATS`."""
        own = self.network.own
        return own.state_format(self.network.precision) if isinstance(own, CouplingSettings) else "plain"

    @property
    def inverts(self) -> bool:
        return self.network.backward == "invert"

    @property
    def on_grid(self) -> bool:
        """Whether states are on a grid. Chains and couplings then count what leaves its range."""
        return self.stream != "plain"

    @property
    def is_integer(self) -> bool:
        return self.stream.startswith("int")

    @property
    def c(self) -> int:
        return self.network.width

    @property
    def a(self) -> int:
        return CONVOLUTION_BYTES[self.network.precision]

    @property
    def s(self) -> int:
        return 2 if self.stream == "int16" else FLOAT

    @property
    def g(self) -> int:
        return self.a if self.is_integer else FLOAT

    @property
    def v(self) -> int:
        # The statistics of an invertible BN and the grid of a coupling are in float32.
        return FLOAT if isinstance(self.network.own, InvertibleSettings) or self.on_grid else self.a

    @property
    def scaled(self) -> bool:
        """Whether coupling blocks multiply what they add."""
        own = self.network.own
        return isinstance(own, CouplingSettings) and own.residual_scale != 1

    @property
    def chunk_bytes(self) -> int:
        """Bytes that a temporary may have."""
        return int(self.network.piece_mib() * 2**20)

    def cast(self, value_bytes: int) -> int:
        """Bytes of a value copied into the precision of convolutions: none where it is that already."""
        return self.a if value_bytes != self.a else 0


@dataclass(frozen=True)
class Stage:
    """What lies between two poolings."""

    index: int  # from 0
    channels: int
    values: float  # E, per input pixel
    units: int

    @property
    def half(self) -> float:
        return self.values / 2


def stages(network: Network[Any], units: Iterable[int]) -> list[Stage]:
    """The stages of a network, with so many units each."""
    channels, values, found = network.width, float(network.width), []
    for index, count in enumerate(units):
        if index > 0:
            kind = network.pooling[index - 1]
            channels *= {"channel": 4, "batch": 1, "stride": 2}[kind]
            values *= {"channel": 1, "batch": 1, "stride": 0.5}[kind]
        found.append(Stage(index, channels, values, count))
    return found


# ---------------------------------------------------------------- parameters and buffers


def convolution(channels_in: int, channels_out: int, kernel_size: int = 3) -> int:
    """Parameters of a convolution without bias."""
    return kernel_size**2 * channels_in * channels_out


def linear(channels: int, classes: int) -> int:
    """Parameters of a linear layer with bias."""
    return (channels + 1) * classes


def statistics_bytes(channels: int, torch_norms: int = 0, counters: int = 0) -> int:
    """Running mean and variance of so many channels; torch's own norms count their batches, grids their overflows."""
    return 2 * channels * FLOAT + (torch_norms + counters) * COUNTER_BYTES


def invertible_layers_bytes(own: InvertibleSettings, channels: int, convolutions: int) -> int:
    """Buffers of a chain of coupling convolutions and BNs: directions of the former, so many channels each, where
    their gain is bounded, and signs of the latter, a byte each."""
    from revtrain.layers.bounded import PROBE_SIDE

    bounds = convolutions * channels * PROBE_SIDE**2 * FLOAT if own.max_gain is not None else 0
    return bounds + (convolutions * channels if own.norm_sign == "mixed" else 0)


# ---------------------------------------------------------------- temporaries of a chunk


def scratch_of_sum(symbols: Symbols, values: float, result_bytes: int) -> float:
    """What it takes to add so many values of a result, `result_bytes` each, to a state."""
    if not symbols.on_grid:
        return 0.0
    steps = FLOAT * (1 + symbols.scaled + (result_bytes != FLOAT))  # in float32, scaled, on the grid
    if symbols.is_integer:
        steps += 2 * symbols.s + 2  # the sum in twice the bits; two masks
    return values * steps


def scratch_of_convolution(symbols: Symbols, reads: int, channels: int) -> float:
    """A coupling convolution over a chunk of values of `reads` bytes: its input, also in 16 bit, gradients, and that
    of the weights."""
    a, values = symbols.a, symbols.chunk_bytes / reads
    widened = (a + FLOAT) * (symbols.g != a)
    return values * (reads + symbols.cast(reads) + a + widened) + FLOAT * convolution(channels, channels)


def scratch_of_last_convolution(symbols: Symbols, reads: int, channels: int) -> float:
    """The same, differentiated from its own input: what F and G read stays alive while the second sum is taken off."""
    values = symbols.chunk_bytes / reads
    leaves = 2 * values * (reads + symbols.cast(reads))
    taken_off = values * reads + scratch_of_sum(symbols, values, reads)
    return leaves + max(taken_off, scratch_of_convolution(symbols, reads, channels))


# ---------------------------------------------------------------- under ordinary autograd


def both_functions(what: str, formula: str, nbytes: float) -> Term:
    """What F and G of a unit store, `nbytes` each."""
    return per_pixel(what, EQ_STORED, f"2 {formula}", 2 * nbytes)


def sum_of_coupling(symbols: Symbols, stage: Stage, result_bytes: int, y1_is_saved: bool) -> Work:
    """What lives while a block adds G's output, `result_bytes` a value, to its half.

    Args:
        y1_is_saved: by G, as its input; otherwise it is alive until the block ends all the same.
    """
    h, v = stage.half, symbols.v
    if not symbols.on_grid:
        terms = [local("the sum: x, y2, and the two halves joined", EQ_STORED, "5 h v", 5 * h * v)]
    else:
        copies = 5 + (symbols.scaled or result_bytes != v)  # x; G's output, scaled or widened; three steps of rounding
        formula, nbytes = f"{copies} h v + h r, r the bytes of G's output", h * (copies * v + result_bytes)
        terms = [local("the sum: x, G's output, scaled and rounded", EQ_STORED, formula, nbytes)]
    if not y1_is_saved:
        terms.append(local("the sum: y1, which G does not save", EQ_STORED, "h v", h * v))
    return Work("forward", tuple(terms))


def end_of_residual_block(before: Stage, value_bytes: int) -> Work:
    """At the end of a residual block's backward pass: two gradients of its input, and their sum."""
    name, formula = "gradients of a block's input, two and their sum", f"3 E_{before.index} a"
    return Work("backward", (gradient(name, EQ_STORED, formula, 3 * before.values * value_bytes),), ends=True)


# ---------------------------------------------------------------- F = 2 x [BN, ReLU, conv] (models.common.preactivated)


def preactivated_parameters(channels: int) -> int:
    """Of F and G on half of so many channels: two convolutions and two BNs each."""
    return 4 * convolution(channels // 2, channels // 2) + 4 * channels


def preactivated_stored(symbols: Symbols, stage: Stage) -> Term:
    """Inputs of BN 1, ReLU 1, BN 2, ReLU 2; those of the convolutions are the same where nothing is cast."""
    a, v = symbols.a, symbols.v
    nbytes = stage.half * (2 * v + 2 * a + symbols.cast(v))
    return both_functions("inputs of BNs and convolutions of F and G", "h (2 v + 2 a + [v > a: a])", nbytes)


def preactivated_storing(symbols: Symbols, stage: Stage) -> tuple[Work, Work]:
    """Where autograd stores: the sum, and the gradient of conv 1 of F, the first module of a block."""
    a, v, h = symbols.a, symbols.v, stage.half
    inside = v if symbols.cast(v) else 2 * a
    terms = (
        local("inputs of BN 1 and ReLU 1 of F", EQ_STORED, "2 h v", 2 * h * v),
        gradient("gradients of both halves, of conv 1's input and output", EQ_STORED, "3 h v + 2 h a, 16 bit: 4 h v",
                 h * (3 * v + inside)),
    )  # fmt: skip
    return sum_of_coupling(symbols, stage, a, y1_is_saved=True), Work("backward", terms, ends=True)


def preactivated_rebuilt(
    symbols: Symbols, stage: Stage, equation: str, gradients: tuple[Term, ...]
) -> tuple[Work, Work, Work]:
    """What autograd holds of one F that is recomputed and differentiated at once, besides `gradients`."""
    a, h = symbols.a, stage.half
    cast = symbols.cast(FLOAT)
    inside = [local("inside F: BN 1, conv 1, BN 2 and conv 2", equation, "h (8 + 2 a)", h * (8 + 2 * a))]
    if cast:
        inside.append(local("inside F: conv 1's input in 16 bit", equation, "h a", h * a))
    # forward: conv 1 at work, or BN 2
    passing = (local("inside F: its input, BN 1 and conv 1", equation, "12 h", h * (8 + a + cast)),)
    taken_off = (
        *inside,
        local("inside F: its output", equation, "h a", h * a),
        scratch(scratch_of_sum(symbols, symbols.chunk_bytes / a, a)),
    )
    backward = [*inside, gradient("inside F: gradients of conv 2 and of ReLU 2", equation, "2 h a", 2 * h * a)]
    if symbols.scaled or symbols.g != a:
        backward.append(gradient("inside F: gradient times scale, or in 16 bit", equation, "h a", h * a))
    return (
        Work("forward", passing),
        Work("backward", (*gradients, *taken_off)),
        Work("backward", (*gradients, *backward)),
    )


# ---------------------------------------------------------------- fully invertible trunks (models.common)


@dataclass(frozen=True)
class Unit:
    """One repeated unit of a fully invertible trunk."""

    parameters: int
    buffer_bytes: int
    rebuilt: tuple[Work, ...]  # backward=invert: what is alive besides the state while the unit is walked back
    stored: Term  # backward=store: what autograd keeps of it
    storing: tuple[Work, ...]  # backward=store: what is alive while it is at work


def stem(symbols: Symbols, counters: int = 0) -> Module:
    """A convolution of the images; its output is held by its caller until the forward pass ends."""
    c, a = symbols.c, symbols.a
    held = per_pixel("output of the stem, held by its caller", EQ_TOTAL, "c a", c * a, None)
    return Module("stem", 0, convolution(3, c), counters * COUNTER_BYTES, held=(held,))


def invertible_trunk(
    symbols: Symbols,
    classes: int,
    image_size: int | Sequence[int],
    units: Iterable[int],
    make_unit: Callable[[Stage, Term], Unit],
    equation: str,
    unit_name: str = "block",
    normalise_last: bool = True,
) -> list[Module]:
    """The modules of a fully invertible network, as `models.common.build_reversible` builds them.

    Args:
        units: how many each stage has.
        make_unit: (stage, gradient of the trunk's state) -> a unit; that gradient is alive while it is walked back.
        equation: of the paper, for the trunk's state.
        normalise_last: whether a BN and a LeakyReLU come before the mean over pixels.
    """
    network, c = symbols.network, float(symbols.c)
    state = per_pixel("state of the trunk", equation, "c s", c * symbols.s)
    of_state = gradient("gradient of the state", equation, "c g", c * symbols.g, None)
    plain = (Work("backward", (of_state,)),)  # a pass that needs nothing else
    modules, row = [stem(symbols, counters=symbols.on_grid)], stages(network, units)
    for stage in row:
        t = stage.index
        if t > 0:
            name = f"{network.pooling[t - 1]} pooling {t}"
            # a permutation: autograd keeps nothing of it
            modules.append(Module(name, t, stored=(state,), work=plain) if symbols.inverts else Module(name, t))
        for count in range(stage.units):
            name, unit = f"stage {t + 1}, {unit_name} {count + 1}", make_unit(stage, of_state)
            stored = state if symbols.inverts else replace(unit.stored, name=f"{name}: {unit.stored.name}")
            work = unit.rebuilt if symbols.inverts else unit.storing
            modules.append(
                Module(name, t, unit.parameters, unit.buffer_bytes, (stored,), work, by_autograd=not symbols.inverts)
            )
    last = row[-1]
    parameters = linear(last.channels, classes) + 2 * last.channels * normalise_last
    buffers = statistics_bytes(last.channels, 1) if normalise_last else 0
    if symbols.inverts:
        readout = Module("readout", last.index, parameters, buffers, (state,), work=plain, by_autograd=False)
    else:
        kept, at_work = _stored_readout(symbols, last, image_size, normalise_last)
        readout = Module("readout", last.index, parameters, buffers, kept, work=at_work)
    return [*modules, readout]


def _stored_readout(
    symbols: Symbols, last: Stage, image_size: int | Sequence[int], normalise: bool
) -> tuple[tuple[Term, ...], tuple[Work, ...]]:
    """What the readout stores and needs under ordinary autograd."""
    values, v = last.values, symbols.v
    pooled = values * 4**last.index / ImageSize.of(image_size).pixels
    if not normalise:
        means = local("pooled features, their sum and their mean", EQ_STORED, "8 C S / (H W)", 2 * pooled * FLOAT)
        return (), (Work("forward", (means,)),)
    sums = local("pooled features", EQ_STORED, "4 C S / (H W)", pooled * FLOAT)
    normalised = local("output of BN in float32", EQ_STORED, "4 c", values * FLOAT)
    activated = local("output of LeakyReLU", EQ_STORED, "c v", values * v)
    stored = per_pixel("inputs of BN and LeakyReLU", EQ_STORED, "2 c v", 2 * values * v)
    return (stored,), (Work("forward", (normalised,)), Work("forward", (sums, activated)))
