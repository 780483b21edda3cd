"""Promises of the package as a whole: it imports fast, its names are there, floors import downwards only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import embedlens

MODULES = ["errors", "pictures", "patches", "families", "vlm", "words", "lenses", "probe", "__main__"]
# The house, lowest floor first: a module imports from floors below, or from one that stands before it on its own.
HOUSE = [
    "errors model_names batches words printed pictures patches stats rules processes interventions",
    "samples families prompts",
    "checks vlm loading",
    "lenses context tracing attention_maps engine cues readings",
    "clusters groups redundancy codebook pruners kept memory study scoring asking prefix tasks arms",
    "sweep paired pruner_arms measures",
    "book records claims figures probe explorer",
    "parameters lmms lmms_model studies",
]
ORDER = [module for floor in HOUSE for module in floor.split()]


def seconds(code: str) -> float:
    """CPU seconds of a fresh interpreter, so that a busy machine does not count."""
    code = f"import time\n{code}\nprint(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


def test_importing_embedlens_takes_next_to_nothing_and_the_whole_package_under_five_seconds():
    assert seconds("import embedlens") < 1
    assert seconds("import " + ", ".join(f"embedlens.{module}" for module in MODULES)) < 5


def test_every_public_name_is_there():
    for name in embedlens.__all__:
        assert getattr(embedlens, name).__name__ == name
        assert name in dir(embedlens)
    assert embedlens.samples.__name__ == "embedlens.samples"
    with pytest.raises(AttributeError, match="no attribute 'Embedlens'; public names are .*EmbedLens"):
        embedlens.Embedlens  # noqa: B018


@pytest.mark.parametrize("module", ORDER)
def test_modules_import_only_from_lower_floors(module):
    folder = Path(embedlens.__file__).parent
    single = folder / f"{module}.py"
    files = [single] if single.is_file() else sorted((folder / module).rglob("*.py"))
    assert files, f"there is no module {module}"
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    sources = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    imported = {node.module.split(".")[1] for node in sources if (node.module or "").startswith("embedlens.")}
    imported |= {alias.name for node in sources if node.module == "embedlens" for alias in node.names} & set(ORDER)
    for other in imported - {module}:
        assert ORDER.index(other) < ORDER.index(module), f"{module} imports {other}"


def test_every_module_has_a_floor():
    folder = Path(embedlens.__file__).parent
    there = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there - {"__init__", "__main__"} == set(ORDER)
