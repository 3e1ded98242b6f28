"""ResNet-18 for CIFAR: the baseline that stores the input of every layer.

Legend: B batch, c = width (64), one stage more than pooling has entries; every entry is "stride".

    images (B, 3, 32, 32)
      stem        conv 3x3, BN, ReLU  (no max-pool)  (B, c, 32, 32)
      stage 1     2 x BasicBlock                     (B, c, 32, 32)
      stage 2     2 x BasicBlock, first of stride 2  (B, 2c, 16, 16)
      stage 3     2 x BasicBlock, first of stride 2  (B, 4c, 8, 8)
      stage 4     2 x BasicBlock, first of stride 2  (B, 8c, 4, 4)
      head        mean over pixels, linear           (B, classes)

depth=18 has the blocks above, depth=34 has 3, 4, 6 and 3. The blocks are torchvision's; `backward` changes
nothing here, as there is nothing to invert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from revtrain.config import Network, typed
from revtrain.errors import RevtrainError
from revtrain.memory.closed_form import EQ_STORED, Module, Work
from revtrain.memory.formulas import (
    Symbols,
    convolution,
    end_of_residual_block,
    gradient,
    linear,
    per_pixel,
    stages,
    statistics_bytes,
)
from revtrain.models import Images, Traits

if TYPE_CHECKING:
    from torch import nn

TRAITS = Traits(
    reversible=False,
    hardly_uses={"slope": "it has no LeakyReLU", "backward": "it rebuilds nothing"},
)
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def build(network: Network[None], images: Images) -> nn.Sequential:
    """ResNet of standard depth; see the module's legend. Raises `RevtrainError` for another depth."""
    from torch import nn
    from torchvision.models.resnet import BasicBlock

    from revtrain.layers import Head, check_pooling
    from revtrain.models.common import conv3x3, down_sampling

    if network.depth not in BLOCKS:
        raise RevtrainError(f"depth={network.depth} is no standard depth of resnet18.\nExpected depth=18 or depth=34.")
    if list(network.pooling) != ["stride"] * 3:
        raise RevtrainError(
            f"pooling={typed(network.pooling)} does not fit arch=resnet18.\nExpected pooling=[stride,stride,stride]."
        )
    check_pooling(network.pooling, images.size)
    channels = network.width
    trunk = []
    for stage, blocks in enumerate(BLOCKS[network.depth]):
        first = BasicBlock(channels, channels)
        if stage > 0:
            first = down_sampling(channels, 2 * channels)
            channels *= 2
        trunk.append(nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1))))
    model = nn.Sequential(
        nn.Sequential(conv3x3(3, network.width), nn.BatchNorm2d(network.width), nn.ReLU(inplace=True)),
        nn.Sequential(*trunk),
        Head(channels, images.classes),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # as torchvision's own ResNet starts
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def memory(network: Network[None], images: Images) -> list[Module]:
    """The closed form (Eqs. 6, 7): every convolution and BN stores its input. Symbols: memory.formulas."""
    symbols = Symbols(network)
    a, c = symbols.a, symbols.c
    row = stages(network, BLOCKS[network.depth])
    stored = [
        per_pixel("stem: input of BN", EQ_STORED, "c a", c * a),
        per_pixel("stem: output", EQ_STORED, "c a", c * a),
    ]
    modules = [Module("stem", 0, convolution(3, c) + 2 * c, statistics_bytes(c, 1), tuple(stored))]
    before = row[0]
    for stage in row:
        channels, values, t = stage.channels, stage.values, stage.index
        for block in range(stage.units):
            name = f"stage {t + 1}, block {block + 1}"
            what = f"{name}: inputs of conv 2 and of both BNs, output"
            stored = [per_pixel(what, EQ_STORED, f"4 E_{t} a", 4 * values * a)]
            parameters = convolution(before.channels, channels) + convolution(channels, channels) + 4 * channels
            buffers = statistics_bytes(2 * channels, torch_norms=2)
            if before is not stage:
                what = f"{name}: input of the shortcut's BN"
                stored.append(per_pixel(what, EQ_STORED, f"E_{t} a", values * a))
                parameters += convolution(before.channels, channels, kernel_size=1) + 2 * channels
                buffers += statistics_bytes(channels, torch_norms=1)
            what = "gradients in the last block, less what they have freed"
            inside = gradient(what, EQ_STORED, f"E_{t} a", values * a)
            work = (Work("backward", (inside,)), end_of_residual_block(before, a))
            modules.append(Module(name, t, parameters, buffers, tuple(stored), work=work))
            before = stage
    return [*modules, Module("head", before.index, linear(before.channels, images.classes))]
