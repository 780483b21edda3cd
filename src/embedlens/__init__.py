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
    from embedlens.attention_maps import attention as attention
    from embedlens.clusters import anchor_clusters as anchor_clusters
    from embedlens.clusters import centroids as centroids
    from embedlens.clusters import cross_image_similarity as cross_image_similarity
    from embedlens.context import ContextLens as ContextLens
    from embedlens.engine import intervene as intervene
    from embedlens.errors import EmbedLensError as EmbedLensError
    from embedlens.explorer import Explorer as Explorer
    from embedlens.explorer import explore as explore
    from embedlens.groups import Reference as Reference
    from embedlens.groups import TokenGroups as TokenGroups
    from embedlens.groups import discover as discover
    from embedlens.groups import token_groups as token_groups
    from embedlens.interventions import EnterAt as EnterAt
    from embedlens.interventions import LeaveAt as LeaveAt
    from embedlens.interventions import Prune as Prune
    from embedlens.interventions import ReleasedLayer0 as ReleasedLayer0
    from embedlens.interventions import Rescale as Rescale
    from embedlens.interventions import Silence as Silence
    from embedlens.interventions import SkipSublayers as SkipSublayers
    from embedlens.lenses import EmbedLens as EmbedLens
    from embedlens.lenses import Lens as Lens
    from embedlens.lenses import LogitLens as LogitLens
    from embedlens.loading import load as load
    from embedlens.patches import Frame as Frame
    from embedlens.patches import PatchGrid as PatchGrid
    from embedlens.pictures import open_picture as open_picture
    from embedlens.prompts import Prompt as Prompt
    from embedlens.study import run as run
    from embedlens.tracing import Trace as Trace
    from embedlens.tracing import trace as trace
    from embedlens.tracing import traces as traces
    from embedlens.vlm import Unembed as Unembed
    from embedlens.vlm import VisionLanguageModel as VisionLanguageModel

__version__ = "0.1.0"

_HOME = {
    "EmbedLensError": "errors",
    "Frame": "patches",
    "PatchGrid": "patches",
    "open_picture": "pictures",
    "load": "loading",
    "Prompt": "prompts",
    "Unembed": "vlm",
    "VisionLanguageModel": "vlm",
    "Lens": "lenses",
    "EmbedLens": "lenses",
    "anchor_clusters": "clusters",
    "centroids": "clusters",
    "cross_image_similarity": "clusters",
    "LogitLens": "lenses",
    "ContextLens": "context",
    "Explorer": "explorer",
    "explore": "explorer",
    "Trace": "tracing",
    "trace": "tracing",
    "traces": "tracing",
    "attention": "attention_maps",
    "Reference": "groups",
    "TokenGroups": "groups",
    "discover": "groups",
    "token_groups": "groups",
    "intervene": "engine",
    "Prune": "interventions",
    "SkipSublayers": "interventions",
    "Silence": "interventions",
    "EnterAt": "interventions",
    "LeaveAt": "interventions",
    "Rescale": "interventions",
    "ReleasedLayer0": "interventions",
    "run": "study",
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
