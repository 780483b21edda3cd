"""The rules of the book: each passes a sound page and catches the fault it exists for."""

import base64
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import book_build as book
import book_rules
import book_runs
import nbformat
import notebook_files
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pandas.testing import assert_frame_equal
from PIL import Image

from embedlens import EmbedLensError, samples
from embedlens.book import printable

ROOT = Path(__file__).parents[1]
PARAMETERS = "n_images: int = 4  # pictures to measure on\nseed: int = 0  # of the draw"


def glue_output(key):
    data = {"application/papermill.record/text/plain": "0.5"}
    return new_output("display_data", data, metadata={"scrapbook": {"name": key}})


def ran(*sources, outputs=()):
    """A notebook of code cells that were run in order; `outputs` belong to the last."""
    cells = [new_code_cell(source, execution_count=number) for number, source in enumerate(sources, start=1)]
    if cells:
        cells[-1]["outputs"] = list(outputs)
    return book.cleaned(new_notebook(cells=cells))


@pytest.fixture
def checkout(tmp_path):
    """A book of a front page and two short notebooks, with this book's own configuration and style."""
    root = tmp_path / "ein Büchlein"
    root.mkdir()
    for name in ("_config.yml", "book"):
        source = ROOT / name
        shutil.copytree(source, root / name) if source.is_dir() else shutil.copy(source, root / name)
    (root / "_toc.yml").write_text(
        "format: jb-book\nroot: book/intro\nchapters:\n- file: notebooks/01_first\n- file: notebooks/02_second\n"
    )
    (root / "book/intro.md").write_text("# Front\n\nIt counts {glue:text}`../notebooks/01_first.ipynb::n:d`.\n")
    (root / "notebooks").mkdir()
    words = new_markdown_cell("# First\n\nIt measures {glue:text}`n` pictures: {glue:text}`share:.0%`, $x^2$.")
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    measure = new_code_cell("from embedlens.book import glue\nglue('n', n_images)\nglue('share', n_images / 8)")
    kernel = {"metadata": {"kernelspec": book.KERNEL}}
    first = new_notebook(cells=[words, parameters, measure], **kernel)
    second = new_notebook(cells=[new_markdown_cell("# Second"), new_code_cell("print('ran')")], **kernel)
    nbformat.write(first, root / "notebooks/01_first.ipynb")
    nbformat.write(second, root / "notebooks/02_second.ipynb")
    return root


def rewrite(path, edit):
    notebook = book.read(path)
    edit(notebook)
    book.write(notebook, path)


def quiet(_line):
    pass


# What is glued


@pytest.mark.parametrize(
    ("value", "expected"),
    [(np.float64(0.123456), 0.1235), (np.int64(7), 7), (True, True), ("cat", "cat"), (123456.78, 123457.0), (0.0, 0.0)],
)
def test_glue_hands_on_plain_rounded_values(value, expected):
    handed_on = printable("share", value)
    assert handed_on == expected
    assert type(handed_on) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        *(("share", value, "share") for value in (None, "", float("nan"), float("inf"), np.float32("nan"))),
        ("share", np.zeros(3), "one value"),
        ("share:alive", 1, "letters, digits and underscores"),
    ],
)
def test_glue_refuses_what_would_leave_a_hole(key, value, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        printable(key, value)


# What a notebook may look like


def not_in_order(notebook):
    for cell, count in zip(notebook["cells"], (2, 1), strict=True):
        cell["execution_count"] = count


RAISED = new_output("error", ename="ZeroDivisionError", evalue="by zero")
BANNER = new_markdown_cell("", metadata={"tags": ["papermill-error-cell-tag"]})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda n: n["cells"][1].update(outputs=[RAISED]), "Zero"),
        (lambda n: n["cells"].insert(0, BANNER), "banner"),
        (not_in_order, "top to bottom"),
        (lambda n: n["cells"][1].update(execution_count=None), "top to bottom"),
    ],
)
def test_a_notebook_that_raised_or_was_not_run_in_order_is_a_fault(edit, said):
    notebook = ran("x = 1", "x", outputs=[new_output("stream", name="stdout", text="1")])
    assert book_rules.run_faults(notebook, "a.ipynb") == []
    assert book_rules.metadata_faults(notebook, "a.ipynb", machine=["/home/someone"]) == []
    edit(notebook)
    assert said in book_rules.run_faults(notebook, "a.ipynb")[0]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda n: n["metadata"].update(papermill={"duration": 1.5}), "papermill"),
        (lambda n: n["metadata"]["language_info"].update(version="3.11.7"), "language_info.version"),
        (lambda n: n["metadata"]["kernelspec"].update(name="conda-env-x"), "kernel"),
        (lambda n: n["cells"][0]["metadata"].update(execution={"iopub": "2026"}), "cell execution"),
        (lambda n: n["cells"][0]["metadata"].update(tags=["injected-parameters"]), "other parameters"),
        (lambda n: n["cells"][0].update(outputs=[new_output("stream", text="saved to /home/someone/x.png")]), "path"),
    ],
)
def test_traces_of_one_run_or_machine_are_a_fault_and_cleaning_removes_metadata(edit, said):
    notebook = ran("1")
    edit(notebook)
    assert any(said in fault for fault in book_rules.metadata_faults(notebook, "a.ipynb", machine=["/home/someone"]))
    if said not in ("path", "other parameters"):
        assert book_rules.metadata_faults(book.cleaned(notebook), "a.ipynb", machine=["/home/someone"]) == []


def encoded(pixels):
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def test_a_figure_is_kept_in_fewer_bytes_and_looks_the_same():
    ramp = np.linspace(0, 255, 200).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 9, (200, 200, 4)).astype(np.uint8)
    pixels = np.stack([np.tile(ramp, (200, 1)), np.tile(ramp[:, None], (1, 200))] * 2, 2) // 2 + noise
    pixels[..., 3] = 255
    figure = encoded(pixels)
    light = notebook_files.lighter(figure)
    assert len(light) < len(figure) / 2
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(light))).convert("RGB")).astype(int)
    assert np.abs(seen - pixels[..., :3]).mean() < 6
    assert notebook_files.lighter(light) == light
    clear = encoded(np.zeros((8, 8, 4), np.uint8))
    assert notebook_files.lighter(clear) == clear  # see-through parts would be lost
    output = new_output("display_data", data={"image/png": figure, "text/plain": "a figure"})
    cell = book.cleaned(new_notebook(cells=[new_code_cell("figure", outputs=[output])]))["cells"][0]
    assert cell["outputs"][0]["data"] == {"image/png": light, "text/plain": "a figure"}


# Glued keys


def glue_book(tmp_path, prose, keys, front=""):
    (tmp_path / "front.md").write_text(f"# Front\n\n{front}\n")
    notebook = ran("measure()", outputs=[glue_output(key) for key in keys])
    notebook["cells"].insert(0, new_markdown_cell(prose))
    book.write(notebook, tmp_path / "a.ipynb")
    return book_rules.glue_faults(tmp_path, [Path("front.md"), Path("a.ipynb")])


def test_every_way_to_refer_to_a_key_is_seen(tmp_path):
    prose = "{glue:text}`one:.1%` {glue}`two`\n\n```{glue:figure} three\n:alt: words\n```\n\n:::{glue} four\n:::\n"
    front = "{glue:text}`a.ipynb::five:.2f`\n\n```{glue} six\n:doc: a.ipynb\n```\n"
    assert glue_book(tmp_path, prose, ["one", "two", "three", "four", "five", "six"], front) == []
    assert glue_book(tmp_path, "```md\n{glue:text}`one`\n```\n", []) == []  # shown as code


@pytest.mark.parametrize(
    ("prose", "keys", "front", "said"),
    [
        ("{glue:text}`recal`", ["recall"], "{glue:text}`a.ipynb::recall:.2f`", "hole"),
        ("", ["recall"], "", "no page uses"),
        ("", ["recall"], "{glue:text}`a.ipynb::recall`", "needs a format"),
        ("{glue:text}`recall`", ["recall", "recall"], "", "twice"),
        ("{glue:text}`recall`", ["recall"], "{glue:text}`b.ipynb::recall:s`", "b.ipynb does not glue"),
        ("{glue:text}`recall`", ["recall"], "{glue:text}`recall`", "front.md does not glue"),
    ],
)
def test_missing_unused_and_repeated_keys_are_faults(tmp_path, prose, keys, front, said):
    assert any(said in fault for fault in glue_book(tmp_path, prose, keys, front))


# What a page may hold


@pytest.mark.parametrize("alt", ["", ' alt=""', ' alt="../_images/3f2a.png"', ' alt="  "'])
def test_an_image_that_cannot_be_read_out_is_a_fault(alt):
    assert "no alt text" in book_rules.image_faults(f'<p><img src="../_images/3f2a.png"{alt}></p>', "a.html")[0]
    assert book_rules.image_faults('<img src="_images/3f2a.png" alt="recall by layer, rising">', "a.html") == []


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="https://cdn.example/x.css">',
        '<img alt="a" src="a.png" srcset="a.png 1x, https://cdn.example/x.png 2x">',
        '<iframe src="//cdn.example/"></iframe>',
        "<style>@import 'https://cdn.example/x.css';</style>",
        '<div style="background: url(https://cdn.example/x.png)"></div>',
        '<script type="module">import x from "https://cdn.example/x.js"</script>',
        "<script>s.src = 'https://cdn.example/x.js'</script>",
        "<script>fetch('https://cdn.example/x.json')</script>",
    ],
)
def test_a_request_to_elsewhere_is_a_fault(html):
    assert "cdn.example" in book_rules.request_faults(html, "a.html")[0]


def test_links_for_readers_and_local_files_are_no_requests_and_all_of_a_folder_is_read(tmp_path):
    html = (
        '<a href="https://arxiv.org/abs/2603.00510">paper</a><link rel="canonical" href="https://book.example/a.html">'
        '<script src="../_static/x.js"></script><script>const LATER = "https://cdn.example/on-click.js"</script>'
    )
    assert book_rules.request_faults(html, "a.html") == []
    font = "@font-face {src: url('https://cdn.example/x.woff2')}"
    for name, text in (("_static/a.css", font), ("deep/a.html", "<img src='a'>")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    assert [fault.split(":")[0] for fault in book_rules.html_faults(tmp_path)] == ["deep/a.html", "_static/a.css"]


# Choosing and running


def test_pages_come_in_the_order_of_the_contents_and_are_picked_by_number_name_or_path(checkout):
    assert [page.name for page in book.pages(checkout)] == ["intro.md", "01_first.ipynb", "02_second.ipynb"]
    for name in ("02", "02_second", "notebooks/02_second.ipynb"):
        assert [page.stem for page in book.chapters(checkout, [name])] == ["02_second"]
    with pytest.raises(book.BookError, match="choose from 01_first, 02_second"):
        book.chapters(checkout, ["03"])
    (checkout / "notebooks/02_second.ipynb").unlink()
    with pytest.raises(book.BookError, match="02_second"):
        book.pages(checkout)


def test_a_parameter_that_no_notebook_has_or_that_is_malformed_is_refused(checkout):
    with pytest.raises(book.BookError, match=r"'n_imgs'.*choose from n_images, seed"):
        book.build(parameters={"n_imgs": 2}, root=checkout, say=quiet)
    for word in ("n_images", "=3", "n images=3"):
        with pytest.raises(book.BookError, match="-p "):
            book.parse_parameters([word])
    with pytest.raises(EmbedLensError, match="checkout"):
        book.find_root(checkout.parent)


@pytest.mark.slow
def test_building_runs_renders_and_leaves_the_sources_alone(checkout):
    config = (checkout / "_config.yml").read_text().replace('url: ""', "url: https://github.com/owner/name")
    (checkout / "_config.yml").write_text(config.replace("buttons: {}", "buttons:").replace("\n#  ", "\n  "))
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    front = book.build(parameters={"n_images": 6}, root=checkout, say=quiet)
    assert front.is_file()
    assert {path: path.read_bytes() for path in before} == before

    page = (checkout / "_build/html/notebooks/01_first.html").read_text()
    # 6 of 8: the parameter arrived, the number is in its sentence
    assert '<span class="pasted-text">75\u00a0%</span>' in page
    assert '<span class="pasted-text">6</span>' in (checkout / "_build/html/book/intro.html").read_text()
    assert "_static/mathjax/tex-mml-chtml.js" in page  # mathematics without the network
    assert "colab.research.google.com/github/owner/name/blob/main/notebooks/01_first.ipynb" in page
    assert "mybinder.org/v2/gh/owner/name/main" in page

    lines = []
    assert book.build(parameters={"n_images": 6}, root=checkout, say=lines.append) == front
    assert not [line for line in lines if line.startswith(("running", "rendering"))]  # nothing has changed

    # A page that Sphinx warns about, or that breaks a rule of the book, does not replace the book that is there.
    gone = "{glue:text}`../notebooks/01_first.ipynb::gone:s`"
    broken = f"# Front\n\n[nowhere](missing.md) {gone} <img src='https://cdn.example/x.png'>\n"
    (checkout / "book/intro.md").write_text(broken)
    for name in ("01_first", "02_second"):
        shutil.copy(checkout / f"_build/src/notebooks/{name}.ipynb", checkout / "notebooks")
    with pytest.raises(book.BookError, match="missing.md") as refusal:
        book.build(execute=False, root=checkout, say=quiet)
    for said in ("'gone', which notebooks/01_first.ipynb does not glue", "no alt text", "loads https://cdn.example"):
        assert said in str(refusal.value)
    assert front.is_file() and page == (checkout / "_build/html/notebooks/01_first.html").read_text()


@pytest.mark.slow
def test_refreshing_writes_clean_notebooks_and_keeps_the_old_one_when_a_cell_raises(checkout):
    book.refresh(root=checkout, say=quiet)
    for page in book.chapters(checkout):
        notebook = book.read(checkout / page)
        assert book_rules.run_faults(notebook, str(page)) == []
        assert book_rules.metadata_faults(notebook, str(page), machine=[str(checkout), sys.prefix]) == []
    assert book_rules.glue_faults(checkout, book.pages(checkout)) == []

    second = checkout / "notebooks/02_second.ipynb"
    rewrite(second, lambda notebook: notebook["cells"][1].update(source="raise RuntimeError('no picture')"))
    before = second.read_bytes()
    with pytest.raises(book.BookError, match=r"02_second.*RuntimeError: no picture"):
        book.refresh(["02"], root=checkout, say=quiet)
    assert second.read_bytes() == before
    assert sorted(path.name for path in second.parent.iterdir()) == ["01_first.ipynb", "02_second.ipynb"]


# The folder of the build


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "out", [".", "..", "src", "notebooks", "notebooks/built", "book", ".git", "thesis", "front.md"]
)
def test_a_build_refuses_a_folder_that_it_did_not_make_and_touches_nothing(checkout, out):
    for name in ("src/work.py", "thesis/src/chapter.tex", "thesis/html/draft.html", ".git/HEAD", "front.md"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("mine")
    before = files(checkout)
    with pytest.raises(book.BookError, match=r"name (a folder|another)|name a --out"):
        book.build(execute=False, out=out, root=checkout, say=quiet)
    assert files(checkout) == before


def test_a_second_build_in_the_same_folder_is_refused_while_the_first_lives(checkout):
    holder = (
        f"import sys, time\nsys.path.append({str(ROOT / 'book/_tools')!r})\n"
        "from book_runs import owned\nfrom pathlib import Path\n"
        "with owned(Path(sys.argv[1]), '_build', ()):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, checkout], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(book.BookError, match="another process builds in"):
            book.executed(checkout, say=quiet)
    finally:
        process.kill()
        process.wait()
    with book_runs.owned(checkout, "_build", ()):  # the lock of a killed process does not block
        pass


def test_a_disk_that_refuses_is_one_sentence(checkout, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device", "_build/runs/01_first")

    monkeypatch.setattr(book_runs, "_keep", full)
    with pytest.raises(book.BookError, match=r"_build/runs/01_first \(No space left on device\): free space"):
        book.executed(checkout, ["01"], say=quiet)


# Runs


def test_only_a_chapter_whose_code_parameters_or_records_changed_runs_again(checkout):
    second, first = checkout / "notebooks/02_second.ipynb", checkout / "notebooks/01_first.ipynb"
    reads = new_code_cell("results: str = '../results'", metadata={"tags": ["parameters"]})
    rewrite(second, lambda n: n["cells"].insert(1, reads))
    record = checkout / "results/miniature/01_first.json"
    writes = "\nfrom pathlib import Path\nPath('../results/miniature/01_first.json').write_text(str(n_images))"
    rewrite(first, lambda n: n["cells"][2].update(source=n["cells"][2]["source"] + writes))
    record.parent.mkdir(parents=True)
    record.write_text("stale")

    def ran(**kwargs):
        lines = []
        runs = book.executed(checkout, say=lines.append, **kwargs)
        return [line.split("/")[1][:2] for line in lines if line.startswith("running")], runs

    names, runs = ran()
    assert names == ["01", "02"]  # the one that reads all records waits for the others
    assert ran() == ([], runs)
    assert (checkout / "_build/src/results/miniature/01_first.json").read_text() == "4"  # a kept run brings its record

    rewrite(first, lambda n: n["cells"][0].update(source="# Other words"))
    assert ran()[0] == []
    assert record.read_text() == "stale"
    rewrite(first, lambda n: n["cells"][1].update(source=PARAMETERS.replace("4", "5", 1)))
    assert ran()[0] == ["01", "02"]  # 02 reads what 01 wrote
    (record.parent / "03_third.json").write_text("new")
    assert ran()[0] == ["02"]


@pytest.mark.parametrize(
    ("device", "free_gb", "expected"),
    [("cpu", 64, (4, 2)), ("cpu", 5, (2, 4)), ("cpu", 1, (1, 8)), ("cuda", 64, (1, 8))],
)
def test_chapters_share_cores_and_memory_and_take_turns_on_a_gpu(monkeypatch, device, free_gb, expected):
    monkeypatch.setattr(book_runs.os, "sched_getaffinity", lambda _pid: range(8), raising=False)
    monkeypatch.setattr(book_runs, "_free_memory", lambda: free_gb << 30)
    assert book_runs.shares([{}, {}, {}, {"device": device}]) == expected


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\nraise RuntimeError('no')", r"cell 1, line 2, `raise RuntimeError.*raises RuntimeError: no"),
        ("import os\nos.kill(os.getpid(), 9)", "its kernel was killed in cell 1; .*--jobs 1"),
        ("import time\ntime.sleep(60)", "cell 1 runs for more than 2 s"),
    ],
)
def test_a_chapter_that_fails_is_named_with_its_cell_and_the_others_are_kept(checkout, monkeypatch, source, said):
    monkeypatch.setattr(book_runs, "CELL_TIMEOUT", 2)
    rewrite(checkout / "notebooks/02_second.ipynb", lambda n: n["cells"][1].update(source=source))
    with pytest.raises(book_runs.ChapterFailed, match=f"02_second.ipynb: {said}") as failure:
        book.executed(checkout, say=quiet)
    assert failure.value.exit_code == 1
    assert (checkout / "_build/runs/02_second/failed.ipynb").is_file()
    lines = []
    book.executed(checkout, ["01"], say=lines.append)
    assert lines == []


def test_ctrl_c_ends_the_kernels_and_is_one_sentence(checkout):
    for name in ("01_first", "02_second"):
        note = f"import os, time\nopen('../../{name}.pid', 'w').write(str(os.getpid()))\ntime.sleep(600)"
        rewrite(checkout / f"notebooks/{name}.ipynb", lambda n, note=note: n["cells"][-1].update(source=note))
    command = [sys.executable, "-m", "embedlens", "book", "--jobs", "2"]
    how = {"cwd": checkout, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (background jobs ignore Ctrl-C)
    process = subprocess.Popen(command, preexec_fn=heard, **how)
    notes = [checkout / f"_build/{name}.pid" for name in ("01_first", "02_second")]
    try:
        wait_for(lambda: all(note.is_file() and note.read_text() for note in notes))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2
    assert said.count("\n") == 1
    assert "stopped: chapters that had ended are kept" in said
    for note in notes:
        wait_for(lambda note=note: not Path(f"/proc/{note.read_text()}").exists(), 20)


def test_kill_9_loses_the_chapters_in_flight_and_no_other(checkout):
    note = checkout / "note"
    for name, then in (("01_first", ""), ("02_second", "\nimport time; time.sleep(600)")):
        code = f"with open({str(note)!r}, 'a') as file: print({name!r}, file=file){then}"
        rewrite(checkout / f"notebooks/{name}.ipynb", lambda n, c=code: n["cells"].append(new_code_cell(c)))
    command = [sys.executable, "-m", "embedlens", "book", "--no-render", "--jobs", "1"]
    with subprocess.Popen(command, cwd=checkout, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        wait_for(lambda: note.is_file() and note.read_text().split()[-1:] == ["02_second"])
        order = note.read_text().split()
        os.killpg(process.pid, signal.SIGKILL)
    rewrite(checkout / "notebooks/02_second.ipynb", lambda n: n["cells"][-1].update(source="print('quick')"))
    note.unlink()
    book.executed(checkout, say=quiet)
    assert order == ["01_first", "02_second"] and not note.exists()  # the lock is free, and what had ended ran once


def wait_for(happened, seconds=120):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_chapter_runs_in_this_python_from_any_path_and_without_a_home(checkout, monkeypatch):
    home = checkout / "home"
    for folder in ("kernels/python3", "runtime"):
        (home / ".local/share/jupyter" / folder).mkdir(parents=True)
    (home / ".local/share/jupyter/kernels/python3/kernel.json").write_text('{"argv": ["/gone/python"]}')
    moved = checkout / "Bücher {und} mehr"
    moved.mkdir()
    for name in ("_config.yml", "_toc.yml", "book", "notebooks"):
        (checkout / name).rename(moved / name)
    where = "import sys\nprint(sys.executable)"
    rewrite(moved / "notebooks/02_second.ipynb", lambda n: n["cells"][1].update(source=where))
    before = files(home)
    home.chmod(0o500)
    monkeypatch.setenv("HOME", str(home))
    runs = book.executed(moved, ["02"], say=quiet)
    (cell,) = (c for c in book.read(runs[Path("notebooks/02_second.ipynb")])["cells"] if c["cell_type"] == "code")
    assert cell["outputs"][0]["text"].strip() == sys.executable
    assert files(home) == before


@pytest.mark.slow
def test_a_chapter_that_was_killed_goes_on_from_what_its_studies_had_measured_and_writes_the_same(checkout, miniature):
    """The chapter is as any other: nothing in it knows of folders, chunks or a kill."""
    calls = checkout.parent / "calls"
    measure = f"""import embedlens as el, os, pathlib, signal
def study(model, batch):
    calls = pathlib.Path({str(calls)!r})
    with calls.open('a') as file:
        file.write(f'{{batch[0].id}} ')
    if len(calls.read_text().split()) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return [{{'mean': float(model.prompt(one.image, 'What?').embeds.mean())}} for one in batch]
table = el.run(study, el.load('miniature', device='cpu'), el.samples.load(n=6), batch_size=2)
print(table.to_json(double_precision=15))"""
    page = checkout / "notebooks/02_second.ipynb"
    rewrite(page, lambda notebook: notebook["cells"][1].update(source=measure))
    with pytest.raises(book_runs.ChapterFailed, match="its kernel was killed in cell"):
        book.executed(checkout, ["02"], say=quiet)
    assert list((checkout / "_build/runs").rglob("*.rows"))

    (done,) = book.executed(checkout, ["02"], say=quiet).values()
    printed = book.read(done)["cells"][1]["outputs"][0]["text"]
    rows = [(one.id, float(miniature.prompt(one.image, "What?").embeds.mean())) for one in samples.load(n=6)]
    assert_frame_equal(pd.read_json(io.StringIO(printed)), pd.DataFrame(rows, columns=["id", "mean"]))
    assert calls.read_text().split() == ["0", "2", "4", "4"]  # the chunk in flight alone was lost
    assert not list((checkout / "_build/runs").rglob("*.rows"))
