"""Promises of picture reading: any ordinary picture becomes upright RGB, anything else one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import little_memory
from embedlens import EmbedLensError, open_picture, pictures


def noise(mode: str = "RGB", size: tuple[int, int] = (9, 6)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def rgb(width: int = 30, height: int = 18) -> np.ndarray:
    """Coarse noise: what is left of it after resizing still differs from place to place."""
    blocks = np.random.default_rng(width).integers(0, 256, (-(-height // 6), -(-width // 6), 3), dtype=np.uint8)
    return blocks.repeat(6, 0).repeat(6, 1)[:height, :width]


def grey() -> np.ndarray:
    return rgb()[..., 0]


def as_rgb(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, -1)


def saved(values: np.ndarray, path: Path, **how) -> None:
    Image.fromarray(values).save(path, **how)


def on_white() -> np.ndarray:
    half = np.zeros((18, 30, 1))
    half[:, 15:] = 128 / 255
    return np.round(255 * (1 - half) + rgb() * half).astype(np.uint8)


def half_transparent(path: Path) -> None:
    alpha = np.zeros((18, 30, 1), dtype=np.uint8)
    alpha[:, 15:] = 128
    saved(np.concatenate([rgb(), alpha], -1), path)


COLOURS = np.random.default_rng(1).integers(0, 256, (16, 3), dtype=np.uint8)


def numbered_colours(path: Path) -> None:
    image = Image.frombytes("P", (30, 18), (grey() // 16).tobytes())
    image.putpalette(COLOURS.flatten().tolist())
    image.save(path)


def inks(path: Path) -> None:
    """Cyan, magenta, yellow are the complements of red, green, blue; no black."""
    Image.merge("CMYK", [*Image.fromarray(255 - rgb()).split(), Image.new("L", (30, 18), 0)]).save(path)


def turned(path: Path, orientation: int, turns: int) -> None:
    """Stored as the sensor saw it, upright after `turns` quarter turns to the left."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    saved(np.rot90(rgb(), -turns), path, exif=exif)


READABLE: dict[str, tuple[Callable[[Path], None], np.ndarray]] = {
    "plain.png": (partial(saved, rgb()), rgb()),
    "grey.png": (partial(saved, grey()), as_rgb(grey())),
    "rgba.png": (half_transparent, on_white()),
    "cmyk.tiff": (inks, rgb()),
    "deep.png": (partial(saved, grey().astype(np.uint16) * 257), as_rgb(grey())),
    "deep.tiff": (partial(saved, grey().astype(np.uint16) * 257), as_rgb(grey())),
    "palette.png": (numbered_colours, COLOURS[grey() // 16]),
    "palette.gif": (numbered_colours, COLOURS[grey() // 16]),
    "two-tone.png": (partial(saved, grey() > 128), as_rgb((grey() > 128).astype(np.uint8) * 255)),
    "upside-down.png": (partial(turned, orientation=3, turns=2), rgb()),
    "on-its-right.png": (partial(turned, orientation=6, turns=-1), rgb()),
    "on-its-left.png": (partial(turned, orientation=8, turns=1), rgb()),
    "column.png": (partial(saved, rgb(1, 100)), rgb(1, 100)),
    "row.png": (partial(saved, rgb(100, 1)), rgb(100, 1)),
    "dot.png": (partial(saved, rgb(1, 1)), rgb(1, 1)),
}


def corrupt(path: Path) -> None:
    """A byte in the middle of the compressed pixels is another one."""
    saved(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def cut(path: Path) -> None:
    saved(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), path)
    path.write_bytes(path.read_bytes()[:-200])


UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "corrupt.png": (corrupt, "corrupt.png is damaged or truncated .*: get a complete copy, or save it again"),
    "cut.jpg": (cut, "cut.jpg is damaged or truncated .*: get a complete copy, or save it again"),
    "no-picture.jpg": (lambda path: path.write_text("<html>404</html>"), "cannot be decoded as a picture: pass a jpg"),
    "empty.jpg": (Path.touch, "cannot be decoded as a picture: pass a jpg"),
    "absent.jpg": (lambda path: None, "no picture at .*absent.jpg: check the path"),
    "folder.png": (Path.mkdir, "folder.png is a folder: pass one picture file"),
    "cut.webp": (cut, "cut.webp (is damaged or truncated|cannot be decoded)"),
}


@pytest.mark.parametrize("name", READABLE)
def test_a_file_shows_its_pixels_upright_whatever_it_is_stored_as(name, tmp_path):
    write, pixels = READABLE[name]
    write(tmp_path / name)
    for given in (tmp_path / name, str(tmp_path / name), Image.open(tmp_path / name)):
        opened = open_picture(given)
        assert opened.mode == "RGB" and np.abs(np.asarray(opened).astype(int) - pixels).max() <= 1


@pytest.mark.parametrize("ending", ["jpg", "webp", "bmp", "ppm"])
def test_ordinary_formats_are_read(ending, tmp_path):
    Image.new("RGB", (9, 6), (250, 10, 10)).save(path := tmp_path / f"picture.{ending}")
    assert open_picture(path).size == (9, 6)
    np.testing.assert_allclose(np.asarray(open_picture(path))[3, 4], (250, 10, 10), atol=6)  # jpg and webp are lossy


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_is_no_whole_picture_gets_its_sentence(name, tmp_path):
    write, sentence = UNREADABLE[name]
    write(tmp_path / name)
    with pytest.raises(EmbedLensError, match=sentence):
        open_picture(tmp_path / name)


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "LA", "PA", "I", "F"])
def test_every_mode_becomes_rgb_of_the_same_size(mode):
    image = noise()
    for step in {"PA": ("RGBA", "LA", "PA"), "I": ("L", "I"), "F": ("L", "F")}.get(mode, (mode,)):
        image = image.convert(step)
    opened = open_picture(image)
    assert (opened.mode, opened.size) == ("RGB", (9, 6))
    assert np.asarray(opened).std() > 10  # the content is still there


def test_a_transparent_colour_of_a_palette_lies_on_white():
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = 0
    assert open_picture(palette).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "F"])
def test_a_large_picture_is_opened_in_the_memory_of_its_pixels(tmp_path, mode):
    """What is decoded, the RGB made of it, and little else; 45 megapixels."""
    size, white = (9_000, 5_000), 1.0 if mode == "F" else "white"
    Image.new(mode, size, white).save(path := tmp_path / f"large.{'tiff' if mode == 'F' else 'png'}")
    pixels = size[0] * size[1]
    copies = 1 if mode == "RGB" else 2
    with little_memory(beside=copies * 4 * pixels, extra=100 * 10**6):
        opened = open_picture(path)
    assert (opened.mode, opened.size) == ("RGB", size)
    assert opened.getpixel((0, 0)) == opened.getpixel((8_999, 4_999)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "I", "F"])
def test_conversion_in_strips_is_conversion_at_once(monkeypatch, mode):
    deep = np.random.default_rng(0).integers(0, 65536, (40, 60))
    image = {
        "I;16": Image.fromarray(deep.astype(np.uint16)),
        "I": Image.fromarray(deep.astype(np.int32)),
        "F": Image.fromarray((deep / 65536).astype(np.float32)),
    }.get(mode) or Image.fromarray(deep[..., None].repeat(4, -1).astype(np.uint8)).convert(mode)
    at_once = open_picture(image)
    monkeypatch.setattr(pictures, "STRIP", 200)
    assert open_picture(image).tobytes() == at_once.tobytes() and np.asarray(at_once).std() > 10


def test_a_safe_picture_is_opened_without_a_warning_and_an_unsafe_one_is_refused(tmp_path, monkeypatch):
    noise(size=(60, 40)).save(path := tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow warns above it, and refuses above twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_picture(path).size == (60, 40)
    noise(size=(600, 400)).save(path)
    with pytest.raises(EmbedLensError, match="large.png is too large to decode safely: shrink it first"):
        open_picture(path)


def test_memory_that_ends_is_no_damage(tmp_path, monkeypatch):
    def full(image):
        raise MemoryError

    noise().save(path := tmp_path / "whole.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", full)
    with pytest.raises(EmbedLensError, match="whole.png does not fit into the memory that is left: shrink it first"):
        open_picture(path)
    monkeypatch.setattr("PIL.Image.Image.load", full)
    with pytest.raises(EmbedLensError, match="a picture of 9x6 px does not fit into the memory"):
        open_picture(Image.new("L", (9, 6)))


def test_a_format_whose_reader_is_missing_is_not_called_damaged(tmp_path, monkeypatch):
    noise().save(path := tmp_path / "drawing.eps")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", False)
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: False)
    with pytest.raises(EmbedLensError, match="drawing.eps cannot be read on this machine .*Ghostscript.*: save it as"):
        open_picture(path)


def test_arrays_are_read_as_height_by_width():
    array = np.zeros((6, 9, 3), dtype=np.uint8)
    array[0, 8] = (1, 2, 3)
    assert open_picture(array).size == (9, 6)
    assert open_picture(array).getpixel((8, 0)) == (1, 2, 3)
    assert open_picture(array[..., 0]).size == open_picture(array[..., :1]).size == (9, 6)
    assert open_picture(array[:, ::2]).size == (5, 6)  # not contiguous
