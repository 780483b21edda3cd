"""Remake the sprite atlas from Debian's `fonts-noto-color-emoji` (needed only to change the atlas).

    python -m training.atlas [--font PATH] [--out FILE]

The atlas is one PNG: a row of 16 cells of 96 px, one cell per category, alpha-trimmed, longest side 96 px.
Pillow rasterises the font's own bitmaps, so the same font and the same Pillow give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from embedlens.samples.miniworld.sprites import ATLAS, CATEGORIES, CELL, COLUMNS

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109  # the only bitmap size in the font


def sprite(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji, trimmed to what is drawn, longest side CELL px."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((8, 8), character, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"the font draws nothing for {character!r}: use Noto Color Emoji 2.042 or later")
    drawn = canvas.crop(box)
    scale = CELL / max(drawn.size)
    width, height = (max(1, round(side * scale)) for side in drawn.size)
    return drawn.resize((width, height), Image.Resampling.LANCZOS)


def atlas(font_file: Path = FONT) -> Image.Image:
    """All categories on one sheet, in the order of CATEGORIES, each centred in its cell."""
    if not font_file.exists():
        raise FileNotFoundError(f"no font at {font_file}: apt-get install fonts-noto-color-emoji, or pass --font")
    font = ImageFont.truetype(str(font_file), STRIKE, layout_engine=ImageFont.Layout.BASIC)
    rows = -(-len(CATEGORIES) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL), (0, 0, 0, 0))
    for i, category in enumerate(CATEGORIES):
        drawn = sprite(category.emoji, font)
        x, y = (i % COLUMNS) * CELL, (i // COLUMNS) * CELL
        sheet.paste(drawn, (x + (CELL - drawn.width) // 2, y + (CELL - drawn.height) // 2))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--out", type=Path, default=ATLAS)
    arguments = parser.parse_args()
    atlas(arguments.font).save(arguments.out, optimize=True)
    print(f"{len(CATEGORIES)} sprites -> {arguments.out.name}, {arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
