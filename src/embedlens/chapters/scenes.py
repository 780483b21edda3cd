"""Pictures to look at: picked by what they contain, never by how they come out, with words on their patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from embedlens.errors import EmbedLensError
from embedlens.figures import group_figure, patch_figure, signature
from embedlens.groups import TokenGroups
from embedlens.measures.labels import label_ids, named_patches
from embedlens.probe import PictureProbe
from embedlens.samples import Sample
from embedlens.vlm import VisionLanguageModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = 3  # different labels of a scene to look at
FILLED = 0.2  # of it, by boxes
LENS_NAMES = {"embed": "EmbedLens", "logit": "LogitLens"}


def full_scene(samples: Sequence[Sample], kinds: int = KINDS, filled: float = FILLED) -> Sample:
    """The first picture with so many different labels whose boxes fill so much of it.

    Where there is none, the first picture with a label; where no picture has one, the first.

    Raises:
        EmbedLensError: no pictures.
    """
    if not samples:
        raise EmbedLensError("no pictures to pick a scene from: pass at least one")
    full = [sample for sample in samples if len(sample.labels) >= kinds and boxed(sample) > filled]
    return (full or [sample for sample in samples if sample.labels] or list(samples))[0]


def boxed(sample: Sample) -> float:
    """Area of the objects' boxes over the area of the picture; where boxes overlap, both count, and crowds do not."""
    boxes = [entry["bbox"] for entry in sample.annotations if not entry.get("iscrowd")]
    return sum(w * h for _, _, w, h in boxes) / (sample.width * sample.height)


def written_scene(samples: Sequence[Sample]) -> Sample:
    """The first picture with something written on it, as its questions tell; the first of all if there is none."""
    written = [sample for sample in samples if any(question.family == "ocr" for question in sample.questions)]
    return (written or list(samples))[0]


def nearest_words(model: VisionLanguageModel, sample: Sample, seen: PictureProbe) -> Figure:
    """The nearest word on every patch; a thick outline where it names the object that the patch lies in.

    Args:
        seen: `probe_picture` of the sample.
    """
    named, objects = named_patches(model, sample, seen.grid, seen.ids[:, :1])
    title = f"{int(named.sum())} of {int(objects.sum())} object patches are nearest to their object's name"
    words = [row[0] for row in seen.words]
    return patch_figure(seen.image, seen.grid, words, title, named, _footer(seen))


def named_objects(model: VisionLanguageModel, sample: Sample, seen: PictureProbe) -> Figure:
    """Words on object patches only: the object's label where it is among the words found, else the nearest word.

    Args:
        seen: `probe_picture` of the sample, with as many words as shall count.
    """
    named, objects = named_patches(model, sample, seen.grid, seen.ids)
    wanted = {i for name in sample.labels for i in label_ids(model.tokenizer, name)}
    words = []
    for row, ids, hit, on in zip(seen.words, seen.ids.tolist(), named.tolist(), objects.tolist(), strict=True):
        found = [word for word, i in zip(row, ids, strict=True) if hit and i in wanted]
        words.append((found or row)[0] if on else "")
    title = f"Layer {seen.layer}: {int(named.sum())} of {int(objects.sum())} object patches name their object"
    footer = signature(seen.model, f"{LENS_NAMES[seen.lens]}, {_number(seen.ids.shape[1])}, one held-out picture")
    return patch_figure(seen.image, seen.grid, words, title, named, footer)


def in_groups(seen: PictureProbe, groups: TokenGroups, title: str = "", stand_in: str = "") -> Figure:
    """Every patch outlined by its group, with the nearest word at its foot.

    Args:
        seen: `probe_picture` of the picture.
        groups: `token_groups` of the same picture.
        title: the message; default: how many tokens are alive and dead.
        stand_in: said behind that, where "dead" is no group of this model.
    """
    alive, dead = int(groups.alive.sum()), int(groups.dead.sum())
    title = title or f"{alive} of {len(groups.alive)} tokens are alive, {dead} dead{stand_in}"
    return group_figure(seen.image, seen.grid, groups.named, [row[0] for row in seen.words], title, _footer(seen))


def _footer(seen: PictureProbe) -> str:
    return signature(seen.model, f"{LENS_NAMES[seen.lens]}, layer {seen.layer}, one held-out picture")


def _number(words: int) -> str:
    """How many words of a token were looked at, in words where English has them."""
    names = ("", "the", "two", "three", "four", "five")
    name = names[words] if words < len(names) else str(words)
    return f"{name} nearest word{'s' * (words > 1)}"
