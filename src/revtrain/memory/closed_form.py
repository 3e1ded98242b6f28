"""Memory of a training step in closed form, term by term: formulas of the configuration, nothing is run.

A training step needs M = M_theta + M_z + M_g (Eq. 5). The draft of arXiv 1910.11127 sums the outputs of layers;
what autograd keeps are the *inputs* of layers, and the parameters' gradients and momentum belong into M as well
(see docs/paper.md). Both are so here.

A network is a row of modules. Each *stores* terms from its forward pass to its backward pass (added up: the global
bottleneck) and has terms alive only while it is *at work*, forward or backward (the largest: the local bottleneck).
The memory at a moment is what all modules up to there store, and what the one at work needs for itself.

Which modules a network has, and what they store and need, its own file says: `memory` in `revtrain/models/NAME.py`,
with the helpers of `revtrain.memory.formulas`. Here the rows become moments, and the largest moment the peak.

Per-pixel terms (bytes / (batch * height * width)) hold for large batches. In small ones the weights' gradients, or the
temporaries of a chunk, decide which moment peaks; `peak_bytes` follows that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from revtrain.config import ImageSize, Network

# Which of the paper's equations a term belongs to. Within a network's own range the draft does not always keep
# activations, local activations and gradients apart, so a term carries the range. Networks name theirs themselves.
EQ_TOTAL = "Eq. 5"
EQ_STORED = "Eqs. 6, 7"  # of a network that stores: by its design, or with backward=store

FLOAT = 4  # bytes of statistics, parameters and their gradients in every precision
CONVOLUTION_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a value, by precision
LABEL_BYTES = 8

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
    held: tuple[Term, ...] = ()  # by its caller, until the forward pass ends


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
    """The closed forms of one configuration; see `revtrain.models.analytic_memory`."""

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

    def peak_bytes(self, batch: int, image_size: int | Sequence[int]) -> int:
        """Most bytes alive in forward and backward of `batch` images of so many pixels a side, or [height, width]."""
        pixels = batch * ImageSize.of(image_size).pixels
        return max(moment.fixed_bytes + round(moment.bytes_per_pixel * pixels) for moment in self.moments)


def memory_model(
    network: Network[Any],
    modules: Iterable[Module],
    image_size: int | Sequence[int],
    momentum: float,
    averages: bool = False,
) -> MemoryModel:
    """The memory of a training step of a network with these modules, from the images to the loss.

    Args:
        image_size: side of the images in pixels, or [height, width].
        momentum: of the optimizer; 0: it keeps nothing.
        averages: an average of the weights is kept (`ema_decay`).
    """
    modules, value_bytes = tuple(modules), CONVOLUTION_BYTES[network.precision]
    always = [*_of_all_parameters(modules, momentum, averages), *_of_the_batch(value_bytes, image_size)]
    return MemoryModel(network.arch, network.backward, modules, tuple(_moments(modules, always, value_bytes)))


def _moments(modules: tuple[Module, ...], always: list[Term], value_bytes: int) -> Iterator[Moment]:
    """One moment for each work of each module. `always` is alive at all of them."""
    for index, module in enumerate(modules):
        gradients = Term(
            "gradients of the parameters", EQ_TOTAL, "4 bytes a parameter from here to the head", "gradient",
            bytes=FLOAT * sum(each.parameters for each in modules[index:]),
        )  # fmt: skip
        copied = Term(
            "weights in 16 bit, kept by autograd", EQ_TOTAL, "a bytes a parameter up to here", "activation", "global",
            bytes=value_bytes * sum(each.parameters for each in modules[: index + 1] if each.by_autograd),
        )  # fmt: skip
        held = [term for each in modules[: index + 1] for term in each.held]
        for work in module.work:
            stored = {term.name: term for each in modules[: index + 1 - work.ends] for term in each.stored}
            terms = [*always, *stored.values(), *work.terms]
            if value_bytes != FLOAT and copied.bytes:
                terms.append(copied)
            terms += [gradients] if work.phase == "backward" else held
            yield Moment(work.phase, index, f"{work.phase} of {module.name}", tuple(terms))


def _of_all_parameters(modules: tuple[Module, ...], momentum: float, averages: bool) -> list[Term]:
    parameters = FLOAT * sum(module.parameters for module in modules)
    buffers = sum(module.buffer_bytes for module in modules)
    terms = [
        Term("parameters", EQ_TOTAL, "4 bytes a parameter", "theta", "global", bytes=parameters),
        Term("running statistics", EQ_TOTAL, "8 bytes a BN channel", "theta", "global", bytes=buffers),
    ]
    if momentum > 0:
        terms.append(Term("momentum", EQ_TOTAL, "4 bytes a parameter", "optimizer", "global", bytes=parameters))
    if averages:  # statistics among it, whose counters are not averaged: a little too much
        what = "average of the weights"
        terms.append(Term(what, EQ_TOTAL, "as the weights", "optimizer", "global", bytes=parameters + buffers))
    return terms


def _of_the_batch(value_bytes: int, image_size: int | Sequence[int]) -> list[Term]:
    labels = LABEL_BYTES / ImageSize.of(image_size).pixels
    return [
        Term("images", EQ_STORED, "3 a", "activation", "global", 3 * value_bytes),
        Term("labels", EQ_STORED, "8 / (H W)", "activation", "global", labels),
    ]
