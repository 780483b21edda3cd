"""Pictures and templates that are hardly any: the right result, or its sentence. What ends a command: one sentence."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
from notebook_files import BookError
from PIL import Image

from embedlens import EmbedLensError, __main__, run
from embedlens.samples import Sample
from embedlens.vlm import VisionLanguageModel

QUESTION = "What is in the picture?"


@pytest.mark.parametrize(("size", "shown"), [((1, 100), "column"), ((100, 1), "row"), ((1, 1), "all")])
def test_patches_of_a_thin_picture_are_where_its_pixels_are(tiny, size, shown):
    grid = tiny.prompt(Image.new("RGB", size, "red"), QUESTION).grid
    seen = ~grid.padded.reshape(grid.rows, grid.cols)
    if shown == "all":
        assert seen.all()
    else:
        lines = seen if shown == "row" else seen.T
        assert lines.any(1).sum() == 1 and lines.sum() == grid.cols
    middle = grid.patch_at(size[0] / 2, size[1] / 2)
    assert seen.flatten()[middle] and all(map(np.isfinite, grid.box(middle)))
    assert grid.boxes[~grid.padded].prod(-1).isfinite().all()


def drawn(draw: Callable[[], Image.Image], id: int, size: tuple[int, int]) -> Sample:
    return Sample(id, *size, (), (), (), {}, draw)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_memory_that_ends_over_one_picture_ends_no_study(tiny, batch_size):
    def width(model, given):
        if batch_size is None:
            return {"width": given.image.width}
        return [{"width": sample.image.width} for sample in given]

    def too_large():
        raise MemoryError

    samples = [drawn(partial(Image.new, "RGB", (30, 18)), id, (30, 18)) for id in range(5)]
    samples[2] = drawn(too_large, 2, (30, 18))
    with pytest.warns(UserWarning, match="1 of 5 samples could not be measured.* sample 2: .*too little memory"):
        table = run(width, tiny, samples, batch_size=batch_size)
    assert table["id"].tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('No pictures,\n please') }}", "raises TemplateError .No pictures, please."),
        ("{% for message in messages %}", "raises TemplateSyntaxError"),
        ("{{ 'USER: ' + messages[0]['content'] }}", "raises TypeError"),
        ("USER: {{ messages[0]['content'][1]['text'] }}", "writes no picture"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_named_at_once(tiny, template, sentence):
    processor = deepcopy(tiny.processor)
    processor.chat_template = template
    with pytest.raises(EmbedLensError, match=f"its chat template {sentence}.*: take chat_template.jinja"):
        VisionLanguageModel(tiny.hf, processor, "mine")


class FailedChapter(BookError):
    exit_code = 1


ENDS: list[tuple[BaseException, str, int]] = [
    (EmbedLensError("no such thing: pass another"), "no such thing: pass another", 2),
    (FailedChapter("02: cell 3 raises"), "02: cell 3 raises", 1),
    (KeyboardInterrupt(), "stopped; what was finished is on disk, and the same command goes on from there", 2),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device.: free space on that disk", 2),
    (OSError(errno.EROFS, "Read-only file system", "/mnt/a"), "/mnt/a .Read-only file system.: pass a place that", 2),
    (PermissionError(errno.EACCES, "Permission denied", "b"), "b .Permission denied.: pass a place that", 2),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "c"), "c .No such file.*: check the path", 2),
    (MemoryError(), "too little memory .MemoryError.: pass a smaller model", 2),
    (ModuleNotFoundError("No module named 'x'"), "No module named 'x': install it", 2),
    (KeyError("bbox"), "KeyError: 'bbox' is a fault of .*: EMBEDLENS_TRACEBACK=1 before the command shows where", 2),
]


def ended_by(error: BaseException, monkeypatch) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr("embedlens.memory.sizes", fails)
    monkeypatch.setattr(sys, "argv", ["embedlens", "models"])
    __main__.main()


@pytest.mark.parametrize(("error", "sentence", "code"), ENDS, ids=[type(error).__name__ for error, *_ in ENDS])
def test_whatever_ends_a_command_is_one_sentence(error, sentence, code, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exited:
        ended_by(error, monkeypatch)
    said = capsys.readouterr()
    assert exited.value.code == code and not said.out
    assert len(said.err.splitlines()) == 1 and re.match(f"embedlens: .*{sentence}", said.err)


def test_where_a_command_was_ended_can_be_seen(monkeypatch):
    monkeypatch.setenv("EMBEDLENS_TRACEBACK", "1")
    with pytest.raises(KeyError, match="bbox"):
        ended_by(KeyError("bbox"), monkeypatch)
