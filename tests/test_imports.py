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
FLOORS = {"errors": -1, "intervals": 0, "pictures": -0.5, "patches": 0, "words": 0, "samples": 0}
FLOORS |= {"families": 1, "vlm": 1.5, "lenses": 2, "tracing": 2, "interventions": 2}
FLOORS |= {"clusters": 3, "hubs": 3, "labels": 3, "tasks": 3, "claims": 4, "figures": 5, "probe": 6, "card": 6}
FLOORS |= {"study": 4}
FLOORS |= {"printed": 0, "paired": 3.2, "sweep": 3.8}
FLOORS |= {"consistency": 3.7, "readout": 3.7}
FLOORS |= {"sinks": 3.7, "sinkhood": 6, "sink_removal": 6.5}
FLOORS |= {"groups": 3.5, "released": 3}
FLOORS |= {"prefix": 2.5}
FLOORS |= {"norms": 3.7}
FLOORS |= {"questionnaires": 3.1, "emptiness": 6, "controls": 6.2}
FLOORS |= {"redundancy": 3, "codebook": 3.1, "pruners": 3.7, "orderings": 6, "shootout": 6.5}
FLOORS |= {"trajectories": 3.7, "late_entry": 3.8}
FLOORS |= {"memory": 2, "other_models": 6, "studies": 6.5, "parameters": 2, "address": -1, "launch": 1}
FLOORS |= {"lmms": 4, "lmms_model": 5, "sizes": 3.5}
FLOORS |= {"decoupling": 6, "decoupling_figures": 6.5}
FLOORS |= {"book": 0, "scenes": 7, "page": 7, "grounding": 6, "lengths": 6}
FLOORS |= {"one_patch": 7, "colour_sources": 6, "recurrence": 6, "census": 6}
FLOORS |= {"retrieval": 6, "hub_words": 6}


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
    imported = {
        node.module.split(".")[1]
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("embedlens.")
    }
    for other in imported - {module}:
        assert FLOORS[other] < FLOORS[module], f"{module} imports {other}"
