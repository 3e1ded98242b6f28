"""The closed form of ResNet-18 to the byte: against a plain torchvision network that knows nothing of this project."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import compose
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from revtrain.models import analytic_memory

CLASSES = 10
LABEL, FLOAT = 8, 4


def plain_resnet18(width: int) -> ResNet:
    """torchvision's, of any width, with the stem that CIFAR needs: a 3x3 convolution of stride 1 and no max-pooling."""
    net = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=CLASSES)
    net.conv1, net.bn1, net.maxpool = (
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.Identity(),
    )
    net.inplanes = width
    net.layer1 = net._make_layer(BasicBlock, width, 2)
    net.layer2 = net._make_layer(BasicBlock, 2 * width, 2, stride=2)
    net.layer3 = net._make_layer(BasicBlock, 4 * width, 2, stride=2)
    net.layer4 = net._make_layer(BasicBlock, 8 * width, 2, stride=2)
    net.fc = nn.Linear(8 * width, CLASSES)
    return net


def saved_for_backward(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> int:
    """Bytes of all storages that autograd keeps for the backward pass, parameters apart, each counted once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.cross_entropy(net(images), labels)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("width", [4, 10, 64])
@pytest.mark.parametrize(("batch", "size"), [(3, 32), (2, 16)])
def test_stored_bytes_are_those_of_plain_torchvision(width, batch, size):
    cfg = compose("arch=resnet18", f"width={width}")
    model, net = analytic_memory(cfg, CLASSES, size), plain_resnet18(width)
    assert model.parameters == sum(p.numel() for p in net.parameters())
    assert model.fixed_of("theta") == sum(t.nbytes for t in (*net.parameters(), *net.buffers()))

    pixels = batch * size**2
    always = model.moments[0].terms
    of_batch = sum(term.bytes_per_pixel for term in always if term.name in ("images", "labels"))
    stored = {term.name: term.bytes_per_pixel for module in model.modules for term in module.stored}
    # what the closed form leaves out, as it is no activation of a pixel
    statistics = sum(2 * FLOAT * m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    head = batch * FLOAT * (8 * width + CLASSES) + FLOAT  # the linear layer's input, log-softmax, the sum of weights
    images, labels = torch.randn(batch, 3, size, size), torch.zeros(batch, dtype=torch.int64)
    expected = round(pixels * (of_batch + sum(stored.values()))) + statistics + head
    assert saved_for_backward(net, images, labels) == expected
