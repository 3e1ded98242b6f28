"""What the operating system refuses becomes a sentence about the right thing; where a run can do without, one line."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import stat
from pathlib import Path

import pytest
from conftest import TINY
from test_faults import image_folder

import revtrain.data
from revtrain.cli.inference import evaluate_main, export_main
from revtrain.cli.report import main as report_main
from revtrain.errors import RevtrainError
from revtrain.machine import files
from revtrain.runs import checkpoint

BASE = (*(word for word in TINY if not word.startswith(("epochs", "depth"))), "depth=1", "epochs=1", "probe.every=0")


def refuse(monkeypatch, module, name, number, match=None, named=True):
    """Let calls of `module.name` whose first argument holds `match` fail as the system lets them fail."""
    before = getattr(module, name)

    def call(*args, **kwargs):
        first = os.fsdecode(args[0]) if args and isinstance(args[0], str | bytes | os.PathLike) else ""
        if match is None or match in first:
            raise OSError(number, os.strerror(number), *([first] if named and first else []))
        return before(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


def assert_said(code, err, *parts):
    assert code == 2 and "Traceback" not in err and "bug" not in err, err
    assert 2 <= len(err.strip().splitlines()) <= 5, err
    assert all(part in err for part in parts), err


def of_images(folder, *words):
    others = [word for word in BASE if not word.startswith(("data", "batch"))]
    return [*others, "data=imagefolder", f"data.root={folder}", f"data.cache={folder}-cache", "batch=4", *words]


# ---- sentences about the right thing -----------------------------------------------------------------------


@pytest.mark.parametrize("closed", ["images", "images/train", "images/train/cat", "images/test/dog"])
def test_an_unreadable_folder_of_images_is_not_taken_for_the_run_directory(command, monkeypatch, tmp_path, closed):
    image_folder(tmp_path / "images")
    before = os.stat, os.scandir
    here = str(tmp_path / closed)

    def closed_stat(path, *args, **kwargs):
        if str(path).startswith(here + "/") and not closed.count("/") > 1:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return before[0](path, *args, **kwargs)

    def closed_scandir(path="."):
        if str(path) == here:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return before[1](path)

    monkeypatch.setattr(os, "stat", closed_stat)
    monkeypatch.setattr(os, "scandir", closed_scandir)
    ran = command(*of_images(tmp_path / "images"))
    assert_said(ran.code, ran.err, here, "Permission denied", "the right to")
    assert "hydra.run.dir" not in ran.err and "run directory" not in ran.err


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.EIO, "system's log"), (errno.EMFILE, "ulimit -n"), (errno.ENOSPC, "Make room"), (errno.EBUSY, "Mend that")],
)  # fmt: skip
@pytest.mark.parametrize("where", ["load_data", "draw_augmentation"])
def test_an_error_without_a_file_name_is_a_sentence(command, monkeypatch, number, advice, where):
    refuse(monkeypatch, revtrain.data, where, number, named=False)
    ran = command(*BASE)
    assert_said(ran.code, ran.err, os.strerror(number), advice)
    assert "Traceback" in (ran.dir / "train.log").read_text()
    assert os.strerror(number) in ran.result["error"]


@pytest.mark.parametrize("key", ["data.root", "data.cache"])
@pytest.mark.parametrize("data", ["imagefolder", "cifar10"])
def test_an_unknown_user_is_said(command, tmp_path, key, data):
    if (data, key) == ("cifar10", "data.cache"):
        pytest.skip("it has no cache")
    words = of_images(image_folder(tmp_path / "images"), f"{key}='~no_such_user/images'", f"data={data}")
    ran = command(*words)
    assert_said(ran.code, ran.err, f"{key}=~no_such_user/images", "home directory of ~no_such_user is not known")


def test_an_unknown_user_of_the_search_path(command, monkeypatch):
    monkeypatch.setenv("REVTRAIN_PATH", "~no_such_user/mine")
    ran = command(*BASE)
    assert_said(ran.code, ran.err, "REVTRAIN_PATH=~no_such_user/mine")


@pytest.mark.parametrize("word", ["--images", "--data"])
def test_an_unknown_user_for_the_evaluation(word, tmp_path, capsys):
    from test_inference import save_network

    save_network(tmp_path, ["arch=layerwise", "width=4", "depth=2", "pooling=[]"])
    assert_said(evaluate_main([str(tmp_path), word, "~no_such_user"]), capsys.readouterr().err, f"{word}=~no_such_user")


@pytest.fixture
def homeless(monkeypatch):
    def unknown(*args):
        raise KeyError("uid not found")

    for key in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_without_a_home_cifar10_asks_for_a_folder(command, homeless):
    ran = command(*(word for word in BASE if not word.startswith("data")), "data=cifar10")
    assert_said(ran.code, ran.err, "no home directory", "data.root=PATH")


def test_without_a_home_images_are_not_cached(command, homeless, tmp_path):
    ran = command(*of_images(image_folder(tmp_path / "images"), "data.cache=null", "data.augment.pad=2"))
    assert ran.code == 0 and ran.out.count("there is no home directory; data.cache=FOLDER") == 1
    ran = command(*of_images(tmp_path / "images", "data.cache='~/cache'"))
    assert_said(ran.code, ran.err, "home directory of ~ is not known")


def test_an_unreadable_archive_is_not_taken_for_an_unwritable_one(command, monkeypatch, tmp_path):
    from torchvision.datasets import CIFAR10

    def closed(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "archive/data_batch_1"))

    monkeypatch.setattr(CIFAR10, "__init__", closed)
    ran = command(*(word for word in BASE if not word.startswith("data")), "data=cifar10", "data.root=archive")
    assert_said(ran.code, ran.err, "CIFAR-10 cannot be read", "archive/data_batch_1: Permission denied")


def test_an_unreadable_checkpoint_of_a_network(tmp_path, monkeypatch, capsys):
    from test_inference import save_network

    save_network(tmp_path / "run", ["arch=layerwise", "width=4", "depth=2", "pooling=[]"])
    refuse(monkeypatch, os, "stat", errno.EACCES, "/run")
    for main in (evaluate_main, lambda words: export_main([*words, "--to", str(tmp_path / "a.pt2")])):
        code = main([str(tmp_path / "run")])
        assert_said(code, capsys.readouterr().err, f"{tmp_path / 'run'}: Permission denied", "the right to")


def test_a_bug_is_not_taken_for_an_error_of_the_system(command, monkeypatch):
    def wrong(*args):
        try:
            os.stat("/no/such/file")
        except OSError:
            raise KeyError("wrong") from None

    def also_wrong(*args):
        try:
            os.stat("/no/such/file")
        except OSError:
            return {}["wrong"]

    for broken in (wrong, also_wrong):
        monkeypatch.setattr(revtrain.data, "load_data", broken)
        ran = command(*BASE)
        assert ran.code == 1 and "revtrain has a bug: KeyError" in ran.err


@pytest.mark.parametrize("words", [["hydra.run.dir=file/run"], ["hydra.sweep.dir=file/sweep", "seed=0,1", "-m"]])
def test_a_run_directory_that_cannot_be_made_is_named(command, tmp_path, words):
    (tmp_path / "file").touch()
    ran = command(*reversed(words), *BASE)
    assert_said(ran.code, ran.err, "The run directory cannot be written: file/", "Not a directory")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EIO])
def test_a_report_that_cannot_be_read_or_written(monkeypatch, tmp_path, capsys, number):
    refuse(monkeypatch, os, "walk", number, named=False)
    (tmp_path / "runs").mkdir()
    assert_said(report_main([str(tmp_path / "runs")]), capsys.readouterr().err, os.strerror(number))


# ---- what can be done without ------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """Nothing was said before."""
    monkeypatch.setattr(files, "_said", set())


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_without_fsync_files_are_written_with_one_remark(fresh, monkeypatch, tmp_path, caplog, number):
    refuse(monkeypatch, os, "fsync", number)
    for _ in range(2):
        files.write_atomic(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1" and caplog.text.count("cannot sync") == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_at_fsync_is_not_passed_over(fresh, monkeypatch, tmp_path, number):
    (tmp_path / "a").write_bytes(b"old")
    refuse(monkeypatch, os, "fsync", number, named=False)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        files.write_atomic(tmp_path / "a", b"new")
    assert caught.value.filename == str(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["chmod", "fchmod", "link"])
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_without_rights_and_links_files_are_written(monkeypatch, tmp_path, name, number):
    refuse(monkeypatch, os, name, number)
    for content in (b"1", b"2"):
        files.write_atomic(tmp_path / "a", content, keep=tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == b"2" and (tmp_path / "b").read_bytes() == b"1"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL])
def test_without_locks_a_folder_is_used_with_one_remark(fresh, monkeypatch, tmp_path, caplog, recwarn, number):
    refuse(monkeypatch, fcntl, "flock", number)
    for name in ("a", "b"):
        with files.claim(tmp_path / name) as mine:
            assert mine
    assert caplog.text.count("start no two runs in one folder") == 1 and not recwarn.list


def test_a_lock_that_another_holds_is_still_respected(fresh, tmp_path, caplog):
    with files.claim(tmp_path / "a") as mine, files.claim(tmp_path / "a") as again:
        assert mine and not again
    assert not caplog.text


@pytest.mark.parametrize("form", ["csv", "model"])
def test_a_pipe_is_written_to_and_not_replaced(tmp_path, form):
    """As is /dev/null, which a file in its place would spoil for the whole machine."""
    from test_inference import save_network

    save_network(tmp_path / "run", ["arch=layerwise", "width=4", "depth=2", "pooling=[]"])
    image_folder(tmp_path / "images")
    pipe = tmp_path / ("a.csv" if form == "csv" else "a.safetensors")
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    if form == "csv":
        assert evaluate_main([str(tmp_path / "run"), "--images", str(tmp_path / "images"), "--csv", str(pipe)]) == 0
        assert os.read(reading, 100).startswith(b"file,rank,class")
    else:
        pytest.importorskip("safetensors", reason="the extra export is not installed")
        assert export_main([str(tmp_path / "run"), "--to", str(pipe)]) == 0
        assert b"__metadata__" in os.read(reading, 100)
    os.close(reading)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_file_behind_a_link_is_written(tmp_path):
    (tmp_path / "link").symlink_to("file")
    files.write_result_file(tmp_path / "link", b"1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"1"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_files_take_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        for _ in range(2):
            checkpoint.save(tmp_path / "last.pt", {})
        with files.claim(tmp_path / ".lock"):
            pass
    finally:
        os.umask(before)
    for name in ("last.pt", "previous.pt"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
    assert not stat.S_IMODE((tmp_path / ".lock").stat().st_mode) & umask


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("call", ["mkdir", "open", "replace"])
def test_a_cache_that_cannot_be_written_costs_one_line(command, monkeypatch, tmp_path, call, number):
    images = image_folder(tmp_path / "images")
    refuse(monkeypatch, os, call, number, match="images-cache")
    ran = command(*of_images(images, "data.augment.pad=2"))
    assert ran.code == 0, ran.err
    assert ran.out.count("decoded images cannot be cached") == 1 and "data.cache=FOLDER" in ran.out
    assert not list(Path(f"{images}-cache").glob("*")) if Path(f"{images}-cache").exists() else True


def test_a_cache_that_cannot_be_read_costs_one_line(tmp_path, caplog, monkeypatch):
    from revtrain.config import DataConfig

    images = image_folder(tmp_path / "images")
    cfg = DataConfig(name="imagefolder", root=str(images), cache=str(tmp_path / "cache"))
    first = revtrain.data.load_data(cfg)
    open_ = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *a, **k: _denied(path) if path.suffix == ".npz" else open_(path, *a, **k)
    )
    assert revtrain.data.load_data(cfg).train.images.equal(first.train.images)
    assert caplog.text.count("cannot be read (") == 1


def _denied(path):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_a_folder_that_cannot_be_seen_is_no_missing_one(monkeypatch, tmp_path):
    refuse(monkeypatch, os, "stat", errno.EACCES, str(tmp_path))
    with pytest.raises(RevtrainError, match=r"Permission denied.\nGive yourself the right"):
        files.is_folder(tmp_path)
    monkeypatch.undo()
    assert files.is_folder(tmp_path) and not files.is_folder(tmp_path / "absent")
