"""The world: the same everywhere, honest about what it shows, in COCO's format, and splits that never meet."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np

from embedlens import samples
from embedlens.samples import miniworld
from embedlens.samples.miniworld import draw, language, scene, sprites


def scene_of(index: int, split: str = "heldout") -> scene.Scene:
    return scene.scene(scene.rng_of(split, index), split)


def test_seed_0_is_the_picture_that_was_shipped():
    """Pinned bytes: whoever changes the drawing changes what every committed number was measured on."""
    pinned = Path(__file__).with_name("seed0.sha256").read_text().split()
    drawn = [draw.picture(scene_of(i, "train")).tobytes() for i in range(20)]
    digests = [hashlib.sha256(part).hexdigest() for part in (drawn[0], sprites.ATLAS.read_bytes(), b"".join(drawn))]
    assert digests == pinned
    others = [samples.load(n=2, seed=seed)[i].image.tobytes() for seed in (0, 1) for i in (0, 1)]
    assert len({*drawn, *others}) == 24  # splits and seeds draw different pictures


def test_boxes_and_masks_are_where_the_pixels_changed():
    for index in range(20):
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


def test_training_never_shows_what_is_held_out():
    seen: Counter[str] = Counter()
    for split, most in (("train", 300), ("heldout", 200)):
        for index in range(most):
            drawn = scene_of(index, split)
            seen[split, "pair"] += sum(
                thing.colour is not None and scene.is_heldout_pair(thing.category, thing.colour)
                for thing in drawn.objects
            )
            seen[split, "word"] += sum(scene.is_heldout_word(word.text) for word in drawn.words)
    assert seen["train", "pair"] == seen["train", "word"] == 0
    assert seen["heldout", "pair"] > 2 and seen["heldout", "word"] > 6


def test_questions_are_answered_by_the_layout():
    asked: Counter[str] = Counter()
    for index in range(60):
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
    wide = next(drawn for drawn in map(scene_of, range(100)) if drawn.width > drawn.height)
    x0, y0, x1, y1 = language.padded_box(wide.objects[0], wide)  # boxes are written in the padded square
    bar, box = (wide.width - wide.height) // 2, wide.objects[0].box
    assert (x0, y0) == (box[0] / wide.width, (box[1] + bar) / wide.width) and 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


def test_a_larger_picture_shows_the_same_scene():
    small, large = miniworld.sample(5), miniworld.sample(5, scale=3)
    assert (large.width, large.height) == (3 * small.width, 3 * small.height)
    shrunk = np.asarray(large.image.resize(small.image.size)).astype(int)
    assert np.abs(shrunk - np.asarray(small.image)).mean() < 12  # resampling; another picture differs by 60 or more
    assert large.annotations[0]["bbox"] == [3 * side for side in small.annotations[0]["bbox"]]
