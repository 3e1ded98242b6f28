"""The convolution in front of a chain, in pieces: its input is the image, whose gradient nobody asks for."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd

from revtrain.core.precision import autocast_dtype
from revtrain.core.recompute import is_rewritten
from revtrain.kernels import read_part
from revtrain.kernels.pieces import MIB, pieces
from revtrain.kernels.shapes import all_but_channels
from revtrain.layers.reach import reach_of_convolution


class _Tiled(_ConvNd):
    """What the stems have in common: forward of one of torch's convolutions, in pieces."""

    piece_bytes: int = 2 * MIB

    def forward(self, x: Tensor) -> Tensor:
        is_batch = x.dim() == 2 + len(self.kernel_size)
        is_large = is_batch and self.out_channels * prod(x.shape[2:]) * x.element_size() > self.piece_bytes
        if not is_large or x.requires_grad or reach_of_convolution(self) is None:
            return super().forward(x)
        if is_rewritten(self, "weight", "bias") or torch.compiler.is_compiling():
            return super().forward(x)
        return _InTiles.apply(x, self.weight, self.bias, self)


class Stem(_Tiled, nn.Conv2d):
    """A convolution that keeps the size of the image, (B, C, H, W) -> (B, channels_out, H, W).

    Where one image's result is more than a piece, it is computed tile by tile, and so is the gradient of the weights:
    besides the result, nothing is as large as the image. Where its input asks for a gradient, this is torch's
    convolution.
    """


class Stem3d(_Tiled, nn.Conv3d):
    """The same for volumes, (B, C, D, H, W) -> (B, channels_out, D, H, W)."""


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stem: _Tiled) -> Tensor:
        dtype = autocast_dtype(x.device.type) or torch.promote_types(x.dtype, weight.dtype)
        ctx.stem, ctx.dtype, ctx.bias_dtype = stem, dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)
        narrow, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
        result = torch.empty(len(x), stem.out_channels, *x.shape[2:], dtype=dtype, device=x.device)
        for piece in pieces(result, stem.piece_bytes, reach_of_convolution(stem)):
            tile = read_part(x[piece.read], dtype, channels_last=True)
            result[piece.own] = piece.crop(stem._conv_forward(tile, narrow, shift))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dresult: Tensor) -> tuple[None, Tensor, Tensor | None, None]:
        (x, weight), stem = ctx.saved_tensors, ctx.stem
        wide = torch.promote_types(weight.dtype, torch.float32)
        dweight = torch.zeros(weight.shape, dtype=wide, device=x.device)
        dbias = torch.zeros(len(weight), dtype=wide, device=x.device)
        narrow = weight.to(ctx.dtype).requires_grad_()
        for piece in pieces(dresult, stem.piece_bytes, reach_of_convolution(stem)):
            tile = read_part(x[piece.read], ctx.dtype, channels_last=True)
            with torch.enable_grad():
                y = stem._conv_forward(tile, narrow, None)
            own = dresult[piece.own]
            dweight += torch.autograd.grad(y, narrow, piece.pad(own).to(ctx.dtype))[0]
            if ctx.bias_dtype is not None:
                dbias += own.sum(all_but_channels(own), dtype=wide)
        return None, dweight.to(weight.dtype), None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype), None
