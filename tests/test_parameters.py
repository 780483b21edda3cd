"""A misspelt parameter or an impossible value stops a notebook in its first cells."""

import datetime
import shutil
from pathlib import Path

import book_build as book
import launch
import papermill
import pytest

from embedlens import EmbedLensError, parameters
from embedlens.parameters import check

ROOT = Path(__file__).parents[1]
DECLARED = 'model: str = "miniature"  # a model\nn_images: int = 4  # pictures\nscale: float = 1.0  # of them'
SOUND = {"model": "miniature", "dataset": "miniworld", "n_images": 4, "seed": 0, "device": "cpu", "dtype": "auto"}
SOUND |= {"quantize": "", "out": ""}


def test_sound_parameters_pass():
    check(SOUND)
    check({**SOUND, "scale": 2}, ["", DECLARED, f"{parameters.INJECTED}\nn_images = 4\nscale = 2"])


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"n_images": 1}, "n_images is 1: pass a whole number of at least 2"),
        ({"n_questions": 4}, "n_questions is 4: pass a whole number of at least 5, one for each kind of question"),
        ({"n_fewer": 4, "n_trained": 5}, "^n_fewer is 4"),
        ({"seed": -1}, "seed is -1: pass a whole number, 0 or more"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"dtype": "int8"}, "dtype is 'int8': pass 'auto' or one of 'float32', 'float16', 'bfloat16'"),
        ({"quantize": 4}, "quantize is 4: pass '4bit' or '8bit', or leave it empty"),
        ({"quantize": "4bit"}, "quantize='4bit' needs a CUDA GPU"),
        ({"model": "no-such-model"}, "no-such-model"),
        ({"model": None}, "model is None: pass a name or a folder"),
        ({"dataset": "imagenet"}, "unknown data set 'imagenet'"),
        ({"scale": 0}, "scale is 0: pass a number above 0"),
        ({"out": str(Path(__file__))}, "is a file: pass a folder"),
        ({"out": datetime.date(2024, 1, 1)}, r"out is datetime.date\(2024, 1, 1\): pass a folder"),
        ({"seed": "x", "n_images": 0}, "n_images is 0.*seed is 'x'"),
    ],
)
def test_an_impossible_value_is_refused_with_what_to_pass(changed, sentence):
    with pytest.raises(EmbedLensError, match=sentence):
        check({**SOUND, **changed})


def test_a_chapter_says_what_it_takes_before_it_starts_and_the_miniature_is_small(tiny_folder, capsys):
    check(SOUND)
    assert capsys.readouterr().out == ""
    check({**SOUND, "model": str(tiny_folder)})
    assert capsys.readouterr().out.startswith("memory: about ")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("n_image", 9, "no parameter 'n_image': this notebook has model, n_images, scale"),
        ("scale", "2", "scale is '2': pass a float"),
        ("model", 2024, "model is 2024: pass a str .papermill keeps a text .* with -r model"),
    ],
)
def test_a_name_or_type_that_the_notebook_does_not_declare_is_refused(name, value, sentence):
    with pytest.raises(EmbedLensError, match=sentence):
        check({**SOUND, name: value}, ["", DECLARED, f"{parameters.INJECTED}\n{name} = {value!r}"])


@pytest.fixture
def typed_notebook(tmp_path):
    from nbformat.v4 import new_code_cell, new_notebook

    cell = new_code_cell(f"{DECLARED}\nloud: bool = False  # or not", metadata={"tags": ["parameters"]})
    cells = [new_code_cell("model: int = 3"), cell]
    book.write(new_notebook(cells=cells, metadata={"kernelspec": book.KERNEL}), tmp_path / "chapter.ipynb")
    return tmp_path / "chapter.ipynb"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("model=2024-01-01", "2024-01-01"),
        ("model=no", "no"),
        ("model=", ""),
        ("model=a: b # 'c' \"d\" [e=f", "a: b # 'c' \"d\" [e=f"),
        ("n_images=010", 10),  # as papermill reads it
        ("scale=1e-3", 0.001),
        ("scale=2", 2.0),
        ("loud=True", True),
    ],
)
def test_a_value_is_read_as_the_type_that_the_notebook_declares(typed_notebook, word, value):
    (read,) = book.parse_parameters([word], [typed_notebook]).values()
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("n_images=2024-01-01", "n_images is '2024-01-01': pass a whole number"),
        ("n_images=1.0", "n_images is '1.0': pass a whole number"),
        ("scale=wide", "scale is 'wide': pass a number"),
        ("loud=2", "loud is '2': pass true or false"),
    ],
)
def test_a_value_that_is_not_written_as_its_type_is_refused(typed_notebook, word, sentence):
    with pytest.raises(EmbedLensError, match=sentence):
        book.parse_parameters([word], [typed_notebook])


@pytest.mark.slow
def test_papermill_itself_stops_at_the_check(tmp_path):
    """That sound parameters pass, every chapter shows: each begins with it."""
    from nbformat.v4 import new_code_cell, new_notebook

    source, target = tmp_path / "chapter.ipynb", tmp_path / "run.ipynb"
    measure = new_code_cell("from pathlib import Path\nPath('measured').touch()")
    cells = [new_code_cell(DECLARED, metadata={"tags": ["parameters"]}), measure]
    notebook = new_notebook(cells=cells, metadata={"kernelspec": book.KERNEL})
    launch.begin(notebook)
    book.write(notebook, source)
    run = {"cwd": str(tmp_path), "progress_bar": False, "kernel_name": "python3"}
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="no parameter 'n_image'"):
        papermill.execute_notebook(str(source), str(target), parameters={"n_image": 9}, **run)
    assert not (tmp_path / "measured").exists()


@pytest.mark.parametrize("page", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda page: page.stem)
def test_help_notebook_gives_every_parameter_a_type_and_a_meaning(page, tmp_path):
    shutil.copy(page, tmp_path)
    for name, entry in papermill.inspect_notebook(str(tmp_path / page.name)).items():
        assert entry["inferred_type_name"] in parameters.TYPES, name
        assert len(entry["help"]) > 5 and parameters.rule_of(name), name
