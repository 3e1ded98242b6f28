"""Neighbours in a chain that run as one layer: the same numbers as the two on their own, unless somebody looks."""

from __future__ import annotations

import copy

import pytest
import torch

from revtrain.core.chain import InvertibleChain, observe
from revtrain.core.gradients import Gradients
from revtrain.core.joined import joined
from revtrain.layers import AdditiveCoupling, CouplingConv2d, InvertibleBatchNorm2d, InvertibleLeakyReLU
from revtrain.layers.norm_activation import NormActivation


def pair(sign="mixed", keep_signs=True, slope=0.3, training=True):
    torch.manual_seed(0)
    norm = InvertibleBatchNorm2d(6, sign=sign).train(training)
    with torch.no_grad():
        norm.weight.uniform_(0.3, 1.5)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm.double(), InvertibleLeakyReLU(slope, keep_signs)


def images():
    return torch.randn(5, 6, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("keep_signs", [True, False])
@pytest.mark.parametrize("piece_bytes", [100, 2**20])
def test_both_are_what_the_two_are_one_after_the_other(training, keep_signs, piece_bytes):
    results = []
    for together in (True, False):
        norm, activation = pair(keep_signs=keep_signs, training=training)
        steps = joined([norm, activation], [None, None]) if together else [(norm, None), (activation, None)]
        for layer in (norm, activation, *(step for step, _ in steps)):
            layer.piece_bytes = piece_bytes
        x, kept = images(), []
        with torch.no_grad():
            for layer, _ in steps:
                x, saved = layer.forward_(x)
                kept.append(saved)
            again = images()
            more = []
            for (layer, _), saved in zip(steps, kept, strict=True):
                again, each = layer.recompute_for_backward_(again, saved)
                more.append(each)
            grads, y, dy = Gradients([*norm.parameters()]), x.clone(), images().flip(0)
            for (layer, _), saved in reversed(list(zip(steps, more, strict=True))):
                y, dy = layer.backward_(y, dy, saved, grads)
        results.append([x, again, y, dy, *grads.values(), norm.running_mean, norm.running_var])
    for both, one_by_one in zip(*results, strict=True):
        torch.testing.assert_close(both, one_by_one, rtol=1e-12, atol=1e-12)


def test_only_usual_neighbours_are_joined():
    norm, activation = pair()
    assert isinstance(joined([norm, activation], [None, None])[0][0], NormActivation)
    assert len(joined([activation, norm], [None, None])) == 2

    class Other(InvertibleLeakyReLU):
        def forward(self, x):
            return super().forward(x)

    assert len(joined([norm, Other(0.3)], [None, None])) == 2
    activation.register_forward_hook(lambda *_: None)
    assert len(joined([norm, activation], [None, None])) == 2


def test_an_observer_sees_every_layer_and_the_gradients_are_the_same():
    torch.manual_seed(2)
    inside = InvertibleChain([*pair()[:1], InvertibleLeakyReLU(0.3), CouplingConv2d(6)])
    chain = InvertibleChain([AdditiveCoupling(12, inside, copy.deepcopy(inside)), *_units()]).double()
    x = torch.randn(4, 12, 4, 4, dtype=torch.float64)
    seen = []

    class Watch:
        def on_input(self, layer, x):
            seen.append(type(layer).__name__)

        def on_reconstructed(self, layer, x):
            seen.append(f"{type(layer).__name__} back")

    gradients = []
    for watches in (False, True):
        leaf = x.clone().requires_grad_()
        if watches:
            with observe(chain, Watch()):
                chain(leaf).square().sum().backward()
        else:
            chain(leaf).square().sum().backward()
        gradients.append([leaf.grad, *(p.grad.clone() for p in chain.parameters())])
        chain.zero_grad()
    assert seen.count("InvertibleLeakyReLU back") == 3 and "NormActivation" not in seen
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def _units():
    return CouplingConv2d(12), InvertibleBatchNorm2d(12), InvertibleLeakyReLU(0.5)
