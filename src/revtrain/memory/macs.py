"""Compute as a count of multiply-accumulates: the same figure on any machine.

Convolutions and matrix products count, as is usual; normalisation and activation functions, which are a few operations
an element, do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class CountMacs(TorchDispatchMode):
    """`macs`: of all convolutions and matrix products inside its `with` block, recomputation and gradients included."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        operator = function.overloadpacket
        if operator is aten.convolution:
            self.macs += _of_convolution(args[0] if args[6] else result, args[1])  # transposed: from its input
        elif operator is aten.convolution_backward:
            wanted = args[-1]
            self.macs += sum(wanted[:2]) * _of_convolution(args[0] if not args[7] else args[1], args[2])
        elif operator in (aten.mm, aten.addmm):
            one, other = args[-2:]
            self.macs += one.shape[0] * one.shape[1] * other.shape[1]
        elif operator in (aten.bmm, aten.baddbmm):
            one, other = args[-2:]
            self.macs += one.shape[0] * one.shape[1] * one.shape[2] * other.shape[2]
        return result


def _of_convolution(result: torch.Tensor, weight: torch.Tensor) -> int:
    """Every value of the result is a sum over the weights of one output channel."""
    return result.numel() * weight[0].numel()
