"""The decoder of an image file from an untrusted source: a few formats, and a limit on pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are tried, whatever a file is called. Pillow would hand others to programs: EPS to Ghostscript."""
MAX_PIXELS = 89_478_485
"""The most pixels of an image: where Pillow begins to warn of decompression bombs. It refuses twice as many."""
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What `opened` and `decode` raise for a file that cannot be read, as Pillow does for most of them."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The way to turn an image upright, by the value of the tag Orientation of EXIF. 1 is upright."""


@contextmanager
def opened(file: str | Path | BinaryIO) -> Iterator[Image.Image]:
    """Open an image file without decoding it. The block may decode it.

    Raises:
        One of `UNREADABLE`: The file is of none of `FORMATS`, damaged, or an image of more than `MAX_PIXELS`.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width:,} x {image.height:,} pixels, more than {MAX_PIXELS:,}")
            yield image
    except (*UNREADABLE, MemoryError):
        raise
    except Exception as error:  # of damaged numbers, Pillow's readers raise struct.error, TypeError and others
        raise ValueError(f"Pillow cannot read it ({type(error).__name__}: {error})") from error


def decode(file: str | Path | BinaryIO, mode: str) -> Image.Image:
    """Return an image in a mode, "L" or "RGB", turned as its EXIF data say, where they can be read.

    What is transparent becomes white, as viewers show it: the colours under it may be anything, often black everywhere.

    Raises:
        One of `UNREADABLE`: As in `opened`, or the pixels are of a kind that has no black and white.
    """
    with opened(file) as content:
        wide = {"F": "floating-point numbers", "I": "whole numbers of 32 bits"}.get(content.mode)
        if wide is not None and (content.mode == "F" or content.format == "TIFF"):  # other "I" are of 16 bits
            raise ValueError(f"its pixels are {wide}, of which black and white are not known")
        of_16_bits = any(tile[3] == "RGB;16B" for tile in getattr(content, "tile", ()))
        image = _upright(content)
        if of_16_bits and isinstance(image.info.get("transparency"), tuple):  # Pillow keeps the upper bits of pixels
            image.info["transparency"] = tuple(level >> 8 for level in image.info["transparency"])
        if image.mode.startswith("I"):
            image = _of_8_bits(image)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert(mode)


def is_nearly_black(file: str | Path | BinaryIO) -> bool:
    """Return whether an image file has 16 bits of grey, and uses a sixteenth of the levels at most.

    Cameras of 10 and 12 bits write such files. The file must be one that `decode` reads.
    """
    with opened(file) as content:
        return content.mode.startswith("I") and 0 < int(np.asarray(content).max()) < 1 << 12


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of 16 bits with 8, and with an alpha channel where it has a transparent level.

    Pillow would clip the levels, not scale them.
    """
    levels = np.asarray(image)
    grey = Image.fromarray((levels.clip(0, 65535) >> 8).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(levels != image.info["transparency"]).convert("L"))
    return grey


def _upright(image: Image.Image) -> Image.Image:
    """Decode an image and turn it as its EXIF data say.

    `ImageOps.exif_transpose` also writes the other tags anew, and fails where one of them is of a type that it cannot
    write. The pixels may be whole where the tags are not.
    """
    image.load()  # Pillow turns a TIFF here
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # the tags are damaged, in any way
        return image
    return image if turn is None else image.transpose(turn)


def reason(error: BaseException) -> str:
    """Return why a file is no readable image, as a part of a sentence."""
    if isinstance(error, UnidentifiedImageError):
        return f"it is of no known format ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).rstrip(".").split())[:200] or type(error).__name__
