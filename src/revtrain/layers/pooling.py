"""Invertible pooling: r x r pixels, usually 2x2, move into channels (Eq. 29a) or into the batch (Eq. 29c).

On one channel of one image,

     1  2  5  6
     3  4  7  8        becomes four 2x2 images    1 5    2 6    3 7    4 8
     9 10 13 14                                   9 13   10 14  11 15  12 16
    11 12 15 16

which ChannelPooling stacks as channels and BatchPooling as samples. Both only permute the values of one
image, so each works inside that image's own storage; ChannelPooling even inside that of one channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from revtrain.config import ImageSize, typed
from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer
from revtrain.errors import RevtrainError
from revtrain.kernels import cpu_kernels
from revtrain.kernels.pieces import batch_pieces, is_large, rounds
from revtrain.layers.permuted_blocks import inverse_order, permute_blocks_


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
        shape = self._pooled_shape(x.shape)
        x = self._own_storage(x)
        for part in _contiguous_parts(x):
            self._permute_(part)
        return x.view(shape)

    def inverse_(self, y: Tensor, saved: None) -> Tensor:
        x = self._own_storage(y).view(self._unpooled_shape(y.shape))
        for part in _contiguous_parts(x):
            self._permute_(part, back=True)
        return x

    def _own_storage(self, x: Tensor) -> Tensor:
        """x, or a copy where its values do not lie side by side."""
        return x.contiguous()

    def _permute_(self, x: Tensor, back: bool = False) -> None:
        """The values of x, contiguous, change places, so that its memory holds y; `back`: the other way round."""
        units = self._units(x)
        if not is_large(units, self.piece_bytes):
            if cpu_kernels.pool_(units, self.factor, back, self.piece_bytes):
                return
            for sl in batch_pieces(units, self.piece_bytes):
                own = units[sl]
                moved = self._unpool(own.view(self._pooled_shape(own.shape))) if back else self._pool(own)
                own.view(-1).copy_(moved.reshape(-1))
            return
        parts, order = x.shape[-1] // self.factor, self._order(units.shape[1:])
        order = inverse_order(order) if back else order
        for unit in rounds(units):
            blocks = unit.view(-1, parts)
            if back:
                permute_blocks_(blocks, order, self.piece_bytes)
                self._turn_rows_(unit, (self.factor, parts))
            else:
                self._turn_rows_(unit, (parts, self.factor))
                permute_blocks_(blocks, order, self.piece_bytes)

    # Where the values that change places with each other, a unit, are more than a piece: first each row is cut into its
    # r parts, in place; then these blocks change places.

    def _units(self, x: Tensor) -> Tensor:
        """x (B, C, ...) as (units, C or 1, ...)."""
        raise NotImplementedError

    def _turn_rows_(self, unit: Tensor, sides: tuple[int, int]) -> None:
        rows = unit.view(-1, *sides)
        for sl in batch_pieces(rows, self.piece_bytes):
            rows[sl].view(-1).copy_(rows[sl].transpose(1, 2).reshape(-1))

    def _order(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Which block comes to each place, for a unit of this shape (C, H, ...)."""
        numbers = np.arange(prod(shape[:-1]) * self.factor).reshape(1, *shape[:-1], self.factor)
        with unset_fake_temporarily():
            return tuple(self._pool(torch.from_numpy(numbers)).flatten().tolist())

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

    def _own_storage(self, x: Tensor) -> Tensor:
        return x if all(each.is_contiguous() for each in x[:1]) else x.contiguous()  # samples may lie apart

    def _units(self, x: Tensor) -> Tensor:
        return x.view(-1, 1, *x.shape[2:])

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


class ChannelUnpooling(ChannelPooling):
    """The inverse of `ChannelPooling` as a layer, (B, r^2 C, H, W) -> (B, C, r H, r W): the way up in a U-Net."""

    def forward(self, x: Tensor) -> Tensor:
        return super().inverse(x)

    def inverse(self, y: Tensor, saved: None = None) -> Tensor:
        return super().forward(y)

    def forward_(self, x: Tensor) -> tuple[Tensor, None]:
        return super().inverse_(x, None), None

    def recompute_(self, x: Tensor, saved: None) -> Tensor:
        return super().inverse_(x, None)

    def inverse_(self, y: Tensor, saved: None) -> Tensor:
        return super().recompute_(y, None)

    def backward_(self, y: Tensor, dy: Tensor, saved: None, grads: Gradients) -> tuple[Tensor, Tensor]:
        return super().recompute_(y, None), super().recompute_(dy, None)


class BatchPooling(_PermutingPool):
    """(B, C, H, W) -> (r^2 B, C, H/r, W/r), Eq. 29c; image b becomes samples r^2 b to r^2 b + r^2 - 1. Also for
    (B, C, L) and (B, C, D, H, W), with r and r^3 in the place of r^2.

    Channels stay as they are; `merge_sub_images` brings the parts of an image together again in the head.
    """

    def _units(self, x: Tensor) -> Tensor:
        return x

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


def _contiguous_parts(x: Tensor) -> Iterable[Tensor]:
    """x, or its samples where these do not lie side by side, as in some of the channels of a state."""
    return [x] if x.is_contiguous() else rounds([x.narrow(0, index, 1) for index in range(len(x))])


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
    return features if sub_images == 1 else features.view(-1, sub_images, features.shape[1]).mean(1)


def check_pooling(pooling: Sequence[str], image_size: int | Sequence[int]) -> None:
    """Raise `RevtrainError` unless images, of a side or of [height, width] in pixels, can be halved once for each entry
    of `pooling`."""
    divisor, size = 2 ** len(pooling), ImageSize.of(image_size)
    if size.height % divisor or size.width % divisor:
        given = typed(size.nearest(divisor).plain)
        raise RevtrainError(
            f"Images of {size} pixels cannot be halved {len(pooling)} times (pooling={typed(pooling)}).\n"
            f"Expected sides that {divisor} divides: use data.image_size={given} or data.crop={given}, "
            "or fewer pooling entries."
        )
