"""The world: the same everywhere, honest about what it shows, in COCO's format, and splits that never meet."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from coco_folder import write_coco

from embedlens import EmbedLensError, samples
from embedlens.samples import miniworld
from embedlens.samples.miniworld import draw, language, scene, sprites

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


def scene_of(index: int, split: str = "heldout") -> scene.Scene:
    return scene.scene(scene.rng_of(split, index), split)


def digest_of_pictures(count: int) -> str:
    drawn = (draw.picture(scene_of(i, "train")).tobytes() for i in range(count))
    return hashlib.sha256(b"".join(drawn)).hexdigest()


def test_seed_0_is_the_picture_that_was_shipped():
    """Pinned bytes: whoever changes the drawing changes what every committed number was measured on."""
    pinned = Path(__file__).with_name("seed0.sha256").read_text().split()
    atlas = hashlib.sha256(sprites.ATLAS.read_bytes()).hexdigest()
    assert [digest_of_pictures(1), atlas, digest_of_pictures(20)] == pinned


def test_the_atlas_is_what_the_font_gives(tmp_path):
    """With the Debian font the bytes are compared; without it, that the script asks for the font."""
    from training.atlas import atlas

    if not FONT.exists():
        with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
            atlas(FONT)
        return
    remade = tmp_path / "sprites.png"
    atlas(FONT).save(remade, optimize=True)
    assert remade.read_bytes() == sprites.ATLAS.read_bytes()


def test_there_are_at_least_fifty_coco_categories():
    assert len(sprites.CATEGORIES) >= 50
    assert len({category.id for category in sprites.CATEGORIES}) == len(sprites.CATEGORIES)
    by_name = {category.name: category.id for category in sprites.CATEGORIES}
    assert (by_name["person"], by_name["cat"], by_name["dog"], by_name["scissors"]) == (1, 17, 18, 87)


def test_boxes_and_masks_are_where_the_pixels_changed():
    for index in range(30):
        drawn = scene_of(index)
        empty = np.asarray(draw.ground(drawn.background, drawn.width, drawn.height)).astype(int)
        changed = np.abs(np.asarray(draw.picture(drawn)).astype(int) - empty).max(-1) > 0
        boxes = np.zeros_like(changed)
        for thing in drawn.things:
            x, y, w, h = (round(side) for side in thing.box)
            boxes[y : y + h, x : x + w] = True
        assert not (changed & ~boxes).any(), f"picture {index} has ink outside its boxes"
        for thing in drawn.objects:
            rows, columns = np.nonzero(draw.mask(thing, drawn))
            x, y, w, h = thing.box
            loose = max(rows.min() - y, columns.min() - x, y + h - 1 - rows.max(), x + w - 1 - columns.max())
            assert loose <= max(2, 0.25 * max(w, h)), f"picture {index}: the box of the {thing.name} is loose"


def test_pycocotools_loads_what_is_written(tmp_path):
    from pycocotools.coco import COCO

    items = samples.load(n=5)
    write_coco(items, tmp_path)
    instances = COCO(str(tmp_path / "annotations" / "instances.json"))
    captions = COCO(str(tmp_path / "annotations" / "captions.json"))
    assert instances.getImgIds() == captions.getImgIds() == [item.id for item in items]
    for entry in instances.loadAnns(instances.getAnnIds()):
        assert instances.annToMask(entry).sum() == entry["area"] > 0
    assert captions.loadAnns(captions.getAnnIds(items[0].id))[0]["caption"] == items[0].captions[0]


def test_training_never_shows_what_is_held_out():
    seen: Counter[str] = Counter()
    for split in ("train", "heldout"):
        for index in range(600):
            drawn = scene_of(index, split)
            seen[split, "pair"] += sum(
                thing.colour is not None and scene.is_heldout_pair(thing.category, thing.colour)
                for thing in drawn.objects
            )
            seen[split, "word"] += sum(scene.is_heldout_word(word.text) for word in drawn.words)
    assert seen["train", "pair"] == seen["train", "word"] == 0
    assert seen["heldout", "pair"] > 8 and seen["heldout", "word"] > 20


def test_splits_and_seeds_draw_different_pictures():
    first = {
        samples.load(n=4, seed=seed, split=split)[i].image.tobytes()
        for seed in (0, 1)
        for split in ("train", "heldout")
        for i in range(4)
    }
    assert len(first) == 16


def test_questions_are_answered_by_the_layout():
    asked: Counter[str] = Counter()
    for index in range(120):
        item = miniworld.sample(index)
        names = Counter(item.category_names[entry["category_id"]] for entry in item.annotations)
        for question in item.questions:
            asked[question.kind] += 1
            if question.kind == "existence":
                name = question.text.split(" ", 3)[-1].removesuffix(" in the picture?")
                assert (question.answer == "yes") == (name in names)
            if question.kind == "count":
                name = next(name for name in names if question.text == f"How many {language.plural(name)} are there?")
                assert language.NUMBERS[names[name]] == question.answer
            if question.kind == "choice":
                assert question.choices["ABCD".index(question.answer)] in names
    assert set(asked) == set(language.KINDS)


def test_boxes_are_written_in_the_padded_square():
    wide = next(drawn for drawn in map(scene_of, range(100)) if drawn.width > drawn.height)
    thing = wide.objects[0]
    x0, y0, x1, y1 = language.padded_box(thing, wide)
    bar = (wide.width - wide.height) // 2
    assert (x0, y0) == (thing.box[0] / wide.width, (thing.box[1] + bar) / wide.width)
    assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


def test_a_larger_picture_shows_the_same_scene():
    small, large = miniworld.sample(5), miniworld.sample(5, scale=3)
    assert (large.width, large.height) == (3 * small.width, 3 * small.height)
    shrunk = np.asarray(large.image.resize(small.image.size)).astype(int)
    assert np.abs(shrunk - np.asarray(small.image)).mean() < 12  # resampling; another picture differs by 60 or more
    assert large.annotations[0]["bbox"] == [3 * side for side in small.annotations[0]["bbox"]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dataset": "imagenet"}, "unknown data set 'imagenet'"),
        ({"split": "test"}, "unknown split 'test'"),
        ({"n": 0}, "at least one"),
        ({"seed": -1}, "seed is -1"),
        ({"scale": 0}, "scale"),
    ],
)
def test_bad_requests_say_what_to_do(arguments, sentence):
    with pytest.raises(EmbedLensError, match=sentence):
        samples.load(**arguments)
