"""The page "Run it on a GPU": its estimates are those of the function it names, its commands exist."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embedlens import book, sizes
from embedlens.__main__ import app

PAGE = (Path(__file__).parents[1] / "book/gpu.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"<!-- memory: .*? -->\n(.*?)\n<!-- end -->", re.S)


def test_the_table_of_memory_is_what_the_function_gives():
    assert BLOCK.search(PAGE)[1].strip() == sizes.markdown()


def test_the_notebook_commands_name_parameters_that_exist():
    text = PAGE.replace("\\\n", " ")
    runs = [line for line in text.splitlines() if line.startswith("papermill notebooks/")]
    assert any("-p quantize 4bit" in line for line in runs)
    for line in runs:
        declared = book.declared_parameters(Path(__file__).parents[1] / line.split()[1])
        assert set(re.findall(r"-p (\w+)", line)) <= set(declared)


def test_the_page_says_that_nothing_was_measured():
    assert "No number on this page was measured on a GPU" in PAGE
    assert "more than one GPU has not been tried here" in " ".join(PAGE.split())


@pytest.mark.parametrize("command", ["run"])
def test_the_flags_on_the_page_exist(command):
    said = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    lines = [line for line in PAGE.replace("\\\n", " ").splitlines() if f"embedlens {command} " in line]
    flags = {
        flag for line in lines for flag in re.findall(r"(?<= )--?[a-z][a-z-]*", line.split(f"embedlens {command} ")[1])
    }
    assert {"--model", "--dataset", "-n"} <= flags
    assert not [flag for flag in flags if flag not in said]
