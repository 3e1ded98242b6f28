"""Images in folders: `data.root` holds `train/CLASS/*` and `test/CLASS/*`.

Decoded once, by PIL in a thread pool, and cached as uint8. The cache's name is a hash of the listing (paths,
sizes, times of change) and of the image size, so a changed folder is decoded anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from revtrain.config import DataConfig
from revtrain.data import Facts, user_cache
from revtrain.errors import RevtrainError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torchvision.datasets import ImageFolder

    from revtrain.data import Split

NEEDS = ("torchvision",)
CACHE_FORMAT = 1  # part of the hash: raise it when decoding changes

log = logging.getLogger(__name__)


def facts(cfg: DataConfig[Any]) -> Facts:
    """What the configuration says: the folder is not looked at."""
    return Facts(cfg.classes, cfg.image_size)


def check(cfg: DataConfig[Any]) -> str:
    """The folder; a configuration without one is refused."""
    if not cfg.root:
        raise RevtrainError(
            "data=imagefolder was given without data.root.\n"
            "Add data.root=FOLDER, a folder that holds train/CLASS/* and test/CLASS/*."
        )
    return cfg.root


def load(cfg: DataConfig[Any]) -> tuple[Split, Split, list[str]]:
    """Training set, test set and class names of the folder `data.root`.

    All images must be square and of one size, unless `data.image_size` is given: then the shorter side is
    resized to it and the centre is cut out.

    Raises:
        RevtrainError: missing or empty folders, differing classes, an image that cannot be used.
    """
    root = Path(check(cfg)).expanduser().absolute()
    if not root.is_dir():
        raise RevtrainError(
            f"data.root={cfg.root} is no folder ({root}).\nGive a folder that holds train/CLASS/* and test/CLASS/*."
        )
    train, test = _listing(root / "train"), _listing(root / "test")
    if train.classes != test.classes:
        missing = [name for name in train.classes if name not in test.classes]
        extra = [name for name in test.classes if name not in train.classes]
        raise RevtrainError(
            f"The folders train/ and test/ in {root} hold different classes.\n"
            f"Only in train/: {_few(missing)}. Only in test/: {_few(extra)}.\n"
            "Give both the same class folders."
        )

    folder = Path(cfg.cache).expanduser() if cfg.cache else user_cache() / "imagefolder"
    cache = folder / f"{_fingerprint(root, train, test, cfg.image_size)}.npz"
    arrays = _read_cache(cache, (len(train), len(test)))
    if arrays is None:
        arrays = _decode_all(train, test, cfg.image_size)
        _write_cache(cache, arrays)
    splits = (_split(images, source) for images, source in zip(arrays, (train, test), strict=True))
    return *splits, train.classes


def _split(images: np.ndarray, source: ImageFolder) -> Split:
    import torch

    from revtrain.data import Split

    return Split(torch.from_numpy(images), torch.tensor(source.targets))


def _listing(folder: Path) -> ImageFolder:
    if not folder.is_dir():
        raise RevtrainError(
            f"There is no folder {folder}.\nThe folder data.root must hold train/CLASS/* and test/CLASS/*."
        )
    try:
        from torchvision.datasets import ImageFolder

        return ImageFolder(folder)
    except FileNotFoundError as error:  # no class folders, or some without an image
        raise RevtrainError(
            f"{folder} is empty, or has an empty class: {str(error).splitlines()[0]}\n"
            "It must hold one folder for each class, each with at least one image (jpg, png, ...)."
        ) from error


def _few(names: list[str]) -> str:
    return ", ".join(names[:5] or ["none"]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---- images of other folders, for a network that is trained already ----------------------------------------


def load_labelled(folder: str | Path, image_size: int) -> tuple[Split, list[str]]:
    """Images and class names of FOLDER/test/CLASS/*, or of FOLDER/CLASS/* where there is no such folder.

    Every image comes to `image_size` pixels a side as with `data.image_size`; nothing is cached.

    Raises:
        RevtrainError: no folder, no images, or one that cannot be used.
    """
    root = Path(folder).expanduser()
    root = root / "test" if (root / "test").is_dir() else root
    if not root.is_dir():
        raise RevtrainError(f"There is no folder {root}.\nGive one that holds test/CLASS/* or CLASS/*.")
    try:
        from torchvision.datasets import ImageFolder

        source = ImageFolder(root)
    except FileNotFoundError as error:
        raise RevtrainError(
            f"{root} has no images, or a class without one: {str(error).splitlines()[0]}\n"
            "Give a folder that holds test/CLASS/* or CLASS/*, each class with at least one image (jpg, png, ...)."
        ) from error
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        images = _decode(source, image_size, True, pool)
    return _split(images, source), source.classes


def image_files(folder: str | Path) -> list[Path]:
    """All image files in a folder and those below it, by name; or the one file that was given.

    Raises:
        RevtrainError: there is no such folder, or no image in it.
    """
    root = Path(folder).expanduser()
    if root.is_file():
        return [root]
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found = sorted(each for each in root.rglob("*") if each.suffix.lower() in IMG_EXTENSIONS and each.is_file())
    if not found:
        what = "holds no images" if root.is_dir() else "is no folder"
        raise RevtrainError(f"{root} {what}.\nGive a folder with images: {', '.join(IMG_EXTENSIONS)}.")
    return found


def read_image(path: str | Path, image_size: int) -> torch.Tensor:
    """One image as RGB, (3, image_size, image_size) uint8: the shorter side resized, the centre cut out.

    Raises:
        RevtrainError: it is not an image, is damaged, or claims to be huge.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        import torch

        return torch.from_numpy(_pixels(str(path), image_size, resize=True).copy())


# ---- decoding ----------------------------------------------------------------------------------------------


def _decode_all(train: ImageFolder, test: ImageFolder, image_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """uint8 arrays (N, 3, H, W) of both splits."""
    log.info("decoding %d images, once", len(train) + len(test))
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        side, resize = (image_size, True) if image_size else (_side(train.samples[0][0]), False)
        return _decode(train, side, resize, pool), _decode(test, side, resize, pool)


def _decode(source: ImageFolder, side: int, resize: bool, pool: ThreadPoolExecutor) -> np.ndarray:
    import numpy as np

    from revtrain.data import check_room

    check_room(len(source), side, source.root)
    images = np.empty((len(source), 3, side, side), np.uint8)

    def decode(index: int) -> None:
        images[index] = _pixels(source.samples[index][0], side, resize)

    for _ in pool.map(decode, range(len(source))):  # the first failure cancels what has not begun
        pass
    return images


def _side(path: str) -> int:
    """Side of the first image, which all others must share."""
    with _opened(path) as image:
        width, height = image.size
    if width != height:
        raise _wrong_size(path, width, height, "images must be square")
    return width


def _pixels(path: str, side: int, resize: bool) -> np.ndarray:
    """One image as RGB, (3, side, side) uint8."""
    import numpy as np

    with _opened(path) as image:
        if image.mode[0] in "IF":  # PIL would clip these to 255 without a word
            raise RevtrainError(
                f"{path} has more than 8 bits a channel (PIL mode {image.mode}).\nConvert it to 8 bits first."
            )
        if not resize and image.size != (side, side):
            raise _wrong_size(path, *image.size, f"the first one is {side}x{side} pixels")
        try:
            image = image.convert("RGB")
        except Exception as error:
            raise _unreadable(path, error) from error
        if resize:
            image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1)


def _opened(path: str) -> Image.Image:
    try:
        return Image.open(path)
    except Exception as error:  # PIL's decoders raise nearly anything on a damaged file
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> RevtrainError:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return RevtrainError(
            f"{path} claims to be huge: {error}\nRemove it, or shrink it to {Image.MAX_IMAGE_PIXELS} pixels or fewer."
        )
    return RevtrainError(f"{path} is not an image, or is damaged: {error}\nRepair or remove it.")


def _wrong_size(path: str, width: int, height: int, expected: str) -> RevtrainError:
    return RevtrainError(
        f"{path} is {width}x{height} pixels, but {expected}.\n"
        "Give data.image_size=32 (or another side) to resize and crop all images to one size."
    )


# ---- cache -------------------------------------------------------------------------------------------------


def _fingerprint(root: Path, train: ImageFolder, test: ImageFolder, image_size: int | None) -> str:
    digest = hashlib.sha256(f"{CACHE_FORMAT} {image_size}\n".encode())
    for path, _ in train.samples + test.samples:
        try:
            status = os.stat(path)
        except OSError as error:  # a link to nothing, or to itself
            raise _unreadable(path, error) from error
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise RevtrainError(f"{path} is not an image, but a pipe or a device.\nRemove it.")
        digest.update(f"{os.path.relpath(path, root)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _read_cache(cache: Path, counts: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """The cached arrays; None where there are none or the zip's checksums tell of damage."""
    import numpy as np

    if not cache.exists():
        return None
    try:
        with cache.open("rb") as raw, np.load(raw) as file:
            arrays = file["train"], file["test"]
        for images, count in zip(arrays, counts, strict=True):
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:2] != (count, 3):
                raise ValueError(f"unexpected array {images.dtype} {images.shape}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("the cache %s is damaged (%s): decoding anew", cache, error)
        return None
    log.info("decoded images read from %s", cache)
    return arrays


def _write_cache(cache: Path, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    """Write aside, then rename: a reader sees a whole cache or none. A failure costs time, not the run."""
    import numpy as np

    part = None
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache.parent, suffix=".part", delete=False) as file:
            part = Path(file.name)
            np.savez(file, train=arrays[0], test=arrays[1])
        part.replace(cache)
    except OSError as error:
        log.warning("decoded images cannot be cached at %s: %s", cache, error)
        if part is not None:
            part.unlink(missing_ok=True)
