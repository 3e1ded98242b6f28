"""The measurements: SNR against its definition, live bytes against tensors of known size."""

import math

import pytest
import torch
from cases import ARCHS, REVERSIBLE, compose, ids
from torch import nn

from revtrain.core.chain import InvertibleChain
from revtrain.core.layer import InvertibleLayer
from revtrain.layers import CouplingConv2d, InvertibleLeakyReLU
from revtrain.memory.live import LiveStorages
from revtrain.models import build_model
from revtrain.numerics.snr import SNR_CEILING_DB, probe_snr, snr_db
from revtrain.planning.predict import StepPredictor, predict_step_memory


def test_snr_is_the_ratio_of_energies_in_decibels():
    true = torch.full((10,), 2.0)
    assert snr_db(true, true + 0.02) == pytest.approx(40, abs=1e-3)
    assert snr_db(true, true + 2.0) == pytest.approx(0, abs=1e-6)
    assert snr_db(true, true) == SNR_CEILING_DB
    assert snr_db(true, true * math.inf) == -SNR_CEILING_DB
    assert snr_db(torch.zeros(3), torch.ones(3)) == -SNR_CEILING_DB


class Wrong(InvertibleLayer):
    """Its inverse adds an error of known size: one per cent of the signal."""

    def forward(self, x):
        return x * 1

    def inverse(self, y, saved=None):
        return y * 1.01


def test_probe_finds_the_layer_that_errs():
    torch.manual_seed(0)
    chain = InvertibleChain([CouplingConv2d(4), Wrong(), InvertibleLeakyReLU(0.5)]).double()
    model = nn.Sequential(nn.Conv2d(3, 4, 1).double(), chain, nn.Flatten(), nn.Linear(64, 10).double())
    values = probe_snr(model, torch.randn(8, 3, 4, 4, dtype=torch.float64), torch.arange(8))
    assert list(values) == ["1/02_InvertibleLeakyReLU", "1/01_Wrong", "1/00_CouplingConv2d"]
    assert values["1/02_InvertibleLeakyReLU"] > 280
    assert values["1/01_Wrong"] == pytest.approx(40, abs=1e-6)
    assert values["1/00_CouplingConv2d"] < 42


@pytest.mark.parametrize("case", ARCHS, ids=ids(ARCHS))
def test_probe_leaves_no_trace(case):
    model = build_model(compose(f"arch={case.arch}", *case.small)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    values = probe_snr(model, torch.randn(8, 3, 32, 32, generator=torch.Generator()), torch.arange(8))
    assert bool(values) == case.reversible
    assert all(math.isfinite(v) and v > 20 for v in values.values())
    assert not model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("case", REVERSIBLE, ids=ids(REVERSIBLE))
def test_probe_is_empty_where_nothing_is_rebuilt(case):
    model = build_model(compose(f"arch={case.arch}", *case.small, "backward=store"))
    assert probe_snr(model, torch.randn(4, 3, 32, 32), torch.arange(4)) == {}


def test_probe_names_layers_inside_blocks():
    model = build_model(compose("arch=hybrid", "width=8", "depth=3"))
    values = probe_snr(model, torch.randn(8, 3, 32, 32), torch.arange(8))
    assert "trunk/00_AdditiveCoupling" in values
    assert "trunk/00_AdditiveCoupling/f/02_CouplingConv2d" in values
    assert values["trunk/00_AdditiveCoupling"] > 80


def test_live_storages_counts_what_is_alive():
    with LiveStorages() as counter:
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100).t()  # a view: nothing
        assert counter.live_bytes == 4000
        c = torch.ones(500)
        del a
        assert counter.live_bytes == 6000, "the view keeps the storage alive"
        del b, c
        assert counter.live_bytes == 0
        assert counter.peak_bytes == 6000
        counter.reset_peak()
        torch.ones(10)
        assert counter.peak_bytes == 40


def test_live_storages_of_plain_autograd_match_the_theory():
    """A stack of tanh stores one output a layer (Eq. 6), 4 bytes an element."""
    with LiveStorages() as counter:
        x = torch.randn(100, requires_grad=True)
        y = x
        for _ in range(5):
            y = y.tanh()
        assert counter.live_bytes == 6 * 400
        y.sum().backward()
        del x, y
        assert counter.live_bytes == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", ARCHS, ids=ids(ARCHS))
def test_prediction_with_fake_tensors_equals_the_real_run(case, precision):
    cfg = compose(f"arch={case.arch}", *case.small, f"precision={precision}")
    real = StepPredictor(cfg, 10, 32, quick=False, device=torch.device("cpu"))(16)
    fake = predict_step_memory(cfg, 10, 32, 16)
    assert fake.peak_bytes == pytest.approx(real.peak, rel=0.02)
    assert fake.parameter_bytes == real.parameters
    assert fake.gradient_bytes == real.gradients
    model = build_model(cfg)
    assert fake.gradient_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert fake.optimizer_bytes == fake.gradient_bytes, "one momentum a parameter"


def test_prediction_allocates_nothing_and_leaves_the_random_numbers():
    rng = torch.get_rng_state()
    memory = predict_step_memory(compose("arch=resnet18", "width=64"), 10, 32, 2**17)
    assert memory.peak_bytes > 2**37, "128 thousand images would need hundreds of GiB"
    assert torch.equal(rng, torch.get_rng_state())


def test_inverting_needs_far_less_than_storing():
    for arch in ("layerwise", "irevnet"):
        invert, store = (
            predict_step_memory(compose(f"arch={arch}", "width=8", "depth=3", f"backward={mode}"), 10, 32, 32)
            for mode in ("invert", "store")
        )
        assert invert.bytes_per_pixel < 0.4 * store.bytes_per_pixel
