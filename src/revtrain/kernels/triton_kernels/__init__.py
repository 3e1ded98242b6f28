"""The operators' kernels in Triton: each module holds the kernel of one operator and the function that launches it.

    tiling   how tensors lie in memory, how they are cut into tiles, and the launch itself
    device   what the kernels share

No launch waits for the GPU, and all that it allocates is its result and the parts of its sums, so that it can be
captured in a CUDA graph. Nothing is tuned at run time: block sizes follow from shapes alone, and so do the bits.
"""

from revtrain.kernels.triton_kernels.add_to_part import add_to_part_
from revtrain.kernels.triton_kernels.channel_statistics import channel_statistics
from revtrain.kernels.triton_kernels.norm_activation import (
    norm_activation_sums,
    normalise_activate_,
    undo_norm_activation_,
)
from revtrain.kernels.triton_kernels.norm_constants import norm_constants, split_sums
from revtrain.kernels.triton_kernels.norm_gradient import add_norm_gradient_, add_norm_rest_
from revtrain.kernels.triton_kernels.read_part import read_part

__all__ = [
    "add_norm_gradient_",
    "add_norm_rest_",
    "add_to_part_",
    "channel_statistics",
    "norm_activation_sums",
    "norm_constants",
    "normalise_activate_",
    "read_part",
    "split_sums",
    "undo_norm_activation_",
]
