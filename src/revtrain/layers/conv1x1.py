"""A learned, invertible mixture of the channels (Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1
Convolutions", 2018, arXiv:1807.03039, section 3.2)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer
from revtrain.core.recompute import effective, is_rewritten
from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import pixel_pieces
from revtrain.layers.channels import channel_dim, check_dim


class InvertibleConv1x1(InvertibleLayer):
    """y = W x at every position, W (C, C) learned; x = W^-1 y. Any shape with the channels at `dim`, (B, C) included.

    W starts as a random orthogonal matrix. The inverse multiplies noise by up to the condition number of W, the ratio
    of its largest to its smallest singular value: 1 at the start, and nothing bounds it in training. Watch
    torch.linalg.cond(layer.weight): in float32, at 1e4 three of the seven digits of x are left. To keep it at 1, use
    torch.nn.utils.parametrizations.orthogonal(layer).

    W^-1 is computed in float64, and both ways run in float32 at least, under autocast, too: a product in 16 bit could
    not be undone. TF32, if you let matrix products use it, costs the inverse as many digits.

    Args:
        channels: C.
        dim: where the channels are, 1 or -1 for tokens (B, T, C).

    Raises `RevtrainError` for an x of other channels, fewer than one channel, or on the way back for a W without an
    inverse; on a GPU, where looking would mean waiting, x is then not a number.
    """

    def __init__(self, channels: int, dim: int = 1):
        super().__init__()
        if channels < 1:
            raise RevtrainError(f"InvertibleConv1x1: channels={channels} was given.\nExpected 1 or more.")
        self.channels, self.dim = channels, check_dim(dim, self)
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(channels, channels)))

    def extra_repr(self) -> str:
        return f"{self.channels}, dim={self.dim}"

    def forward(self, x: Tensor) -> Tensor:
        return _mix(effective(self, "weight"), x, self._channel_dim(x))

    def forward_(self, x: Tensor) -> tuple[Tensor, None]:
        return self.recompute_(x, None), None

    def recompute_(self, x: Tensor, saved: None) -> Tensor:
        return self._mix_(effective(self, "weight"), x)

    def inverse_(self, y: Tensor, saved: None) -> Tensor:
        return self._mix_(self._inverse_matrix(), y)

    def backward_(self, y: Tensor, dy: Tensor, saved: Any, grads: Gradients) -> tuple[Tensor, Tensor]:
        if is_rewritten(self, "weight"):  # autograd knows what it is made of
            return super().backward_(y, dy, saved, grads)
        dim, inverse = self._channel_dim(y), self._inverse_matrix()
        dweight = torch.zeros_like(self.weight, dtype=_precision(y))
        wanted = bool(grads.wanted([self.weight]))
        for piece in pixel_pieces(y, self.piece_bytes, dim):
            own_y, own_dy = y[piece.own], dy[piece.own]
            own_y.copy_(_mix(inverse, own_y, dim))
            if wanted:
                dweight += _channel_products(own_dy, own_y, dim)
            own_dy.copy_(_mix(self.weight.T, own_dy, dim))
        if wanted:
            grads.add(self.weight, dweight)
        return y, dy

    def _mix_(self, matrix: Tensor, x: Tensor) -> Tensor:
        dim = self._channel_dim(x)
        for piece in pixel_pieces(x, self.piece_bytes, dim):
            x[piece.own].copy_(_mix(matrix, x[piece.own], dim))
        return x

    def _channel_dim(self, x: Tensor) -> int:
        return channel_dim(x, self.dim, self.channels, self)

    def _inverse_matrix(self) -> Tensor:
        """W^-1, in float64 (MPS has none)."""
        weight = effective(self, "weight")
        weight = weight.to(torch.float32 if weight.device.type == "mps" else torch.float64)
        if weight.is_cuda:
            inverse, failed = torch.linalg.inv_ex(weight)
            return torch.where(failed == 0, inverse, torch.nan)
        try:
            return torch.linalg.inv(weight)
        except torch.linalg.LinAlgError as error:
            raise RevtrainError(
                f"InvertibleConv1x1: its {self.channels}x{self.channels} weight has no inverse.\n"
                "Expected a matrix of full rank. Train with a smaller step, or keep it orthogonal: "
                "torch.nn.utils.parametrizations.orthogonal(layer)."
            ) from error


def _precision(x: Tensor) -> torch.dtype:
    """That of x, float32 at least: more digits in W^-1 than in y would gain nothing."""
    return torch.promote_types(x.dtype, torch.float32)


def _mix(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    """`matrix` (C', C) times the channels of x at `dim` >= 0."""
    dtype = _precision(x)
    matrix, x = matrix.to(dtype), x.to(dtype)
    with _no_autocast(x):
        if dim == x.dim() - 1:
            return F.linear(x, matrix)
        return torch.matmul(matrix, x.flatten(dim + 1)).view(x.shape)


def _channel_products(dy: Tensor, x: Tensor, dim: int) -> Tensor:
    """Sum over all positions of dy x^T, (C, C): the gradient of W."""
    with _no_autocast(x):
        return dy.movedim(dim, 0).flatten(1) @ x.movedim(dim, 0).flatten(1).T


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
