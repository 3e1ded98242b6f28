"""The halves of a reversible network's state: what is measured of them, and that hybrid's do not become copies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import compose
from conftest import TINY, read_metrics

from revtrain.config import read
from revtrain.data import load_data, normalise
from revtrain.layers import CouplingConv2d, InvertibleBatchNorm2d
from revtrain.models import build_model
from revtrain.numerics.halves import correlation_of_halves, effective_rank, probe_halves
from revtrain.optim import make_optimizer

MOST = 0.3  # correlation


@pytest.fixture(scope="module")
def images():
    """(128, 3, 32, 32), drawn, normalised; and their labels."""
    data = load_data(read(compose("data.train_images=128", "data.test_images=20")).data)
    return normalise(data.train.images, data.mean, data.std), data.train.labels


def test_correlation_of_halves():
    first = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    other = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for second, expected in ((first, 1.0), (-2 * first + 3, -1.0), (other, 0.0), (first + other, 0.5**0.5)):
        found = correlation_of_halves(torch.cat([first, second], 1))
        assert found == pytest.approx(expected, abs=0.05 if expected in (0.0, 0.5**0.5) else 1e-6)
    assert correlation_of_halves(torch.ones(2, 4, 3, 3)) == 0, "no variance, no correlation"


def test_effective_rank():
    independent = torch.randn(64, 6, 16, 16, generator=torch.Generator().manual_seed(0))
    assert effective_rank(independent) == pytest.approx(6, rel=0.01)
    assert effective_rank(torch.cat([independent, 2 * independent + 1], 1)) == pytest.approx(6, rel=0.01)
    assert effective_rank(independent[:, :1].expand(-1, 8, -1, -1)) == pytest.approx(1, rel=0.01)
    assert effective_rank(independent[:1, :, :1, :2]) <= 2, "no more than there are values"


def block_of(*overrides):
    model = build_model(compose("arch=hybrid", "width=16", "depth=1", "pooling=[]", "slope=1", *overrides))
    block = model.trunk.layers[0]
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, CouplingConv2d):
                module.f.weight.zero_()
                module.g.weight.zero_()
    return block


@pytest.mark.parametrize("sign", ["positive", "mixed", "negative"])
def test_identity_paths_of_f_and_g_oppose_each_other(sign):
    """Without convolutions and with n = 1, F and G are their identity paths: G's is F's with the other sign."""
    block = block_of(f"norm_sign={sign}")
    x = torch.randn(8, 8, 6, 6)
    f, g = block.f(x), block.g(x)
    torch.testing.assert_close(g, -f)
    same = block_of(f"norm_sign={sign}", "opposed_paths=false")
    if sign != "mixed":
        torch.testing.assert_close(same.g(x), same.f(x))


def test_opposed_paths_rotate_the_state():
    """A block of identity paths alone neither stretches the state nor makes its halves alike; the paper's does both."""
    x = torch.randn(32, 16, 8, 8)
    energies, correlations = {}, {}
    for opposed in (True, False):
        state = x
        for _ in range(6):
            state = block_of(f"opposed_paths={opposed}".lower())(state).detach()
        energies[opposed] = (state.square().mean() / x.square().mean()).item()
        correlations[opposed] = correlation_of_halves(state)
    assert energies[True] < 5 < energies[False]
    assert abs(correlations[True]) < 0.6 < 0.9 < correlations[False]


@pytest.mark.parametrize("overrides", [("depth=6",), ("depth=12", "width=16"), ("residual_scale=0.5",)], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_hybrids_halves_differ_at_initialisation(overrides, seed, images):
    torch.manual_seed(seed)
    found = probe_halves(build_model(compose("arch=hybrid", "width=8", *overrides)), images[0])
    torch.manual_seed(seed)
    paper = probe_halves(build_model(compose("arch=hybrid_paper", "width=8", *overrides)), images[0])
    assert abs(found["last"].correlation) < MOST
    assert paper["last"].correlation > 0.7, "or there is nothing to mend"
    assert found["last"].effective_rank > 2 * paper["last"].effective_rank
    assert found["last"].channels == paper["last"].channels == int(build_channels(overrides))


def build_channels(overrides):
    return 256 if "width=16" in overrides else 128


def test_hybrids_halves_differ_after_training(images):
    """Forty steps, with rebuilt activations, at a rate that learns."""
    cfg = compose("arch=hybrid", "width=8", "depth=3", "lr=0.1")
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = make_optimizer(model, read(cfg).training)
    losses = []
    for step in range(40):
        part = slice(step % 2 * 64, step % 2 * 64 + 64)
        loss = F.cross_entropy(model(images[0][part]), images[1][part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert abs(probe_halves(model, images[0])["last"].correlation) < MOST


@pytest.mark.parametrize("arch", ["revnet", "irevnet", "layerwise", "chunked", "resnet18"])
def test_the_probe_leaves_no_trace(arch, images):
    model = build_model(compose(f"arch={arch}", "width=4"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = probe_halves(model, images[0][:8])
    assert ("last" in found) == (arch != "resnet18")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_run_reports_its_halves_and_warns_once(command):
    tiny = [each for each in TINY if not each.startswith(("arch", "pooling", "depth"))]
    ran = command(*tiny, "arch=hybrid_paper", "pooling=[]", "depth=4")
    assert ran.code == 0
    assert ran.out.count("nearly copies of each other") == 1
    assert "opposed_paths=true" in ran.out
    for line in read_metrics(ran.dir):
        assert line["halves"]["channels"] == 4
        assert 0.7 < line["halves"]["correlation"] <= 1
        assert 1 <= line["halves"]["effective_rank"] <= 4
        assert len(line["halves"]["layers"]) == 4
    assert ran.result["halves"]["correlation"] == read_metrics(ran.dir)[-1]["halves"]["correlation"]
    mended = command(*tiny, "arch=hybrid", "pooling=[]", "depth=4")
    assert mended.code == 0
    assert "copies" not in mended.out


def test_set_signs_reaches_the_gains():
    norm = InvertibleBatchNorm2d(4, sign="positive")
    norm.set_signs(-1)
    assert (norm.gain() < 0).all()
    assert "sign=negative" in repr(norm)
