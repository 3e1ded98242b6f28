"""A torchvision network whose first stage is reversible."""

import memcnn
import torch
from torch import nn
from torchvision.models import resnet18


def residual(channels):
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
    )


def reversible_stage(channels, blocks):
    layers = []
    for _ in range(blocks):
        f, g = residual(channels // 2), residual(channels // 2)
        layers.append(memcnn.InvertibleModuleWrapper(fn=memcnn.AdditiveCoupling(f, g), keep_input=False))
    return nn.Sequential(*layers)


def main(steps=10):
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    model.layer1 = reversible_stage(64, blocks=4)
    images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    print(main()[0])
