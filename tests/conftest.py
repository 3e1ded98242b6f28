"""What the tests share: a tiny run, and the command run inside the test's own process."""

from __future__ import annotations

import os

# Tiny tensors gain nothing from threads and lose much where several processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools
import json
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import revtrain.data
from revtrain.config import ImageSize, read, registry
from revtrain.kernels.cpu_kernels.build import library
from revtrain.planning import predict
from revtrain.planning.predict import predict_step_memory

# A shell starts its background jobs with SIGINT ignored, and so perhaps this process: tests of Ctrl-C need it back.
signal.signal(signal.SIGINT, signal.default_int_handler)

# about a second and a half a run: 3 steps an epoch, 2 epochs
TINY = (
    "arch=layerwise", "depth=2", "width=4", "pooling=[]", "data=synthetic", "data.train_images=52",
    "data.test_images=20", "batch=16", "epochs=2", "lr=0.05", "probe.batch=8", "device=cpu",
)  # fmt: skip

# the same of any architecture, one epoch without a probe
IN_A_MOMENT = (
    "data=synthetic", "data.train_images=52", "data.test_images=20", "batch=16", "epochs=1", "lr=0.05",
    "probe.every=0", "device=cpu",
)  # fmt: skip


class Ran(NamedTuple):
    """How a command ended. `dirs` are the run directories it made, oldest first."""

    code: int
    out: str
    err: str
    dirs: list[Path]

    @property
    def dir(self) -> Path:
        assert len(self.dirs) == 1
        return self.dirs[0]

    @property
    def result(self) -> dict[str, Any]:
        return read_result(self.dir)


def pytest_sessionstart() -> None:
    """Compile the passes for this CPU, once, before any test looks at what a run prints."""
    library()


def read_result(run_dir: Path) -> dict[str, Any]:
    """result.json, refused unless it is strict JSON."""
    return json.loads((run_dir / "result.json").read_text(), parse_constant=_refuse)


def at_call(monkeypatch, name, number, action):
    """Do something at the given call of a function of `revtrain.data`; a step draws its augmentation once."""
    function, calls = getattr(revtrain.data, name), itertools.count(1)

    def wrapped(*args):
        if next(calls) == number:
            action()
        return function(*args)

    monkeypatch.setattr(revtrain.data, name, wrapped)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, refused unless they are strict JSON."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def read_checkpoint(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "last.pt", weights_only=True)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_planned: dict[str, predict.StepMemory] = {}


def plan_once(config: Any, classes: int, image_size: Any, batch: int, planned_for: str = "cpu") -> Any:
    """`predict_step_memory`, a third of a tiny run, once for each network that the tests train."""
    config, size = read(config), ImageSize.of(image_size)
    training = replace(config.training, lr=1.0, epochs=1)  # which no memory depends on
    beside = os.environ.get(registry.VARIABLE)
    key = repr((config.network, training, classes, size, batch, planned_for, beside))
    if key not in _planned:
        _planned[key] = predict_step_memory(config, classes, size, batch, planned_for)
    return _planned[key]


@pytest.fixture(autouse=True)
def plans_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By runs, that is: who imports `predict_step_memory` has the function itself."""
    monkeypatch.setattr(predict, "predict_step_memory", plan_once)


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ran]]:
    """`command("depth=4", ...)` runs `revtrain depth=4 ...` in an empty folder, within this process."""
    from revtrain.cli.train import main

    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*argv: str) -> Ran:
        before = _run_dirs(tmp_path)
        capfd.readouterr()
        code = main(argv)
        out, err = capfd.readouterr()
        made = [each for each in _run_dirs(tmp_path) if each not in before]
        return Ran(code, out, err, made)

    yield run
    # Hydra has put its own handlers in place of pytest's
    for logger in (root, logging.getLogger("revtrain.errors")):
        for handler in logger.handlers[:]:
            if handler not in handlers:
                logger.removeHandler(handler)
                handler.close()
    root.handlers[:], root.level = handlers, level


def _run_dirs(folder: Path) -> list[Path]:
    return sorted((each.parent for each in folder.glob("**/.hydra")), key=lambda each: each.stat().st_ctime)


def assert_same_state(one: Any, other: Any, path: str = "") -> None:
    """Two checkpoints hold the same values, bit for bit; the clock's and the command line's apart."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            if key not in ("train_seconds", "images_per_second", "overrides", "resume"):
                assert_same_state(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_state(a, b, f"{path}/{index}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    else:
        assert one == other, path
