"""Promises of the patch geometry: the same pixels as the stock processor, in the same order as the visual tokens."""

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from embedlens import EmbedLensError, Frame, PatchGrid
from embedlens.patches import PREPROCESSINGS, ManyViews

ODD_SIZES = [(1, 1), (1, 7), (7, 1), (3, 4), (5, 8), (57, 112), (112, 57), (113, 62), (99, 98), (255, 31), (31, 255)]


def sizes(n: int = 9) -> list[tuple[int, int]]:
    draw = random.Random(0)
    return ODD_SIZES + [(draw.randint(1, 250), draw.randint(1, 250)) for _ in range(n)]


@pytest.mark.parametrize(
    ("size", "padded"), [((640, 480), 144), ((640, 427), 168), ((640, 426), 192), ((640, 360), 240), ((500, 375), 120)]
)
def test_known_pictures_have_the_known_number_of_padded_patches(size, padded):
    assert int(PatchGrid(24, 24, Frame.letterbox(*size)).padded.sum()) == padded
    assert int(PatchGrid(24, 24, Frame.letterbox(*reversed(size))).padded.sum()) == padded


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS)
@pytest.mark.parametrize("size", [(57, 112), (113, 62), (99, 98), (255, 31), (31, 255)])
def test_the_canvas_shows_the_picture_at_the_coordinates_of_its_frame(preprocessing, size):
    """Red is x and green is y: through the stock processor, each canvas pixel tells where it comes from."""
    width, height = size
    side = 112
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    picture = Image.fromarray(np.stack([x, y, np.full_like(x, 255)], -1))
    square = {"height": side, "width": side}
    size = {"shortest_edge": side} if preprocessing == "centre-crop" else square
    how = {"do_pad": preprocessing == "letterbox", "do_center_crop": preprocessing == "centre-crop", "size": size}
    plain = {"resample": Image.Resampling.BILINEAR, "do_rescale": False, "do_normalize": False}
    processor = LlavaImageProcessorPil(**how, **plain, crop_size=square)
    red, green, blue = np.asarray(processor(picture)["pixel_values"][0]).astype(float)
    x0, y0, x1, y1 = Frame.of(preprocessing, width, height, side).box
    source_x = x0 + (np.arange(side) + 0.5) / side * (x1 - x0) - 0.5
    source_y = y0 + (np.arange(side) + 0.5) / side * (y1 - y0) - 0.5
    margin_x, margin_y = (x1 - x0) / side + 1, (y1 - y0) / side + 1  # resampling mixes with bars and edges there
    inner_x = (source_x > margin_x) & (source_x < width - 1 - margin_x)
    inner_y = (source_y > margin_y) & (source_y < height - 1 - margin_y)
    assert inner_x.any() and inner_y.any()
    inner = np.ix_(inner_y, inner_x)
    assert (blue[inner] == 255).all()
    # 0.51: bilinear interpolation of a ramp is exact, the processor then rounds to 8 bits
    np.testing.assert_allclose(red[inner], np.broadcast_to(source_x[inner_x], red[inner].shape), atol=0.51)
    np.testing.assert_allclose(green[inner], np.broadcast_to(source_y[inner_y][:, None], green[inner].shape), atol=0.51)


@pytest.mark.parametrize("shape", [(8, 8), (3, 7), (7, 3), (1, 1)])
def test_boxes_tile_the_picture_and_patch_at_inverts_them(shape):
    for size in sizes():
        grid = PatchGrid(*shape, Frame.letterbox(*size))
        assert len(grid) == shape[0] * shape[1] == len(grid.padded) == len(grid.boxes)
        areas = (grid.boxes[:, 2] - grid.boxes[:, 0]) * (grid.boxes[:, 3] - grid.boxes[:, 1])
        assert areas.min() >= 0
        assert float(areas.sum()) == pytest.approx(size[0] * size[1], rel=1e-5)  # float32 boxes
        assert torch.equal(grid.padded, areas == 0)
        assert [grid.patch_at(x, y) for x, y in grid.centres.tolist()] == list(range(len(grid)))


def test_tokens_run_left_to_right_then_down_and_a_box_in_the_bars_is_empty():
    grid = PatchGrid(rows=2, cols=3, frame=Frame.stretch(30, 20))
    assert [grid.box(i) for i in range(3)] == [(0, 0, 10, 10), (10, 0, 20, 10), (20, 0, 30, 10)]
    assert grid.box(3) == (0, 10, 10, 20) and grid.patch_at(29.9, 19.9) == 5
    grid = PatchGrid(4, 4, Frame.letterbox(100, 50))
    assert (grid.box(0), grid.cell(0), grid.patch_at(10, -20)) == ((0, 0, 25, 0), (0, -25, 25, 0), 0)
    grid = PatchGrid(8, 8, Frame.letterbox(112, 84))  # a patch is inside a box that holds its centre
    assert torch.equal(grid.inside((0, 0, 112, 84)), ~grid.padded)
    assert grid.inside(grid.box(20)).nonzero().tolist() == [[20]]


def test_centre_crop_cuts_and_has_no_bars():
    grid = PatchGrid(24, 24, Frame.centre_crop(640, 480, side=336))
    assert not grid.padded.any()
    assert grid.cell(0)[:2] == (80, 0)
    with pytest.raises(EmbedLensError, match=r"no patch shows the point \(10, 10\): the grid covers x from 80 to 560"):
        grid.patch_at(10, 10)


def many_views() -> ManyViews:
    """A whole view of 2x3, then a finer one of 4x5 that leaves gaps between its columns."""
    columns = tuple((Fraction(6 * c), Fraction(6 * c + 5)) for c in range(5))
    lines = tuple((Fraction(5 * r), Fraction(5 * r + 5)) for r in range(4))
    frame = Frame.stretch(30, 20)
    return ManyViews.of([PatchGrid(2, 3, frame), PatchGrid.of_spans(frame, columns, lines)])


def test_several_views_are_one_grid_with_every_view_as_it_is_alone():
    grid = many_views()
    assert len(grid) == 26 == len(grid.boxes) == len(grid.centres) == len(grid.padded)
    assert [len(view) for view in grid.views] == [6, 20]
    for index in range(len(grid)):
        number, inner = grid.view_of(index)
        alone = grid.views[number]
        assert inner == index - 6 * number
        assert grid.cell(index) == alone.cell(inner) and grid.box(index) == alone.box(inner)
        assert grid.neighbours(index) == [6 * number + other for other in alone.neighbours(inner)]
    assert grid.overview == (0, grid.views[0])  # the finer one shows five sixths of the picture
    with pytest.raises(EmbedLensError, match="no patch 26"):
        grid.box(26)


def test_a_point_belongs_to_the_smallest_patch_that_shows_it():
    grid = many_views()
    assert grid.patch_at(1, 1) == 6
    assert grid.patch_at(5.5, 1) == 0  # in a gap of the finer view
    with pytest.raises(EmbedLensError, match=r"no patch shows the point \(31, 1\)"):
        grid.patch_at(31, 1)
    with pytest.raises(EmbedLensError, match="0 views of different pictures"):
        ManyViews.of([])
