"""Images that are larger than the scratch are worked through in tiles, and nobody can tell from the result."""

from __future__ import annotations

import copy
from itertools import product
from math import prod

import pytest
import torch
import torch.nn.functional as F
from cases import INVERTIBLE_TRUNKS, LAYERS, compose, ids
from torch import nn

from revtrain.core.chain import InvertibleChain
from revtrain.kernels import pieces as in_pieces
from revtrain.kernels.pieces import MOST_HALO, channels_of, pieces, points, set_chunk_mib
from revtrain.layers import (
    AdditiveCoupling,
    BatchPooling,
    ChannelPooling,
    HaarPooling,
    Head,
    HiddenChunkCoupling,
    PreNorm,
    Stem,
    Stem3d,
)
from revtrain.layers import reach as reaches
from revtrain.layers.reach import reach_of
from revtrain.models import build_model
from revtrain.planning.plan import plan
from revtrain.planning.predict import StepPredictor

SMALL = 0.002  # MiB: an image of this file is many pieces
BATCHES = {1: (24, 40), 3: (16, 24)}  # images -> their sides


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tiles of a few pixels, which are mostly halo; returns the lists of tiles that were asked for."""
    monkeypatch.setattr(in_pieces, "MOST_HALO", 20.0)
    in_pieces._tiles.cache_clear()
    find, found = in_pieces._tiles, []

    def watched(*args):
        found.append(find(*args))
        return found[-1]

    monkeypatch.setattr(in_pieces, "_tiles", watched)
    yield found
    find.cache_clear()


def step(model: nn.Module, x: torch.Tensor, chunk_mib: float):
    """(results, gradients by name, buffers by name) of one step."""
    set_chunk_mib(model, chunk_mib)
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), gradients, {name: b.clone() for name, b in model.named_buffers()}


def assert_tiled_is_untiled(model: nn.Module, x: torch.Tensor) -> None:
    in_tiles = copy.deepcopy(model)
    whole, tiled = step(model, x.clone(), 1000), step(in_tiles, x.clone(), SMALL)
    torch.testing.assert_close(tiled, whole, rtol=1e-10, atol=1e-10)
    assert whole[1]


# ---- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "pooling",
    [
        [],
        ["channel"],
        ["batch"],
        ["channel", "channel"],
        ["channel", "batch"],
        ["batch", "channel"],
        ["batch", "batch"],
    ],
    ids="-".join,
)
@pytest.mark.parametrize("case", INVERTIBLE_TRUNKS, ids=ids(INVERTIBLE_TRUNKS))
def test_every_reversible_network_with_every_pooling(case, pooling, batch, tiny_tiles):
    words = f"arch={case.arch}", "width=4", f"depth={len(pooling) + 1}", f"pooling=[{','.join(pooling)}]"
    torch.manual_seed(0)
    model = build_model(compose(*words), 10, 8).double().train()
    assert_tiled_is_untiled(model, torch.randn(batch, 3, *BATCHES[batch], dtype=torch.float64))
    assert max(map(len, tiny_tiles)) > 3


@pytest.mark.parametrize("sides", [(23, 37), (7, 64), (40, 9)])
@pytest.mark.parametrize("arch", ["chunked", "layerwise", "hybrid", "chunked norm=hidden"])
def test_sides_that_tiles_do_not_divide(arch, sides, tiny_tiles):
    torch.manual_seed(0)
    words = f"arch={arch}".split()
    model = build_model(compose(*words, "width=4", "depth=1", "pooling=[]"), 10, 8).double().train()
    assert_tiled_is_untiled(model, torch.randn(2, 3, *sides, dtype=torch.float64))
    assert max(map(len, tiny_tiles)) > 3


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_invert_in_tiles_is_store(mode, tiny_tiles):
    torch.manual_seed(0)
    inverting = build_model(compose("arch=chunked", "width=4", "depth=3"), 10, 8).double().train(mode == "train")
    storing = copy.deepcopy(inverting)
    storing.trunk.backward_mode = "store"
    x = torch.randn(1, 3, 24, 40, dtype=torch.float64)
    torch.testing.assert_close(step(inverting, x, SMALL), step(storing, x, SMALL), rtol=1e-9, atol=1e-9)
    assert max(map(len, tiny_tiles)) > 3


@pytest.mark.parametrize("name", ["int32", "int16"])
@pytest.mark.parametrize("arch", ["chunked", "chunked norm=hidden", "irevnet", "hybrid"])
def test_integer_states_are_the_same_to_the_bit(arch, name, tiny_tiles):
    torch.manual_seed(0)
    words = f"arch={arch}".split()
    model = build_model(compose(*words, f"stream={name}", "width=4", "depth=3"), 10, 8).double().train()
    images, states = torch.randn(1, 3, 24, 40, dtype=torch.float64), []
    for chunk_mib in (1000, SMALL):
        set_chunk_mib(model, chunk_mib)
        with torch.no_grad():
            first = model.trunk.encode(model.stem(images))
            last, saved = model.trunk.forward_(first.clone())
            states.append((first, last.clone(), model.trunk.inverse_(last, saved)))
    (first, last, rebuilt), in_tiles = states
    assert torch.equal(rebuilt, first)
    assert all(map(torch.equal, in_tiles, (first, last, rebuilt)))


@pytest.mark.parametrize("case", LAYERS, ids=ids(LAYERS))
def test_every_layer(case, tiny_tiles):
    """Dropout, and whatever else looks at more than its neighbours, runs on whole images."""
    torch.manual_seed(0)
    chain = InvertibleChain([case.make()]).double().train()
    x = torch.randn(2, case.shape[1], 12, 20, dtype=torch.float64)
    found = []
    for model, chunk_mib in ((chain, 1000), (copy.deepcopy(chain), SMALL)):
        own = x.clone().requires_grad_()
        torch.manual_seed(1)
        found.append((step(model, own, chunk_mib), own.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "body",
    [
        nn.Sequential(nn.Conv2d(2, 3, 5, padding=2), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1)),
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=4, dilation=4), nn.SiLU(), nn.Conv2d(4, 2, 1)),
        nn.Sequential(nn.Conv2d(2, 4, (3, 1), padding="same"), nn.GELU(), nn.Conv2d(4, 2, (1, 5), padding=(0, 2))),
        nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)),
        nn.Conv2d(2, 2, 7, padding=3, padding_mode="replicate", groups=2),
        nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.Conv2d(2, 2, 3, padding=1)),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1), nn.Upsample((24, 40))),
    ],
    ids=["5x5", "dilated", "uneven", "reflect", "replicate", "groupnorm", "circular", "global"],
)
@pytest.mark.parametrize("normalised", [True, False])
def test_functions_of_every_reach(body, normalised, tiny_tiles):
    torch.manual_seed(0)
    f, g = (copy.deepcopy(body) for _ in range(2))
    f, g = (PreNorm(2, each) if normalised else each for each in (f, g))
    chain = InvertibleChain([AdditiveCoupling(4, f, g, per_sample=not normalised)]).double().train()
    assert_tiled_is_untiled(chain, torch.randn(2, 4, 24, 40, dtype=torch.float64))
    assert (max(map(len, tiny_tiles), default=1) > 3) == (reach_of(body) is not None)


@pytest.mark.parametrize("dims", [1, 3])
def test_volumes_and_rows(dims, tiny_tiles):
    torch.manual_seed(0)
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]

    def prenorm(channels):
        norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims](channels)
        return PreNorm(norm, nn.Sequential(conv(channels, 3, 3, padding=1), nn.Tanh(), conv(3, channels, 3, padding=1)))

    half = 2**dims
    layers = [
        AdditiveCoupling(2, prenorm(1), prenorm(1)),
        ChannelPooling(),
        AdditiveCoupling(2 * half, prenorm(half), prenorm(half)),
        BatchPooling(),
    ]
    head = Head(2 * half, 5, sub_images=half, slope=0.2)
    chain = InvertibleChain(layers, head=head).double().train()
    sides = {1: (4096,), 3: (8, 12, 20)}[dims]
    assert_tiled_is_untiled(chain, torch.randn(2, 2, *sides, dtype=torch.float64))
    assert max(map(len, tiny_tiles)) > 3


# ---- layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_bytes", [10**6, 400, 100, 16])
@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (1, 2, 6, 4, 10), (2, 2, 10, 6), (1, 3, 16)], ids=str)
@pytest.mark.parametrize("kind", [ChannelPooling, BatchPooling, HaarPooling])
def test_pooling_in_place_of_any_size(kind, shape, piece_bytes):
    if kind is HaarPooling and len(shape) != 4:
        pytest.skip("images only")
    x, layer = torch.randn(shape), kind()
    for module in layer.modules():
        module.piece_bytes = piece_bytes
    y = layer.forward(x)
    storage = x.clone()
    found, _ = layer.forward_(storage)
    torch.testing.assert_close(found, y, rtol=0, atol=1e-6)
    assert found.data_ptr() == storage.data_ptr()
    torch.testing.assert_close(layer.inverse_(y.clone(), None), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_the_stem_of_volumes_in_tiles(bias, tiny_tiles):
    torch.manual_seed(0)
    stem = Stem3d(2, 3, 3, padding=1, bias=bias).double()
    assert_tiled_is_untiled(stem, torch.randn(2, 2, 12, 10, 9, dtype=torch.float64))
    assert max(map(len, tiny_tiles)) > 3


@pytest.mark.parametrize("bias", [True, False])
def test_the_stem_in_tiles(bias, tiny_tiles):
    torch.manual_seed(0)
    stem = Stem(3, 5, 3, padding=1, bias=bias).double()
    assert_tiled_is_untiled(stem, torch.randn(2, 3, 30, 17, dtype=torch.float64))
    assert max(map(len, tiny_tiles)) > 3
    x = torch.randn(1, 3, 30, 17, dtype=torch.float64, requires_grad=True)  # then it is torch's own convolution
    torch.testing.assert_close(stem(x), F.conv2d(x, stem.weight, stem.bias, padding=1))
    stem(x).sum().backward()
    assert x.grad is not None


def test_hidden_chunks_in_16_bit_run_in_tiles(tiny_tiles):
    torch.manual_seed(0)
    chain = InvertibleChain([HiddenChunkCoupling(4, hidden=6, hidden_chunk=2)]).train()
    with torch.autocast("cpu", torch.bfloat16):
        in_tiles = copy.deepcopy(chain)
        x = torch.randn(1, 4, 24, 40)
        whole, tiled = step(chain, x, 1000), step(in_tiles, x, SMALL)
    torch.testing.assert_close(tiled[:2], whole[:2], rtol=0.05, atol=0.1)


# ---- pieces ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(2, 3, 50, 70), (1, 8, 9, 10, 11), (3, 2, 400), (5, 4, 6, 6), (1, 1, 300, 7)], ids=str
)
@pytest.mark.parametrize("piece_bytes", [10**6, 3000, 400, 40])
def test_pieces_cover_each_value_once(shape, piece_bytes):
    x = torch.zeros(shape)
    for index in points(x, piece_bytes):
        x[index] += 1
        assert x[index].shape[1] == x[:, channels_of(index)].shape[1]
        assert x[index].is_contiguous() or len(index) == 1
    assert (x == 1).all()
    for piece in pieces(x, piece_bytes, (1,)):
        x[piece.own] += 1
        read = torch.zeros(x[piece.read].shape)
        assert piece.crop(read).shape == x[piece.own].shape
        padded, cleared = piece.pad(x[piece.own]), x[piece.read].clone()
        piece.clear_halo_(cleared)
        assert torch.equal(padded, cleared)
    assert (x == 2).all()


@pytest.mark.parametrize("reach", [1, 2, 6])
@pytest.mark.parametrize(
    "shape", [(1, 16, 1024, 1024), (1, 256, 256, 256), (1, 64, 1000, 700), (1, 16, 100, 3000)], ids=str
)
def test_halos_are_less_than_15_percent_of_the_work(shape, reach):
    own = read = 0
    for piece in pieces(torch.empty(shape, device="meta"), 2**21, (reach,)):
        own += prod(each.stop - each.start for each in piece.own[2:])
        read += prod(each.stop - each.start for each in piece.read[2:])
    assert own == prod(shape[2:]) and read <= (1 + MOST_HALO) * own


@pytest.mark.parametrize(
    ("sides", "reach", "pixels", "counts"),
    [
        ((1024, 1024), 2, 2**16, (16, 1)),  # strips, whose halos cost little
        ((8192, 8192), 2, 2**16, (32, 32)),  # strips would be halo
        ((8192, 8192), 0, 2**16, (1024, 1)),
        ((100, 6000), 0, 2000, (100, 3)),
        ((128, 128, 128), 0, 2**16, (32, 1, 1)),
        ((64, 64), 40, 64, (1, 1)),
    ],
    ids=str,
)
def test_tiles_are_cut_for_the_least_work(sides, reach, pixels, counts):
    assert in_pieces._cut(sides, (reach,) * len(sides), pixels) == counts


@pytest.mark.parametrize("pixels", [4000, 900, 250, 60])
@pytest.mark.parametrize("reach", [(1, 1), (2, 2), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("sides", [(120, 90), (31, 200), (77, 77)], ids=str)
def test_no_other_tiles_are_as_small_for_less_work(sides, reach, pixels):
    def of(counts):
        """(by how much the largest tile exceeds what was asked for, work)."""
        largest = prod(-(-side // k) for side, k in zip(sides, counts, strict=True))
        growth = prod(1 + 2 * wide * (k - 1) / side for k, wide, side in zip(counts, reach, sides, strict=True))
        return max(0, largest - pixels), growth + in_pieces.CUT_ROWS * (counts[1] > 1), growth

    ways = [of(counts) for counts in product(*(range(1, side + 1) for side in sides))]
    best = min(way[:2] for way in ways if way[2] <= 1 + MOST_HALO)
    assert of(in_pieces._cut(sides, reach, pixels))[:2] == pytest.approx(best)


def test_a_module_says_how_far_it_looks():
    class Blur(nn.Module):
        reach = 1

        def forward(self, x):
            return F.avg_pool2d(x, 3, stride=1, padding=1)

    assert reach_of(nn.Sequential(Blur(), nn.Conv2d(2, 2, 5, padding=2))) == (3, 3)
    assert reach_of(Blur()) == (1,) and reach_of(nn.ReLU()) == ()
    other = nn.ReLU()
    other.reach = "far"  # means something else
    assert reach_of(other) == ()
    hooked = nn.Conv2d(2, 2, 3, padding=1)
    hooked.register_forward_hook(lambda *_: None)
    strange = [nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 2, padding=1), nn.Conv2d(2, 2, 3, 2, 1), nn.Dropout(), hooked]
    assert [reach_of(each) for each in strange] == [None] * len(strange)


def test_that_a_function_runs_on_whole_images_is_said_once(caplog, tiny_tiles):
    reaches._said.clear()
    body = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(1, 2))
    chain = InvertibleChain([AdditiveCoupling(4, PreNorm(2, body))]).train()
    for _ in range(2):
        step(chain, torch.randn(1, 4, 24, 40), SMALL)
    said = [record.getMessage() for record in caplog.records if "whole images" in record.getMessage()]
    assert len(said) == 1 and "`reach`" in said[0]


# ---- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "of_a_batch"),
    [(("width=32",), 268), (("width=32", "precision=bf16"), 134), (("width=16", "precision=bf16"), 70.2)],
    ids=["fp32", "bf16", "narrow"],
)
def test_bytes_per_pixel_of_one_large_image(words, of_a_batch):
    sizes = (1024, 4096)
    predicted = [StepPredictor(compose("arch=chunked", *words), 10, size)(1) for size in sizes]
    small, large = (each.forward_backward - each.parameters - each.gradients - each.optimizer for each in predicted)
    assert (large - small) / (sizes[1] ** 2 - sizes[0] ** 2) == pytest.approx(of_a_batch, rel=0.03)
    scratch = [peak - of_a_batch * size**2 for peak, size in zip((small, large), sizes, strict=True)]
    assert scratch[0] < 24 * 2**20 and scratch[1] - scratch[0] < 0.01 * large  # it does not grow


def test_a_plan_of_one_image_of_8192_pixels_a_side_is_under_5_gib():
    words = (
        "arch=chunked",
        "width=16",
        "precision=bf16",
        "batch=1",
        "data.image_size=8192",
        "probe.every=0",
        "device=cpu",
    )
    found = plan(compose(*words))
    assert found.batch == 1 and found.needed_bytes < 5 * 2**30
    assert found.bytes_per_pixel == pytest.approx(70, rel=0.01)


def test_a_network_trains_on_one_image_at_a_time(command):
    words = ("arch=chunked", "width=4", "depth=1", "pooling=[]", "data.image_size=64", "chunk_mib=0.01")
    ran = command(
        *words, "data=synthetic", "data.train_images=10", "data.test_images=10", "batch=1", "epochs=1", "probe.batch=2"
    )
    assert ran.code == 0, ran.err
    assert ran.result["bytes_per_pixel"] == pytest.approx(2 * 4 * 4 + 12, rel=0.05)
