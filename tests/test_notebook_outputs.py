"""A notebook that ran elsewhere is the same if its words are and its numbers nearly are."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_outputs import cell_differences, differences, same

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.relative_to(ROOT) for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize(
    "committed, fresh",
    [
        ("0.0002043", "0.0002044"),
        ("35 % (34–36), n = 150", "36 % (34–37), n = 151"),
        ("share 0.46 (0.45 to 0.48)", "share   0.47\n(0.45 to 0.47)"),
        ("−0.01 points", "+0.01 points"),
        ("12,345 tokens", "12,400 tokens"),
        ("8.9e-03", "9.1e-03"),
        ("0.370 0.93", "0.368 0.9302"),
        ("took 18 s on 2026-11-28", "took 2 min 3 s on 2027-01-01"),
        ("wrote /home/a/b/results/x.json", "wrote /srv/results/x.json"),
    ],
)
def test_another_processors_last_digits_are_the_same(committed, fresh):
    assert same(committed, fresh) and same(fresh, committed)


@pytest.mark.parametrize(
    "committed, fresh",
    [
        ("0.500", "0.515"),  # 3 %
        ("n = 150", "n = 154"),
        ("1,200 tokens", "1,236 tokens"),
        ("8.90e-03", "8.90e-04"),
        ("-0.05 points", "0.05 points"),
        ("−0.05 points", "0.05 points"),
        ("0.46 (0.45 to 0.48)", "0.46 (0.45 to 0.51)"),
        ("E31 holds", "E31 does not hold"),
        ("True", "False"),
        ("E40 holds", "E41 holds"),
        ("MLP-1/2", "MLP-1/3"),
        ("top-5", "top-4"),
        ("grid 8x8", "grid 8x9"),
        ("·0.25", "·0.26"),
        ("largest at layer 3", "largest at layer 4"),
        ("above 0 at layers 0, 1, 6 and 7", "above 0 at layers 0, 1, 6 and 8"),
        ("nearest to 'many' (id 416)", "nearest to 'many' (id 417)"),
        ("5 %", "5"),
        ("one line", "one line more"),
        ("0.3", "–"),
    ],
)
def test_a_changed_result_is_a_difference(committed, fresh):
    assert not same(committed, fresh) and not same(fresh, committed)


def table(rows, header="<th>layer</th><th>share</th><th>verdict</th>"):
    body = "".join(f"<tr><th>{layer}</th><td>{share}</td><td>{word}</td></tr>" for layer, share, word in rows)
    html = f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
    return new_output("display_data", {"text/html": html, "text/plain": "a frame"})


ROWS = [(2, "0.370", "holds"), (3, "0.410", "partly"), (4, "0.52 (0.50 to 0.54)", "holds")]


def test_a_tables_values_are_near_and_its_names_equal():
    committed = [table(ROWS)]
    assert cell_differences(committed, [table([(2, "0.372", "holds"), *ROWS[1:]])]) == []
    for changed in (
        table(ROWS[:-1]),
        table([*ROWS[:-1], ROWS[-1], ROWS[-1]]),
        table([(1, *ROWS[0][1:]), *ROWS[1:]]),
        table([(2, "0.381", "holds"), *ROWS[1:]]),
        table([(2, "0.370", "partly"), *ROWS[1:]]),
        table(ROWS, header="<th>layer</th><th>part</th><th>verdict</th>"),
    ):
        assert cell_differences(committed, [changed])
    (difference,) = cell_differences(committed, [table([(2, "0.381", "holds"), *ROWS[1:]])])
    assert "(2) share" in difference and "0.370" in difference and "0.381" in difference


def glued(name, value):
    return new_output(
        "display_data",
        {"application/papermill.record/text/plain": repr(value)},
        metadata={"scrapbook": {"name": name, "mime_prefix": "application/papermill.record/"}},
    )


@pytest.mark.parametrize(
    "name, committed, fresh, equal",
    [
        ("rise", 0.0002043, 0.0002044, True),
        ("share", 0.5, 0.5002, True),  # glue rounds to four digits: 0.5 is 0.5000
        ("share", 0.5, 0.6, False),
        ("share", 0.5, 0.515, False),
        ("lead", 0.02, -0.02, False),
        ("n_pictures", 150, 151, True),
        ("last_layer", 5, 6, False),
        ("e31_verdict", "holds", "partly", False),
        ("sentence", "C0 takes 39 % of it.", "C0 takes 40 % of it.", True),
    ],
)
def test_a_glued_value_is_compared_by_the_digits_that_glue_keeps(name, committed, fresh, equal):
    assert (cell_differences([glued(name, committed)], [glued(name, fresh)]) == []) is equal
    assert cell_differences([glued(name, committed)], [glued(f"{name}_other", committed)])


def test_that_there_is_a_figure_is_compared_and_what_a_library_says_on_stderr_is_not():
    def figure(png):
        return new_output("display_data", {"image/png": png, "text/plain": "<Figure size 816x456 with 1 Axes>"})

    complaint = new_output("stream", name="stderr", text="Matplotlib created a temporary cache directory")
    assert cell_differences([figure("aaaa")], [complaint, figure("bbbb")]) == []
    assert cell_differences([figure("aaaa")], []) and cell_differences([], [figure("aaaa")])
    one, wrapped, less = (
        [new_output("stream", name="stdout", text=text)]
        for text in ("layer 1 0.50\nlayer 2 0.60\n", "layer 1  0.50 layer\n2 0.60\n", "layer 1 0.50\n")
    )
    assert cell_differences(one, wrapped) == [] and cell_differences(one, less)


def test_a_difference_names_its_cell_and_both_values():
    def notebook(printed):
        cell = new_code_cell("print(share)", execution_count=1)
        cell.outputs = [new_output("stream", name="stdout", text=printed)]
        return new_notebook(cells=[new_markdown_cell("# Title"), cell])

    assert differences(notebook("share 0.46\n"), notebook("share 0.47\n")) == []
    (difference,) = differences(notebook("share 0.46\n"), notebook("share 0.56\n"))
    assert difference == "cell 1: printed: 'share 0.46' is now 'share 0.56'"
    assert differences(notebook("share 0.46\n"), new_notebook(cells=[]))


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_a_committed_notebook_is_itself_and_not_with_any_one_output_gone(page):
    notebook = nbformat.read(ROOT / page, as_version=4)
    assert differences(notebook, notebook) == []
    for number, cell in enumerate(notebook.cells):
        if cell.get("outputs"):
            less = copy.deepcopy(cell.outputs)[:-1]
            assert cell_differences(cell.outputs, less), number


DISPLAY = "from IPython.display import display; display({}, raw=True)"


@pytest.mark.slow
def test_plain_pytest_nbval_compares_so_wherever_it_is_started(tmp_path):
    repository = tmp_path / "repository"
    (repository / "notebooks").mkdir(parents=True)
    (repository / "tests").mkdir()
    for name in ("conftest.py", "pyproject.toml", "tests/notebook_outputs.py", "tests/typechecker.py"):
        shutil.copy(ROOT / name, repository / name)

    def stdout(text):
        return [new_output("stream", name="stdout", text=text)]

    cells = [
        ("print(0.0002044, 'holds')", stdout("0.0002043 holds\n"), True),
        ("import sys; print('a cache', file=sys.stderr)", [], True),
        ("print('share 0.515')", stdout("share 0.500\n"), False),
        ("print('E31 holds')", stdout("E31 does not hold\n"), False),
        ("print('rise -0.05')", stdout("rise 0.05\n"), False),
        (DISPLAY.format(dict(table(ROWS[:-1]).data)), [table(ROWS)], False),
        (DISPLAY.format(dict(table(ROWS).data)), [table(ROWS)], True),
    ]
    notebook = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for count, (source, outputs, _) in enumerate(cells, 1):
        notebook.cells.append(new_code_cell(source, execution_count=count, outputs=outputs))
    nbformat.write(notebook, repository / "notebooks/one.ipynb")

    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "--nbval", "repository/notebooks"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    failed = {int(number) for number in re.findall(r"^FAILED .*one\.ipynb::Cell (\d+)", ran.stdout, re.M)}
    assert failed == {number for number, (_, _, passes) in enumerate(cells) if not passes}, ran.stdout + ran.stderr
    assert "0.500" in ran.stdout and "0.515" in ran.stdout
