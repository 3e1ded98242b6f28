"""Regions of image files: a part of an image becomes pixels, and no more of the file is decoded than must be.

    slides of microscopes (`SLIDE_SUFFIXES`)             OpenSlide   the region, at a level of the pyramid
    TIFF; PNG and JPEG beyond Image.MAX_IMAGE_PIXELS     libvips     tiles that the region touches, or the rows down to
                                                                     its last one, of which few are kept at a time
    all others, and TIFF without libvips                 Pillow      the whole image

The pixels are those of Pillow, whoever decodes. Functions may be called from several threads at once.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from revtrain.config import ImageSize
from revtrain.data import imagefiles
from revtrain.errors import RevtrainError, printable

if TYPE_CHECKING:
    import numpy as np

SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif")
# What a file begins with -> Pillow's reader of its header, which unlike Image.open takes any number of pixels, and the
# loader of libvips. It is named here, not found by libvips: some of the others run programs. That of WebP decodes all.
FORMATS: dict[bytes, tuple[Any, str]] = {
    b"\x89PNG": (PngImagePlugin.PngImageFile, "pngload"),
    b"\xff\xd8\xff": (JpegImagePlugin.JpegImageFile, "jpegload"),
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), (TiffImagePlugin.TiffImageFile, "tiffload")),
}
TIFF_COLOURS = (0, 1, 2, 3, 5)  # photometric interpretations: grey, RGB, palette, CMYK
YCBCR, JPEG = 6, 7  # libvips turns YCbCr into RGB where the compression is JPEG alone
MODES = {"b-w": "L", "srgb": "RGB", "cmyk": "CMYK"}  # libvips' name of the colours -> Pillow's; alpha follows them
ROWS_REVERSED, COLUMNS_REVERSED = (3, 4, 6, 7), (2, 3, 7, 8)  # of the orientations of EXIF: as they are stored

logging.getLogger("pyvips").setLevel(logging.ERROR)  # what goes wrong is raised, too


def suffixes(slides: bool) -> tuple[str, ...]:
    """Of image files, in small letters; those of slides among them or not."""
    return imagefiles.SUFFIXES + (SLIDE_SUFFIXES if slides else ())


def is_slide(path: str) -> bool:
    """Whether the suffix is one of OpenSlide's."""
    return path.lower().endswith(SLIDE_SUFFIXES)


def size_of(path: str, level: int = 0) -> ImageSize:
    """Height and width of an image, upright; no pixels are decoded.

    Args:
        level: of the pyramid of a slide; 0 is the largest.

    Raises:
        RevtrainError: the file cannot be used, is too large without libvips, or has no such level.
    """
    if is_slide(path):
        with _slide(path, level) as slide:
            width, height = slide.level_dimensions[level]
        return ImageSize(height, width)
    _refuse_level(path, level)
    stored = _by_vips(path)
    return imagefiles.size_of(path) if stored is None else _upright(stored)


def region(path: str, top: int, left: int, size: ImageSize, level: int = 0) -> np.ndarray:
    """A part of the upright image as RGB, (3, h, w) uint8.

    Args:
        top, left: its first row and column, in pixels of the level.
        size: h and w; the part lies within the image.
        level: of the pyramid of a slide; 0 is the largest.

    Raises:
        RevtrainError: the file cannot be used, is damaged there, has more than 8 bits a channel, is too large without
            libvips, or has no such level.
        ValueError: the part does not lie within the image.
    """
    import numpy as np

    if is_slide(path):
        image = _of_slide(path, top, left, size, level)
    else:
        _refuse_level(path, level)
        stored = _by_vips(path)
        image = _of_whole(path, top, left, size) if stored is None else _of_stored(path, stored, top, left, size)
    return np.asarray(image).transpose(2, 0, 1).copy()


def _refuse_outside(top: int, left: int, size: ImageSize, whole: ImageSize) -> None:
    inside = 0 <= top <= whole.height - size.height and 0 <= left <= whole.width - size.width
    if not (inside and min(size) > 0):
        raise ValueError(f"no part of an image of {whole} pixels: {size} from row {top}, column {left} on")


def _refuse_level(path: str, level: int) -> None:
    if level:
        raise RevtrainError(
            f"Level {level} of {printable(path)} was asked for, but only slides have levels "
            f"({', '.join(SLIDE_SUFFIXES)}).\nGive level 0."
        )


# ---- Pillow ------------------------------------------------------------------------------------------------


def _of_whole(path: str, top: int, left: int, size: ImageSize) -> Image.Image:
    stated = imagefiles.size_of(path)
    with imagefiles.opened(path) as image:
        image = imagefiles.decoded(path, image)
    if image.size != (stated.width, stated.height):
        raise RevtrainError(
            f"{printable(path)} says how to turn it only behind its pixels, where its size is known already.\n"
            "Save it upright."
        )
    _refuse_outside(top, left, size, stated)
    return image.crop((left, top, left + size.width, top + size.height))


# ---- libvips -----------------------------------------------------------------------------------------------


def _by_vips(path: str) -> Any | None:
    """The image as libvips opens it, as it is stored and with no pixels decoded; None: Pillow is to read it."""
    with imagefiles.reading(path):
        with open(path, "rb") as file:
            start = file.read(4)
        kind = next((FORMATS[magic] for magic in FORMATS if start.startswith(magic)), None)
        if kind is None:
            return None
        reader, loader = kind
        with reader(path) as header:
            limit = Image.MAX_IMAGE_PIXELS
            huge = limit is not None and header.width * header.height > limit
            tiff = loader == "tiffload"
            known = not tiff or _has_known_colours(path, header)
    vips = _vips() if huge or tiff else None
    if vips is None or not known:
        if huge:
            raise RevtrainError(
                f"{printable(path)} is too large to decode whole: {header.width}x{header.height} pixels, of {limit}.\n"
                + ("Convert it to RGB." if vips else 'pip install "revtrain[large-images]" lets it be read by regions.')
            )
        return None
    with imagefiles.reading(path):
        # below "warning", libvips fills a damaged tile of a TIFF with black
        stored = getattr(vips.Image, loader)(
            os.fsencode(path), access="sequential", fail_on="warning" if tiff else "error"
        )
    if stored.format != "uchar":
        raise imagefiles.too_deep(path, stored.format)
    return stored


def _vips() -> Any | None:
    """The module, where it is installed."""
    try:
        import pyvips
    except (ImportError, OSError):  # OSError: without its library
        return None
    pyvips.cache_set_max(0)  # it would keep files open, and not see that one was changed
    return pyvips


def _has_known_colours(path: str, header: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether libvips reads the colours of this TIFF as Pillow does."""
    bits = max(header.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    if bits > 8:  # Pillow would take the upper 8 of RGB
        raise imagefiles.too_deep(path, f"{bits} bits")
    colours = header.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0)
    return colours in TIFF_COLOURS or (colours == YCBCR and header.tag_v2.get(TiffImagePlugin.COMPRESSION) == JPEG)


def _orientation(stored: Any) -> int:
    return stored.get("orientation") if stored.get_typeof("orientation") else 1


def _upright(stored: Any) -> ImageSize:
    turned = _orientation(stored) in imagefiles.ON_ITS_SIDE
    return ImageSize(stored.width, stored.height) if turned else ImageSize(stored.height, stored.width)


def _of_stored(path: str, stored: Any, top: int, left: int, size: ImageSize) -> Image.Image:
    """The part is cut out as it is stored, and then turned: turning the whole would decode all of it."""
    _refuse_outside(top, left, size, _upright(stored))
    height, width = size
    orientation, mode = _orientation(stored), MODES[stored.interpretation]
    if orientation in imagefiles.ON_ITS_SIDE:
        top, left, height, width = left, top, width, height
    if orientation in ROWS_REVERSED:
        top = stored.height - top - height
    if orientation in COLUMNS_REVERSED:
        left = stored.width - left - width
    with imagefiles.reading(path):
        part = stored.crop(left, top, width, height).extract_band(0, n=len(mode)).copy_memory().autorot()
        return Image.frombytes(mode, (part.width, part.height), part.write_to_memory()).convert("RGB")


# ---- OpenSlide ---------------------------------------------------------------------------------------------


def _slide(path: str, level: int) -> Any:
    """The opened slide, which has this level."""
    try:
        import openslide
    except (ImportError, OSError) as error:
        raise RevtrainError(
            f"{printable(path)} is a slide, and OpenSlide, which reads it, is not installed.\n"
            'Install it: pip install "revtrain[large-images]".'
        ) from error
    with imagefiles.reading(path):
        try:
            slide = openslide.OpenSlide(path)
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise RevtrainError(
                f"{printable(path)} has the suffix of a slide, but OpenSlide cannot read it: it is damaged or another "
                "format.\nRepair it, or give it the suffix of its format."
            ) from error
    levels = slide.level_count
    if not 0 <= level < levels:
        slide.close()
        raise RevtrainError(
            f"Level {level} of {printable(path)} was asked for, but it has the levels 0 to {levels - 1}.\n"
            "Give one of these."
        )
    return slide


def _of_slide(path: str, top: int, left: int, size: ImageSize, level: int) -> Image.Image:
    with _slide(path, level) as slide:
        width, height = slide.level_dimensions[level]
        _refuse_outside(top, left, size, ImageSize(height, width))
        scale = slide.level_downsamples[level]  # places are given in pixels of level 0
        with imagefiles.reading(path):
            place = round(left * scale), round(top * scale)
            part = slide.read_region(place, level, (size.width, size.height))
    white = Image.new("RGB", part.size, "white")
    white.paste(part, mask=part.getchannel("A"))
    return white
