"""TensorBoard itself, on loopback: what a person would see of two runs is served over HTTP."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from conftest import TINY, read_result
from PIL import Image

from revtrain import figures
from revtrain.conf import compose

SECONDS = 120  # for a slow machine: far more than it takes
RUNS = ("0-slope-0.1", "1-slope-0.3")


class Server:
    """TensorBoard over a folder, in a process of its own."""

    def __init__(self, folder):
        words = ["--logdir", str(folder), "--host", "127.0.0.1", "--port", "0", "--reload_interval", "1"]
        self.log = folder.parent / "tensorboard.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *words], stdout=log, stderr=log)
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback, whatever the proxy
        found = self.wait_for(lambda: re.search(r"http://127\.0\.0\.1:\d+", self.log.read_text()))
        self.address = found[0]

    def get(self, path, body=None, **query):
        url = f"{self.address}/{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"} if data else {})
        with self.opener.open(request, timeout=30) as answer:
            content = answer.read()
            return json.loads(content) if "json" in answer.headers["Content-Type"] else content

    def wait_for(self, ask):
        """The first answer that is something."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if answer := ask():
                    return answer
            except (urllib.error.URLError, ConnectionError):
                pass
            time.sleep(0.2)
        raise AssertionError(f"no answer in {SECONDS} s: {self.log.read_text()}")

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    from revtrain.training.run import train

    folder = tmp_path_factory.mktemp("sweep") / "runs"
    for name in RUNS:
        train(compose([*TINY, f"slope={name[-3:]}"]), folder / name)
    return folder


@pytest.fixture(scope="module")
def server(runs):
    server = Server(runs)
    try:
        # all runs are there when the last tag of the last epoch is
        server.wait_for(lambda: sorted(server.get("data/runs")) == sorted(RUNS))
        server.wait_for(lambda: all(len(scalars(server, run)) == 2 for run in RUNS))
        yield server
    finally:
        server.stop()


def scalars(server, run, tag="accuracy/test"):
    try:
        return server.get("data/plugin/scalars/scalars", run=run, tag=tag)
    except urllib.error.HTTPError as error:
        error.close()
        return []


def test_the_scalars_of_every_run_are_served(server, runs):
    tags = server.get("data/plugin/scalars/tags")
    assert sorted(tags) == sorted(RUNS)
    for run in RUNS:
        result = read_result(runs / run)
        assert {"accuracy/train", "loss/test", "lr", "memory/bytes_per_pixel", "snr_db/min"} <= tags[run].keys()
        assert sum(tag.startswith("snr_db/trunk/") for tag in tags[run]) == len(result["snr_db"]["layers"])
        points = scalars(server, run)
        assert [step for _, step, _ in points] == [1, 2]
        assert points[-1][2] == pytest.approx(result["test_accuracy"])


def test_the_layout_groups_them(server):
    layout = server.get("data/plugin/custom_scalars/layout")
    charts = {chart["title"]: chart for category in layout["category"] for chart in category["chart"]}
    shown = {"accuracy", "SNR (dB), minimum; 320: exact", "memory (bytes per pixel)", "speed (images/s)"}
    assert shown <= charts.keys()
    (pattern,) = charts["SNR (dB), per layer; 320: exact"]["multiline"]["tag"]
    answer = server.get("data/plugin/custom_scalars/scalars", run=RUNS[0], tag=pattern)
    assert answer["regex_valid"] and len(answer["tag_to_events"]) == 6  # two units of three layers


def test_every_run_is_a_row_of_the_hparams_tab(server, runs):
    columns = [
        {"metric": {"group": "", "tag": tag}} for tag in ("accuracy/test", "snr_db/min", "memory/bytes_per_pixel")
    ]
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    body = {"experimentName": "", "allowedStatuses": statuses, "colParams": columns, "startIndex": 0, "sliceSize": 100}
    rows = server.get("data/plugin/hparams/session_groups", body)["sessionGroups"]
    assert len(rows) == len(RUNS)
    slopes = sorted(row["hparams"]["slope"] for row in rows)
    assert slopes == [0.1, 0.3]
    for row in rows:
        (run,) = (run for run in RUNS if run.endswith(str(row["hparams"]["slope"])))
        result = read_result(runs / run)
        values = {each["name"]["tag"]: each["value"] for each in row["metricValues"]}
        assert values["accuracy/test"] == pytest.approx(result["test_accuracy"])
        assert values["snr_db/min"] == pytest.approx(result["snr_db"]["minimum"], rel=1e-5)
        assert values["memory/bytes_per_pixel"] == pytest.approx(result["bytes_per_pixel"])


@pytest.mark.skipif(not figures.available(), reason="the extra figures is not installed")
def test_the_figures_are_served_as_images(server):
    tags = server.get("data/plugin/images/tags")
    for run in RUNS:
        assert tags[run].keys() == {"snr_db/profile", "memory/timeline"}
        for tag, steps in (("snr_db/profile", [0, 1, 2]), ("memory/timeline", [0])):
            listed = server.get("data/plugin/images/images", run=run, tag=tag, sample=0)
            assert [each["step"] for each in listed] == steps
            picture = server.get(f"data/plugin/images/individualImage?{listed[-1]['query']}")
            with Image.open(io.BytesIO(picture)) as image:
                assert image.format == "PNG" and image.size == (800, 420)
