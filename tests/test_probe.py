"""Promises of `embedlens probe` and of the command line around it."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from stock import QUESTION, picture

from embedlens import EmbedLens, LogitLens
from embedlens.__main__ import main
from embedlens.memory import configs
from embedlens.probe import probe_picture


@pytest.fixture
def jpg(tmp_path):
    path = tmp_path / "street.jpg"
    picture((160, 100)).save(path)
    return path


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["embedlens", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    return left.value.code or 0, out, err


def test_the_words_are_those_of_the_visual_tokens_in_patch_order(tiny):
    result = probe_picture(tiny, picture(), QUESTION, k=3)
    prompt = tiny.prompt(picture(), QUESTION)
    assert result.words == EmbedLens.from_model(tiny).words(prompt.embeds[prompt.visual], k=3)
    assert result.answer == tiny.answer(prompt)
    deeper = probe_picture(tiny, picture(), QUESTION, k=1, layer=tiny.n_layers, lens="logit")
    ids = tiny.logits(prompt)[prompt.visual].argmax(-1)
    assert deeper.words == [[tiny.tokens[index]] for index in ids.tolist()]
    assert deeper.words == LogitLens.from_model(tiny).words(tiny.hidden_states(prompt)[-1][prompt.visual], k=1)


def test_the_table_has_one_column_per_patch_and_marks_the_bars(tiny):
    result = probe_picture(tiny, picture((112, 56)), QUESTION)
    header, *rows = result.table().splitlines()
    assert header.split() == ["0", "1", "2", "3"] and len(rows) == 4
    for row, line in enumerate(rows):
        label, *cells = line.split()
        assert label == str(row) and len(cells) == 4
        for col, cell in enumerate(cells):
            index = row * 4 + col
            assert cell.startswith("▒") == bool(result.grid.padded[index])
            assert cell.removeprefix("▒") == result.words[index][0][:12]
    assert result.grid.padded.sum() == 8


@pytest.mark.parametrize("size", [(112, 63), (63, 400)])
def test_the_annotated_picture_is_readable_and_keeps_the_picture(tiny, size):
    image = Image.new("RGB", size, (0, 90, 200))
    result = probe_picture(tiny, image, QUESTION)
    drawn = result.annotated()
    left, top, right, bottom = result.grid.frame.box
    scale = drawn.width / (right - left)
    assert drawn.height == pytest.approx(scale * (bottom - top), abs=1)
    assert scale * (right - left) / result.grid.cols >= 80  # px per patch: words of eight letters fit
    pixels = np.asarray(drawn)
    inside = pixels[round((2 - top) * scale) : round((size[1] - 2 - top) * scale)]
    inside = inside[:, round((2 - left) * scale) : round((size[0] - 2 - left) * scale)]
    blue = (inside == (0, 90, 200)).all(-1).mean()
    assert 0.4 < blue < 1  # outlined and written on, not covered
    assert len({tuple(pixel) for pixel in pixels[: max(2, int(4 - top * scale * 0.9))].reshape(-1, 3)}) > 1


def test_the_command_line_probes_a_jpg_end_to_end_with_the_shipped_miniature(jpg, miniature, monkeypatch, capsys):
    monkeypatch.chdir(jpg.parent)
    monkeypatch.setattr("embedlens.groups.CALIBRATION", 4)
    code, said, noted = run(monkeypatch, capsys, "probe", jpg.name, "-k", 2)
    assert code == 0, noted
    grid = miniature.prompt(jpg, QUESTION).grid
    bars = int(grid.padded.sum())
    assert f"street.jpg: 160x100 px, {grid.rows}x{grid.cols} patches, {bars} in bars" in said and bars
    assert noted.startswith("note: the miniature knows only the drawn world")
    assert "wrote street-probed.png" in said
    assert Image.open(jpg.parent / "street-probed.png").size[0] >= grid.cols * 80


def test_models_lists_families_and_the_miniature(monkeypatch, capsys, miniature):
    few = pd.DataFrame({"GiB": 1}, index=list(configs()))  # test_memory has the whole table
    monkeypatch.setattr("embedlens.memory.sizes", lambda: few)
    code, text, _ = run(monkeypatch, capsys, "models")
    assert code == 0
    assert "LlavaForConditionalGeneration" in text and "llava-hf/llava-1.5-7b-hf" in text
    size = sum(parameter.numel() for parameter in miniature.hf.parameters()) / 1e6
    assert f"miniature: LlavaForConditionalGeneration, {size:.1f} M parameters" in text
    assert f"language model: {miniature.n_layers} layers of width {miniature.width}" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["probe", "gone.jpg"], "no picture at gone.jpg: check the path"),
        (["probe", "street.jpg", "--out", "street.jpg"], "the picture itself and would be written over: name another"),
        (["probe", "street.jpg", "--out", "a/b.png"], "lies in a folder that does not exist: create a first"),
        (["probe", "street.jpg", "--out", "b.doc"], "--out b.doc has no picture ending: end it in .png or .jpg"),
        (["probe", "street.jpg", "--out", "."], "--out . is a folder: name a file in it"),
        (["probe", "street.jpg", "--device", "cpu", "--quantize", "4bit"], "quantize='4bit' needs a CUDA GPU"),
        (["probe", "street.jpg", "--layer", "99"], "no layer 99 in"),
        (["probe", "street.jpg", "-k", "100000"], "k is 100000: pass 1 to"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_exit_code_2(monkeypatch, capsys, jpg, tiny_folder, arguments, sentence):
    monkeypatch.chdir(jpg.parent)
    arguments = [*arguments, "--model", tiny_folder]
    code, _, errors = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert sentence in errors and "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1
