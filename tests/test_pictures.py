"""Promises of picture reading: any ordinary picture becomes upright RGB, anything else one sentence."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image

from conftest import little_memory
from embedlens import EmbedLensError, open_picture, pictures


def noise(mode: str = "RGB", size: tuple[int, int] = (9, 6)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def test_every_mode_becomes_rgb_of_the_same_size():
    by_way = {"PA": ("RGBA", "LA", "PA"), "I": ("L", "I"), "F": ("L", "F")}
    for mode in ("RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBA", "LA", "PA", "I", "F"):
        image = noise()
        for step in by_way.get(mode, (mode,)):
            image = image.convert(step)
        opened = open_picture(image)
        assert (opened.mode, opened.size) == ("RGB", (9, 6)), mode
        assert np.asarray(opened).std() > 10, mode  # the content is still there


def test_ordinary_files_are_read(tmp_path):
    for ending in ("jpg", "png", "webp", "bmp", "tiff", "gif", "ppm"):
        path = tmp_path / f"picture.{ending}"
        Image.new("RGB", (9, 6), (250, 10, 10)).save(path)
        opened = open_picture(path)
        assert opened.size == (9, 6)
        np.testing.assert_allclose(np.asarray(opened)[3, 4], (250, 10, 10), atol=6)  # jpg and webp are lossy
        assert open_picture(str(path)).tobytes() == opened.tobytes()


def test_sixteen_bit_greys_are_scaled_not_clipped(tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(path)
    assert np.asarray(open_picture(path))[0, :, 0].tolist() == [0, 100, 255]
    assert np.asarray(Image.open(path).convert("RGB"))[0, 1, 0] != 100  # what a plain convert would give


def test_a_rotated_photograph_stands_upright(tmp_path):
    path = tmp_path / "phone.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (9, 6), "red").save(path, exif=exif)
    assert open_picture(path).size == (6, 9)
    assert open_picture(Image.open(path)).size == (6, 9)


def test_transparent_pixels_lie_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    assert [open_picture(image).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 0, 0)]
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


def truncated(path):
    noise(size=(200, 150)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("gone.jpg", lambda path: None, "no picture at .*gone.jpg: check the path"),
        ("text.jpg", lambda path: path.write_text("hello"), "text.jpg cannot be decoded as a picture: pass a jpg, png"),
        ("empty.png", lambda path: path.touch(), "empty.png cannot be decoded as a picture"),
        ("folder.png", lambda path: path.mkdir(), "folder.png is a folder: pass one picture file"),
        ("half.jpg", truncated, "half.jpg is damaged or truncated .*: get a complete copy"),
        ("half.png", truncated, "half.png is damaged or truncated .*: get a complete copy"),
        ("half.webp", truncated, "half.webp (is damaged or truncated|cannot be decoded)"),
    ],
)
def test_a_file_that_is_no_whole_picture_gets_its_sentence(tmp_path, name, make, sentence):
    make(tmp_path / name)
    with pytest.raises(EmbedLensError, match=sentence):
        open_picture(tmp_path / name)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((4, 4, 3)), "dtype float64: pass uint8, for example"),
        (np.zeros((3, 4, 5), dtype=np.uint8), r"shape \(3, 4, 5\): pass \[h, w\], .* \(channels last\)"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), r"shape \(2, 4, 4, 3\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "has no pixels"),
    ],
)
def test_an_array_that_is_no_picture_gets_its_sentence(array, sentence):
    with pytest.raises(EmbedLensError, match=sentence):
        open_picture(array)
