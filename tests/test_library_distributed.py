"""DistributedDataParallel and FSDP2 around a model with a chain and side inputs: gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from library_worker import CASES, steps_of
from test_distributed import end, start


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("library")
    worker = str(Path(__file__).with_name("library_worker.py"))
    for code, _, err in end(start([worker, str(folder / "step")], folder)):
        assert code == 0, err
    return [torch.load(folder / f"step.{rank}", weights_only=True) for rank in range(2)]


INSIDE = ("fsdp-layers", "fsdp-functions")  # of a chain, which reads their weights without calling them as FSDP expects


@pytest.mark.parametrize("name", [name for name in CASES if name not in INSIDE])
def test_two_processes_train_as_one(name, together):
    """Losses of three steps and all gradients, with activations rebuilt, are those of one process that stores them."""
    alone = steps_of(name, backward="store")
    rtol, atol = (0.05, 0.02) if "mixed" in name else (1e-9, 1e-11)
    for process in together:
        assert not isinstance(process[name], str), process[name]
        torch.testing.assert_close(process[name], alone, rtol=rtol, atol=atol)
    assert alone["losses"][2] < alone["losses"][0]
    assert all(each.any() for each in alone["gradients"].values())


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_sharded_inside_of_a_chain_is_right_or_an_error(name, together):
    """Never silently something else."""
    alone = steps_of(name, backward="store")
    for process in together:
        if isinstance(process[name], str):
            assert "RevtrainError" in process[name] or "DTensor" in process[name], process[name]
        else:
            torch.testing.assert_close(process[name], alone, rtol=1e-9, atol=1e-11)
