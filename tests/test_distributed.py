"""Several processes compute what one does with the whole batch; one set of files; an error in one ends all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, read_checkpoint, read_metrics, read_result
from distributed_worker import CASES, step

from revtrain.distributed import ALONE, Team
from revtrain.errors import RevtrainError

TESTS = Path(__file__).parent


def start(words: list[str], folder: Path, processes: int = 2) -> list[subprocess.Popen]:
    """`python WORDS` in several processes, as torchrun would start them; without its own start-up time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env={**os.environ, **{k: str(v) for k, v in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def end(started: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none may hang."""
    try:
        said = [process.communicate(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict]:
    """What two processes with half of the batch each computed for `CASES`, a dictionary for each process."""
    folder = tmp_path_factory.mktemp("steps")
    for code, _, err in end(start([str(TESTS / "distributed_worker.py"), str(folder / "step")], folder)):
        assert code == 0, err
    return [torch.load(folder / f"step.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_two_processes_is_the_step_of_one(name, together):
    alone = step(name, ALONE)
    # 16 bit: the shares are rounded as the whole is, but sums of gradients are not
    rtol, atol = (0.1, 0.02) if "bf16" in name else (1e-7, 1e-9)
    for process in together:
        torch.testing.assert_close(process[name], alone, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_processes_stay_equal_to_the_bit(name, together):
    torch.testing.assert_close(together[0][name], together[1][name], rtol=0, atol=0)
