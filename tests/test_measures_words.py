"""Labels, probes, hubs and answers: what is planted is found, chance is what chance is, noise is not read."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from embedlens import EmbedLens, EmbedLensError, samples, stats
from embedlens.codebook import AS_SHARES, Recipe
from embedlens.groups import discover
from embedlens.lenses import Lens, LogitLens
from embedlens.measures import hubs, readout, scores
from embedlens.measures import patch_reading as tr
from embedlens.measures.labels import LabelHits, label_hits, label_ids, named_patches
from embedlens.patches import Frame, PatchGrid
from embedlens.readings import Protocol
from embedlens.redundancy import token_scores
from embedlens.samples import patchbench
from embedlens.vlm import QUESTION

# --- which entries are a label ---------------------------------------------------------------------------------------


class Words:
    """As much of a tokenizer as matching needs."""

    def __init__(self, *pieces):
        self.pieces = list(pieces)

    def get_vocab(self):
        return {piece: index for index, piece in enumerate(self.pieces)}

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[index] for index in ids]

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [self.pieces.index(piece) for piece in ("▁", "Ġz", "ebra") if piece in self.pieces]}


PLAIN = Words("dog", "Ġdog", "ĠDog", "▁dogs", "Ġdogma", "do", "ĠDOG", "hot")
LLAMAS = Words("▁", "▁dog", "dog", "▁tie", "ties", "oven", "▁bear", "Cat", "▁mice", "▁mouses", "▁skises")
TWO = Words("Ġcell", "Ġphone", "Ġphones", "Ġdog")


@pytest.mark.parametrize(
    ("words", "label", "rule", "ids"),
    [
        (PLAIN, "dog", "strict", (0, 1, 2, 3, 6)),  # one token, in any case and number
        (TWO, "cell phone", "strict", ()),
        (TWO, "cell phone", "head-word", (1, 2)),  # the last word counts only if the rule says so
        (LLAMAS, "hot dog", "head-word", ()),  # a head that is something else
        (LLAMAS, "oven", "head-word", ()),  # of "Beethoven", as `ties` is of "properties"
        (LLAMAS, "dog", "head-word", (1,)),
        (LLAMAS, "tie", "head-word", (3,)),
        (LLAMAS, "cat", "head-word", (7,)),
        (LLAMAS, "teddy bear", "head-word", (6,)),
        (LLAMAS, "mouse", "head-word", (8,)),
        (LLAMAS, "skis", "head-word", ()),
        (Words("Ġz", "ebra"), "zebra", "head-word", ()),
        (Words("Ġz", "ebra"), "zebra", "first-piece", (0,)),
        (Words("▁", "Ġz", "ebra"), "zebra", "first-piece", (1,)),  # a bare space says nothing
        (TWO, "dog", "first-piece", (3,)),  # only where nothing better counts
    ],
)
def test_a_label_is_the_entries_that_the_rule_lets_count(words, label, rule, ids):
    assert label_ids(words, label, rule) == ids


# --- labels found, and by accident -----------------------------------------------------------------------------------


def hits(present, retrieved):
    present, retrieved = np.asarray(present, bool), np.asarray(retrieved, bool)
    layers, shown, labels = retrieved.shape
    none, one = np.zeros((layers, shown), int), np.ones(shown, int)
    names = tuple(f"label{i}" for i in range(labels))
    rest = np.ones(labels, int), np.zeros((layers, labels), int)
    return LabelHits(names, present, retrieved, 4 * one, one, none, *rest)


def recall(found):
    """Share of (picture, label) pairs whose label some token of the picture retrieves, by layer."""
    return stats.drawn(found.label_rows(), "found", over="asked", by="layer", resamples=2).loc[0].tolist()


def chance_by_pairs(found, times):
    """What is found of the labels of another picture, pair by pair, each picture taken so many times, by layer."""
    order = np.repeat(np.arange(len(times)), times.astype(int))
    shared = np.einsum("pn,lqn->lpq", found.present[order].astype(int), found.retrieved[:, order].astype(int))
    other = order[:, None] != order[None]
    return (shared * other).sum((1, 2)) / (found.present[order].sum(1)[:, None] * other).sum()


def test_what_is_found_is_counted_in_picture_label_pairs_and_what_none_has_is_refused():
    found = hits([[1, 1], [0, 1]], [[[1, 0], [1, 1]]])
    assert found.label_rows().asked.tolist() == [2, 1]
    assert found.label_rows().found.tolist() == [1, 1]  # label 0 in picture 1 is no hit: the picture has no such label
    assert recall(found) == [2 / 3]
    with pytest.raises(EmbedLensError, match="nothing was asked of 0: take more pictures"):
        hits([[0], [0]], [[[1], [0]]]).beyond()


def test_what_is_found_by_accident_is_what_pairs_of_different_pictures_give_also_when_drawn():
    rng = np.random.default_rng(1)
    present = rng.random((60, 20)) < rng.uniform(0.02, 0.3, 20)
    present[:, 0] |= ~present.any(1)
    retrieved = rng.random((2, 60, 20)) < rng.uniform(0, 0.6, 20)
    retrieved[1] |= present & (rng.random((60, 20)) < 0.5)  # in the second layer half of the true ones
    found = hits(present, retrieved)
    chance = stats.drawn(found.label_rows(), "by_accident", over="asked", by="layer", resamples=300)
    assert chance.loc[0].to_numpy() == pytest.approx(chance_by_pairs(found, np.ones(60)))
    anew = [chance_by_pairs(found, times) for times in stats.draws(60, 300)]
    spread = np.std(anew, axis=0)
    assert chance.loc[1:].std().to_numpy() == pytest.approx(spread, rel=0.1)
    assert np.abs(chance.loc[1:].to_numpy() - anew).mean() < 0.25 * spread.min()  # draw by draw, not only in spread
    beyond = stats.estimates(found.beyond())
    assert beyond[1] > 0.2 and beyond[0] < 0.2


class PlantedLens(Lens):
    """Answers with the id of the label planted at a token, and with noise for the rest of the k."""

    def __init__(self, ids):
        self.ids = ids  # [pictures, tokens]
        self.picture = -1

    def scores(self, h):
        raise AssertionError("label_hits asks for the best words only")

    def topk(self, h, k=5):
        self.picture += 1
        layers, tokens, _ = h.shape
        ids = torch.zeros(layers, tokens, k, dtype=torch.long)
        ids[-1, :, k - 1] = self.ids[self.picture]  # at the last layer, at rank k
        return torch.zeros(ids.shape), ids


def names_of_patches(grid, sample):
    """The label of the object each patch lies in, "" for none."""
    names = [""] * len(grid)
    for annotation in sample.annotations:
        x, y, w, h = annotation["bbox"]
        for patch in grid.inside((x, y, x + w, y + h)).nonzero().flatten().tolist():
            names[patch] = sample.category_names[annotation["category_id"]]
    return names


def test_labels_planted_on_their_patches_are_all_found_at_their_layer_and_k(miniature, pictures):
    ids_of = {name: label_ids(miniature.tokenizer, name) for name in pictures[0].category_names.values()}
    grids = [miniature.prompt(sample.image, "What?").grid for sample in pictures]
    names = [names_of_patches(*both) for both in zip(grids, pictures, strict=True)]
    ids = torch.tensor([[ids_of[name][0] if name else 0 for name in row] for row in names])
    found = label_hits(miniature, pictures, ks=(2, 3), lenses={"planted": PlantedLens(ids)}, batch_size=4)
    missed, hit = found["planted", 2, "head-word"], found["planted", 3, "head-word"]
    covered, asked = sum(len(set(row) - {""}) for row in names), sum(len(sample.labels) for sample in pictures)
    assert hit.present.sum() == asked and max(recall(missed)) == 0
    assert recall(hit) == [0] * miniature.n_layers + [covered / asked]
    assert hit.object_tokens.tolist() == [sum(map(bool, row)) for row in names]
    assert hit.grounded.tolist() == [[0] * len(names)] * miniature.n_layers + [hit.object_tokens.tolist()]
    assert 0 < hit.token_chance()[-1] < 1 and hit.token_chance()[0] == 0
    first = next(filter(None, names[0]))  # the same word on every patch names the patches of its own object
    everywhere = torch.full((len(grids[0]), 2), ids_of[first][-1])
    named, objects = named_patches(miniature, pictures[0], grids[0], everywhere)
    assert objects.tolist() == [name != "" for name in names[0]]
    assert named.tolist() == [name == first for name in names[0]]


def test_lenses_and_anything_else_that_gives_words_are_read_at_every_layer_whatever_the_batches(miniature, pictures):
    def first(model, prompt, k):
        return LogitLens.from_model(model).topk(model.hidden_states(prompt)[-1:, prompt.visual], k)[1]

    rules = ("strict", "head-word")
    one = label_hits(miniature, pictures[:3], ks=(1, 5), rules=rules, batch_size=1)
    together = label_hits(miniature, iter(pictures[:3]), ks=(1, 5), rules=rules, batch_size=3)
    assert set(one) == {(lens, k, rule) for lens in ("EmbedLens", "LogitLens") for k in (1, 5) for rule in rules}
    for key, found in one.items():
        assert found.retrieved.shape[:2] == (miniature.n_layers + 1, 3)
        assert np.array_equal(found.retrieved, together[key].retrieved)
    strict, lens = one["EmbedLens", 5, "strict"], one["LogitLens", 5, "head-word"]
    assert set(strict.labels) < set(lens.labels)
    assert (one["EmbedLens", 1, "strict"].retrieved <= strict.retrieved).all()
    own = label_hits(miniature, pictures[:3], ks=(5,), lenses={"own": first})["own", 5, "head-word"]
    assert own.retrieved.shape[0] == 1 and np.array_equal(own.retrieved[0], lens.retrieved[-1])
    assert np.array_equal(own.grounded[0], lens.grounded[-1]) and own.token_chance() == lens.token_chance()[-1]


# --- a linear probe --------------------------------------------------------------------------------------------------


def test_what_a_patch_shows_is_its_mean_colour_the_box_it_lies_in_or_the_nearest_and_nothing_in_the_bars():
    canvas = Image.new("RGB", (40, 20), "white")
    canvas.paste(readout.COLOURS["red"], (0, 0, 20, 20))
    canvas.paste((0, 0, 0), (20, 0, 25, 10))  # 5 of 10 columns black: the mean is grey
    canvas.paste((255, 255, 255), (25, 0, 30, 10))
    grid, names = PatchGrid(4, 4, Frame.letterbox(40, 20)), list(readout.COLOURS)
    found = [names[colour] if colour >= 0 else "" for colour in readout.patch_colours(canvas, grid)]
    assert found == [""] * 4 + ["red", "red", "grey", "white", "red", "red", "white", "white"] + [""] * 4
    boxes = ((1, [0, 0, 20, 20]), (2, [0, 0, 10, 10]), (3, [38, 0, 2, 20]))  # the second, smaller, lies in the first
    entries = tuple({"category_id": id, "bbox": bbox} for id, bbox in boxes)
    crowd = {"category_id": 4, "bbox": [0, 0, 40, 20], "iscrowd": 1}
    sample = samples.Sample(0, 40, 20, (*entries, crowd), (), (), {}, lambda: canvas)
    inside, beside = (answers[4:12].tolist() for answers in readout.patch_objects(sample, grid))
    assert inside == [2, 1, -1, -1, 1, 1, -1, -1] and beside == [-1, -1, 1, 3, -1, -1, 1, 3]
    for answers in readout.patch_objects(sample, grid):
        assert (answers[:4] == -1).all() and (answers[12:] == -1).all()
    assert (np.stack(readout.patch_objects(replace(sample, annotations=(crowd,)), grid)) == -1).all()


def planted(strength=1.0, pictures=40, each=12):
    rng = np.random.default_rng(0)
    picture = np.repeat(np.arange(pictures), each)
    answers = rng.integers(0, 3, len(picture))
    vectors = rng.normal(0, 0.05, (len(picture), 16))
    vectors[np.arange(len(picture)), answers] += 0.2 * strength
    vectors[:, 15] += 100  # a direction that all share: every cosine is near one
    return vectors.astype(np.float32), answers, picture


def rate(found, of="hits"):
    return stats.estimate(stats.drawn(found.assign(gain=found.hits - found.majority), of, over="asked")[of])


def test_content_behind_a_shared_direction_is_read_and_noise_is_not():
    vectors, answers, picture = planted()
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (units @ units.T).min() > 0.9999
    found = readout.linear_readout([vectors], answers, picture)
    assert rate(found).low > 0.95 and rate(found, "majority").high < 0.6 and rate(found, "gain").low > 0.3
    noise, _, _ = planted(strength=0)
    nothing = readout.linear_readout([noise], answers, picture)
    assert rate(nothing, "gain").low < 0.05
    lopsided = np.where(np.arange(len(answers)) % 10 == 0, answers, 1)
    often = readout.linear_readout([noise], lopsided, picture)
    assert rate(often, "majority").value > 0.85 and abs(rate(often, "gain").value) < 0.05
    both = readout.linear_readout([vectors, noise], answers, picture)  # several forms are averaged
    assert both.hits.to_numpy() == pytest.approx((found.hits + nothing.hits).to_numpy() / 2)
    for too_little in (np.full(len(answers), -1), np.zeros_like(answers)):
        assert readout.linear_readout([vectors], too_little, picture) is None
    assert readout.linear_readout([vectors], answers, picture // 10) is None  # four pictures


def test_pictures_are_on_one_side_only():
    """Each picture has its own random answer and its own mark: a probe that saw the picture would be right."""
    rng = np.random.default_rng(0)
    picture = np.repeat(np.arange(60), 10)
    answers = rng.integers(0, 2, 60)[picture]
    vectors = np.eye(60, dtype=np.float32)[picture] + rng.normal(0, 0.01, (600, 60)).astype(np.float32)
    found = readout.linear_readout([vectors], answers, picture)
    assert found.id.nunique() == len(found) == 20 and rate(found).value < 0.75
    shuffled = rng.permutation(600)  # tokens, not pictures, apart: the same probe reads the marks
    leaking = readout.linear_readout([vectors], answers, np.arange(600)[shuffled] // 10)
    assert rate(leaking).value > 0.95


def test_the_projector_gives_the_visual_tokens_and_a_random_one_does_not(tiny, pictures):
    prompts = tiny.prompts([sample.image for sample in pictures[:3]], [QUESTION] * 3)
    before = torch.stack(tiny.tower_states_of(prompts))[:, tiny.feature_layer].flatten(0, 1)
    tokens = torch.cat([prompt.embeds[prompt.visual] for prompt in prompts]).numpy()
    own, state = tiny.projector, torch.random.get_rng_state()
    assert readout.projected(own, before) == pytest.approx(tokens, abs=1e-5)
    drawn, again, other = (readout.projected(readout.random_projector(own, seed), before) for seed in (0, 0, 1))
    assert np.array_equal(drawn, again) and torch.equal(state, torch.random.get_rng_state())
    assert not np.allclose(drawn, tokens, atol=1e-2) and not np.allclose(drawn, other, atol=1e-2)


def test_everything_is_asked_of_dead_and_alive_tokens_by_all_projectors(tiny):
    pictures = samples.load("miniworld", n=40)
    words = EmbedLens.from_model(tiny).topk(tiny.visual_features_of([pictures[3].image])[0], 1)[1].flatten()
    reference = replace(discover(tiny, pictures[:2]), dead_id=int(words.bincount().argmax()))
    states, few = readout.token_table(tiny, pictures[:4], reference, per_picture=3, batch_size=3)
    assert tuple(few.columns[3:]) == readout.QUESTIONS and (few.dead != few.alive).all() and few.dead.any()
    assert few.groupby("id")[["dead", "alive"]].sum().to_numpy().max() <= 3
    alone = readout.token_table(tiny, pictures[3:4], reference, per_picture=3, batch_size=1)
    own = few.id == 3  # whatever stands before it
    torch.testing.assert_close(states[torch.tensor(own.tolist())], alone[0], atol=1e-4, rtol=1e-4)
    assert few[own].reset_index(drop=True).equals(alone[1])

    read = readout.readouts(tiny, pictures, reference, projectors=1)
    assert set(read.reader) == set(readout.READERS) and set(read.question) <= set(readout.QUESTIONS)
    assert "alive" in set(read.group) <= {"alive", "dead"}
    without = readout.readouts(tiny, pictures, replace(reference, dead_id=None), projectors=1)
    assert set(without.group) == {"alive"}  # no word, no dead tokens, no rows
    assert readout.readouts(tiny, pictures[:3], reference, projectors=1).empty


# --- hubs ------------------------------------------------------------------------------------------------------------


def hubs_made_by_the_mean(seed: int = 0) -> dict[str, np.ndarray]:
    """Words that lie along the mean of the tokens are hubs of tokens and matched directions, not of random ones."""
    embeddings = hubs.random_directions(200, 16, seed)
    mean = hubs.random_directions(1, 16, seed + 1)
    embeddings[:3] = 0.3 * embeddings[:3] + mean
    tokens = hubs.random_directions(20 * 30, 16, seed + 2).view(20, 30, 16) + 2 * mean
    return hubs.hubness(EmbedLens(embeddings, list(map(str, range(200)))), list(tokens), repeats=3, seed=seed)


def test_a_hub_made_by_the_mean_is_told_from_a_hub_of_the_vocabulary():
    found = hubs_made_by_the_mean()
    tokens, matched, random = (found[kind] for kind in hubs.KINDS)
    assert tokens.sum() == 600 and matched.sum(1).tolist() == random.sum(1).tolist() == [600] * 3
    lean, entries = hubs.skewed(found, resamples=100), hubs.hubs(matched.sum(0))
    share = hubs.share_on(found, entries)
    assert min(lean[hubs.TOKENS].low, lean[hubs.MATCHED].low) > 2 * lean[hubs.RANDOM].high
    assert entries[:3].all() and share[hubs.TOKENS].low > 0.3 > share[hubs.RANDOM].high
    again, other = hubs_made_by_the_mean(), hubs_made_by_the_mean(1)
    assert np.array_equal(matched, again[hubs.MATCHED]) and not np.array_equal(random, other[hubs.RANDOM])
    assert not np.array_equal(random[0], random[1])


# --- questions about one patch ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tiny):
    side, patch = tr.canvas_of(tiny)
    assert (side, patch) == (56, 14)  # what the tower reads
    return patchbench.pictures(14, side=side, patch=patch)


def test_the_answers_are_those_of_each_picture_asked_alone_after_one_look(tiny, drawn, monkeypatch):
    seen, features = [], type(tiny)._features
    monkeypatch.setattr(type(tiny), "_features", lambda model, inputs: seen.extend(inputs) or features(model, inputs))
    answers = tr.ask(tiny, drawn[:5], batch_size=4)
    monkeypatch.undo()
    assert len(answers) > len(seen) == 5  # a picture goes through the tower once for all its questions
    asked = [(picture, axis) for picture in drawn[:5] for axis in picture.asked]
    assert list(zip(answers.id, answers.axis, strict=True)) == [(picture.id, axis) for picture, axis in asked]
    for row, (picture, axis) in zip(answers.itertuples(), asked, strict=True):
        question = picture.asked[axis]
        assert row.said == tiny.answer(tiny.prompt(picture.image, question.text), tr.ANSWER_TOKENS)
        assert row.correct == patchbench.correct(question, row.said)
        assert row.follows == (patchbench.follows(picture, row.said) if axis == "colour" else "")


def test_the_states_are_those_of_the_patch_with_content(tiny, drawn):
    states = tr.content_states(tiny, drawn[:3], batch_size=2)
    for picture, state in zip(drawn[:3], states, strict=True):
        prompt = tiny.prompt(picture.image, tr.QUESTION)
        whole = tiny.hidden_states(prompt)[:, prompt.visual]
        index = picture.row * prompt.grid.cols + picture.col
        torch.testing.assert_close(state, whole[:, index], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(state, whole[:, (index + 1) % len(prompt.grid)], atol=1e-3)
    with pytest.raises(EmbedLensError, match="canvas_of gives for this model"):
        tr.content_states(tiny, patchbench.pictures(1, side=56, patch=28))


def test_both_halves_of_the_strings_are_asked_about_the_same_pictures_and_a_swap_shows_another(miniature, drawn):
    texts = [picture for picture in drawn if picture.group == "OCR"]
    rows = tr.piece_rows(miniature, texts, seed=1)
    assert rows.groupby("half").id.apply(list).to_dict() == {half: [0, 1, 2, 3] for half in set(rows.half)}
    assert set(rows.half) == {"one piece", "several pieces"} and rows[["own", "other"]].isin([0, 1]).all(None)
    shown = tr._shifted(drawn)
    assert all(a.group == b.group and a.id != b.id for a, b in zip(drawn, shown, strict=True))
    assert sorted(p.id for p in shown) == [p.id for p in drawn]


# --- scores of tokens ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tiny, pictures):
    return scores.scored(tiny, pictures[:3], Protocol(question="what is in the picture?"))


def test_every_token_has_a_row_with_what_is_read_of_it(tiny, found, pictures):
    again = token_scores(tiny, found.prompts[:1], None, found.protocol)[0]
    own = found.table[found.table["id"] == pictures[0].id]
    assert own["patch"].tolist() == list(range(16))
    assert np.allclose(own["probability"], again.probability, atol=1e-5)
    assert np.allclose(own["divergence"], again.cascade(), atol=1e-5)
    assert scores.orders_in(found.table) == ["similarity", "attention"]
    few = scores.scored(tiny, pictures[:3], found.protocol, low_only=True)
    low = found.table[found.table["low"]]
    assert few.table[["id", "patch"]].values.tolist() == low[["id", "patch"]].values.tolist()
    assert np.allclose(few.table["probability"], low["probability"], atol=1e-5)
    assert [sample.id for sample in few.samples] == list(dict.fromkeys(low["id"]))


def test_pictures_without_a_prototype_give_no_codebook_and_say_why(tiny, found):
    with pytest.warns(UserWarning, match="these 3 pictures give no codebook: .*raise it"):
        assert found.codebook(tiny, replace(AS_SHARES, most_in_picture=0)) is None
    book, stages = found.codebook(tiny, Recipe(more_pictures=0, most_in_picture=1.0))
    assert len(book) == stages.codebook and book.model == tiny.name
    assert set(book.image_ids.tolist()) <= {sample.id for sample in found.samples}
