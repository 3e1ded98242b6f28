"""Batch statistics over all processes: a batch in equal shares is then normalised as it would be in one process.

torch's own SyncBatchNorm does this on GPUs only; here one implementation serves every device, so that what is tested
on two CPU processes is what runs on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import MIB
from revtrain.layers.batchnorm import InvertibleBatchNorm2d
from revtrain.layers.norm_pieces import normalise


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """torch's BatchNorm2d of x (B, C, H, W) with the statistics of all processes of `group`.

    Same parameters, buffers and state_dict. Forward and backward pass cost one and two collectives of 2 C numbers.
    """

    is_over_pieces = True  # its forward is that of `NormOverPieces`
    piece_bytes: int = 2 * MIB

    def __init__(self, norm: nn.BatchNorm2d, group: Any):
        """Takes over the tensors of `norm`."""
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.group = group
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.training = norm.training

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, self, self.piece_bytes)


def synchronise_batch_norms(model: nn.Module, group: Any) -> None:
    """Let every batch norm inside `model`, torch's and ours, use the statistics of all processes of `group`.

    For `DistributedDataParallel`, which averages the gradients: call it before. All processes must then take steps
    with equally many images each; running statistics stay equal, so that buffers need not be broadcast.

    Raises:
        RevtrainError: a batch norm of another kind than BatchNorm2d with its default settings.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, InvertibleBatchNorm2d):
            module.group = group
        for name, child in module.named_children():
            done = isinstance(child, SynchronisedBatchNorm2d | InvertibleBatchNorm2d)
            if done or not isinstance(child, _BatchNorm):
                continue
            usual = child.affine and child.track_running_stats and child.momentum is not None
            if type(child) is not nn.BatchNorm2d or not usual:
                raise RevtrainError(
                    f"{path}.{name} is a {child}, whose statistics cannot be synchronised.\n"
                    "Expected BatchNorm2d with affine=True, track_running_stats=True and a momentum."
                )
            setattr(module, name, SynchronisedBatchNorm2d(child, group))


@contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    """Inside, the batch norms of `model` use the statistics of this process alone, and wait for no other."""
    norms = [m for m in model.modules() if isinstance(m, InvertibleBatchNorm2d | SynchronisedBatchNorm2d)]
    groups = [norm.group for norm in norms]
    for norm in norms:
        norm.group = None
    try:
        yield
    finally:
        for norm, group in zip(norms, groups, strict=True):
            norm.group = group
