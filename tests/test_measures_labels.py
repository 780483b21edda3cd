"""Labels in visual tokens: matching, recall and chance, with structure planted where the truth is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from embedlens import stats
from embedlens.errors import EmbedLensError
from embedlens.lenses import Lens, LogitLens
from embedlens.measures.labels import LabelHits, label_hits, label_ids, largest_object, named_patches


class Words:
    """As much of a tokenizer as matching needs."""

    def __init__(self, *pieces):
        self.pieces = list(pieces)

    def get_vocab(self):
        return {piece: index for index, piece in enumerate(self.pieces)}

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[index] for index in ids]

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [self.pieces.index(piece) for piece in self.split[text]]}


def test_a_label_is_its_single_token_forms_in_any_case_and_number():
    words = Words("dog", "Ġdog", "ĠDog", "▁dogs", "Ġdogma", "do", "ĠDOG", "hot")
    assert label_ids(words, "dog", "strict") == (0, 1, 2, 3, 6)


def test_a_label_of_several_words_counts_by_its_last_word_only_if_the_rule_says_so():
    words = Words("Ġcell", "Ġphone", "Ġphones", "Ġdog")
    assert label_ids(words, "cell phone", "strict") == ()
    assert label_ids(words, "cell phone", "head-word") == (1, 2)


def test_a_head_that_is_something_else_and_pieces_that_go_on_with_a_word_are_no_label():
    """As in LLaMA's vocabulary, where `ties` is of "properties" and `oven` of "Beethoven"."""
    words = Words("▁", "▁dog", "dog", "▁tie", "ties", "oven", "▁bear", "Cat", "▁mice", "▁mouses", "▁skises")
    assert label_ids(words, "hot dog") == () == label_ids(words, "oven")
    assert label_ids(words, "dog") == (1,) and label_ids(words, "tie") == (3,) and label_ids(words, "cat") == (7,)
    assert label_ids(words, "teddy bear") == (6,) and label_ids(words, "mouse") == (8,)
    assert label_ids(words, "skis") == ()


def test_the_first_piece_counts_only_where_nothing_better_does():
    words = Words("Ġz", "ebra", "Ġdog", "▁")
    words.split = {" zebra": ["Ġz", "ebra"], " dog": ["Ġdog"]}
    assert label_ids(words, "zebra", "head-word") == ()
    assert label_ids(words, "zebra", "first-piece") == (0,)
    assert label_ids(words, "dog", "first-piece") == (2,)
    words.split = {" zebra": ["▁", "Ġz", "ebra"]}
    assert label_ids(words, "zebra", "first-piece") == (0,)  # a bare space says nothing


@pytest.mark.parametrize("label, rule, says", [("dog", "loose", "strict"), (" ", "strict", "empty")])
def test_what_cannot_be_matched_is_refused(label, rule, says):
    with pytest.raises(EmbedLensError, match=says):
        label_ids(Words("dog"), label, rule)


def hits(present, retrieved, **more):
    present, retrieved = np.asarray(present, bool), np.asarray(retrieved, bool)
    layers, pictures, labels = retrieved.shape
    rest = {
        "tokens": np.full(pictures, 4),
        "object_tokens": np.ones(pictures, int),
        "grounded": np.zeros((layers, pictures), int),
        "label_tokens": np.ones(labels, int),
        "retrieving": np.zeros((layers, labels), int),
    }
    return LabelHits(tuple(f"label{i}" for i in range(labels)), present, retrieved, **(rest | more))


def random_hits(seed, pictures=300, labels=20, planted=0.0, noise=0.3):
    """Labels present at random, retrieved at random with frequencies of their own, and `planted` of the true ones."""
    rng = np.random.default_rng(seed)
    present = rng.random((pictures, labels)) < rng.uniform(0.02, 0.3, labels)
    present[:, 0] |= ~present.any(1)
    retrieved = rng.random((2, pictures, labels)) < rng.uniform(0, 2 * noise, labels)
    retrieved[1] |= present & (rng.random((pictures, labels)) < planted)
    return hits(present, retrieved)


def recall(found):
    """Share of (picture, label) pairs whose label some token of the picture retrieves, by layer."""
    return stats.drawn(found.label_rows(), "found", over="asked", by="layer", resamples=2).loc[0].tolist()


def test_what_is_found_is_counted_in_picture_label_pairs():
    found = hits([[1, 1], [0, 1]], [[[1, 0], [1, 1]]])
    assert found.label_rows().asked.tolist() == [2, 1]
    assert found.label_rows().found.tolist() == [1, 1]  # label 0 in picture 1 is no hit: the picture has no such label
    assert recall(found) == [2 / 3]


def chance_by_pairs(found, times):
    """What is found of the labels of another picture, pair by pair, each picture taken so many times, by layer."""
    order = np.repeat(np.arange(len(times)), times.astype(int))
    shared = np.einsum("pn,lqn->lpq", found.present[order].astype(int), found.retrieved[:, order].astype(int))
    other = order[:, None] != order[None]
    return (shared * other).sum((1, 2)) / (found.present[order].sum(1)[:, None] * other).sum()


def test_what_is_found_by_accident_is_what_pairs_of_different_pictures_give_also_when_drawn():
    found = random_hits(1, pictures=60, planted=0.5)
    resamples = 300
    chance = stats.drawn(found.label_rows(), "by_accident", over="asked", by="layer", resamples=resamples)
    assert chance.loc[0].to_numpy() == pytest.approx(chance_by_pairs(found, np.ones(60)))
    anew = [chance_by_pairs(found, times) for times in stats.draws(60, resamples)]
    spread = np.std(anew, axis=0)
    assert chance.loc[1:].std().to_numpy() == pytest.approx(spread, rel=0.1)
    assert np.abs(chance.loc[1:].to_numpy() - anew).mean() < 0.25 * spread.min()  # draw by draw, not only in spread


def test_chance_equals_recall_where_retrieval_knows_nothing_of_the_picture():
    gaps = [random_hits(seed).beyond().loc[0, 0] for seed in range(8)]
    assert abs(np.mean(gaps)) < 3 * np.std(gaps) / len(gaps) ** 0.5 + 1e-9
    assert max(map(abs, gaps)) < 0.06  # 0.02 is one standard error of 700 pairs
    planted = stats.estimates(random_hits(0, planted=0.5).beyond())
    assert planted[1] > 0.2 and planted[0] < 0.2


def test_labels_that_no_picture_has_are_refused():
    with pytest.raises(EmbedLensError, match="nothing was asked of 0: take more pictures"):
        hits([[0], [0]], [[[1], [0]]]).beyond()


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


@pytest.fixture
def pictures():
    from embedlens import samples

    return samples.load("miniworld", n=6)


def names_of_patches(model, sample):
    """The label of the object each patch lies in, "" for none."""
    grid = model.prompt(sample.image, "What?").grid
    names = [""] * len(grid)
    for annotation in sample.annotations:
        x, y, w, h = annotation["bbox"]
        for patch in grid.inside((x, y, x + w, y + h)).nonzero().flatten().tolist():
            names[patch] = sample.category_names[annotation["category_id"]]
    return names


def test_labels_planted_on_their_patches_are_all_found_at_their_layer_and_k(miniature, pictures):
    ids_of = {name: label_ids(miniature.tokenizer, name) for name in pictures[0].category_names.values()}
    names = [names_of_patches(miniature, sample) for sample in pictures]
    ids = torch.tensor([[ids_of[name][0] if name else 0 for name in row] for row in names])
    found = label_hits(miniature, pictures, ks=(2, 3), lenses={"planted": PlantedLens(ids)}, batch_size=4)
    missed, hit = found["planted", 2, "head-word"], found["planted", 3, "head-word"]
    covered = sum(len(set(row) - {""}) for row in names)
    asked = sum(len(sample.labels) for sample in pictures)
    assert hit.present.sum() == asked
    assert recall(hit) == [0] * miniature.n_layers + [covered / asked]
    assert hit.object_tokens.tolist() == [sum(map(bool, row)) for row in names]
    assert hit.grounded.tolist() == [[0] * len(names)] * miniature.n_layers + [hit.object_tokens.tolist()]
    assert 0 < hit.token_chance()[-1] < 1 and hit.token_chance()[0] == 0
    assert max(recall(missed)) == 0


def test_named_patches_are_those_that_retrieve_the_label_of_their_own_object(miniature, pictures):
    sample = pictures[0]
    names = names_of_patches(miniature, sample)
    right = label_ids(miniature.tokenizer, next(filter(None, names)))[-1]
    grid = miniature.prompt(sample.image, "What?").grid
    everywhere = torch.full((len(grid), 2), right)
    named, objects = named_patches(miniature, sample, grid, everywhere)
    assert objects.tolist() == [name != "" for name in names]
    assert named.tolist() == [name == next(filter(None, names)) for name in names]
    assert not named_patches(miniature, sample, grid, torch.zeros_like(everywhere))[0].any()


def test_both_lenses_are_read_at_every_layer_and_batches_do_not_matter(miniature, pictures):
    one = label_hits(miniature, pictures[:3], ks=(1, 5), rules=("strict", "head-word"), batch_size=1)
    all_at_once = label_hits(miniature, iter(pictures[:3]), ks=(1, 5), rules=("strict", "head-word"), batch_size=3)
    assert set(one) == {
        (lens, k, rule) for lens in ("EmbedLens", "LogitLens") for k in (1, 5) for rule in ("strict", "head-word")
    }
    for key, found in one.items():
        assert found.retrieved.shape[:2] == (miniature.n_layers + 1, 3)
        assert np.array_equal(found.retrieved, all_at_once[key].retrieved)
    strict, head = one["EmbedLens", 5, "strict"], one["EmbedLens", 5, "head-word"]
    assert set(strict.labels) < set(head.labels)
    assert (one["EmbedLens", 1, "strict"].retrieved <= strict.retrieved).all()


def test_the_largest_object_is_found_at_its_middle(miniature, pictures):
    for sample in pictures:
        grid = miniature.prompt(sample.image, "What?").grid
        name, patch = largest_object(miniature, sample, grid)
        sizes = {e["bbox"][2] * e["bbox"][3]: e for e in reversed(sample.annotations)}
        biggest = sizes[max(sizes)]
        x, y, w, h = biggest["bbox"]
        x0, y0, x1, y1 = grid.cell(patch)
        assert name == sample.category_names[biggest["category_id"]]
        assert x0 <= x + w / 2 < x1 and y0 <= y + h / 2 < y1
    crowd = replace(pictures[0], annotations=tuple({**e, "iscrowd": 1} for e in pictures[0].annotations))
    with pytest.raises(EmbedLensError, match="take another picture"):
        largest_object(miniature, crowd, grid)


def test_anything_that_gives_words_to_tokens_stands_beside_the_lenses(miniature, pictures):
    def first(model, prompt, k):
        return LogitLens.from_model(model).topk(model.hidden_states(prompt)[-1:, prompt.visual], k)[1]

    readers = {"own": first, "logit": LogitLens.from_model(miniature)}
    found = label_hits(miniature, pictures[:2], ks=(2,), lenses=readers)
    own, lens = found["own", 2, "head-word"], found["logit", 2, "head-word"]
    assert own.retrieved.shape[0] == 1 and np.array_equal(own.retrieved[0], lens.retrieved[-1])
    assert np.array_equal(own.grounded[0], lens.grounded[-1]) and own.token_chance() == lens.token_chance()[-1]


def test_no_pictures_are_refused(miniature):
    with pytest.raises(EmbedLensError, match="at least one picture"):
        label_hits(miniature, [])
