"""The book's one style: looks that can be told apart, words that cover nothing, names that do not collide."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from embedlens import figures
from embedlens.patches import Frame, PatchGrid


@pytest.fixture
def axes():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figures.set_style()
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def test_no_two_looks_of_a_palette_share_colour_or_marker():
    for palette in (figures.GROUPS, figures.LENSES, figures.ARMS):
        assert len({look.colour for look in palette.values()}) == len(palette)
        assert len({look.marker for look in palette.values()}) == len(palette)


@pytest.mark.parametrize("ends", [(0.5, 0.5, 0.5), (0.99, 1.0, 1.0), (0.0, 0.01, 1.0)])
def test_names_at_the_ends_of_lines_are_kept_apart_and_inside(axes, ends):
    for number, end in enumerate(ends):
        axes.plot([0, 1], [0, end], label=f"line {number}")
    axes.set_ylim(0, 1)
    figures.label_ends(axes, least=0.1)
    heights = sorted(text.xy[1] for text in axes.texts)
    assert len(heights) == 3
    assert min(np.diff(heights)) >= 0.1 - 1e-9 and heights[0] >= 0 and heights[-1] <= 1


def test_curves_and_points_have_their_intervals_and_differ_without_colour(axes):
    curve = pd.DataFrame({"layer": [0, 1] * 2, "of": ["a", "a", "b", "b"], "value": [0.2, 0.4, 0.1, 0.3]})
    curve = curve.assign(low=curve.value - 0.1, high=curve.value + 0.1)
    figures.bands(axes, curve, x="layer", hue="of")
    first, second = axes.get_lines()
    assert first.get_ydata().tolist() == [0.2, 0.4] and second.get_ydata().tolist() == [0.1, 0.3]
    assert first.get_marker() != second.get_marker() and first.get_linestyle() != second.get_linestyle()
    assert [band.get_paths()[0].get_extents().y0 for band in axes.collections] == pytest.approx([0.1, 0.0])
    axes.clear()
    figures.points(axes, curve[:1], y="of")
    assert tuple(np.ravel(axes.get_lines()[0].get_xydata())) == (0.2, 0.0)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a"]


def test_a_figure_says_which_kind_of_result_it_shows(axes):
    figures.sign(axes.figure, "llava-hf/llava-1.5-7b-hf", "n = 5 pictures")
    assert axes.figure.get_supxlabel() == "full scale result on llava-hf/llava-1.5-7b-hf, n = 5 pictures"


def test_marked_patches_are_outlined_and_their_middle_stays_bare():
    grid = PatchGrid(2, 2, Frame.letterbox(40, 40))
    picture = Image.new("RGB", (40, 40), (200, 30, 30))
    marked = np.array([False, True, False, False])
    plain = np.asarray(figures.patch_words(picture, grid, [""] * 4))
    drawn = np.asarray(figures.patch_words(picture, grid, [""] * 4, marked))
    side = len(drawn) // 2
    changed = (plain != drawn).any(-1)
    assert changed[:side, side:].any() and not changed[side:].any() and not changed[:, :side].any()
    assert (drawn == figures.MARKED).all(-1).any()
    assert tuple(drawn[side // 2, side + side // 2]) == (200, 30, 30)
