"""What the peers' layers compute, by plain autograd: stand-ins under their names for where they are not installed."""

from types import SimpleNamespace

import torch
from torch import nn


class Coupling(nn.Module):
    """y1 = x1 + F(x2), y2 = x2 + G(y1), with keyword arguments for F."""

    def __init__(self, f, g, dim):
        super().__init__()
        self.f, self.g, self.dim = f, g, dim

    def forward(self, x, **context):
        x1, x2 = (each.contiguous() for each in x.chunk(2, dim=self.dim))
        y1 = x1 + self.f(x2.clone(), **context)  # F may change its input in place
        return torch.cat([y1, x2 + self.g(y1.clone())], dim=self.dim)


class ReversibleSequential(nn.ModuleList):
    """revlib's: x1, x2 = x2, x1 + F(x2) for each function."""

    def __init__(self, *functions):
        super().__init__(functions)

    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        for function in self:
            x1, x2 = x2, x1 + function(x2)
        return torch.cat([x1, x2], dim=1)


class ReversibleSequence(nn.Module):
    """That of reformer-pytorch, the `arg_route` of which sends keyword arguments to F alone here."""

    def __init__(self, pairs):
        super().__init__()
        self.blocks = nn.ModuleList(Coupling(f, g, dim=2) for f, g in pairs)

    def forward(self, x, arg_route, **context):
        assert arg_route == (True, False)
        for block in self.blocks:
            x = block(x, **context)
        return x


FORMULAS = {
    "memcnn": SimpleNamespace(
        AdditiveCoupling=lambda f, g: Coupling(f, g, dim=1), InvertibleModuleWrapper=lambda fn, keep_input: fn
    ),
    "revtorch": SimpleNamespace(
        ReversibleBlock=lambda f, g, split_along_dim: Coupling(f, g, split_along_dim),
        ReversibleSequence=lambda blocks: nn.Sequential(*blocks),
    ),
    "revlib": SimpleNamespace(ReversibleSequential=ReversibleSequential),
    "reformer_pytorch.reversible": SimpleNamespace(ReversibleSequence=ReversibleSequence),
}
