"""Questions reach the picture they belong to, and what is read is the one patch with content."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from embedlens import EmbedLens, EmbedLensError
from embedlens.measures import patch_reading as tr
from embedlens.measures.labels import label_ids
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


def test_a_colour_is_held_among_the_best_words_and_the_nearest_is_the_best_of_all_colours(miniature):
    side, patch = tr.canvas_of(miniature)
    drawn = [p for p in patchbench.pictures(12, side=side, patch=patch) if p.group != OBJECT]
    lens, k = EmbedLens.from_model(miniature), 200
    rows = tr.colour_rows(miniature, drawn, {"EmbedLens": lens}, k)
    assert len(rows) == 3 * len(drawn) * (miniature.n_layers + 1) and rows.held.any() and rows.nearest.any()
    ids = {colour: list(label_ids(miniature.tokenizer, colour, "strict")) for colour in COLOURS}
    states = dict(zip((p.id for p in drawn), tr.content_states(miniature, drawn), strict=True))
    for row in rows.itertuples():
        (picture,) = (p for p in drawn if p.id == row.id)
        colour = {INK: picture.ink, GROUND: picture.ground, SURROUND: picture.surround}[row.part]
        cosines = torch.cosine_similarity(states[row.id][row.layer][None], miniature.input_embeddings, dim=-1)
        assert row.held == bool(set(cosines.topk(k).indices.tolist()) & set(ids[colour]))
        best = {name: float(cosines[own].max()) for name, own in ids.items() if own}
        assert row.nearest == (max(best, key=best.get) == colour)


def test_a_vocabulary_without_colours_is_refused(tiny, drawn, monkeypatch):
    monkeypatch.setattr(tr, "label_ids", lambda *_: ())
    with pytest.raises(EmbedLensError, match="no name of a colour"):
        tr.colour_rows(tiny, drawn, {"EmbedLens": EmbedLens.from_model(tiny)})
