"""Models for the tests: a random one built here, and the shipped miniature."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests import tiny_llava by name, whatever runs them

from tiny_llava import save_tiny_llava  # noqa: E402


def pytest_collection_finish() -> None:
    """Half a million imported objects stay to the end: collecting garbage need not look through them every time."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A checkpoint folder of a random LLaVA with 4x4 patches. Read only: copy it before changing files."""
    return save_tiny_llava(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The random LLaVA, wrapped; letterbox, float32, CPU."""
    from embedlens import load

    return load(tiny_folder, device="cpu")


@pytest.fixture(scope="session")
def twin_of(tmp_path_factory):
    """Repository id → (folder, model) of its twin, written and loaded once a process. Read only."""
    from twins import save_twin

    from embedlens import load

    @cache
    def made(name: str):
        folder = save_twin(tmp_path_factory.mktemp("twins") / name, name)
        return folder, load(folder, device="cpu")

    return made


@pytest.fixture(scope="session")
def miniature():
    """The shipped miniature. A missing one is a failure, never a skip."""
    from embedlens import load

    return load("miniature", device="cpu")


@pytest.fixture(scope="session")
def pictures():
    """Six pictures of the miniature world. Read only."""
    from embedlens import samples

    return list(samples.load("miniworld", n=6))


@pytest.fixture(autouse=True)
def own_figures():
    """A test's figures and its style are its own: others see matplotlib as it comes."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        import matplotlib
        from matplotlib import pyplot

        pyplot.close("all")
        matplotlib.rcdefaults()


@contextmanager
def little_memory(beside: int = 0, extra: int = 300 * 10**6) -> Iterator[None]:
    """A block in which the process may grow by so many bytes, and by what a picture takes that is decoded `beside`."""
    if not sys.platform.startswith("linux"):
        pytest.skip("address space is limited on Linux only")
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + beside + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
