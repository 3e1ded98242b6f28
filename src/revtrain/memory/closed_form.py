"""Memory of a training step in closed form, term by term: formulas of the configuration, nothing is run.

A training step needs M = M_theta + M_z + M_g (Eq. 5). The draft of arXiv 1910.11127 sums the outputs of layers;
what autograd keeps are the *inputs* of layers, and the parameters' gradients and momentum belong into M as well
(see docs/paper.md). Both are so here.

Symbols of the formulas, per input pixel (bytes / (batch * height * width)):

    c     width: channels at full resolution
    E_t   values of one activation of stage t: channels * sub-images / 4^t. Both invertible poolings keep E = c;
          striding doubles the channels on a quarter of the pixels: E_t = c / 2^t
    h     E / 2, one half of a coupling
    e     expansion (chunked): hidden channels per channel of a half
    k     hidden channels alive at a time (chunked, norm=hidden)
    a     bytes of a value that a convolution computes, and of the images: 4, or 2 where precision is 16 bit
    s, g  bytes of a value of a chain's state, and of its gradient (core.state_format): 4 and 4 in floating point,
          2 and a in int16
    v     bytes of a value between two blocks where autograd stores

A network is a row of modules. Each *stores* terms from its forward pass to its backward pass (added up: the global
bottleneck) and has terms alive only while it is *at work*, forward or backward (the largest: the local bottleneck).
The memory at a moment is what all modules up to there store, and what the one at work needs for itself.

Per-pixel terms hold for large batches. In small ones the weights' gradients, or the temporaries of a chunk, decide
which moment peaks; `peak_bytes` follows that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from revtrain.config import flat, read
from revtrain.core.pieces import MIB
from revtrain.core.state_format import PLAIN, StateFormat
from revtrain.errors import RevtrainError
from revtrain.layers.bounded import PROBE_SIDE
from revtrain.machine.device import DTYPES
from revtrain.models.chunked import expansions
from revtrain.models.common import spread_depth, state_format
from revtrain.models.hybrid import UNITS_PER_FUNCTION
from revtrain.models.resnet18 import BLOCKS

# Which of the paper's equations a term belongs to. Within a network's own range the draft does not always keep
# activations, local activations and gradients apart, so a term carries the range.
EQ_TOTAL = "Eq. 5"
EQ_STORED = "Eqs. 6, 7"  # a storing network: ResNet-18, and backward=store of any other
EQ_REVNET_GLOBAL, EQ_REVNET_LOCAL = "Eq. 9", "Eqs. 10, 11"
EQ_IREVNET = "Eqs. 12, 13"
EQ_LAYERWISE = "Eq. 30"
EQ_HYBRID = "section 4.2"
EQ_CHUNKED = "not in the paper"

FLOAT = 4  # bytes of statistics, parameters and their gradients in every precision
LABEL_BYTES, COUNTER_BYTES = 8, 8

Kind = Literal["theta", "activation", "gradient", "optimizer"]
Bottleneck = Literal["global", "local"] | None
Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Term:
    """One summand of the memory of a step: `bytes_per_pixel` for each input pixel, and `bytes` once."""

    name: str
    equation: str  # of arXiv 1910.11127
    formula: str  # in the symbols of this module
    kind: Kind
    bottleneck: Bottleneck = None  # global: kept over the pass; local: inside one module; None: neither
    bytes_per_pixel: float = 0.0
    bytes: int = 0


@dataclass(frozen=True)
class Work:
    """A module at work: what is alive only then."""

    phase: Phase
    terms: tuple[Term, ...] = ()
    ends: bool = False  # the end of a backward pass: what the module had stored is gone


@dataclass(frozen=True)
class Module:
    """A box of the memory diagram. Terms of one name in several modules are one buffer, counted once."""

    name: str
    stage: int  # from 0
    parameters: int = 0
    buffer_bytes: int = 0  # running statistics and counters
    stored: tuple[Term, ...] = ()  # from its forward to its backward pass
    work: tuple[Work, ...] = (Work("forward"),)
    by_autograd: bool = True  # which keeps the 16-bit copies of weights that autocast makes


@dataclass(frozen=True)
class Moment:
    """A time of the step at which memory may peak: everything that is alive then."""

    phase: Phase
    module: int  # index of the module at work
    name: str
    terms: tuple[Term, ...]

    @property
    def bytes_per_pixel(self) -> float:
        return sum(term.bytes_per_pixel for term in self.terms)

    @property
    def fixed_bytes(self) -> int:
        return sum(term.bytes for term in self.terms)


@dataclass(frozen=True)
class MemoryModel:
    """The closed forms of one configuration; see `analytic_memory`."""

    arch: str
    backward: str
    modules: tuple[Module, ...]
    moments: tuple[Moment, ...]

    @property
    def parameters(self) -> int:
        return sum(module.parameters for module in self.modules)

    @property
    def peak(self) -> Moment:
        """The moment of the most bytes per pixel: the peak of a large batch."""
        return max(self.moments, key=lambda moment: moment.bytes_per_pixel)

    @property
    def terms(self) -> tuple[Term, ...]:
        """Everything alive at the peak."""
        return self.peak.terms

    @property
    def bytes_per_pixel(self) -> float:
        """Activations and their gradients at the peak, per input pixel."""
        return self.peak.bytes_per_pixel

    def of(self, *, kind: Kind | None = None, bottleneck: Bottleneck = None) -> float:
        """Bytes per pixel at the peak of the terms of that kind, or of that bottleneck, or both."""
        return sum(
            term.bytes_per_pixel
            for term in self.terms
            if (kind is None or term.kind == kind) and (bottleneck is None or term.bottleneck == bottleneck)
        )

    def fixed_of(self, kind: Kind) -> int:
        """Bytes at the peak that do not grow with the batch, of one kind."""
        return sum(term.bytes for term in self.terms if term.kind == kind)

    def peak_bytes(self, batch: int, image_size: int) -> int:
        """Most bytes alive in forward and backward of `batch` images of `image_size` pixels a side."""
        pixels = batch * image_size**2
        return max(moment.fixed_bytes + round(moment.bytes_per_pixel * pixels) for moment in self.moments)


@dataclass(frozen=True)
class _Stage:
    index: int
    channels: int
    values: float  # E, per input pixel
    units: int

    @property
    def half(self) -> float:
        return self.values / 2


@dataclass(frozen=True)
class _Setting:
    """What all builders need of the configuration; the symbols of the module's docstring."""

    cfg: Any
    classes: int
    pixels: int  # of one image
    stream: StateFormat

    @property
    def inverts(self) -> bool:
        return self.cfg.backward == "invert" and self.cfg.arch != "resnet18"

    @property
    def a(self) -> int:
        return DTYPES[self.cfg.precision].itemsize

    @property
    def s(self) -> int:
        return self.stream.dtype.itemsize if self.stream.is_integer else FLOAT

    @property
    def counts(self) -> bool:
        """Whether chains and couplings count what leaves the range of their grid."""
        return self.stream.bits is not None

    @property
    def g(self) -> int:
        return self.a if self.stream.is_integer else FLOAT

    @property
    def v(self) -> int:
        # The statistics of an invertible BN and the grid of a coupling are in float32.
        widened = self.cfg.arch in ("layerwise", "hybrid") or self.stream.bits is not None
        return FLOAT if widened else self.a

    @property
    def scaled(self) -> bool:
        return getattr(self.cfg, "residual_scale", 1) != 1

    @property
    def chunk(self) -> int:
        """Bytes that a temporary may have."""
        return int(self.cfg.chunk_mib * MIB)

    def cast(self, values_bytes: int) -> int:
        """Bytes of a value copied into the precision of convolutions: none where it is that already."""
        return self.a if values_bytes != self.a else 0


def analytic_memory(cfg: Any, classes: int = 10, image_size: int = 32) -> MemoryModel:
    """The memory of one training step of `cfg`, term by term.

    Args:
        cfg: the composed configuration, as `build_model` takes it.
        classes: of the head.
        image_size: side of the images in pixels.

    Raises `RevtrainError` for an architecture without closed forms here.
    """
    config = read(cfg)
    cfg = SimpleNamespace(**flat(config), network=config.network)
    builders = {"resnet18": _resnet18, "revnet": _revnet} | dict.fromkeys(_BLOCKS, _reversible)
    if cfg.arch not in builders:
        raise RevtrainError(
            f"arch={cfg.arch} has no closed form of its memory.\n"
            f"Expected one of: {', '.join(sorted(builders))}. The prediction with fake tensors serves any network."
        )
    stream = PLAIN if not hasattr(config.network.own, "stream") else state_format(config.network)
    setting = _Setting(cfg, classes, image_size**2, stream)
    modules = tuple(builders[cfg.arch](setting))
    return MemoryModel(cfg.arch, cfg.backward, modules, tuple(_moments(setting, modules)))


# ---------------------------------------------------------------- from modules to moments


def _moments(setting: _Setting, modules: tuple[Module, ...]) -> Iterator[Moment]:
    """One moment for each work of each module."""
    always = [*_always(setting, modules), *_inputs(setting)]
    stem = _pixels("output of the stem, held by its caller", EQ_TOTAL, "c a", setting.cfg.width * setting.a, None)
    for index, module in enumerate(modules):
        gradients = sum(each.parameters for each in modules[index:]) * FLOAT
        backward = Term(
            "gradients of the parameters", EQ_TOTAL, "4 bytes a parameter from here to the head", "gradient",
            None, 0.0, gradients,
        )  # fmt: skip
        copies = setting.cast(FLOAT) * sum(each.parameters for each in modules[: index + 1] if each.by_autograd)
        copied = Term(
            "weights in 16 bit, kept by autograd", EQ_TOTAL, "a bytes a parameter up to here", "activation",
            "global", 0.0, copies,
        )  # fmt: skip
        for work in module.work:
            stored = {term.name: term for each in modules[: index + 1 - work.ends] for term in each.stored}
            terms = [*always, *stored.values(), *work.terms, *([copied] if copies else [])]
            if work.phase == "backward":
                terms.append(backward)
            elif setting.cfg.arch != "resnet18":
                terms.append(stem)
            yield Moment(work.phase, index, f"{work.phase} of {module.name}", tuple(terms))


def _always(setting: _Setting, modules: tuple[Module, ...]) -> list[Term]:
    parameters = sum(module.parameters for module in modules)
    buffers = sum(module.buffer_bytes for module in modules)
    terms = [
        Term("parameters", EQ_TOTAL, "4 bytes a parameter", "theta", "global", 0.0, parameters * FLOAT),
        Term("running statistics", EQ_TOTAL, "8 bytes a BN channel", "theta", "global", 0.0, buffers),
    ]
    if setting.cfg.momentum > 0:
        terms.append(Term("momentum", EQ_TOTAL, "4 bytes a parameter", "optimizer", "global", 0.0, parameters * FLOAT))
    return terms


def _inputs(setting: _Setting) -> list[Term]:
    return [
        _pixels("images", EQ_STORED, "3 a", 3 * setting.a),
        _pixels("labels", EQ_STORED, "8 / (H W)", LABEL_BYTES / setting.pixels),
    ]


def _pixels(name: str, equation: str, formula: str, nbytes: float, bottleneck: Bottleneck = "global") -> Term:
    return Term(name, equation, formula, "activation", bottleneck, nbytes)


def _local(name: str, equation: str, formula: str, nbytes: float) -> Term:
    return _pixels(name, equation, formula, nbytes, "local")


def _gradient(name: str, equation: str, formula: str, nbytes: float, bottleneck: Bottleneck = "local") -> Term:
    return Term(name, equation, formula, "gradient", bottleneck, nbytes)


def _scratch(size: float) -> Term:
    """Temporaries of a pass over batch chunks: bounded by `chunk_mib` each, whatever the batch."""
    return Term("scratch of a chunk", EQ_TOTAL, "a few times chunk_mib", "activation", "local", 0.0, int(size))


def _scratch_of_sum(setting: _Setting, values: float, result: int) -> float:
    """What it takes to add so many values of a result, `result` bytes each, to a state."""
    if setting.stream.bits is None:
        return 0.0
    steps = FLOAT * (1 + setting.scaled + (result != FLOAT))  # in float32, scaled, on the grid
    if setting.stream.is_integer:
        steps += 2 * setting.s + 2  # the sum in twice the bits; two masks
    return values * steps


# ---------------------------------------------------------------- parts that several networks share


def _stages(cfg: Any, units: Iterable[int]) -> list[_Stage]:
    channels, values, stages = cfg.width, float(cfg.width), []
    for index, count in enumerate(units):
        if index > 0:
            kind = cfg.pooling[index - 1]
            channels *= {"channel": 4, "batch": 1, "stride": 2}[kind]
            values *= {"channel": 1, "batch": 1, "stride": 0.5}[kind]
        stages.append(_Stage(index, channels, values, count))
    return stages


def _stem(setting: _Setting) -> Module:
    counter = COUNTER_BYTES if setting.cfg.arch in _BLOCKS and setting.counts else 0  # of the trunk
    return Module("stem", 0, parameters=27 * setting.cfg.width, buffer_bytes=counter)


def _buffers(channels: int, torch_norms: int = 0, counters: int = 0) -> int:
    """Running mean and variance of so many channels; torch's own norms count their batches, grids their overflows."""
    return 2 * channels * FLOAT + (torch_norms + counters) * COUNTER_BYTES


def _linear(setting: _Setting, last: _Stage) -> int:
    return (last.channels + 1) * setting.classes


def _sum(setting: _Setting, stage: _Stage) -> Work:
    """Under ordinary autograd, what lives while a block adds G's output to its half."""
    arch, h, a, v = setting.cfg.arch, stage.half, setting.a, setting.v
    if arch == "layerwise":
        return Work(
            "forward", (_local("BN: its input, and the product before the sum", EQ_STORED, "2 E v", 4 * h * v),)
        )
    if setting.stream.bits is None:
        terms = [_local("the sum: x, y2, and the two halves joined", EQ_STORED, "5 h v", 5 * h * v)]
    else:
        result = v if arch == "hybrid" else a
        copies = 5 + (setting.scaled or result != v)  # x; G's output, scaled or widened; three steps of rounding
        formula = f"{copies} h v + h r, r the bytes of G's output"
        terms = [_local("the sum: x, G's output, scaled and rounded", EQ_STORED, formula, h * (copies * v + result))]
    if arch == "hybrid" or (arch == "chunked" and (setting.cfg.norm == "input" or setting.cast(v))):
        terms.append(_local("the sum: y1, which G does not save", EQ_STORED, "h v", h * v))
    return Work("forward", tuple(terms))


# ---------------------------------------------------------------- the paper's networks


def _resnet18(setting: _Setting) -> list[Module]:
    """ResNet (Figure 1): every convolution and BN stores its input, and nothing is rebuilt."""
    a, c = setting.a, setting.cfg.width
    stages = _stages(setting.cfg, BLOCKS[setting.cfg.depth])
    stored = (
        _pixels("stem: input of BN", EQ_STORED, "c a", c * a),
        _pixels("stem: output", EQ_STORED, "c a", c * a),
    )
    modules = [Module("stem", 0, 27 * c + 2 * c, _buffers(c, 1), stored)]
    before = stages[0]
    for stage in stages:
        big, t = stage.channels, stage.index
        for block in range(stage.units):
            name = f"stage {t + 1}, block {block + 1}"
            terms = [
                _pixels(
                    f"{name}: inputs of conv 2 and of both BNs, output", EQ_STORED, f"4 E_{t} a", 4 * stage.values * a
                )
            ]
            parameters = 9 * before.channels * big + 9 * big * big + 4 * big
            buffers = _buffers(2 * big, 2)
            if before is not stage:
                terms.append(_pixels(f"{name}: input of the shortcut's BN", EQ_STORED, f"E_{t} a", stage.values * a))
                parameters += before.channels * big + 2 * big
                buffers += _buffers(big, 1)
            inside = _gradient(
                "gradients in the last block, less what they have freed", EQ_STORED, f"E_{t} a", stage.values * a
            )
            work = (Work("backward", (inside,)), _end_of_residual(before, a))
            modules.append(Module(name, t, parameters, buffers, tuple(terms), work))
            before = stage
    return [*modules, Module("head", before.index, _linear(setting, before))]


def _end_of_residual(before: _Stage, nbytes: int) -> Work:
    """At the end of a residual block's backward pass: two gradients of its input, and their sum."""
    formula = f"3 E_{before.index} a"
    return Work(
        "backward",
        (_gradient("gradients of a block's input, two and their sum", EQ_STORED, formula, 3 * before.values * nbytes),),
        ends=True,
    )


def _revnet(setting: _Setting) -> list[Module]:
    """RevNet (Figure 3): a chain for each stage, and between them residual blocks that store."""
    cfg, s, g = setting.cfg, setting.s, setting.g
    stages = _stages(cfg, spread_depth(cfg.depth, len(cfg.pooling) + 1))
    modules = [_stem(setting)]
    for stage in stages:
        t, big, values = stage.index, stage.channels, stage.values
        if t > 0:
            modules.append(_down(setting, stages[t - 1], stage))
        state = _pixels(f"output of stage {t + 1}", EQ_REVNET_GLOBAL, f"E_{t} s", values * s)
        for unit in range(stage.units):
            name = f"stage {t + 1}, block {unit + 1}"
            if setting.inverts:
                stored = (state,)
                gradients = (
                    _gradient("gradient of the state", EQ_REVNET_LOCAL, f"E_{t} g", values * g, None),
                    _gradient("the same, as it came from above", EQ_REVNET_LOCAL, f"4 E_{t}", values * FLOAT, None),
                )
                work = _rebuilt_residual(setting, stage, EQ_REVNET_LOCAL, gradients)
            else:
                stored = (_stored_block(setting, stage, name),)
                work = (_sum(setting, stage), _end_of_stored_residual(setting, stage))
            counters = setting.counts * (1 + (unit == 0))
            parameters, buffers = 9 * big * big + 4 * big, _buffers(2 * big, 4, counters)
            modules.append(Module(name, t, parameters, buffers, stored, work, not setting.inverts))
    return [*modules, _revnet_head(setting, stages[-1])]


def _result(setting: _Setting, stage: _Stage) -> tuple[int, bool]:
    """(bytes of a value of what a stage hands on, whether somebody keeps that already)."""
    if not stage.units:  # the output of the stem, of no other use, or of the block of stride 2
        return setting.a, stage.index > 0
    if setting.inverts:  # the chain's state itself, or a copy of it in float32
        return FLOAT, not setting.stream.is_integer
    return setting.v, False


def _down(setting: _Setting, before: _Stage, after: _Stage) -> Module:
    """The residual block of stride 2: stored by autograd in both modes (the global bottleneck of RevNet)."""
    a, c, t = setting.a, before.channels, after.index
    reads, kept = _result(setting, before)
    stored = [
        _pixels(
            f"down {t}: inputs of conv 2 and of three BNs, ReLU's output", EQ_REVNET_GLOBAL, f"5 E_{t} a",
            5 * after.values * a,
        )
    ]  # fmt: skip
    if setting.cast(reads):
        name, formula = f"down {t}: its input in 16 bit, for two convs", f"2 E_{t - 1} a"
        stored.append(_pixels(name, EQ_REVNET_GLOBAL, formula, 2 * before.values * a))
    elif not kept:
        name, formula = f"down {t}: its input", f"E_{t - 1} a"
        stored.append(_pixels(name, EQ_REVNET_GLOBAL, formula, before.values * a))
    passing = [_local("shortcut's sum", EQ_REVNET_LOCAL, f"E_{t} a", after.values * a)]
    if setting.cast(reads) and not kept:
        passing.append(_local("its input in float32", EQ_REVNET_LOCAL, f"4 E_{t - 1}", before.values * FLOAT))
    work = (Work("forward", tuple(passing)), _end_of_residual(before, reads))
    return Module(f"down {t}", t, 56 * c * c + 12 * c, _buffers(6 * c, 3), tuple(stored), work)


def _revnet_head(setting: _Setting, last: _Stage) -> Module:
    reads, kept = _result(setting, last)
    nbytes = last.values * reads
    stored = [_pixels("output of the head's ReLU", EQ_STORED, f"E_{last.index} v", nbytes)]
    if not kept:
        stored.append(_pixels("input of the head's BN", EQ_STORED, f"E_{last.index} v", nbytes))
    gradient = _gradient("gradient of the head's ReLU", EQ_STORED, f"E_{last.index} v", nbytes)
    channels = last.channels
    work = (Work("backward", (gradient,)),)
    return Module("head", last.index, _linear(setting, last) + 2 * channels, _buffers(channels, 1), tuple(stored), work)


def _rebuilt_residual(
    setting: _Setting, stage: _Stage, equation: str, gradients: tuple[Term, ...]
) -> tuple[Work, Work, Work]:
    """What autograd holds of one F = 2 x [BN, ReLU, conv] that is recomputed and differentiated at once."""
    a, h = setting.a, stage.half
    cast = setting.cast(FLOAT)
    inside = [_local("inside F: BN 1, conv 1, BN 2 and conv 2", equation, "h (8 + 2 a)", h * (8 + 2 * a))]
    if cast:
        inside.append(_local("inside F: conv 1's input in 16 bit", equation, "h a", h * a))
    # forward: conv 1 at work, or BN 2
    passing = (_local("inside F: its input, BN 1 and conv 1", equation, "12 h", h * (8 + a + cast)),)
    taken_off = (
        *inside,
        _local("inside F: its output", equation, "h a", h * a),
        _scratch(_scratch_of_sum(setting, setting.chunk / a, a)),
    )
    backward = [*inside, _gradient("inside F: gradients of conv 2 and of ReLU 2", equation, "2 h a", 2 * h * a)]
    if setting.scaled or setting.g != a:
        backward.append(_gradient("inside F: gradient times scale, or in 16 bit", equation, "h a", h * a))
    return (
        Work("forward", passing),
        Work("backward", (*gradients, *taken_off)),
        Work("backward", (*gradients, *backward)),
    )


def _end_of_stored_residual(setting: _Setting, stage: _Stage) -> Work:
    """Where autograd stores: at the gradient of conv 1 of F, the first module of a block."""
    a, v, h = setting.a, setting.v, stage.half
    inside = v if setting.cast(v) else 2 * a
    terms = (
        _local("inputs of BN 1 and ReLU 1 of F", EQ_STORED, "2 h v", 2 * h * v),
        _gradient("gradients of both halves, of conv 1's input and output", EQ_STORED, "3 h v + 2 h a, 16 bit: 4 h v",
                  h * (3 * v + inside)),
    )  # fmt: skip
    return Work("backward", terms, ends=True)


def _reversible(setting: _Setting) -> list[Module]:
    """A fully invertible trunk: iRevNet (Figure 4), layer-wise (5, 8), hybrid (9) and chunked."""
    cfg = setting.cfg
    block = _BLOCKS[cfg.arch]
    stages = _stages(cfg, spread_depth(cfg.depth, len(cfg.pooling) + 1))
    last, width = stages[-1], float(cfg.width)
    state = _pixels("state of the trunk", block.equation, "c s", width * setting.s)
    gradient = _gradient("gradient of the state", block.equation, "c g", width * setting.g, None)
    plain = (Work("backward", (gradient,)),)  # a pass that needs nothing else
    modules = [_stem(setting)]
    for stage in stages:
        if stage.index > 0:  # a permutation: autograd keeps nothing of it
            name = f"{cfg.pooling[stage.index - 1]} pooling {stage.index}"
            inverted = {"stored": (state,), "work": plain} if setting.inverts else {}
            modules.append(Module(name, stage.index, **inverted))
        for unit in range(stage.units):
            name = f"stage {stage.index + 1}, {block.unit} {unit + 1}"
            if setting.inverts:
                stored, work = (state,), block.at_work(setting, stage, gradient)
            else:
                stored = (_stored_block(setting, stage, name),)
                work = (_sum(setting, stage),)
                if cfg.arch == "irevnet":
                    work += (_end_of_stored_residual(setting, stage),)
            parameters, channels, norms = block.size(cfg, stage)
            buffers = _buffers(channels, norms, setting.counts) + block.own_buffers(cfg, stage)
            modules.append(Module(name, stage.index, parameters, buffers, stored, work, not setting.inverts))
    return [*modules, _readout(setting, last, state, plain)]


def _readout(setting: _Setting, last: _Stage, state: Term, plain: tuple[Work, ...]) -> Module:
    norm, values, v = setting.cfg.arch != "layerwise", last.values, setting.v
    parameters = _linear(setting, last) + 2 * last.channels * norm
    buffers = _buffers(last.channels, 1) if norm else 0
    if setting.inverts:
        return Module("readout", last.index, parameters, buffers, (state,), plain, by_autograd=False)
    pooled = 2 * values * 4**last.index / setting.pixels  # their sum, and their mean
    passing = [_local("pooled features, twice", EQ_STORED, "8 C S / (H W)", pooled * FLOAT)]
    stored, work = [], ()
    if norm:
        stored.append(_pixels("inputs of BN and LeakyReLU", EQ_STORED, "2 c v", 2 * values * v))
        passing.append(_local("output of LeakyReLU", EQ_STORED, "c v", values * v))
        work += (Work("forward", (_local("output of BN in float32", EQ_STORED, "4 c", values * FLOAT),)),)
    work += (Work("forward", tuple(passing)),)
    return Module("readout", last.index, parameters, buffers, tuple(stored), work)


# ---------------------------------------------------------------- what one unit stores under ordinary autograd


def _stored_block(setting: _Setting, stage: _Stage, name: str) -> Term:
    """F and G of one unit."""
    what, formula, of_function = _STORED[setting.cfg.arch](setting, stage)
    return _pixels(f"{name}: {what}", EQ_STORED, f"2 {formula}", 2 * of_function)


def _stored_residual(setting: _Setting, stage: _Stage) -> tuple[str, str, float]:
    """Inputs of BN 1, ReLU 1, BN 2, ReLU 2; those of the convolutions are the same where nothing is cast."""
    a, v = setting.a, setting.v
    nbytes = stage.half * (2 * v + 2 * a + setting.cast(v))
    return "inputs of BNs and convolutions of F and G", "h (2 v + 2 a + [v > a: a])", nbytes


def _stored_layerwise(setting: _Setting, stage: _Stage) -> tuple[str, str, float]:
    return "inputs of F and G, of BN (centred) and LeakyReLU", "h (2 v + a)", stage.half * (2 * setting.v + setting.a)


def _stored_hybrid(setting: _Setting, stage: _Stage) -> tuple[str, str, float]:
    _, formula, nbytes = _stored_layerwise(setting, stage)
    return "inputs of the layers of F and G", f"{UNITS_PER_FUNCTION} {formula}", UNITS_PER_FUNCTION * nbytes


def _stored_chunked(setting: _Setting, stage: _Stage) -> tuple[str, str, float]:
    a, v, h, e = setting.a, setting.v, stage.half, _expansion(setting.cfg, stage)
    tensors = 1 if setting.cfg.activation == "relu" else 2  # ReLU's output is conv 2's input, too
    if setting.cfg.norm == "hidden":
        return "inputs of F and G, of BN and conv 2", f"h a (1 + {tensors + 1} e)", h * a * (1 + (tensors + 1) * e)
    return "inputs of BN, conv 1 and conv 2", f"h (v + a + {tensors} e a)", h * (v + a + tensors * e * a)


_STORED: dict[str, Callable[[_Setting, _Stage], tuple[str, str, float]]] = {
    "layerwise": _stored_layerwise,
    "hybrid": _stored_hybrid,
    "irevnet": _stored_residual,
    "revnet": _stored_residual,
    "chunked": _stored_chunked,
}


def _expansion(cfg: Any, stage: _Stage) -> float:
    """Hidden channels of F for each channel of its input."""
    return _hidden(cfg, stage) / (stage.channels // 2)


def _hidden(cfg: Any, stage: _Stage) -> int:
    return max(1, round(expansions(cfg.network)[stage.index] * (stage.channels // 2)))


# ---------------------------------------------------------------- the blocks of fully invertible trunks


@dataclass(frozen=True)
class _Block:
    equation: str
    unit: str = "block"

    def size(self, cfg: Any, stage: _Stage) -> tuple[int, int, int]:
        """(parameters, BN channels, BNs of torch's own) of one unit."""
        raise NotImplementedError

    def own_buffers(self, cfg: Any, stage: _Stage) -> int:
        """Bytes of the buffers of one unit that are not statistics of BN."""
        return 0

    def at_work(self, setting: _Setting, stage: _Stage, gradient: Term) -> tuple[Work, ...]:
        """What is alive besides the state while one unit is walked back; `gradient` is that of the state."""
        raise NotImplementedError


class _Layerwise(_Block):
    def size(self, cfg, stage):
        return 9 * stage.channels**2 // 2 + 2 * stage.channels, stage.channels, 0

    def own_buffers(self, cfg, stage):
        return _chain_buffers(cfg, stage.channels // 2, convolutions=2)

    def at_work(self, setting, stage, gradient):
        return (Work("backward", (gradient, _scratch(_scratch_of_convolution(setting, FLOAT, stage.channels // 2)))),)


class _Hybrid(_Block):
    """Leading BN and LeakyReLU are recomputed from the source, so signs of the second LeakyReLU only are kept."""

    def size(self, cfg, stage):
        half, count = stage.channels // 2, 2 * UNITS_PER_FUNCTION
        return count * (9 * half**2 // 2 + 2 * half), count * half, 0

    def own_buffers(self, cfg, stage):
        return 2 * UNITS_PER_FUNCTION * _chain_buffers(cfg, stage.channels // 4, convolutions=2)

    def at_work(self, setting, stage, gradient):
        h = stage.half
        d = min(setting.a, FLOAT) if setting.stream.is_integer else FLOAT  # float16 of a 16-bit stream
        inside = (
            _local("inside F: its state", self.equation, "h d", h * d),
            _local("inside F: signs of LeakyReLU 2, a bit each", self.equation, "h / 8", h / 8),
        )
        of_gradient = _gradient("inside F: gradient of its state", self.equation, "h g", h * setting.g)
        taken_off = _scratch(_scratch_of_sum(setting, setting.chunk / d, d))
        scratch = _scratch(_scratch_of_convolution(setting, d, stage.channels // 4))
        return (
            Work("backward", (gradient, *inside, taken_off)),
            Work("backward", (gradient, *inside, of_gradient, scratch)),
        )


class _IRevNet(_Block):
    def size(self, cfg, stage):
        return 9 * stage.channels**2 + 4 * stage.channels, 2 * stage.channels, 4

    def at_work(self, setting, stage, gradient):
        return _rebuilt_residual(setting, stage, self.equation, (gradient,))


class _Chunked(_Block):
    """norm=input: everything inside F is alive for one chunk of the batch only; hidden: for the whole batch."""

    def size(self, cfg, stage):
        half, hidden = stage.channels // 2, _hidden(cfg, stage)
        weights = 36 * half * hidden
        if cfg.norm == "hidden":
            return weights + 4 * hidden, 2 * hidden, 2
        return weights + 2 * hidden + 4 * half, 2 * half, 2  # conv 1 has a bias

    def at_work(self, setting, stage, gradient):
        cfg, a = setting.cfg, setting.a
        if cfg.norm == "hidden":
            chunk = min(cfg.hidden_chunk * stage.channels // cfg.width, _hidden(cfg, stage))
            k = chunk * stage.values / stage.channels
            values = setting.chunk / setting.s
            inside = (
                _local("inside F: z of a chunk of hidden channels", self.equation, "k a", k * a),
                _gradient("inside F: its gradient", self.equation, "k a", k * a),
                _scratch(_scratch_of_sum(setting, values, a) + values * a * (1 + 2 * k / stage.half)),
            )
            return (Work("backward", (gradient, *inside)),)
        e, values, cast = _expansion(cfg, stage), setting.chunk / FLOAT, setting.cast(FLOAT)
        inside = FLOAT + cast + e * a * (1 if cfg.activation == "relu" else 2)  # BN, conv 1, conv 2
        taken_off = values * (inside + a) + _scratch_of_sum(setting, values, a)
        backward = values * (inside + 2 * e * a + a * (setting.scaled or setting.g != a))
        return (Work("backward", (gradient, _scratch(max(taken_off, backward)))),)


def _chain_buffers(cfg: Any, channels: int, convolutions: int) -> int:
    """Directions of the bounded convolutions, so many channels each, and signs of the BN, a byte each."""
    bounds = convolutions * channels * PROBE_SIDE**2 * FLOAT if cfg.max_gain is not None else 0
    return bounds + (convolutions * channels if cfg.norm_sign == "mixed" else 0)


def _scratch_of_convolution(setting: _Setting, reads: int, channels: int) -> float:
    """A coupling convolution over a chunk: its input, also in 16 bit, gradients, and that of the weights."""
    a, values = setting.a, setting.chunk / reads
    widened = (a + FLOAT) * (setting.g != a)
    return values * (reads + setting.cast(reads) + a + widened) + 9 * channels**2 * FLOAT


_BLOCKS: dict[str, _Block] = {
    "layerwise": _Layerwise(EQ_LAYERWISE, unit="unit"),
    "hybrid": _Hybrid(EQ_HYBRID),
    "irevnet": _IRevNet(EQ_IREVNET),
    "chunked": _Chunked(EQ_CHUNKED),
}
