"""The scripts run: each on something small, in this process. (scripts/benchmark_memory.py has tests of its own.)"""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from test_docs import misshapen, tables_in

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load(name: str):
    if name.endswith("_figures"):
        pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_the_table_of_memory_agrees_with_itself(tmp_path, capsys):
    words = ["--arch", "chunked", "--batch=32", "--measure-batch=4", "--image-size=16", "--output", str(tmp_path)]
    load("memory_table").main([*words, "width=8", "depth=1", "pooling=[]", "chunk_mib=0.01"])
    with (tmp_path / "memory_table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["backward"] for row in rows] == ["invert", "store"]
    for row in rows:
        assert float(row["predicted B/px"]) == pytest.approx(float(row["analytic B/px"]), rel=0.02)
        assert abs(float(row["difference at 8, %"])) < 2
    assert float(rows[0]["predicted B/px"]) < float(rows[1]["predicted B/px"])
    assert int(rows[0]["batch in 1 GiB"]) > int(rows[1]["batch in 1 GiB"])
    page = (tmp_path / "memory_table.md").read_text()
    assert page in capsys.readouterr().out
    equations = (tmp_path / "memory_table_equations.md").read_text()
    assert "| equation | symbol | chunked, c=8 |" in equations
    assert not any(misshapen(table) for text in (page, equations) for table in tables_in(text))


def test_memory_grows_with_depth_where_it_is_stored(monkeypatch):
    script = load("memory_figures")
    monkeypatch.setattr(script, "DEPTHS", (1, 3))
    monkeypatch.setattr(script, "COLOURS", {"layerwise": "black"})
    rows = script.memory_against_depth(["width=4", "pooling=[]", "chunk_mib=0.01"], image_size=16, batch=16)
    counted = {(row["backward"], row["depth"]): row["counted B/px"] for row in rows}
    assert counted["store", 3] > 1.5 * counted["store", 1]
    assert counted["invert", 3] == pytest.approx(counted["invert", 1], rel=0.02)
    assert script.draw_depth(rows).axes


def test_the_table_of_whole_chains_predicts_what_it_measures():
    script = load("theory_figures")
    cells = script.chain_row(3, 0.2, 1, width=4, batch=8, seed=0).split(" | ")
    measured, white, each = map(float, cells[3:6])
    assert white == pytest.approx(measured, abs=6) and each == pytest.approx(measured, abs=6)
    assert not misshapen([*script.CHAIN_HEADER.splitlines(), script.chain_row(3, 0.2, 1, 4, 8, 0)])
    assert "-1.9 / -14.1 / -54.0" in script.decibels_table()


def test_the_gradient_of_a_whole_training_set_equals_the_sum_of_batches(capsys):
    words = ["--small-batch=8", "data.train_images=24", "data.test_images=10", "width=4", "depth=1", "pooling=[]"]
    load("full_batch").main(words)
    printed = capsys.readouterr().out
    assert "24 images of 32x32 in one batch" in printed
    assert float(printed.split("relative difference ")[1].split(",")[0]) < 1e-4


def test_images_of_figures_10_and_12_are_drawn_at_random():
    images, labels = load("network_figures").images_of(["data=synthetic", "data.train_images=40"], 16)
    assert images.shape == (16, 3, 32, 32) and len(torch.unique(labels)) > 2


def test_figures_11_and_13_keep_the_rows_of_experiments_that_were_not_run_again(tmp_path):
    script = load("network_figures")
    ends = {f"{name}_{when}": 0.9 for when in ("before", "after") for name in ("snr_db", "input_snr_db", "cosine")}
    common = {"variant": "ours", "diverged": False, **ends}
    runs = [
        {**common, "experiment": f"fig13_{key}", key: value, "backward": backward, "seed": seed, "accuracy": 30 + seed}
        for key, value in (("depth", 3), ("slope", 0.2))
        for backward in ("store", "invert")
        for seed in (0, 2)
    ]
    tables = {key: script.over_seeds(runs, f"fig13_{key}", key) for key in ("depth", "slope")}
    script.write(script.draw_accuracy(13, tables), [*tables["depth"], *tables["slope"]], tmp_path, "fig")
    before = {key: script.rows_before(tmp_path / "fig.csv", f"fig13_{key}") for key in ("depth", "slope", "other")}
    assert before["other"] == [] and script.rows_before(tmp_path / "none.csv", "fig13_depth") == []
    del before["other"]
    assert script.table_of(before) == script.table_of(tables)
    row = script.table_of(before).splitlines()[2]
    assert row.startswith("| ours | depth 3 | 2 | 31.00 ± 1.41 | 31.00 ± 1.41 | +0.00 | 0.9 (0.9)")
    script.draw_accuracy(13, before)


def test_what_is_checked_on_a_gpu_is_counted_without_one(tmp_path, monkeypatch, capsys):
    script, output = load("gpu_check"), tmp_path / "deep" / "check.json"
    words = ["--device=cpu", "--archs=chunked", f"--output={output}", "depth=1", "pooling=[]", "width=4"]
    assert script.main([*words, "--parts=operators,gradients,memory,speed,launches,rivals,limit"]) == 0
    found = json.loads(output.read_text())
    parts = {part["name"]: part["rows"] for part in found["parts"]}
    assert found["batch"] == 4 and found["versions"]["torch"] == torch.__version__
    assert len(parts["operators"]) == 10 and all(row["same bits"] for row in parts["operators"])
    assert [row["logits"] for row in parts["gradients"]] == ["same bits", "same bits"]
    for row in parts["memory"]:
        assert row["live MiB"] == pytest.approx(row["planned MiB"], rel=0.1) and "allocated MiB" not in row
    assert all(row["loss is finite"] for row in parts["speed"] if row["mode"] != "store, compiled")
    assert all(row["counted operations"] > 10 and "kernels" not in row for row in parts["launches"])
    assert {"ms a step", "allocated MiB"}.isdisjoint(parts["rivals"][0]) and parts["rivals"][0]["live MiB"] > 0
    assert [(row["status"], row["batch"]) for row in parts["limit"]] == [("completed", 4)]
    printed = capsys.readouterr().out
    assert "Without CUDA" in printed and "rivals: ok" in printed

    def broken(*args):
        raise OSError("no such thing")

    # a part that fails, and a case that fails, leave the others alone
    monkeypatch.setitem(script.PARTS, "operators", broken)
    monkeypatch.setattr(script, "plan_and_step", broken)
    assert script.main([*words, "--parts=operators,memory,gradients"]) == 1
    found = {part["name"]: part for part in json.loads(output.read_text())["parts"]}
    assert found["operators"]["status"] == "failed: OSError: no such thing"
    assert found["memory"]["status"] == "4 of 4 failed" and found["gradients"]["status"] == "ok"
    assert script.main([*words, "--parts=gradients", "--budget=0"]) == 0
    assert "left out: the time is up" in capsys.readouterr().out


def test_a_search_draws_the_front_with_resnet18_in_it_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    script, started = load("search"), []
    start = script.subprocess.Popen

    def noted(command, **how):
        started.append(command)
        return start(command, **how)

    monkeypatch.setattr(script.subprocess, "Popen", noted)
    words = ["--archs=hybrid", "--recipes=paper", "--epochs=1", "--rungs=1", "--runs-at-once=2", f"--out={tmp_path}"]
    words += ["data=synthetic", "data.train_images=32", "data.test_images=10", "batch=16", "device=cpu"]
    words += ["data.train_limit=null", "data.test_limit=null"]
    assert script.main([*words, "--budget=0"]) == 1, "no time, no result"
    assert "Nothing was completed" in capsys.readouterr().out and not started
    assert script.main(words) == 0
    assert len(started) == 2
    lines = (tmp_path / "search.csv").read_text().splitlines()
    assert lines[0].startswith("# command: python scripts/search.py --archs=hybrid")
    rows = {row["arch"]: row for row in csv.DictReader(line for line in lines if not line.startswith("#"))}
    assert rows.keys() == {"resnet18", "hybrid"} and rows["hybrid"]["front"] == "yes"
    assert float(rows["hybrid"]["bytes/px"]) < 0.5 * float(rows["resnet18"]["bytes/px"])
    assert {row["settings"] for row in rows.values()} == {"size=180k recipe=paper"}
    assert (tmp_path / "search.png").stat().st_size > 10_000
    (tmp_path / "search.csv").unlink()
    assert script.main(words) == 0
    assert len(started) == 2 and (tmp_path / "search.csv").read_text().splitlines() == lines, "nothing was left to do"


def test_a_search_keeps_the_better_half_and_resnet18():
    script = load("search")

    def candidate(arch, cost, accuracy):
        found = object.__new__(script.Candidate)
        found.arch, found.bytes_per_pixel, found.accuracies, found.own = arch, cost, {2: [accuracy]}, (arch, "x")
        return found

    far, resnet = candidate("far", 900, 0.5), candidate("resnet18", 4000, 0.1)
    cheap, good, dominated = candidate("cheap", 100, 0.3), candidate("good", 500, 0.6), candidate("worse", 510, 0.55)
    kept = script.better_half([far, dominated, resnet, good, cheap], 2)
    assert kept == [resnet, cheap, good]


@pytest.fixture
def far_apart(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))  # it takes parts of benchmark_memory
    return load("far_apart")


def test_patches_are_the_quarters_of_each_image(far_apart):
    images = torch.arange(2 * 16).view(2, 1, 4, 4)
    parts = far_apart.quarters(images)
    assert parts.shape == (8, 1, 2, 2)
    assert parts[0, 0].tolist() == [[0, 1], [4, 5]] and parts[1, 0].tolist() == [[2, 3], [6, 7]]
    assert parts[6, 0].tolist() == [[24, 25], [28, 29]], "the quarters of an image follow each other"


def test_the_far_apart_task_compares_what_each_way_sees_and_needs(far_apart, tmp_path, capsys):
    words = "arch=chunked width=2 depth=4 expansion=[1] pooling=[channel,channel,batch] chunk_mib=0.01"
    small = ["--stages=32,8,2,0.01/64,4,2,0.01", "--side=64", "--test=4", "--seeds=0", f"--out={tmp_path / 'far.csv'}"]
    far_apart.main([*small, "--network", words, "--repeats=1"])
    lines = [line for line in (tmp_path / "far.csv").read_text().splitlines() if not line.startswith("#")]
    rows = {(row["trained on"], row["backward pass"]): row for row in csv.DictReader(lines)}
    whole = {backward: row for (trained_on, backward), row in rows.items() if trained_on == "whole images"}
    assert len(whole) == 4 and all(row["gradient of"] == "the whole image" for row in whole.values())
    assert all(float(row["difference"]) < 1e-3 for row in whole.values())
    needed = {backward: float(row["bytes/px"]) for backward, row in whole.items()}
    assert needed["inverted"] < needed["checkpoint, each block"] < needed["stored"]
    updates = {backward: row["BN updates"] for backward, row in whole.items()}
    assert updates["inverted"] == updates["stored"] == "1" and updates["checkpoint, each block"] == "2"
    patches = rows["patches", "inverted"]
    assert patches["gradient of"] == "patches" and not patches["difference"]
    assert float(patches["peak, MiB"]) < float(whole["inverted"]["peak, MiB"])
    assert patches["test accuracy, %"] and whole["inverted"]["test accuracy, %"]
    assert "whole images, seed 0, 64 x 64: test" in capsys.readouterr().out
    # without seeds and timed steps everything stays as it was
    far_apart.main([*small, "--network", words, "--repeats=0", "--seeds"])
    again = [line for line in (tmp_path / "far.csv").read_text().splitlines() if not line.startswith("#")]
    assert again == lines


def test_the_patches_of_a_batch_come_from_shuffled_images_with_their_labels(far_apart, monkeypatch):
    data = far_apart.drawn(32, 8, 4, 0)
    seen = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(2))

        def forward(self, images):
            seen.append(images)
            return self.bias.expand(len(images), 2)

    labelled = []
    cross_entropy = far_apart.F.cross_entropy
    monkeypatch.setattr(far_apart.F, "cross_entropy", lambda x, y: (labelled.append(y), cross_entropy(x, y))[1])
    far_apart.train(Model(), data, 2, 0.01, True, seed=0)
    inputs, labels = torch.cat(seen), torch.cat(labelled)
    every = far_apart.quarters(far_apart.normalise(data.train.images, data.mean, data.std))
    where = [int((every - each).abs().flatten(1).sum(1).argmin()) for each in inputs]
    assert sorted(where) == list(range(32)), "each quarter once"
    assert labels.tolist() == data.train.labels[torch.tensor(where) // 4].tolist()
    assert all(len({each // 4 for each in where[start : start + 8]}) > 2 for start in range(0, 32, 8)), "shuffled"


def test_running_statistics_are_settled_as_the_mean_over_training_images(far_apart):
    data, norm = far_apart.drawn(32, 8, 4, 0), torch.nn.BatchNorm2d(3)
    norm.running_mean.fill_(100)
    far_apart.settle_statistics(norm, data, 4, False)
    images = far_apart.normalise(data.train.images, data.mean, data.std)
    torch.testing.assert_close(norm.running_mean, images.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)
    spread = torch.stack([each.transpose(0, 1).flatten(1).var(1) for each in images.split(4)]).mean(0)
    torch.testing.assert_close(norm.running_var, spread)
    assert norm.momentum == 0.1
