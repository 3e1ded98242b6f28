"""Builds a folder of images as bad as they come, and says what should become of each file.

    python scripts/image_torture.py FOLDER            # then: revtrain data=imagefolder data.root=FOLDER

FOLDER gets train/CLASS/* and test/CLASS/* with links, cycles, hidden files, formats, wrong suffixes, orientations, odd
names, files that cannot be read and files that claim to be huge. Each is to be

    taken      and then shows `PICTURE`, upright, in the colours that its format has
    left out   and named, with the reason, in the one summary of the run
    refused    by name; without those files (`remove_refused`) the folder trains

tests/test_torture.py holds revtrain to it.
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SIDE = 16  # pixels
TAKEN, LEFT_OUT, REFUSED = "taken", "left out", "refused"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(proof) (w) file\nshowpage\n"


def picture() -> Image.Image:
    """Four quarters of different colours: red, green, blue, white; no turning or mirroring maps it to itself."""
    image = Image.new("RGB", (SIDE, SIDE))
    for index, colour in enumerate(((200, 0, 0), (0, 160, 0), (0, 0, 240), (250, 250, 250))):
        left, top = SIDE // 2 * (index % 2), SIDE // 2 * (index // 2)
        image.paste(colour, (left, top, left + SIDE // 2, top + SIDE // 2))
    return image


PICTURE = picture()
# orientation of EXIF -> how an upright picture is stored so that a viewer turns it back
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class Item:
    """A file or link of the folder.

    path: below the folder, as bytes. fate: TAKEN, LEFT_OUT or REFUSED. mode: of Pillow, in which a taken one is stored.
    """

    path: bytes
    fate: str
    mode: str = "RGB"

    def within(self, folder: Path) -> str:
        return os.fsdecode(os.path.join(os.fsencode(folder), self.path))


def encoded(form: str, image: Image.Image = PICTURE, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int, height: int, body: bytes) -> bytes:
    """A PNG that claims a size."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(body))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (*parts, (b"IEND", b""))
    )


def oriented(form: str, orientation: int, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(form, PICTURE.transpose(STORED[orientation]), exif=exif, **options)


def formats() -> dict[str, tuple[bytes, str, str]]:
    """File name -> content, fate, mode."""
    grey, black, jpeg = PICTURE.convert("L"), PICTURE.convert("1"), {"quality": 95, "subsampling": 0}
    found = {f"a.{suffix}": (encoded("JPEG", **jpeg), TAKEN, "RGB") for suffix in ("jpg", "jpeg", "jpe", "jfif", "JPG")}
    found |= {f"a.{suffix}": (encoded("PNG"), TAKEN, "RGB") for suffix in ("png", "apng")}
    found |= {
        "a.ppm": (encoded("PPM"), TAKEN, "RGB"),
        "a.pgm": (encoded("PPM", grey), TAKEN, "L"),
        "a.pbm": (encoded("PPM", black), TAKEN, "1"),
        "a.pnm": (encoded("PPM"), TAKEN, "RGB"),
        "a.bmp": (encoded("BMP"), TAKEN, "RGB"),
        "a.tif": (encoded("TIFF"), TAKEN, "RGB"),
        "a.TIFF": (encoded("TIFF", compression="tiff_lzw"), TAKEN, "RGB"),
        "a.webp": (encoded("WEBP", lossless=True), TAKEN, "RGB"),
        "a.gif": (encoded("GIF"), TAKEN, "RGB"),
        "of frames.gif": (encoded("GIF", save_all=True, append_images=[grey.convert("RGB")]), TAKEN, "RGB"),
        "a.avif": (encoded("AVIF", quality=100), TAKEN, "RGB"),
    }
    other = {"ico": "ICO", "tga": "TGA", "pcx": "PCX", "jp2": "JPEG2000", "sgi": "SGI", "dds": "DDS", "eps": "EPS"}
    other |= {"icns": "ICNS", "pdf": "PDF"}
    found |= {f"a.{suffix}": (encoded(form), LEFT_OUT, "") for suffix, form in other.items()}
    for suffix in ("heic", "jxl", "svg", "psd", "im", "cr2", "mp4", "csv", "db", "zip"):
        found[f"a.{suffix}"] = (b"of another program", LEFT_OUT, "")
    return found | {"no suffix": (encoded("PNG"), LEFT_OUT, "")}


def contents() -> dict[str, tuple[bytes, str, str]]:
    """What lies behind a suffix: other formats of the list, other formats, modes, orientations, damage."""
    exif = Image.Exif()
    exif[0x0112] = 6
    broken_exif = encoded("JPEG", exif=exif, quality=95).replace(b"MM\0*", b"MM\0*\xff\xff\xff")
    palette = PICTURE.quantize(8)
    deep = Image.new("I;16", (SIDE, SIDE), 40_000)
    found = {
        "jpeg.png": (encoded("JPEG", quality=95), TAKEN, "RGB"),
        "png.jpg": (encoded("PNG"), TAKEN, "RGB"),
        "gif.jpeg": (encoded("GIF"), TAKEN, "RGB"),
        "webp.png": (encoded("WEBP", lossless=True), TAKEN, "RGB"),
        "postscript.png": (POSTSCRIPT, REFUSED, ""),
        "postscript.jpg": (POSTSCRIPT, REFUSED, ""),
        "eps.gif": (encoded("EPS"), REFUSED, ""),
        "icon.png": (encoded("ICO"), REFUSED, ""),
        "jpeg 2000.jpg": (encoded("JPEG2000"), REFUSED, ""),
        "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", REFUSED, ""),
        "grey.png": (encoded("PNG", PICTURE.convert("L")), TAKEN, "L"),
        "grey and clear.png": (encoded("PNG", PICTURE.convert("LA")), TAKEN, "L"),
        "palette, clear.png": (encoded("PNG", palette, transparency=bytes([255, 255, 255])), TAKEN, "RGB"),
        "rgba.png": (encoded("PNG", PICTURE.convert("RGBA")), TAKEN, "RGB"),
        "cmyk.jpg": (encoded("JPEG", PICTURE.convert("CMYK"), quality=95), TAKEN, "RGB"),
        "broken exif.jpg": (broken_exif, TAKEN, "RGB"),
        "16 bit.png": (encoded("PNG", deep), REFUSED, ""),
        "float.tif": (encoded("TIFF", Image.new("F", (SIDE, SIDE))), REFUSED, ""),
        "empty.png": (b"", REFUSED, ""),
        "text.jpg": (b"not an image\n", REFUSED, ""),
        "cut.jpg": (encoded("JPEG", quality=95)[:400], REFUSED, ""),
        "cut.png": (encoded("PNG")[:60], REFUSED, ""),
        "bomb.png": (png(60_000, 60_000, bytes(10**6)), REFUSED, ""),
        "small bomb.png": (png(9_500, 9_500, b""), REFUSED, ""),
        "no pixels.png": (png(0, 0, b""), REFUSED, ""),
        "zip.png": (b"PK\x03\x04" + bytes(100), REFUSED, ""),
        "loop.tif": (b"II*\0\x08\0\0\0\0\0\x08\0\0\0", REFUSED, ""),
        "another size.png": (encoded("PNG", PICTURE.resize((24, 20), Image.Resampling.NEAREST)), TAKEN, "RGB"),
    }
    for orientation in STORED:
        found[f"turned {orientation}.jpg"] = (oriented("JPEG", orientation, quality=95), TAKEN, "RGB")
    found["turned.png"] = (oriented("PNG", 6), TAKEN, "RGB")
    found["turned.webp"] = (oriented("WEBP", 5, lossless=True), TAKEN, "RGB")
    found["turned.tif"] = (oriented("TIFF", 6), TAKEN, "RGB")
    found["turned, packed.tif"] = (oriented("TIFF", 8, compression="tiff_lzw"), TAKEN, "RGB")
    return found


NAMES = (
    b"caf\xe9.png", b"two\nlines.png", b"\x1b[31mred.png", " müller ☃ 🙂.png".encode(), b"-rf.png", b"%s %d.png",
    b"$(touch proof); `touch proof`.png", b"{a}=[b],'c'.png", b"l" * 250 + b".png", "\u202egnp.png".encode(),
)  # fmt: skip
HIDDEN = (
    b".hidden.png", b"._a.jpg", b".DS_Store", b".ipynb_checkpoints/a-checkpoint.png", b".git/a.png",
    b"@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", b"deep/.thumbnails/a.png",
)  # fmt: skip


def build(folder: Path) -> list[Item]:
    """Fill `folder`, which must be empty or missing; what should become of each file, the links included."""
    folder.mkdir(parents=True, exist_ok=True)
    items: list[Item] = []
    here = os.fsencode(folder)

    def put(path: bytes, content: bytes, fate: str = TAKEN, mode: str = "RGB") -> None:
        os.makedirs(os.path.dirname(os.path.join(here, path)), exist_ok=True)
        with open(os.path.join(here, path), "wb") as file:
            file.write(content)
        items.append(Item(path, fate, mode))

    def link(path: bytes, target: bytes, fate: str) -> None:
        os.symlink(target, os.path.join(here, path))
        items.append(Item(path, fate))

    plain = encoded("PNG")
    for place in (b"train/cat", b"train/dog", b"test/cat", b"test/dog"):
        put(place + b"/0.png", plain)
    put("train/caf\u00e9/0.png".encode(), plain)  # one letter, then two that look the same
    put("test/cafe\u0301/0.png".encode(), plain)
    put(b"train/\xff\xfe/0.png", plain)
    put(b"test/\xff\xfe/0.png", plain)

    for name, (content, fate, mode) in {**formats(), **contents()}.items():
        put(b"train/cat/" + os.fsencode(name), content, fate, mode)
    for name in NAMES:
        put(b"train/cat/" + name, plain)
    put(b"train/cat/a folder.png/deep/er/1.png", plain)

    for name in HIDDEN:  # a folder is left out as a whole
        put(b"train/cat/" + name, plain, "")
    for place in (b"train/.ipynb_checkpoints", b"train/__MACOSX"):
        put(place + b"/a.png", plain, "")
    items[:] = [item for item in items if item.fate]
    hidden = {name if name.startswith(b"deep") else name.partition(b"/")[0] for name in HIDDEN}
    hidden = {b"deep/.thumbnails" if name.startswith(b"deep") else name for name in hidden}
    items += [Item(b"train/cat/" + name, LEFT_OUT) for name in sorted(hidden)]
    items += [Item(b"train/.ipynb_checkpoints", LEFT_OUT), Item(b"train/__MACOSX", LEFT_OUT)]
    put(b"train/loose.png", plain, LEFT_OUT)
    put(b"train/README", b"", LEFT_OUT)

    # links: to what the link lies in, to another class, in circles, to what is listed already
    for name, target in (
        (b"self", b"."), (b"above", b".."), (b"far above", b"../.."), (b"root", b"/"), (b"other", b"../dog"),
        (b"deep/back", b"../../cat"),
    ):  # fmt: skip
        link(b"train/cat/" + name, target, LEFT_OUT)
    put(b"elsewhere/1.png", plain, "")
    put(b"elsewhere/below/2.png", plain, "")
    os.symlink(b"..", os.path.join(here, b"elsewhere/below/back"))
    os.symlink(b"../../elsewhere", os.path.join(here, b"train/dog/linked"))
    items[:] = [item for item in items if item.fate]
    items += [Item(b"train/dog/linked/" + name, TAKEN) for name in (b"1.png", b"below/2.png")]
    items += [Item(b"train/dog/linked/below/back", LEFT_OUT)]
    link(b"train/dog/linked again", b"../../elsewhere", LEFT_OUT)
    link(b"train/dog/one file.png", b"../../elsewhere/1.png", TAKEN)
    link(b"train/dog/nothing.png", b"absent", REFUSED)
    link(b"train/dog/a lost folder", b"/no/such/disk", REFUSED)
    link(b"train/dog/itself.png", b"itself.png", REFUSED)
    link(b"train/dog/around.png", b"around again.png", REFUSED)
    link(b"train/dog/around again.png", b"around.png", REFUSED)
    link(b"train/dog/endless.png", b"/dev/zero", REFUSED)
    os.mkfifo(os.path.join(here, b"train/dog/pipe.png"))
    items.append(Item(b"train/dog/pipe.png", REFUSED))
    with socket.socket(socket.AF_UNIX) as opened:
        before = os.getcwd()
        os.chdir(os.path.join(here, b"train/dog"))  # the name of a socket may not be long
        opened.bind("socket.png")
        os.chdir(before)
    items.append(Item(b"train/dog/socket.png", REFUSED))
    if os.geteuid() != 0:  # who may read everything
        put(b"train/dog/forbidden.png", plain, REFUSED)
        os.chmod(os.path.join(here, b"train/dog/forbidden.png"), 0)
    return items


def remove_refused(folder: Path, items: list[Item]) -> None:
    for item in items:
        if item.fate == REFUSED:
            os.unlink(item.within(folder))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="to fill: empty, or missing")
    for item in build(parser.parse_args(argv).folder):
        print(f"{item.fate:<8}  {os.fsdecode(item.path)!r}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
