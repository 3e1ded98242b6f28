"""The closed forms of the memory of a step against the count of live storages."""

from __future__ import annotations

from functools import cache

import pytest
from cases import compose

from revtrain.errors import RevtrainError
from revtrain.measure import StepMemory, measure_step_memory
from revtrain.measure.analytic import Term, analytic_memory, element_bytes
from revtrain.models import architectures

STRIDES = ("pooling=[stride,stride,stride]",)
PATTERNS = {  # two for those that may choose, or another number of stages
    "resnet18": (STRIDES, (*STRIDES, "depth=34")),
    "revnet": (STRIDES, ("pooling=[stride]", "depth=3")),
}
INVERTIBLE = (("pooling=[channel,channel]",), ("pooling=[batch,channel]",))
BATCH = 256  # activations outweigh the weights of these small networks
CASES = [
    (arch, mode, f"width={width}", f"chunk_mib={width / 8}", *pattern)
    for arch in architectures()
    for mode in ("invert", "store")
    if (arch, mode) != ("resnet18", "store")  # the same network
    for width, pattern in zip((8, 12), PATTERNS.get(arch, INVERTIBLE), strict=True)
]


def config(arch: str, *overrides: str):
    depth = () if arch == "resnet18" or any("depth" in each for each in overrides) else ("depth=3",)
    depth += ("hidden_chunk=4",) if arch == "chunked" else ()
    # Temporaries of 64 images, fewer than in half the batch: they are of fixed size, no part of the slope.
    return compose(f"arch={arch}", "chunk_mib=1", *depth, *overrides)


@cache
def predicted(arch: str, *overrides: str) -> StepMemory:
    return measure_step_memory(config(arch, *overrides), 10, 32, BATCH)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_closed_form_agrees_with_the_count_of_live_storages(case):
    arch, mode, *overrides = case
    overrides = [f"backward={mode}", *overrides]
    model = analytic_memory(config(arch, *overrides))
    memory = predicted(arch, *overrides)
    assert model.bytes_per_pixel == pytest.approx(memory.bytes_per_pixel, rel=0.02)
    assert model.peak_bytes(BATCH, 32) == pytest.approx(memory.peak_bytes, rel=0.05)
    # what does not grow with the batch is known to the byte
    assert model.parameters * 4 == memory.gradient_bytes == memory.optimizer_bytes
    assert model.fixed_of("theta") == memory.parameter_bytes


@pytest.mark.parametrize(("arch", "mode"), [("resnet18", "store"), ("layerwise", "store")])
def test_the_sixteen_bit_forms_agree(arch, mode):
    overrides = (f"backward={mode}", "width=8", "precision=bf16")
    model = analytic_memory(config(arch, *overrides))
    assert model.bytes_per_pixel == pytest.approx(predicted(arch, *overrides).bytes_per_pixel, rel=0.05)


@pytest.mark.parametrize("arch", architectures())
def test_terms_add_up_and_name_their_equation(arch):
    model = analytic_memory(config(arch, "width=8"))
    assert sum(term.bytes_per_pixel for term in model.terms) == pytest.approx(model.bytes_per_pixel)
    by_kind = sum(model.of(kind=kind) for kind in ("theta", "activation", "gradient", "optimizer"))
    assert by_kind == pytest.approx(model.bytes_per_pixel)
    assert len({term.name for term in model.terms}) == len(model.terms), "a buffer is counted once"
    for term in model.terms:
        assert isinstance(term, Term)
        assert term.formula and ("Eq" in term.equation or "section" in term.equation or "paper" in term.equation)
        assert term.bytes_per_pixel > 0 or term.bytes > 0


def test_the_papers_numbers():
    """Design figures: bytes per pixel in fp32 of the published widths, less head and labels (2 to 8 bytes)."""

    def of(*overrides: str) -> float:
        return analytic_memory(compose(*overrides)).bytes_per_pixel

    assert of("arch=layerwise", "width=32") == pytest.approx((2 * 32 + 3) * 4, abs=3)
    assert of("arch=hybrid", "width=32") == pytest.approx((3 * 32 + 3) * 4 + 32 / 8, abs=3)  # and two signs a half
    assert of("arch=irevnet", "width=32", "residual_scale=1") == pytest.approx((5 * 32 + 3) * 4, abs=9)
    assert of("arch=chunked", "width=32", "hidden_chunk=2") == pytest.approx((2 * 32 + 3 + 2 * 2) * 4, abs=3)
    # two tensors of the last stage's gradients in flight
    assert of("arch=resnet18", "width=64") == pytest.approx(4590, rel=0.01)


def test_global_and_local_bottleneck():
    """RevNet's is what the pass keeps; iRevNet and hybrid have a local one, layer-wise none."""
    model = {arch: analytic_memory(config(arch, "width=8", "residual_scale=0.5")) for arch in architectures()}
    for arch in ("revnet", "resnet18"):
        assert model[arch].of(bottleneck="global") > 0.7 * model[arch].bytes_per_pixel
    assert model["layerwise"].of(bottleneck="local") == 0
    assert model["hybrid"].of(bottleneck="local") == 8 * 4 + 8 / 8  # the state inside F, its gradient, two signs
    assert model["irevnet"].of(bottleneck="local") == (3 + 0.5) * 8 * 4  # the half: the scaled gradient
    assert model["layerwise"].of(kind="gradient") == pytest.approx(8 * 4, abs=2)


@pytest.mark.parametrize("arch", [arch for arch in architectures() if arch != "resnet18"])
def test_more_of_anything_is_never_less_memory(arch):
    def bytes_per_pixel(*overrides: str) -> float:
        return analytic_memory(config(arch, *overrides)).bytes_per_pixel

    assert bytes_per_pixel("width=8") < bytes_per_pixel("width=16") <= 2.1 * bytes_per_pixel("width=8")
    invert, store = (
        [bytes_per_pixel(f"backward={mode}", f"depth={depth}") for depth in (4, 8, 16)] for mode in ("invert", "store")
    )
    assert invert[0] == invert[1] == invert[2], "flat over depth"
    assert invert[0] < store[0] < store[1] < store[2]
    assert bytes_per_pixel("backward=store", "precision=bf16") < bytes_per_pixel("backward=store")


def test_parameters_are_those_of_the_default_networks():
    """ResNet-18 of torchvision with a 3x3 stem and ten classes has 11,173,962."""
    assert analytic_memory(compose("arch=resnet18")).parameters == 11_173_962


def test_the_peak_moves_with_the_batch():
    """With few images the weights' gradients decide, with many the activations do."""
    model = analytic_memory(compose("arch=irevnet", "backward=store"))
    pixels = 32 * 32
    slope = [(model.peak_bytes(2 * batch, 32) - model.peak_bytes(batch, 32)) / (batch * pixels) for batch in (8, 1024)]
    assert slope[0] < 0.9 * slope[1]
    assert slope[1] == pytest.approx(model.bytes_per_pixel)


def test_an_architecture_without_a_closed_form_is_refused():
    cfg = compose()
    cfg.arch = "unheard_of"
    with pytest.raises(RevtrainError, match=r"unheard_of[\s\S]*fake tensors"):
        analytic_memory(cfg)


def test_streams_of_a_chain_that_inverts_are_never_narrower_than_the_convolutions():
    for precision, compute in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        stream, computed = element_bytes(compose(f"precision={precision}"))
        assert computed == compute <= stream
