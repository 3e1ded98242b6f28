"""The closed forms of the memory of a step against the count of live storages."""

from __future__ import annotations

import sys

import pytest
from cases import compose

import revtrain.models
from revtrain.config import own_keys, registry
from revtrain.errors import RevtrainError
from revtrain.memory.closed_form import Term
from revtrain.models import analytic_memory, for_task
from revtrain.planning.plan import StepPredictor
from revtrain.planning.predict import predict_step_memory

LARGE = 2**16  # images: weights and the temporaries of chunks weigh next to nothing
STRIDES = "pooling=[stride]"
TWO_POOLS = "pooling=[batch,channel]"
# arch, mode, precision, and what else is unlike the default
CASES = [
    ("resnet18", "store", "fp32"),
    ("resnet18", "store", "bf16", "depth=34"),
    *(
        (arch, mode, precision)
        for arch in ("revnet", "irevnet", "layerwise", "hybrid", "chunked")
        for mode in ("invert", "store")
        for precision in ("fp32", "bf16")
    ),
    ("revnet", "invert", "fp32", STRIDES, "residual_scale=0.5"),
    ("revnet", "invert", "fp32", STRIDES, "stream=int16"),
    ("revnet", "invert", "bf16", STRIDES, "stream=float32"),
    ("revnet", "store", "bf16", STRIDES, "stream=plain", "depth=1"),
    ("irevnet", "invert", "bf16", TWO_POOLS, "residual_scale=0.5", "stream=int32"),
    ("irevnet", "store", "bf16", TWO_POOLS, "stream=plain"),
    ("layerwise", "invert", "fp32", "norm_sign=negative", "max_gain=null"),
    ("hybrid", "invert", "fp32", "norm_sign=mixed", "max_gain=1"),
    ("hybrid", "invert", "bf16", TWO_POOLS, "stream=float32"),
    ("hybrid", "invert", "fp32", TWO_POOLS, "stream=int16"),
    ("hybrid", "store", "fp32", TWO_POOLS, "stream=plain"),
    ("chunked", "invert", "bf16", TWO_POOLS, "stream=plain", "expansion=[2,1,3]"),
    ("chunked", "store", "bf16", TWO_POOLS, "activation=gelu"),
    ("chunked", "invert", "fp32", "norm=hidden", "hidden_chunk=1"),
    ("chunked", "invert", "bf16", "norm=hidden"),
    ("chunked", "store", "fp32", "norm=hidden", "activation=silu"),
    ("chunked", "store", "bf16", "norm=hidden"),
]


def config(arch: str, *overrides: str):
    depth = () if arch == "resnet18" or any("depth" in each for each in overrides) else ("depth=3",)
    return compose(f"arch={arch}", "width=8", "chunk_mib=0.25", *depth, *overrides)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_closed_form_agrees_with_the_count_of_live_storages(case):
    arch, mode, precision, *overrides = case
    cfg = config(arch, f"backward={mode}", f"precision={precision}", *overrides)
    model, predict = analytic_memory(cfg), StepPredictor(cfg, 10, 32)
    large, small = predict(LARGE), predict(256)
    assert model.bytes_per_pixel == pytest.approx(large.peak / (LARGE * 32**2), rel=0.01)
    assert model.peak_bytes(LARGE, 32) == pytest.approx(large.peak, rel=0.003)
    assert model.peak_bytes(256, 32) == pytest.approx(small.peak, rel=0.05)
    # what does not grow with the batch is known to the byte
    assert model.parameters * 4 == large.gradients == large.optimizer
    assert model.fixed_of("theta") == large.parameters


@pytest.mark.parametrize("arch", for_task("classify"))
def test_closed_form_agrees_with_the_full_prediction(arch):
    """As above, with nothing left out of the step."""
    cfg = config(arch, "depth=18" if arch == "resnet18" else "depth=3")
    memory = predict_step_memory(cfg, 10, 32, 64)
    assert analytic_memory(cfg).bytes_per_pixel == pytest.approx(memory.bytes_per_pixel, rel=0.01)


@pytest.mark.parametrize("arch", for_task("classify"))
def test_terms_add_up_and_name_their_equation(arch):
    model = analytic_memory(config(arch))
    assert sum(term.bytes_per_pixel for term in model.terms) == pytest.approx(model.bytes_per_pixel)
    by_kind = sum(model.of(kind=kind) for kind in ("theta", "activation", "gradient", "optimizer"))
    assert by_kind == pytest.approx(model.bytes_per_pixel)
    assert len({term.name for term in model.terms}) == len(model.terms), "a buffer is counted once"
    for term in model.terms:
        assert isinstance(term, Term)
        assert term.formula and ("Eq" in term.equation or "section" in term.equation or "paper" in term.equation)
        assert term.bytes_per_pixel > 0 or term.bytes > 0


def test_the_papers_numbers():
    """Design figures: bytes per pixel of the published widths, labels apart."""

    def of(*overrides: str) -> float:
        return analytic_memory(compose(*overrides)).bytes_per_pixel

    labels = 8 / 32**2
    assert of("arch=layerwise") == (2 * 32 + 3) * 4 + labels == of("arch=chunked")
    assert of("arch=hybrid") == (3 * 32 + 3) * 4 + 2 + labels, "F's state, its gradient and a sign a value, of a half"
    assert of("arch=irevnet") == (5 * 32 + 3) * 4 + labels
    assert of("arch=chunked", "norm=hidden", "hidden_chunk=2") == (2 * 32 + 3 + 2 * 2) * 4 + labels
    assert of("arch=chunked", "precision=bf16") == (2 * 32 + 3) * 2 + labels
    assert of("arch=resnet18") == pytest.approx(4590, rel=0.01)


def test_global_and_local_bottleneck():
    """RevNet's is what the pass keeps; iRevNet and hybrid have a local one, layer-wise and chunked none."""
    scaled = [*own_keys("models")["residual_scale"]]
    model = {
        arch: analytic_memory(config(arch, *(["residual_scale=0.5"] if arch in scaled else [])))
        for arch in for_task("classify")
    }
    for arch in ("revnet", "resnet18"):
        assert model[arch].of(bottleneck="global") > 0.7 * model[arch].bytes_per_pixel
    for arch in ("layerwise", "chunked"):
        assert model[arch].of(bottleneck="local") == 0
        assert model[arch].of(kind="gradient") == 8 * 4
    assert model["hybrid"].of(bottleneck="local") == 8 * 4 + 8 / 16  # the state inside F, its gradient, signs
    assert model["irevnet"].of(bottleneck="local") == (3 + 0.5) * 8 * 4  # the half: the scaled gradient


@pytest.mark.parametrize("arch", [arch for arch in for_task("classify") if arch != "resnet18"])
def test_more_of_anything_is_never_less_memory(arch):
    def bytes_per_pixel(*overrides: str) -> float:
        return analytic_memory(compose(f"arch={arch}", *overrides)).bytes_per_pixel

    assert bytes_per_pixel("width=8") < bytes_per_pixel("width=16") <= 2.1 * bytes_per_pixel("width=8")
    invert, store = (
        [bytes_per_pixel(f"backward={mode}", f"depth={depth}") for depth in (4, 8, 16)] for mode in ("invert", "store")
    )
    assert invert[0] == invert[1] == invert[2], "flat over depth"
    assert invert[0] < store[0] < store[1] < store[2]
    for mode in ("invert", "store"):
        assert bytes_per_pixel(f"backward={mode}", "precision=bf16") < bytes_per_pixel(f"backward={mode}")


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


def test_an_architecture_without_a_closed_form_is_refused(tmp_path, monkeypatch):
    """One beside the package; its file says nothing of memory."""
    (tmp_path / "models").mkdir()
    (tmp_path / "conf").mkdir()
    (tmp_path / "models" / "unheard_of.py").write_text("from revtrain.models import Traits\n\nTRAITS = Traits()\n")
    monkeypatch.setenv(registry.VARIABLE, str(tmp_path))
    monkeypatch.setattr(revtrain.models, "__path__", [*revtrain.models.__path__])
    monkeypatch.setitem(sys.modules, "revtrain.models.unheard_of", None)  # taken out again afterwards
    del sys.modules["revtrain.models.unheard_of"]
    cfg = compose("arch=resnet18")
    cfg.arch = "unheard_of"
    with pytest.raises(RevtrainError, match=r"unheard_of[\s\S]*fake tensors"):
        analytic_memory(cfg)
