"""Pictures that are not plain RGB files, through the model and through a study: the right result, or its sentence.

What a picture becomes pixel by pixel is in test_pictures.py; here is what a prompt and a table become. Then what ends a
command, whatever it is: one sentence.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from notebook_files import BookError
from pandas.testing import assert_frame_equal
from PIL import Image

from embedlens import EmbedLensError, __main__, open_picture, run
from embedlens.measures.labels import label_hits
from embedlens.samples import Sample
from embedlens.vlm import VisionLanguageModel

QUESTION = "What is in the picture?"
Pixels = np.ndarray


def rgb(width: int = 30, height: int = 18) -> Pixels:
    """Coarse noise: what is left of it after resizing still differs from place to place."""
    blocks = np.random.default_rng(width).integers(0, 256, (-(-height // 6), -(-width // 6), 3), dtype=np.uint8)
    return blocks.repeat(6, 0).repeat(6, 1)[:height, :width]


def grey() -> Pixels:
    return rgb()[..., 0]


def as_rgb(values: Pixels) -> Pixels:
    return np.stack([values] * 3, -1)


def saved(values: Pixels, path: Path, **how) -> None:
    Image.fromarray(values).save(path, **how)


def on_white() -> Pixels:
    half = np.zeros((18, 30, 1))
    half[:, 15:] = 128 / 255
    return np.round(255 * (1 - half) + rgb() * half).astype(np.uint8)


def half_transparent(path: Path) -> None:
    alpha = np.zeros((18, 30, 1), dtype=np.uint8)
    alpha[:, 15:] = 128
    saved(np.concatenate([rgb(), alpha], -1), path)


COLOURS = np.random.default_rng(1).integers(0, 256, (16, 3), dtype=np.uint8)


def numbered_colours(path: Path) -> None:
    image = Image.frombytes("P", (30, 18), (grey() // 16).tobytes())
    image.putpalette(COLOURS.flatten().tolist())
    image.save(path)


def inks(path: Path) -> None:
    """Cyan, magenta, yellow are the complements of red, green, blue; no black."""
    Image.merge("CMYK", [*Image.fromarray(255 - rgb()).split(), Image.new("L", (30, 18), 0)]).save(path)


def turned(path: Path, orientation: int, turns: int) -> None:
    """Stored as the sensor saw it, upright after `turns` quarter turns to the left."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    saved(np.rot90(rgb(), -turns), path, exif=exif)


# name → (what writes the file, the pixels that it shows)
READABLE: dict[str, tuple[Callable[[Path], None], Pixels]] = {
    "plain.png": (partial(saved, rgb()), rgb()),
    "grey.png": (partial(saved, grey()), as_rgb(grey())),
    "rgba.png": (half_transparent, on_white()),
    "cmyk.tiff": (inks, rgb()),
    "deep.png": (partial(saved, grey().astype(np.uint16) * 257), as_rgb(grey())),
    "deep.tiff": (partial(saved, grey().astype(np.uint16) * 257), as_rgb(grey())),
    "palette.png": (numbered_colours, COLOURS[grey() // 16]),
    "palette.gif": (numbered_colours, COLOURS[grey() // 16]),
    "two-tone.png": (partial(saved, grey() > 128), as_rgb((grey() > 128).astype(np.uint8) * 255)),
    "upside-down.png": (partial(turned, orientation=3, turns=2), rgb()),
    "on-its-right.png": (partial(turned, orientation=6, turns=-1), rgb()),
    "on-its-left.png": (partial(turned, orientation=8, turns=1), rgb()),
    "column.png": (partial(saved, rgb(1, 100)), rgb(1, 100)),
    "row.png": (partial(saved, rgb(100, 1)), rgb(100, 1)),
    "dot.png": (partial(saved, rgb(1, 1)), rgb(1, 1)),
}


def corrupt(path: Path) -> None:
    """A byte in the middle of the compressed pixels is another one."""
    saved(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def cut(path: Path) -> None:
    saved(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), path)
    path.write_bytes(path.read_bytes()[:-200])


UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "corrupt.png": (corrupt, "corrupt.png is damaged or truncated .*: get a complete copy, or save it again"),
    "cut.jpg": (cut, "cut.jpg is damaged or truncated .*: get a complete copy, or save it again"),
    "no-picture.jpg": (lambda path: path.write_text("<html>404</html>"), "cannot be decoded as a picture: pass a jpg"),
    "empty.jpg": (Path.touch, "cannot be decoded as a picture: pass a jpg"),
    "absent.jpg": (lambda path: None, "no picture at .*absent.jpg: check the path"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, (write, _) in (READABLE | UNREADABLE).items():
        write(folder / name)
    return folder


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


def labelled(draw: Callable[[], Image.Image], id: int, size: tuple[int, int]) -> Sample:
    """A picture with a dog in all of it."""
    entry = {"category_id": 1, "bbox": [0.0, 0.0, *map(float, size)], "iscrowd": 0}
    return Sample(id, *size, (entry,), (), (), {1: "dog", 2: "cat"}, draw)


def found_labels(model, sample):
    """As chapter 02 counts: which labels each lens retrieves, in how many of the object's tokens."""
    return [
        {"lens": lens, "k": k, "layer": layer, "asked": int(hits.present.sum())}
        | {"object_tokens": int(hits.object_tokens.sum()), "retrieved": int(retrieved.sum())}
        | {"grounded": int(grounded.sum())}
        for (lens, k, _), hits in label_hits(model, [sample], ks=(5, 60)).items()
        for layer, (retrieved, grounded) in enumerate(zip(hits.retrieved, hits.grounded, strict=True))
    ]


def test_a_study_measures_every_readable_picture_and_records_the_others(tiny, folder, tmp_path):
    names = [name for pair in zip(READABLE, [*UNREADABLE] * 3, strict=True) for name in pair]  # good and bad by turns
    files, shown = [], []
    for id, name in enumerate(names):
        if name in READABLE:
            pixels = READABLE[name][1]
            size = pixels.shape[1::-1]
            shown.append(labelled(partial(Image.fromarray, pixels), id, size))
        files.append(labelled(partial(open_picture, folder / name), id, size if name in READABLE else (30, 18)))
    with pytest.warns(UserWarning, match="15 of 30 samples could not be measured.* the first is sample 1: .*corrupt"):
        table = run(found_labels, tiny, files, tmp_path)
    assert_frame_equal(table, run(found_labels, tiny, shown))
    assert len(table) == 15 * 2 * 2 * (tiny.n_layers + 1) and (table["asked"] == 1).all()
    assert 0 < table["retrieved"].mean() < 2 and table["grounded"].sum() > 0
    plain = table[table["id"] == names.index("plain.png")]
    assert (plain["object_tokens"] == 8).all()  # the two rows of cells of the letterboxed 30x18 whose centres it covers
    for entry in table.attrs["failed"]:
        name = names[entry["index"]]
        with pytest.raises(EmbedLensError) as said:
            open_picture(folder / name)
        assert " ".join(str(said.value).split()) in entry["error"]


@pytest.mark.parametrize("batch_size", [None, 3])
def test_memory_that_ends_over_one_picture_ends_no_study(tiny, batch_size):
    def width(model, given):
        if batch_size is None:
            return {"width": given.image.width}
        return [{"width": sample.image.width} for sample in given]

    def too_large():
        raise MemoryError

    samples = [labelled(partial(Image.new, "RGB", (30, 18)), id, (30, 18)) for id in range(5)]
    samples[2] = labelled(too_large, 2, (30, 18))
    with pytest.warns(UserWarning, match="1 of 5 samples could not be measured.* sample 2: .*too little memory"):
        table = run(width, tiny, samples, batch_size=batch_size)
    assert table["id"].tolist() == [0, 1, 3, 4]


# --- a chat template that is none ------------------------------------------------------------------------------------


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


# --- what ends a command ---------------------------------------------------------------------------------------------


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
