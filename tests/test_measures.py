"""Clusters, groups, norms are what loops over one picture give; no row hangs on its batch, no group has a stand-in."""

import gc
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity, normalize

import embedlens as el
from embedlens import samples
from embedlens.clusters import anchor_clusters, centroids, cluster_means, cross_image_similarity, picture_pairs
from embedlens.groups import discover, token_groups
from embedlens.lenses import EmbedLens, unit_vectors
from embedlens.measures import anatomy, clusters, dead, norms
from embedlens.tracing import trace
from embedlens.vlm import QUESTION


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(cosine_similarity(a.double(), b.double(), dim=0))


@pytest.fixture(scope="module")
def reference(tiny, pictures):
    """A reference under which some tokens are dead by their word, so that both memberships have something to do."""
    found = discover(tiny, pictures[:2])
    words = EmbedLens.from_model(tiny).topk(tiny.visual_features_of([pictures[3].image])[0], 3)[1].flatten()
    return replace(found, dead_id=int(words.bincount().argmax()))


@pytest.fixture(scope="module")
def shared(tiny, pictures, reference):
    return dead.common(tiny, pictures[:2], reference, batch_size=1)


@pytest.fixture(scope="module")
def studies(tiny, pictures, reference, shared):
    return {
        "anatomy": anatomy.study_of(tiny, pictures[:2], pictures[:2], seed=3),
        "clusters": partial(clusters.by_group, reference=reference),
        "dead": partial(dead.by_group, reference=reference, shared=shared),
        "norms": partial(norms.by_layer, scales=(1.0, 0.01), reference=reference, lens=EmbedLens.from_model(tiny)),
        "first block": partial(norms.first_block, scales=(1.0, 0.5, 4.0)),
    }


@pytest.fixture(scope="module")
def rows(tiny, pictures, studies):
    """By study, the rows of four pictures, two at a time."""
    return {name: el.run(study, tiny, pictures[2:], batch_size=2) for name, study in studies.items()}


@pytest.mark.parametrize("name", ["anatomy", "clusters", "dead", "norms", "first block"])
def test_a_picture_has_the_rows_that_it_has_alone(tiny, pictures, studies, rows, name):
    alone = el.run(studies[name], tiny, pictures[3:4], batch_size=1)
    beside = rows[name][rows[name].id == 3].reset_index(drop=True)
    wanted = alone.reindex(columns=beside.columns)
    assert len(alone) and beside.select_dtypes("number").notna().any().any()
    pd.testing.assert_frame_equal(beside, wanted, atol=2e-4, rtol=1e-3, check_dtype=False)


def test_a_group_that_a_model_lacks_has_no_rows(tiny, pictures, reference, rows):
    assert "ViT sink" not in set(rows["dead"].group) and "dead" in set(rows["dead"].group)
    none = replace(reference, dead_id=None)
    found = el.run(partial(norms.by_layer, reference=none), tiny, pictures[:1], batch_size=1)
    assert set(found.positions) == {"visual", "text", "all text", "alive"}
    assert found[found.positions == "alive"].norm.tolist() == found[found.positions == "visual"].norm.tolist()
    wordless = dead.common(tiny, pictures[:2], none)
    assert "dead" not in wordless["stream"]
    found = el.run(partial(dead.by_group, reference=none, shared=wordless), tiny, pictures[2:], batch_size=4)
    assert set(found.group) == {"alive", "remaining", "random directions"}
    assert dead.chosen_by_half(tiny, pictures[3:4], none, wordless) == [[]]
    assert dead.checked(tiny, pictures, none).dead_id is None


# --- clusters --------------------------------------------------------------------------------------------------------


def test_a_study_of_clusters_is_what_its_parts_give_picture_by_picture(tiny, pictures):
    thresholds, orders = (0.9, 0.5, 1.0), ("greedy", "raster")
    studies = clusters.cluster_study(tiny, iter(pictures), thresholds=thresholds, orders=orders, batch_size=2)
    assert set(studies) == {(threshold, order) for threshold in thresholds for order in orders}
    lens, pairs = EmbedLens.from_model(tiny), picture_pairs(len(pictures))
    for threshold, order in ((0.9, "greedy"), (0.5, "raster")):
        study, whole = studies[threshold, order], []
        for i, sample in enumerate(pictures):
            prompt = tiny.prompt(sample.image, "What?")
            tokens = prompt.embeds[prompt.visual]
            labels = anchor_clusters(tokens, threshold, order)
            found = centroids(tokens, labels, most=6)
            whole.append((tokens, labels, found))
            counts = labels.bincount()[:6].tolist()
            assert study.sizes[i].tolist() == counts + [0] * (6 - len(counts))
            assert np.array_equal(study.largest[i], (labels == 0).numpy())
            assert study.nearest[i, : len(found)].tolist() == lens.topk(found, 1)[1][:, 0].tolist()
            assert study.in_bars[i, 0] == pytest.approx(float(prompt.grid.padded[labels == 0].float().mean()))
            assert study.singletons[i] == (labels.bincount() == 1).sum()
        raw, removed = study.similarity(pairs), study.similarity(pairs, mean_removed=True)
        for row, (i, j) in enumerate(pairs):
            expected = cross_image_similarity(whole[i][2], whole[j][2]).numpy()
            assert raw[row, : len(expected)] == pytest.approx(expected, abs=1e-5)
            assert np.isnan(raw[row, len(expected) :]).all()
            a, b = (unit_vectors(cluster_means(t, labels, 6) - study.center) for t, labels, _ in (whole[i], whole[j]))
            assert removed[row, : len(a)] == pytest.approx(cross_image_similarity(a, b).numpy(), abs=1e-4)
        assert np.array_equal(np.isnan(study.similarity(pairs, null=True)), np.isnan(raw))
        shares, table = study.dominance, study.table()
        assert table[table["rank"] == 0].share.tolist() == shares[:, 0].tolist()
        assert table.in_bars.isna().tolist() == (table.share == 0).tolist()
        assert shares[:, 1] == pytest.approx(study.sizes[:, 0] / study.sizes[:, :5].sum(1))
    single = studies[1.0, "greedy"]
    assert (single.singletons == single.tokens).all() and (single.dominance[:, 2] == 0).all()


def test_batches_and_neighbours_do_not_matter_and_the_null_is_seeded(tiny, pictures):
    one, many, other, later = (
        clusters.cluster_study(tiny, some, batch_size=size, seed=seed)[0.9, "greedy"]
        for some, size, seed in ((pictures, 1, 0), (pictures, 5, 0), (pictures, 5, 1), (pictures[2:], 5, 0))
    )
    assert np.array_equal(one.sizes, many.sizes) and torch.equal(other.means, many.means)
    assert torch.allclose(one.null_means, many.null_means, atol=1e-5)
    assert not torch.allclose(other.null_means, many.null_means, atol=1e-5)
    assert torch.allclose(later.null_means, many.null_means[2:], atol=1e-5), "random sets hang on what came before"


def test_every_group_is_its_picture_counted_alone_and_a_crowd_is_no_object(tiny, pictures, reference, rows):
    text = normalize(normalize(tiny.input_embeddings.float(), dim=-1).mean(0), dim=0)
    sample = pictures[3]
    prompt = tiny.prompt(sample.image, QUESTION)
    tokens = prompt.embeds[prompt.visual].float()
    groups = token_groups(tiny, prompt, reference)
    covered = torch.zeros(len(tokens), dtype=torch.bool)
    for x, y, w, h in (entry["bbox"] for entry in sample.annotations):
        covered |= prompt.grid.inside((x, y, x + w, y + h))
    own = rows["clusters"][rows["clusters"].id == sample.id].set_index("group")
    for name, mask in (groups.named | {"sink": groups.sink, "C0": anchor_clusters(tokens) == 0}).items():
        assert own.share[name] == pytest.approx(mask.double().mean())
        if mask.any():
            assert own.to_text[name] == pytest.approx(float((normalize(tokens[mask], dim=-1) @ text).mean()), abs=1e-5)
            assert own.inside[name] == pytest.approx(float(covered[mask].float().mean()))
    crowd = {**sample.annotations[0], "bbox": [0, 0, sample.width, sample.height], "iscrowd": 1}
    crowded = replace(sample, annotations=(*sample.annotations, crowd))
    assert clusters.by_group(tiny, [sample], reference) == clusters.by_group(tiny, [crowded], reference)


def file_of(tensor: torch.Tensor) -> str:
    """The file of which the memory is a view, as Linux lists it; "" for memory of the process alone."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(place, 16) for place in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return "".join(part for part in line.split(maxsplit=5)[5:] if part.startswith("/"))
    raise AssertionError


def test_neither_pictures_nor_centroids_are_held_in_memory(tiny, pictures):
    """10,000 pictures take less than 2 GB: at width 4096 the centroids alone would be 12."""
    if not Path("/proc/self/maps").is_file():
        pytest.skip("what memory is of is read where Linux says it")
    seen = []

    def drawn(sample):
        image = Image.new("RGB", (640, 480), (sample, 0, 0))
        seen.append(weakref.ref(image))
        return image

    many = list(samples.readable([replace(pictures[0], id=i, draw=partial(drawn, i)) for i in range(6)]))
    found = clusters.cluster_study(tiny, many, batch_size=2)[0.9, "greedy"]
    assert file_of(found.means) and file_of(found.null_means) and not file_of(found.center)
    gc.collect()
    assert len(seen) >= 6 and not any(picture() for picture in seen)


def test_pictures_of_another_family_are_measured_and_none_is_compared_with_itself(twin_of):
    _, model = twin_of("Qwen/Qwen2.5-VL-7B-Instruct")
    measured, calibration, compared = anatomy.pictures("miniworld", 4, 0)
    assert len({picture.id for picture in (*measured, *compared)}) == 4 + len(compared) > 4 and not calibration
    table = el.run(anatomy.study_of(model, calibration, compared), model, measured, batch_size="auto")
    found = anatomy.numbers(table, photographs=False)
    assert table["tokens"].nunique() > 1 and found["photographs"] == 0
    assert 0 < found["share_0_low"] <= found["share_0"] <= found["share_0_high"]


# --- dead tokens -----------------------------------------------------------------------------------------------------


def test_random_tokens_are_as_many_as_dead_and_hang_on_picture_and_seed_alone(tiny, pictures, reference):
    prompts = tiny.prompts([picture.image for picture in pictures], [QUESTION] * len(pictures))
    found = dead.masks_of(tiny, pictures, prompts, reference, seed=0)
    differ = False
    for masks, picture, prompt in zip(found, pictures, prompts, strict=True):
        assert tuple(masks) == dead.GROUPS and masks["random"].sum() == masks["dead"].sum()
        assert torch.equal(masks["remaining"], ~masks["dead"])
        (alone,), (other,) = (dead.masks_of(tiny, [picture], [prompt], reference, seed) for seed in (0, 1))
        assert torch.equal(alone["random"], masks["random"])
        differ |= not torch.equal(other["random"], masks["random"])
    assert differ


def test_rows_of_dead_tokens_are_what_a_loop_over_them_gives(tiny, pictures, reference, shared, rows):
    def of(part, name):  # by layer
        own = rows["dead"].query(f"id == 3 and part == {part!r} and group == 'dead'")
        return own.sort_values("layer")[name].dropna().tolist()

    prompt = tiny.prompt(pictures[3].image, QUESTION)
    groups = token_groups(tiny, prompt, reference)
    chosen = groups.dead.nonzero()[:, 0].tolist()
    assert len(chosen) > 1 and of("picture", "share") == pytest.approx([len(chosen) / len(groups.dead)])
    run = trace(tiny, prompt, {"dead": prompt.spread(groups.dead), "visual": prompt.visual})
    asking = torch.arange(len(prompt)) > int(prompt.visual.nonzero()[-1])
    mass = {name: of_layer[:, asking].mean(-1).numpy() for name, of_layer in run.attention.items()}
    assert of("stream", "attention") == pytest.approx(mass["dead"], abs=1e-5)
    assert of("stream", "of_visual") == pytest.approx(mass["dead"] / mass["visual"], abs=1e-4)
    states = run.stream[:, prompt.visual]
    kept = [np.mean([cosine(a[i], b[i]) for i in chosen]) for a, b in zip(states[:-1], states[1:], strict=True)]
    assert of("stream", "kept") == pytest.approx(kept, abs=1e-5)
    pairs = [np.mean([cosine(h[i], h[j]) for i in chosen for j in chosen if i != j]) for h in states]
    assert of("stream", "inside") == pytest.approx(pairs, abs=1e-4)
    removed = [
        np.mean([cosine(normalize(h[i], dim=0) - center, direction - center) for i in chosen])
        for h, direction, center in zip(states, shared["stream"]["dead"], shared["stream"]["all"], strict=True)
    ]
    assert of("stream", "aligned_removed") == pytest.approx(removed, abs=1e-4)
    shares = tiny.logits(prompt)[prompt.visual][chosen].double().softmax(-1)
    assert of("picture", "entropy") == pytest.approx([float(-(shares * shares.log()).sum(-1).mean())], abs=1e-3)
    tower = torch.stack(tiny.tower_states_of([prompt]))[0][:, chosen]
    assert of("tower", "norm_l1") == pytest.approx(tower.abs().sum(-1).mean(-1).tolist(), rel=1e-5)


def test_a_dead_word_stands_only_if_both_halves_of_the_pictures_have_tokens_near_it(tiny, pictures, reference):
    assert dead.checked(tiny, [pictures[3]], reference) is reference
    lens, tokens = EmbedLens.from_model(tiny), torch.stack(tiny.visual_features_of([p.image for p in pictures]))
    seen = set(lens.topk(tokens, 3)[1].flatten().tolist())
    absent = next(index for index in range(len(tiny.tokens)) if index not in seen)
    assert dead.checked(tiny, pictures, replace(reference, dead_id=absent)).dead_id is None


# --- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("positions", ["visual", "text", "all text"])
def test_norms_and_turns_are_what_a_loop_over_the_stock_stream_gives(tiny, pictures, rows, scale, positions):
    for sample in pictures[2:4]:
        prompt = tiny.prompt(sample.image, QUESTION)
        mask = prompt.visual if positions == "visual" else prompt.text
        places = mask.nonzero()[1 if positions == "text" else 0 :, 0]
        states = tiny.hidden_states(prompt.rescaled(scale))[:, places]
        wanted = {"norm": [np.mean([float(h.pow(2).sum()) ** 0.5 for h in layer]) for layer in states]}
        for name, part in (("turn", states), ("centred", states - states.mean(1, keepdim=True))):
            blocks = zip(part[:-1], part[1:], strict=True)
            wanted[name] = [np.mean([cosine(a, b) for a, b in zip(*block, strict=True)]) for block in blocks]
        own = rows["norms"].query(f"id == {sample.id} and scale == {scale} and positions == {positions!r}")
        for name, values in wanted.items():
            assert own[name].dropna().tolist() == pytest.approx(values, abs=2e-4, rel=1e-4), name
        if (positions, scale) == ("visual", 1.0):
            words = [[best[0] for best in EmbedLens.from_model(tiny).words(h, 1)] for h in states]
            for share, here, there in zip(own.renamed.dropna(), words[:-1], words[1:], strict=True):
                assert share == pytest.approx(np.mean(np.array(here) != np.array(there)), abs=2 / len(here))


def test_a_factor_reaches_the_first_attention_only_through_the_norms_epsilon(tiny, pictures, rows):
    """And what it changes without that is arithmetic: the unscaled update on a scaled token."""
    found = rows["first block"]
    assert found.attention_moved.max() < 1e-2  # epsilon and rounding
    assert found[found.scale == 1].attention_moved.max() < 1e-5
    assert found[found.scale != 1].mlp_moved.min() > 1e-2
    prompt = tiny.prompt(pictures[2].image, QUESTION)
    before, after = tiny.hidden_states(prompt)[:2, prompt.visual]
    for row in found[found.id == 2].to_dict("records"):
        scaled = row["scale"] * before
        wanted = np.mean([cosine(x, x + (b - a)) for x, a, b in zip(scaled, before, after, strict=True)])
        assert row["frozen"] == pytest.approx(wanted, abs=1e-4)
        assert (abs(row["turn"] - row["frozen"]) < 1e-5) == (row["scale"] == 1)
