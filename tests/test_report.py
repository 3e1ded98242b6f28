"""metrics.jsonl, result.json, TensorBoard events and the last table, without any training."""

from __future__ import annotations

import json
import math
import re
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from conftest import TINY, read_checkpoint, read_metrics, read_result
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import plugin_data_pb2

from revtrain.conf import compose
from revtrain.errors import RevtrainError
from revtrain.machine.files import LOCK
from revtrain.runs import checkpoint, schema
from revtrain.runs.writer import LINE_KEYS, RunWriter, new_result, write_result

CONFIG = OmegaConf.to_container(compose(["data=synthetic", "depth=4"]), resolve=True)
GRADIENTS = {"minimum_cosine": 0.99, "maximum_relative_error": 0.1, "parameters": {}}
HALVES = {"correlation": 0.1, "effective_rank": 9.0, "channels": 16, "layers": {"trunk/0": 0.1}}
SNR = {"minimum": 90.0, "minimum_layer": "trunk/1", "layers": {"trunk/0": 100.0, "trunk/1": 90.0}}


def line(epoch, **measured):
    return {**dict.fromkeys(LINE_KEYS), "epoch": epoch, **measured}


def trained(epoch, accuracy, **measured):
    values = {
        "step": 10 * epoch, "lr": 0.1, "loss_train": 1.0, "loss_test": 1.1, "accuracy_train": 0.4,
        "accuracy_test": accuracy, "train_images": 100, "train_seconds": 2.0, "images_per_second": 50.0,
    }  # fmt: skip
    return line(epoch, **(values | measured))


@pytest.fixture
def finished(tmp_path):
    writer = RunWriter(tmp_path, CONFIG, ["depth=4"])
    writer.result.update(params=1234, bytes_per_pixel=352.0, memory_bytes={"peak": 2**22}, device={"name": "cuda:0"})
    writer.start([])
    writer.epoch(line(0, step=0, snr_db=SNR, halves=HALVES))
    writer.epoch(trained(1, 0.7, peak_vram_mib={"allocated": 20.0, "reserved": 32.0}))
    writer.epoch(trained(2, 0.6, snr_db=SNR, gradients=GRADIENTS, peak_vram_mib={"allocated": 18.0, "reserved": 40.0}))
    writer.finish("completed")
    return writer


def test_result_sums_up_the_lines(finished, tmp_path):
    result = read_result(tmp_path)
    assert result["status"] == "completed" and result["error"] is None
    assert (result["test_accuracy"], result["best_test_accuracy"], result["epochs"]) == (0.6, 0.7, 2)
    assert (result["train_seconds"], result["images_per_second"]) == (4.0, 50.0)
    assert result["snr_db"] == SNR and result["halves"] == HALVES
    assert result["peak_vram_mib"] == {"allocated": 20.0, "reserved": 40.0}
    assert result["config"] == CONFIG and result["overrides"] == ["depth=4"]
    assert {"python", "torch", "torchvision", "revtrain"} <= result["versions"].keys()
    assert len(read_metrics(tmp_path)) == 3


def test_everything_of_a_run_is_in_one_folder(finished, tmp_path):
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_tensorboard_tags_are_those_of_the_contract(finished, tmp_path):
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {
        "accuracy/train", "accuracy/test", "loss/train", "loss/test", "lr", "snr_db/min", "snr_db/trunk/0",
        "snr_db/trunk/1", "gradients/minimum_cosine", "gradients/maximum_relative_error", "memory/peak_vram_mib",
        "memory/bytes_per_pixel", "memory/live_mib", "speed/images_per_second", "halves/correlation",
        "halves/effective_rank",
    }  # fmt: skip
    assert [(each.step, round(each.value, 6)) for each in events.Scalars("accuracy/test")] == [
        (1, 0.7),
        (2, 0.6),
    ]
    assert [each.step for each in events.Scalars("snr_db/min")] == [0, 2]
    assert [each.value for each in events.Scalars("memory/peak_vram_mib")] == [20.0, 18.0]


def test_hyper_parameters_belong_to_the_run_itself(finished, tmp_path):
    events = EventAccumulator(str(tmp_path)).Reload()
    start = _plugin_data(events, "_hparams_/session_start_info").session_start_info.hparams
    assert start["arch"].string_value == "hybrid" and start["pooling"].string_value == "channel,channel"
    assert start["depth"].number_value == 4 and start["slope"].number_value == 0.2
    metrics = _plugin_data(events, "_hparams_/experiment").experiment.metric_infos
    names = {each.name.tag for each in metrics}
    assert names == {"accuracy/test", "snr_db/min", "memory/bytes_per_pixel", "memory/peak_vram_mib"}
    assert names <= set(events.Tags()["scalars"])
    assert "_hparams_/session_end_info" in events.SummaryMetadata_tags()


def test_without_a_gpu_live_bytes_stand_where_its_peak_would(tmp_path):
    writer = RunWriter(tmp_path, CONFIG, [])
    writer.result["memory_bytes"] = {"peak": 3 * 2**20}
    writer.result["device"] = {"name": "cpu"}
    writer.start([])
    writer.epoch(trained(1, 0.5))
    writer.finish("completed")
    events = EventAccumulator(str(tmp_path)).Reload()
    metrics = _plugin_data(events, "_hparams_/experiment").experiment.metric_infos
    assert [each.name.tag for each in metrics][-1] == "memory/live_mib"
    assert [each.value for each in events.Scalars("memory/live_mib")] == [3.0]


def _plugin_data(events, tag):
    metadata = events.SummaryMetadata(tag)
    return plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)


# EventAccumulator lists the tags of a plugin only; the hparams plugin's are asked for by name
EventAccumulator.SummaryMetadata_tags = lambda self: self.PluginTagToContent("hparams")


def test_the_dashboard_opens_on_a_layout(finished, tmp_path):
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    (layout,) = events.Tensors("custom_scalars__config__")
    shown = Layout.FromString(layout.tensor_proto.string_val[0])
    first, more = shown.category
    assert [chart.multiline.tag[0].rstrip("$") for chart in first.chart] == [
        "accuracy/test",
        "snr_db/min",
        "memory/bytes_per_pixel",
        "memory/peak_vram_mib",
        "speed/images_per_second",
    ]
    patterns = [re.compile(tag) for chart in [*first.chart, *more.chart] for tag in chart.multiline.tag]
    for tag in events.Tags()["scalars"]:  # each curve has its one chart
        assert sum(pattern.match(tag) is not None for pattern in patterns) == 1, tag
    assert len(patterns) == 20


def test_what_is_not_finite_becomes_null(tmp_path):
    writer = RunWriter(tmp_path, CONFIG, [])
    writer.start([])
    writer.epoch(trained(1, 0.5, loss_test=math.inf, loss_train=math.nan))
    writer.finish("completed")
    assert read_metrics(tmp_path)[0]["loss_test"] is None and read_metrics(tmp_path)[0]["loss_train"] is None
    write_result(tmp_path, {"a": [math.nan, {"b": -math.inf}]})
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": [None, {"b": None}]}


def test_without_cuda_the_peak_is_null_and_the_table_says_so(tmp_path):
    writer = RunWriter(tmp_path, CONFIG, [])
    writer.result.update(params=1234, bytes_per_pixel=352.0)
    writer.start([])
    writer.epoch(trained(1, 0.5))
    writer.finish("completed")
    assert read_result(tmp_path)["peak_vram_mib"] is None
    assert read_result(tmp_path)["snr_db"] is None
    assert "no CUDA" in writer.table() and "not measured" in writer.table()


def test_the_table_says_it_all(finished, tmp_path):
    table = finished.table()
    for text in (
        "hybrid, 1,234 parameters, 2 epochs",
        "60.00 % (best 70.00 %)",
        "90.0 dB at trunk/1",
        "352.0 bytes per pixel",
        "20.0 MiB allocated, 40.0 MiB reserved",
        "50 images/s",
        f"tensorboard --logdir {tmp_path}",
    ):
        assert text in table


def test_a_failure_is_written_with_its_error(tmp_path):
    writer = RunWriter(tmp_path, CONFIG, [])
    writer.finish("failed", RevtrainError("two\nlines"))
    assert read_result(tmp_path)["error"] == "two\nlines"
    assert read_result(tmp_path).keys() == new_result(CONFIG, []).keys()
    writer.finish("failed", TypeError("inner"))
    assert read_result(tmp_path)["error"] == "TypeError: inner"


def test_a_continued_run_starts_with_the_earlier_lines(finished, tmp_path):
    folder = tmp_path / "continued"
    folder.mkdir()
    writer = RunWriter(folder, CONFIG, [])
    writer.start(read_metrics(tmp_path))
    writer.epoch(trained(3, 0.8))
    writer.finish("completed")
    assert [each["epoch"] for each in read_metrics(folder)] == [0, 1, 2, 3]
    assert read_metrics(folder)[:3] == read_metrics(tmp_path)
    result = read_result(folder)
    assert (result["best_test_accuracy"], result["train_seconds"]) == (0.8, 6.0)
    events = EventAccumulator(str(folder)).Reload()
    assert [each.step for each in events.Scalars("accuracy/test")] == [1, 2, 3]


# ---- the schema ----------------------------------------------------------------------------------


def differences(value, hint, at=""):
    """Where `value` is not of the type that the schema states."""
    if get_origin(hint) is Literal:
        return [] if value in get_args(hint) else [f"{at}: {value!r}"]
    if isinstance(hint, UnionType):
        return min((differences(value, each, at) for each in get_args(hint)), key=len)
    if is_typeddict(hint):
        if not isinstance(value, dict) or value.keys() != (hints := get_type_hints(hint)).keys():
            return [f"{at}: the keys of {hint.__name__}"]
        return [found for key, each in hints.items() for found in differences(value[key], each, f"{at}.{key}")]
    if get_origin(hint) in (dict, list) and isinstance(value, get_origin(hint)):
        each = get_args(hint)[-1]
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [] if each is Any else [found for key, item in items for found in differences(item, each, f"{at}.{key}")]
    kind = (int, float) if hint is float else get_origin(hint) or hint
    return [] if isinstance(value, kind) and not (kind is int and isinstance(value, bool)) else [f"{at}: {value!r}"]


def test_a_run_leaves_what_the_schema_states(command):
    ran = command(*TINY)
    assert differences(ran.result, schema.Result) == []
    assert list(ran.result) == list(schema.RESULT_KEYS)
    for each in read_metrics(ran.dir):
        assert differences(each, schema.Line) == []
    state = read_checkpoint(ran.dir)
    assert state.pop("format") == checkpoint.FORMAT
    assert differences(state, schema.Checkpoint) == []
    stated = {schema.HYDRA, schema.LOG, LOCK, schema.METRICS, schema.RESULT, schema.CHECKPOINT, schema.PREVIOUS}
    others = {path.name for path in ran.dir.iterdir()} - stated
    assert {str(ran.dir / name) for name in others} == set(map(str, ran.dir.glob(schema.EVENTS)))
    assert (ran.dir / schema.CONFIG).is_file()


def test_a_plan_and_a_refused_run_leave_a_result_of_the_schema(command):
    assert differences(command(*TINY, "plan=true").result, schema.Result) == []
    assert differences(command("depth=0").result, schema.Result) == []
