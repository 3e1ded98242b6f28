"""The operators between two convolutions: kernels in Triton's interpreter against their specifications, fakes against
both, and kernels compiled for every architecture without a GPU."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import os
import subprocess
import sys
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from torch._subclasses.fake_tensor import FakeTensorMode

from revtrain.kernels import (
    Running,
    add_norm_gradient_,
    add_norm_rest_,
    add_to_part_,
    channel_statistics,
    norm_activation_sums,
    norm_constants,
    norm_gradient,
    normalise_activate_,
    operator,
    read_part,
    split_sums,
    undo_norm_activation_,
)
from revtrain.kernels.norm_activation import forward_specification
from revtrain.kernels.norm_constants import specification as norm_constants_specification

needs_triton = pytest.mark.skipif(not operator.has_triton(), reason="Triton is not installed")

OPERATORS = sorted(operator.LAUNCHES)
PIECE = 2**16


# ---- kernels against specifications --------------------------------------------------------------


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory, worker_id) -> dict[str, dict]:
    """Operator -> what tests/kernel_worker.py found; the processes of one test run share one worker."""
    folder = tmp_path_factory.getbasetemp()
    report = (folder if worker_id == "master" else folder.parent) / "kernels.json"
    with FileLock(f"{report}.lock"):
        if not report.exists():
            command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("kernel_worker.py")), "200"]
            environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            report.write_text(done.stdout)
    lines = map(json.loads, report.read_text().splitlines())
    return {line["operator"]: line for line in lines}


@needs_triton
@pytest.mark.parametrize("name", OPERATORS)
def test_a_kernel_computes_what_its_specification_says(name, interpreted):
    found = interpreted[name]
    assert found["cases"] == 200
    assert not found["failures"], "\n".join(found["failures"][:10])


@needs_triton
def test_the_cases_hold_what_is_difficult(interpreted):
    for name, found in interpreted.items():
        if name in ("norm_constants", "split_sums"):  # of a few numbers a channel, not of states
            continue
        seen = found["seen"]
        for what in (
            "one image",
            "64 bit",
            "3-D",
            "odd",
            "several tiles",
            "torch.float16",
            "torch.bfloat16",
            "torch.float64",
        ):
            assert seen[what] >= 10, (name, what)
    assert interpreted["read_part"]["seen"]["two layouts"] >= 30
    for what in (
        "strided",
        "channels last",
        "unusual strides",
        "overflow",
        "not a number",
        "torch.int16",
        "torch.int32",
    ):
        assert interpreted["add_to_part_"]["seen"][what] >= 10, what
    assert interpreted["channel_statistics"]["seen"]["far mean"] >= 30
    assert interpreted["undo_norm_activation_"]["seen"]["signs"] >= 50


# ---- fakes against specifications ----------------------------------------------------------------


def calls(device: str) -> dict[str, list]:
    """Operator -> calls of the public function, each a function of nothing that returns tensors."""

    def filled(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> torch.Tensor:
        x = torch.ones(shape, dtype=dtype, device=device)
        return x.contiguous(memory_format=torch.channels_last) if last else x

    c = [filled(6) for _ in range(4)]
    state = filled(3, 12, 5, 4, dtype=torch.int16)[:, :6]
    gradient = filled(3, 12, 5, 4)[:, 6:]
    u = filled(3, 6, 5, 4, dtype=torch.bfloat16, last=True)
    signs = filled(45, dtype=torch.uint8)
    counters = dict(overflows=filled(dtype=torch.int64), no_numbers=filled(dtype=torch.bool))
    volume = filled(2, 3, 4, 5, 6)
    return {
        "read_part": [
            lambda: read_part(state, torch.bfloat16, unit=0.5, scale=c[0], shift=c[1], channels_last=True),
            lambda: read_part(state, torch.float64),
            lambda: read_part(volume, torch.float16, channels_last=True),
            lambda: read_part(filled(4, 7), torch.float32, channels_last=True),
        ],
        "add_to_part_": [
            lambda: add_to_part_(state, u, 0.5, step=2.0**-8, **counters, piece_bytes=PIECE),
            lambda: add_to_part_(gradient, u, piece_bytes=PIECE),
        ],
        "channel_statistics": [
            lambda: channel_statistics(state, unit=0.5, dtype=torch.float32, piece_bytes=PIECE),
            lambda: channel_statistics(gradient, dtype=torch.float64, piece_bytes=PIECE),
        ],
        "add_norm_gradient_": [
            lambda: add_norm_gradient_(gradient, u, state, c[0], c[1], filled(2, 6), unit=0.5),
            lambda: add_norm_gradient_(gradient, u, state, c[0], c[1], None, unit=0.5),
        ],
        "norm_constants": [
            lambda: tuple(norm_constants(*c, 1e-5)),
            lambda: tuple(
                norm_constants(
                    *c, 1e-5, epsilon_i=0.1, signs=filled(6, dtype=torch.int8),
                    running=Running(filled(6), filled(6), filled(dtype=torch.int64), None, 60),
                )
            ),
        ],
        "split_sums": [lambda: split_sums(filled(2, 6), factor=c[0]), lambda: split_sums(filled(2, 6), divisor=c[0])],
        "add_norm_rest_": [
            lambda: add_norm_rest_(gradient, state, *c[:3], filled(2, 6), 60, unit=0.5, piece_bytes=PIECE)
        ],
        "normalise_activate_": [
            lambda: normalise_activate_(filled(3, 6, 5, 4), *c, 0.5, with_signs=True, piece_bytes=PIECE),
            lambda: normalise_activate_(filled(3, 6, 5, 4), *c, 0.5, piece_bytes=PIECE),
        ],
        "norm_activation_sums": [
            lambda: norm_activation_sums(filled(3, 6, 5, 4), u.contiguous(), signs, c[0], c[1], 0.5, piece_bytes=PIECE)
        ],
        "undo_norm_activation_": [
            lambda: undo_norm_activation_(
                filled(3, 6, 5, 4), filled(3, 6, 5, 4), signs, *c, 0.5, filled(2, 6), 60, piece_bytes=PIECE
            )
        ],
    }  # fmt: skip


def described(result) -> list[tuple]:
    tensors = result if isinstance(result, tuple) else (result,)
    return [each if each is None else (each.shape, each.dtype, each.stride()) for each in tensors]


@pytest.mark.parametrize("name", OPERATORS)
def test_a_fake_has_the_shapes_of_its_specification(name):
    expected = [described(call()) for call in calls("cpu")[name]]
    with FakeTensorMode(), operator.planning_for("cuda"):
        got = [described(call()) for call in calls("cpu")[name]]
    assert got == expected
    with FakeTensorMode():
        assert [described(call()) for call in calls("cuda")[name]] == expected


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_keeps_the_rules_of_torch(name, monkeypatch):
    """The schema tells what is written to, results are no views, the fake agrees: torch.library.opcheck, with the
    specification in the kernel's place."""
    recorded = []
    module = {"normalise_activate_": "norm_activation", "norm_activation_sums": "norm_activation",
              "undo_norm_activation_": "norm_activation", "add_norm_gradient_": "norm_gradient",
              "add_norm_rest_": "norm_gradient", "split_sums": "norm_gradient"}.get(name, name.rstrip("_"))  # fmt: skip
    module = sys.modules[f"revtrain.kernels.{module}"]
    public = getattr(module, name)
    with torch.library._scoped_library("revtrain", "IMPL") as library:

        def implementation(*arguments):
            recorded.append(arguments)
            monkeypatch.setattr(module, "runs_kernel", lambda x: False)
            result = SPECIFICATIONS.get(name, public)(*arguments)
            monkeypatch.setattr(module, "runs_kernel", lambda x: True)
            return result

        library.impl(name, implementation, "CPU")
        monkeypatch.setattr(module, "runs_kernel", lambda x: True)
        for call in calls("cpu")[name]:
            call()
        for arguments in recorded[:]:
            torch.library.opcheck(getattr(torch.ops.revtrain, name).default, arguments)


SPECIFICATIONS = {
    "read_part": lambda part, scale, shift, unit, dtype, last: read_part(
        part, dtype, unit=unit, scale=scale, shift=shift, channels_last=last
    ),
    "add_to_part_": lambda part, residual, factor, step, limit, overflows, none: add_to_part_(
        part, residual, factor, step=step, limit=limit, overflows=overflows, no_numbers=none, piece_bytes=PIECE
    ),
    "channel_statistics": lambda part, unit, dtype, piece_bytes: tuple(
        channel_statistics(part, unit=unit, dtype=dtype, piece_bytes=piece_bytes)
    ),
    "add_norm_gradient_": lambda *given: norm_gradient.gradient_specification(*given),
    "norm_constants": lambda *given: norm_constants_specification(*given),
    "split_sums": lambda *given: norm_gradient.split_specification(*given),
    "add_norm_rest_": lambda *given: add_norm_rest_(*given[:-1], unit=given[-1], piece_bytes=PIECE),
    "normalise_activate_": lambda *given: _filled(given[-1], forward_specification(*given[:-1], len(given[-1]) > 0)),
    "norm_activation_sums": lambda *given: norm_activation_sums(*given, piece_bytes=PIECE),
    "undo_norm_activation_": lambda *given: undo_norm_activation_(*given, piece_bytes=PIECE),
}


def _filled(target: torch.Tensor, values: torch.Tensor | None) -> None:
    if values is not None:
        target.copy_(values)


@needs_triton
@pytest.mark.parametrize("name", OPERATORS)
def test_the_count_of_launches_is_that_of_the_kernels(name):
    from revtrain.kernels.compile_ahead import launches, variants

    for variant in variants():
        if variant.operator == name:
            assert len(launches(variant)) == operator.LAUNCHES[name]


# ---- where there is no kernel --------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A tensor that says it is on a GPU of some capability, whose kernels compile or raise."""
    pytest.importorskip("triton")
    from revtrain.kernels.triton_kernels import probe

    def make(capability: tuple[int, int], error: Exception | None = None):
        def attempt(device):
            if error is not None:
                raise error

        operator.serves.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(probe, "probe", attempt)
        return SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"))

    yield make
    operator.serves.cache_clear()


def test_a_gpu_that_triton_serves_runs_kernels(gpu, caplog):
    assert operator.runs_kernel(gpu((7, 0)))
    assert not caplog.records


@pytest.mark.parametrize(
    ("capability", "error", "reason"),
    [
        ((6, 1), None, "the GPU's compute capability is 6.1, and Triton serves 7.0 and above"),
        ((9, 0), RuntimeError("Failed to find C compiler.\nMore."), "(RuntimeError: Failed to find C compiler.)"),
    ],
)
def test_a_gpu_that_triton_cannot_serve_runs_specifications_and_one_line_says_so(
    gpu, caplog, capability, error, reason
):
    x = gpu(capability, error)
    with caplog.at_level(logging.WARNING):
        assert [operator.runs_kernel(x) for _ in range(3)] == [False] * 3
    (record,) = caplog.records
    assert reason in record.getMessage() and "\n" not in record.getMessage()


# ---- compilation without a GPU -------------------------------------------------------------------


def check(launch, architecture: int) -> str:
    """Compile; the assembly. No register may be spilled."""
    from revtrain.kernels.compile_ahead import compile_for

    made = compile_for(launch, architecture)
    assert made.cubin.startswith(b"\x7fELF")
    assert made.spilled_bytes == 0, f"{made.kernel} for sm_{architecture} spills {made.spilled_bytes} bytes a thread"
    # three programs of 128 threads at least find room in the 65,536 registers of a multiprocessor
    assert 0 < made.registers <= 168, f"{made.kernel} for sm_{architecture} takes {made.registers} registers"
    return made.ptx


def some_variants(architecture: int) -> list:
    """Half of the operators each, others than for the next architecture, and other types: read_part always."""
    from revtrain.kernels.compile_ahead import ARCHITECTURES, variants

    turn, every = ARCHITECTURES.index(architecture), list(variants())
    chosen = []
    for number, name in enumerate(OPERATORS):
        own = [variant for variant in every if variant.operator == name]
        if name == "read_part" or (turn + number) % 2 == 0:
            chosen += islice(cycle(own), 7 * turn + number, 7 * turn + number + 1)
    return chosen


@needs_triton
@pytest.mark.parametrize("architecture", [70, 75, 80, 86, 89, 90, 100])
def test_kernels_compile_for(architecture, tmp_path, monkeypatch):
    from revtrain.kernels.compile_ahead import launches

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for variant in some_variants(architecture):
        for launch in launches(variant):
            check(launch, architecture)


@needs_triton
def test_some_kernel_of_every_operator_is_compiled():
    from revtrain.kernels.compile_ahead import ARCHITECTURES

    chosen = [variant for each in ARCHITECTURES for variant in some_variants(each)]
    assert {variant.operator for variant in chosen} == set(OPERATORS)
    assert len({(variant.operator, variant.types) for variant in chosen}) > 20


@needs_triton
def test_memory_is_read_and_written_sixteen_bytes_a_thread(tmp_path, monkeypatch):
    """Also where one side is channels last and the other is not: what is exchanged goes through shared memory."""
    from revtrain.kernels.compile_ahead import launches, variants

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (variant,) = [
        each for each in variants() if each.operator == "read_part" and each.types == "i32, fp32; channels last"
    ]
    (launch,) = launches(variant)
    assembly = check(launch, 80)
    assert assembly.count("ld.global.v4.b32") == assembly.count("st.global.v4.b32") == 4  # of 16 values a thread


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [70, 75, 80, 86, 89, 90, 100])
def test_every_kernel_compiles_for(architecture, tmp_path, monkeypatch):
    from revtrain.kernels.compile_ahead import launches, same_code, variants

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = {same_code(launch): launch for variant in variants() for launch in launches(variant)}
    for launch in made.values():
        check(launch, architecture)


@needs_triton
def test_the_table_of_kernels_has_a_row_for_each_kernel(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    path = Path(__file__).parents[1] / "scripts/kernel_table.py"
    spec = importlib.util.spec_from_file_location("kernel_table", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = tmp_path / "kernels.csv"
    script.main(
        ["--operators", "norm_activation_sums", "--every", "99", "--architectures", "75", "90", "--out", str(out)]
    )
    command, *lines = out.read_text().splitlines()
    assert command.startswith("# python scripts/kernel_table.py")
    rows = list(csv.DictReader(lines))
    assert [(row["kernel"], row["compiled"]) for row in rows] == [("sums", "2"), ("add_up_parts", "2")]
    assert all(int(row["sm_75"]) > 0 and int(row["sm_90"]) > 0 and row["spilled bytes"] == "0" for row in rows)
    assert "norm_activation_sums | sums | 2 |" in capsys.readouterr().out
