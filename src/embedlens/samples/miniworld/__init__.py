"""The miniature world: pictures drawn from a seed, endless and the same everywhere, in COCO's own format.

`scene` decides what is where, `draw` makes pixels, `language` says what can be said about it, `sprites` holds the
things. This module puts the four together.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from embedlens.errors import EmbedLensError
from embedlens.samples.miniworld import draw, language
from embedlens.samples.miniworld import scene as scenes
from embedlens.samples.miniworld.scene import Scene, Split
from embedlens.samples.miniworld.sprites import CATEGORIES

if TYPE_CHECKING:
    from embedlens.samples import Sample

CATEGORY_NAMES = {category.id: category.name for category in CATEGORIES}
# Pictures of one seed; far more than anyone asks for, so that seeds do not overlap.
SEED_STRIDE = 1_000_000
# Held-out indices below this belong to measurements taken during training.
RESERVED = 1_000_000_000


def first_index(seed: int) -> int:
    """Index of the first picture of a seed. Training measures itself on other held-out pictures.

    >>> first_index(1) - first_index(0)
    1000000
    """
    if seed < 0:
        raise EmbedLensError(f"seed is {seed}: use 0 or more")
    return RESERVED + seed * SEED_STRIDE


def instances(drawn: Scene, image_id: int, scale: float = 1) -> tuple[dict[str, Any], ...]:
    """COCO `instances` of a scene: one entry per object; words are no COCO objects."""
    from pycocotools import mask as coco_mask

    entries = []
    for number, thing in enumerate(drawn.objects):
        covered = draw.mask(thing, drawn, scale)
        code = coco_mask.encode(np.asfortranarray(covered.astype(np.uint8)))
        assert thing.category is not None
        entry: dict[str, Any] = {"id": image_id * 100 + number, "image_id": image_id}
        entry |= {"category_id": CATEGORIES[thing.category].id, "bbox": [float(round(x * scale)) for x in thing.box]}
        entry |= {"area": float(covered.sum()), "iscrowd": 0}
        entry |= {"segmentation": {"size": list(map(int, code["size"])), "counts": code["counts"].decode("ascii")}}
        heldout = thing.colour is not None and scenes.is_heldout_pair(thing.category, thing.colour)
        entry |= {"colour": thing.colour, "heldout": heldout}
        entries.append(entry)
    return tuple(entries)


def sample(index: int, split: str = "heldout", scale: float = 1, **options: Any) -> Sample:
    """Picture `index` of a split with annotations, captions and questions; the same on every machine.

    Args:
        split: "train" or "heldout".
        scale: 1 draws the longer side with 112 px, the miniature's own size; 3 suits models that read 336 px.
        options: of the layout, see `embedlens.samples.miniworld.scene.scene`.
    """
    if split not in ("train", "heldout"):
        raise EmbedLensError(f"unknown split {split!r}: use 'train' or 'heldout'")
    part: Split = "train" if split == "train" else "heldout"
    if index < 0 or scale <= 0:
        raise EmbedLensError(f"index {index} and scale {scale}: the index is 0 or more, the scale above 0")
    rng = scenes.rng_of(part, index)
    drawn = scenes.scene(rng, part, **options)
    image_id = index - RESERVED if split == "heldout" and index >= RESERVED else index
    return of_scene(drawn, image_id, scale, (language.caption(drawn, rng),), language.questions(drawn, rng))


def of_scene(
    drawn: Scene,
    image_id: int = 0,
    scale: float = 1,
    captions: tuple[str, ...] = (),
    questions: tuple[language.Question, ...] = (),
) -> Sample:
    """A layout of your own as a sample."""
    from embedlens.samples import Sample

    size, entries = draw.pixels(drawn.width, drawn.height, scale), instances(drawn, image_id, scale)
    picture = partial(draw.picture, drawn, scale)
    words = tuple([float(round(x * scale)) for x in word.box] for word in drawn.words)
    return Sample(image_id, *size, entries, captions, questions, CATEGORY_NAMES, picture, words)
