"""Test-wide settings: no network, no progress bars in notebooks, and what a notebook may differ in."""

import os

# The kernels that nbval starts inherit these; a tqdm bar on stderr would never compare equal.
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(name, "1")


def pytest_collectstart(collector):
    # Pictures are not compared: a renderer may change its antialiasing. Glued numbers and printed tables are.
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += (
            "text/html",
            "image/svg+xml",
            "application/vnd.plotly.v1+json",
            "application/papermill.record/image/png",
        )
