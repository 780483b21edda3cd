"""A notebook's first cell installs what is missing and does nothing elsewhere; buttons appear with the address."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from embedlens import book, book_rules, launch
from embedlens.address import address_of, configured, web_address

ROOT = Path(__file__).parents[1]
ADDRESS = "https://github.com/owner/name"
CONFIG = (ROOT / "_config.yml").read_text(encoding="utf-8")


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
    assert [source.splitlines()[0] for source in sources] == [
        "# Chapter",
        "import importlib.util",
        "n_images: int = 4  # pictures",
        "from embedlens import parameters",
        "n_images",
    ]
    nbformat.validate(notebook)
    assert launch.stated(notebook) == ADDRESS
    assert book.run_faults(notebook, "chapter") + book.metadata_faults(notebook, "chapter") == []
    assert notebook["cells"][-1]["outputs"][0]["execution_count"] == 4
    again = nbformat.from_dict(notebook)
    assert not launch.begin(again, ADDRESS) and again == notebook
    assert launch.begin(again, "https://github.com/other/name")  # a fork puts its own address there


def test_a_notebook_without_parameters_is_given_no_check():
    notebook = book.cleaned(new_notebook(cells=[new_markdown_cell("# Page"), new_code_cell("print(1)")]))
    launch.begin(notebook)
    assert launch.stated(notebook) == ""
    assert [cell["id"] for cell in notebook["cells"]].count(launch.CHECK) == 0
    assert not launch.begin(new_notebook(cells=[new_markdown_cell("# No code")]))


@pytest.mark.parametrize("address", ["", ADDRESS])
def test_where_the_package_is_there_the_first_cell_does_nothing(address, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it installs what is there"))
    exec(compile(launch.installing(address), "first cell", "exec"), {})


@pytest.mark.parametrize(
    ("address", "inside", "installs"),
    [(ADDRESS, False, f"git+{ADDRESS}"), (ADDRESS, True, "file://"), ("", True, "file://"), ("", False, None)],
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
        with pytest.raises(ModuleNotFoundError, match="pip install it from the repository"):
            exec(code, {})
        return
    exec(code, {})
    ((python, *_, what),) = called
    assert python == sys.executable and what.startswith("embedlens[book] @ ") and installs in what


def test_without_an_address_the_configuration_stays_and_shows_no_buttons():
    assert configured(CONFIG, "") == CONFIG
    assert not yaml.safe_load(CONFIG)["launch_buttons"]


def test_with_an_address_colab_and_binder_open_the_page():
    content = yaml.safe_load(configured(CONFIG, ADDRESS))
    assert content["repository"]["url"] == ADDRESS and set(content["launch_buttons"]) == set(launch_buttons())
    assert content["execute"] == yaml.safe_load(CONFIG)["execute"]
    elsewhere = yaml.safe_load(configured(CONFIG, "https://git.example.org/owner/name"))
    assert not elsewhere["launch_buttons"]  # Colab and this Binder link open GitHub


def launch_buttons():
    from embedlens.address import BUTTONS

    return BUTTONS


@pytest.mark.parametrize(
    ("remote", "page"),
    [
        ("https://github.com/owner/name.git", ADDRESS),
        ("git@github.com:owner/name.git", ADDRESS),
        ("ssh://git@github.com:22/owner/name", ADDRESS),
        ("https://user:secret@github.com/owner/name", ADDRESS),
        ("../name", ""),
        ("/srv/git/name.git", ""),
        ("file:///srv/name", ""),
        ("", ""),
    ],
)
def test_a_remote_becomes_the_address_of_its_page_without_secrets(remote, page):
    assert web_address(remote) == page


def test_the_address_is_the_configured_one_or_that_of_origin(tmp_path):
    shutil.copy(ROOT / "_config.yml", tmp_path)
    assert address_of(tmp_path) == ""
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "remote", "add", "origin", "git@github.com:owner/name.git"], cwd=tmp_path, check=True)
    assert address_of(tmp_path) == ADDRESS
    (tmp_path / "_config.yml").write_text("repository:\n  url: https://github.com/other/fork\n")
    assert address_of(tmp_path) == "https://github.com/other/fork"


@pytest.mark.slow
def test_a_rendered_page_has_buttons_that_lead_to_its_notebook(tmp_path):
    (tmp_path / "_config.yml").write_text(configured(CONFIG, ADDRESS))
    shutil.copytree(ROOT / "book", tmp_path / "book")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/intro\nchapters:\n- file: notebooks/01_first\n")
    (tmp_path / "book/intro.md").write_text("# Front\n")
    (tmp_path / "notebooks").mkdir()
    notebook = chapter()
    launch.begin(notebook, ADDRESS)
    book.write(notebook, tmp_path / "notebooks/01_first.ipynb")
    page = (book.render(tmp_path, tmp_path / "work", tmp_path / "home") / "notebooks/01_first.html").read_text()
    assert "colab.research.google.com/github/owner/name/blob/main/notebooks/01_first.ipynb" in page
    assert "mybinder.org/v2/gh/owner/name/main" in page
    assert "importlib.util" not in page  # the first cell is not shown
    assert book_rules.request_faults(page, "01_first") == []
