"""A segmentation network with a reversible middle."""

import torch
from torch import nn

from revtrain import AdditiveCoupling, InvertibleChain


def residual(channels):
    return nn.Sequential(
        nn.GroupNorm(4, channels), nn.LeakyReLU(inplace=True), nn.Conv2d(channels, channels, 3, padding=1)
    )


class Network(nn.Module):
    def __init__(self, channels=32, depth=6):
        super().__init__()
        self.stem = nn.Conv2d(4, channels, 3, padding=1)
        blocks = nn.ModuleList()
        for _ in range(depth):
            f, g = residual(channels // 2), residual(channels // 2)
            blocks.append(AdditiveCoupling(channels, f, g, dim=1))
        self.trunk = InvertibleChain(blocks)
        self.head = nn.Conv2d(channels, 3, 1)

    def forward(self, x):
        return self.head(self.trunk(self.stem(x)))


def main(steps=10):
    torch.manual_seed(0)
    model = Network()
    scans, masks = torch.randn(4, 4, 24, 24), torch.randint(3, (4, 24, 24))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(scans), masks)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    print(main()[0])
