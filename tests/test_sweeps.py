"""Sweeps that are started again: what is complete is skipped, what was cut off resumes, what failed is repeated."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import TINY, read_checkpoint, read_metrics, read_result

import revtrain.data
from revtrain.conf import compose, sweep_name
from revtrain.machine.files import write_atomic
from revtrain.report.group import group_runs
from revtrain.runs import sweeps
from revtrain.runs.read import RUNNING, gather

EPOCH = re.compile(r"revtrain\.training\.\w+: epoch +(\d+)/")


def jobs(folder="outputs/sweeps"):
    """The folders of all jobs, by number."""
    found = [each.parent for each in Path(folder).glob("*/*/.hydra")]
    return sorted(found, key=lambda job: (job.parent, int(job.name.split("-")[0])))


def content(job):
    """The files that a run writes, but for train.log, with the time they were written."""
    files = [each for each in job.iterdir() if each.is_file() and each.name not in ("train.log", sweeps.LOCK)]
    return {each.name: (each.stat().st_mtime_ns, each.read_bytes()) for each in files}


def log_of(job):
    return (job / "train.log").read_text()


def logged_epochs(job):
    """The epochs that were trained to their end in this folder, each as often as it was."""
    return [int(number) for number in EPOCH.findall(log_of(job))]


# ---- names ---------------------------------------------------------------------------------------


def test_the_fingerprint_counts_what_decides_a_result():
    def mark(*words, swept=()):
        from omegaconf import OmegaConf

        return sweeps.fingerprint(OmegaConf.to_container(compose(words), resolve=True), swept)

    plain = mark("depth=4")
    assert re.fullmatch("[0-9a-f]{8}", plain)
    for same in ("device=cpu", "data.root=elsewhere", "data.cache=there", "slope=0.20"):
        assert mark("depth=4", same) == plain, same
    for same in ("epsilon_i=0.1", "stream=auto", "data.train_limit=null"):  # defaults
        assert mark("depth=4", same) == plain, same
    for other in (
        "depth=5",
        "resume=a/run",
        "seed=1",
        "epochs=3",
        "plan=true",
        "data.augment.pad=2",
        "data.train_limit=100",
    ):
        assert mark("depth=4", other) != plain, other
    assert mark("device=cpu", swept=["device"]) != mark("device=cuda", swept=["device"])
    folder = ("data=imagefolder", "data.root=a"), ("data=imagefolder", "data.root=b")
    assert mark(*folder[0]) != mark(*folder[1])  # there it is the data itself


def test_a_sweep_is_called_after_its_words():
    name = sweep_name(["depth=4,6", "seed=0,1", "lr=0.1"], None)
    assert re.fullmatch("depth-seed-[0-9a-f]{8}", name)
    assert sweep_name(["lr=0.1", "device=cpu", "seed=0,1", "depth=4,6"], None).split("-")[-1] == name.split("-")[-1]
    for other in (["depth=4,6", "seed=0,1"], ["depth=4,8", "seed=0,1", "lr=0.1"], ["depth=4,6", "lr=0.1"]):
        assert sweep_name(other, None).split("-")[-1] != name.split("-")[-1]
    assert sweep_name(["lr=0.1"], {"depth": "4,6"}) != sweep_name(["lr=0.1"], {"depth": "4,8"})
    assert sweep_name(["lr=0.1"], None).startswith("single-")


# ---- started again -------------------------------------------------------------------------------


def test_a_sweep_skips_what_is_complete_repeats_what_failed_and_resumes_what_was_cut_off(command, monkeypatch):
    load, draw, drawn = revtrain.data.load_data, revtrain.data.draw_augmentation, []
    failing = iter([False, True, False])

    def load_or_fail(*args):
        if next(failing):
            raise TypeError("inner workings")
        return load(*args)

    def draw_or_interrupt(*args):
        drawn.append(1)
        if len(drawn) == 11:  # 6 steps of the first job, 3 of the third's first epoch: in its second
            raise KeyboardInterrupt
        return draw(*args)

    words = ["-m", *TINY, "data.seed=0", "seed=0,1,2"]
    with monkeypatch.context() as patched:
        patched.setattr(revtrain.data, "load_data", load_or_fail)
        patched.setattr(revtrain.data, "draw_augmentation", draw_or_interrupt)
        first = command(*words)
    assert first.code == 130
    complete, failed, cut = jobs()
    assert [read_result(job)["status"] for job in jobs()] == ["completed", "failed", "interrupted"]
    assert read_checkpoint(cut)["epoch"] == 1
    before = content(complete)

    again = command(*words)
    assert again.code == 0, again.err
    assert again.dirs == [] and jobs() == [complete, failed, cut]
    assert content(complete) == before
    assert "repeated; before: failed: TypeError: inner workings" in log_of(failed)
    assert "after epoch 1" in log_of(cut) and logged_epochs(cut) == [1, 2]
    for job in jobs():
        assert read_result(job)["status"] == "completed" and len(list(job.glob("events*"))) == 1
        assert [line["epoch"] for line in read_metrics(job)] == [0, 1, 2]

    kept = [content(job) for job in jobs()]
    assert command(*reversed(words[1:]), "-m").code == 0  # the same words in another order
    assert [content(job) for job in jobs()] == kept


def test_a_resumed_job_ends_as_an_uninterrupted_one(command, monkeypatch):
    draw, drawn = revtrain.data.draw_augmentation, []

    def draw_or_interrupt(*args):
        drawn.append(1)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return draw(*args)

    whole = command(*TINY)
    with monkeypatch.context() as patched:
        patched.setattr(revtrain.data, "draw_augmentation", draw_or_interrupt)
        assert command("-m", *TINY).code == 130
    assert command("-m", *TINY).code == 0
    [job] = jobs()
    one, other = read_checkpoint(whole.dir)["model"], read_checkpoint(job)["model"]
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_result(job)["test_accuracy"] == whole.result["test_accuracy"]


def test_a_run_goes_on_in_its_own_folder(command):
    first = command(*TINY, "epochs=1", "hydra.run.dir=here")
    ran = command(*TINY, "epochs=2", "hydra.run.dir=here", "resume=here")
    assert ran.code == 0, ran.err
    assert [line["epoch"] for line in read_metrics(first.dir)] == [0, 1, 2]
    assert len(list(first.dir.glob("events*"))) == 1


@pytest.mark.parametrize("damage", ["none", "checkpoint", "result"])
def test_a_job_killed_after_its_last_epoch(command, damage):
    assert command("-m", *TINY, "epochs=1").code == 0
    [job] = jobs()
    write_atomic(job / "result.json", json.dumps(read_result(job) | {"status": "running"}).encode())
    if damage == "checkpoint":
        for file in job.glob("*.pt"):
            file.write_bytes(b"PK\x03\x04 cut off")
    if damage == "result":
        (job / "result.json").write_text('{"status": "comp')
    ran = command("-m", *TINY, "epochs=1")
    assert ran.code == 0, ran.err
    assert read_result(job)["status"] == "completed"
    assert [line["epoch"] for line in read_metrics(job)] == [0, 1]
    assert logged_epochs(job) == ([1, 1] if damage == "checkpoint" else [1])  # trained again, or only written


def test_a_wider_sweep_in_the_same_folder_finds_the_jobs_of_the_narrow_one(command):
    words = ["-m", *TINY, "plan=true", "hydra.sweep.dir=wide"]
    assert command(*words, "slope=0.2").code == 0
    [old] = jobs(".")
    before = content(old)
    ran = command(*words, "slope=0.5,0.2")
    assert ran.code == 0 and len(ran.dirs) == 1
    assert content(old) == before and "2 jobs in wide" in ran.out


# ---- who works in a folder -----------------------------------------------------------------------


def test_two_processes_never_take_the_same_job(command, monkeypatch):
    assert command("-m", *TINY, "plan=true").code == 0
    [job] = jobs()
    (job / "result.json").unlink()
    monkeypatch.setattr(sweeps, "PATIENCE_SECONDS", 0)
    waits = []
    with ExitStack() as other:
        assert other.enter_context(sweeps.claim(job / sweeps.LOCK))

        def waiting(line, **kwargs):  # now the other process is done
            waits.append(line)
            write_atomic(job / "result.json", b'{"status": "failed", "error": "of the other"}')
            other.close()

        monkeypatch.setattr(sweeps, "print", waiting, raising=False)
        ran = command("-m", *TINY, "plan=true")
    assert ran.code == 1 and "failed: of the other" in ran.out
    assert "left to the process that runs it" in ran.out and len(waits) == 1
    assert command("-m", *TINY, "plan=true").code == 0


def test_a_lock_ends_with_its_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from revtrain.runs import sweeps;"
        "held = sweeps.claim(Path(sys.argv[1])); held.__enter__(); print(1); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-uc", code, str(tmp_path / "x")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline()
    with sweeps.claim(tmp_path / "x") as free:
        assert not free
    other.kill()
    other.communicate()
    with sweeps.claim(tmp_path / "x") as free:
        assert free


def test_jobs_share_out_several_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with ExitStack() as running:
        first, second, third = (running.enter_context(sweeps.gpu_for_job("auto", tmp_path)) for _ in range(3))
        assert (first, second, third) == ("cuda:0", "cuda:1", "cuda:0")
        for given in ("cpu", "cuda:1", "mps"):
            with sweeps.gpu_for_job(given, tmp_path) as device:
                assert device == given
        with sweeps.gpu_for_job("cuda", tmp_path) as fourth:
            assert fourth == "cuda:1"
    with sweeps.gpu_for_job("auto", tmp_path) as device:
        assert device == "cuda:0"
    assert sweeps.parallel_jobs() == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with sweeps.gpu_for_job("auto", tmp_path) as device:
        assert device == "auto"


def test_a_killed_job_counts_as_cut_off(tmp_path):
    job = sweeps.Job(0, tmp_path, {"arch": "hybrid"}, tmp_path, tmp_path / "ledger")
    job.note_death(-signal.SIGKILL, {"arch": "hybrid"}, [])
    assert sweeps.outcome(read_result(tmp_path)) == "cut off: its process was ended by SIGKILL (out of memory?)"
    assert job.done() is None
    done = json.dumps(read_result(tmp_path) | {"status": "completed"}).encode()
    write_atomic(tmp_path / "result.json", done)
    job.note_death(-signal.SIGKILL, {}, [])
    assert (tmp_path / "result.json").read_bytes() == done


def test_result_json_says_running_while_a_run_runs(command, monkeypatch):
    draw, seen = revtrain.data.draw_augmentation, []

    def look(*args):
        [job] = (path.parent for path in Path().glob("**/metrics.jsonl"))
        runs, problems = gather([job])
        seen.append((read_result(job)["status"], runs[0].status, runs[0].bytes_per_pixel, runs[0].epochs_done))
        assert problems == []
        return draw(*args)

    monkeypatch.setattr(revtrain.data, "draw_augmentation", look)
    ran = command(*TINY)
    assert ran.code == 0
    bytes_per_pixel = ran.result["bytes_per_pixel"]
    assert seen == [("running", RUNNING, bytes_per_pixel, epoch) for epoch in (0, 0, 0, 1, 1, 1)]


# ---- launchers -----------------------------------------------------------------------------------


def test_a_launcher_that_is_not_installed_is_told_in_a_few_lines(tmp_path):
    words = ["-m", "seed=0,1", "hydra/launcher=joblib", "hydra.launcher._target_=hydra_plugins.absent.Launcher"]
    done = subprocess.run([sys.executable, "-m", "revtrain", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert 'pip install -e ".[sweep]"' in done.stderr and len(done.stderr.splitlines()) == 2, done.stderr


# 3 architectures x invert, store x 2 seeds; long enough to be cut off in the middle
TWELVE = [word for word in TINY if not word.startswith(("arch=", "epochs="))] + [
    "epochs=20", "arch=layerwise,hybrid,chunked", "backward=invert,store", "seed=0,1",
]  # fmt: skip
EPOCHS = list(range(21))


class Sweep:
    """A sweep as processes of its own, in a session of its own."""

    def __init__(self, folder, *words):
        self.command = [sys.executable, "-m", "revtrain", "-m", *words]
        self.folder, self.output, self.process = folder, folder / "output.txt", None

    def start(self):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=environment, start_new_session=True,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        return self

    def jobs(self):
        return jobs(self.folder / "outputs/sweeps") if (self.folder / "outputs/sweeps").exists() else []

    def results(self):
        return {job: sweeps.read_result(job) for job in self.jobs()}

    def wait_until(self, condition, seconds=900):
        limit = time.monotonic() + seconds
        while not condition(self.results()):
            assert self.process.poll() is None, self.output.read_text()[-2000:]
            assert time.monotonic() < limit, self.output.read_text()[-2000:]
            time.sleep(0.05)

    def finish(self, seconds=1800):
        code = self.process.wait(seconds)
        return code, self.output.read_text()


def half_way(results):
    """Five are complete, and one is in the middle."""
    complete = [job for job, result in results.items() if result and result["status"] == "completed"]
    running = [job for job, result in results.items() if result and result["status"] == "running"]
    return len(complete) >= 5 and any(len((job / "metrics.jsonl").read_text().splitlines()) > 5 for job in running)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_sweep_of_twelve_jobs_is_killed_half_way_and_started_again(tmp_path, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher", reason="extra [sweep]")
    sweep = Sweep(tmp_path, *TWELVE, f"hydra/launcher={launcher}").start()
    sweep.wait_until(half_way)
    if launcher == "joblib":  # its workers must notice by themselves
        sweep.process.kill()
    else:  # submitted jobs outlive who submitted them; here the machine goes down
        os.killpg(sweep.process.pid, signal.SIGKILL)
    sweep.process.wait()
    time.sleep(2 * sweeps.POLL_SECONDS + 1)
    before = sweep.results()
    complete = [job for job, result in before.items() if result and result["status"] == "completed"]
    cut = [job for job in before if job not in complete and (job / "last.pt").exists()]
    epochs = {job: read_checkpoint(job)["epoch"] for job in cut}
    kept = {job: content(job) for job in complete}
    assert 5 <= len(complete) < 12 and any(epochs.values())

    code, output = sweep.start().finish()
    assert code == 0, output[-3000:]
    assert len(sweep.jobs()) == 12
    for job, result in sweep.results().items():
        assert result["status"] == "completed" and result["epochs"] == EPOCHS[-1]
        assert [line["epoch"] for line in read_metrics(job)] == EPOCHS
        assert len(set(logged_epochs(job))) == len(logged_epochs(job)), f"{job} trained an epoch twice"
    for job in complete:
        assert content(job) == kept[job]
    for job in cut:
        [resumed] = re.findall(r"resume .* after epoch (\d+)", log_of(job))
        assert int(resumed) == epochs[job]
    print(f"\n{launcher}: {len(complete)} complete when killed, resumed after epochs {sorted(epochs.values())}, "
          f"{12 - len(before)} not begun")  # fmt: skip

    runs, problems = gather([tmp_path / "outputs"])
    groups = group_runs(runs)
    assert problems == [] and len(runs) == 12 and all(run.completed for run in runs)
    assert len(groups) == 6 and all(len(group.counted) == 2 for group in groups)
    assert all(group.spread(lambda run: run.test_accuracy).std is not None for group in groups)
    assert all(group.overhead for group in groups)

    code, output = sweep.start().finish()  # nothing is left to do
    assert code == 0 and {job: content(job) for job in complete} == kept


@pytest.mark.slow
def test_a_job_that_is_killed_leaves_the_others_alone(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="extra [sweep]")
    words = [word for word in TINY if not word.startswith("epochs=")] + ["epochs=60", "seed=0,1,2"]
    sweep = Sweep(tmp_path, *words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2").start()
    sweep.wait_until(lambda results: any(result and result["status"] == "running" for result in results.values()))
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()[1:]
    family = {int(pid): int(parent) for pid, parent, *_ in map(str.split, listed)}
    trainers = [int(line.split()[0]) for line in listed if "multiprocessing.spawn" in line]
    mine = [pid for pid in trainers if family.get(family[pid]) == sweep.process.pid]
    os.kill(mine[0], signal.SIGKILL)
    code, output = sweep.finish()
    assert code == 1 and output.count("cut off: its process was ended by SIGKILL") == 1
    assert sorted(result["status"] for result in sweep.results().values()) == ["completed", "completed", "running"]
    code, output = sweep.start().finish()
    assert code == 0
    assert all(len(set(logged_epochs(job))) == len(logged_epochs(job)) for job in sweep.jobs())
