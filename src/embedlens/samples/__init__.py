"""Pictures with annotations: drawn by `load("miniworld")` and `load("patchbench")`, or read from a COCO folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from embedlens.errors import EmbedLensError
from embedlens.samples.miniworld.language import Question

__all__ = ["Question", "Sample", "full_scene", "load", "readable"]
DRAWN = ("miniworld", "patchbench")


@dataclass(frozen=True)
class Sample:
    """One picture with what is known about it."""

    id: int  #: COCO image id, unique within its data set
    width: int  #: px of the picture
    height: int
    #: COCO `instances` entries: category_id, bbox [x, y, width, height] in px, area, segmentation (RLE), iscrowd; the
    #: miniature world adds colour and the held-out mark
    annotations: tuple[Mapping[str, Any], ...]
    captions: tuple[str, ...]
    questions: tuple[Question, ...]
    category_names: Mapping[int, str]  #: COCO category id → name, for all categories of the data set
    draw: Callable[[], Image.Image] = field(repr=False, compare=False)  #: Called once, on first use of `image`
    writing: tuple[Sequence[float], ...] = ()  #: Boxes [x, y, width, height], px, of written words, where known

    @cached_property
    def image(self) -> Image.Image:
        """The picture, RGB."""
        return self.draw()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the categories in the picture, each once, in COCO order; crowds do not count."""
        present = {annotation["category_id"] for annotation in self.annotations if not annotation.get("iscrowd")}
        return tuple(name for category, name in self.category_names.items() if category in present)


def readable(samples: Iterable[Sample], opened: bool = False) -> Iterator[Sample]:
    """The samples whose pictures can be read, one after the other; a warning says how many cannot and why the first.

    A list of them holds no pictures: each is opened again where it is used. `opened`: copies that hold theirs. For what
    reads many pictures outside `embedlens.run`, which keeps such a list itself.

    >>> [sample.id for sample in readable(load("miniworld", n=2))]
    [0, 1]
    """
    lost: list[str] = []
    count = 0
    for sample in samples:
        count += 1
        try:
            held = sample if "image" in vars(sample) else replace(sample)
            held.image  # noqa: B018
        except (EmbedLensError, OSError) as error:
            lost.append(f"sample {sample.id}: {error}")
        else:
            yield held if opened else sample
    if lost and len(lost) == count:
        raise EmbedLensError(f"none of {count} pictures can be read; the first is {lost[0]}")
    if lost:
        left_out = f"{len(lost)} of {count} pictures cannot be read and are left out"
        warnings.warn(f"{left_out}; the first is {lost[0]}", stacklevel=2)


def load(dataset: str = "miniworld", n: int = 8, seed: int = 0, split: str = "heldout", **options: Any) -> list[Sample]:
    """The first `n` samples of a data set, in an order fixed by `seed`.

    Args:
        dataset: "miniworld", drawn on the fly; "patchbench", drawn too, with all content in one patch (the paper's set
            has n=70); or a COCO folder, "coco:/data/coco/val2017", see `embedlens.samples.coco.load`.
        seed: different seeds give different pictures.
        split: of the miniature world, "heldout" or "train"; the miniature was trained on the latter only.
        options: of the miniature world, see `embedlens.samples.miniworld.sample`; of patchbench `side` and `patch`, the
            model's image and patch size in px, see `embedlens.samples.patchbench.pictures`.

    >>> [sample.id for sample in load("miniworld", n=3)]
    [0, 1, 2]
    >>> load("miniworld", n=1)[0].image.mode
    'RGB'
    """
    from embedlens.samples import coco, miniworld, patchbench

    if n < 1:
        raise EmbedLensError(f"n is {n}: ask for at least one sample")
    if dataset == "miniworld":
        first = miniworld.first_index(seed)
        return [miniworld.sample(first + i, split, **options) for i in range(n)]
    drawn, folder = dataset == "patchbench", photographs(dataset)
    if not drawn and not folder:
        what = f"unknown data set {dataset!r}: pass 'miniworld'"
        raise EmbedLensError(f"{what}, 'patchbench' or a COCO folder such as 'coco:/data/coco/val2017'")
    given = ", ".join(sorted(options.keys() - ({"side", "patch"} if drawn else ())))
    if split != "heldout" or given:
        takes = "patchbench takes side and patch, in px" if drawn else "leave it out, a COCO folder names its own split"
        raise EmbedLensError(f"{given or f'split={split!r}'} is of the miniature world: {takes}")
    if folder:
        return coco.load(dataset.removeprefix("coco:"), n, seed)
    return [picture.sample() for picture in patchbench.pictures(n, seed, **options)]


def photographs(dataset: str) -> bool:
    """Whether a data set is a COCO folder, not drawn here."""
    return dataset.startswith("coco:") or (dataset not in DRAWN and Path(dataset).expanduser().is_dir())


def calibration(dataset: str, n: int, seed: int = 0, scale: float = 1) -> list[Sample]:
    """Pictures of the same world as a data set's, for what must be found in others than those that are measured. Of the
    drawn world training pictures, `scale` of them large; of a COCO folder the last in the order of `seed`, of which
    `load` gives the first: where a folder has fewer than both, some are in common."""
    if photographs(dataset):
        from embedlens.samples import coco

        return coco.load(dataset.removeprefix("coco:"), n, seed, last=True)
    return load("miniworld", n=n, split="train", scale=scale)


def full_scene(samples: Sequence[Sample], kinds: int = 3, filled: float = 0.2) -> Sample:
    """A picture to look at, picked by what it contains: the first with `kinds` labels whose boxes fill so much of it.
    Where there is none, the first picture with a label; where no picture has one, the first. Where boxes overlap, both
    count; crowds do not."""
    if not samples:
        raise EmbedLensError("no pictures to pick a scene from: pass at least one")
    labelled = [sample for sample in samples if sample.labels] or list(samples)
    for sample in labelled:
        boxes = [entry["bbox"] for entry in sample.annotations if not entry.get("iscrowd")]
        boxed = sum(w * h for _, _, w, h in boxes) / (sample.width * sample.height)
        if len(sample.labels) >= kinds and boxed > filled:
            return sample
    return labelled[0]
