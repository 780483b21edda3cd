"""For tests and notebooks alike: no network, no progress bars, and a notebook's numbers compared as numbers."""

import os
import sys
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tests"))  # whatever folder pytest is started in

from notebook_outputs import cell_differences  # noqa: E402

# The kernels that nbval starts inherit these.
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(name, "1")


class Unchecked(PathFinder):
    """Drawing a scene is many small calls, 18 times as slow with their signatures checked: its modules come plain."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return super().find_spec(name, path, target) if name.startswith("embedlens.samples.miniworld") else None


sys.meta_path.insert(0, Unchecked)  # before jaxtyping's, which checks all of embedlens


def pytest_itemcollected(item):
    """A notebook's cell is compared by `cell_differences` where nbval would compare letters."""
    if hasattr(item, "compare_outputs"):
        item.compare_outputs = partial(compare_outputs, item)


def compare_outputs(item, fresh, committed, skip_compare=None):
    item.comparison_traceback = cell_differences(committed, fresh)
    return not item.comparison_traceback
