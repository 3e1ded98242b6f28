"""The SNR that training keeps, and what is said when it is lost."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from cases import compose

from revtrain.config import read
from revtrain.core.chain import InvertibleChain
from revtrain.data import load_data, normalise
from revtrain.layers import AdditiveCoupling
from revtrain.models import build_model, for_task, traits
from revtrain.numerics.fidelity import TRUSTED_COSINE, FidelityWatch, remedies, summarise_gradients, trusted
from revtrain.numerics.gradients import GradientFidelity, compare, probe_gradients
from revtrain.numerics.probing import loss_gradients
from revtrain.numerics.snr import probe_snr
from revtrain.optim import make_optimizer
from revtrain.training.probe import Probe
from revtrain.training.run import train


@pytest.fixture(scope="module")
def batch():
    data = load_data(read(compose("data.train_images=32", "data.test_images=10")).data)
    return normalise(data.train.images, data.mean, data.std), data.train.labels


def network(*overrides):
    cfg = compose("arch=layerwise", "width=8", "depth=9", *overrides)
    torch.manual_seed(0)
    return build_model(cfg, 10, 32), cfg


# The authors' choices: positive gains, no bound, epsilon_i = 0
PAPER = ("norm_sign=positive", "max_gain=null", "epsilon_i=0")


def test_mixed_signs_and_bounds_keep_the_snr_of_a_layer_wise_network(batch):
    ours, papers, negative = (
        min(probe_snr(network(*words)[0], *batch).values()) for words in ((), PAPER, ("norm_sign=negative",))
    )
    assert ours > papers + 15
    assert negative > ours + 15


def test_training_does_not_take_the_snr_away(batch):
    found = {}
    for words in ((), PAPER):
        model, cfg = network("backward=store", "lr=0.1", *words)
        optimizer = make_optimizer(model, read(cfg).training)
        for _ in range(15):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
        for module in model.modules():
            if isinstance(module, InvertibleChain):
                module.backward_mode = "invert"
        found[words] = min(probe_snr(model, *batch).values())
    assert found[()] > 20
    assert found[()] > found[PAPER] + 25


def test_gradients_of_a_precise_network_agree_with_the_stored_ones(batch):
    model, _ = network("depth=3")
    found = probe_gradients(model, *batch)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert min(each.cosine for each in found.values()) > 0.999
    assert 0 < max(each.relative_error for each in found.values()) < 0.05
    assert all(p.grad is None for p in model.parameters())
    assert {m.backward_mode for m in model.modules() if isinstance(m, InvertibleChain)} == {"invert"}


def test_gradients_of_a_noisy_network_do_not(batch):
    model, _ = network("depth=12", "slope=0.05", *PAPER)
    assert min(each.cosine for each in probe_gradients(model, *batch).values()) < 0.5


def test_a_network_that_stores_has_nothing_to_compare(batch):
    assert probe_gradients(network("backward=store")[0], *batch) == {}
    assert summarise_gradients({}) is None and trusted({"gradients": None, "snr_db": None}) is None


class Lost(AdditiveCoupling):
    """Its lean form loses the gradient of F's bias, with everything rebuilt to the last digit."""

    def backward_(self, y, dy, saved, grads):
        add = grads.add
        grads.add = lambda tensor, *rest, **named: None if tensor is self.f.bias else add(tensor, *rest, **named)
        result = super().backward_(y, dy, saved, grads)
        del grads.add
        return result


def test_a_missing_gradient_is_shown_and_said_once(batch, caplog):
    torch.manual_seed(0)
    lost = Lost(4, torch.nn.Conv2d(2, 2, 3, padding=1), torch.nn.Conv2d(2, 2, 3, padding=1))
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 10)]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), InvertibleChain([lost]), *head)
    found = probe_gradients(model, *batch)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert [name for name, each in found.items() if each.is_missing] == ["1.layers.0.f.bias"]

    data = load_data(read(compose("data.train_images=32", "data.test_images=10")).data)
    probe = Probe(read(compose("probe.batch=32")).probe, data.train)
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        line = probe.measure(model, batch[0], torch.device("cpu"), "fp32")
    assert line["snr_db"]["minimum"] > 100 and trusted(line) is False
    (said,) = [each.getMessage() for each in caplog.records]
    assert "no gradient arrives at 1.layers.0.f.bias" in said


def test_compare():
    true = torch.tensor([3.0, 4.0])
    assert compare(true, true) == (1.0, 0.0)
    assert compare(-true, true) == pytest.approx((-1.0, 2.0))
    assert compare(torch.tensor([4.0, -3.0]), true) == pytest.approx((0.0, math.sqrt(2)))
    assert compare(torch.tensor([math.nan, 1.0]), true) == (0.0, math.inf)
    assert compare(torch.zeros(2), torch.zeros(2)) == (1.0, 0.0)


class Faint(torch.nn.Module):
    def forward(self, x):
        return x * 1e-4


def test_gradients_in_float16_come_from_a_scaled_loss(batch):
    """Without the scale those behind a faint activation would all be 0."""
    torch.manual_seed(0)
    mean = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), Faint(), mean, torch.nn.Linear(4, 10))
    true = loss_gradients(model, *batch)
    with torch.autocast("cpu", torch.float16):
        found = loss_gradients(model, batch[0].half(), batch[1])
    assert compare(found[0], true[0]).cosine > 0.9
    assert found[0].norm().item() == pytest.approx(true[0].norm().item(), rel=0.3)


def test_noise_of_the_precision_is_not_blamed_on_reconstruction():
    noisy = line(0.8)
    assert trusted(noisy) is False
    assert trusted({**noisy, "snr_db": {**noisy["snr_db"], "minimum": 50.0}}) is True


def line(cosine):
    gradients = summarise_gradients({"stem.weight": GradientFidelity(cosine, 0.7), "b": GradientFidelity(0.99, 0.1)})
    snr = {"minimum": 3.2, "minimum_layer": "trunk/00_CouplingConv2d", "layers": {}}
    return {"epoch": 2, "gradients": gradients, "snr_db": snr}


def test_the_user_is_told_once_what_to_change(caplog):
    caplog.set_level(logging.WARNING)
    config = read(compose("arch=layerwise", "depth=9", "norm_sign=positive", "max_gain=null"))
    watch = FidelityWatch(config.network)
    watch.look(line(TRUSTED_COSINE + 0.01))
    assert not caplog.records
    watch.look(line(0.4))
    watch.look(line(0.3))
    (record,) = caplog.records
    for fragment in ("stem.weight", "0.40", "3.2 dB in trunk/00_CouplingConv2d", "max_gain=1", "norm_sign=mixed",
                     "slope (now 0.2)", "epsilon_i (now 0.1)", "depth (now 9)", "arch=hybrid"):  # fmt: skip
        assert fragment in record.getMessage()
    assert len(record.getMessage().splitlines()) <= 5


def remedies_of(*overrides):
    return remedies(read(compose(*overrides)).network)


def test_advice_is_what_an_architecture_knows_of_itself():
    assert remedies_of("arch=layerwise", "depth=9", "norm_sign=negative", "slope=0.5") == [
        "a larger epsilon_i (now 0.1)", "a smaller depth (now 9)", "arch=hybrid",
    ]  # fmt: skip
    assert "norm_sign=negative" in remedies_of("arch=layerwise", "norm_sign=mixed")
    hybrid = remedies_of("arch=hybrid", "stream=plain", "precision=bf16")
    assert hybrid[0] == "stream=auto" and {"max_gain=1", "precision=fp32", "arch=chunked"} <= set(hybrid)
    assert remedies_of("arch=revnet", "stream=plain") == ["stream=auto"]


@pytest.mark.parametrize("arch", for_task("classify"))
def test_advised_architectures_have_less_noise(arch):
    levels = ["nowhere", "in blocks", "along the chain"]
    advised = [each.removeprefix("arch=") for each in remedies_of(f"arch={arch}") if each.startswith("arch=")]
    assert all(traits(each).reversible for each in advised)
    assert all(levels.index(traits(each).noise) < levels.index(traits(arch).noise) for each in advised)
    assert bool(advised) is (traits(arch).noise != "nowhere")
    assert remedies_of(f"arch={arch}"), "there is always something to do"


def test_a_comparison_that_does_not_fit_into_memory_is_left_out(tmp_path, monkeypatch, caplog):
    """The stored activations are what the user has no memory for: training goes on, and is told once."""
    calls = []

    def full(*_):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("revtrain.numerics.gradients.probe_gradients", full)
    caplog.set_level(logging.WARNING)
    words = ("width=8", "depth=1", "pooling=[]", "epochs=2", "batch=16", "data.train_images=32", "data.test_images=16")
    result = train(compose("arch=layerwise", *words, "probe.every=1"), tmp_path)
    assert result["status"] == "completed" and result["snr_db"]["minimum"] > 0
    assert result["gradients"] is result["gradients_trusted"] is None
    assert len(calls) == len([each for each in caplog.records if "probe.batch" in each.getMessage()]) == 1


def test_a_run_says_whether_its_gradients_were_trusted(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    words = ("width=8", "epochs=1", "batch=16", "data.train_images=32", "data.test_images=16", "probe.batch=16")
    for name, depth, good in (("shallow", 1, True), ("deep", 12, False)):
        caplog.clear()
        result = train(
            compose("arch=layerwise", f"depth={depth}", "slope=0.2", *PAPER[:2], *words, "lr=1e-6"), tmp_path / name
        )
        assert result["gradients_trusted"] is good
        assert (result["gradients"]["minimum_cosine"] > TRUSTED_COSINE) is good
        warnings = [each for each in caplog.records if "no longer to be trusted" in each.getMessage()]
        assert len(warnings) == (0 if good else 1)
