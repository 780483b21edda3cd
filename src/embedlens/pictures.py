"""How any ordinary picture becomes upright 8-bit RGB."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL.Image import Image

from embedlens.errors import EmbedLensError

Picture = str | os.PathLike | Image | np.ndarray

#: Longer side, px, up to which a picture reaches the model's own preprocessing with all its pixels; larger ones shrink.
LARGEST = 4096
STRIP = 2**20  # pixels that are converted at a time
GAP = 2.0  # large pictures are averaged over whole pixels down to this many times what is wanted, then interpolated


def open_picture(picture: Picture) -> Image:
    """The picture as an upright 8-bit RGB image.

    EXIF rotation is applied; transparent pixels lie on white; 16-bit, 32-bit and float greys are scaled to 8 bits. The
    first frame of an animation counts. An upright RGB image beyond `LARGEST` px is handed on as it is, not as a copy.
    `picture`: path, PIL image of any mode, or uint8 array of shape [h, w], [h, w, 1], [h, w, 3] or [h, w, 4].

    >>> from PIL import Image
    >>> open_picture(Image.new("L", (3, 2), 255)).getpixel((0, 0))
    (255, 255, 255)
    """
    from PIL import Image

    with in_memory(picture):
        if isinstance(picture, (str, os.PathLike)):
            return _decode(Path(picture))
        if isinstance(picture, Image.Image):
            return _upright_rgb(picture, "this image")
        if hasattr(picture, "__array_interface__"):
            return _from_array(picture)
    raise EmbedLensError(f"a picture is a path, a PIL image or a uint8 array, not a {type(picture).__name__}: pass one")


@contextmanager
def in_memory(picture: Picture) -> Iterator[None]:
    """Where memory may end over a picture, which is then named."""
    try:
        yield
    except MemoryError:
        size = getattr(picture, "size", None)
        name = f"a picture of {size[0]}x{size[1]} px" if isinstance(size, tuple) else "this array"
        name = str(picture) if isinstance(picture, (str, os.PathLike)) else name
        raise EmbedLensError(f"{name} does not fit into the memory that is left: shrink it first") from None


def _decode(path: Path) -> Image:
    from PIL import Image

    if not path.exists():
        raise EmbedLensError(f"no picture at {path}: check the path")
    if path.is_dir():
        raise EmbedLensError(f"{path} is a folder: pass one picture file in it")
    try:
        with warnings.catch_warnings():  # of large pictures that are safe to decode, and of damaged EXIF
            warnings.simplefilter("ignore")
            file = Image.open(path)
    except Image.DecompressionBombError as error:
        raise EmbedLensError(f"{path} is too large to decode safely: shrink it first ({error})") from None
    except (OSError, SyntaxError, ValueError):
        raise EmbedLensError(
            f"{path} cannot be decoded as a picture: pass a jpg, png or another format that Pillow reads"
        ) from None
    with file:
        return _upright_rgb(file, str(path))


def _upright_rgb(image: Image, name: str) -> Image:
    from PIL import Image, ImageOps
    from PIL.ExifTags import Base

    try:
        with warnings.catch_warnings():  # corrupt EXIF warns; the picture itself is fine
            warnings.simplefilter("ignore")
            image.load()
            if image.getexif().get(Base.Orientation, 1) != 1:
                image = ImageOps.exif_transpose(image)
        if 0 in image.size:
            raise EmbedLensError(f"{name} has no pixels ({image.width}x{image.height}): pass a picture with some")
        if image.mode.startswith("I") or image.mode == "F":
            return _in_strips(image, _eight_bits(image, name))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            return _in_strips(image, _on_white)
        if image.mode == "RGB" and max(image.size) > LARGEST:
            return image
        return image.convert("RGB")
    except EmbedLensError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError) as error:
        if "ghostscript" in str(error).lower() or "not available" in str(error):
            raise EmbedLensError(f"{name} cannot be read on this machine ({error}): save it as png or jpg") from None
        what = f"{name} is damaged or truncated and cannot be read to its end ({error})"
        raise EmbedLensError(f"{what}: get a complete copy, or save it again") from None


def _in_strips(image: Image, convert: Callable[[Image], Image]) -> Image:
    """`convert(image)` of a conversion pixel by pixel to RGB, without copies as large as the picture."""
    from PIL import Image

    canvas = Image.new("RGB", image.size)
    for box in _strips(image):
        canvas.paste(convert(image.crop(box)), box)
    return canvas


def _strips(image: Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of `STRIP` px from top to bottom."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def _on_white(image: Image) -> Image:
    from PIL import Image

    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _eight_bits(image: Image, name: str) -> Callable[[Image], Image]:
    """What scales greys of more than 8 bits by the range their mode means (PIL's own convert would clip them)."""
    from PIL import Image as images

    ends = [[values.min(), values.max()] for values in (np.asarray(image.crop(box)) for box in _strips(image))]
    low, high = float(np.min(ends)), float(np.max(ends))  # NaN stays NaN
    if not np.isfinite([low, high]).all() or low < 0:
        raise EmbedLensError(f"{name} has negative or non-finite pixels (mode {image.mode}): scale it to 0..255 first")
    if image.mode == "F":
        white = next((white for white in (1.0, 255.0, 65535.0) if high <= white), None)
    else:
        white = 65535.0 if image.mode.startswith("I;16") or high > 255 else 255.0
    if white is None or high > white:
        raise EmbedLensError(f"{name} has pixels up to {high:g} (mode {image.mode}): scale it to 0..255 first")
    scale = 255 / white

    def scaled(strip: Image) -> Image:
        values = np.asarray(strip).astype(np.float64) * scale
        return images.fromarray(np.round(values).astype(np.uint8)).convert("RGB")

    return scaled


def _from_array(array: np.ndarray) -> Image:
    from PIL import Image

    array = np.asarray(array)
    if array.dtype != np.uint8:
        what = f"the picture array has dtype {array.dtype}"
        raise EmbedLensError(f"{what}: pass uint8, for example (array * 255).round().astype('uint8')")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        what = f"the picture array has shape {tuple(array.shape)}"
        raise EmbedLensError(f"{what}: pass [h, w], [h, w, 3] or [h, w, 4] (channels last)")
    return _upright_rgb(Image.fromarray(np.ascontiguousarray(array)), "this array")


def natural_side(size: tuple[int, int], way: str) -> int:
    """Side of the square that a picture of (width, height) px makes with all its pixels."""
    return min(size) if way == "centre-crop" else max(size)


def squared(picture: Image, way: str, colour: tuple[int, ...], side: int | None = None) -> Image:
    """A picture made square, as `embedlens.patches.Frame` describes it.

    Args:
        picture: upright RGB.
        way: "letterbox" puts bars of `colour` around it, "centre-crop" cuts its middle out, "stretch" scales its sides
            apart to the longer one.
        side: of the square, px; another than `natural_side`, which keeps all pixels, scales the content first, so that
            no larger square is drawn. Nothing gets thinner than a pixel.

    >>> import PIL.Image
    >>> squared(PIL.Image.new("RGB", (6, 3)), "letterbox", (1, 2, 3)).getpixel((0, 0))
    (1, 2, 3)
    >>> squared(PIL.Image.new("RGB", (9999, 1)), "letterbox", (1, 2, 3), side=5).getpixel((0, 2))
    (0, 0, 0)
    """
    from PIL import Image as images

    width, height = picture.size
    natural = natural_side(picture.size, way)
    side = side or natural
    if way == "letterbox":
        canvas = images.new("RGB", (side, side), colour)
        (left, right), (top, bottom) = (_placed(edge, natural, side) for edge in picture.size)
        if side != natural:
            picture = resized(picture, (right - left, bottom - top))
        canvas.paste(picture, (left, top))
        return canvas
    if way == "centre-crop":
        left, top = (width - natural) // 2, (height - natural) // 2
        box = (left, top, left + natural, top + natural)
        return picture.crop(box) if side == natural else resized(picture, (side, side), box=box)
    if way == "stretch":
        return resized(picture, (side, side))
    raise EmbedLensError(f"there is no way {way!r} to make a picture square: pass letterbox, centre-crop or stretch")


def _placed(edge: int, natural: int, side: int) -> tuple[int, int]:
    """Where an edge of a picture lies along a square of `natural` px that is drawn with `side` px: at least on one."""
    start = (natural - edge) // 2
    stop = start + edge
    first = min(round(start * side / natural), math.ceil(stop * side / natural) - 1)
    return first, max(first + 1, round(stop * side / natural))


def resized(
    picture: Image,
    size: tuple[int, int],
    resample: int | None = None,
    box: tuple[float, float, float, float] | None = None,
) -> Image:
    """A picture, or the part of it in `box`, at another size; bicubic by default, beyond `LARGEST` px averaged over
    whole pixels first, which is ten times as fast."""
    from PIL import Image as images

    resample = images.Resampling.BICUBIC if resample is None else resample
    return picture.resize(size, resample, box=box, reducing_gap=GAP if max(picture.size) > LARGEST else None)
