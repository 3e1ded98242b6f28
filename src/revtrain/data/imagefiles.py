"""Image files: which of a folder are taken, and how one of them becomes pixels.

Training, evaluation and `revtrain-eval --images` all take the same files, and say once what they left out and why:

    taken     files with a suffix of `FORMATS`, in the folder and those below it; links to files; folders that are
              links, each once, and not where they lead to a folder that is listed already or that the link lies in
    left out  names that begin with a dot, folders that a system makes (`SYSTEM_FOLDERS`), other suffixes, files beside
              the class folders

What is taken and cannot be used (damaged, unreadable, a link to nothing, a pipe) is refused by name: a training set
that lost some of its images would be another one.

Only the decoders of `FORMATS` are tried, whatever a file holds: some of Pillow's others run programs.
"""

from __future__ import annotations

import logging
import os
import stat
import textwrap
import threading
import unicodedata
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ExifTags, Image, ImageOps

from revtrain.config import ImageSize
from revtrain.errors import RevtrainError, printable
from revtrain.machine import files

if TYPE_CHECKING:
    import numpy as np

# Pillow's name of a format -> the suffixes that stand for it. A file may hold another format of this list than its
# suffix says. Of several frames the first is taken.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "AVIF": (".avif",),
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
# of macOS, Synology, QNAP, Windows, Linux and Python: thumbnails and litter
SYSTEM_FOLDERS = frozenset(
    ("__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found",
     "__pycache__")
)  # fmt: skip
SMOOTH = Image.Resampling.BILINEAR  # how images are resized
ON_ITS_SIDE = (5, 6, 7, 8)  # of the orientations of EXIF
SHOWN = 3  # names in a message, of each kind
SHOWN_SUFFIXES = 20
SHOWN_LETTERS = 300  # of what a decoder says

HIDDEN = "with a name that begins with a dot"
SYSTEM = "made by the system"
LINK = "linked folders that are listed already, or that the link lies in"
LOOSE = "beside the class folders"
SUFFIX = "with another suffix"

log = logging.getLogger(__name__)
file_log = logging.getLogger("revtrain.errors")  # train.log alone


# ---- which files -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The image files of a folder.

    `images` are paths, in the order of their labels, then of their folders, then of their names; `labels[i]` is the
    place of the class of `images[i]` in `classes`. `left_out` holds, for each reason, the paths that were left out.
    """

    root: Path
    images: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def leave(self, reason: str, path: str) -> None:
        self.left_out.setdefault(reason, []).append(path)


def root_folder(given: str, expected: str) -> Path:
    """The folder `data.root`, absolute; `expected` says what it should hold.

    Raises:
        RevtrainError: there is none.
    """
    root = files.place(given, "data.root")
    root = root if root.is_absolute() else files.working_folder() / root
    if not files.is_folder(root):
        raise RevtrainError(f"data.root={printable(given)} is no folder ({printable(root)}).\n{expected}")
    return root


def list_images(root: Path, by_class: bool, suffixes: tuple[str, ...] = SUFFIXES) -> Listing:
    """The image files at and below `root`.

    Args:
        root: an existing folder.
        suffixes: of image files, in small letters.
        by_class: the folders in it are the classes; otherwise all images are of class 0, which has no name.

    Raises:
        RevtrainError: a folder cannot be read, or the names of two classes would look the same.
    """
    listing = Listing(root)
    walk = _Walk(listing, suffixes)
    if not by_class:
        walk.go_through([(str(root), 0)], whole=True)
        return listing
    folders = [entry for entry in _entries(str(root)) if not walk.leaves_out(entry)]
    for entry in folders[:]:
        if not (_is_folder(entry) or _is_lost(entry)):
            listing.leave(LOOSE if _has_suffix(entry.name, suffixes) else SUFFIX, entry.path)
            folders.remove(entry)
    folders.sort(key=lambda entry: class_name(entry.name))
    listing.classes.extend(class_name(entry.name) for entry in folders)
    twice = [name for name, count in Counter(listing.classes).items() if count > 1]
    if twice:
        raise RevtrainError(
            f"{printable(root)} holds several folders for one class: {', '.join(twice)}.\n"
            "Their names differ in bytes that stand for the same letters. Rename or merge them."
        )
    walk.go_through([(entry.path, label) for label, entry in enumerate(folders)])
    return listing


def class_name(folder: str) -> str:
    """The class that a folder of this name holds: letters that look the same are the same, bytes that are no UTF-8
    become escapes."""
    return unicodedata.normalize("NFC", os.fsencode(folder).decode(errors="backslashreplace"))


class _Walk:
    """Fills a listing. A folder is known by its real path, so that each is listed once."""

    def __init__(self, listing: Listing, suffixes: tuple[str, ...]):
        self.listing, self.suffixes = listing, suffixes
        self.found: list[tuple[int, str, str]] = []  # label, folder, name
        self.listed: set[str] = {os.path.realpath(listing.root)}

    def go_through(self, folders: Sequence[tuple[str, int]], whole: bool = False) -> None:
        """List these folders, each with its label, and what lies below them; links come last, so that none takes the
        place of the folder that it leads to.

        Args:
            whole: they are the folder of the listing itself.
        """
        top = os.path.realpath(self.listing.root)
        links: deque[tuple[str, int]] = deque()
        for path, label in folders:
            if os.path.islink(path) and not whole:
                links.append((path, label))
            else:
                links.extend(self._real_folders(path, label))
        while links:
            path, label = links.popleft()
            if not os.path.exists(path):  # reading it will say so
                self.found.append((label, *os.path.split(path)))
                continue
            target, here = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
            if target in self.listed or any(_holds(target, each) for each in (here, top)):
                self.listing.leave(LINK, path)
            else:
                links.extend(self._real_folders(path, label))
        for label, folder, name in sorted(self.found):
            self.listing.images.append(os.path.join(folder, name))
            self.listing.labels.append(label)

    def _real_folders(self, path: str, label: int) -> list[tuple[str, int]]:
        """List a folder and those below it that are no links; the links to folders among them."""
        links, waiting = [], [(path, os.path.realpath(path))]
        while waiting:
            here, real = waiting.pop()
            self.listed.add(real)
            for entry in _entries(here):
                if self.leaves_out(entry):
                    continue
                if _is_folder(entry):
                    inside = os.path.join(real, entry.name)
                    if entry.is_symlink():
                        links.append((entry.path, label))
                    elif inside not in self.listed:
                        waiting.append((entry.path, inside))
                    else:  # a link led here before
                        self.listing.leave(LINK, entry.path)
                elif _has_suffix(entry.name, self.suffixes) or _is_lost(entry):
                    self.found.append((label, here, entry.name))
                else:
                    self.listing.leave(SUFFIX, entry.path)
        return links

    def leaves_out(self, entry: os.DirEntry[str]) -> bool:
        """Whether the name alone says that it is no image."""
        hidden, system = entry.name.startswith("."), entry.name in SYSTEM_FOLDERS
        if hidden or system:
            self.listing.leave(HIDDEN if hidden else SYSTEM, entry.path)
        return hidden or system


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise RevtrainError(
            f"The folder {printable(folder)} cannot be read: {error.strerror or error}.\n"
            "Give yourself the right to read it, or move it elsewhere."
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_lost(entry: os.DirEntry[str]) -> bool:
    """Whether this is a link to nothing, and so perhaps to a folder of images on a disk that is not there."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(suffixes)


def _holds(folder: str, path: str) -> bool:
    """Whether `path` is `folder`, or lies below it; both are real paths."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


# ---- what is said of them ----------------------------------------------------------------------------------


def summary(root: Path, listings: Sequence[Listing]) -> str | None:
    """What was taken below `root`, what was left out and why; None where nothing was left out."""
    reasons: dict[str, list[str]] = {}
    for listing in listings:
        for reason, paths in listing.left_out.items():
            reasons.setdefault(reason, []).extend(os.path.relpath(path, root) for path in paths)
    if not reasons:
        return None
    lines = [f"{sum(map(len, listings))} images taken of {printable(root)}; left out:"]
    for reason, paths in reasons.items():
        if reason == SUFFIX:
            suffixes = Counter(os.path.splitext(path)[1].lower() or "none" for path in paths)
            what = _few([f"{count} {suffix}" for suffix, count in suffixes.most_common()], SHOWN_SUFFIXES)
        else:
            what = _few(paths)
        lines.append(f"{len(paths)} {reason}: {what}")
    return "\n           ".join(lines)


def say_left_out(root: Path, listings: Sequence[Listing]) -> None:
    """Log the summary, and every name for train.log."""
    text = summary(root, listings)
    if text is None:
        return
    log.warning("images     %s", text)
    for listing in listings:
        for reason, paths in listing.left_out.items():
            for path in paths:
                file_log.info("left out, %s: %s", reason, printable(path))


def refuse(errors: Sequence[RevtrainError], root: Path) -> None:
    """Raise what is wrong with these files as one error, and log all of it for train.log; nothing for none."""
    if len(errors) < 2:
        for error in errors:
            raise error
        return
    texts = [str(error).splitlines() for error in errors]
    for text in texts:
        file_log.info("%s", text[0])
    remedies = dict.fromkeys(text[-1] for text in texts)
    raise RevtrainError(
        f"{len(errors)} images below {printable(root)} cannot be used:\n"
        + "".join(f"  {text[0]}\n" for text in texts[:SHOWN])
        + " ".join([*remedies][:SHOWN])
    )


def no_images(listing: Listing, expected: str) -> RevtrainError:
    """No class folders, or some without an image; `expected` says what the folder should hold."""
    used = set(listing.labels)
    empty = [name for label, name in enumerate(listing.classes) if label not in used]
    what = f"has no image of: {_few(empty)}" if empty else "has no images"
    left = summary(listing.root, [listing])
    why = f" (left out: {'; '.join(line.strip() for line in left.splitlines()[1:])})" if left else ""
    return RevtrainError(f"{printable(listing.root)} {what}{why}.\n{expected}")


def _few(names: Sequence[str], count: int = SHOWN) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(printable(name) for name in names[:count]) + more


# ---- pixels ------------------------------------------------------------------------------------------------

_reading = threading.local()  # .path: the file that this thread decodes


@contextmanager
def pillow_quiet() -> Iterator[dict[str, str]]:
    """Keep Pillow's warnings off the terminal: {path: the first warning about that file}. One that claims to be huge is
    an error (Image.MAX_IMAGE_PIXELS)."""
    said: dict[str, str] = {}

    def note(message: Warning | str, *_: object, **__: object) -> None:
        said.setdefault(getattr(_reading, "path", ""), str(message).splitlines()[0].strip())

    logger = logging.getLogger("PIL")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # what it logs, it raises or warns of, too
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.showwarning = note
            yield said
    finally:
        logger.setLevel(before)


def say_remarks(said: dict[str, str]) -> None:
    """Log what Pillow said of images that could be read nevertheless."""
    if said:
        text = _few([f"{path} ({remark})" for path, remark in sorted(said.items())])
        log.warning("images     Pillow could read %d of them only in part, or with doubts: %s", len(said), text)


def size_of(path: str) -> ImageSize:
    """Height and width of an image, upright.

    Raises:
        RevtrainError: it cannot be opened.
    """
    with opened(path) as image:
        return _upright(image)


def _upright(image: Image.Image) -> ImageSize:
    """The size that it has when it is turned as its camera says; the pixels are not read."""
    lies = False
    if image.format == "TIFF":  # its size is stated turned
        return ImageSize(image.height, image.width)
    # Pillow would decode a PNG, looking for more behind the pixels, and a second time not say what is damaged
    if image.format != "PNG" or not {"exif", "Raw profile type exif"}.isdisjoint(image.info):
        with suppress(Exception):  # damaged; reading it will say so
            lies = image.getexif().get(ExifTags.Base.Orientation) in ON_ITS_SIDE
    return ImageSize(image.width, image.height) if lies else ImageSize(image.height, image.width)


def pixels(path: str, image_size: int | Sequence[int], resize: bool) -> np.ndarray:
    """One image as RGB, upright, (3, H, W) uint8.

    Args:
        image_size: H = W or [H, W].
        resize: let it just cover that and cut out the centre; otherwise another size is refused.

    Raises:
        RevtrainError: it cannot be read, is damaged, has more than 8 bits a channel, or another size.
    """
    import numpy as np

    size = ImageSize.of(image_size)
    with opened(path) as image:
        _refuse_deep(path, image)
        if not resize and (own := _upright(image)) != size:
            raise _wrong_size(path, own.width, own.height, f"the first one is {size.width}x{size.height} pixels")
        image = decoded(path, image)
        if resize:
            image = ImageOps.fit(image, (size.width, size.height), SMOOTH)
        if image.size != (size.width, size.height):  # turned by what stands behind its pixels
            raise _wrong_size(path, *image.size, f"the first one is {size.width}x{size.height} pixels")
        return np.asarray(image).transpose(2, 0, 1)


def opened(path: str) -> Image.Image:
    """An image of which only the header is read.

    Raises:
        RevtrainError: it is none, is damaged, or claims to be huge.
    """
    with reading(path):
        image = Image.open(path, formats=tuple(FORMATS))
        image.filename = ""  # or Pillow maps an uncompressed TIFF as if it had been turned before it was stored
        return image


def decoded(path: str, image: Image.Image) -> Image.Image:
    """All of an opened image as RGB, upright.

    Raises:
        RevtrainError: it is damaged, or has more than 8 bits a channel.
    """
    _refuse_deep(path, image)
    with reading(path):
        image = ImageOps.exif_transpose(image)
        if isinstance(image.info.get("transparency"), bytes):  # a palette's; Pillow would warn
            image = image.convert("RGBA")
        return image.convert("RGB")


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Refuse a pipe or a device, and turn what a decoder raises of this file into a `RevtrainError` that names it."""
    _reading.path = path
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for ever
            raise RevtrainError(f"{printable(path)} is not an image, but a pipe or a device.\nRemove it.")
        yield
    except (RevtrainError, MemoryError):
        raise
    except Exception as error:  # the decoders raise nearly anything on a damaged file
        raise _unusable(path, error) from error


def _refuse_deep(path: str, image: Image.Image) -> None:
    if image.mode[0] in "IF":  # PIL would clip these to 255 without a word
        raise too_deep(path, f"PIL mode {image.mode}")


def too_deep(path: str, what: str) -> RevtrainError:
    return RevtrainError(f"{printable(path)} has more than 8 bits a channel ({what}).\nConvert it to 8 bits first.")


def _unusable(path: str, error: Exception) -> RevtrainError:
    name = printable(path)
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return RevtrainError(
            f"{name} claims to be huge: {error}\nRemove it, or shrink it to {Image.MAX_IMAGE_PIXELS} pixels or fewer."
        )
    if isinstance(error, Image.UnidentifiedImageError):
        return RevtrainError(
            f"{name} is damaged, or holds none of the formats {', '.join(FORMATS)}.\nRepair, convert or remove it."
        )
    if isinstance(error, OSError) and error.errno is not None:
        return RevtrainError(f"{name} cannot be read: {error.strerror}.\nMake it readable, or remove it.")
    what = printable(textwrap.shorten(str(error), SHOWN_LETTERS))
    return RevtrainError(f"{name} is damaged: {what}\nRepair or remove it.")


def _wrong_size(path: str, width: int, height: int, expected: str) -> RevtrainError:
    return RevtrainError(
        f"{printable(path)} is {width}x{height} pixels, but {expected}.\n"
        "Give data.image_size=32 (or another side) to resize and crop all images to one size."
    )
