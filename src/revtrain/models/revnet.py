"""RevNet (Gomez et al. 2017): reversible blocks between residual blocks that halve the image.

Legend: B batch, c = cfg.width, N = cfg.depth reversible blocks in all, one stage more than cfg.pooling has
entries; every entry is "stride"; s = cfg.residual_scale.

    images (B, 3, 32, 32)
      stem        conv 3x3                           (B, c, 32, 32)
      stage 1     N / 4 x block                      y1 = x1 + s F(x2), y2 = x2 + s G(y1)
      down        residual block, stride 2           (B, 2c, 16, 16)    not invertible: stores its input
      stage 2     N / 4 x block
      down        residual block, stride 2           (B, 4c, 8, 8)
      stage 3     N / 4 x block
      down        residual block, stride 2           (B, 8c, 4, 4)
      stage 4     N / 4 x block
      readout     BN, ReLU, mean over pixels, linear (B, classes)

    F, G:  2 x [ BN, ReLU, conv 3x3 ]  on half of the channels
    down:  torchvision's BasicBlock with a 1x1 convolution on its shortcut

The blocks start with BN and ReLU, so the stem is a convolution alone: what it would store at full resolution
is not worth a second pair. With c = 64 and N = 8 it has about as many parameters as ResNet-18. Each stage is a
chain of its own; what the down-sampling blocks store is the paper's global bottleneck, and with channels
doubling per pool the first stage peaks.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from revtrain.chain import InvertibleChain
from revtrain.errors import RevtrainError
from revtrain.layers import AdditiveCoupling, Readout, check_pooling
from revtrain.models.irevnet import residual
from revtrain.models.parts import conv3x3, spread_depth, stream_of


class RevNet(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes); see the module's legend."""

    def __init__(self, stem: nn.Module, stages: nn.Sequential, head: nn.Module):
        super().__init__()
        self.stem, self.stages, self.head = stem, stages, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)))


def down_sampling(channels_in: int, channels_out: int) -> BasicBlock:
    """(B, channels_in, H, W) -> (B, channels_out, H/2, W/2), stored by autograd."""
    shortcut = nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride=2, bias=False), nn.BatchNorm2d(channels_out)
    )
    return BasicBlock(channels_in, channels_out, stride=2, downsample=shortcut)


def build(cfg, classes: int, image_size: int) -> RevNet:
    """`cfg.depth` reversible blocks; see the module's legend."""
    if cfg.width < 2 or cfg.width % 2:
        raise RevtrainError(
            f"width={cfg.width} cannot be split into two equal halves.\n"
            f"Expected an even number of channels, e.g. width={max(2, cfg.width + cfg.width % 2)}."
        )
    if any(kind != "stride" for kind in cfg.pooling):
        raise RevtrainError(
            f"pooling={list(cfg.pooling)} does not fit arch=revnet.\n"
            "Expected only stride entries, e.g. pooling=[stride,stride,stride]; invertible pooling is arch=irevnet."
        )
    check_pooling(cfg.pooling, image_size)
    channels, stream = cfg.width, stream_of(cfg)
    stages: list[nn.Module] = []
    for stage, blocks in enumerate(spread_depth(cfg.depth, len(cfg.pooling) + 1)):
        if stage > 0:
            stages.append(down_sampling(channels, 2 * channels))
            channels *= 2
        if blocks:
            half = channels // 2
            stages.append(
                InvertibleChain(
                    [
                        AdditiveCoupling(
                            channels, residual(half), residual(half), scale=cfg.residual_scale, stream=stream
                        )
                        for _ in range(blocks)
                    ],
                    backward=cfg.backward,
                    stream=stream,
                    reuse_output=True,  # whoever stored it has done its backward pass by then
                )
            )
    head = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), Readout(channels, classes))
    return RevNet(conv3x3(3, cfg.width), nn.Sequential(*stages), head)
