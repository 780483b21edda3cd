"""A notebook's first cell installs what is missing and does nothing elsewhere; buttons appear with the address."""

import os
import re
import subprocess
import sys
from pathlib import Path

import book_build as book
import book_rules
import launch
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]
ADDRESS = "https://github.com/owner/name"


def chapter():
    result = [new_output("execute_result", {"text/plain": "4"}, execution_count=2)]
    cells = [
        new_markdown_cell("# Chapter"),
        new_code_cell("n_images: int = 4  # pictures", metadata={"tags": ["parameters"]}, execution_count=1),
        new_code_cell("n_images", execution_count=2, outputs=result),
    ]
    return book.cleaned(new_notebook(cells=cells))


def test_the_cells_are_written_once_and_the_notebook_stays_sound():
    notebook = chapter()
    assert launch.stated(notebook) is None
    assert launch.begin(notebook, ADDRESS)
    sources = [cell["source"] for cell in notebook["cells"]]
    first = ["# Chapter", "import os", "n_images: int = 4  # pictures", "from embedlens import parameters", "n_images"]
    assert [source.splitlines()[0] for source in sources] == first
    assert "remove-cell" in notebook["cells"][1]["metadata"]["tags"]
    nbformat.validate(notebook)
    assert launch.stated(notebook) == ADDRESS
    assert book_rules.metadata_faults(notebook, "chapter") == []
    again = nbformat.from_dict(notebook)
    assert not launch.begin(again, ADDRESS) and again == notebook
    assert launch.begin(again, "https://github.com/other/name")  # a fork puts its own address there


@pytest.mark.parametrize("address", ["", ADDRESS])
def test_where_the_package_is_there_the_first_cell_does_nothing(address, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it installs what is there"))
    exec(compile(launch.installing(address), "first cell", "exec"), {})


@pytest.mark.parametrize(
    ("address", "inside", "installs"),
    [(ADDRESS, False, f"git+{ADDRESS}"), (ADDRESS, True, ".."), ("", True, ".."), ("", False, None)],
)
def test_where_it_is_missing_it_is_installed_from_the_checkout_or_the_repository(
    address, inside, installs, monkeypatch, tmp_path
):
    called = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: called.append(command))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "notebooks").mkdir()
    if inside:
        (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    code = compile(launch.installing(address), "first cell", "exec")
    if installs is None:
        with pytest.raises(ModuleNotFoundError, match="in a checkout .* or pip install .embedlens.notebook"):
            exec(code, {})
        return
    exec(code, {})
    ((python, *_, what),) = called
    assert python == sys.executable and what in (f"embedlens[notebook] @ {installs}", f"{installs}[notebook]")


def test_with_a_mounted_drive_what_is_measured_is_kept_there(monkeypatch, tmp_path):
    monkeypatch.setenv("EMBEDLENS_ROWS", "")  # so that it is put back as it was
    monkeypatch.delenv("EMBEDLENS_ROWS")
    code = launch.installing(ADDRESS)
    exec(compile(code, "first cell", "exec"), {})
    assert "EMBEDLENS_ROWS" not in os.environ
    drive = tmp_path / "MyDrive"
    drive.mkdir()
    code = code.replace("/content/drive/MyDrive", str(drive))
    exec(compile(code, "first cell", "exec"), {})
    assert os.environ["EMBEDLENS_ROWS"] == str(drive / "embedlens-rows")
    monkeypatch.setenv("EMBEDLENS_ROWS", "mine")
    exec(compile(code, "first cell", "exec"), {})
    assert os.environ["EMBEDLENS_ROWS"] == "mine"


def test_what_a_page_alone_installs_leaves_the_kernel_and_what_builds_the_book_alone():
    """The rest of the extra that builds the book is not needed to run a page: its modules are kept from importing."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = (re.search(rf"^{extra} = \[(.*?)\]", project, re.S | re.M)[1] for extra in ("notebook", "book"))
    own, book_only = (set(re.findall('"([a-z0-9-]+)', each)) for each in lists)
    assert not own & {"ipykernel", "jupyter-client", "jupyter-book", "torch", "transformers", "numpy"}
    brought = {"ipykernel", "jupyter-client", "nbformat", "nbclient"}  # by myst-nb, in whatever version is there
    modules = {"beautifulsoup4": "bs4", "jupyter-book": "jupyter_book"}
    absent = [modules.get(name, name) for name in book_only - own - brought]
    assert "papermill" in absent
    program = f"import sys\nfor name in {absent}: sys.modules[name] = None\n"
    program += "from embedlens import claims, figures, parameters\nfrom embedlens.book import glue\n"
    program += (
        'parameters.check({"n_images": 4}, ["", "n_images: int = 4", "# Parameters\\nn_images = 4"])\nglue("a", 1)'
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_one_setting_says_the_address(tmp_path):
    config = (ROOT / "_config.yml").read_text(encoding="utf-8")
    assert launch.address_of(ROOT) == "" and 'url: ""' in config
    (tmp_path / "_config.yml").write_text(config.replace('url: ""', f"url: {ADDRESS}"))
    assert launch.address_of(tmp_path) == ADDRESS
