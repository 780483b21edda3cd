"""Scenes are picked by content, and words stand where they belong."""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import pytest

from embedlens import samples
from embedlens.chapters import scenes
from embedlens.errors import EmbedLensError
from embedlens.measures.labels import named_patches
from embedlens.probe import probe_picture

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def pictures():
    return samples.load("miniworld", n=24, seed=0)


def test_a_full_scene_is_the_first_that_a_plain_search_finds(pictures):
    wanted = next(s for s in pictures if len(s.labels) >= 3 and scenes.boxed(s) > 0.2)
    assert scenes.full_scene(pictures) is wanted
    assert scenes.full_scene(pictures, kinds=99) is next(s for s in pictures if s.labels)
    with pytest.raises(EmbedLensError, match="at least one"):
        scenes.full_scene([])


def test_a_crowd_fills_nothing(pictures):
    crowd = {**pictures[0].annotations[0], "bbox": [0, 0, 999, 999], "iscrowd": 1}
    crowded = replace(pictures[0], annotations=(*pictures[0].annotations, crowd))
    assert scenes.boxed(crowded) == scenes.boxed(pictures[0])


def test_a_written_scene_has_writing(pictures):
    assert any(question.family == "ocr" for question in scenes.written_scene(pictures).questions)
    plain = [s for s in pictures if not any(q.family == "ocr" for q in s.questions)]
    assert scenes.written_scene(plain) is plain[0]


def test_titles_count_the_patches_that_name_their_object(tiny, pictures):
    sample = scenes.full_scene(pictures)
    for k, draw in ((1, scenes.nearest_words), (5, scenes.named_objects)):
        seen = probe_picture(tiny, sample.image, k=k)
        named, objects = named_patches(tiny, sample, seen.grid, seen.ids)
        title, *footer = (text.get_text() for text in draw(tiny, sample, seen).texts)
        assert f"{int(named.sum())} of {int(objects.sum())} object patches" in title
        assert footer[0].startswith("full scale result on ") and footer[0].endswith("one held-out picture")


def test_words_stand_on_objects_only(tiny, pictures, monkeypatch):
    sample = scenes.full_scene(pictures)
    seen = probe_picture(tiny, sample.image, k=5, layer=1)
    drawn = {}
    monkeypatch.setattr(scenes, "patch_figure", lambda image, grid, words, *rest: drawn.update(words=words))
    scenes.named_objects(tiny, sample, seen)
    _, objects = named_patches(tiny, sample, seen.grid, seen.ids)
    assert [bool(word) for word in drawn["words"]] == objects.tolist()
