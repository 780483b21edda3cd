"""What do visual tokens really encode? Lenses, patch geometry and wrapped stock models to measure it.

Names are imported on first use, so that `import embedlens` costs next to nothing.

>>> import embedlens as el
>>> sorted(set(dir(el)) & {"load", "EmbedLens", "LogitLens", "PatchGrid"})
['EmbedLens', 'LogitLens', 'PatchGrid', 'load']
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedlens.errors import EmbedLensError
    from embedlens.lenses import EmbedLens, Lens, LogitLens
    from embedlens.patches import Frame, PatchGrid
    from embedlens.pictures import open_picture
    from embedlens.vlm import Prompt, Unembed, VisionLanguageModel, load

__version__ = "0.1.0"

_HOME = {
    "EmbedLensError": "errors",
    "Frame": "patches",
    "PatchGrid": "patches",
    "open_picture": "pictures",
    "load": "vlm",
    "Prompt": "vlm",
    "Unembed": "vlm",
    "VisionLanguageModel": "vlm",
    "Lens": "lenses",
    "EmbedLens": "lenses",
    "LogitLens": "lenses",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name == "samples":
        return import_module(f"{__name__}.samples")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names are {', '.join(__all__)}, samples")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "samples"})
