"""Parts of image files: the pixels are those of the whole, whoever decodes; little else is decoded."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from revtrain.config import ImageSize
from revtrain.data import imagefiles, regions
from revtrain.data.regions import region, size_of
from revtrain.errors import RevtrainError

pyvips = pytest.importorskip("pyvips")

HEIGHT, WIDTH = 90, 150
NOISE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)
NOISE.setflags(write=False)
RGB = NOISE[..., :3]
TIFF_DATA = 324  # tag: where the tiles begin
PARTS = [(0, 0, 90, 150), (0, 0, 1, 1), (89, 149, 1, 1), (17, 40, 50, 31), (0, 100, 90, 50), (60, 3, 30, 147)]


def picture(mode):
    return Image.fromarray(NOISE if mode in ("RGBA", "LA") else RGB).convert(mode)


def tiled(path, pixels=RGB, **options):
    """A TIFF of 16x16 tiles."""
    image = pyvips.Image.new_from_array(pixels).copy(interpretation="srgb")
    path.write_bytes(image.tiffsave_buffer(tile=True, tile_width=16, tile_height=16, **options))
    return str(path)


def saved(path, mode="RGB", **options):
    picture(mode).save(path, **options)
    return str(path)


def upright(path):
    """All pixels as Pillow has them, (3, H, W)."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        return np.asarray(image.convert("RGBA" if "transparency" in image.info else "RGB"))[..., :3].transpose(2, 0, 1)


def check_parts(path, expected, parts=PARTS, **options):
    assert size_of(path, **options) == expected.shape[1:]
    for top, left, height, width in parts:
        part = region(path, top, left, ImageSize(height, width), **options)
        assert part.dtype == np.uint8 and part.flags.c_contiguous and part.flags.writeable
        assert np.array_equal(part, expected[:, top : top + height, left : left + width])


def refused(call, *words):
    with pytest.raises(RevtrainError) as error:
        call()
    text = str(error.value)
    assert all(word in text for word in words), text
    assert 2 <= len(text.splitlines()) <= 5 and "Traceback" not in text
    return text


@pytest.fixture
def huge(monkeypatch):
    """Every image is beyond Pillow's limit, once this is called."""
    return lambda limit=100: monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)


@pytest.fixture
def no_pyvips(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyvips", None)


# ---- the pixels --------------------------------------------------------------------------------------------

TIFFS = {
    "tiled, deflate": lambda path: tiled(path, compression="deflate"),
    "tiled, JPEG": lambda path: tiled(path, compression="jpeg"),
    "tiled, pyramid": lambda path: tiled(path, pyramid=True),
    "tiled, RGBA": lambda path: tiled(path, NOISE),
    "BigTIFF": lambda path: tiled(path, bigtiff=True),
    "white is 0": lambda path: tiled(path, NOISE[..., 0], miniswhite=True),
    "striped": lambda path: saved(path, compression="tiff_adobe_deflate"),
    "one strip": lambda path: saved(path, compression="tiff_lzw", strip_size=10**6),
    "striped, JPEG": lambda path: saved(path, compression="jpeg"),
    **{mode: lambda path, mode=mode: saved(path, mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")},
}
OTHERS = {
    **{f"PNG {mode}": lambda path, mode=mode: saved(path, mode, format="PNG") for mode in ("1", "L", "LA", "P", "RGB")},
    "PNG RGBA": lambda path: saved(path, "RGBA", format="PNG"),
    "PNG P, transparent": lambda path: saved(path, "P", format="PNG", transparency=b"\0\x80"),
    "PNG L, transparent": lambda path: saved(path, "L", format="PNG", transparency=7),
    **{f"JPEG {mode}": lambda path, mode=mode: saved(path, mode, format="JPEG") for mode in ("L", "RGB", "CMYK")},
    "JPEG progressive": lambda path: saved(path, format="JPEG", progressive=True),
}


@pytest.mark.parametrize("kind", [*TIFFS, *OTHERS])
def test_parts_of_a_file(tmp_path, huge, kind):
    path = {**TIFFS, **OTHERS}[kind](tmp_path / ("a.tif" if kind in TIFFS else "a.img"))
    expected = upright(path)
    check_parts(path, expected)
    huge()
    check_parts(path, expected)


@pytest.mark.parametrize("kind", TIFFS)
def test_parts_of_a_tiff_without_pyvips(tmp_path, no_pyvips, kind):
    path = TIFFS[kind](tmp_path / "a.tif")
    check_parts(path, upright(path))


@pytest.mark.parametrize("form", ["BMP", "GIF", "PPM", "WEBP"])
def test_formats_that_pillow_alone_reads(tmp_path, huge, form):
    path = saved(tmp_path / "a.img", "L", format=form)
    expected = upright(path)
    check_parts(path, expected)
    huge()
    refused(lambda: region(path, 0, 0, ImageSize(1, 1)), "a.img", "claims to be huge")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["TIFF", "PNG", "JPEG"])
def test_parts_lie_in_the_upright_image(tmp_path, huge, form, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = saved(tmp_path / "a.img", format=form, exif=exif)
    expected = upright(path)
    assert expected.shape[1:] == ((WIDTH, HEIGHT) if orientation > 4 else (HEIGHT, WIDTH))
    parts = [(0, 0, *expected.shape[1:]), (5, 11, 40, 20), (0, 30, 7, 9)]
    check_parts(path, expected, parts)
    huge()
    check_parts(path, expected, parts)


@pytest.mark.parametrize("form", ["TIFF", "PNG", "JPEG"])
def test_an_image_that_stands_on_its_head_is_read_from_its_top(tmp_path, huge, form):
    """Turned, it would be asked for its last row first, which comes last when it is decoded."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    path = str(tmp_path / "a.img")
    pixels = np.random.default_rng(0).integers(0, 256, (4000, 60, 3), np.uint8)
    Image.fromarray(pixels).save(path, format=form, exif=exif)
    expected = upright(path)
    huge()
    check_parts(path, expected, [(0, 0, 4000, 60), (1500, 7, 900, 30)])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_is_read_by_pillow_too(tmp_path, no_pyvips, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = saved(tmp_path / "a.tif", exif=exif)
    expected = upright(path)
    check_parts(path, expected, [(0, 0, *expected.shape[1:]), (5, 11, 40, 20)])
    assert np.array_equal(imagefiles.pixels(path, imagefiles.size_of(path), resize=False), expected)


@pytest.mark.parametrize("compression", [None, "tiff_adobe_deflate"])
def test_colours_that_libvips_does_not_know_are_left_to_pillow(tmp_path, huge, compression):
    path = str(tmp_path / "a.tif")
    picture("YCbCr").save(path, compression=compression, tiffinfo={262: 6})
    expected = upright(path)
    check_parts(path, expected)
    huge()
    refused(lambda: size_of(path), "a.tif", "150x90 pixels", "Convert it to RGB")


def test_threads_may_read_one_file(tmp_path):
    path, slide = tiled(tmp_path / "a.tif", compression="deflate"), tiled(tmp_path / "a.svs", compression="deflate")
    expected = RGB.transpose(2, 0, 1)

    def read(index):
        top, left = index % 40, index % 70
        part = region((path, slide)[index % 2], top, left, ImageSize(20, 30))
        return np.array_equal(part, expected[:, top : top + 20, left : left + 30])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))


def test_a_file_that_changed_is_read_anew(tmp_path):
    path = tiled(tmp_path / "a.tif")
    times = os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns
    for pixels in (RGB, np.ascontiguousarray(RGB[::-1])):
        os.replace(tiled(tmp_path / "b.tif", pixels), path)
        os.utime(path, ns=times)
        check_parts(path, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["a[page=1].tif", "a\nb.tif", "é.tif", os.fsdecode(b"\xff\xfe.tif"), "A.TIF"])
def test_any_name_will_do(tmp_path, name):
    try:
        path = tiled(tmp_path / name, compression="deflate")
    except OSError:
        pytest.skip("this file system has no such names")
    check_parts(path, RGB.transpose(2, 0, 1), PARTS[:2])
    (tmp_path / name).rename(tmp_path / f"{name}.svs")
    check_parts(f"{path}.svs", RGB.transpose(2, 0, 1), PARTS[:2])


# ---- no more than must be ----------------------------------------------------------------------------------

PEAK = """
import re, sys
from revtrain.config import ImageSize
from revtrain.data.regions import region
def peak():  # MiB
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
region(sys.argv[1], 0, 0, ImageSize(1, 1))
before = peak()
part = region(sys.argv[2], 4000, 3000, ImageSize(100, 100))
assert part.mean() == 200, part.mean()
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
@pytest.mark.parametrize("options", [{"tile": True}, {}], ids=["tiled", "striped"])
def test_memory_is_that_of_the_part(tmp_path, options):
    path = tmp_path / "large.tif"
    image = pyvips.Image.black(5500, 5500, bands=3).copy(interpretation="srgb")  # 87 MiB; libvips keeps more on disk
    patch = (pyvips.Image.black(100, 100, bands=3) + 200).cast("uchar")
    image.insert(patch, 3000, 4000).tiffsave(str(path), compression="deflate", **options)
    small = tiled(tmp_path / "small.tif")
    done = subprocess.run([sys.executable, "-c", PEAK, small, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20


def test_a_tile_that_is_not_touched_may_be_damaged(tmp_path):
    path = tmp_path / "a.tif"
    tiled(path, compression="none")
    with Image.open(path) as image:
        starts = image.tag_v2[TIFF_DATA]
    data = bytearray(path.read_bytes())
    place = data.find(struct.pack("<2I", *starts[23:25]))  # the fourth tile of the third row: (32:48, 48:64)
    data[place : place + 4] = struct.pack("<I", len(data))
    path.write_bytes(data)
    expected = RGB.transpose(2, 0, 1)
    parts = [(0, 0, 32, 150), (32, 0, 16, 48), (32, 64, 16, 86), (48, 0, 42, 150)]
    check_parts(str(path), expected, parts)
    refused(lambda: region(str(path), 47, 63, ImageSize(2, 2)), "a.tif", "damaged", "Repair or remove it")


def test_the_head_of_the_module_imports_little():
    code = (
        "import sys\nimport revtrain.data.regions\nprint(*{'numpy', 'pyvips', 'openslide', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout.strip(), done.stdout + done.stderr


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [saved, tiled], ids=["png", "tif"])
@pytest.mark.parametrize("part", [(-1, 0, 2, 2), (0, -1, 2, 2), (89, 0, 2, 2), (0, 149, 2, 2), (0, 0, 0, 2)])
def test_a_part_outside_is_a_mistake_of_the_caller(tmp_path, make, part):
    top, left, height, width = part
    for suffix in ("png",) if make is saved else ("tif", "svs"):
        path = make(tmp_path / f"a.{suffix}")
        with pytest.raises(ValueError, match="no part of an image of 90x150 pixels"):
            region(path, top, left, ImageSize(height, width))


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("form", ["TIFF", "PNG", "JPEG", "tiled", "svs"])
def test_a_truncated_file_is_refused(tmp_path, huge, form, kept):
    path = tmp_path / ("a.svs" if form == "svs" else "a.img")
    tiled(path) if form in ("tiled", "svs") else saved(path, format=form)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    for _ in range(2):
        refused(lambda: region(str(path), 0, 0, ImageSize(HEIGHT, WIDTH)), path.name, "damaged", "epair")
        huge()


def test_what_libvips_says_is_one_line(tmp_path):
    path = tmp_path / "a.tif"
    saved(path)
    path.write_bytes(path.read_bytes()[:9999])
    text = refused(lambda: region(str(path), 0, 0, ImageSize(HEIGHT, WIDTH)), "a.tif is damaged: unable to")
    assert len(text.splitlines()) == 2 and "\\n" not in text


def test_damage_within_the_tiles_is_refused(tmp_path):
    for name in ("a.tif", "a.svs"):
        path = tmp_path / name
        tiled(path, compression="deflate")
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
        path.write_bytes(data)
        refused(lambda path=path: region(str(path), 0, 0, ImageSize(HEIGHT, WIDTH)), name, "damaged")


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.svs"])
def test_no_file(tmp_path, name):
    path = str(tmp_path / name)
    refused(lambda: size_of(path), name, "cannot be read: No such file")
    os.mkfifo(path)
    refused(lambda: size_of(path), name, "pipe")
    refused(lambda: region(path, 0, 0, ImageSize(1, 1)), name, "pipe")


@pytest.mark.parametrize(
    ("bits", "name"), [(np.uint16, "a.tif"), (np.int32, "a.tif"), (np.float32, "a.tif"), (np.uint16, "a.png")]
)
@pytest.mark.parametrize("limit", [100, 10**9])
def test_more_than_eight_bits_are_refused(tmp_path, huge, bits, name, limit):
    path = str(tmp_path / name)
    Image.fromarray(RGB[..., 0].astype(bits)).save(path)
    huge(limit)
    refused(lambda: region(path, 0, 0, ImageSize(1, 1)), name, "8 bits")


def test_more_than_eight_bits_in_colour_are_refused(tmp_path, huge, monkeypatch):
    image = pyvips.Image.new_from_array(RGB.astype(np.uint16) * 257).copy(interpretation="rgb16")
    paths = [str(tmp_path / "a.tif"), str(tmp_path / "a.png")]
    for path in paths:
        image.write_to_file(path)
    refused(lambda: region(paths[0], 0, 0, ImageSize(1, 1)), "a.tif", "8 bits")
    huge()
    refused(lambda: region(paths[1], 0, 0, ImageSize(1, 1)), "a.png", "8 bits")
    monkeypatch.setitem(sys.modules, "pyvips", None)
    refused(lambda: region(paths[0], 0, 0, ImageSize(1, 1)), "a.tif", "8 bits")


@pytest.mark.parametrize("form", ["TIFF", "PNG", "JPEG"])
@pytest.mark.parametrize("limit", [100, WIDTH * HEIGHT - 1])  # Pillow raises, or warns
def test_a_large_image_needs_pyvips(tmp_path, huge, no_pyvips, form, limit):
    path = saved(tmp_path / "a.img", format=form)
    huge(WIDTH * HEIGHT)
    assert size_of(path) == (HEIGHT, WIDTH)
    huge(limit)
    for call in (lambda: size_of(path), lambda: region(path, 0, 0, ImageSize(1, 1))):
        refused(call, "a.img", "too large", "150x90", str(limit), 'pip install "revtrain[large-images]"')


def test_the_limit_may_be_off(tmp_path, huge, no_pyvips):
    path = saved(tmp_path / "a.png")
    huge(None)
    check_parts(path, RGB.transpose(2, 0, 1))


def test_what_a_file_holds_decides(tmp_path, huge):
    check_parts(saved(tmp_path / "a.tif", format="PNG"), RGB.transpose(2, 0, 1))
    check_parts(saved(tmp_path / "a.png", format="TIFF"), RGB.transpose(2, 0, 1))
    huge()
    check_parts(str(tmp_path / "a.tif"), RGB.transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.svs"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"II*\0",
        b"RIFF",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"%PDF-1.4\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"1,2,3\n4,5,6\n",
        b"#?RADIANCE\n",
    ],
)
def test_other_formats_are_refused(tmp_path, huge, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    for _ in range(2):
        refused(lambda: size_of(str(path)), name, "damaged")
        refused(lambda: region(str(path), 0, 0, ImageSize(1, 1)), name, "damaged")
        huge()


def test_a_size_that_is_told_too_late_is_refused(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = tmp_path / "a.png"
    saved(path, exif=exif)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
    end = data.index(b"IEND") - 4
    path.write_bytes(data[:start] + data[stop:end] + data[start:stop] + data[end:])
    refused(lambda: region(str(path), 0, 0, ImageSize(1, 1)), "a.png", "turn", "Save it upright")


# ---- slides ------------------------------------------------------------------------------------------------


@pytest.fixture
def slide(tmp_path):
    """A pyramid of three levels, as OpenSlide reads it, and the pixels of each, (3, H, W)."""
    path = tiled(tmp_path / "a.svs", np.tile(RGB, (4, 4, 1)), pyramid=True, compression="deflate")
    pages = [pyvips.Image.tiffload(path, page=page).numpy().transpose(2, 0, 1) for page in range(3)]
    return path, pages


def test_parts_of_a_slide(slide):
    path, pages = slide
    assert regions.is_slide(path) and regions.is_slide("/a/B.NDPI") and not regions.is_slide("svs.tif")
    for level, page in enumerate(pages):
        assert page.shape[1:] == (360 >> level, 600 >> level)
        check_parts(path, page, [*PARTS[1:], (0, 0, *page.shape[1:])], level=level)


def test_what_is_transparent_in_a_slide_is_white(tmp_path):
    pixels = NOISE.copy()
    pixels[..., 3] = np.where(np.arange(WIDTH) < 70, 255, 0)
    part = region(tiled(tmp_path / "a.svs", pixels, compression="deflate"), 0, 0, ImageSize(HEIGHT, WIDTH))
    assert np.array_equal(part[..., :70], RGB.transpose(2, 0, 1)[..., :70]) and (part[..., 70:] == 255).all()


@pytest.mark.parametrize("level", [-1, 99])
def test_a_level_that_a_slide_lacks_is_refused(slide, level):
    for call in (lambda: size_of(slide[0], level), lambda: region(slide[0], 0, 0, ImageSize(1, 1), level)):
        refused(call, f"Level {level} of", "a.svs", "levels 0 to ")


@pytest.mark.parametrize("make", [saved, tiled], ids=["png", "tif"])
def test_levels_are_for_slides(tmp_path, make):
    path = make(tmp_path / ("a.png" if make is saved else "a.tif"))
    for call in (lambda: size_of(path, 1), lambda: region(path, 0, 0, ImageSize(1, 1), 1)):
        refused(call, "Level 1 of", os.path.basename(path), "only slides", ".ndpi")


def test_a_slide_that_is_none_is_refused(tmp_path):
    path = saved(tmp_path / "a.svs", format="PNG")
    refused(lambda: size_of(path), "a.svs", "OpenSlide cannot read it", "suffix of its format")


def test_a_slide_needs_openslide(slide, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    for call in (lambda: size_of(slide[0]), lambda: region(slide[0], 0, 0, ImageSize(1, 1))):
        refused(call, "a.svs", 'pip install "revtrain[large-images]"')
