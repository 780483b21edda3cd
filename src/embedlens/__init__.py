"""What do visual tokens really encode? Lenses, patch geometry and wrapped stock models to measure it.

Names are imported on first use, so that `import embedlens` costs next to nothing.

>>> import embedlens as el
>>> sorted(set(dir(el)) & {"load", "EmbedLens", "LogitLens", "PatchGrid"})
['EmbedLens', 'LogitLens', 'PatchGrid', 'load']
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; at run time __getattr__ below imports them
    # ruff: noqa: F401
    from embedlens.attention_maps import attention
    from embedlens.clusters import anchor_clusters, centroids, cross_image_similarity
    from embedlens.context import ContextLens
    from embedlens.engine import intervene
    from embedlens.errors import EmbedLensError
    from embedlens.explorer import Explorer, explore
    from embedlens.groups import Reference, TokenGroups, discover, token_groups
    from embedlens.interventions import EnterAt, LeaveAt, Prune, ReleasedLayer0, Rescale, Silence, SkipSublayers
    from embedlens.lenses import EmbedLens, Lens, LogitLens
    from embedlens.loading import load
    from embedlens.patches import Frame, PatchGrid
    from embedlens.pictures import open_picture
    from embedlens.prompts import Prompt
    from embedlens.study import run
    from embedlens.tracing import Trace, trace, traces
    from embedlens.vlm import Unembed, VisionLanguageModel

__version__ = "0.1.0"

_HOME = {
    name: module
    for module, names in {
        "attention_maps": "attention",
        "clusters": "anchor_clusters centroids cross_image_similarity",
        "context": "ContextLens",
        "engine": "intervene",
        "errors": "EmbedLensError",
        "explorer": "Explorer explore",
        "groups": "Reference TokenGroups discover token_groups",
        "interventions": "EnterAt LeaveAt Prune ReleasedLayer0 Rescale Silence SkipSublayers",
        "lenses": "EmbedLens Lens LogitLens",
        "loading": "load",
        "patches": "Frame PatchGrid",
        "pictures": "open_picture",
        "prompts": "Prompt",
        "study": "run",
        "tracing": "Trace trace traces",
        "vlm": "Unembed VisionLanguageModel",
    }.items()
    for name in names.split()
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name == "samples":
        return import_module(f"{__name__}.samples")
    public = ", ".join([*__all__, "samples"])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names are {public}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "samples"})
