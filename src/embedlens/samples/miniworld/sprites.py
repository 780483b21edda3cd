"""The things of the miniature world: COCO categories with an emoji, named colours, fonts for words."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ATLAS = Path(__file__).parent / "assets" / "sprites.png"
CELL, COLUMNS = 96, 16
ANGLES = (-30, -20, -10, 0, 10, 20, 30)  # degrees; few, so that rotated sprites can be kept


@dataclass(frozen=True)
class Category:
    """A COCO category: its id and name there, its supercategory, and the emoji that draws it."""

    id: int
    name: str
    group: str
    emoji: str


CATEGORIES: tuple[Category, ...] = tuple(
    Category(*row)
    for row in (
        (1, "person", "person", "\U0001f9cd"),
        (2, "bicycle", "vehicle", "\U0001f6b2"),
        (3, "car", "vehicle", "\U0001f697"),
        (4, "motorcycle", "vehicle", "\U0001f3cd"),
        (5, "airplane", "vehicle", "\U00002708"),
        (6, "bus", "vehicle", "\U0001f68c"),
        (7, "train", "vehicle", "\U0001f686"),
        (8, "truck", "vehicle", "\U0001f69a"),
        (9, "boat", "vehicle", "\U000026f5"),
        (10, "traffic light", "outdoor", "\U0001f6a6"),
        (16, "bird", "animal", "\U0001f426"),
        (17, "cat", "animal", "\U0001f408"),
        (18, "dog", "animal", "\U0001f415"),
        (19, "horse", "animal", "\U0001f40e"),
        (20, "sheep", "animal", "\U0001f411"),
        (21, "cow", "animal", "\U0001f404"),
        (22, "elephant", "animal", "\U0001f418"),
        (23, "bear", "animal", "\U0001f43b"),
        (24, "zebra", "animal", "\U0001f993"),
        (25, "giraffe", "animal", "\U0001f992"),
        (27, "backpack", "accessory", "\U0001f392"),
        (28, "umbrella", "accessory", "\U00002602"),
        (31, "handbag", "accessory", "\U0001f45c"),
        (32, "tie", "accessory", "\U0001f454"),
        (33, "suitcase", "accessory", "\U0001f9f3"),
        (34, "frisbee", "sports", "\U0001f94f"),
        (38, "kite", "sports", "\U0001fa81"),
        (41, "skateboard", "sports", "\U0001f6f9"),
        (44, "bottle", "kitchen", "\U0001f37e"),
        (46, "wine glass", "kitchen", "\U0001f377"),
        (47, "cup", "kitchen", "\U00002615"),
        (49, "knife", "kitchen", "\U0001f52a"),
        (50, "spoon", "kitchen", "\U0001f944"),
        (51, "bowl", "kitchen", "\U0001f963"),
        (52, "banana", "food", "\U0001f34c"),
        (53, "apple", "food", "\U0001f34e"),
        (54, "sandwich", "food", "\U0001f96a"),
        (56, "broccoli", "food", "\U0001f966"),
        (57, "carrot", "food", "\U0001f955"),
        (58, "hot dog", "food", "\U0001f32d"),
        (59, "pizza", "food", "\U0001f355"),
        (60, "donut", "food", "\U0001f369"),
        (61, "cake", "food", "\U0001f382"),
        (62, "chair", "furniture", "\U0001fa91"),
        (63, "couch", "furniture", "\U0001f6cb"),
        (64, "potted plant", "furniture", "\U0001fab4"),
        (65, "bed", "furniture", "\U0001f6cf"),
        (70, "toilet", "furniture", "\U0001f6bd"),
        (72, "tv", "electronic", "\U0001f4fa"),
        (73, "laptop", "electronic", "\U0001f4bb"),
        (77, "cell phone", "electronic", "\U0001f4f1"),
        (84, "book", "indoor", "\U0001f4d5"),
        (85, "clock", "indoor", "\U000023f0"),
        (86, "vase", "indoor", "\U0001f3fa"),
        (87, "scissors", "indoor", "\U00002702"),
        (88, "teddy bear", "indoor", "\U0001f9f8"),
    )
)
BY_NAME = {category.name: i for i, category in enumerate(CATEGORIES)}
BY_GROUP: dict[str, tuple[int, ...]] = {
    group: tuple(i for i, category in enumerate(CATEGORIES) if category.group == group)
    for group in dict.fromkeys(category.group for category in CATEGORIES)
}

# sRGB; chosen to stay apart after JPEG-like noise and small changes of brightness
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 40),
    "orange": (245, 132, 28),
    "yellow": (250, 218, 50),
    "green": (42, 160, 64),
    "cyan": (64, 205, 215),
    "blue": (36, 76, 205),
    "purple": (128, 56, 170),
    "pink": (246, 140, 190),
    "white": (246, 246, 246),
    "black": (28, 28, 32),
}

# what captions and questions write is upper case: c/C, o/O, s/S ... look the same at 12 px
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "23456789"  # 0 and 1 look like O and I
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono-Bold.ttf",
    "STIXGeneralBol.ttf",
)


@lru_cache(maxsize=1)
def _sheet() -> Image.Image:
    if not ATLAS.exists():
        raise FileNotFoundError(f"no sprite atlas at {ATLAS}: remake it with `python -m training.atlas`")
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


def font_file(name: str) -> Path:
    """A font that matplotlib ships (DejaVu, STIX), so that none has to be installed."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("matplotlib is not installed: its fonts draw the words (pip install matplotlib)")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name


@lru_cache(maxsize=len(FONTS))
def _font(index: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_file(FONTS[index])), 48, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=4096)
def word(text: str, font: int) -> Image.Image:
    """Alpha mask ("L") of a word, trimmed to its ink, letters about 35 px high."""
    drawn = _font(font)
    left, top, right, bottom = drawn.getbbox(text)
    mask = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4), 0)
    ImageDraw.Draw(mask).text((2 - left, 2 - top), text, font=drawn, fill=255)
    return mask.crop(mask.getbbox())
