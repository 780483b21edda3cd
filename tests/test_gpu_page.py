"""Released models: every example has a size of its own class, and the page "Run it on a GPU" says what is so."""

import re
from pathlib import Path

import book_build as book
import torch
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from embedlens.__main__ import app
from embedlens.families import FAMILIES
from embedlens.memory import configs, needed, sizes

PAGE = (Path(__file__).parents[1] / "book/gpu.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"<!-- memory: .*? -->\n(.*?)\n<!-- end -->", re.S)


def test_every_example_of_a_family_is_a_model_of_its_class_and_of_the_size_that_its_name_says():
    """A tower comes on top of the language model that a name usually counts; names are round."""
    known = configs()
    assert list(known) == sizes().index.tolist()
    assert set(known) == {name for family in FAMILIES for name in family.EXAMPLES}
    for name, config in known.items():
        (family,) = [family for family in FAMILIES if name in family.EXAMPLES]
        with torch.device("meta"):
            assert type(AutoModelForImageTextToText.from_config(config)).__name__ in family.CLASSES
        found = re.search(r"([\d.]+)([bm])\b", name.lower())
        said = float(found[1]) / {"b": 1, "m": 1000}[found[2]] if found else 0
        assert said * 0.9 < needed(config).parameters / 1e9 < said * 1.2 + 0.4, name


def test_the_table_of_memory_is_what_the_function_gives():
    table = sizes().reset_index()
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    assert BLOCK.search(PAGE)[1].strip() == "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_notebook_commands_name_parameters_that_exist():
    text = PAGE.replace("\\\n", " ")
    runs = [line for line in text.splitlines() if line.startswith("papermill notebooks/")]
    assert any("-p quantize 4bit" in line for line in runs)
    for line in runs:
        declared = book.declared_parameters(Path(__file__).parents[1] / line.split()[1])
        assert set(re.findall(r"-p (\w+)", line)) <= set(declared)


def test_the_flags_on_the_page_exist():
    said = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200"}).output
    lines = [line for line in PAGE.replace("\\\n", " ").splitlines() if "embedlens run " in line]
    flags = {flag for line in lines for flag in re.findall(r"(?<= )--?[a-z][a-z-]*", line.split("embedlens run ")[1])}
    assert {"--model", "--dataset", "-n"} <= flags
    assert not [flag for flag in flags if flag not in said]
