"""What the README, the Makefile and the package metadata promise to a reader with a fresh clone."""

import ast
import re
import sys
from pathlib import Path

import book_build as book
import jaxtyping
import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.version import Version
from typer.main import get_command

from embedlens.__main__ import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
INTRO = (ROOT / "book/intro.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "beautifulsoup4": "bs4", "scikit-learn": "sklearn"}


def locked():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {pin.name.lower().replace("_", "-"): next(iter(pin.specifier)) for pin in pins}


def requirements(*extras):
    named = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [Requirement(line) for line in named if not line.startswith("embedlens[")]


def shell_lines(text):
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_the_lock_pins_all_that_the_package_and_its_extras_ask_for_and_none_from_one_machine():
    pins = locked()
    assert {"setuptools", "wheel"} <= set(pins)  # to build the package without the network
    for name, pin in pins.items():
        assert pin.operator == "==", name
        assert Version(pin.version).local is None, f"{name} is a local build: a fresh clone cannot install it"
    for requirement in requirements("book", "test"):
        pin = pins[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(pin.version), f"{requirement} is not met by the lock"


ASKED = {"src": ("book", "benchmarks"), "benchmarks": (), "training": ("book",), "book": ("book",)}


@pytest.mark.parametrize(("folder", "extras"), [*ASKED.items(), ("tests", ("test", "book"))])
def test_every_import_is_a_declared_dependency(folder, extras):
    known = {IMPORTED_AS.get(r.name, r.name.replace("-", "_")) for r in requirements(*extras)}
    known |= set(sys.stdlib_module_names) | {"embedlens", "training", "benchmarks", "packaging", "IPython"}
    known |= {"myst_nb", "sphinx"}  # of jupyter-book
    known |= {path.stem for tools in ("tests", "book/_tools") for path in (ROOT / tools).glob("*.py")}
    unknown = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                if name.split(".")[0] not in known:
                    unknown.setdefault(name.split(".")[0], path.name)
    assert not unknown, f"imported but not declared in pyproject.toml: {unknown}"


@pytest.mark.parametrize("line", sorted({*shell_lines(README), *shell_lines(INTRO)}))
def test_every_command_we_show_exists(line):
    words = line.removeprefix(".venv/bin/").split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"no target {words[1]}"
    elif words[0] == "embedlens":
        command = get_command(app).commands[words[1]]
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words[2:] if word.startswith("-")} <= options
        for name in re.findall(r"-p (\w+)=", line):
            chosen = book.chapters(ROOT, [words[2]])
            assert name in book.declared_parameters(ROOT / chosen[0])
    else:
        raise AssertionError(f"unknown kind of command: {line}")


def test_the_names_of_make_targets_in_prose_exist():
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make (\w+)`", README + INTRO)) <= targets


def test_the_readmes_python_runs_as_printed(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_files_that_the_readme_shows_or_links_exist():
    local = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if not target.startswith("http")]
    named = [name for name in re.findall(r"`([\w./-]+)`", README) if name.endswith(("/", ".cff")) and name[0] != "."]
    missing = [name for name in local + named if not (ROOT / name).exists()]
    assert not missing


def test_signatures_are_checked_while_tests_run():
    with pytest.raises(jaxtyping.TypeCheckError):
        book.find_root(3)
