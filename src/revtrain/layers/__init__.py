"""Invertible layers: each has a differentiable `forward` and an analytic `inverse` side by side.

InvertibleBatchNorm       Eqs. 14, 23        BN with kept statistics and |gamma| + epsilon_i
InvertibleLeakyReLU       Eq. 24             y = n x for x < 0
AdditiveCoupling          RevNet, 2017       y1 = x1 + F(x2), y2 = x2 + G(y1), any F and G
CouplingConv2d            section 4.1.3      the same with one convolution each: an invertible convolution
BoundedConv2d             not in the paper   its convolution, of bounded gain
HiddenChunkCoupling       not in the paper   wide F and G, a few hidden channels at a time
PreNorm                   not in the paper   F or G = a per-sample function of BN(x), a few images at a time
ChannelPooling            Eq. 29a            2x2 pixels into channels
BatchPooling              Eq. 29c            2x2 pixels into the batch
ChannelUnpooling          iUNet, 2020        its inverse as a layer: the way up in a U-Net
PartialChain              iUNet, 2020        y = (x1, chain(x2)): the first channels pass, as the skips of a U-Net
HaarPooling               Haar 1910          2x2 pixels into channels: their average and what it leaves out
AffineCoupling            Real NVP, 2017     y1 = x1 exp(s) + t, y2 = x2, s and t from any function of x2
MomentumCoupling          Sander 2021        v' = m v + (1 - m) F(x), x' = x + v': residual blocks of full width
HalfSwap                  -                  (x1, x2) -> (x2, x1)
ChannelPermutation        -                  a fixed random order of the channels
InvertibleConv1x1         Glow, 2018         a learned, invertible mixture of the channels
ActNorm                   Glow, 2018         a scale and a shift a channel that begin by normalising the first batch
StoredStep                -                  any module, whose input and activations are stored
CheckpointedStep          -                  any module, whose input is stored
Stem, Stem3d              (no inverse)       the convolution in front of a chain, tile by tile of a large image
Head                      (no inverse)       from the last state of a chain to the logits
DenseHead                 (no inverse)       the same for every pixel, or its loss without logits of full size

`synchronise_batch_norms` lets the batch norms of a model use the statistics of several processes.
`ChunkedCoupling` and `Readout` are former names of `HiddenChunkCoupling` and `Head`.
"""

from revtrain.layers.activation import InvertibleLeakyReLU
from revtrain.layers.actnorm import ActNorm
from revtrain.layers.affine import AffineCoupling
from revtrain.layers.batchnorm import InvertibleBatchNorm, InvertibleBatchNorm2d
from revtrain.layers.bounded import BoundedConv2d, bounds_weights, constrain_
from revtrain.layers.conv1x1 import InvertibleConv1x1
from revtrain.layers.coupling import AdditiveCoupling, CouplingConv2d
from revtrain.layers.dense_head import DenseHead, intersection_over_union
from revtrain.layers.haar import HaarPooling
from revtrain.layers.head import Head
from revtrain.layers.hidden_chunks import Activation, HiddenChunkCoupling, WideResidual
from revtrain.layers.momentum import MomentumCoupling
from revtrain.layers.partial import PartialChain
from revtrain.layers.permute import ChannelPermutation, HalfSwap
from revtrain.layers.pooling import BatchPooling, ChannelPooling, ChannelUnpooling, check_pooling, merge_sub_images
from revtrain.layers.prenorm import PreNorm
from revtrain.layers.stem import Stem, Stem3d
from revtrain.layers.step import CheckpointedStep, StoredStep
from revtrain.layers.sync import SynchronisedBatchNorm2d, synchronise_batch_norms, unsynchronised

ChunkedCoupling = HiddenChunkCoupling  # former names
Readout = Head

__all__ = [
    "ActNorm",
    "Activation",
    "AdditiveCoupling",
    "AffineCoupling",
    "BatchPooling",
    "BoundedConv2d",
    "ChannelPermutation",
    "ChannelPooling",
    "ChannelUnpooling",
    "CheckpointedStep",
    "ChunkedCoupling",
    "CouplingConv2d",
    "DenseHead",
    "HaarPooling",
    "HalfSwap",
    "Head",
    "HiddenChunkCoupling",
    "InvertibleBatchNorm",
    "InvertibleBatchNorm2d",
    "InvertibleConv1x1",
    "InvertibleLeakyReLU",
    "MomentumCoupling",
    "PartialChain",
    "PreNorm",
    "Readout",
    "Stem",
    "Stem3d",
    "StoredStep",
    "SynchronisedBatchNorm2d",
    "WideResidual",
    "bounds_weights",
    "check_pooling",
    "constrain_",
    "intersection_over_union",
    "merge_sub_images",
    "synchronise_batch_norms",
    "unsynchronised",
]
