"""Images in folders: `data.root` holds `train/CLASS/*` and `test/CLASS/*`.

Which files are taken and how they are read: `imagefiles`. Decoded once, in a thread pool, and cached as uint8. The
cache's name is a hash of the listing (paths, sizes, times of change) and of the image size, so a changed folder is
decoded anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from revtrain.config import DataConfig, ImageSize, StreamSettings, check_parts, key
from revtrain.data import Facts, imagefiles, regions, user_cache
from revtrain.errors import RevtrainError, printable
from revtrain.machine import files

if TYPE_CHECKING:
    import numpy as np

    from revtrain.data import Split
    from revtrain.data.imagefiles import Listing
    from revtrain.data.streamed import StreamedSplit

CACHE_FORMAT = 2  # part of the hash: raise it when decoding changes
WHOLE = (
    "data.root must hold train/CLASS/* and test/CLASS/*: one folder for each class, each with at least one image "
    "(jpg, png, ...)."
)
OTHER = "Give a folder that holds test/CLASS/* or CLASS/*, each class with at least one image (jpg, png, ...)."
MANY_UNUSABLE = 100  # images: then the search for more of them ends

log = logging.getLogger(__name__)


@dataclass
class Settings(StreamSettings):
    """How images are read."""

    stream: bool = key(False, "read images when they are needed, never all into memory; their sizes may then differ")

    @property
    def streams(self) -> bool:
        """Whether images are read when they are needed."""
        return self.stream or self.crop is not None


def facts(cfg: DataConfig[Settings]) -> Facts:
    """What the configuration says: the folder is not looked at."""
    return Facts(cfg.classes, (cfg.own or Settings()).crop or cfg.image_size)


def check(cfg: DataConfig[Settings]) -> str:
    """The folder; a configuration without one is refused."""
    if not cfg.root:
        raise RevtrainError(
            "data=imagefolder was given without data.root.\n"
            "Add data.root=FOLDER, a folder that holds train/CLASS/* and test/CLASS/*."
        )
    check_parts(cfg.own)
    return cfg.root


def load(cfg: DataConfig[Settings]) -> tuple[Split | StreamedSplit, Split | StreamedSplit, list[str]]:
    """Training set, test set and class names of the folder `data.root`.

    Images in memory must all be of one size, unless `data.image_size` is given: each is then resized until it just
    covers it, and the centre is cut out. With `data.stream` or `data.crop` they stay on disk, see `streamed`.

    Raises:
        RevtrainError: missing or empty folders, differing classes, an image that cannot be used.
    """
    own = cfg.own or Settings()
    root = imagefiles.root_folder(check(cfg), "Give a folder that holds train/CLASS/* and test/CLASS/*.")
    train, test = (_listing(root / split, WHOLE, own.streams) for split in ("train", "test"))
    if train.classes != test.classes:
        missing = [name for name in train.classes if name not in test.classes]
        extra = [name for name in test.classes if name not in train.classes]
        raise RevtrainError(
            f"The folders train/ and test/ in {printable(root)} hold different classes.\n"
            f"Only in train/: {_few(missing)}. Only in test/: {_few(extra)}.\n"
            "Give both the same class folders."
        )
    imagefiles.say_left_out(root, (train, test))
    if own.streams:
        return _streamed(cfg.size, own, root, train, own.crops), _streamed(cfg.size, own, root, test, 1), train.classes

    cache = _cache_file(cfg.cache, _fingerprint(root, train, test, cfg.size))
    arrays = _read_cache(cache, (len(train), len(test))) if cache else None
    if arrays is None:
        arrays = _decode_all(root, train, test, cfg.size)
        if cache:
            _write_cache(cache, arrays)
    return _split(arrays[0], train), _split(arrays[1], test), train.classes


def _split(images: np.ndarray, source: Listing) -> Split:
    import torch

    from revtrain.data import Split

    return Split(torch.from_numpy(images), torch.tensor(source.labels))


def _streamed(size: ImageSize | None, own: StreamSettings, root: Path, source: Listing, repeats: int) -> StreamedSplit:
    from revtrain.data import streamed

    items = [streamed.Item(path, label) for path, label in zip(source.images, source.labels, strict=True)]
    return streamed.split(items, own, size, root, repeats)


def _listing(folder: Path, expected: str, slides: bool = False) -> Listing:
    """The images of the class folders in `folder`, at least one of each."""
    if not files.is_folder(folder):
        raise RevtrainError(f"There is no folder {printable(folder)}.\n{expected}")
    listing = imagefiles.list_images(folder, by_class=True, suffixes=regions.suffixes(slides))
    if not listing.images or len(set(listing.labels)) < len(listing.classes):
        raise imagefiles.no_images(listing, expected)
    return listing


def _few(names: list[str]) -> str:
    return ", ".join(names[:5] or ["none"]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---- images of other folders, for a network that is trained already ----------------------------------------


def load_labelled(
    folder: str | Path,
    image_size: int | Sequence[int] | None,
    streaming: StreamSettings | None = None,
    divisor: int = 1,
) -> tuple[Split | StreamedSplit, list[str]]:
    """Images and class names of FOLDER/test/CLASS/*, or of FOLDER/CLASS/* where there is no such folder.

    Every image comes to `image_size` as with `data.image_size`; nothing is cached.

    Args:
        image_size: side in pixels, or [height, width]; None, with `streaming` only: images stay as they are.
        streaming: read the images when they are needed, as the test images of a run with these settings.
        divisor: then, of the sides of whole images.

    Raises:
        RevtrainError: no folder, no images, or one that cannot be used.
    """
    size = None if image_size is None else ImageSize.of(image_size)
    root = files.place(folder, "--data")
    root = root / "test" if files.is_folder(root / "test") else root
    source = _listing(root, OTHER, streaming is not None)
    imagefiles.say_left_out(root, [source])
    if streaming is not None:
        return replace(_streamed(size, streaming, root, source, 1), divisor=divisor), source.classes
    with imagefiles.pillow_quiet() as said, ThreadPoolExecutor() as pool:
        images, errors = _decode(source, size or imagefiles.size_of(source.images[0]), size is not None, pool)
    imagefiles.refuse(errors, root)
    imagefiles.say_remarks(said)
    return _split(images, source), source.classes


def image_files(folder: str | Path, slides: bool = False) -> list[Path]:
    """All image files in a folder and those below it; or the one file that was given.

    Args:
        slides: of microscopes are taken, too.

    Raises:
        RevtrainError: there is no such folder, or no image in it.
    """
    root = files.place(folder, "--images")
    if os.path.isfile(root):
        return [root]
    expected = f"Give a folder with images: {', '.join(imagefiles.SUFFIXES)}."
    if not files.is_folder(root):
        raise RevtrainError(f"{printable(root)} is no folder.\n{expected}")
    listing = imagefiles.list_images(root, by_class=False, suffixes=regions.suffixes(slides))
    if not listing.images:
        raise imagefiles.no_images(listing, expected)
    imagefiles.say_left_out(root, [listing])
    return [Path(path) for path in listing.images]


# ---- decoding ----------------------------------------------------------------------------------------------


def _decode_all(
    root: Path, train: Listing, test: Listing, image_size: ImageSize | None
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 arrays (N, 3, H, W) of both splits."""
    log.info("decoding %d images, once", len(train) + len(test))
    with imagefiles.pillow_quiet() as said, ThreadPoolExecutor() as pool:
        size, resize = (image_size, True) if image_size else (imagefiles.size_of(train.images[0]), False)
        (first, wrong), (second, also_wrong) = (_decode(source, size, resize, pool) for source in (train, test))
    imagefiles.refuse([*wrong, *also_wrong], root)
    imagefiles.say_remarks(said)
    return first, second


def _decode(
    source: Listing, size: ImageSize, resize: bool, pool: ThreadPoolExecutor
) -> tuple[np.ndarray, list[RevtrainError]]:
    """uint8 (N, 3, H, W), and what is wrong with files that cannot be used; their pixels are undefined."""
    import numpy as np

    from revtrain.data import check_room

    check_room(len(source), size, printable(source.root))
    images = np.empty((len(source), 3, *size), np.uint8)

    def decode(index: int) -> RevtrainError | None:
        try:
            images[index] = imagefiles.pixels(source.images[index], size, resize)
        except RevtrainError as error:
            return error
        return None

    errors = []
    for error in pool.map(decode, range(len(source))):
        if error is not None:
            errors.append(error)
            if len(errors) == MANY_UNUSABLE:  # leaving the loop cancels what has not begun
                break
    return images, errors


# ---- cache -------------------------------------------------------------------------------------------------


def _cache_file(folder: str | None, name: str) -> Path | None:
    """Where the decoded images are kept; None: nowhere."""
    if folder:
        return files.place(folder, "data.cache") / f"{name}.npz"
    cache = user_cache()
    if cache is None:
        log.warning("decoded images cannot be cached: there is no home directory; data.cache=FOLDER gives them a place")
        return None
    return cache / "imagefolder" / f"{name}.npz"


def _fingerprint(root: Path, train: Listing, test: Listing, size: ImageSize | None) -> str:
    digest = hashlib.sha256(f"{CACHE_FORMAT} {None if size is None else size.plain}\n".encode())
    for path in (*train.images, *test.images):
        try:
            status = os.stat(path)
            state = f"{status.st_size}\0{status.st_mtime_ns}"
        except OSError:  # reading it will say why
            state = "unreadable"
        digest.update(os.fsencode(os.path.relpath(path, root)) + f"\0{state}\n".encode())
    return digest.hexdigest()[:32]


def _read_cache(cache: Path, counts: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """The cached arrays; None where there are none or the zip's checksums tell of damage."""
    import numpy as np

    try:
        with cache.open("rb") as raw, np.load(raw) as file:
            arrays = file["train"], file["test"]
        for images, count in zip(arrays, counts, strict=True):
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:2] != (count, 3):
                raise ValueError(f"unexpected array {images.dtype} {images.shape}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        state = "cannot be read" if isinstance(error, OSError) and error.errno else "is damaged"
        log.warning("the cache %s %s (%s): decoding anew", cache, state, error)
        return None
    log.info("decoded images read from %s", cache)
    return arrays


def _write_cache(cache: Path, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    """A reader sees a whole cache or none. A failure costs time, not the run."""
    import numpy as np

    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(cache) as file:
            np.savez(file, train=arrays[0], test=arrays[1])
    except OSError as error:
        log.warning("decoded images cannot be cached: %s; data.cache=FOLDER gives them another place",
                    files.refused(error))  # fmt: skip
