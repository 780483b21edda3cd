"""How the book's figures look: one palette, one style, words on patches, curves by layer.

Colours and markers keep their meaning through the book; every pair can also be told apart by marker or line style.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool
from PIL.Image import Image
from torch import Tensor

from embedlens.model_names import kind_of_result
from embedlens.patches import PatchGrid

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont


@dataclass(frozen=True)
class Look:
    """How one thing is drawn wherever it appears."""

    colour: str
    marker: str
    line: str = "-"
    hatch: str = ""


# Okabe and Ito's colours, which stay apart under the common colour blindnesses.
GROUPS = {
    "alive": Look("#009E73", "o", "-", ""),
    "dead": Look("#D55E00", "X", "--", "//"),
    "ViT sink": Look("#0072B2", "^", "-.", ".."),
    "LLM sink": Look("#CC79A7", "D", ":", "xx"),
    "text": Look("#4D4D4D", "s", "-", "--"),
}
INITIALS = {"alive": "A", "dead": "D", "ViT sink": "V", "LLM sink": "L", "text": "T"}
#: A model beside its controls.
ARMS = {"miniature": Look("#222222", "o"), "another picture": Look("#8A6D00", "s"), "untrained": Look("#9A9A9A", "X")}
LENSES = {"EmbedLens": Look("#1B3A6B", "o", "-"), "LogitLens": Look("#B06A00", "s", "--")}
#: Verdict → colour and hatch.
VERDICTS = {
    "holds": ("#009E73", ""),
    "partly": ("#E69F00", "//"),
    "does not hold": ("#D55E00", "xx"),
    "undecided": ("#56B4E9", "||"),
    "not testable here": ("#BBBBBB", ".."),
}
CHANCE = "#767676"
FACT = "#C0392B"  # a target or a printed value
SHADE = "#F4F4F0"  # ground of a range of layers that is spoken of
ORDER = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#56B4E9", "#4D4D4D")  # for what has no meaning yet
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 6.8  # inches; with DPI the width of the page's column
DPI = 120

CELL_FOR_READING = 84  # px of a drawn patch, so that a word of eight letters fits at 14 px
LONGEST_SIDE = 2400  # px of the drawn picture, whatever the grid
BAR_GROUND, BAR_LINE = (236, 236, 236), (214, 214, 214)
OUTLINE, MARKED = (255, 255, 255), (0, 158, 115)
INK, HALO, BAR_INK = (15, 15, 15), (255, 255, 255), (110, 110, 110)


def set_style() -> None:
    """Make this the style of every figure and table from now on: white ground, sizes that a phone shows legibly."""
    import matplotlib
    import pandas

    pandas.set_option("display.width", 160, "display.max_colwidth", None, "display.max_columns", 20)
    look: Any = {"figure.figsize": (WIDTH, 4.0), "figure.dpi": DPI, "figure.constrained_layout.use": True}
    look |= {"figure.facecolor": "white", "axes.facecolor": "white", "axes.spines.top": False}
    look |= {"axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E6E6", "axes.axisbelow": True}
    look |= {"axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 12}
    look |= {"font.size": 12, "xtick.labelsize": 11, "ytick.labelsize": 11, "legend.fontsize": 11}
    look |= {"legend.frameon": False, "lines.linewidth": 2.0, "lines.markersize": 6, "svg.hashsalt": "embedlens"}
    look["font.family"] = ["DejaVu Sans"]  # ships with matplotlib, so that figures are the same everywhere
    matplotlib.rcParams.update(look)


def sign(figure: Figure, model: str, of: str) -> None:
    """Say under a figure which kind of result it shows, on which model, and of what ("n = 200 pictures")."""
    figure.supxlabel(signature(model, of), fontsize=10, color="#555555", x=0.99, ha="right")


def signature(model: str, of: str) -> str:
    """Which kind of result a figure shows, on which model, and of what.

    >>> signature("miniature", "n = 5 pictures")
    'miniature result, n = 5 pictures'
    """
    kind = kind_of_result(model)
    return f"{kind} result{'' if model == kind else f' on {model}'}, {of}"


def headline(figure: Figure, title: str) -> None:
    """The message of a figure of several panels, or of one with long tick labels, over its whole width."""
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=13)


def stacked_bars(axes: Axes, parts: Mapping[str, Mapping[str, float]], looks: Mapping[str, Look]) -> None:
    """What each whole consists of: a lying bar to each, shares that sum to one, stacked in the order of the looks."""
    rows = np.arange(len(parts))[::-1]
    left = np.zeros(len(parts))
    for name, look in looks.items():
        width = np.array([float(part.get(name, 0)) for part in parts.values()])
        axes.barh(rows, width, left=left, color=look.colour, hatch=look.hatch, edgecolor="white", label=name)
        for y, x, w in zip(rows, left, width, strict=True):
            if w > 0.07:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.75}
                axes.text(x + w / 2, y, f"{100 * w:.0f} %", ha="center", va="center", fontsize=10, bbox=box)
        left = left + width
    axes.set_yticks(rows, list(parts))
    axes.set_xlim(0, 1)
    percent_axis(axes.xaxis)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.32, 1.0), ncols=3, fontsize=10)


def percent_axis(axis: Axis) -> None:
    """Write the ticks of an axis of shares as whole per cent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, 0, " %"))


def paper_line(axes: Axes, value: float, text: str, at: float, **place: Any) -> None:
    """The paper's printed value as a thin dashed line, named at `at` on the other axis: a fact, not a result."""
    axes.axhline(value, color=FACT, linestyle="--", linewidth=1.2)
    axes.annotate(text, (at, value), (0, 4), textcoords="offset points", color=FACT, fontsize=10, **place)


def bands(axes: Axes, curve: pd.DataFrame, x: str, hue: str | None = None, palette: Sequence[str] = ORDER) -> None:
    """Estimates as lines with their intervals as bands, told apart by colour (of `palette`, in order), marker and dash.
    `curve` is from `embedlens.stats.curve`: value, low, high, `x`, and `hue`, which tells the lines apart."""
    import seaborn as sns

    names = list(dict.fromkeys(curve[hue])) if hue else []
    colours = dict(zip(names, palette, strict=False)) or {None: palette[0]}
    look: dict[str, Any] = {"errorbar": None, "ax": axes, "legend": False, "dashes": True}
    look |= {"hue": hue, "style": hue, "palette": colours, "markers": True} if hue else {"color": palette[0]}
    before = len(axes.get_lines())
    sns.lineplot(curve, x=x, y="value", **look)
    for line, name in zip(axes.get_lines()[before:], names, strict=False):
        line.set_label(str(name))
    for name, colour in colours.items():
        part = (curve if name is None else curve[curve[hue] == name]).sort_values(x)
        axes.fill_between(part[x], part["low"], part["high"], color=colour, alpha=0.18, linewidth=0)


def points(axes: Axes, found: pd.DataFrame, y: str, hue: str | None = None, palette: Sequence[str] = ORDER) -> None:
    """Estimates (`stats.curve`) as markers with their intervals, one row to each value of the column `y`, the first at
    the top. `hue` is the column that tells several markers of a row apart, or each row has its own colour."""
    rows, names = (list(dict.fromkeys(found[column])) for column in (y, hue or y))
    for number, (name, colour) in enumerate(zip(names, palette, strict=False)):
        part = found[found[hue or y] == name]
        shift = 0.3 * (number - (len(names) - 1) / 2) if hue else 0
        style: dict[str, Any] = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "linestyle": "none"}
        ends = [part["value"] - part["low"], part["high"] - part["value"]]
        at = [rows.index(row) + shift for row in part[y]]
        axes.errorbar(part["value"], at, xerr=ends, capsize=3, label=str(name), **style)
    axes.set_yticks(range(len(rows)), [str(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def factor_axis(axes: Axes, factors: Sequence[float]) -> None:
    """A log axis of factors, 1 at the left, the smallest at the right."""
    axes.set_xscale("log")
    axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
    axes.minorticks_off()
    axes.invert_xaxis()


def label_ends(*several: Axes, least: float = 0.055) -> None:
    """Name each labelled line at its right end, in its colour, instead of a legend. Names are kept `least` of the axis'
    height apart."""
    style: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (6, 0), "textcoords": "offset points"}
    style |= {"va": "center", "fontsize": 11, "annotation_clip": False}
    for axes in several:
        lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
        ends = [(0, float(np.asarray(line.get_ydata())[-1])) for line in lines]
        drawn = axes.transAxes.inverted().transform(axes.transData.transform(np.reshape(ends, (-1, 2))))[:, 1]
        order = np.argsort(drawn, kind="stable")
        heights = drawn[order].tolist()
        for i in range(1, len(heights)):
            heights[i] = max(heights[i], heights[i - 1] + least)
        if heights and heights[-1] > 1:  # what was pushed out at the top moves down again
            heights = [min(height, 1 - least * left) for left, height in enumerate(reversed(heights))][::-1]
        for at, height in zip(order, heights, strict=True):
            axes.annotate(str(lines[at].get_label()), (1.0, height), color=lines[at].get_color(), **style)


def patch_figure(
    image: Image,
    grid: PatchGrid,
    words: Sequence[str],
    title: str,
    marked: Bool[np.ndarray, " n"] | Bool[Tensor, " n"] | None = None,
    footer: str = "",
) -> Figure:
    """`patch_words` as a figure with a title and a line below it, pixel for pixel."""
    return _pixel_figure(patch_words(image, grid, words, marked), title, footer)


def _pixel_figure(drawn: Image, title: str, footer: str) -> Figure:
    from matplotlib import pyplot as plt
    from matplotlib.layout_engine import PlaceHolderLayoutEngine

    head, foot = 46, 26 if footer else 4
    height = drawn.height + head + foot
    # An engine that does nothing. With none at all, matplotlib falls back to the style's engine after it has saved the
    # figure once, which warns when it is drawn again.
    nothing = PlaceHolderLayoutEngine(adjust_compatible=True, colorbar_gridspec=True)
    figure = plt.figure(figsize=(drawn.width / 100, height / 100), dpi=100, layout=nothing)
    axes = figure.add_axes((0, foot / height, 1, drawn.height / height))
    axes.imshow(np.asarray(drawn), interpolation="none", aspect="auto")
    axes.set_axis_off()
    figure.text(0, 1 - 10 / height, title, fontsize=12.5, fontweight="bold", va="top", ha="left", wrap=True)
    if footer:
        figure.text(1, 3 / height, footer, fontsize=9.5, color="#555555", va="bottom", ha="right")
    return figure


def group_figure(
    image: Image,
    grid: PatchGrid,
    groups: Mapping[str, Bool[np.ndarray, " n"] | Bool[Tensor, " n"]],
    words: Sequence[str],
    title: str,
    footer: str = "",
) -> Figure:
    """A picture whose patches are outlined by group (as `TokenGroups.named` gives them), with the group's letter."""
    present = {name: np.asarray(mask) for name, mask in groups.items() if bool(np.asarray(mask).any())}
    legend = ", ".join(f"{INITIALS[name]} = {name}" for name in present)
    drawn = patch_words(image, grid, words, groups=present)
    return _pixel_figure(drawn, title, f"{legend} | {footer}" if footer else legend)


def patch_words(
    image: Image,
    grid: PatchGrid,
    words: Sequence[str],
    marked: Bool[np.ndarray, " n"] | Bool[Tensor, " n"] | None = None,
    groups: Mapping[str, Bool[np.ndarray, " n"]] | None = None,
) -> Image:
    """The picture (upright RGB, original size) as the model sees it, magnified: patches outlined, one word at the foot
    of each, bars hatched; thickly in green `marked` patches, in the group's colour with its letter `groups`."""
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
    corners = [(place(x0, y0), place(x1, y1)) for x0, y0, x1, y1 in cells]

    def outline(index: int, colour: tuple[int, int, int] | str, width: int) -> tuple[int, int]:
        a, b = corners[index]
        draw.rectangle([a, (b[0] - 1, b[1] - 1)], outline=colour, width=width)
        return a

    for index, bar in enumerate(padded):
        outline(index, BAR_INK, line + 1)  # shows on light ground
        if not bar:
            outline(index, OUTLINE, line)
    for index in np.flatnonzero([] if marked is None else np.asarray(marked)).tolist():
        outline(index, OUTLINE, 4 * line + 2)
        outline(index, MARKED, 4 * line)
    for name, patches in (groups or {}).items():
        for index in np.flatnonzero(patches).tolist():
            x, y = outline(index, GROUPS[name].colour, 2 * line + 1)
            font = _font(max(8, (corners[index][1][1] - y) // 6))
            halo: dict[str, Any] = {"stroke_width": 2, "stroke_fill": HALO}
            draw.text((x + 3 * line + 1, y + 2 * line + 1), INITIALS[name], GROUPS[name].colour, font, **halo)
    for word, (a, b), bar in zip(words, corners, padded, strict=True):
        _write(draw, word, a, b, BAR_INK if bar else INK)
    return plane


def _write(draw: ImageDraw, word: str, a: tuple[int, int], b: tuple[int, int], ink: tuple[int, int, int]) -> None:
    """One word at the foot of a cell, as large as fits, with a halo so that it reads on any ground."""
    width, height = b[0] - a[0], b[1] - a[1]
    size = max(7, min(18, height // 4))
    while size > 7 and draw.textlength(word, font=_font(size)) > width - 4:
        size -= 1
    while len(word) > 1 and draw.textlength(word, font=_font(size)) > width - 2:
        word = word.removesuffix("…")[:-1] + "…" if len(word.removesuffix("…")) > 1 else word[:1]
    at, halo = ((a[0] + b[0]) / 2, b[1] - max(2, height // 16)), max(1, size // 7)
    draw.text(at, word, ink, _font(size), "md", stroke_width=halo, stroke_fill=HALO)


@cache
def _font(size: int) -> FreeTypeFont:
    """DejaVu Sans, which ships with matplotlib and has the marks that words use."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
