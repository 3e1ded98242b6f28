"""fully_shard (FSDP2) with two processes: on the chain, on its layers, on F and G, and on a model around it."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from revtrain.core.chain import InvertibleChain
from revtrain.errors import RevtrainError
from revtrain.layers import (
    AdditiveCoupling,
    CheckpointedStep,
    CouplingConv2d,
    InvertibleConv1x1,
    InvertibleLeakyReLU,
    PreNorm,
    StoredStep,
)

PROCESSES = 2


def function(channels):
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)
    )


def build(backward="invert"):
    torch.manual_seed(0)
    layers = [
        InvertibleLeakyReLU(0.5),
        AdditiveCoupling(8, function(4), function(4)),
        InvertibleConv1x1(8),
        CouplingConv2d(8),
        AdditiveCoupling(8, PreNorm(nn.GroupNorm(2, 4), function(4)), function(4)),
        StoredStep(nn.Conv2d(8, 8, 3, stride=2, padding=1)),
        CheckpointedStep(nn.Conv2d(8, 8, 3, padding=1)),
        InvertibleLeakyReLU(0.7),
    ]
    return InvertibleChain(layers, backward=backward).double()


def on_chain(chain):
    fully_shard(chain)
    return chain


def on_layers(chain):
    for layer in chain:
        if any(True for _ in layer.parameters()):
            fully_shard(layer)
    return chain


def on_functions(chain):
    for module in [each for each in chain.modules() if isinstance(each, nn.Sequential)]:
        fully_shard(module)
    return chain


def on_layers_and_root(chain):
    model = nn.Sequential(on_layers(chain))
    fully_shard(model)
    return model


def gradient_errors(rank, path, shard):
    """Runs in each process: the largest difference from one process with the whole batch, over two steps."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=PROCESSES)
    x = torch.randn(4, 8, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    alone, chain = build("store"), build()
    (alone(x).square().sum() / PROCESSES).backward()
    model = shard(chain)
    for _ in range(2):
        model.zero_grad()
        model(x.chunk(PROCESSES)[rank]).square().sum().backward()
        for (name, parameter), expected in zip(chain.named_parameters(), alone.parameters(), strict=True):
            gradient = parameter.grad
            if hasattr(gradient, "full_tensor"):
                gradient = gradient.full_tensor()
            else:  # of nobody's care but the caller's
                dist.all_reduce(gradient)
                gradient /= PROCESSES
            torch.testing.assert_close(gradient, expected.grad, rtol=1e-9, atol=1e-9, msg=name)
    dist.barrier()
    # Gloo's threads can outlive the objects that Python takes down at exit, and abort the process: leave at once.
    os._exit(0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", [on_chain, on_layers, on_functions, on_layers_and_root], ids=lambda f: f.__name__)
def test_gradients_equal_one_process(shard, tmp_path):
    mp.spawn(gradient_errors, (str(tmp_path / "meet"), shard), PROCESSES)


@pytest.mark.filterwarnings("ignore")
def test_a_precision_of_its_own_for_a_part_of_a_chain_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        chain = build().float()
        fully_shard(chain[1], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        with pytest.raises(RevtrainError, match="mixed precision"):
            chain(torch.randn(2, 8, 8, 8))
    finally:
        dist.destroy_process_group()
