"""A model of a user's with a chain and side inputs, wrapped in several ways: `python library_worker.py FILE`, twice."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revtrain import AdditiveCoupling, InvertibleBatchNorm2d, InvertibleChain, PreNorm
from revtrain.layers import synchronise_batch_norms

CHANNELS, BATCH, CLASSES = 8, 4, 5


class Conditioned(nn.Module):
    """F with a side input (B, 6)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv, self.shift = nn.Conv2d(channels, channels, 3, padding=1), nn.Linear(6, channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return F.gelu(self.conv(x) + self.shift(time)[:, :, None, None])


class Model(nn.Module):
    """Stem, embedding, chain, head; with `norms`, two of them over the batch."""

    def __init__(self, norms: bool, backward: str):
        super().__init__()
        half = CHANNELS // 2

        def function() -> nn.Module:
            body = nn.Conv2d(half, half, 3, padding=1)
            return PreNorm(half, body) if norms else nn.Sequential(nn.GroupNorm(2, half), body)

        self.stem, self.time = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Embedding(10, 6)
        layers = [AdditiveCoupling(CHANNELS, Conditioned(half), function()) for _ in range(2)]
        self.chain = InvertibleChain([*layers, *([InvertibleBatchNorm2d(CHANNELS)] if norms else [])], backward)
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, images: Tensor, steps: Tensor) -> Tensor:
        x = self.chain(torch.tanh(self.stem(images)), self.time(steps))
        return self.head(torch.tanh(x).mean((2, 3)))


def wrapped(model: Model, how: str) -> nn.Module:
    """As a user would, for the processes of the default group; `model` itself for one process alone."""
    if not dist.is_initialized():
        return model
    if how.startswith("ddp"):
        synchronise_batch_norms(model, dist.group.WORLD)
        return DistributedDataParallel(model, static_graph="static" in how)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if "mixed" in how else {}
    if "layers" in how:
        for layer in model.chain.layers:
            fully_shard(layer, **policy)
    if "functions" in how:
        for layer in model.chain.layers:
            fully_shard(layer.f, **policy)
            fully_shard(layer.g, **policy)
    if "chain" in how:
        fully_shard(model.chain, **policy)
    fully_shard(model, **policy)
    return model


# name -> precision
CASES = {
    "ddp": torch.float64,
    "ddp-static": torch.float64,
    "fsdp-root": torch.float64,
    "fsdp-chain": torch.float64,
    "fsdp-layers": torch.float64,
    "fsdp-functions": torch.float64,
    "fsdp-root-mixed": torch.float32,
}


def steps_of(name: str, backward: str = "invert") -> dict[str, Any]:
    """Losses of three steps of SGD on this process's share of a batch, and the gradients of the last."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dtype = CASES[name]
    torch.manual_seed(0)
    model = Model("ddp" in name, backward).to(dtype)
    network = wrapped(model, name)
    images = torch.randn(BATCH, 3, 6, 6, dtype=dtype) * torch.linspace(0.5, 2, BATCH, dtype=dtype).view(-1, 1, 1, 1)
    steps, labels = torch.tensor([3, 1, 4, 1]), torch.arange(BATCH)
    own = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images[own], steps[own]).to(dtype), labels[own])
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if size > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / size)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {
        "losses": losses,
        "gradients": {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()},
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for name in CASES:
        try:
            results[name] = steps_of(name)
        except Exception:  # said by the test; both processes fail in the same place
            results[name] = traceback.format_exc()
    torch.save(results, f"{sys.argv[1]}.{os.environ['RANK']}")
    dist.barrier()
    # Gloo's threads can outlive the objects that Python takes down at exit, and abort the process: leave at once.
    os._exit(0)
