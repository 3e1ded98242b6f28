"""An image classifier with a reversible trunk."""

import torch
from torch import nn

from revtrain import AdditiveCoupling, InvertibleChain


def block(channels):
    return nn.Sequential(
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.Conv2d(2 * channels, channels, 3, padding=1),
    )


def main(channels=32, depth=8, steps=10):
    torch.manual_seed(0)
    blocks = [block(channels // 2) for _ in range(depth)]
    trunk = InvertibleChain([AdditiveCoupling(channels, f, g) for f, g in zip(blocks[::2], blocks[1::2], strict=True)])
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    )
    images, labels = torch.randn(16, 3, 16, 16), torch.randint(10, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
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
