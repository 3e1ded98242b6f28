"""Invertible layers: each has a differentiable `forward` and an analytic `inverse` side by side.

InvertibleBatchNorm2d     Eqs. 14, 23      BN with kept statistics and |gamma| + epsilon_i
InvertibleLeakyReLU       Eq. 24           y = n x for x < 0
AdditiveCoupling          Eqs. 8, 9        y1 = x1 + F(x2), y2 = x2 + G(y1), any F and G
CouplingConv2d            section 4.1.3    the same with one convolution each: an invertible convolution
ChannelPooling            Eq. 29a          2x2 pixels into channels
BatchPooling              Eq. 29c          2x2 pixels into the batch
"""

from revtrain.layers.activation import InvertibleLeakyReLU
from revtrain.layers.batchnorm import InvertibleBatchNorm2d
from revtrain.layers.chunked import ChunkedCoupling, WideResidual
from revtrain.layers.coupling import AdditiveCoupling, CouplingConv2d
from revtrain.layers.pooling import BatchPooling, ChannelPooling, check_pooling, merge_sub_images

__all__ = [
    "AdditiveCoupling",
    "BatchPooling",
    "ChannelPooling",
    "ChunkedCoupling",
    "CouplingConv2d",
    "InvertibleBatchNorm2d",
    "InvertibleLeakyReLU",
    "WideResidual",
    "check_pooling",
    "merge_sub_images",
]
