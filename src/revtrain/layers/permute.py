"""Permutations of channels: exact inverses, for number formats of any kind."""

from __future__ import annotations

import torch
from torch import Tensor

from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer
from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import pixel_pieces
from revtrain.layers.channels import Split, channel_dim, check_dim, part_sizes, two_parts


class _Permutation(InvertibleLayer):
    """Common part: values only change places, so the gradient is permuted back as the values are."""

    passes_integers = True

    dim: int  # of the channels

    def _permuted(self, x: Tensor) -> Tensor:
        """y of x: a new tensor."""
        raise NotImplementedError

    def _restored(self, y: Tensor) -> Tensor:
        """x of y: a new tensor."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self._permuted(x)

    def forward_(self, x: Tensor) -> tuple[Tensor, None]:
        return self.recompute_(x, None), None

    def recompute_(self, x: Tensor, saved: None) -> Tensor:
        for piece in pixel_pieces(x, self.piece_bytes, self.dim):
            x[piece.own].copy_(self._permuted(x[piece.own]))
        return x

    def inverse_(self, y: Tensor, saved: None) -> Tensor:
        for piece in pixel_pieces(y, self.piece_bytes, self.dim):
            y[piece.own].copy_(self._restored(y[piece.own]))
        return y

    def backward_(self, y: Tensor, dy: Tensor, saved: None, grads: Gradients) -> tuple[Tensor, Tensor]:
        return self.inverse_(y, saved), self.inverse_(dy, saved)


class HalfSwap(_Permutation):
    """The two parts change places: (x1, x2) -> (x2, x1). Any shape with the channels at `dim`.

    Stands between couplings that change the first part only, such as `AffineCoupling`.

    Args:
        dim: where the channels are, 1 or -1 for tokens (B, T, C).
        channels: the sizes (C1, C2) of the two parts of x, where they are not equal halves; those of y are (C2, C1).

    Raises `RevtrainError` for an x that cannot be cut so.
    """

    def __init__(self, dim: int = 1, channels: Split | None = None):
        super().__init__()
        self.dim = check_dim(dim, self)
        self.sizes = None if channels is None else part_sizes(channels, self)

    def extra_repr(self) -> str:
        return f"dim={self.dim}" if self.sizes is None else f"dim={self.dim}, channels={self.sizes}"

    def _permuted(self, x: Tensor) -> Tensor:
        return self._swapped(x, self._sizes(x))

    def _restored(self, y: Tensor) -> Tensor:
        c1, c2 = self._sizes(y)
        return self._swapped(y, (c2, c1))

    def _swapped(self, x: Tensor, sizes: tuple[int, int]) -> Tensor:
        first, second = two_parts(x, self.dim, sizes, self)
        return torch.cat([second, first], self.dim)

    def _sizes(self, x: Tensor) -> tuple[int, int]:
        if self.sizes is not None:
            return self.sizes
        channels = x.shape[self.dim] if -x.dim() <= self.dim < x.dim() else 0
        if channels % 2 or not channels:
            raise RevtrainError(
                f"HalfSwap cannot cut a tensor of shape {tuple(x.shape)} into two halves along dimension {self.dim}.\n"
                "Expected an even number of channels there, or the sizes of both parts: HalfSwap(channels=(3, 5)), say."
            )
        return channels // 2, channels // 2


class ChannelPermutation(_Permutation):
    """Channel c of y is channel order[c] of x, for one order drawn at random. Any shape with the channels at `dim`.

    A fixed shuffle between couplings, so that all channels meet. `order` (C,) is a buffer: it belongs to the
    state_dict, and may be overwritten with another permutation.

    Args:
        channels: C.
        dim: where the channels are, 1 or -1 for tokens (B, T, C).
        generator: what `order` is drawn from, once; None: torch's own. It is not kept.

    Raises `RevtrainError` for an x of other channels, or fewer than one channel.
    """

    order: Tensor

    def __init__(self, channels: int, dim: int = 1, generator: torch.Generator | None = None):
        super().__init__()
        if channels < 1:
            raise RevtrainError(f"ChannelPermutation: channels={channels} was given.\nExpected 1 or more.")
        self.channels, self.dim = channels, check_dim(dim, self)
        self.register_buffer("order", torch.randperm(channels, generator=generator))

    def extra_repr(self) -> str:
        return f"{self.channels}, dim={self.dim}"

    def _permuted(self, x: Tensor) -> Tensor:
        return x.index_select(channel_dim(x, self.dim, self.channels, self), self.order)

    def _restored(self, y: Tensor) -> Tensor:
        return y.index_select(channel_dim(y, self.dim, self.channels, self), torch.argsort(self.order))
