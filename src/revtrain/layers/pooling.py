"""Invertible pooling: 2x2 pixels move into channels (Eq. 29a) or into the batch (Eq. 29c).

On one channel of one image,

     1  2  5  6
     3  4  7  8        becomes four 2x2 images    1 5    2 6    3 7    4 8
     9 10 13 14                                   9 13   10 14  11 15  12 16
    11 12 15 16

which ChannelPooling stacks as channels and BatchPooling as samples. Both only permute the values of one
image, so each works inside that image's own storage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer
from revtrain.core.pieces import batch_pieces
from revtrain.errors import RevtrainError


class _PermutingPool(InvertibleLayer):
    """Common part: a permutation of values; the gradient goes through the inverse one. Both run in place,
    piece by piece of the batch."""

    passes_integers = True

    def _unpool(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def _images(self, y: Tensor) -> int:
        """How many whole images the batch of y holds."""
        raise NotImplementedError

    def inverse(self, y: Tensor, saved: None = None) -> Tensor:
        return self._unpool(y)

    def forward_(self, x: Tensor) -> tuple[Tensor, None]:
        return self.recompute_(x, None), None

    def recompute_(self, x: Tensor, saved: None) -> Tensor:
        x = x.contiguous()
        for sl in batch_pieces(x, self.piece_bytes):
            pooled = self.forward(x[sl])
            x[sl].view(-1).copy_(pooled.reshape(-1))
        return x.view(x.shape[0] * pooled.shape[0] // (sl.stop - sl.start), *pooled.shape[1:])

    def inverse_(self, y: Tensor, saved: None) -> Tensor:
        y = y.contiguous()
        images = self._images(y)
        flat = y.view(images, y.numel() // images)
        for sl in batch_pieces(flat, self.piece_bytes):
            unpooled = self._unpool(flat[sl].view(-1, *y.shape[1:]))
            flat[sl].view(-1).copy_(unpooled.reshape(-1))
        return y.view(images, *unpooled.shape[1:])

    def backward_(self, y: Tensor, dy: Tensor, saved: None, grads: Gradients) -> tuple[Tensor, Tensor]:
        return self.inverse_(y, saved), self.inverse_(dy, saved)


class ChannelPooling(_PermutingPool):
    """(B, C, H, W) -> (B, 4C, H/2, W/2), Eq. 29a; channel c becomes channels 4c to 4c+3. H, W even."""

    def forward(self, x: Tensor) -> Tensor:
        _check_even(x)
        return pixel_unshuffle(x)

    def _unpool(self, y: Tensor) -> Tensor:
        return pixel_shuffle(y)

    def _images(self, y: Tensor) -> int:
        return y.shape[0]


class BatchPooling(_PermutingPool):
    """(B, C, H, W) -> (4B, C, H/2, W/2), Eq. 29c; image b becomes samples 4b to 4b+3. H, W even.

    Channels stay as they are; `merge_sub_images` brings the parts of an image together again in the head.
    """

    def forward(self, x: Tensor) -> Tensor:
        _check_even(x)
        b, c, h, w = x.shape
        parts = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return parts.reshape(4 * b, c, h // 2, w // 2)

    def _unpool(self, y: Tensor) -> Tensor:
        b, c, h, w = y.shape
        parts = y.reshape(b // 4, 2, 2, c, h, w).permute(0, 3, 4, 1, 5, 2)
        return parts.reshape(b // 4, c, 2 * h, 2 * w)

    def _images(self, y: Tensor) -> int:
        return y.shape[0] // 4


def pixel_unshuffle(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 4C, H/2, W/2); torch's own loses the shape of an empty batch."""
    b, c, h, w = x.shape
    return F.pixel_unshuffle(x, 2) if b else x.reshape(b, 4 * c, h // 2, w // 2)


def pixel_shuffle(y: Tensor) -> Tensor:
    """(B, 4C, H, W) -> (B, C, 2H, 2W), of an empty batch, too."""
    b, c, h, w = y.shape
    return F.pixel_shuffle(y, 2) if b else y.reshape(b, c // 4, 2 * h, 2 * w)


def merge_sub_images(features: Tensor, sub_images: int) -> Tensor:
    """(B * sub_images, C) -> (B, C): the mean over the parts that batch pooling made of each image."""
    return features.view(-1, sub_images, features.shape[1]).mean(1)


def check_pooling(pooling: Sequence[str], image_size: int) -> None:
    """Raise `RevtrainError` unless `image_size` (pixels) can be halved once for each entry of `pooling`."""
    divisor = 2 ** len(pooling)
    if image_size % divisor:
        nearest = max(divisor, round(image_size / divisor) * divisor)
        raise RevtrainError(
            f"Images of {image_size}x{image_size} pixels cannot be halved {len(pooling)} times "
            f"(pooling={list(pooling)}).\n"
            f"Expected a side that {divisor} divides: use data.image_size={nearest} or fewer pooling entries."
        )


def _check_even(x: Tensor) -> None:
    if x.shape[-2] % 2 or x.shape[-1] % 2:
        raise RevtrainError(
            f"Cannot pool {x.shape[-2]}x{x.shape[-1]} pixels 2x2 without a remainder.\n"
            "Expected an even height and width: resize the images or pool less often."
        )
