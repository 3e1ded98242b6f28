"""The benchmark's instruments, each on something whose answer is known; and the script as a user runs it."""

from __future__ import annotations

import csv
import importlib.util
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from revtrain.layers import InvertibleBatchNorm2d

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark_memory.py"
spec = importlib.util.spec_from_file_location("benchmark_memory", SCRIPT)
bench = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = bench  # its dataclasses look themselves up
spec.loader.exec_module(bench)

TINY = bench.Options(batch=4, blocks=2, channels=8, hidden=8, width=8, repeats=1)
CASES = bench.all_cases()
STACK = [case for case in CASES.values() if case.group == "stack"]


def test_storages_that_others_resize_are_followed():
    with bench.ResizableStorages() as counter:
        a = torch.zeros(1000)
        a.untyped_storage().resize_(0)
        assert counter.live_bytes == 0
        b = torch.zeros(100)
        a.untyped_storage().resize_(8000)
        assert (counter.live_bytes, counter.peak_bytes) == (8400, 8400)
        del a, b
        assert counter.live_bytes == 0
    assert "followed" not in torch.UntypedStorage.resize_.__qualname__


def test_live_bytes_of_a_known_network():
    """Plain autograd keeps 3 + 10 values a pixel of this one: images, the convolution's output for the square."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 10, 1, bias=False)

        def forward(self, images):
            return self.conv(images).square().sum((2, 3))

    case = bench.Case("net", "stack", "", lambda _: Net(), lambda _: Net())
    half, full = (bench.live_bytes(case, replace(TINY, batch=size), size)[0] for size in (64, 128))
    assert (full - half) / (64 * 32 * 32) == pytest.approx(4 * (3 + 10), rel=0.01)


def test_bn_updates_are_read_from_the_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3), InvertibleBatchNorm2d(3, momentum=0.3))
    images = torch.randn(4, 3, 8, 8)

    def step():
        model(images)
        model[0](images)

    assert bench.bn_updates(model, step) == [1, 2]
    assert bench.bn_updates(model, lambda: None) == [0]
    assert model[0].running_mean.abs().max() < 1, "put back"


def test_convolutions_in_pieces_count_as_one_pass():
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    x = torch.randn(2, 4, 8, 8)
    with bench.ConvolutionCounter() as counter:
        conv(x)
        for k in range(6):
            torch.conv2d(x, conv.weight[k : k + 1], padding=1)
    key = conv.weight.untyped_storage().data_ptr()
    assert counter.forward_calls == 7
    assert counter.work[key] == 2 * (2 * 6 * 8 * 8) * (4 * 9)


@pytest.mark.parametrize(
    ("name", "forwards", "updates"),
    [
        ("store", [1], [1]),
        ("accumulate", [1], [4]),
        ("checkpoint", [1, 2], [2]),  # torch stops early: the last convolution of a block is not repeated
        ("chain", [2], [1]),
        ("chunked", [2], [1]),
        ("chunked_k4", [2], [1]),
        ("memcnn", [3], [3]),
        ("revtorch", [2], [2]),
        ("revlib", [2], [2]),
    ],
)
def test_forward_passes_and_updates_of_the_engines(name, forwards, updates):
    case = CASES[name]
    if case.package:
        with bench.third_party_warnings([]):
            pytest.importorskip(case.package)
    for norm in case.norms:
        options = replace(TINY, norm=norm)
        with bench.third_party_warnings([]):
            assert bench.forward_passes(case, options)[0] == forwards
            model = case.make(options)
            batch = bench.draw_batch(options, options.batch)
            step = partial(bench.run_step, model, *batch, options, case.micro_batches)
            assert bench.bn_updates(model, step) == updates


@pytest.mark.parametrize(
    ("arch", "forwards"),
    [("revnet", [2]), ("irevnet", [2]), ("layerwise", [2]), ("chunked", [2]), ("hybrid", [2, 3])],
)
def test_what_the_backward_pass_computes_again(arch, forwards):
    """Every convolution of a trunk once more; of hybrid (section 4.2) the leading ones of F and G twice more."""
    assert bench.forward_passes(CASES[f"{arch}:invert"], TINY)[0] == forwards


@pytest.mark.parametrize("name", ["store", "checkpoint", "checkpoint_sqrt", "chain", "chunked", "chunked_k4"])
def test_engines_compute_the_gradient_of_store(name):
    for norm in CASES[name].norms:
        options = replace(TINY, norm=norm)
        model, reference = CASES[name].make(options).double(), CASES[name].reference(options).double()
        images, labels = bench.draw_batch(options, options.batch)
        for each in (model, reference):
            bench.run_step(each, images.double(), labels, options)
        assert bench.gradient_errors(model, reference)[-1] < 1e-10


def test_cases_fit_where_the_batch_norm_is():
    names = {norm: {case.name for case in bench.chosen_cases("stack", norm)} for norm in ("input", "hidden")}
    assert "chunked" in names["input"] - names["hidden"]
    assert "chunked_k4" in names["hidden"] - names["input"]


def test_gradient_errors_see_wrong_and_missing_gradients():
    model, reference = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    reference.weight.grad = torch.ones(2, 2)
    assert bench.gradient_errors(model, reference) == [float("inf")]
    model.weight.grad = torch.full((2, 2), 1.01)
    assert bench.gradient_errors(model, reference) == pytest.approx([0.01], rel=1e-3)


def test_accumulation_normalises_micro_batches():
    case = CASES["accumulate"]
    batch = bench.draw_batch(TINY, TINY.batch)

    def error(training: bool) -> float:
        model, reference = case.make(TINY).train(training), case.reference(TINY).train(training)
        bench.run_step(model, *batch, TINY, case.micro_batches)
        bench.run_step(reference, *batch, TINY)
        return bench.gradient_errors(model, reference)[-1]

    assert error(training=True) > 0.01
    assert error(training=False) < 1e-3, "with running statistics, both are one function"


def test_a_row_is_complete_and_invert_beats_store():
    rows = {name: bench.measure_or_explain(CASES[name], TINY) for name in ("store", "chain", "layerwise:invert")}
    for row in rows.values():
        assert row.status == "ok"
        assert not any(getattr(row, column) is None for column in bench.COLUMNS)
    assert rows["chain"].live_peak < rows["store"].live_peak
    assert rows["chain"].live_after_forward < 0.5 * rows["store"].live_after_forward
    # torch's allocator sees at least what lives, and a little scratch
    assert rows["store"].live_peak <= rows["store"].allocator_peak < 2 * rows["store"].live_peak


def test_what_cannot_run_says_why():
    absent = replace(CASES["store"], package="no-such-package-of-ours")
    assert bench.measure_or_explain(absent, TINY).status == "not installed: pip install no-such-package-of-ours"

    def broken(options):
        raise ValueError("does not work here")

    row = bench.measure_or_explain(replace(CASES["store"], make=broken), TINY)
    assert row.status == "failed: ValueError: does not work here"
    assert "does not work here" in bench.markdown_table([row])


def test_the_script_writes_both_tables(tmp_path, capsys):
    settings = ["--batch=4", "--blocks=1", "--channels=4", "--hidden=4", "--repeats=1"]
    assert bench.main(["--cases=store,chain", *settings, "--out", str(tmp_path)]) == 0
    with (tmp_path / "benchmark_memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["store", "chain"]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert rows[0]["torch"] == torch.__version__
    page = (tmp_path / "benchmark_memory.md").read_text()
    assert "| revtrain AdditiveCoupling |" in page
    assert page in capsys.readouterr().out


def test_the_script_refuses_unknown_cases(capsys):
    assert bench.main(["--cases", "chain,chian"]) == 2
    assert "chian is unknown" in capsys.readouterr().err
