"""Something for every pixel: a reversible U-Net in one chain, whose head works out the loss piece by piece."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_tiles import SMALL, assert_tiled_is_untiled, step, tiny_tiles  # noqa: F401  # a fixture
from torch import nn

from revtrain.core.chain import InvertibleChain
from revtrain.core.state_format import StateFormat
from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import set_chunk_mib
from revtrain.layers import (
    AdditiveCoupling,
    ChannelPooling,
    ChannelUnpooling,
    DenseHead,
    PartialChain,
    PreNorm,
    Stem,
    intersection_over_union,
)
from revtrain.memory.live import LiveStorages

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FORMATS = {name: StateFormat(name) for name in ("plain", "float32", "int32", "int16")}


def residual(channels: int, dims: int) -> PreNorm:
    conv = CONVOLUTIONS[dims]
    body = nn.Sequential(conv(channels, 4, 3, padding=1), nn.ReLU(), conv(4, channels, 3, padding=1))
    return PreNorm(NORMS[dims](channels), body)


def level(channels: int, deeper: int, dims: int = 2, state_format: StateFormat = FORMATS["plain"]) -> list:
    """A block on the way down, half of the channels through the levels below, a block on the way up."""
    f = [residual(channels // 2, dims) for _ in range(4)]
    down, up = (AdditiveCoupling(channels, *f[i : i + 2], state_format=state_format) for i in (0, 2))
    if not deeper:
        return [down, up]
    below = level(channels // 2 * 2**dims, deeper - 1, dims, state_format)
    return [down, PartialChain(channels, [ChannelPooling(), *below, ChannelUnpooling()], state_format), up]


def unet(
    dims: int = 2, state_format: StateFormat = FORMATS["plain"], channels: int = 4, deeper: int = 2
) -> InvertibleChain:
    layers = level(channels, deeper, dims, state_format)
    return InvertibleChain(layers, state_format=state_format, head=DenseHead(channels, 3, dims=dims)).double().train()


SIDES = {1: (32,), 2: (16, 24), 3: (8, 12, 4)}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dims", SIDES)
@pytest.mark.parametrize("with_labels", [True, False])
def test_a_unet_inverts_as_it_stores_in_tiles_and_whole(dims, name, with_labels, tiny_tiles):  # noqa: F811
    torch.manual_seed(0)
    inverting = unet(dims, FORMATS[name])
    storing, in_tiles = copy.deepcopy(inverting), copy.deepcopy(inverting)
    storing.backward_mode = "store"
    x = torch.randn(3, 4, *SIDES[dims], dtype=torch.float64)
    labels = torch.randint(0, 3, (3, *SIDES[dims]))
    labels[1, :4] = 255
    found = []
    for model, chunk_mib in ((inverting, 1000), (storing, 1000), (in_tiles, SMALL)):
        own = x.clone().requires_grad_()
        run = _WithLabels(model, labels) if with_labels else model
        found.append((step(run, own, chunk_mib), own.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[2], found[0], rtol=1e-9, atol=1e-9)


class _WithLabels(nn.Module):
    def __init__(self, model: nn.Module, labels: torch.Tensor):
        super().__init__()
        self.model, self.labels = model, labels

    def forward(self, x):
        return self.model(x, self.labels)


def test_the_loss_is_the_cross_entropy_of_the_logits_and_the_confusion_counts_them():
    torch.manual_seed(0)
    model, labels = unet(), torch.randint(0, 3, (2, 16, 24))
    labels[0, 3] = 255
    x = torch.randn(2, 4, 16, 24, dtype=torch.float64)
    logits = model(x)
    losses = model(x, labels)
    for i in range(2):
        expected = F.cross_entropy(logits[i : i + 1], labels[i : i + 1], ignore_index=255)
        torch.testing.assert_close(losses[i], expected)
    known, taken = labels != 255, logits.argmax(1)
    table = torch.stack([((labels == i) & (taken == j) & known).sum() for i in range(3) for j in range(3)]).view(3, 3)
    assert torch.equal(model.head.confusion, table)
    overlap = [((labels == i) & (taken == i)).sum() / (((labels == i) | (taken == i)) & known).sum() for i in range(3)]
    torch.testing.assert_close(intersection_over_union(table), torch.stack(overlap).double(), rtol=1e-6, atol=0)


def test_labels_of_another_shape_or_type_are_refused():
    model, x = unet(), torch.randn(2, 4, 16, 24, dtype=torch.float64)
    for labels in (
        torch.zeros(2, 16, 24),
        torch.zeros(2, 24, 16, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
    ):
        for mode in ("invert", "store"):
            model.backward_mode = mode
            with pytest.raises(RevtrainError, match="a class for each pixel"):
                model(x, labels)


def test_a_part_has_to_come_back_in_its_shape():
    part = PartialChain(4, [ChannelPooling()])
    for mode in ("invert", "store"):
        with pytest.raises(RevtrainError, match="an unpooling on the way up"):
            InvertibleChain([part], backward=mode)(torch.randn(2, 4, 8, 8, requires_grad=True))


def live_peak(model: nn.Module, size: int) -> int:
    """Most bytes alive in a step on one image, beside the weights."""
    x, labels = torch.randn(1, 4, size, size), torch.zeros(1, size, size, dtype=torch.int64)
    with LiveStorages() as live:
        model(x, labels).mean().backward()
    return live.peak_bytes


def test_two_states_a_pixel_and_nothing_for_logits_skips_and_depth():
    """Of 4 channels in float32: 32 bytes a pixel. The labels are 8, which of them count 1; images are not counted."""
    torch.manual_seed(0)
    shallow, deep = (unet(deeper=deeper).float() for deeper in (1, 3))
    for model in (shallow, deep):
        set_chunk_mib(model, 0.03)
        model.zero_grad()
        peaks = [live_peak(model, size) for size in (128, 256)]
        model.zero_grad()
        per_pixel = (peaks[1] - peaks[0]) / (256**2 - 128**2)
        assert per_pixel == pytest.approx(32 + 8 + 1, rel=0.03)


def test_a_unet_learns_to_tell_discs_from_squares():
    torch.manual_seed(0)
    generator, epochs = torch.Generator().manual_seed(1), 28
    stem, chain = Stem(1, 8, 3, padding=1), unet(channels=8).float()
    images, labels = _shapes(64, generator)
    optimizer = torch.optim.Adam([*stem.parameters(), *chain.parameters()], 0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, total_iters=epochs)
    for _ in range(epochs):
        for own, truth in zip(images.split(8), labels.split(8), strict=True):
            optimizer.zero_grad()
            chain(stem(own), truth).mean().backward()
            optimizer.step()
        schedule.step()
    chain.eval().head.confusion.zero_()
    with torch.no_grad():
        chain(stem(images), labels)
        learned = intersection_over_union(chain.head.confusion)
        chain.head.confusion.zero_()
        new_images, new_labels = _shapes(32, generator)
        chain(stem(new_images), new_labels)
    assert learned.min() > 0.85 and intersection_over_union(chain.head.confusion).min() > 0.6


def _shapes(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 1, 32, 32) of a disc (class 1) and a square (class 2), and their labels."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    places = 6 + 20 * torch.rand(count, 2, 2, generator=generator)
    disc = ((y - places[:, 0, :1, None]) ** 2 + (x - places[:, 0, 1:, None]) ** 2) < 25
    far = torch.maximum((y - places[:, 1, :1, None]).abs(), (x - places[:, 1, 1:, None]).abs())
    labels = torch.where(far < 4, 2, torch.where(disc, 1, 0))
    noise = 0.3 * torch.randn(count, 32, 32, generator=generator)
    return ((labels > 0).float() + noise)[:, None], labels


def test_a_dense_head_alone_in_tiles(tiny_tiles):  # noqa: F811
    torch.manual_seed(0)
    chain = (
        InvertibleChain([AdditiveCoupling(4, residual(2, 2), residual(2, 2))], head=DenseHead(4, 5)).double().train()
    )
    assert_tiled_is_untiled(chain, torch.randn(2, 4, 20, 31, dtype=torch.float64))
