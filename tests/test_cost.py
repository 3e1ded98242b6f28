"""What a step costs on a GPU, counted without one: speed that rots on no machine, with or without a GPU."""

from __future__ import annotations

import pytest
import torch
from cases import compose

from revtrain.config import read
from revtrain.planning.cost import CARDS, Operations, StepCost, step_cost
from revtrain.planning.plan import make_plan, with_cost

WHOLE = "chunk_mib=4096"  # the batch in one piece
# arch, precision, operations with the batch in one piece, GB that they read and write: at batch 512, at most
LIMITS = [
    ("chunked", "bf16", 350, 14.0),
    ("layerwise", "fp32", 250, 14.0),
    ("hybrid", "fp32", 1100, 45.0),
    ("revnet", "fp32", 500, 40.0),
    ("irevnet", "fp32", 500, 40.0),
    ("resnet18", "fp32", 300, 25.0),
]


def cost_of(*words: str, batch: int = 512) -> StepCost:
    return step_cost(read(compose(*words)), batch)


@pytest.mark.parametrize(("arch", "precision", "operations", "gigabytes"), LIMITS, ids=[each[0] for each in LIMITS])
def test_a_step_takes_no_more_operations_and_bytes(arch, precision, operations, gigabytes):
    cost = cost_of(f"arch={arch}", f"precision={precision}", WHOLE)
    assert cost.launches <= operations, cost.operations.most_common()
    assert cost.total_bytes <= gigabytes * 1e9, cost.bytes_moved.most_common()


@pytest.mark.parametrize("arch", ["chunked", "hybrid", "irevnet"])
def test_pieces_cost_launches_and_hardly_a_byte(arch):
    """What a piece does is what the whole does: weights, and their gradients, are moved once more for each."""
    whole, pieces = cost_of(f"arch={arch}", WHOLE), cost_of(f"arch={arch}", "chunk_mib=11")
    assert whole.launches < pieces.launches < 4.5 * whole.launches
    assert pieces.total_bytes < 1.05 * whole.total_bytes
    assert pieces.multiplications == whole.multiplications


def test_a_known_network_is_counted_to_the_byte():
    """y = relu(W x): a product, a sum of the loss; back: its expansion aside, a mask and a product, as x needs none."""
    weight = torch.randn(3, 4, requires_grad=True)
    x = torch.randn(5, 4)
    with Operations() as counting:
        torch.relu(x @ weight.t()).sum().backward()
    cost = counting.cost
    assert dict(cost.operations) == {"mm": 2, "relu": 1, "sum": 1, "ones_like": 1, "threshold_backward": 1}
    assert cost.bytes_moved["mm"] == 4 * (5 * 4 + 4 * 3 + 5 * 3) + 4 * (3 * 5 + 5 * 4 + 3 * 4)


def test_rebuilding_costs_one_more_forward_pass_and_hybrid_one_and_a_half():
    """docs/engine.md: MACs of invert over store; a forward pass is a third of those of store."""
    for arch, least, most in (("chunked", 1.3, 1.35), ("layerwise", 1.3, 1.35), ("hybrid", 1.45, 1.55)):
        rebuilt = cost_of(f"arch={arch}", WHOLE, batch=8).multiplications
        stored = cost_of(f"arch={arch}", "backward=store", WHOLE, batch=8).multiplications
        assert least < rebuilt / stored < most, arch


# Measured on an H100, batch 512, torch 2.11: the engine before its passes were fused, its step replayed as a CUDA
# graph, with what was counted of it (operations, GB); and ResNet-18 as it is.
MEASURED_MS = [
    ("chunked, bf16", 1700, 58, 0.54e12, True, 34.6),
    ("hybrid, fp32", 2819, 93, 0.51e12, False, 60.2),
    ("resnet18, fp32", 164, 22.1, 0.85e12, False, 26.7),
]


@pytest.mark.parametrize(("what", "operations", "gigabytes", "products", "narrow", "measured"), MEASURED_MS)
def test_the_estimate_is_near_what_was_measured(what, operations, gigabytes, products, narrow, measured):
    cost = StepCost()
    cost.operations["all"], cost.bytes_moved["all"], cost.multiplications = operations, int(gigabytes * 1e9), products
    assert 1e3 * cost.seconds(CARDS[0], narrow) == pytest.approx(measured, rel=0.35), what


def test_a_plan_says_what_a_step_costs():
    config = read(compose("arch=chunked", "depth=2", "width=8", "batch=32", "precision=bf16"))
    plan = with_cost(make_plan(config, torch.device("cpu"), 10, 32), config)
    assert plan.cost is not None and plan.cost["operations"] > 50
    assert "operations on a GPU" in plan.table() and "estimated on an H100" in plan.table()
