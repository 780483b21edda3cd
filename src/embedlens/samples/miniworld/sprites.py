"""The things of the miniature world: COCO categories with an emoji, named colours, fonts for words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ASSETS = Path(__file__).parent / "assets"
ATLAS = ASSETS / "sprites.png"
CELL, COLUMNS = 96, 16
ANGLES = (-30, -20, -10, 0, 10, 20, 30)  # degrees; few, so that rotated sprites can be kept


@dataclass(frozen=True)
class Category:
    """A COCO category: its id and name there, its supercategory, and the emoji that draws it."""

    id: int
    name: str
    group: str
    emoji: str


CATEGORIES = tuple(Category(*row) for row in json.loads((ASSETS / "categories.json").read_text(encoding="utf-8")))
BY_GROUP: dict[str, tuple[int, ...]] = {
    group: tuple(i for i, category in enumerate(CATEGORIES) if category.group == group)
    for group in dict.fromkeys(category.group for category in CATEGORIES)
}

# sRGB; chosen to stay apart after JPEG-like noise and small changes of brightness
COLOURS = {"red": (214, 36, 40), "orange": (245, 132, 28), "yellow": (250, 218, 50), "green": (42, 160, 64)}
COLOURS |= {"cyan": (64, 205, 215), "blue": (36, 76, 205), "purple": (128, 56, 170), "pink": (246, 140, 190)}
COLOURS |= {"white": (246, 246, 246), "black": (28, 28, 32)}

# what captions and questions write is upper case: c/C, o/O, s/S ... look the same at 12 px
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "23456789"  # 0 and 1 look like O and I
FONTS = (*(f"DejaVu{face}.ttf" for face in ("Sans", "Sans-Bold", "Serif-Bold", "SansMono-Bold")), "STIXGeneralBol.ttf")


@lru_cache(maxsize=1)
def _sheet() -> Image.Image:
    with Image.open(ATLAS) as sheet:
        return sheet.convert("RGBA")


@lru_cache(maxsize=2048)
def sprite(category: int, angle: int, mirrored: bool) -> Image.Image:
    """RGBA sprite of CATEGORIES[category], turned by `angle` degrees and trimmed to what is drawn."""
    x, y = (category % COLUMNS) * CELL, (category // COLUMNS) * CELL
    drawn = _sheet().crop((x, y, x + CELL, y + CELL))
    if mirrored:
        drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if angle:
        # premultiplied, else the colour of fully transparent pixels leaks into the edge
        drawn = drawn.convert("RGBa").rotate(angle, Image.Resampling.BICUBIC, expand=True).convert("RGBA")
    alpha = drawn.getchannel("A").point(lambda a: 255 * (a > 24))
    return drawn.crop(alpha.getbbox())


def tinted(rgba: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Recolour a sprite: its light and shade stay, its hue becomes `colour`. uint8 [h, w, 4] -> uint8 [h, w, 4]."""
    rgb = rgba[..., :3].astype(np.int32)
    light = (rgb[..., 0] * 77 + rgb[..., 1] * 150 + rgb[..., 2] * 29) >> 8
    inside = rgba[..., 3] > 128
    low, high = (int(light[inside].min()), int(light[inside].max())) if inside.any() else (0, 255)
    shade = np.clip((light - low) * 256 // max(1, high - low), 0, 256)[..., None]
    base = np.asarray(colour, np.int32)
    out = base * (72 + shade * 184 // 256) // 256 + 40 * shade * shade // 65536
    return np.concatenate([np.clip(out, 0, 255).astype(np.uint8), rgba[..., 3:]], axis=-1)


@lru_cache(maxsize=len(FONTS))
def _font(index: int) -> ImageFont.FreeTypeFont:
    """A font that matplotlib ships (DejaVu, STIX), so that none has to be installed."""
    import matplotlib  # only where words are drawn

    file = f"{matplotlib.get_data_path()}/fonts/ttf/{FONTS[index]}"
    return ImageFont.truetype(file, 48, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=4096)
def word(text: str, font: int) -> Image.Image:
    """Alpha mask ("L") of a word, trimmed to its ink, letters about 35 px high."""
    drawn = _font(font)
    left, top, right, bottom = drawn.getbbox(text)
    mask = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4), 0)
    ImageDraw.Draw(mask).text((2 - left, 2 - top), text, font=drawn, fill=255)
    return mask.crop(mask.getbbox())
