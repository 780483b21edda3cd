"""What the visual tokens of one picture say: top words per patch, as a table and written on the picture."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache

from jaxtyping import Float, Int
from PIL.Image import Image
from PIL.ImageDraw import ImageDraw
from PIL.ImageFont import FreeTypeFont
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.lenses import EmbedLens, LogitLens
from embedlens.patches import PatchGrid
from embedlens.pictures import Picture
from embedlens.vlm import VisionLanguageModel

QUESTION = "What is in the picture?"
LENSES: dict[str, type[EmbedLens] | type[LogitLens]] = {"embed": EmbedLens, "logit": LogitLens}
BAR_MARK = "▒"
COLUMN = 12  # characters of a table column at most

CELL_FOR_READING = 84  # px of a drawn patch, so that a word of eight letters fits at 14 px
LONGEST_SIDE = 2400  # px of the drawn picture, whatever the grid
BAR_GROUND, BAR_LINE = (236, 236, 236), (214, 214, 214)
OUTLINE = (255, 255, 255)
INK, HALO, BAR_INK = (15, 15, 15), (255, 255, 255), (110, 110, 110)


@dataclass(frozen=True, eq=False)
class PictureProbe:
    """The top words of every visual token of one picture."""

    image: Image
    """The picture, upright RGB, original size."""
    grid: PatchGrid
    words: list[list[str]]
    """Best words first, one list per patch."""
    ids: Int[Tensor, "n k"]
    scores: Float[Tensor, "n k"]
    """Cosine (embed) or logit (logit) of each word."""
    layer: int
    lens: str
    model: str
    question: str
    answer: str

    def table(self) -> str:
        """The patch grid as text: one column per patch, one line per rank; words in the bars are marked."""
        columns: list[list[str]] = []
        padded = self.grid.padded.tolist()
        for col in range(self.grid.cols):
            patches = range(col, len(self.grid), self.grid.cols)
            cells = [
                _shortened(f"{BAR_MARK}{word}" if padded[patch] else word)
                for patch in patches
                for word in self.words[patch]
            ]
            width = max(map(_columns_of, [*cells, str(col)]))
            columns.append([_padded(cell, width) for cell in [str(col), *cells]])
        depth = len(self.words[0])
        margin = len(str(self.grid.rows - 1))
        lines = [" " * margin + "  " + "  ".join(column[0] for column in columns)]
        for row in range(self.grid.rows):
            for rank in range(depth):
                label = str(row).rjust(margin) if rank == 0 else " " * margin
                lines.append(label + "  " + "  ".join(column[1 + row * depth + rank] for column in columns))
            if depth > 1 and row + 1 < self.grid.rows:
                lines.append("")
        return "\n".join(line.rstrip() for line in lines)

    def annotated(self) -> Image:
        """The picture as the model sees it, patches outlined, the top word in each; bars hatched."""
        return _annotate(self.image, self.grid, [words[0] for words in self.words])


def probe_picture(
    model: VisionLanguageModel,
    image: Picture,
    question: str = QUESTION,
    k: int = 1,
    layer: int = 0,
    lens: str = "embed",
) -> PictureProbe:
    """Read every visual token of a picture with a lens.

    Args:
        layer: 0 reads what enters the first block, `model.n_layers` what leaves the last one.
        lens: `"embed"` for the nearest input embeddings, `"logit"` for final norm and head.

    Raises:
        EmbedLensError: unreadable picture, empty question, no such layer or lens, k out of range.
    """
    if lens not in LENSES:
        raise EmbedLensError(f"unknown lens {lens!r}: pass one of {', '.join(map(repr, LENSES))}")
    if not 0 <= layer <= model.n_layers:
        raise EmbedLensError(
            f"no layer {layer} in {model.name}: pass 0 (what enters the first block) to {model.n_layers} "
            "(what leaves the last)"
        )
    prompt = model.prompt(image, question)
    stream = prompt.embeds if layer == 0 else model.hidden_states(prompt)[layer]
    reader = LENSES[lens].from_model(model)
    scores, ids = reader.topk(stream[prompt.visual], k)
    words = [[reader.tokens[index] for index in row] for row in ids.tolist()]
    answer = model.answer(prompt)
    return PictureProbe(prompt.image, prompt.grid, words, ids, scores, layer, lens, model.name, question, answer)


def _shortened(word: str) -> str:
    while _columns_of(word) > COLUMN:
        word = word.removesuffix("…")[:-1] + "…"
    return word


def _columns_of(text: str) -> int:
    """Terminal columns: East Asian wide characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _columns_of(text))


def _annotate(image: Image, grid: PatchGrid, words: list[str]) -> Image:
    """Draw in a plane that holds the picture and all cells, magnified until words can be read."""
    from PIL import Image, ImageDraw

    cells = [grid.cell(index) for index in range(len(grid))]
    left, top = min(0.0, cells[0][0]), min(0.0, cells[0][1])
    right, bottom = max(float(image.width), cells[-1][2]), max(float(image.height), cells[-1][3])
    cell_width, cell_height = cells[0][2] - cells[0][0], cells[0][3] - cells[0][1]
    wanted = CELL_FOR_READING / min(cell_width, cell_height)
    scale = min(max(wanted, 1.0), LONGEST_SIDE / max(right - left, bottom - top))

    def place(x: float, y: float) -> tuple[int, int]:
        return max(0, round((x - left) * scale)), max(0, round((y - top) * scale))

    plane = Image.new("RGB", place(right, bottom), BAR_GROUND)
    draw = ImageDraw.Draw(plane)
    for start in range(-plane.height, plane.width, 12):  # hatching, so that bars are no part of the picture
        draw.line([(start, plane.height), (start + plane.height, 0)], fill=BAR_LINE, width=2)
    corner, opposite = place(0, 0), place(image.width, image.height)
    size = (max(1, opposite[0] - corner[0]), max(1, opposite[1] - corner[1]))
    # Few pixels stay visible as squares when magnified much; photographs are smoothed.
    resample = Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.BICUBIC
    plane.paste(image.resize(size, resample), corner)
    if max(cells[0][:2]) > 0 or cells[-1][2] < image.width or cells[-1][3] < image.height:
        seen = (*place(*cells[0][:2]), *place(*cells[-1][2:]))
        faded = Image.blend(plane, Image.new("RGB", plane.size, HALO), 0.7)  # what the model does not see
        faded.paste(plane.crop(seen), seen)
        plane, draw = faded, ImageDraw.Draw(faded)
    line = max(1, round(cell_height * scale / 60))
    padded = grid.padded.tolist()
    for (x0, y0, x1, y1), word, bar in zip(cells, words, padded, strict=True):
        a, b = place(x0, y0), place(x1, y1)
        draw.rectangle([a, (b[0] - 1, b[1] - 1)], outline=BAR_INK, width=line + 1)  # shows on light ground
        if not bar:
            draw.rectangle([a, (b[0] - 1, b[1] - 1)], outline=OUTLINE, width=line)
        _write(draw, word, a, b, BAR_INK if bar else INK)
    return plane


def _write(draw: ImageDraw, word: str, a: tuple[int, int], b: tuple[int, int], ink: tuple[int, int, int]) -> None:
    """One word at the foot of a cell, as large as fits, with a halo so that it reads on any ground."""
    width, height = b[0] - a[0], b[1] - a[1]
    size = max(7, min(16, height // 4))
    while size > 7 and draw.textlength(word, font=_font(size)) > width - 4:
        size -= 1
    while len(word) > 1 and draw.textlength(word, font=_font(size)) > width - 2:
        word = word.removesuffix("…")[:-1] + "…" if len(word.removesuffix("…")) > 1 else word[:1]
    draw.text(
        ((a[0] + b[0]) / 2, b[1] - max(2, height // 16)),
        word,
        font=_font(size),
        fill=ink,
        anchor="md",
        stroke_width=max(1, size // 7),
        stroke_fill=HALO,
    )


@cache
def _font(size: int) -> FreeTypeFont:
    """DejaVu Sans, which ships with matplotlib and has the marks that words use."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
