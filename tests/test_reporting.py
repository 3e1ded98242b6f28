"""revtrain-report: run directories in any state become tables and one page."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from xml.etree import ElementTree

import pytest
from conftest import TINY, read_metrics
from omegaconf import OmegaConf

from revtrain.cli.report import main
from revtrain.conf import compose
from revtrain.config import flat, read
from revtrain.numerics.snr import SNR_CEILING_DB
from revtrain.report.group import group_runs, pareto
from revtrain.report.page import EXACT_DB, STYLE, page
from revtrain.report.svg import BOTTOM, LEFT, RIGHT, TOP, Axis
from revtrain.report.tables import comma_separated, markdown, terminal
from revtrain.runs.read import gather
from revtrain.runs.writer import LINE_KEYS, new_result, write_result

LAYERS = {"trunk/2": 140.0, "trunk/1": 130.0, "trunk/0": 90.0}  # as the backward pass meets them


@functools.cache
def composed(*overrides):
    return flat(read(compose(["data=synthetic", "epochs=3", *overrides])))


def write_run(folder, *overrides, accuracy=0.9, rate=100.0, status="completed", epochs=3, result=True, **values):
    """A run directory as revtrain leaves it; `values` go into result.json."""
    config = composed(*overrides)
    snr = {"minimum": 90.0, "minimum_layer": "trunk/0", "layers": LAYERS} if config["backward"] == "invert" else None
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/config.yaml").write_text(OmegaConf.to_yaml(config))
    lines = [{**dict.fromkeys(LINE_KEYS), "epoch": 0, "step": 0, "snr_db": snr}]
    for epoch in range(1, epochs + 1):
        share = epoch / 3
        lines.append(
            {
                "epoch": epoch, "step": 10 * epoch, "lr": 0.1, "loss_train": 2 - share, "loss_test": 2.1 - share,
                "accuracy_train": 0.8 * share, "accuracy_test": accuracy * share, "train_images": 1000,
                "train_seconds": 1000 / rate, "images_per_second": rate, "snr_db": snr, "peak_vram_mib": None,
            }
        )  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if result:
        measured = {
            "status": status, "params": 5000, "epochs": epochs, "snr_db": snr, "train_seconds": 30.0,
            "test_accuracy": accuracy if epochs else None, "best_test_accuracy": accuracy if epochs else None,
            "images_per_second": rate, "bytes_per_pixel": 270.0, "memory_bytes": {"peak": 3 * 2**20},
            "device": {"name": "cpu", "title": "some CPU"},
        }  # fmt: skip
        write_result(folder, new_result(config, list(overrides)) | measured | values)
    return folder


def groups_of(folder):
    runs, problems = gather([folder])
    assert problems == []
    return group_runs(runs)


@pytest.fixture
def sweep(tmp_path):
    """Two architectures, both ways of going back, two seeds; one run failed and one is under way."""
    folder = tmp_path / "sweep"
    for seed in (0, 1):
        at = f"seed={seed}"
        write_run(
            folder / f"0{seed}", "arch=layerwise", at, accuracy=0.8 + seed / 100, rate=100.0, bytes_per_pixel=270.0
        )
        write_run(folder / f"1{seed}", "arch=layerwise", "backward=store", at, rate=150.0, bytes_per_pixel=2700.0)
        write_run(folder / f"2{seed}", "arch=hybrid", at, accuracy=0.85, bytes_per_pixel=400.0)
    write_run(folder / "30", "arch=hybrid", "depth=9", status="failed", epochs=1, error="out of\nmemory <b>")
    write_run(folder / "40", "arch=hybrid", "depth=12", epochs=2, result=False, accuracy=0.75)
    return folder


# ---- reading -------------------------------------------------------------------------------------


def test_a_real_run_is_read_as_it_was_written(command):
    ran = command(*TINY)
    (run,), problems = gather([ran.dir.parent])
    result, lines = ran.result, read_metrics(ran.dir)
    assert problems == []
    assert (run.status, run.error, run.arch, run.seed) == ("completed", None, "layerwise", 0)
    for name in (
        "params",
        "test_accuracy",
        "best_test_accuracy",
        "train_seconds",
        "images_per_second",
        "bytes_per_pixel",
    ):
        assert getattr(run, name) == result[name] is not None
    assert run.snr_minimum_db == result["snr_db"]["minimum"]
    assert run.snr_db == result["snr_db"]["layers"] and list(run.snr_db) == list(result["snr_db"]["layers"])[::-1]
    assert next(iter(run.snr_db)).startswith("trunk/00")  # the input's side comes first
    assert run.step_peak_mib == result["memory_bytes"]["peak"] / 2**20
    assert run.step_seconds == 16 / result["images_per_second"]
    assert run.device == result["device"]["title"]
    assert [line.loss_test for line in run.history] == [line["loss_test"] for line in lines]
    (ran.dir / "result.json").unlink()  # the same figures, as far as metrics.jsonl has them
    (live,), problems = gather([ran.dir])
    assert problems == [] and live.status == "running or cut off"
    for name in (
        "config", "epochs_done", "test_accuracy", "best_test_accuracy", "images_per_second", "snr_db", "snr_minimum_db",
    ):  # fmt: skip
        assert getattr(live, name) == getattr(run, name), name


def test_a_run_under_way_shows_its_last_epoch(sweep):
    (group,) = [each for each in groups_of(sweep) if each.settings.get("depth") == "12"]
    (run,) = group.runs
    assert run.status == "running or cut off" and run.epochs_done == 2 and run.epochs_planned == 3
    assert run.test_accuracy == pytest.approx(0.5) and run.snr_minimum_layer == "trunk/0"
    assert run.bytes_per_pixel is None
    assert group.progress == "running or cut off, epoch 2 of 3" and not group.completed


def test_a_run_that_has_not_come_to_its_first_line(tmp_path):
    write_run(tmp_path / "run", "arch=hybrid", result=False)
    (tmp_path / "run/metrics.jsonl").unlink()
    (run,), problems = gather([tmp_path])
    assert (run.arch, run.status, run.epochs_done, problems) == ("hybrid", "running or cut off", 0, [])


def test_each_run_is_read_once(sweep):
    runs, problems = gather([sweep, sweep / "00", sweep / "00/result.json", sweep.parent])
    assert len(runs) == 8 and problems == []


def test_of_two_lines_for_one_epoch_the_later_counts(tmp_path):
    folder = write_run(tmp_path / "run", result=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 2, "accuracy_test": 0.123}) + "\n")
    (run,), _ = gather([tmp_path])
    assert [line.epoch for line in run.history] == [0, 1, 2, 3]
    assert run.history[2].accuracy_test == 0.123 and run.test_accuracy == 0.9


DAMAGED = [
    ("result.json", b"", "empty"),
    ("result.json", b'{"status": "completed", "conf', "cut off"),
    ("result.json", b"\0" * 300, "zero bytes"),
    ("result.json", b"\xff\xfe\x00", "UTF-8"),
    ("result.json", b"[1, 2]", "not a result of revtrain"),
    ("result.json", b'{"loss": 1}', "not a result of revtrain"),
    ("result.json", b"[" * 100_000, "nested too deep"),
    ("result.json", b'{"status": "x", "config": ' + b"[" * 60 + b"]" * 60 + b"}", "nested more than"),
    ("metrics.jsonl", b"", "empty"),
    ("metrics.jsonl", b"\n\n", "empty"),
    ("metrics.jsonl", b'{"epoch": 1, "loss_', "line 1: not JSON, or cut off"),
    ("metrics.jsonl", b'{"loss": 1}\n5\n', "line 1: not a line of revtrain: it has no epoch (and 1 more)"),
    ("metrics.jsonl", b'{"epoch": 1.5}\n', "no epoch"),
    ("metrics.jsonl", b'{"epoch": 1e300}\n', "no epoch"),
    ("metrics.jsonl", b'{"epoch": true}\n', "no epoch"),
    (".hydra/config.yaml", b"arch: [", "not YAML"),
    (".hydra/config.yaml", b"arch: &a [x]\nbackward: *a\n", "aliases"),
    (".hydra/config.yaml", b"name: other program\n", "not a configuration of revtrain"),
    (".hydra/config.yaml", b"\xff", "not YAML"),
]


@pytest.mark.parametrize("name, content, reason", DAMAGED, ids=lambda value: str(value)[:30])
def test_what_cannot_be_read_is_named_with_its_reason(tmp_path, capsys, name, content, reason):
    bad = tmp_path / "bad" / name
    bad.parent.mkdir(parents=True)
    bad.write_bytes(content)
    assert main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"{bad}: " in err and reason in err and "No run was read" in err
    write_run(tmp_path / "good")
    assert main([str(tmp_path), "--html", str(tmp_path / "page.html"), "--markdown", str(tmp_path / "page.md")]) == 0
    out = capsys.readouterr().out
    assert f"{bad}: " in out and reason in out and "Could not be read" in out
    assert "Could not be read" in (tmp_path / "page.html").read_text()
    assert "Could not be read" in (tmp_path / "page.md").read_text()


WRONG = [
    ("params", "many", "params is 'many'; expected a number from 0"),
    ("params", True, "params is True"),
    ("test_accuracy", 93.5, "test_accuracy is 93.5; expected a number from 0 to 1"),
    ("test_accuracy", math.nan, "test_accuracy is nan"),
    ("bytes_per_pixel", math.inf, "bytes_per_pixel is inf"),
    ("bytes_per_pixel", 10**400, "bytes_per_pixel is inf"),
    ("images_per_second", -1, "images_per_second is -1"),
    ("snr_db", [1], "snr_db is a list; expected a mapping"),
    ("snr_db", {"minimum": "low"}, "snr_db.minimum is 'low'"),
    ("snr_db", {"minimum": 1, "layers": {"a": None, "b": "x"}}, "snr_db.layers.b is 'x'"),
    ("memory_bytes", 5, "memory_bytes is 5"),
    ("peak_vram_mib", {"allocated": {}}, "peak_vram_mib.allocated is a mapping"),
    ("status", 7, "status is 7; expected text"),
    ("config", "arch=hybrid", "config is 'arch=hybrid'; expected a mapping"),
    ("error", ["a"], "error is a list; expected text"),
]


@pytest.mark.parametrize("key, value, reason", WRONG, ids=lambda value: str(value)[:30])
def test_a_value_of_the_wrong_type_is_left_out_and_named(tmp_path, key, value, reason):
    folder = write_run(tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {key: value}))
    runs, problems = gather([tmp_path])
    assert len(runs) == 1 and [each.path for each in problems] == [folder / "result.json"]
    assert problems[0].reason.startswith(reason)
    assert reason in terminal(group_runs(runs), problems)


def test_files_that_are_no_files(tmp_path, monkeypatch):
    for name in ("folder", "loop", "pipe", "closed", "huge"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder/result.json").mkdir()
    (tmp_path / "loop/result.json").symlink_to("result.json")
    os.mkfifo(tmp_path / "pipe/result.json")  # reading it would wait for ever
    (tmp_path / "closed/result.json").write_text("{}")
    with open(tmp_path / "huge/metrics.jsonl", "wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    whole = Path.read_bytes

    def read_bytes(path):
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    runs, problems = gather([tmp_path, tmp_path / "nowhere", tmp_path / "closed" / "result.json" / "x"])
    reasons = {each.path.relative_to(tmp_path).parts[0]: each.reason for each in problems}
    assert runs == []
    assert reasons["folder"] == reasons["pipe"] == "not a file"
    assert "symbolic links" in reasons["loop"] and reasons["nowhere"] == "no such file or directory"
    assert "1,048,576 MiB" in reasons["huge"]
    assert [each.reason for each in problems if "closed" in each.path.parts] == ["permission denied", "not a directory"]


def test_cut_off_anywhere(tmp_path, capsys):
    """Both files of a run, cut at many lengths: what is whole is read, and nothing raises."""
    folder = write_run(tmp_path / "run", "arch=hybrid")
    for name in ("metrics.jsonl", "result.json"):
        content = (folder / name).read_bytes()
        for length in [*range(0, len(content), 97), len(content) - 1]:
            (folder / name).write_bytes(content[:length])
            (run,), problems = gather([folder])
            lines = content[: length + 1].count(b"\n")  # a line whose end alone is missing is whole
            if name == "metrics.jsonl":
                assert len(run.history) == lines
                assert (problems == []) == (content[length - 1 : length + 1].count(b"\n") > 0)
            else:
                assert (run.status, run.epochs_done) == (
                    ("unknown", 3) if length < len(content) - 1 else ("completed", 3)
                )
        (folder / name).write_bytes(content)


def test_random_damage_never_raises(tmp_path):
    """Values replaced by others in both files; whatever was read must reach every kind of output."""
    rng = random.Random(0)
    write_run(tmp_path / "a", "arch=hybrid", "seed=1")
    write_run(tmp_path / "b", "arch=hybrid", "seed=2", status="failed", error="x")
    originals = {path: path.read_text() for path in tmp_path.rglob("*.json*")}
    values = [
        None, True, 0, -1, 1e308, -1e308, math.nan, 10**30, 5e-324, "", "<script>", "\ud800", "\x1b[31m", "=1", [], {},
        [[1]], {"a": {"<b>": 1}}, {"minimum": 1e300, "layers": {"\ud800": 1, "y": -1e39}}, {"peak": 1e-320},
    ]  # fmt: skip

    def damage(value):
        if not isinstance(value, dict) or not value or rng.random() < 0.1:
            return rng.choice(values)
        key = rng.choice(list(value))
        return {**value, key: damage(value[key])}

    for _ in range(60):
        for path, text in originals.items():
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            for index in rng.sample(range(len(lines)), 1):
                lines[index] = json.dumps(damage(json.loads(lines[index])))
            path.write_text("\n".join(lines))
        runs, problems = gather([tmp_path])
        groups = group_runs(runs)
        check_page(page(groups, problems, [tmp_path]))
        for text in (terminal(groups, problems), markdown(groups, problems), comma_separated(groups)):
            text.encode()
            assert "\x1b" not in text


# ---- grouping ------------------------------------------------------------------------------------


def test_seeds_become_mean_and_standard_deviation(tmp_path):
    accuracies = [0.90, 0.92, 0.97]
    for seed, accuracy in enumerate(accuracies):
        write_run(tmp_path / f"{seed}", f"seed={seed}", f"device=cuda:{seed}", accuracy=accuracy)
    (group,) = groups_of(tmp_path)
    spread = group.spread(lambda run: run.test_accuracy)
    assert spread.n == 3 and spread.mean == pytest.approx(mean(accuracies))
    assert spread.std == pytest.approx(stdev(accuracies))
    assert group.settings == {} and group.status == "completed"
    assert "93.00 ± 3.61" in terminal([group], [])


def test_only_completed_runs_count_and_each_seed_once(tmp_path):
    write_run(tmp_path / "a", "seed=0", accuracy=0.5)
    write_run(tmp_path / "b", "seed=0", accuracy=0.6)
    write_run(tmp_path / "c", "seed=1", accuracy=0.8)
    write_run(tmp_path / "d", "seed=2", accuracy=0.1, status="interrupted", epochs=1)
    for name in "abcd":
        os.utime(tmp_path / name / "metrics.jsonl", (1, 1))
        os.utime(tmp_path / name / ".hydra/config.yaml", (1, 1))
        os.utime(tmp_path / name / "result.json", (3 if name == "a" else 2,) * 2)
    (group,) = groups_of(tmp_path)
    assert [run.path.name for run in group.counted] == ["a", "c"]
    assert group.mean("test_accuracy") == pytest.approx(0.65)
    assert group.status == "3 completed, 1 interrupted" and len(group.runs) == 4


def test_without_a_completed_run_the_furthest_stands_for_all(tmp_path):
    write_run(tmp_path / "a", "seed=0", status="failed", epochs=2, accuracy=0.3)
    write_run(tmp_path / "b", "seed=1", status="failed", epochs=1, accuracy=0.9)
    (group,) = groups_of(tmp_path)
    assert [run.path.name for run in group.counted] == ["a"] and group.progress == "failed, epoch 2 of 3"
    assert "n  accuracy" in terminal([group], []) and re.search(r" 0 +30\.00 ", terminal([group], []))


def test_settings_are_what_tells_configurations_of_an_architecture_apart(tmp_path):
    write_run(tmp_path / "a", "arch=layerwise", "depth=10", "slope=0.05")
    write_run(tmp_path / "b", "arch=layerwise", "depth=4", "slope=0.2")
    write_run(tmp_path / "c", "arch=hybrid")
    groups = groups_of(tmp_path)
    assert [each.label for each in groups] == ["hybrid", "layerwise depth=4 slope=0.2", "layerwise depth=10 slope=0.05"]
    assert [each.number for each in groups] == [1, 2, 3]


def test_runs_of_before_are_read_and_grouped_with_those_of_now(tmp_path):
    """They recorded the keys of all architectures, and not those that came later."""
    write_run(tmp_path / "now", "arch=layerwise", "seed=0")
    folder = write_run(tmp_path / "before", "arch=layerwise", "seed=1")
    result = json.loads((folder / "result.json").read_text())
    result["config"] |= {"expansion": [], "hidden_chunk": 8, "residual_scale": 1.0, "stream": "auto", "norm": "input"}
    del result["config"]["chunk_mib"]
    (folder / "result.json").write_text(json.dumps(result))
    groups = groups_of(tmp_path)
    assert [(each.label, len(each.counted)) for each in groups] == [("layerwise", 2)]
    assert "expansion" not in groups[0].runs[0].config and "expansion" not in groups[0].runs[1].config


def test_an_architecture_that_is_no_longer_there_is_shown_with_a_colour_of_its_own(tmp_path):
    write_run(tmp_path / "known", "arch=hybrid")
    folder = write_run(tmp_path / "gone", "arch=hybrid")
    result = json.loads((folder / "result.json").read_text())
    result["config"]["arch"] = result["arch"] = "axolotl"
    (folder / "result.json").write_text(json.dumps(result))
    gone, known = groups_of(tmp_path)
    assert (gone.arch, known.arch) == ("axolotl", "hybrid") and gone.colour != known.colour
    text = page([gone, known], [], [])
    assert all(f"var(--c{group.colour})" in text for group in (gone, known)) and "axolotl" in text


def test_compute_overhead_is_the_step_time_over_that_of_store(sweep, tmp_path):
    groups = {(each.arch, each.settings.get("backward")): each for each in groups_of(sweep)}
    assert groups["layerwise", "invert"].overhead == pytest.approx(1.5)
    assert groups["layerwise", "store"].overhead == 1
    assert groups["hybrid", None].overhead is None  # nothing to compare with
    write_run(tmp_path / "other/a", "probe.every=0", rate=50.0)
    write_run(tmp_path / "other/b", "backward=store", rate=150.0)
    invert, store = groups_of(tmp_path / "other")
    assert (invert.overhead, store.overhead) == (3.0, 1.0)
    write_run(tmp_path / "gpu/a")
    write_run(tmp_path / "gpu/b", "backward=store", device={"name": "cuda:0", "title": "some GPU"})
    assert [each.overhead for each in groups_of(tmp_path / "gpu")] == [None, 1.0]


def test_runs_on_other_data_are_not_compared(tmp_path):
    write_run(tmp_path / "a", "data.train_images=100")
    write_run(tmp_path / "b", "data.train_images=200")
    groups = groups_of(tmp_path)
    assert [each.task for each in groups] == ["synthetic, train_images 100", "synthetic, train_images 200"]
    assert page(groups, [], []).count('aria-label="test accuracy against bytes per input pixel"') == 2
    assert "train_images 200" in terminal(groups, []) and "synthetic" not in terminal(groups[:1], [])


@pytest.mark.parametrize(
    "points, front",
    [
        ([], []),
        ([(1, 1)], [0]),
        ([(1, 1), (2, 1)], [0]),  # as accurate, but dearer
        ([(1, 1), (1, 2)], [1]),
        ([(1, 1), (1, 1)], [0]),
        ([(3, 5), (1, 1), (2, 4), (2.5, 3), (4, 5)], [1, 2, 0]),
    ],
)
def test_pareto_front(points, front):
    assert pareto(points) == front


# ---- tables --------------------------------------------------------------------------------------


def test_the_terminal_says_what_is_where_and_what_is_missing(sweep, capsys):
    assert main([str(sweep)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split("  ")[0] == "#" and err == ""
    for word in ("architecture", "parameters", "accuracy, %", "bytes/px", "peak, MiB", "overhead"):
        assert word in lines[0]
    assert "VRAM" not in lines[0]  # nothing was measured on a GPU
    assert any(
        re.search(r"layerwise +backward=invert +5,000 +2 +80\.50 ± 0\.71 +270 .* 1\.50x", line) for line in lines
    )
    assert "Not completed: 2 of 8 runs" in out
    assert f"{sweep}/30: failed, epoch 1 of 3: out of memory <b>" in out
    assert f"{sweep}/40: running or cut off, epoch 2 of 3" in out


def test_csv_holds_every_run_unrounded(sweep, tmp_path):
    assert main([str(sweep), "--csv", str(tmp_path / "runs.csv")]) == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "runs.csv").read_text())))
    by_path = {Path(row["path"]).name: row for row in rows}
    assert len(rows) == len(by_path) == 8
    assert (
        by_path["01"]["test_accuracy"] == "0.81" and by_path["01"]["seed"] == "1" and by_path["01"]["overhead"] == "1.5"
    )
    assert by_path["40"]["status"] == "running or cut off" and by_path["40"]["bytes_per_pixel"] == ""
    assert by_path["30"]["error"] == "out of memory <b>" and by_path["30"]["pooling"] == "channel,channel"


def test_csv_cells_are_no_formulas(tmp_path):
    write_run(tmp_path / "run", status="failed", error="=HYPERLINK(1)")
    assert "'=HYPERLINK(1)" in comma_separated(groups_of(tmp_path))


def test_markdown_tables_are_rectangular(sweep, tmp_path):
    write_run(sweep / "a|b", "slope=0.1", status="failed", error="one | two\n<script>")
    assert main([str(sweep), "--markdown", str(tmp_path / "report.md")]) == 0
    text = (tmp_path / "report.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1
    assert "a\\|b" in text and "&lt;script>" in text and "<script" not in text


# ---- the page ------------------------------------------------------------------------------------

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Refuses tags that do not match, and collects what the tests look at."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.attributes = [], [], [], set(), set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(text):
    """The page is well formed, opens without network, and every chart is XML with finite places inside its frame."""
    text.encode()
    shown = Page(text)
    assert not shown.tags & {"script", "img", "link", "iframe", "object", "b"}
    assert not shown.attributes & {"src", "srcset", "onload", "onclick"}
    assert not re.search(r"https?:|@import|url\(", text)
    assert len(shown.ids) == len(set(shown.ids))
    assert {link.removeprefix("#") for link in shown.links} <= set(shown.ids)
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg .*?</svg>", text, re.DOTALL)]
    for circle in (each for svg in drawings if svg.get("role") for each in svg.iter("circle")):
        x, y = float(circle.get("cx")), float(circle.get("cy"))
        assert LEFT - 1 <= x <= RIGHT + 1 and TOP - 1 <= y <= BOTTOM + 1
    return shown


def test_the_page_shows_every_run_and_needs_nothing_else(sweep, tmp_path):
    write_run(sweep / "50", "arch=hybrid", "seed=2", status="interrupted", epochs=1)
    assert main([str(sweep), "--html", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    shown = check_page(text)
    for folder in sweep.iterdir():
        assert f"{folder}</td>" in text
    assert {"configurations", "memory", "snr", "curves", "runs"} <= set(shown.ids)
    assert "unread" not in shown.ids
    assert text.count('aria-label="test accuracy against') == 2  # no GPU: bytes per pixel, and peak of a step
    assert "9 runs of 5 configurations: 6 completed, 1 interrupted, 1 failed, 1 running or cut off" in text
    assert "running or cut off, epoch 2 of 3" in text and "out of memory &lt;b&gt;" in text


def test_the_front_rings_the_configurations_that_nothing_beats(sweep):
    text = page(groups_of(sweep), [], [])
    chart = ElementTree.fromstring(re.search(r"<svg [^>]*against bytes.*?</svg>", text, re.DOTALL)[0])
    marks = [group for group in chart.iter("g") if group.find("circle[@class='mark']") is not None]
    ringed = {group.find("circle/title").text.split(":")[0] for group in marks if len(group.findall("circle")) == 2}
    # layerwise (80.5 % at 270), hybrid (85 % at 400), layerwise that stores (90 % at 2,700)
    assert ringed == {"4. layerwise backward=invert", "5. layerwise backward=store", "1. hybrid depth=6"}
    hollow = [each.find("title").text for each in chart.iter("circle") if each.get("class") == "mark hollow"]
    assert len(hollow) == 1 and "depth=9" in hollow[0] and "failed" in hollow[0]


def test_curves_and_profiles_hold_the_values(sweep):
    text = page(groups_of(sweep), [], [])
    assert "epoch 3: 81, test, seed 1" in text and "epoch 3: 1.1, test, seed 0" in text
    assert "epoch 1: 26.67, train, seed 0" in text
    assert "trunk/0: 90.0 dB, 4. layerwise backward=invert, seed 0" in text
    assert "epoch 0: 90.0 dB, 1. hybrid depth=6, seed 1" in text


def test_exact_and_lost_reconstructions_have_ticks_of_their_own(tmp_path):
    snr = {
        "minimum": -SNR_CEILING_DB,
        "minimum_layer": "c",
        "layers": {"a": SNR_CEILING_DB, "b": 120.0, "c": -SNR_CEILING_DB},
    }
    write_run(tmp_path / "run", snr_db=snr)
    text = page(groups_of(tmp_path), [], [])
    check_page(text)  # 320 dB is on the edge of the chart, not beyond
    profile = re.search(r'<svg [^>]*aria-label="SNR by layer.*?</svg>', text, re.DOTALL)[0]
    assert SNR_CEILING_DB > EXACT_DB
    assert ">exact</text>" in profile and ">lost</text>" in profile and ">120</text>" in profile
    assert ">300</text>" not in profile  # the axis is that of the values between


def test_values_that_no_chart_could_hold_are_left_out_of_it(tmp_path):
    write_run(tmp_path / "a", "slope=0.1", bytes_per_pixel=1e-320)
    folder = write_run(tmp_path / "b", "slope=0.2")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 4, "loss_test": 1e30}) + "\n")
    text = page(groups_of(tmp_path), [], [])
    check_page(text)
    assert "epoch 3: 1.1, test" in text and "epoch 4" not in text
    assert "270 bytes per input pixel" in text and "e-320 bytes per input pixel" not in text


def test_what_comes_from_files_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'\x1b[31m\u202e"
    folder = write_run(tmp_path / "<script>x", status=evil, error=evil, device={"title": evil})
    result = json.loads((folder / "result.json").read_text())
    result["config"].update(arch=evil, seed=evil, slope=[evil], data={"name": evil})
    result["snr_db"] = {"minimum": 1.0, "minimum_layer": evil, "layers": {evil: 1.0, "b": 2.0}}
    (folder / "result.json").write_text(json.dumps(result))
    runs, problems = gather([tmp_path])
    text = page(group_runs(runs), problems, [tmp_path / evil])
    check_page(text)
    assert "\x1b" not in text and "\u202e" not in text and text.count("&lt;script&gt;alert(1)") > 8
    for shown in (terminal(group_runs(runs), problems), comma_separated(group_runs(runs))):
        assert "\x1b" not in shown and "\u202e" not in shown


def test_both_schemes_have_all_colours():
    dark = STYLE[STYLE.index("@media (prefers-color-scheme: dark)") :]
    used = set(re.findall(r"var\((--\w+)\)", STYLE))
    assert len(used) >= 13
    for name in used:
        assert f"{name}: #" in dark[: dark.index("* {")] and f"{name}: #" in STYLE[: STYLE.index("@media")]


def test_a_long_run_makes_no_heavy_page(tmp_path):
    folder = write_run(tmp_path / "run", result=False)
    lines = [json.dumps({"epoch": e, "accuracy_test": 0.5, "loss_test": 1 / (e + 1)}) for e in range(5000)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    text = page(groups_of(tmp_path), [], [])
    check_page(text)
    assert len(text) < 100_000 and "epoch 4999: 50, test" in text


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0],
        [5.0],
        [0.1, 0.9],
        [-3.0, 1e-9],
        [1e-15, 1e14],
        [1.0, 1.0 + 1e-15],
        [99.9, 100.0],
        [-1e14, 1e14],
        [1e-300, 2e-300],
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [Axis.linear, Axis.whole, lambda label, values: Axis.spanning(label, values, 4)])
def test_axes_hold_their_values_between_few_ticks(make, values):
    axis = make("label", values)
    assert 2 <= len(axis.ticks) <= 16
    assert all(0 <= axis.place(value) <= 1 for value in values)
    assert [value for value, _ in axis.ticks] == sorted({value for value, _ in axis.ticks})
    assert all(-1e-9 <= axis.place(value) <= 1 for value, _ in axis.ticks)
    if values:
        slack = 1e-9 * max(1.0, *map(abs, values))
        assert axis.low <= min(values) + slack and axis.high >= max(values) - slack


def test_axes_end_on_round_numbers():
    assert [text for _, text in Axis.linear("", [81.2, 93.7]).ticks] == ["80", "85", "90", "95"]
    assert [text for _, text in Axis.linear("", [99.0], within=(0, 100)).ticks][-1] == "100"
    assert [text for _, text in Axis.whole("", [0, 40]).ticks] == ["0", "10", "20", "30", "40"]
    assert [text for _, text in Axis.spanning("", [270.0, 4492.0], 4).ticks] == [
        "200",
        "500",
        "1,000",
        "2,000",
        "5,000",
    ]


# ---- the command ---------------------------------------------------------------------------------


def test_nothing_read_is_an_error_that_says_what_to_do(tmp_path, capsys):
    assert main([str(tmp_path), "--html", str(tmp_path / "page.html")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and not (tmp_path / "page.html").exists()
    assert f"{tmp_path}: no run directory at or below it" in err and "revtrain-report outputs" in err


def test_the_outputs_folder_is_the_default(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "outputs/run")
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert "hybrid" in capsys.readouterr().out and sorted(os.listdir(tmp_path)) == ["outputs"]


def test_a_file_that_cannot_be_written_is_said(sweep, tmp_path, capsys):
    assert main([str(sweep), "--html", str(tmp_path / "no/page.html"), "--csv", str(tmp_path / "runs.csv")]) == 2
    err = capsys.readouterr().err
    assert "page.html cannot be written: No such file or directory" in err
    assert (tmp_path / "runs.csv").exists()  # the others are written all the same


def test_it_answers_without_torch_and_hydra(sweep):
    code = (
        "import sys; from revtrain.cli.report import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'hydra', 'omegaconf', 'tensorboard', 'matplotlib'} & set(sys.modules);"
        "assert code == 0 and not heavy, heavy"
    )
    command = [sys.executable, "-c", code, str(sweep), "--html", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "layerwise" in done.stdout


def test_a_reader_that_goes_away_is_no_error(sweep):
    code = "import sys; from revtrain.cli.report import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(sweep)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0 and err == ""
