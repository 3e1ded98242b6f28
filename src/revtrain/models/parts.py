"""What the architectures share: stem, head, the spread of depth over stages, and the reversible net itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from revtrain.chain import InvertibleChain
from revtrain.errors import RevtrainError
from revtrain.invertible import InvertibleLayer
from revtrain.layers import BatchPooling, ChannelPooling, check_pooling, merge_sub_images


def spread_depth(depth: int, stages: int) -> list[int]:
    """`depth` units over `stages` stages, as evenly as can be, earlier stages first: (7, 3) -> [3, 2, 2]."""
    if depth < 1:
        raise RevtrainError(f"depth={depth} leaves nothing to train.\nExpected 1 or more repeated units.")
    return [depth // stages + (stage < depth % stages) for stage in range(stages)]


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


class Head(nn.Module):
    """(B * sub_images, C, H, W) -> logits (B, classes): global mean, merge of sub-images, linear.

    The mean is a sum over pixels and a small division, because the gradient of a sum is a broadcast
    without storage: the chain below is then the only one to hold a gradient of full size.
    """

    def __init__(self, channels: int, classes: int, sub_images: int = 1):
        super().__init__()
        self.sub_images = sub_images
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
        return self.linear(merge_sub_images(features, self.sub_images))


class ReversibleNet(nn.Module):
    """Stem, one invertible trunk, head: everything from the stem's output to the head's input is rebuilt."""

    def __init__(self, stem: nn.Module, trunk: InvertibleChain, head: Head):
        super().__init__()
        self.stem, self.trunk, self.head = stem, trunk, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(self.stem(images)))


def build_reversible(
    cfg,
    classes: int,
    image_size: int,
    unit: Callable[[int, int], Sequence[InvertibleLayer]],
    final: Callable[[int], Sequence[InvertibleLayer]] = lambda channels: (),
) -> ReversibleNet:
    """A fully invertible trunk: `cfg.depth` units over stages that `cfg.pooling` separates.

    Args:
        unit: (channels, stage) -> the layers of one repeated unit; stages count from 0.
        final: channels -> layers between the last unit and the head.

    Raises `RevtrainError` for an odd width, a pooling entry that is not invertible, or an image size that
    the pooling cannot divide.
    """
    if cfg.width < 2 or cfg.width % 2:
        raise RevtrainError(
            f"width={cfg.width} cannot be split into two equal halves.\n"
            f"Expected an even number of channels, e.g. width={max(2, cfg.width + cfg.width % 2)}."
        )
    check_pooling(cfg.pooling, image_size)
    channels, sub_images = cfg.width, 1
    layers: list[InvertibleLayer] = []
    for stage, units in enumerate(spread_depth(cfg.depth, len(cfg.pooling) + 1)):
        if stage > 0:
            kind = cfg.pooling[stage - 1]
            if kind == "channel":
                layers.append(ChannelPooling())
                channels *= 4
            elif kind == "batch":
                layers.append(BatchPooling())
                sub_images *= 4
            else:
                raise RevtrainError(
                    f"pooling={list(cfg.pooling)}: {kind!r} cannot be inverted in arch={cfg.arch}.\n"
                    "Expected a list of: channel, batch."
                )
        for _ in range(units):
            layers.extend(unit(channels, stage))
    layers.extend(final(channels))
    trunk = InvertibleChain(layers, backward=cfg.backward, reuse_output=True)
    return ReversibleNet(conv3x3(3, cfg.width), trunk, Head(channels, classes, sub_images))
