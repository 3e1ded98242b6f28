"""The Python examples of README.md and docs/ run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)


def run(block: str, name: str) -> dict:
    variables = {"__name__": "example"}
    exec(compile(block, name, "exec"), variables)
    return variables


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


def test_the_layers_of_the_readme_train_in_a_model_of_ones_own():
    (block,) = python_blocks("README.md")
    model = run(block, "README.md")["model"]
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(each is not None and each.isfinite().all() for each in gradients)
    assert sum(bool(each.any()) for each in gradients) > len(gradients) / 2


def test_a_chain_trains_inside_of_torchvisions_model():
    (block,) = python_blocks("docs/library.md")
    ran = run(block, "docs/library.md")
    assert ran["losses"][-1] < 0.8 * ran["losses"][0]
    for stage in ("layer1", "layer2", "layer3"):
        assert all(p.grad.any() for p in getattr(ran["model"], stage).parameters() if p.dim() > 1), stage
