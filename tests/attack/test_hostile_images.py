"""Image files that are not what their names say: none starts a program, fills the memory or is taken in silence."""

import pickle
import re
import struct
import subprocess
import warnings
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from tanglenas_datasets.decoding import FORMATS, UNREADABLE, decode, opened
from tanglenas_datasets.folders import SUFFIXES
from tanglenas_datasets.image_folder import ImageFolder
from tanglenas_engine import SilentProgress, TangleNASError

ROOT = Path(__file__).resolve().parents[2]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of Ghostscript; the file that it writes when it runs."""
    ran = tmp_path / "ran"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit 0\necho ran > {ran}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return ran


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name / f"{i}.png")
    return folder


def test_the_program_would_run_if_an_image_were_opened_as_anything(ghostscript: Path, tmp_path: Path) -> None:
    path = tmp_path / "0.eps"
    path.write_bytes(EPS)
    with pytest.raises((OSError, subprocess.CalledProcessError)), Image.open(path, formats=("EPS",)) as image:
        image.load()
    assert ghostscript.exists()


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_an_eps_file_starts_no_program_whatever_its_name(ghostscript: Path, pictures: Path, suffix: str) -> None:
    (pictures / "cat" / f"9{suffix}").write_bytes(EPS)
    with pytest.raises(TangleNASError, match=rf"9\{suffix} is no readable image: it is of no known format \(BMP"):
        ImageFolder(pictures)
    dataset = ImageFolder(pictures, check=False)
    with pytest.raises(TangleNASError, match=rf"9\{suffix} is no readable image"):
        dataset.subset(torch.arange(5), train=False).batch(torch.arange(5))
    assert not ghostscript.exists()


@pytest.mark.parametrize("kind", ["PDF", "ICO", "PCX", "TGA", "SGI", "MSP", "XBM", "JPEG2000", "DDS", "ICNS"])
def test_other_formats_are_refused_under_the_name_of_an_image(pictures: Path, kind: str) -> None:
    mode = "1" if kind in ("MSP", "XBM") else "RGB"
    try:
        Image.new(mode, (16, 16)).save(pictures / "cat" / "9.png", kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    with pytest.raises(TangleNASError, match=r"9\.png is no readable image"):
        ImageFolder(pictures)


def png(width: int, height: int) -> bytes:
    """A PNG file that says it is so large, and holds a few pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(64))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("side", [9_500, 12_000, 15_000, 60_000])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(pictures: Path, side: int, strict: bool) -> None:
    (pictures / "cat" / "9.png").write_bytes(png(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        with pytest.raises(TangleNASError, match=r"9\.png is no readable image: .*pixels"):
            ImageFolder(pictures)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_that_is_tried_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    Image.new("RGB", (8, 8), (255, 255, 255)).save(path, kind)
    with opened(path) as image:
        assert image.format == kind
    assert decode(path, "RGB").getpixel((4, 4)) == (255, 255, 255)


def test_a_photo_of_a_phone_with_two_pictures_in_it_is_read(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), (value, 0, 0)) for value in (200, 0))
    first.save(tmp_path / "0.jpg", "MPO", save_all=True, append_images=[second])
    assert decode(tmp_path / "0.jpg", "RGB").getpixel((4, 4))[0] > 150


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_are_refused_or_read_and_never_end_in_another_error(tmp_path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    path = tmp_path / "image"
    kind = FORMATS[seed % len(FORMATS)]
    Image.fromarray(generator.integers(0, 256, (20, 20, 3), np.uint8)).save(path, kind)
    content = bytearray(path.read_bytes())
    for place in generator.integers(2, len(content), 12):
        content[place] = generator.integers(256)
    path.write_bytes(content[: generator.integers(8, len(content) + 1)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert decode(path, "RGB").mode == "RGB"
        except UNREADABLE:
            pass


def exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data with these tags: number, type, count and value, as TIFF has them."""
    entries = b"".join(struct.pack("<HHI4s", *tag) for tag in tags)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


SIDEWAYS = (0x0112, 3, 1, b"\6\0")  # a short: the left of the picture is up


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "odd",
    [
        (0x8769, 2, 4, b"abc\0"),  # a text as the place of more tags
        (0x8825, 3, 1, b"\1\0"),
        (0x0100, 2, 4, b"640\0"),
        (0x0128, 2, 4, b"abc\0"),
        (0x011A, 10, 1, b"\x1a\0"),  # a fraction beyond the end
    ],
)
def test_tags_of_other_types_do_not_keep_an_image_from_being_turned(tmp_path: Path, kind: str, odd) -> None:
    image = Image.new("RGB", (32, 16), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 16, 16))
    image.save(tmp_path / "0", kind, exif=exif(SIDEWAYS, odd))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about the tags
        turned = decode(tmp_path / "0", "L")
    assert turned.size == (16, 32)
    assert turned.getpixel((8, 8)) > 250 and turned.getpixel((8, 24)) < 5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "tags",
    [
        b"Exif\0\0II*\0",
        b"Exif\0\0no header",
        exif((0x0112, 2, 2, b"6\0")),
        exif((0x0112, 5, 1, b"\x1a\0")),
        exif((0x0112, 3, 1, b"\x63\0")),
    ],
)
def test_a_direction_that_cannot_be_read_is_none(tmp_path: Path, kind: str, tags: bytes) -> None:
    Image.new("RGB", (32, 16)).save(tmp_path / "0", kind, exif=tags)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode(tmp_path / "0", "RGB").size == (32, 16)


@pytest.mark.parametrize("direction", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_image_is_turned_as_pillow_turns_it(tmp_path: Path, kind: str, direction: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = direction
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)).save(
        tmp_path / "0", kind, exif=tags
    )
    with opened(tmp_path / "0") as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (np.asarray(decode(tmp_path / "0", "RGB")) == expected).all()


@pytest.mark.parametrize("error", [TypeError("an 'IFDRational'"), struct.error("needs an integer"), IndexError()])
def test_any_error_of_a_reader_names_the_file(pictures: Path, tmp_path: Path, monkeypatch, error: Exception) -> None:
    dataset = ImageFolder(pictures)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", Mock(side_effect=error))
    message = rf"cat.0\.png.* is no readable image.*Pillow cannot read it \({type(error).__name__}"
    with pytest.raises(TangleNASError, match=message):
        dataset.subset(torch.arange(1), train=False).batch(torch.arange(1))
    with pytest.raises(TangleNASError, match=rf"cat.0\.png.* \(Pillow cannot read it \({type(error).__name__}"):
        dataset.verify(SilentProgress(), tmp_path)


LATIN = "caf\udce9"  # as Python has the name b"caf\xe9"


def test_a_file_with_a_name_that_is_not_utf_8_is_an_image_like_others(pictures: Path, tmp_path: Path) -> None:
    before = ImageFolder(pictures).fingerprint
    (pictures / "cat" / "0.png").rename(pictures / "cat" / f"{LATIN}.png")
    dataset = ImageFolder(pictures)
    assert dataset.fingerprint not in (before, ImageFolder(pictures, check=False).fingerprint)
    dataset.verify(SilentProgress(), tmp_path / "memory")
    samples = pickle.loads(pickle.dumps(dataset.subset(torch.arange(4), train=False)))
    assert samples.batch(torch.arange(4))[0].shape == (4, 3, 32, 32)
    (pictures / "cat" / f"{LATIN}.png").write_bytes(b"")
    with pytest.raises(TangleNASError, match=r"cat/caf\\udce9\.png is no readable image"):
        dataset.verify(SilentProgress(), tmp_path / "memory")
    with pytest.raises(TangleNASError, match=r"cat/caf\\udce9\.png is no readable image"):
        samples.batch(torch.arange(4))


def test_a_class_with_a_name_that_is_not_utf_8_is_refused(pictures: Path) -> None:
    (pictures / "cat").rename(pictures / LATIN)
    with pytest.raises(TangleNASError, match=r"the name of class folder .*/caf\\udce9 is not UTF-8\. Rename"):
        ImageFolder(pictures)


def test_no_file_of_this_repository_opens_an_image_as_anything() -> None:
    files = [path for folder in ("tanglenas_engine", "plugins", "pipelines", "tests", "docs", "examples", "benchmarks")
             for path in (ROOT / folder).rglob("*.py")]  # fmt: skip
    assert len(files) > 100
    for path in files:
        for call in re.findall(r"Image\.open\(.*", path.read_text("utf-8")):
            assert "formats=" in call or path == Path(__file__), f"{path}: {call}"
