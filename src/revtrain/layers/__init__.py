"""Invertible layers: each has a differentiable `forward` and an analytic `inverse` side by side.

InvertibleBatchNorm2d     Eqs. 14, 23        BN with kept statistics and |gamma| + epsilon_i
InvertibleLeakyReLU       Eq. 24             y = n x for x < 0
AdditiveCoupling          Eqs. 8, 9          y1 = x1 + F(x2), y2 = x2 + G(y1), any F and G
CouplingConv2d            section 4.1.3      the same with one convolution each: an invertible convolution
BoundedConv2d             not in the paper   its convolution, of bounded gain
HiddenChunkCoupling       not in the paper   wide F and G, a few hidden channels at a time
PreNorm                   not in the paper   F or G = a per-sample function of BN(x), a few images at a time
ChannelPooling            Eq. 29a            2x2 pixels into channels
BatchPooling              Eq. 29c            2x2 pixels into the batch
Head                      (no inverse)       from the last state of a chain to the logits

`synchronise_batch_norms` lets the batch norms of a model use the statistics of several processes.
`ChunkedCoupling` and `Readout` are former names of `HiddenChunkCoupling` and `Head`.
"""

from revtrain.layers.activation import InvertibleLeakyReLU
from revtrain.layers.batchnorm import InvertibleBatchNorm2d
from revtrain.layers.bounded import BoundedConv2d, bounds_weights, constrain_
from revtrain.layers.coupling import AdditiveCoupling, CouplingConv2d
from revtrain.layers.head import Head
from revtrain.layers.hidden_chunks import Activation, HiddenChunkCoupling, WideResidual
from revtrain.layers.pooling import BatchPooling, ChannelPooling, check_pooling, merge_sub_images
from revtrain.layers.prenorm import PreNorm
from revtrain.layers.sync import SynchronisedBatchNorm2d, synchronise_batch_norms, unsynchronised

ChunkedCoupling = HiddenChunkCoupling  # former names
Readout = Head

__all__ = [
    "Activation",
    "AdditiveCoupling",
    "BatchPooling",
    "BoundedConv2d",
    "ChannelPooling",
    "ChunkedCoupling",
    "CouplingConv2d",
    "Head",
    "HiddenChunkCoupling",
    "InvertibleBatchNorm2d",
    "InvertibleLeakyReLU",
    "PreNorm",
    "Readout",
    "SynchronisedBatchNorm2d",
    "WideResidual",
    "bounds_weights",
    "check_pooling",
    "constrain_",
    "merge_sub_images",
    "synchronise_batch_norms",
    "unsynchronised",
]
