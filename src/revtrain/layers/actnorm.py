"""Activation normalisation: a scale and a shift for each channel, which begin as those that normalise the first batch
(Kingma and Dhariwal, "Glow", 2018, arXiv:1807.03039, section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer
from revtrain.core.recompute import effective, is_rewritten
from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import pixel_pieces
from revtrain.layers.channels import channel_dim, check_dim, per_channel


class ActNorm(InvertibleLayer):
    """y = (x - centre) exp(log_scale) / spread + shift for each channel. Any shape with the channels at `dim`.

    `centre` and `spread` (C,) are the mean and standard deviation of the first batch that passes in training mode. They
    are buffers and stay as they are from then on; `log_scale` and `shift` (C,) are learned, and start at 0. Unlike a
    batch norm it treats every later sample on its own. Until that first batch it is the identity. The scale is an
    exponential and never 0; the inverse, x = (y - shift) spread / exp(log_scale) + centre, is exact to rounding.

    Several processes of torch.distributed take the first batch's statistics over all their shares: let it pass in all
    of them. `initialised` tells whether that has happened; it belongs to the state_dict.

    Args:
        channels: C.
        dim: where the channels are, 1 or -1 for tokens (B, T, C).
        eps: added to the variance, in squared units of x: a channel that is constant in the first batch is divided by
            sqrt(eps).

    Raises `RevtrainError` for an x of other channels, fewer than one channel, an eps that is not above 0, or a first
    batch that meets a replica of `torch.nn.DataParallel`, which would forget it.
    """

    is_pointwise = True
    centre: Tensor
    spread: Tensor

    def __init__(self, channels: int, dim: int = 1, eps: float = 1e-6):
        super().__init__()
        if channels < 1 or not eps > 0:
            raise RevtrainError(
                f"ActNorm: channels={channels}, eps={eps} was given.\nExpected 1 channel or more and an eps above 0."
            )
        self.channels, self.dim, self.eps = channels, check_dim(dim, self), eps
        self.initialised = False  # not a tensor: reading it must not wait for a GPU
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_buffer("centre", torch.zeros(channels))
        self.register_buffer("spread", torch.ones(channels))

    def extra_repr(self) -> str:
        return f"{self.channels}, dim={self.dim}, eps={self.eps}"

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.initialised)

    def set_extra_state(self, state: Tensor) -> None:
        self.initialised = bool(state)

    def forward(self, x: Tensor) -> Tensor:
        self._initialise_once(x)
        centre, scale, shift = self._values(x)
        return (x - centre) * scale + shift

    def forward_(self, x: Tensor) -> tuple[Tensor, None]:
        self._initialise_once(x)
        return self.recompute_(x, None), None

    def recompute_(self, x: Tensor, saved: None) -> Tensor:
        centre, scale, shift = self._values(x)
        return x.sub_(centre).mul_(scale).add_(shift)

    def inverse_(self, y: Tensor, saved: None) -> Tensor:
        centre, scale, shift = self._values(y)
        return y.sub_(shift).div_(scale).add_(centre)

    def backward_(self, y: Tensor, dy: Tensor, saved: Any, grads: Gradients) -> tuple[Tensor, Tensor]:
        if is_rewritten(self, "log_scale", "shift"):  # autograd knows what they are made of
            return super().backward_(y, dy, saved, grads)
        centre, scale, shift = self._values(y)
        others = self._other_dims(y)
        dlog_scale, dshift = torch.zeros_like(scale.flatten()), torch.zeros_like(shift.flatten())
        for piece in pixel_pieces(y, self.piece_bytes, self.dim):
            own_y, own_dy = y[piece.own], dy[piece.own]
            own_y.sub_(shift)
            dshift += own_dy.sum(others)
            dlog_scale += (own_dy * own_y).sum(others)
            own_y.div_(scale).add_(centre)
            own_dy.mul_(scale)
        grads.add(self.log_scale, dlog_scale)
        grads.add(self.shift, dshift)
        return y, dy

    def _values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """centre, scale and shift, in float32 at least, as they meet x."""
        dim = channel_dim(x, self.dim, self.channels, self)
        dtype = torch.promote_types(self.centre.dtype, torch.float32)
        scale = effective(self, "log_scale").to(dtype).exp() / self.spread
        return (
            per_channel(self.centre.to(dtype), x, dim),
            per_channel(scale, x, dim),
            per_channel(effective(self, "shift").to(dtype), x, dim),
        )

    def _sum(self, x: Tensor, dtype: torch.dtype, middle: Tensor | None = None) -> Tensor:
        """Sum over all but the channels of x, or of its squared distance from `middle`, piece by piece."""
        others = self._other_dims(x)
        own = (x[piece.own] for piece in pixel_pieces(x, self.piece_bytes, self.dim))
        sums = [(each if middle is None else (each - middle).square()).sum(others, dtype=dtype) for each in own]
        return torch.stack(sums).sum(0)

    def _other_dims(self, x: Tensor) -> list[int]:
        dim = channel_dim(x, self.dim, self.channels, self)
        return [each for each in range(x.dim()) if each != dim]

    @torch.no_grad()
    def _initialise_once(self, x: Tensor) -> None:
        """Take `centre` and `spread` from x if it is the first batch; an empty one is not."""
        if self.initialised or not self.training or x.numel() == 0:
            return
        if getattr(self, "_is_replica", False):
            raise RevtrainError(
                "ActNorm met its first batch in a replica of DataParallel, which is thrown away after the pass.\n"
                "Let one batch pass through the model itself before you wrap it."
            )
        dim = channel_dim(x, self.dim, self.channels, self)
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        count = _sum_over_processes(torch.tensor(x.numel() / self.channels, dtype=wide, device=x.device))
        mean = _sum_over_processes(self._sum(x, wide)) / count
        middle = per_channel(mean.to(torch.promote_types(x.dtype, torch.float32)), x, dim)
        squares = _sum_over_processes(self._sum(x, wide, middle)) / count
        self.centre.copy_(mean)
        self.spread.copy_((squares + self.eps).sqrt())
        self.initialised = True


def _sum_over_processes(values: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values
