"""Everything between two convolutions, in one pass over memory each.

    read_part              a part of the state -> the convolution's input: unit, normalisation, cast and layout
    add_to_part_           part += a residual, on the grid; values that leave the range are counted
    channel_statistics     mean and biased variance of each channel
    norm_constants         what follows from them and the weights, a few numbers a channel; running statistics
    add_norm_gradient_     the gradient of a BN in front of F: its first part is added, its two sums are gathered
    add_norm_rest_         its second part, which needs the sums
    split_sums             these sums as the gradients of bias and weight
    normalise_activate_    BN and LeakyReLU in place; signs packed, eight a byte
    norm_activation_sums   of their backward pass: the two sums
    undo_norm_activation_  (y, dy) -> (x, dx) of both

Each has a *specification* in plain torch: it is what the operator means, and what runs where there is no kernel. On
CUDA a Triton kernel does the same in one launch, or in two where sums are taken. See docs/engine.md, section 5.
`pieces` cuts the passes of those without a kernel: no temporary grows with the batch.

B batch, C channels of the part. A part is (B, C, ...), a slice of a state along its channels: the values of one sample
lie side by side, samples may be further apart.
"""

from revtrain.kernels.add_to_part import add_to_part_
from revtrain.kernels.channel_statistics import channel_statistics
from revtrain.kernels.norm_activation import norm_activation_sums, normalise_activate_, undo_norm_activation_
from revtrain.kernels.norm_constants import NormConstants, Running, norm_constants
from revtrain.kernels.norm_gradient import add_norm_gradient_, add_norm_rest_, split_sums
from revtrain.kernels.read_part import read_part

__all__ = [
    "NormConstants",
    "Running",
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
