"""Pixels of the original picture ↔ patch grid ↔ order of the visual tokens; no model."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from embedlens.errors import EmbedLensError

PREPROCESSINGS = ("letterbox", "centre-crop", "stretch")
Box = tuple[float, float, float, float]
Span = tuple[Fraction, Fraction]  #: Start and stop along one axis, px of the original picture, exact


@dataclass(frozen=True)
class Frame:
    """What part of the picture's plane the model's canvas shows, exactly.

    Pixels of the original picture, x to the right, y down; pixel (i, j) covers [i, i+1) x [j, j+1). The window, which
    reaches beyond the picture where the canvas has bars, is stretched to the canvas.
    """

    width: int  # of the original picture, px
    height: int  # of the original picture, px
    window: tuple[Fraction, Fraction, Fraction, Fraction]  # x0, y0, x1, y1 of the canvas, px of the original picture

    @classmethod
    def letterbox(cls, width: int, height: int) -> Frame:
        """The whole picture, centred in a square with bars, as LLaVA-1.5 does (`expand2square`): the bar before the
        picture is (long - short) // 2 pixels, the one behind it takes the odd pixel.

        >>> Frame.letterbox(640, 427).box
        (0.0, -106.0, 640.0, 534.0)
        """
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        return cls._of(width, height, -left, -top, side - left, side - top)

    @classmethod
    def centre_crop(cls, width: int, height: int, side: int) -> Frame:
        """The central square, as CLIP does: short side resized to `side` px, then the middle cut out, the long side and
        the left edge truncated to whole pixels of the resized picture.

        >>> Frame.centre_crop(640, 480, side=336).box
        (80.0, 0.0, 560.0, 480.0)
        """
        short, long = min(width, height), max(width, height)
        resized_long = int(side * long / short)  # in floating point, as transformers' get_resize_output_image_size
        first = (resized_long - side) // 2
        start, stop = Fraction(first * long, resized_long), Fraction((first + side) * long, resized_long)
        if width <= height:
            return cls._of(width, height, 0, start, width, stop)
        return cls._of(width, height, start, 0, stop, height)

    @classmethod
    def stretch(cls, width: int, height: int) -> Frame:
        """The whole picture, its two sides scaled apart to fill the canvas.

        >>> Frame.stretch(640, 480).box
        (0.0, 0.0, 640.0, 480.0)
        """
        return cls._of(width, height, 0, 0, width, height)

    @classmethod
    def of(cls, preprocessing: str, width: int, height: int, side: int) -> Frame:
        """The frame of a picture under a named preprocessing with a square canvas of `side` px."""
        if preprocessing == "centre-crop":
            return cls.centre_crop(width, height, side)
        if preprocessing not in PREPROCESSINGS:
            raise EmbedLensError(f"unknown preprocessing {preprocessing!r}: choose one of {', '.join(PREPROCESSINGS)}")
        return (cls.letterbox if preprocessing == "letterbox" else cls.stretch)(width, height)

    @classmethod
    def _of(cls, width: int, height: int, *window: int | Fraction) -> Frame:
        if width < 1 or height < 1:
            raise EmbedLensError(f"a picture of {width}x{height} has no pixels: pass one with both sides at least 1")
        x0, y0, x1, y1 = map(Fraction, window)
        return cls(width, height, (x0, y0, x1, y1))

    @property
    def box(self) -> Box:
        """The window as floats: x0, y0, x1, y1 in px of the original picture."""
        x0, y0, x1, y1 = map(float, self.window)
        return x0, y0, x1, y1


@dataclass(frozen=True)
class PatchGrid:
    """Which patch of the picture each visual token is, in raster order; coordinates are px of the original picture.

    >>> grid = PatchGrid(rows=8, cols=8, frame=Frame.letterbox(112, 84))
    >>> len(grid), grid.box(8)
    (64, (0.0, 0.0, 14.0, 14.0))
    >>> grid.patch_at(20.5, 3)
    9
    >>> int(grid.padded.sum())
    16
    """

    rows: int
    cols: int
    frame: Frame
    #: Columns left to right and rows top to bottom, where they do not divide the frame's window evenly: tiles put side
    #: by side leave gaps where they meet.
    given: tuple[tuple[Span, ...], tuple[Span, ...]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise EmbedLensError(f"a grid of {self.rows}x{self.cols} patches is empty: both sides are at least 1")

    @classmethod
    def of_canvas(cls, frame: Frame, canvas: tuple[int, int], patch: int) -> PatchGrid:
        """The grid that patches of `patch` px make on a canvas of (width, height) px; a remainder at the right and at
        the bottom is dropped.

        >>> grid = PatchGrid.of_canvas(Frame.stretch(380, 384), canvas=(380, 384), patch=14)
        >>> grid.rows, grid.cols, grid.box(26)
        (27, 27, (364.0, 0.0, 378.0, 14.0))
        """
        x0, y0, x1, y1 = frame.window
        width, height = canvas
        step_x, step_y = (x1 - x0) * patch / width, (y1 - y0) * patch / height
        return cls.of_spans(frame, _even(x0, step_x, width // patch), _even(y0, step_y, height // patch))

    @classmethod
    def of_spans(cls, frame: Frame, columns: Sequence[Span], lines: Sequence[Span]) -> PatchGrid:
        """The grid of these columns (left to right) and rows (top to bottom).

        >>> columns = [(Fraction(a), Fraction(b)) for a, b in ((0, 4), (5, 9))]
        >>> grid = PatchGrid.of_spans(Frame.stretch(10, 4), columns, columns[:1])
        >>> grid.box(1), grid.patch_at(5.5, 0)
        ((5.0, 0.0, 9.0, 4.0), 1)
        """
        return cls(len(lines), len(columns), frame, given=(tuple(columns), tuple(lines)))

    def __len__(self) -> int:
        return self.rows * self.cols

    @property
    def views(self) -> tuple[PatchGrid, ...]:
        """The grids that this one consists of, in the order of their tokens: itself, unless the picture is tiled."""
        return (self,)

    @property
    def overview(self) -> tuple[int, PatchGrid]:
        """(index of its first token, grid) of the finest view that shows the picture as a whole."""
        return 0, self

    @cached_property
    def spans(self) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        """Columns left to right and rows top to bottom."""
        if self.given is not None:
            return self.given
        x0, y0, x1, y1 = self.frame.window
        return _even(x0, (x1 - x0) / self.cols, self.cols), _even(y0, (y1 - y0) / self.rows, self.rows)

    def _row_col(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise EmbedLensError(f"no patch {index}: this grid of {self.rows}x{self.cols} has 0 to {len(self) - 1}")
        return divmod(int(index), self.cols)

    @cached_property
    def cells(self) -> Float[Tensor, "n 4"]:
        """`cell` of every patch, float64."""
        columns, lines = ([(float(a), float(b)) for a, b in spans] for spans in self.spans)
        cells = [(x0, y0, x1, y1) for y0, y1 in lines for x0, x1 in columns]
        return torch.tensor(cells, dtype=torch.float64)

    @cached_property
    def _clipped(self) -> Float[Tensor, "n 4"]:
        edges = torch.tensor(2 * [self.frame.width, self.frame.height], dtype=torch.float64)
        return torch.minimum(self.cells.clamp(min=0), edges)

    def cell(self, index: int) -> Box:
        """The whole cell of a patch: x0, y0, x1, y1. Reaches outside the picture where the cell lies in a bar."""
        self._row_col(index)  # refuses what is not there
        return tuple(self.cells[index].tolist())

    def box(self, index: int) -> Box:
        """The part of the picture that a patch shows: its cell clipped to the picture, x0, y0, x1, y1. Of a cell wholly
        in the bars it has no area and lies on the picture's edge.

        >>> PatchGrid(4, 4, Frame.letterbox(100, 50)).box(0)
        (0.0, 0.0, 25.0, 0.0)
        """
        self._row_col(index)
        return tuple(self._clipped[index].tolist())

    @property
    def boxes(self) -> Float[Tensor, "n 4"]:
        """`box` of every patch, float32."""
        return self._clipped.float()

    @property
    def centres(self) -> Float[Tensor, "n 2"]:
        """Centre (x, y) of every cell, float32; outside the picture for a cell whose middle lies in a bar."""
        return ((self.cells[:, :2] + self.cells[:, 2:]) / 2).float()

    @property
    def padded(self) -> Bool[Tensor, " n"]:
        """Which patches lie wholly in the bars, that is, show no pixel of the picture."""
        return (self._clipped[:, :2] == self._clipped[:, 2:]).any(-1)

    def inside(self, box: Sequence[float]) -> Bool[Tensor, " n"]:
        """Which patches have their centre in a box x0, y0, x1, y1 (left and top edge count, right and bottom do not).

        >>> PatchGrid(2, 2, Frame.stretch(10, 10)).inside((0, 0, 10, 5)).tolist()
        [True, True, False, False]
        """
        x0, y0, x1, y1 = box
        x, y = self.centres.unbind(-1)
        return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)

    def touching(self, box: Sequence[float]) -> Bool[Tensor, " n"]:
        """Patches that show some of a box: x0, y0, x1, y1 in px of the original picture."""
        x0, y0, x1, y1 = box
        left, top, right, bottom = self.boxes.T
        return (left < x1) & (right > x0) & (top < y1) & (bottom > y0)

    def patch_at(self, x: float, y: float) -> int:
        """Index of the smallest patch that shows the point (x, y); a point in the bars has its patch too.
        EmbedLensError: no patch shows the point, because the canvas cuts it away or ends before it."""
        x0, y0, x1, y1 = self.cells.T
        shown = ((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)).nonzero()[:, 0]
        if not len(shown):
            raise EmbedLensError(
                f"no patch shows the point ({x:g}, {y:g}): the grid covers x from {float(x0.min()):g} to "
                f"{float(x1.max()):g} and y from {float(y0.min()):g} to {float(y1.max()):g}"
            )
        areas = ((x1 - x0) * (y1 - y0))[shown]
        return int(shown[(areas == areas.min()).nonzero()[0, 0]])

    def neighbours(self, index: int) -> list[int]:
        """Patches that share a side with one: above, left, right, below; of the same view only.

        >>> PatchGrid(2, 3, Frame.stretch(30, 20)).neighbours(1)
        [0, 2, 4]
        """
        row, col = self._row_col(index)
        around = ((row - 1, col), (row, col - 1), (row, col + 1), (row + 1, col))
        return [r * self.cols + c for r, c in around if 0 <= r < self.rows and 0 <= c < self.cols]


def _even(start: Fraction, step: Fraction, count: int) -> tuple[Span, ...]:
    return tuple((start + step * i, start + step * (i + 1)) for i in range(count))


def within(grid: PatchGrid, frame: Frame, canvas: tuple[int, int]) -> PatchGrid:
    """A grid over a canvas of (width, height) px as a grid over the picture of which the canvas shows a window.

    >>> seen = within(PatchGrid(1, 2, Frame.stretch(4, 4)), Frame.letterbox(8, 4), canvas=(4, 4))
    >>> seen.cell(1), seen.box(1)
    ((4.0, -2.0, 8.0, 6.0), (4.0, 0.0, 8.0, 4.0))
    """
    if len(grid.views) > 1:
        return ManyViews.of([within(view, frame, canvas) for view in grid.views])
    x0, y0, x1, y1 = frame.window
    columns, lines = (
        [(start + a * (stop - start) / edge, start + b * (stop - start) / edge) for a, b in spans]
        for spans, start, stop, edge in zip(grid.spans, (x0, y0), (x1, y1), canvas, strict=True)
    )
    return PatchGrid.of_spans(frame, columns, lines)


@dataclass(frozen=True)
class ManyViews(PatchGrid):
    """Several grids over one picture, their tokens one after the other: the whole picture and its tiles. `rows` and
    `cols` make one line of all tokens; `views` has the real shapes. A box counts the patches of every view.

    >>> whole = PatchGrid(1, 2, Frame.stretch(8, 4))
    >>> grid = ManyViews.of([whole, PatchGrid(2, 4, Frame.stretch(8, 4))])
    >>> len(grid), grid.box(1), grid.box(2), grid.patch_at(7, 3), grid.neighbours(2)
    (10, (4.0, 0.0, 8.0, 4.0), (0.0, 0.0, 2.0, 2.0), 9, [3, 6])
    """

    parts: tuple[PatchGrid, ...] = ()

    @classmethod
    def of(cls, views: Sequence[PatchGrid]) -> ManyViews:
        """The views in the order of their tokens; all of one picture."""
        if not views or len({(view.frame.width, view.frame.height) for view in views}) > 1:
            raise EmbedLensError(f"{len(views)} views of different pictures: pass at least one, all of one picture")
        first = views[0].frame
        return cls(1, sum(map(len, views)), Frame.stretch(first.width, first.height), parts=tuple(views))

    @property
    def views(self) -> tuple[PatchGrid, ...]:
        return self.parts

    @property
    def overview(self) -> tuple[int, PatchGrid]:
        starts = accumulate(map(len, self.parts), initial=0)
        sides = [view._clipped[:, 2:] - view._clipped[:, :2] for view in self.parts]
        whole = [float(side.prod(-1).sum()) >= 0.9 * self.frame.width * self.frame.height for side in sides]
        finest = max(zip(whole, map(len, self.parts), starts, self.parts, strict=False), key=lambda one: one[:2])
        return finest[2:]

    def view_of(self, index: int) -> tuple[int, int]:
        """(number of the view, index in it) of a token."""
        self._row_col(index)  # refuses what is not there
        starts = list(accumulate(map(len, self.parts), initial=0))
        number = bisect_right(starts, index) - 1
        return number, int(index) - starts[number]

    @cached_property
    def cells(self) -> Float[Tensor, "n 4"]:
        return torch.cat([view.cells for view in self.parts])

    def neighbours(self, index: int) -> list[int]:
        number, inner = self.view_of(index)
        return [index - inner + other for other in self.parts[number].neighbours(inner)]
