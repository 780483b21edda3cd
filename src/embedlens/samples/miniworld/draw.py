"""Scene -> pixels. Integer arithmetic and Pillow's own resampling, so that a scene is the same bytes everywhere."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from embedlens.samples.miniworld import sprites
from embedlens.samples.miniworld.scene import LONG_SIDE, Background, Scene, Thing
from embedlens.samples.miniworld.sprites import COLOURS

TILE = 2 * LONG_SIDE
#: Texture → its darkest and lightest colour, the cells of two clouds, and how much more the first counts
CLOUDS = {
    "grass": ((38, 92, 30), (128, 182, 70), (56, 112), (14, 14), 1),
    "water": ((24, 84, 140), (96, 176, 206), (40, 7), (8, 5), 2),
    "sand": ((196, 164, 108), (240, 218, 168), (112, 112), (9, 9), 1),
    "wood": ((112, 70, 36), (196, 146, 92), (60, 4), (14, 3), 2),
}


def _cloud(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Smooth noise 0..255, int32 [TILE, TILE], with so many cells per side."""
    coarse = Image.fromarray(rng.integers(0, 256, (rows, cols), dtype=np.uint8))
    return np.asarray(coarse.resize((TILE, TILE), Image.Resampling.BICUBIC), np.int32)


def _mixed(low: tuple[int, int, int], high: tuple[int, int, int], weight: np.ndarray) -> np.ndarray:
    """low..high by weight 0..255, int32 [h, w, 3]."""
    w = weight[..., None]
    return (np.asarray(low, np.int32) * (255 - w) + np.asarray(high, np.int32) * w) // 255


@lru_cache(maxsize=16)
def _tile(kind: str) -> np.ndarray:
    """A large piece of a texture, uint8 [TILE, TILE, 3]; pictures show crops of it."""
    rng = np.random.Generator(np.random.PCG64([7, len(kind), ord(kind[0]), ord(kind[-1])]))
    y, x = np.mgrid[0:TILE, 0:TILE]
    if kind in CLOUDS:
        low, high, first, second, times = CLOUDS[kind]
        tile = _mixed(low, high, (_cloud(rng, *first) * times + _cloud(rng, *second)) // (times + 1))
    if kind == "wood":
        tile[y[:, 0] % 28 == 0] = (74, 46, 26)
    elif kind == "sky":
        cloud = np.clip((_cloud(rng, 5, 7) + _cloud(rng, 12, 16) // 2 - 110) * 2, 0, 255)
        tile = _mixed((104, 164, 228), (238, 244, 250), cloud)
    elif kind == "brick":
        row = y // 10
        mortar = (y % 10 == 0) | ((x + 10 * (row % 2)) % 20 == 0)
        shade = (_cloud(rng, 22, 11) + _cloud(rng, 60, 60)) // 2
        tile = np.where(mortar[..., None], np.asarray((196, 186, 174)), _mixed((128, 52, 40), (190, 96, 72), shade))
    elif kind == "noise":
        tile = 40 + rng.integers(0, 176, (TILE, TILE, 1), dtype=np.int32) + np.zeros(3, np.int32)
    return np.clip(tile, 0, 255).astype(np.uint8)


def _varied(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = (int(np.clip(c + rng.integers(-12, 13), 0, 255)) for c in COLOURS[colour])
    return r, g, b


def pixels(width: int, height: int, scale: float) -> tuple[int, int]:
    """Size in pixels of a picture that is width x height at scale 1."""
    return round(width * scale), round(height * scale)


def ground(background: Background, width: int, height: int, scale: float = 1) -> Image.Image:
    """The picture without its things, RGB of width x height px times scale."""
    rng = np.random.Generator(np.random.PCG64(background.seed))
    size = pixels(width, height, scale)
    if background.kind == "flat":
        return Image.new("RGB", size, _varied(background.colours[0], rng))
    if background.kind == "gradient":
        first, second = (_varied(colour, rng) for colour in background.colours)
        turned = bool(rng.integers(2))
        ramp = np.linspace(0, 255, size[0] if turned else size[1]).astype(np.int32)
        weight = np.broadcast_to(ramp[None, :] if turned else ramp[:, None], (size[1], size[0]))
        return Image.fromarray(_mixed(first, second, weight).astype(np.uint8))
    tile = _tile(background.kind)
    x, y = (int(rng.integers(0, TILE - side + 1)) for side in (width, height))
    light = int(rng.integers(205, 306))  # some scenes are darker, some lighter
    crop = np.clip(tile[y : y + height, x : x + width].astype(np.int32) * light // 256, 0, 255).astype(np.uint8)
    picture = Image.fromarray(crop)
    return picture if scale == 1 else picture.resize(size, Image.Resampling.BICUBIC)


def stamp(thing: Thing, scale: float = 1, shade: tuple[int, int, int] | None = None) -> Image.Image:
    """What one thing looks like at its size, RGBA. `shade` is the exact colour when a named one is wanted."""
    width, height = (max(1, round(side * scale)) for side in thing.box[2:])
    if thing.category is None:
        mask = sprites.word(thing.text, thing.font).resize((width, height), Image.Resampling.BILINEAR)
        drawn = Image.new("RGBA", (width, height), (*(shade or COLOURS[thing.colour or "black"]), 255))
        drawn.putalpha(mask)
        return drawn
    sprite = sprites.sprite(thing.category, thing.angle, thing.mirrored)
    drawn = sprite.resize((width, height), Image.Resampling.BILINEAR)
    if thing.colour is None:
        return drawn
    return Image.fromarray(sprites.tinted(np.asarray(drawn), shade or COLOURS[thing.colour]), "RGBA")


def picture(scene: Scene, scale: float = 1) -> Image.Image:
    """Draw a scene: RGB, scene.width x scene.height px times scale."""
    canvas = ground(scene.background, scene.width, scene.height, scale)
    rng = np.random.Generator(np.random.PCG64([scene.background.seed, 1]))
    for thing in scene.things:
        shade = _varied(thing.colour, rng) if thing.colour else None
        drawn = stamp(thing, scale, shade)
        canvas.paste(drawn, (round(thing.box[0] * scale), round(thing.box[1] * scale)), drawn)
    return canvas


def mask(thing: Thing, scene: Scene, scale: float = 1) -> np.ndarray:
    """Which pixels the thing covers, bool [height, width] times scale."""
    full = Image.new("L", pixels(scene.width, scene.height, scale), 0)
    full.paste(stamp(thing, scale).getchannel("A"), (round(thing.box[0] * scale), round(thing.box[1] * scale)))
    return np.asarray(full) > 127
