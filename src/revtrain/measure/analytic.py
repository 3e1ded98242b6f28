"""Memory of a training step in closed form, term by term: formulas of the configuration, nothing is run.

A training step needs M = M_theta + M_z + M_g (Eq. 5). The draft of arXiv 1910.11127 sums the outputs of layers;
what autograd keeps are the *inputs* of layers, and the parameters' gradients and momentum belong into M as well
(see docs/paper.md). Both are so here.

Symbols of the formulas, per input pixel (bytes / (batch * height * width)):

    c     width: channels at full resolution
    E_t   values of one activation of stage t: channels * sub-images / 4^t. Both invertible poolings keep E = c;
          striding doubles the channels on a quarter of the pixels: E_t = c / 2^t
    h     E / 2, one half of a coupling
    e_t   expansion of stage t (chunked): hidden channels per channel of a half
    k     hidden channels alive at a time (chunked)
    s, a  bytes of a value of the stream and of what convolutions compute: 4 and 4 in fp32

A network is a row of modules. Each *stores* terms from its forward pass to its backward pass (added up: the global
bottleneck) and has terms alive only *while its own backward pass runs* (the largest: the local bottleneck). The
memory at a moment is what all modules up to there store, and what the one at work needs for itself.

Per-pixel terms hold for batches large enough that activations outweigh the weights' gradients: the peak moves
between moments otherwise, which `peak_bytes` follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from revtrain.errors import RevtrainError
from revtrain.invertible import MIB
from revtrain.models.chunked import expansions
from revtrain.models.hybrid import UNITS_PER_BRANCH
from revtrain.models.parts import spread_depth
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

SMALL_BYTES = 4  # statistics, parameters, pooled features: float32 in every precision
LABEL_BYTES = 8

Kind = Literal["theta", "activation", "gradient", "optimizer"]
Bottleneck = Literal["global", "local"] | None


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
class Module:
    """A box of the memory diagram. Terms of one name in several modules are one buffer, counted once."""

    name: str
    stage: int  # from 0
    parameters: int = 0
    statistics_bytes: int = 0  # running statistics
    stored: tuple[Term, ...] = ()  # from its forward to its backward pass
    local: tuple[Term, ...] = ()  # only while its own backward pass runs
    passing: tuple[Term, ...] = ()  # only while its own forward pass runs


@dataclass(frozen=True)
class Moment:
    """A time of the step at which memory may peak: everything that is alive then."""

    name: str
    module: int  # index of the module at work
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


@dataclass(frozen=True)
class _Setting:
    """What all builders need of the configuration."""

    cfg: Any
    classes: int
    pixels: int  # of one image
    s: int  # bytes of a value of the stream
    a: int  # bytes of a value that a convolution computes

    @property
    def cast(self) -> int:
        """Bytes of a value copied from the stream's precision to the convolution's: none where they agree."""
        return self.a if self.a != self.s else 0

    @property
    def snaps(self) -> bool:
        """Couplings round their input and residuals to a grid, which makes a new tensor of each."""
        return self.cfg.grid_bits is not None and self.s == 4 and self.cfg.arch in ("revnet", *_BLOCKS)

    @property
    def holds_stem(self) -> bool:
        """The stem's output is alive in the trunk's forward pass, though no layer of the trunk saves it."""
        return self.cfg.arch != "resnet18"

    @property
    def inverts(self) -> bool:
        return self.cfg.backward == "invert" and self.cfg.arch != "resnet18"

    def pooled(self, stage: _Stage) -> float:
        """Values of the head's pooled features, per input pixel."""
        return stage.values * 4**stage.index / self.pixels


def element_bytes(cfg: Any) -> tuple[int, int]:
    """(s, a): bytes of a value of a chain's stream, and of what convolutions compute.

    A chain that inverts keeps its stream in float32 under autocast, and so do the statistics of an invertible BN
    and the grid of a coupling where autograd stores.
    """
    compute = {"fp32": 4, "bf16": 2, "fp16": 2}[cfg.precision]
    widened = cfg.backward == "invert" or cfg.arch in ("layerwise", "hybrid") or cfg.grid_bits is not None
    return 4 if widened and cfg.arch != "resnet18" else compute, compute


def analytic_memory(cfg: Any, classes: int = 10, image_size: int = 32) -> MemoryModel:
    """The memory of one training step of `cfg`, term by term.

    Args:
        cfg: the composed configuration, as `build_model` takes it.
        classes: of the head.
        image_size: side of the images in pixels.

    Raises `RevtrainError` for an architecture without closed forms here.
    """
    builders = {"resnet18": _resnet18, "revnet": _revnet} | dict.fromkeys(_BLOCKS, _reversible)
    if cfg.arch not in builders:
        raise RevtrainError(
            f"arch={cfg.arch} has no closed form of its memory.\n"
            f"Expected one of: {', '.join(sorted(builders))}. The prediction with fake tensors serves any network."
        )
    setting = _Setting(cfg, classes, image_size**2, *element_bytes(cfg))
    modules = tuple(builders[cfg.arch](setting))
    return MemoryModel(cfg.arch, cfg.backward, modules, tuple(_moments(setting, modules)))


# ---------------------------------------------------------------- from modules to moments


def _moments(setting: _Setting, modules: tuple[Module, ...]) -> Iterable[Moment]:
    """One moment for the backward pass of each module, and one for each forward pass with a need of its own."""
    inputs, always = _inputs(setting), _always(setting, modules)
    held = Term(
        "output of the stem, held by its caller", EQ_TOTAL, "c a", "activation", None, setting.cfg.width * setting.a
    )
    for index, module in enumerate(modules):
        if module.passing:
            terms = (*always, *inputs, *_distinct(modules[: index + 1]), *module.passing)
            yield Moment(f"forward of {module.name}", index, terms + ((held,) if setting.holds_stem else ()))
        gradients = sum(each.parameters for each in modules[index:]) * SMALL_BYTES
        alive = (
            Term("gradients of the parameters", EQ_TOTAL, "4 bytes a parameter from here to the head", "gradient",
                 None, 0.0, gradients),
            *_scratch(setting),
        )  # fmt: skip
        terms = (*always, *alive, *inputs, *_distinct(modules[: index + 1]), *module.local)
        yield Moment(f"backward of {module.name}", index, terms)


def _distinct(modules: Iterable[Module]) -> list[Term]:
    return list({term.name: term for module in modules for term in module.stored}.values())


def _always(setting: _Setting, modules: tuple[Module, ...]) -> list[Term]:
    parameters = sum(module.parameters for module in modules)
    statistics = sum(module.statistics_bytes for module in modules)
    terms = [
        Term("parameters", EQ_TOTAL, "4 bytes a parameter", "theta", "global", 0.0, parameters * SMALL_BYTES),
        Term("running statistics", EQ_TOTAL, "8 bytes a BN channel", "theta", "global", 0.0, statistics),
    ]
    if setting.cfg.momentum > 0:
        terms.append(
            Term("momentum", EQ_TOTAL, "4 bytes a parameter", "optimizer", "global", 0.0, parameters * SMALL_BYTES)
        )
    if not setting.inverts and setting.a != SMALL_BYTES:
        # Autocast's copies of the weights stay until the graph that saved them is gone.
        terms.append(
            Term("weights in 16 bit", EQ_TOTAL, "a bytes a parameter", "theta", "global", 0.0, parameters * setting.a)
        )
    return terms


def _inputs(setting: _Setting) -> list[Term]:
    terms = [Term("images", EQ_STORED, "3 * 4", "activation", "global", 3 * SMALL_BYTES)]
    if setting.a != SMALL_BYTES:
        terms.append(Term("images in 16 bit", EQ_STORED, "3 a", "activation", "global", 3 * setting.a))
    terms.append(Term("labels", EQ_STORED, "8 / (H W)", "activation", "global", LABEL_BYTES / setting.pixels))
    return terms


def _scratch(setting: _Setting) -> list[Term]:
    """Temporaries of the passes over batch chunks: bounded by `chunk_mib` each, whatever the batch."""
    # convolution and gradient of a half; chunked: the output and two steps of its sum, and three of hidden channels
    of_hidden = 2 * getattr(setting.cfg, "hidden_chunk", 2) / setting.cfg.width  # k / h
    temporaries = {"layerwise": 2, "hybrid": 2, "chunked": 3 + 3 * of_hidden}.get(setting.cfg.arch, 0)
    if not setting.inverts or not temporaries:
        return []
    scratch = int(temporaries * setting.cfg.chunk_mib * MIB)
    return [Term("scratch of a chunk", EQ_TOTAL, f"{temporaries:g} chunk_mib", "activation", "local", 0.0, scratch)]


# ---------------------------------------------------------------- the paper's networks


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
    return Module("stem", 0, parameters=27 * setting.cfg.width)


def _head(setting: _Setting, last: _Stage, local: tuple[Term, ...], norm: bool = False, stored=()) -> Module:
    parameters = (last.channels + 1) * setting.classes + 2 * last.channels * norm
    statistics = _statistics(last.channels, torch_norms=1) if norm else 0
    return Module("head", last.index, parameters, statistics, tuple(stored), local)


def _statistics(channels: int, torch_norms: int = 0) -> int:
    """Running mean and variance of so many channels; torch's own norms count their batches, too (8 bytes)."""
    return 2 * channels * SMALL_BYTES + 8 * torch_norms


def _resnet18(setting: _Setting) -> list[Module]:
    """ResNet (Figure 1): every convolution and BN stores its input, and nothing is rebuilt."""
    a = setting.a
    stages = _stages(setting.cfg, BLOCKS[setting.cfg.depth])

    def stored(where: str, what: str, values: float, formula: str) -> Term:
        return Term(f"{where}: {what}", EQ_STORED, formula, "activation", "global", values * a)

    c = setting.cfg.width
    stem = Module(
        "stem", 0, 27 * c + 2 * c, _statistics(c, 1),
        (stored("stem", "input of BN", c, "c a"), stored("stem", "output", c, "c a")),
    )  # fmt: skip
    modules = [stem]
    for stage in stages:
        big, t = stage.channels, stage.index
        for block in range(stage.units):
            name = f"stage {t + 1}, block {block + 1}"
            down = t > 0 and block == 0
            before = big // 2 if down else big
            terms = [stored(name, "inputs of conv 2 and of both BNs, output", 4 * stage.values, f"4 E_{t} a")]
            parameters = 9 * before * big + 9 * big * big + 4 * big
            statistics = _statistics(2 * big, 2)
            if down:
                terms.append(stored(name, "input of the shortcut's BN", stage.values, f"E_{t} a"))
                parameters += before * big + 2 * big
                statistics += _statistics(big, 1)
            modules.append(Module(name, t, parameters, statistics, tuple(terms)))
    last = stages[-1]
    gradient = Term(
        "gradients in the last block, less what they have freed", EQ_STORED, f"E_{last.index} a", "gradient",
        "local", last.values * a,
    )  # fmt: skip
    return [*modules, _head(setting, last, (gradient,))]


def _revnet(setting: _Setting) -> list[Module]:
    """RevNet (Figure 3): a chain for each stage, and between them residual blocks that store."""
    cfg, s, a = setting.cfg, setting.s, setting.a
    stages = _stages(cfg, spread_depth(cfg.depth, len(cfg.pooling) + 1))
    modules = [_stem(setting)]
    for stage in stages:
        t, big, values = stage.index, stage.channels, stage.values
        if t > 0:
            modules.append(_down(setting, stages[t - 1], stage))
        state = Term(
            f"output of stage {t + 1}", EQ_REVNET_GLOBAL, f"E_{t} s", "activation", "global", values * s
        )  # fmt: skip
        if not stage.units:
            # The stem's or the down-sampling block's output is the stage's; the latter is counted there.
            kept = (state,) if t == 0 else ()
            modules.append(Module(f"stage {t + 1}, empty", t, stored=kept))
        for unit in range(stage.units):
            name = f"stage {t + 1}, block {unit + 1}"
            if setting.inverts:
                stored = (state,)
                inside = "inside F: its input, BN and conv"
                passing = Term(inside, EQ_REVNET_LOCAL, "3 h a", "activation", "local", 1.5 * values * a)
                local = (
                    Term("gradient of the state", EQ_REVNET_LOCAL, f"E_{t} s", "gradient", None, values * s),
                    Term("the same, as it came from above", EQ_REVNET_LOCAL, f"E_{t} s", "gradient", None, values * s),
                    *_inside_residual(setting, stage, EQ_REVNET_LOCAL),
                )
            else:
                stored, local, passing = (_stored_block(setting, stage, name),), (), _adding(setting, stage)
                stored += (state,) if unit == stage.units - 1 else ()
            modules.append(Module(name, t, 9 * big * big + 4 * big, _statistics(2 * big, 4), stored, local, (passing,)))
    end = stages[-1]
    through_head = (
        Term("gradient of the head's ReLU", EQ_STORED, f"E_{end.index} a", "gradient", "local", end.values * a),
        Term("pooled features", EQ_STORED, "C / (H W) * 4", "gradient", None, setting.pooled(end) * SMALL_BYTES),
    )
    relu = Term("output of the head's ReLU", EQ_STORED, f"E_{end.index} a", "activation", "global", end.values * a)
    return [*modules, _head(setting, end, through_head, norm=True, stored=(relu,))]


def _down(setting: _Setting, before: _Stage, after: _Stage) -> Module:
    """The residual block of stride 2: stored by autograd in both modes (the global bottleneck of RevNet)."""
    a, c, t = setting.a, before.channels, after.index
    inner = Term(
        f"down {t}: inputs of conv 2 and of three BNs, ReLU's output", EQ_REVNET_GLOBAL, f"5 E_{t} a", "activation",
        "global", 5 * after.values * a,
    )  # fmt: skip
    stored = [inner]
    if setting.inverts and setting.cast:
        stored.append(
            Term(
                f"down {t}: its input in 16 bit, for two convs", EQ_REVNET_GLOBAL, f"2 E_{t - 1} a", "activation",
                "global", 2 * before.values * setting.cast,
            )
        )  # fmt: skip
    gradient = Term("gradients of its input and output", EQ_REVNET_LOCAL, f"2 E_{t - 1} a", "gradient", "local",
                    2 * before.values * a)  # fmt: skip
    shortcut = Term("shortcut's sum", EQ_REVNET_LOCAL, f"E_{t} a", "activation", "local", after.values * a)
    return Module(f"down {t}", t, 56 * c * c + 12 * c, _statistics(6 * c, 3), tuple(stored), (gradient,), (shortcut,))


def _inside_residual(setting: _Setting, stage: _Stage, equation: str) -> tuple[Term, ...]:
    """What autograd holds of one F = 2 x [BN, ReLU, conv] at the worst moment of its backward pass."""
    s, a, h = setting.s, setting.a, stage.values / 2
    kept = Term(
        "inside F: BN 1, conv 1, BN 2 and conv 2", equation, "h (s + 3 a)", "activation", "local", h * (s + 3 * a)
    )
    gradients = Term(
        "inside F: gradients of conv 2 and of ReLU 2", equation, "2 h a", "gradient", "local", 2 * h * a
    )  # fmt: skip
    terms = [kept, gradients]
    if setting.cast:
        terms.append(Term("inside F: copies in 16 bit", equation, "2 h a", "activation", "local", 2 * h * setting.cast))
    elif setting.cfg.residual_scale != 1:
        terms.append(Term("gradient times scale", equation, "h s", "gradient", "local", h * s))
    return tuple(terms)


def _reversible(setting: _Setting) -> list[Module]:
    """A fully invertible trunk: iRevNet (Figure 4), layer-wise (5, 8), hybrid (9) and chunked."""
    cfg, s = setting.cfg, setting.s
    block = _BLOCKS[cfg.arch]
    stages = _stages(cfg, spread_depth(cfg.depth, len(cfg.pooling) + 1))
    last, width = stages[-1], float(cfg.width)
    state = Term("state of the trunk", block.equation, "c s", "activation", "global", width * s)
    gradient = Term("gradient of the state", block.equation, "c s", "gradient", None, width * s)
    pooled = Term(
        "gradient of the pooled features", EQ_TOTAL, "C S / (H W) * 4", "gradient", None,
        setting.pooled(last) * SMALL_BYTES,
    )  # fmt: skip
    modules = [_stem(setting)]
    if setting.inverts and setting.cast:
        cast = Term("gradient of the stem's output, in 16 bit", block.equation, "c a", "gradient", "local",
                    width * setting.cast)  # fmt: skip
        modules.append(Module("input of the trunk", 0, stored=(state,), local=(gradient, pooled, cast)))
    for stage in stages:
        if stage.index > 0:
            modules.append(_pooling(setting, stage, state, (gradient, pooled)))
        for unit in range(stage.units):
            name = f"stage {stage.index + 1}, {block.unit} {unit + 1}"
            if setting.inverts:
                stored, local, passing = (state,), (gradient, pooled, *block.local(setting, stage)), ()
            else:
                stored, local, passing = (_stored_block(setting, stage, name),), (), (_adding(setting, stage),)
            parameters, channels, norms = block.size(cfg, stage)
            modules.append(Module(name, stage.index, parameters, _statistics(channels, norms), stored, local, passing))
    if block.final:
        stored, local, passing = (state,), (gradient, pooled), ()
        if not setting.inverts:
            stored = (
                Term("BN, LeakyReLU: centred input and LeakyReLU's", EQ_STORED, "2 c s", "activation", "global",
                     2 * width * s),
            )  # fmt: skip
            local = ()
            passing = (
                Term("BN: its input, and the product before the sum", EQ_STORED, "2 c s", "activation", "local",
                     2 * width * s),
            )  # fmt: skip
        channels = last.channels
        modules.append(Module("BN, LeakyReLU", last.index, 2 * channels, _statistics(channels), stored, local, passing))
    if setting.inverts:
        return [*modules, _head(setting, last, (gradient, pooled))]
    last_norm = Term(
        "gradients in the last BN, less what they have freed", EQ_STORED, "2 c s", "gradient", "local", 2 * width * s
    )
    return [*modules, _head(setting, last, (last_norm,))]


def _pooling(setting: _Setting, stage: _Stage, state: Term, local: tuple[Term, ...]) -> Module:
    name = f"{setting.cfg.pooling[stage.index - 1]} pooling {stage.index}"
    if setting.inverts:
        return Module(name, stage.index, stored=(state,), local=local)
    return Module(name, stage.index)  # a permutation: autograd keeps nothing of it


def _stored_block(setting: _Setting, stage: _Stage, name: str) -> Term:
    """What one unit stores under ordinary autograd."""
    what, formula, nbytes = _STORED[setting.cfg.arch](setting, stage)
    return Term(f"{name}: {what}", EQ_STORED, formula, "activation", "global", nbytes)


def _stored_residual(setting: _Setting, stage: _Stage) -> tuple[str, str, float]:
    """x2 and y1 (inputs of BN); in F and G two BN outputs, the inputs of conv, and conv 1's output."""
    s, a, h = setting.s, setting.a, stage.values / 2
    nbytes = 2 * h * (2 * s + setting.cast + 2 * a)
    return "inputs of BNs and convolutions of F and G", "E (2 s + 2 a), 16 bit: + E a", nbytes


def _stored_layerwise(setting: _Setting, stage: _Stage) -> tuple[str, str, float]:
    nbytes = stage.values * (2 * setting.s + setting.a)
    return "inputs of F and G, of BN (centred) and LeakyReLU", "E (2 s + a)", nbytes


def _stored_hybrid(setting: _Setting, stage: _Stage) -> tuple[str, str, float]:
    half = _Stage(stage.index, stage.channels // 2, stage.values / 2, 0)
    nbytes = 2 * UNITS_PER_BRANCH * _stored_layerwise(setting, half)[2]
    return "inputs of the layers of F and G", "E (4 s + 2 a)", nbytes


def _stored_chunked(setting: _Setting, stage: _Stage) -> tuple[str, str, float]:
    # ReLU's output doubles as conv 2's input; the others keep their own input as well.
    tensors = 2 if setting.cfg.activation == "relu" else 3
    hidden = 2 * tensors * _hidden(setting.cfg, stage) * stage.values / stage.channels
    nbytes = (stage.values + hidden) * setting.a
    return "inputs of F and G, of their BNs and conv 2", f"E a (1 + {tensors} e_t)", nbytes


_STORED: dict[str, Callable[[_Setting, _Stage], tuple[str, str, float]]] = {
    "layerwise": _stored_layerwise,
    "hybrid": _stored_hybrid,
    "irevnet": _stored_residual,
    "revnet": _stored_residual,
    "chunked": _stored_chunked,
}


def _adding(setting: _Setting, stage: _Stage) -> Term:
    """Under ordinary autograd, what lives while a block adds G's output to its half."""
    h, cfg = stage.values / 2, setting.cfg
    if cfg.arch == "layerwise":
        return Term("BN: its input, and the product before the sum", EQ_STORED, "4 h s", "activation", "local",
                    4 * h * setting.s)  # fmt: skip
    # x and G's output; scaled; on the grid: three steps of rounding, and x before it (which RevNet stores anyhow);
    # hybrid: y1, which no BN saves
    rounding = 0 if not setting.snaps else 3 if cfg.arch == "revnet" else 5
    halves = 3 + (cfg.residual_scale != 1) + rounding + (cfg.arch == "hybrid")
    if cfg.arch == "revnet":
        halves -= 2  # the stage's output, counted among what is stored, does not exist yet
    return Term("the sum: x and G's output, scaled and rounded", EQ_STORED, f"{halves:g} h s", "activation", "local",
                halves * h * setting.s)  # fmt: skip


def _hidden(cfg: Any, stage: _Stage) -> int:
    return max(1, round(expansions(cfg)[stage.index] * (stage.channels // 2)))


# ---------------------------------------------------------------- the blocks of fully invertible trunks


@dataclass(frozen=True)
class _Block:
    equation: str
    unit: str = "block"
    final: bool = True  # BN and LeakyReLU before the head

    def size(self, cfg: Any, stage: _Stage) -> tuple[int, int, int]:
        """(parameters, BN channels, BNs of torch's own) of one unit."""
        raise NotImplementedError

    def local(self, setting: _Setting, stage: _Stage) -> tuple[Term, ...]:
        """Alive only inside one unit's backward pass, besides the state and its gradient."""
        return ()


class _Layerwise(_Block):
    def size(self, cfg, stage):
        return 9 * stage.channels**2 // 2 + 2 * stage.channels, stage.channels, 0


class _Hybrid(_Block):
    def size(self, cfg, stage):
        half, count = stage.channels // 2, 2 * UNITS_PER_BRANCH
        return count * (9 * half**2 // 2 + 2 * half), count * half, 0

    def local(self, setting, stage):
        h, s = stage.values / 2, setting.s
        return (
            Term("inside F: its state", self.equation, "h s", "activation", "local", h * s),
            Term("inside F: gradient of its state", self.equation, "h s", "gradient", "local", h * s),
            Term("inside F: signs of LeakyReLU's inputs, a bit each", self.equation, f"{UNITS_PER_BRANCH} h / 8",
                 "activation", "local", UNITS_PER_BRANCH * h / 8),
        )  # fmt: skip


class _IRevNet(_Block):
    def size(self, cfg, stage):
        return 9 * stage.channels**2 + 4 * stage.channels, 2 * stage.channels, 4

    def local(self, setting, stage):
        return _inside_residual(setting, stage, self.equation)


class _Chunked(_Block):
    def size(self, cfg, stage):
        hidden = _hidden(cfg, stage)
        return 36 * (stage.channels // 2) * hidden + 4 * hidden, 2 * hidden, 2

    def local(self, setting, stage):
        cfg, a = setting.cfg, setting.a
        chunk = min(getattr(cfg, "hidden_chunk", 2) * stage.channels // cfg.width, _hidden(cfg, stage))
        k = chunk * stage.values / stage.channels
        return (
            Term("inside F: z of a chunk of hidden channels", self.equation, "k a", "activation", "local", k * a),
            Term("inside F: its gradient", self.equation, "k a", "gradient", "local", k * a),
        )


_BLOCKS: dict[str, _Block] = {
    "layerwise": _Layerwise(EQ_LAYERWISE, unit="unit", final=False),
    "hybrid": _Hybrid(EQ_HYBRID),
    "irevnet": _IRevNet(EQ_IREVNET),
    "chunked": _Chunked(EQ_CHUNKED),
}
