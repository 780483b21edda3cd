"""For tests and notebooks alike: no network, no progress bars, and a notebook's numbers compared as numbers."""

import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tests"))  # whatever folder pytest is started in

from notebook_outputs import cell_differences  # noqa: E402

# The kernels that nbval starts inherit these.
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(name, "1")


def pytest_itemcollected(item):
    """A notebook's cell is compared by `cell_differences` where nbval would compare letters."""
    if hasattr(item, "compare_outputs"):
        item.compare_outputs = partial(compare_outputs, item)


def compare_outputs(item, fresh, committed, skip_compare=None):
    item.comparison_traceback = cell_differences(committed, fresh)
    return not item.comparison_traceback
