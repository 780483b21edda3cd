"""What the visual tokens of one picture say: top words per patch, as a table, written on the picture, as figures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import pandas as pd
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.figures import group_figure, patch_figure, patch_words, signature
from embedlens.groups import TokenGroups
from embedlens.lenses import EmbedLens, LogitLens
from embedlens.measures.labels import label_ids, named_patches
from embedlens.patches import PatchGrid
from embedlens.pictures import Picture
from embedlens.samples import Sample
from embedlens.vlm import QUESTION, VisionLanguageModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENSES: dict[str, type[EmbedLens] | type[LogitLens]] = {"embed": EmbedLens, "logit": LogitLens}
BAR_MARK = "▒"
COLUMN = 12  # characters of a table column at most


@dataclass(frozen=True, eq=False)
class PictureProbe:
    """The top words of every visual token of one picture."""

    image: Image  #: The picture, upright RGB, original size
    grid: PatchGrid
    words: list[list[str]]  #: Best words first, one list per patch
    ids: Int[Tensor, "n k"]
    scores: Float[Tensor, "n k"]  #: Cosine (embed) or logit (logit) of each word
    layer: int
    lens: str
    model: str
    question: str
    answer: str

    def table(self) -> str:
        """The patch grid as text, one line per rank, words in the bars marked; one table for each view."""
        words = iter(self.words)
        parts = [_table(view, list(islice(words, len(view)))) for view in self.grid.views]
        if len(parts) == 1:
            return parts[0]
        return "\n\n".join(f"view {i} of {len(parts)}\n{part}" for i, part in enumerate(parts, 1))

    def annotated(self) -> Image:
        """`figures.patch_words` of the top words; of several views the finest that shows the whole picture."""
        start, view = self.grid.overview
        return patch_words(self.image, view, [words[0] for words in self.words[start : start + len(view)]])


def probe_picture(
    model: VisionLanguageModel,
    image: Picture,
    question: str = QUESTION,
    k: int = 1,
    layer: int = 0,
    lens: str = "embed",
) -> PictureProbe:
    """Read every visual token of a picture with a lens.

    Args:
        layer: 0 reads what enters the first block, `model.n_layers` what leaves the last one.
        lens: `"embed"` for the nearest input embeddings, `"logit"` for final norm and head.
    """
    if lens not in LENSES:
        raise EmbedLensError(f"unknown lens {lens!r}: pass one of {', '.join(map(repr, LENSES))}")
    if not 0 <= layer <= model.n_layers:
        what = f"no layer {layer} in {model.name}: pass 0 (what enters the first block) to {model.n_layers}"
        raise EmbedLensError(f"{what} (what leaves the last)")
    prompt = model.prompt(image, question)
    stream = prompt.embeds if layer == 0 else model.hidden_states(prompt)[layer]
    reader = LENSES[lens].from_model(model)
    scores, ids = reader.topk(stream[prompt.visual], k)
    words = [[reader.tokens[index] for index in row] for row in ids.tolist()]
    answer = model.answer(prompt)
    return PictureProbe(prompt.image, prompt.grid, words, ids, scores, layer, lens, model.name, question, answer)


def nearest_words(model: VisionLanguageModel, sample: Sample, seen: PictureProbe) -> Figure:
    """The nearest word on every patch; a thick outline where it names the object that the patch lies in."""
    named, objects = named_patches(model, sample, seen.grid, seen.ids[:, :1])
    title = f"{int(named.sum())} of {int(objects.sum())} object patches are nearest to their object's name"
    return patch_figure(seen.image, seen.grid, [row[0] for row in seen.words], title, named, _footer(seen))


def named_objects(model: VisionLanguageModel, sample: Sample, seen: PictureProbe) -> Figure:
    """Words on object patches only: the object's label where it is among the words found, else the nearest word."""
    named, objects = named_patches(model, sample, seen.grid, seen.ids)
    wanted = {i for name in sample.labels for i in label_ids(model.tokenizer, name)}
    words = []
    for row, ids, hit, on in zip(seen.words, seen.ids.tolist(), named.tolist(), objects.tolist(), strict=True):
        found = [word for word, i in zip(row, ids, strict=True) if hit and i in wanted]
        words.append((found or row)[0] if on else "")
    title = f"Layer {seen.layer}: {int(named.sum())} of {int(objects.sum())} object patches name their object"
    lens = LENSES[seen.lens].__name__
    footer = signature(seen.model, f"{lens}, {seen.ids.shape[1]} nearest words, one held-out picture")
    return patch_figure(seen.image, seen.grid, words, title, named, footer)


def in_groups(seen: PictureProbe, groups: TokenGroups, title: str = "") -> Figure:
    """Every patch outlined by its group (`token_groups` of the picture), the nearest word at its foot. The title says
    by default how many tokens are alive and dead."""
    alive, dead = int(groups.alive.sum()), int(groups.dead.sum())
    title = title or f"{alive} of {len(groups.alive)} tokens are alive, {dead} dead"
    return group_figure(seen.image, seen.grid, groups.named, [row[0] for row in seen.words], title, _footer(seen))


def _footer(seen: PictureProbe) -> str:
    return signature(seen.model, f"{LENSES[seen.lens].__name__}, layer {seen.layer}, one held-out picture")


def _table(grid: PatchGrid, words: list[list[str]]) -> str:
    """One column per patch of a row; East Asian characters take two places."""
    lines: dict[tuple[str, int], list[str]] = {}
    for patch, (own, padded) in enumerate(zip(words, grid.padded.tolist(), strict=True)):
        row = str(patch // grid.cols)
        for rank, word in enumerate(own):
            marked = f"{BAR_MARK}{word}" if padded else word
            shown = marked if len(marked) <= COLUMN else marked[: COLUMN - 1] + "…"
            lines.setdefault((row if rank == 0 else "", int(row) * len(own) + rank), []).append(shown)
    table = pd.DataFrame(list(lines.values()), index=[label for label, _ in lines])
    with pd.option_context("display.unicode.east_asian_width", True, "display.max_colwidth", None):
        return table.to_string()
