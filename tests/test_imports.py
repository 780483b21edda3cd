"""Promises of the package as a whole: it imports fast, its names are there, floors import downwards only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import embedlens

MODULES = ["errors", "pictures", "patches", "families", "vlm", "words", "lenses", "probe", "__main__"]
# Lowest floor first; a module imports only from floors below its own.
FLOORS = {"errors": -1, "stats": 0, "rules": 0, "model_names": -1, "pictures": -0.5}
FLOORS |= {"patches": 0, "words": 0, "samples": 0, "book_rules": -0.3, "book_runs": -0.2, "book": 0, "printed": 0}
FLOORS |= {"families": 1, "launch": 1, "prompts": 1.2, "checks": 1.3, "vlm": 1.5, "loading": 1.6}
FLOORS |= {"memory": 2, "parameters": 3.1, "released": 3, "interventions": 1, "processes": 0}
FLOORS |= {"lenses": 2, "tracing": 2, "cues": 2.2, "engine": 2.1, "prefix": 2.5}
FLOORS |= {"clusters": 3, "tasks": 3, "readings": 2.5, "redundancy": 3, "codebook": 3.1, "paired": 3.2, "kept": 3}
FLOORS |= {"groups": 3.5, "sweep": 3.6, "pruners": 3.7, "pruner_arms": 3.8, "measures": 3.9, "records": 3.95}
FLOORS |= {"claims": 4, "study": 4, "lmms": 4.1, "figures": 5, "lmms_model": 5, "probe": 6, "studies": 6.5}
FLOORS |= {"attention_maps": 2.1, "context": 2.1, "explorer": 6, "book_pages": -0.1}


def seconds(code: str) -> float:
    """CPU seconds of a fresh interpreter, so that a busy machine does not count."""
    code = f"import time\n{code}\nprint(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


def test_import_embedlens_takes_next_to_nothing():
    assert seconds("import embedlens") < 1


def test_the_whole_package_imports_in_under_five_seconds():
    assert seconds("import " + ", ".join(f"embedlens.{module}" for module in MODULES)) < 5


def test_every_public_name_is_there():
    for name in embedlens.__all__:
        assert getattr(embedlens, name).__name__ == name
        assert name in dir(embedlens)
    assert embedlens.samples.__name__ == "embedlens.samples"
    with pytest.raises(AttributeError, match="no attribute 'Embedlens'; public names are .*EmbedLens"):
        embedlens.Embedlens  # noqa: B018


@pytest.mark.parametrize("module", FLOORS)
def test_modules_import_only_from_lower_floors(module):
    folder = Path(embedlens.__file__).parent
    single = folder / f"{module}.py"
    files = [single] if single.is_file() else sorted((folder / module).rglob("*.py"))
    assert files, f"there is no module {module}"
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    sources = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    imported = {node.module.split(".")[1] for node in sources if (node.module or "").startswith("embedlens.")}
    imported |= {alias.name for node in sources if node.module == "embedlens" for alias in node.names} & set(FLOORS)
    for other in imported - {module}:
        assert FLOORS[other] < FLOORS[module], f"{module} imports {other}"


def test_every_module_has_a_floor():
    folder = Path(embedlens.__file__).parent
    there = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there - {"__init__", "__main__"} == set(FLOORS)
