"""Clusters of many pictures against their parts one by one; what the groups hold, counted by hand."""

import ctypes
import gc
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import embedlens as el
from embedlens import samples
from embedlens.clusters import (
    anchor_clusters,
    centroids,
    cluster_means,
    cross_image_similarity,
    picture_pairs,
    text_centroid,
)
from embedlens.groups import Reference, token_groups
from embedlens.lenses import EmbedLens, unit_vectors
from embedlens.measures.clusters import by_group, cluster_study
from embedlens.vlm import QUESTION, Prompt, VisionLanguageModel


@pytest.fixture(scope="module")
def pictures():
    return samples.load("miniworld", n=5)


def test_a_study_is_what_its_parts_give_picture_by_picture(tiny, pictures):
    rules = {"thresholds": (0.9, 0.5), "orders": ("greedy", "raster")}
    studies = cluster_study(tiny, iter(pictures), **rules, batch_size=2)
    assert set(studies) == {(t, order) for t in (0.9, 0.5) for order in ("greedy", "raster")}
    lens, pairs = EmbedLens.from_model(tiny), picture_pairs(len(pictures))
    for (threshold, order), study in studies.items():
        whole = []
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
            assert study.bars[i] == pytest.approx(float(prompt.grid.padded.float().mean()))
            assert study.singletons[i] == (labels.bincount() == 1).sum()
            assert np.isnan(study.in_bars[i, len(found) :]).all() and (study.nearest[i, len(found) :] == -1).all()
        raw, removed = study.similarity(pairs), study.similarity(pairs, mean_removed=True)
        for row, (i, j) in enumerate(pairs):
            expected = cross_image_similarity(whole[i][2], whole[j][2]).numpy()
            assert raw[row, : len(expected)] == pytest.approx(expected, abs=1e-5)
            assert np.isnan(raw[row, len(expected) :]).all()
            a, b = (unit_vectors(cluster_means(t, labels, 6) - study.center) for t, labels, _ in (whole[i], whole[j]))
            assert removed[row, : len(a)] == pytest.approx(cross_image_similarity(a, b).numpy(), abs=1e-4)
        null = study.similarity(pairs, null=True)
        assert np.array_equal(np.isnan(null), np.isnan(raw))
        assert not np.allclose(null, raw, equal_nan=True) or (study.sizes[:, 0] == study.tokens).all()
        shares = study.dominance
        assert shares[:, 0] == pytest.approx(study.sizes[:, 0] / study.tokens)
        assert shares[:, 1] == pytest.approx(study.sizes[:, 0] / study.sizes[:, :5].sum(1))
        several = [counts[counts > 1] for counts in (t[1].bincount() for t in whole)]
        assert shares[:, 2] == pytest.approx([int(counts[0]) / int(counts.sum()) for counts in several])


def test_single_tokens_are_no_cluster_of_two_or_more(tiny, pictures):
    study = cluster_study(tiny, pictures[:2], thresholds=(1.0,))[1.0, "greedy"]
    assert (study.singletons == study.tokens).all() and (study.dominance[:, 2] == 0).all()
    assert study.dominance[:, 0] == pytest.approx(1 / study.tokens)


def test_batches_and_neighbours_do_not_matter_and_the_null_is_seeded(tiny, pictures):
    one = cluster_study(tiny, pictures, batch_size=1)[0.9, "greedy"]
    many = cluster_study(tiny, pictures, batch_size=5)[0.9, "greedy"]
    other = cluster_study(tiny, pictures, batch_size=5, seed=1)[0.9, "greedy"]
    assert np.array_equal(one.sizes, many.sizes)
    assert torch.allclose(one.null_means, many.null_means, atol=1e-5)
    assert not torch.allclose(other.null_means, many.null_means, atol=1e-5)
    assert torch.equal(other.means, many.means)
    later = cluster_study(tiny, pictures[2:])[0.9, "greedy"]
    assert torch.allclose(later.null_means, many.null_means[2:], atol=1e-5), "random sets hang on what came before"


def test_the_table_has_a_row_for_each_picture_and_rank(tiny, pictures):
    study = cluster_study(tiny, pictures)[0.9, "greedy"]
    table = study.table()
    assert table.id.unique().tolist() == [sample.id for sample in pictures]
    for place, sample in enumerate(pictures):
        own = table[table.id == sample.id].set_index("rank")
        assert own.share[0] == study.largest[place].mean()
        assert own.in_bars.isna().tolist() == (own.share == 0).tolist()


@pytest.fixture(scope="module")
def reference(tiny):
    dead = int(EmbedLens.from_model(tiny).topk(tiny.input_embeddings[300:301], 1)[1][0, 0])
    return Reference(tiny.name, tiny.width, len(tiny.tokens), 2, 0.9, dead, (), None, None, None, None, None)


@pytest.fixture(scope="module")
def rows(tiny, pictures, reference):
    return el.run(partial(by_group, reference=reference), tiny, pictures, batch_size=2)


def test_every_group_is_its_picture_counted_alone(tiny, pictures, reference, rows):
    text = text_centroid(tiny)
    unit = torch.nn.functional.normalize(tiny.input_embeddings.float(), dim=-1).mean(0)
    assert torch.allclose(text, unit / unit.norm(), atol=1e-6)
    for sample in pictures:
        prompt = tiny.prompt(sample.image, QUESTION)
        tokens = prompt.embeds[prompt.visual].float()
        groups = token_groups(tiny, prompt, reference)
        masks = groups.named | {"sink": groups.sink, "C0": (anchor_clusters(tokens) == 0).cpu()}
        covered = np.zeros(len(tokens), bool)
        for x, y, w, h in (entry["bbox"] for entry in sample.annotations):
            covered |= prompt.grid.inside((x, y, x + w, y + h)).numpy()
        own = rows[rows.id == sample.id].set_index("group")
        for name, mask in masks.items():
            assert own.share[name] == pytest.approx(mask.double().mean())
            if mask.any():
                wanted = torch.cosine_similarity(tokens[mask], text[None]).mean()
                assert own.to_text[name] == pytest.approx(float(wanted), abs=1e-5)
                assert own.inside[name] == pytest.approx(covered[mask.numpy()].mean())
            else:
                assert pd.isna(own.to_text[name])
        assert own.share[["alive", "dead", "ViT sink", "LLM sink"]].sum() == pytest.approx(1)


def test_a_crowd_is_no_object(tiny, pictures, reference):
    sample = pictures[0]
    crowd = {**sample.annotations[0], "bbox": [0, 0, sample.width, sample.height], "iscrowd": 1}
    (plain,), (crowded,) = (
        by_group(tiny, [one], reference) for one in (sample, replace(sample, annotations=(*sample.annotations, crowd)))
    )
    assert plain == crowded


class Wide(VisionLanguageModel):
    """As much of a model as a study needs, of the width of LLaVA-1.5-7B, with few words and few tokens a picture."""

    def __init__(self) -> None:
        pass

    name, width, tokens, device = "wide", 4096, [str(i) for i in range(50)], torch.device("cpu")
    input_embeddings = torch.randn(50, 4096, generator=torch.Generator().manual_seed(0))

    def prompts(self, images, questions):
        grid = SimpleNamespace(padded=torch.zeros(12, dtype=torch.bool))
        rows = [torch.randn(12, self.width, generator=torch.Generator().manual_seed(i)) for i, _ in enumerate(images)]
        found = [object.__new__(Prompt) for _ in rows]  # a mock would hold on to what it is given
        for prompt, own in zip(found, rows, strict=True):
            vars(prompt).update(embeds=own.repeat(2, 1)[:12], visual=slice(None), grid=grid)
        return found


def anonymous_memory() -> int:
    """Bytes of this process that no file holds, after what was freed went back to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def bytes_a_picture() -> float:
    """What this process still holds for each picture of COCO's size, at the three thresholds of chapter 01."""

    def held(n):
        sample = samples.load("miniworld", n=1)[0]
        listed = [replace(sample, id=i, draw=partial(Image.effect_noise, (640, 480), 50)) for i in range(n)]
        many = list(samples.readable(listed))
        found = cluster_study(Wide(), many, thresholds=(0.95, 0.9, 0.8))[0.9, "greedy"]
        found.similarity(picture_pairs(len(many)), null=True)
        return many, found

    kept = [held(60)]  # whatever comes once is there, and what the allocator keeps of it
    before = anonymous_memory()
    kept.append(held(180))
    return (anonymous_memory() - before) / 180


def test_memory_does_not_grow_with_the_pictures():
    """10,000 pictures in less than 2 GB; in a process of its own, since freed memory stays with a process."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("memory is read where Linux says it")
    code = "import test_measures_clusters as here; print(here.bytes_a_picture())"
    told = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert float(told.stdout or "nan") < 2 * 10**9 / 10_000, told.stderr[-500:]
