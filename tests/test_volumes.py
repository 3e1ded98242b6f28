"""Volumes, (B, C, D, H, W): one of 128^3 voxels is classified and segmented, at the bytes a voxel of a small one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from revtrain.core.chain import InvertibleChain
from revtrain.kernels.pieces import set_chunk_mib
from revtrain.layers import (
    AdditiveCoupling,
    BatchPooling,
    ChannelPooling,
    ChannelUnpooling,
    DenseHead,
    Head,
    PartialChain,
    PreNorm,
    Stem3d,
    intersection_over_union,
)
from revtrain.memory.live import LiveStorages

CHANNELS, CLASSES = 4, 3
STATE_BYTES = 4 * CHANNELS  # a voxel, float32


def block(channels: int) -> AdditiveCoupling:
    half = channels // 2
    f, g = (
        PreNorm(nn.BatchNorm3d(half), nn.Sequential(nn.LeakyReLU(0.2), nn.Conv3d(half, half, 3, padding=1)))
        for _ in "fg"
    )
    return AdditiveCoupling(channels, f, g)


def classifier() -> nn.Module:
    """A coupling in each of three stages, 2x2x2 voxels into the channels and then into the batch."""
    layers = [block(CHANNELS), ChannelPooling(), block(8 * CHANNELS), BatchPooling(), block(8 * CHANNELS)]
    return InvertibleChain(layers, head=Head(8 * CHANNELS, CLASSES, sub_images=8, slope=0.2))


def segmenter() -> nn.Module:
    """A U-Net of two levels: half of the channels passes the lower one by."""
    below = [ChannelPooling(), block(4 * CHANNELS), block(4 * CHANNELS), ChannelUnpooling()]
    layers = [block(CHANNELS), PartialChain(CHANNELS, below), block(CHANNELS)]
    return InvertibleChain(layers, head=DenseHead(CHANNELS, CLASSES, dims=3))


def step_of(chain: nn.Module, stem: nn.Module, volume: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of one step, its gradients taken."""
    if isinstance(chain.head, DenseHead):
        loss = chain(stem(volume), labels).mean()
    else:
        loss = nn.functional.cross_entropy(chain(stem(volume)), labels)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("task", [classifier, segmenter], ids=["classified", "segmented"])
def test_one_volume_of_128_voxels_a_side_costs_what_smaller_ones_do_a_voxel(task):
    torch.manual_seed(0)
    stem, chain = Stem3d(1, CHANNELS, 3, padding=1), task().train()
    set_chunk_mib(nn.Sequential(stem, chain), 1.0)
    peaks = []
    for side in (64, 128):
        volume = torch.randn(1, 1, side, side, side)
        labels = (volume[0] > 0).long() if task is segmenter else torch.tensor([1])
        with LiveStorages() as live:
            loss = step_of(chain, stem, volume, labels)
        peaks.append(live.peak_bytes)
        assert loss.isfinite()
        for each in [*stem.parameters(), *chain.parameters()]:
            assert each.grad.isfinite().all()
            each.grad = None
    slope = (peaks[1] - peaks[0]) / (128**3 - 64**3)
    # two states; what is given, an image of one channel and a label of eight bytes a voxel, is counted as it is read
    # (scratch grows a little still: in a larger volume more tiles have a halo on both sides)
    assert slope == pytest.approx(2 * STATE_BYTES + 4 + 8 * (task is segmenter), rel=0.05)


def test_a_volume_is_learned_by_both():
    """Bright balls (1) and dark bars (2) in noise: what is in the volume, and where."""
    torch.manual_seed(0)
    for task in (classifier, segmenter):
        stem, chain = Stem3d(1, CHANNELS, 3, padding=1), task().train()
        optimizer = torch.optim.Adam([*stem.parameters(), *chain.parameters()], 0.01)
        generator, losses = torch.Generator().manual_seed(1), []
        for _ in range(40):
            volume, where, kinds = _drawn(8, generator)
            optimizer.zero_grad()
            losses.append(step_of(chain, stem, volume, where if task is segmenter else kinds))
            optimizer.step()
        volume, where, kinds = _drawn(32, generator)
        chain.eval()
        with torch.no_grad():
            if task is segmenter:
                chain.head.confusion.zero_()
                chain(stem(volume), where)
                assert intersection_over_union(chain.head.confusion).min() > 0.5
            else:
                assert (chain(stem(volume)).argmax(1) == kinds).float().mean() > 0.8


def _drawn(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Volumes (count, 1, 16, 16, 16), their labels (count, 16, 16, 16), and what each has in it, (count,)."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij"))
    kinds = torch.randint(1, CLASSES, (count,), generator=generator)
    centres = 5 + 6 * torch.rand(count, 3, 1, 1, 1, generator=generator)
    far = (grid - centres).abs()
    ball, bar = far.square().sum(1) < 20, (far[:, 0] < 1.5) & (far[:, 1] < 1.5)
    is_ball = (kinds == 1).view(-1, 1, 1, 1)
    where = torch.where(is_ball & ball, 1, torch.where(~is_ball & bar, 2, 0))
    noise = 0.3 * torch.randn(where.shape, generator=generator)
    sign = torch.tensor([0.0, 1.0, -1.0])[where]
    return (sign + noise)[:, None], where, kinds
