"""Haar pooling: pooling whose first channel is the average of 2x2 pixels and whose others are what it leaves out (Haar,
"Zur Theorie der orthogonalen Funktionensysteme", 1910; as a layer in Ardizzone et al., 2019, arXiv:1907.02392)."""

from __future__ import annotations

import torch
from torch import Tensor

from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer
from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import pixel_pieces
from revtrain.layers.pooling import ChannelPooling, pixel_shuffle, pixel_unshuffle


class HaarPooling(InvertibleLayer):
    """The orthonormal Haar transform of 2x2 pixels, (B, C, H, W) -> (B, 4C, H/2, W/2); H, W even.

    Channel c becomes channels 4c to 4c + 3. Of the pixels

        a b
        c d     they are   (a + b + c + d) / 2,   (a - b + c - d) / 2,   (a + b - c - d) / 2,   (a - b - c + d) / 2:

    twice the average, and the horizontal, vertical and diagonal differences. Orthonormal, so lengths stay as they are,
    noise is not amplified, and the gradient goes back as the values do. Each image is worked on in its own storage.

    Raises `RevtrainError` for other numbers of dimensions, odd sizes, or an inverse of channels that 4 does not divide.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pooling = ChannelPooling()

    def forward(self, x: Tensor) -> Tensor:
        _check_pixels(x)
        return _sums_and_differences(pixel_unshuffle(x))

    def inverse(self, y: Tensor, saved: None = None) -> Tensor:
        _check_channels(y)
        return pixel_shuffle(_sums_and_differences(y))

    def forward_(self, x: Tensor) -> tuple[Tensor, None]:
        return self.recompute_(x, None), None

    def recompute_(self, x: Tensor, saved: None) -> Tensor:
        _check_pixels(x)
        return self._mix_(self.pooling.recompute_(x, None))

    def inverse_(self, y: Tensor, saved: None) -> Tensor:
        _check_channels(y)
        return self.pooling.inverse_(self._mix_(y.contiguous()), None)

    def _mix_(self, y: Tensor) -> Tensor:
        for piece in pixel_pieces(y, self.piece_bytes):
            y[piece.own].copy_(_sums_and_differences(y[piece.own]))
        return y

    def backward_(self, y: Tensor, dy: Tensor, saved: None, grads: Gradients) -> tuple[Tensor, Tensor]:
        return self.inverse_(y, saved), self.inverse_(dy, saved)


def _sums_and_differences(x: Tensor) -> Tensor:
    """The 4x4 transform of each four channels of x (B, 4C, H, W); symmetric and orthonormal: its own inverse."""
    a, b, c, d = x.unflatten(1, (x.shape[1] // 4, 4)).unbind(2)
    above, below, left_right_above, left_right_below = a + b, c + d, a - b, c - d
    parts = [
        above + below,
        left_right_above + left_right_below,
        above - below,
        left_right_above - left_right_below,
    ]
    return torch.stack(parts, 2).mul(0.5).flatten(1, 2)


def _check_pixels(x: Tensor) -> None:
    if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise RevtrainError(
            f"HaarPooling was given a tensor of shape {tuple(x.shape)}.\n"
            "Expected images (B, C, H, W) of even height and width: resize them or pool less often."
        )


def _check_channels(y: Tensor) -> None:
    if y.dim() != 4 or y.shape[1] % 4:
        raise RevtrainError(
            f"The inverse of HaarPooling was given a tensor of shape {tuple(y.shape)}.\n"
            "Expected its result, (B, 4C, H, W): four channels for each of the input."
        )
