"""Mean and variance of the channels, over the processes that share a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revtrain.kernels import channel_statistics
from revtrain.kernels.channel_statistics import Moments
from revtrain.layers.collective import all_sum, processes


def moments(source: Tensor, unit: float, dtype: torch.dtype, piece_bytes: int, group: Any = None) -> Moments:
    """Mean and biased variance of each channel of unit source (B, C, ...), over all processes of `group`: (C,) each."""
    mean, variance = channel_statistics(source, unit=unit, dtype=dtype, piece_bytes=piece_bytes)
    shares = processes(group)
    if shares == 1:
        return Moments(mean, variance)
    whole = all_sum(mean, group) / shares  # of shares of one size
    return Moments(whole, all_sum(variance + (mean - whole).square(), group) / shares)
