"""Invertible pooling: r x r pixels, usually 2x2, move into channels (Eq. 29a) or into the batch (Eq. 29c).

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
    piece by piece of the batch.

    Args:
        factor: r; every side of (B, C, L), (B, C, H, W) or (B, C, D, H, W) is divided by it.

    Raises `RevtrainError` for a factor below 2, another number of dimensions, or sides that r does not divide.
    """

    passes_integers = True

    def __init__(self, factor: int = 2):
        super().__init__()
        if not isinstance(factor, int) or factor < 2:
            raise RevtrainError(
                f"{type(self).__name__}: factor={factor} was given.\nExpected a whole number, 2 or more."
            )
        self.factor = factor

    def extra_repr(self) -> str:
        return f"factor={self.factor}"

    def _pool(self, x: Tensor) -> Tensor:
        """y of x: a new tensor or a view."""
        raise NotImplementedError

    def _unpool(self, y: Tensor) -> Tensor:
        """x of y: a new tensor or a view."""
        raise NotImplementedError

    def _pooled_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        raise NotImplementedError

    def _unpooled_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Raises `RevtrainError` for what cannot be a result of this layer."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self._pool(x).reshape(self._pooled_shape(x.shape))

    def inverse(self, y: Tensor, saved: None = None) -> Tensor:
        return self._unpool(y).reshape(self._unpooled_shape(y.shape))

    def forward_(self, x: Tensor) -> tuple[Tensor, None]:
        return self.recompute_(x, None), None

    def recompute_(self, x: Tensor, saved: None) -> Tensor:
        x, shape = x.contiguous(), self._pooled_shape(x.shape)
        for sl in batch_pieces(x, self.piece_bytes):
            x[sl].view(-1).copy_(self._pool(x[sl]).reshape(-1))
        return x.view(shape)

    def inverse_(self, y: Tensor, saved: None) -> Tensor:
        y, shape = y.contiguous(), self._unpooled_shape(y.shape)
        images = y.view(shape[0], -1) if y.numel() else y
        for sl in batch_pieces(images, self.piece_bytes):
            images[sl].view(-1).copy_(self._unpool(images[sl].view(-1, *y.shape[1:])).reshape(-1))
        return y.view(shape)

    def backward_(self, y: Tensor, dy: Tensor, saved: None, grads: Gradients) -> tuple[Tensor, Tensor]:
        return self.inverse_(y, saved), self.inverse_(dy, saved)

    def _parts(self, shape: Sequence[int]) -> int:
        """How many parts each image is cut into: r to the power of its dimensions."""
        if not 3 <= len(shape) <= 5:
            raise RevtrainError(
                f"{type(self).__name__} was given a tensor of {len(shape)} dimensions, {tuple(shape)}.\n"
                "Expected (B, C, L), (B, C, H, W) or (B, C, D, H, W)."
            )
        return self.factor ** (len(shape) - 2)

    def _smaller_sides(self, shape: Sequence[int]) -> list[int]:
        self._parts(shape)
        if any(side % self.factor for side in shape[2:]):
            sides = "x".join(str(side) for side in shape[2:])
            fitting = "even sides" if self.factor == 2 else f"sides that {self.factor} divides"
            raise RevtrainError(
                f"{type(self).__name__} cannot pool {sides} pixels by {self.factor} without a remainder.\n"
                f"Expected {fitting}: resize the images or pool less often."
            )
        return [side // self.factor for side in shape[2:]]

    def _larger_sides(self, shape: Sequence[int]) -> list[int]:
        return [side * self.factor for side in shape[2:]]

    def _cut(self, x: Tensor) -> Tensor:
        """x (B, C, H, ...) as (B, C, H/r, r, ...)."""
        for dim, side in enumerate(self._smaller_sides(x.shape)):
            x = x.unflatten(2 + 2 * dim, (side, self.factor))
        return x


class ChannelPooling(_PermutingPool):
    """(B, C, H, W) -> (B, r^2 C, H/r, W/r), Eq. 29a; channel c becomes channels r^2 c to r^2 c + r^2 - 1. Also for
    (B, C, L) and (B, C, D, H, W), with r and r^3 in the place of r^2."""

    def _pool(self, x: Tensor) -> Tensor:
        n = x.dim() - 2
        return self._cut(x).permute(0, 1, *range(3, 3 + 2 * n, 2), *range(2, 2 + 2 * n, 2))

    def _unpool(self, y: Tensor) -> Tensor:
        n = y.dim() - 2
        cut = y.unflatten(1, (y.shape[1] // self._parts(y.shape), *[self.factor] * n))
        return cut.permute(0, 1, *(dim for i in range(n) for dim in (2 + n + i, 2 + i)))

    def _pooled_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        parts = self._parts(shape)
        return shape[0], shape[1] * parts, *self._smaller_sides(shape)

    def _unpooled_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        parts = self._parts(shape)
        if shape[1] % parts:
            raise RevtrainError(
                f"The inverse of ChannelPooling was given a tensor of shape {tuple(shape)}.\n"
                f"Expected its result, {parts} channels for each of the input."
            )
        return shape[0], shape[1] // parts, *self._larger_sides(shape)


class BatchPooling(_PermutingPool):
    """(B, C, H, W) -> (r^2 B, C, H/r, W/r), Eq. 29c; image b becomes samples r^2 b to r^2 b + r^2 - 1. Also for
    (B, C, L) and (B, C, D, H, W), with r and r^3 in the place of r^2.

    Channels stay as they are; `merge_sub_images` brings the parts of an image together again in the head.
    """

    def _pool(self, x: Tensor) -> Tensor:
        n = x.dim() - 2
        return self._cut(x).permute(0, *range(3, 3 + 2 * n, 2), 1, *range(2, 2 + 2 * n, 2))

    def _unpool(self, y: Tensor) -> Tensor:
        n = y.dim() - 2
        cut = y.unflatten(0, (y.shape[0] // self._parts(y.shape), *[self.factor] * n))
        return cut.permute(0, 1 + n, *(dim for i in range(n) for dim in (2 + n + i, 1 + i)))

    def _pooled_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        parts = self._parts(shape)
        return shape[0] * parts, shape[1], *self._smaller_sides(shape)

    def _unpooled_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        parts = self._parts(shape)
        if shape[0] % parts:
            raise RevtrainError(
                f"The inverse of BatchPooling was given a tensor of shape {tuple(shape)}.\n"
                f"Expected its result, {parts} samples for each of the input."
            )
        return shape[0] // parts, shape[1], *self._larger_sides(shape)


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
