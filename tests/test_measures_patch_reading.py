"""Questions reach the picture they belong to, and what is read is the one patch with content."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from embedlens import EmbedLens, EmbedLensError
from embedlens.measures import patch_reading as tr
from embedlens.samples import patchbench
from embedlens.samples.miniworld.sprites import COLOURS
from embedlens.samples.patchbench import AXES, GROUND, INK, OBJECT, SURROUND


@pytest.fixture(scope="module")
def drawn(tiny):
    side, patch = tr.canvas_of(tiny)
    return patchbench.pictures(14, side=side, patch=patch)


def test_the_canvas_is_what_the_tower_reads(tiny):
    assert tr.canvas_of(tiny) == (56, 14)


def test_the_answers_are_those_of_each_picture_asked_alone(tiny, drawn):
    answers = tr.ask(tiny, drawn[:5], batch_size=4)
    asked = [(picture, axis) for picture in drawn[:5] for axis in picture.asked]
    assert list(zip(answers.id, answers.axis, strict=True)) == [(picture.id, axis) for picture, axis in asked]
    for row, (picture, axis) in zip(answers.itertuples(), asked, strict=True):
        question = picture.asked[axis]
        assert row.said == tiny.answer(tiny.prompt(picture.image, question.text), tr.ANSWER_TOKENS)
        assert row.correct == patchbench.correct(question, row.said)
        assert row.follows == (patchbench.follows(picture, row.said) if axis == "colour" else "")


def test_a_picture_goes_through_the_tower_once_for_all_its_questions(tiny, drawn, monkeypatch):
    seen, features = [], type(tiny)._features
    monkeypatch.setattr(type(tiny), "_features", lambda model, inputs: seen.extend(inputs) or features(model, inputs))
    assert len(tr.ask(tiny, drawn[:5])) > len(seen) == 5


def test_a_swap_shows_another_picture_of_the_same_group(drawn):
    shown = tr._shifted(drawn)
    assert all(a.group == b.group and a.id != b.id for a, b in zip(drawn, shown, strict=True))
    assert sorted(p.id for p in shown) == [p.id for p in drawn]
    with pytest.raises(EmbedLensError, match="the group 'object' has one picture"):
        tr._shifted(drawn[2:7])


def test_nothing_to_ask_is_refused(tiny, drawn):
    with pytest.raises(EmbedLensError, match="no question to ask"):
        tr.ask(tiny, [replace(drawn[0], ink=None)], [AXES[1]])


def test_the_states_are_those_of_the_patch_with_content(tiny, drawn):
    states = tr.content_states(tiny, drawn[:3], batch_size=2)
    for picture, state in zip(drawn[:3], states, strict=True):
        prompt = tiny.prompt(picture.image, tr.QUESTION)
        whole = tiny.hidden_states(prompt)[:, prompt.visual]
        index = picture.row * prompt.grid.cols + picture.col
        torch.testing.assert_close(state, whole[:, index], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(state, whole[:, (index + 1) % len(prompt.grid)], atol=1e-3)


def test_content_that_is_no_single_patch_is_refused(tiny):
    with pytest.raises(EmbedLensError, match="canvas_of gives for this model"):
        tr.content_states(tiny, patchbench.pictures(1, side=56, patch=28))


def test_recolouring_asks_the_same_texts_with_one_part_changed(tiny, drawn):
    cases = [picture for picture in drawn if picture.group == "OCR" and picture.surround != "white"]
    rows = tr.recolour_rows(tiny, cases)
    assert len(rows) == 3 * len(cases) > 0
    for row in rows.itertuples():
        case = next(picture for picture in cases if picture.id == row.id)
        changed = patchbench.probes(case)[row.part]
        before, after = (
            tiny.answer(tiny.prompt(p.image, case.asked["colour"].text), tr.ANSWER_TOKENS) for p in (case, changed)
        )
        assert (row.said, row.after) == (before, after)
        assert row.stays == (patchbench.canonical(before) == patchbench.canonical(after))
        assert row.turns == (patchbench.canonical(after) == patchbench.probes(case)[INK].ink)


def test_twins_stand_side_by_side(tiny, drawn):
    said, other = tr.ask(tiny, drawn), tr.ask(tiny, drawn, swap=True)
    rows, pairs = tr.twin_rows(drawn, said, other), patchbench.twins(drawn)
    assert len(rows) == len(pairs) == 4
    said, other = (table[table.axis == "colour"].set_index("id") for table in (said, other))
    for row, (a, b) in zip(rows.itertuples(), pairs, strict=True):
        assert (row.white, row.colour, row.habit) == (said.correct[a.id], said.correct[b.id], other.correct[a.id])
        assert row.follows == said.follows[b.id] and row.covered == b.covered.mean() and 0 < row.by_chance < 0.2
        assert row.white_surround == (a.surround == "white") == (b.surround == "white")


def test_both_halves_of_the_strings_are_asked_about_the_same_pictures(miniature):
    side, patch = tr.canvas_of(miniature)
    texts = [p for p in patchbench.pictures(14, side=side, patch=patch) if p.group == "OCR"]
    rows = tr.piece_rows(miniature, texts, seed=1)
    assert rows.groupby("half").id.apply(list).to_dict() == {half: [0, 1, 2, 3] for half in set(rows.half)}
    assert set(rows.half) == {"one piece", "several pieces"} and rows[["own", "other"]].isin([0, 1]).all(None)


def test_the_top_of_the_ladder_is_the_pictures_as_they_are(tiny, drawn):
    objects = [picture for picture in drawn if picture.group == OBJECT][:3]
    rungs = tr.ladder(tiny, objects)
    assert list(rungs)[-1] == "tinted, one to four" and {len(rung) for rung in rungs.values()} == {3}
    assert rungs["tinted, one to four"].tolist() == tr.ask(tiny, objects, AXES[:1]).correct.tolist()


def test_colour_rows_are_those_of_each_part_and_layer(miniature):
    side, patch = tr.canvas_of(miniature)
    drawn = [p for p in patchbench.pictures(12, side=side, patch=patch) if p.group != OBJECT]
    lens = EmbedLens.from_model(miniature)
    rows = tr.colour_rows(miniature, drawn, {"EmbedLens": lens}, k=200)
    states = tr.content_states(miniature, drawn)
    held = tr.colours_held(lens, miniature.tokenizer, states, k=200)
    nearest = tr.nearest_colour(lens, miniature.tokenizer, states)
    assert len(rows) == 3 * len(drawn) * (miniature.n_layers + 1) and rows.held.any() and rows.nearest.any()
    for (part, id, layer), own in rows.groupby(["part", "id", "layer"]):
        at = [p.id for p in drawn].index(id)
        colour = {INK: drawn[at].ink, GROUND: drawn[at].ground, SURROUND: drawn[at].surround}[part]
        shown = (at, layer, list(COLOURS).index(colour))
        assert (own.held.tolist(), own.nearest.tolist()) == ([held[shown]], [nearest[shown]])


class Words:
    """A tokenizer whose vocabulary is the colours, with one that is missing."""

    words = [*list(COLOURS)[1:], "dog"]

    def get_vocab(self) -> dict[str, int]:
        return {f"Ġ{word}": i for i, word in enumerate(self.words)}


def test_colours_are_found_among_the_best_words_and_the_nearest_is_one_of_them():
    rows = torch.eye(len(Words.words))
    lens, tokenizer = EmbedLens(rows, Words.words), Words()
    states = torch.rand(3, 4, len(rows), generator=torch.Generator().manual_seed(0))
    held, nearest = tr.colours_held(lens, tokenizer, states, k=3), tr.nearest_colour(lens, tokenizer, states)
    for i in range(3):
        for layer in range(4):
            order = [Words.words[j] for j in states[i, layer].argsort(descending=True).tolist()]
            for c, colour in enumerate(COLOURS):
                assert held[i, layer, c] == (colour in order[:3])
                assert nearest[i, layer, c] == (colour == next(word for word in order if word in COLOURS))
