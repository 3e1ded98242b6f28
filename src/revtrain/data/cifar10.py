"""CIFAR-10 through torchvision: 50,000 + 10,000 images of 32x32 pixels, ten classes.

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import logging
import os
import socket
import tempfile
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from revtrain.config import DataConfig, ImageSize, key
from revtrain.data import Facts, user_cache
from revtrain.errors import RevtrainError, printable
from revtrain.machine import files

if TYPE_CHECKING:
    from torch import Tensor
    from torchvision.datasets import CIFAR10

    from revtrain.data import Split

NEEDS = ("torchvision",)
SAME_IMAGES_ANYWHERE = True  # data.root says where the archive lies, not which images it holds
TIMEOUT_SECONDS = 30.0  # without an answer for so long, the host counts as unreachable

log = logging.getLogger(__name__)


@dataclass
class Settings:
    """Where the archive is."""

    url: str | None = key(None, "a mirror of the archive")


def facts(cfg: DataConfig[Settings]) -> Facts:
    """All of them."""
    return Facts(10, cfg.image_size or 32, 50_000)


def load(cfg: DataConfig[Settings]) -> tuple[Split, Split, list[str]]:
    """Training set, test set and class names; downloads the archive (170 MB) if `data.root` has none.

    Raises:
        RevtrainError: the host cannot be reached, the archive is not CIFAR-10's, the folder is unwritable.
    """
    from torchvision.datasets import CIFAR10

    root = _folder(cfg)
    try:
        return _read(root, cfg.size)
    except RuntimeError:  # torchvision's word for absent or damaged batches
        pass
    except OSError as error:
        raise RevtrainError(
            f"CIFAR-10 cannot be read: {files.refused(error)}.\n"
            "Make it readable, or give another folder: data.root=PATH."
        ) from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        _fetch(root / CIFAR10.filename, cfg.own.url or CIFAR10.url)
        _extract(root / CIFAR10.filename)
    except OSError as error:
        raise RevtrainError(
            f"CIFAR-10 cannot be kept in {printable(root)}: {error.strerror or error}.\n"
            "Give a folder that can be written, with room for 400 MB: data.root=PATH."
        ) from error
    return _read(root, cfg.size)


def _folder(cfg: DataConfig[Settings]) -> Path:
    """Where the archive is, or will be: `data.root`, else a folder of the user's cache."""
    if cfg.root:
        root = files.place(cfg.root, "data.root")
        return root if root.is_absolute() else files.working_folder() / root
    cache = user_cache()
    if cache is None:
        raise RevtrainError(
            "data=cifar10 was given without data.root, and there is no home directory to keep the archive in.\n"
            "Give a folder with room for 400 MB: data.root=PATH."
        )
    return cache / "cifar10"


def _read(root: Path, size: ImageSize | None) -> tuple[Split, Split, list[str]]:
    """The extracted batches, their checksums verified by torchvision (RuntimeError where they fail)."""
    from torchvision.datasets import CIFAR10

    train, test = (CIFAR10(root, train=train, download=False) for train in (True, False))
    return _split(train, size), _split(test, size), list(train.classes)


def _split(source: CIFAR10, size: ImageSize | None) -> Split:
    import torch

    from revtrain.data import Split

    images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
    if size is not None and size != images.shape[-2:]:
        images = _resize(images, size)
    return Split(images, torch.tensor(source.targets))


def _resize(images: Tensor, size: ImageSize) -> Tensor:
    import torch
    import torch.nn.functional as F

    return torch.cat([F.interpolate(c, size, mode="bilinear", antialias=True) for c in images.split(4096)])


def _fetch(archive: Path, url: str) -> None:
    """Leave CIFAR-10's archive at `archive`, its checksum verified; what is there is never replaced."""
    from torchvision.datasets.utils import download_url

    if archive.exists():
        _verify(archive, f"The archive {archive}", "Remove it to download anew")
        return
    log.info("downloading CIFAR-10 (170 MB) from %s to %s", url, archive)
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".download-") as scratch:
        part = Path(scratch) / archive.name
        try:
            with _quiet(), _timeout(TIMEOUT_SECONDS):
                download_url(url, scratch, filename=part.name)
        # a wrong address is a ValueError, a circle of redirects a RecursionError
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            if isinstance(error, OSError) and not _is_network(error):
                raise
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            raise RevtrainError(
                f"CIFAR-10 could not be downloaded from {url}: {getattr(error, 'reason', None) or error}.\n"
                f"Place the archive at {archive}, or name a mirror with data.url=URL, or take data=synthetic."
            ) from error
        _verify(part, f"The file at {url}", "Name a true mirror with data.url=URL")
        part.replace(archive)  # whole or not at all


def _is_network(error: OSError) -> bool:
    return isinstance(error, urllib.error.URLError | TimeoutError | ConnectionError | socket.gaierror)


def _verify(path: Path, what: str, remedy: str) -> None:
    from torchvision.datasets import CIFAR10

    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != CIFAR10.tgz_md5:
        raise RevtrainError(
            f"{what} is not CIFAR-10's, or is damaged: {path.stat().st_size} bytes, MD5 {found}.\n"
            f"Expected MD5 {CIFAR10.tgz_md5}. {remedy}, or take data=synthetic."
        )


def _extract(archive: Path) -> None:
    """Unpack beside the archive; the folder appears whole, also when two runs do it at once."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import extract_archive

    folder = archive.parent / CIFAR10.base_folder
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".extract-") as scratch:
        extract_archive(os.fspath(archive), scratch)
        if folder.exists():  # its checksums failed
            folder.rename(Path(scratch) / "damaged")
        (Path(scratch) / CIFAR10.base_folder).rename(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torchvision draws a bar of its own and prints file names."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """torchvision opens its connections without a timeout; a silent host would hang the run."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
