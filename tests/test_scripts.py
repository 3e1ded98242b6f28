"""The scripts run: each on something small, in this process. (scripts/benchmark_memory.py has tests of its own.)"""

from __future__ import annotations

import csv
import importlib.util
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
