"""How any ordinary picture becomes upright 8-bit RGB."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
from PIL.Image import Image

from embedlens.errors import EmbedLensError

Picture = str | os.PathLike | Image | np.ndarray


def open_picture(picture: Picture) -> Image:
    """The picture as an upright 8-bit RGB image.

    Paths are decoded; EXIF rotation is applied, as viewers do; transparent pixels lie on white; 16-bit, 32-bit and
    float greys are scaled to 8 bits; CMYK and palettes are converted. The first frame of an animation counts.

    Args:
        picture: path, PIL image of any mode, or uint8 array of shape [h, w], [h, w, 1], [h, w, 3] or [h, w, 4].

    Raises:
        EmbedLensError: the file is missing, empty, truncated or no picture, or the array is not uint8 of such a shape.

    >>> from PIL import Image
    >>> open_picture(Image.new("L", (3, 2), 255)).getpixel((0, 0))
    (255, 255, 255)
    """
    from PIL import Image

    if isinstance(picture, (str, os.PathLike)):
        return _decode(Path(picture))
    if isinstance(picture, Image.Image):
        return _upright_rgb(picture, "this image")
    if hasattr(picture, "__array_interface__"):
        return _from_array(picture)
    raise EmbedLensError(
        f"a picture is a path, a PIL image or a uint8 array, not {type(picture).__name__}: "
        "open it with PIL.Image.open, or pass its path"
    )


def _decode(path: Path) -> Image:
    from PIL import Image

    if not path.exists():
        raise EmbedLensError(f"no picture at {path}: check the path")
    if path.is_dir():
        raise EmbedLensError(f"{path} is a folder: pass one picture file in it")
    try:
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

    try:
        image.load()
        with warnings.catch_warnings():  # corrupt EXIF warns; the picture itself is fine
            warnings.simplefilter("ignore")
            image = ImageOps.exif_transpose(image)
        if 0 in image.size:
            raise EmbedLensError(f"{name} has no pixels ({image.width}x{image.height}): pass a picture with some")
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_eight_bits(image, name)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except EmbedLensError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, MemoryError, Image.DecompressionBombError) as error:
        raise EmbedLensError(
            f"{name} is damaged or truncated and cannot be read to its end ({error}): "
            "get a complete copy, or save it again"
        ) from None


def _to_eight_bits(image: Image, name: str) -> Image:
    """Greys of more than 8 bits, scaled by the range their mode means (PIL's own convert would clip them)."""
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(values).all() or low < 0:
        raise EmbedLensError(f"{name} has negative or non-finite pixels (mode {image.mode}): scale it to 0..255 first")
    if image.mode == "F":
        white = next((white for white in (1.0, 255.0, 65535.0) if high <= white), None)
    else:
        white = 65535.0 if image.mode.startswith("I;16") or high > 255 else 255.0
    if white is None or high > white:
        raise EmbedLensError(f"{name} has pixels up to {high:g} (mode {image.mode}): scale it to 0..255 first")
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))


def _from_array(array: np.ndarray) -> Image:
    from PIL import Image

    array = np.asarray(array)
    if array.dtype != np.uint8:
        raise EmbedLensError(
            f"the picture array has dtype {array.dtype}: pass uint8, for example (array * 255).round().astype('uint8')"
        )
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise EmbedLensError(
            f"the picture array has shape {tuple(array.shape)}: pass [h, w], [h, w, 3] or [h, w, 4] (channels last)"
        )
    return _upright_rgb(Image.fromarray(np.ascontiguousarray(array)), "this array")


def squared(picture: Image, way: str, colour: tuple[int, ...]) -> Image:
    """A picture made square, as `embedlens.patches.Frame` describes it.

    Args:
        picture: upright RGB.
        way: "letterbox" puts bars of `colour` around it, "centre-crop" cuts its middle out, "stretch" scales its sides
            apart to the longer one.

    >>> import PIL.Image
    >>> squared(PIL.Image.new("RGB", (6, 3)), "letterbox", (1, 2, 3)).getpixel((0, 0))
    (1, 2, 3)
    """
    from PIL import Image as images

    width, height = picture.size
    longer, shorter = max(picture.size), min(picture.size)
    if way == "letterbox":
        canvas = images.new("RGB", (longer, longer), colour)
        canvas.paste(picture, ((longer - width) // 2, (longer - height) // 2))
        return canvas
    if way == "centre-crop":
        left, top = (width - shorter) // 2, (height - shorter) // 2
        return picture.crop((left, top, left + shorter, top + shorter))
    if way == "stretch":
        return picture.resize((longer, longer), images.Resampling.BICUBIC)
    raise EmbedLensError(f"there is no way {way!r} to make a picture square: pass letterbox, centre-crop or stretch")
