"""Steps of every architecture, alone or as one of several processes: `python distributed_worker.py FILE`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from cases import ARCHS, ArchCase, compose

from revtrain.machine.device import autocast
from revtrain.machine.processes import Processes
from revtrain.models import build_model
from revtrain.optim import make_optimizer

BATCH, CLASSES, SIZE = 8, 5, 16
# name -> (overrides, precision of weights and images)
CASES = {
    **{
        f"{case.arch}-{backward}": ([f"arch={case.arch}", *case.small, f"backward={backward}"], torch.float64)
        for case in ARCHS
        for backward in ("invert", "store")
    },
    **{
        f"chunked-hidden-{backward}": (
            ["arch=chunked", "norm=hidden", "width=4", "depth=3", "hidden_chunk=1", f"backward={backward}"],
            torch.float64,
        )
        for backward in ("invert", "store")
    },
    "chunked-int32": (["arch=chunked", "width=4", "depth=3", "stream=int32"], torch.float64),
    "resnet18-bf16": (["arch=resnet18", "width=4", "precision=bf16"], torch.float32),
    "hybrid-bf16": (["arch=hybrid", "width=8", "depth=3", "precision=bf16"], torch.float32),
}


def step(name: str, processes: Processes) -> dict[str, Any]:
    """Loss, gradients and buffers after one forward and backward pass of this process's share of a fixed batch."""
    overrides, dtype = CASES[name]
    cfg = compose(*overrides)
    torch.manual_seed(0)
    model = build_model(cfg, CLASSES, SIZE).to(dtype).train()
    with torch.no_grad():  # away from the kinks and the symmetries of the initial state
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE, dtype=dtype), torch.randint(0, CLASSES, (BATCH,))
    images = images * torch.linspace(0.5, 2, BATCH, dtype=dtype).view(-1, 1, 1, 1)  # no two shares are alike
    network, own = processes.wrap(model), processes.own(BATCH)
    with autocast(torch.device("cpu"), cfg.precision) if dtype == torch.float32 else nullcontext():
        loss = F.cross_entropy(network(images[own]), labels[own])
    loss.backward()
    return {
        "loss": processes.mean(loss.detach()),
        "gradients": {name: parameter.grad.clone() for name, parameter in model.named_parameters()},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
    }


def losses(case: ArchCase, processes: Processes) -> list[float]:
    """Of twenty optimizer steps at a high rate, in float64: rounding is no excuse."""
    cfg = compose(f"arch={case.arch}", *case.small)
    torch.manual_seed(0)
    model = build_model(cfg, CLASSES, SIZE).double().train()
    network, own, optimizer = processes.wrap(model), processes.own(BATCH), make_optimizer(model, cfg)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    values = []
    for _ in range(20):
        images, labels = torch.randn(BATCH, 3, SIZE, SIZE, dtype=torch.float64), torch.randint(0, CLASSES, (BATCH,))
        loss = F.cross_entropy(network(images[own]), labels[own])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        values.append(processes.mean(loss.detach()).item())
    return values


if __name__ == "__main__":
    processes = Processes.of_environment()
    processes.connect(torch.device("cpu"))
    results = {name: step(name, processes) for name in CASES} | {case.arch: losses(case, processes) for case in ARCHS}
    torch.save(results, f"{sys.argv[1]}.{processes.rank}")
    processes.close()
