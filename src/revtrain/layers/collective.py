"""Sums over the processes that train one network together.

A `group` is a process group of torch.distributed, or None: this process alone. All its processes must hold shares of
the batch of equal size, and call in the same order; they do, since they compute the same network.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def processes(group: Any) -> int:
    """How many processes share a batch."""
    return 1 if group is None else dist.get_world_size(group)


def all_sum(values: Tensor, group: Any) -> Tensor:
    """The sum of `values` over the processes of `group`, any shape, differentiable."""
    return values if group is None else _AllSum.apply(values, group)


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, dtotal: Tensor):
        # Each process's loss depends on the values of all.
        return all_sum(dtotal, ctx.group), None
