"""Clusters against an independent brute force, and planted ones."""

import math

import numpy as np
import pytest
import torch

from embedlens.clusters import anchor_clusters, centroids, cross_image_similarity, matched_null, picture_pairs


def cosine(a, b):
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def by_hand(tokens, threshold, order):
    """Clusters as lists of indices, largest first: plain loops, no matrix, counts made anew for every anchor."""
    rows = tokens.double().tolist()
    left = list(range(len(rows)))
    found = []
    while left:

        def reach(i):
            return [j for j in left if j == i or cosine(rows[i], rows[j]) >= threshold]  # noqa: B023

        anchor = left[0] if order == "raster" else max(left, key=lambda i: (len(reach(i)), -i))  # noqa: B023
        members = reach(anchor)
        found.append(members)
        left = [i for i in left if i not in members]
    return sorted(found, key=lambda members: -len(members))  # stable: equal sizes as found


def members(labels):
    return [(labels == rank).nonzero().flatten().tolist() for rank in range(int(labels.max()) + 1)]


def scattered(seed, n=24, d=3):
    """Few dimensions, so that neighbourhoods overlap and the order of anchors matters."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + torch.tensor([1.0] + [0.0] * (d - 1))


def planted(sizes, d=64, noise=0.02, seed=0):
    """Tight bundles around random directions that are far from each other, shuffled; (tokens, bundle of each)."""
    generator = torch.Generator().manual_seed(seed)
    middles = torch.linalg.qr(torch.randn(d, len(sizes), generator=generator))[0].T
    bundle = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    bundle = bundle[torch.randperm(len(bundle), generator=generator)]
    lengths = torch.rand(len(bundle), 1, generator=generator) * 9 + 1
    return lengths * (middles[bundle] + noise * torch.randn(len(bundle), d, generator=generator)), bundle


def test_clusters_are_those_of_plain_loops_and_the_order_of_anchors_matters_somewhere():
    differ = False
    for seed, threshold in enumerate((0.95, 0.9, 0.8, 0.5)):
        found = [by_hand(scattered(seed), threshold, order) for order in ("greedy", "raster")]
        for order, clusters in zip(("greedy", "raster"), found, strict=True):
            assert members(anchor_clusters(scattered(seed), threshold, order)) == clusters
        differ |= found[0] != found[1]
    assert differ


@pytest.mark.parametrize("order", ["greedy", "raster"])
def test_planted_bundles_are_the_clusters_largest_first(order):
    tokens, bundle = planted([5, 30, 1, 12])
    labels = anchor_clusters(tokens, 0.9, order)
    assert torch.equal(labels, torch.tensor([2, 0, 3, 1])[bundle])
    assert torch.equal(anchor_clusters(1000 * tokens, 0.9, order), labels)  # only directions count


def test_equal_directions_are_one_cluster_at_every_threshold_and_zero_vectors_are_alone():
    row = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([row * torch.arange(1, 7)[:, None], torch.zeros(2, 50)])
    for threshold in (1.0, 0.5, 1e-6):
        assert anchor_clusters(tokens, threshold).tolist() == [0] * 6 + [1, 2]
    assert centroids(tokens, anchor_clusters(tokens))[1].abs().sum() == 0


def test_a_centroid_is_the_mean_direction_of_its_members():
    tokens = scattered(0, d=5)
    labels = anchor_clusters(tokens, 0.8)
    found = centroids(tokens, labels)
    assert len(found) == labels.max() + 1 and torch.equal(centroids(tokens, labels, most=2), found[:2])
    for rank, group in enumerate(members(labels)):
        mean = np.mean([tokens[i].numpy() / np.linalg.norm(tokens[i].numpy()) for i in group], 0)
        assert found[rank].numpy() == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


def test_similarity_of_two_pictures_is_the_best_cosine():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 6, generator=generator), torch.randn(3, 6, generator=generator)
    expected = [max(cosine(x, y) for y in b.tolist()) for x in a.tolist()]
    assert cross_image_similarity(a, b).tolist() == pytest.approx(expected, abs=1e-6)
    assert cross_image_similarity(7 * a, b).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_null_has_the_same_sizes_and_nothing_else():
    tokens, _ = planted([30, 20, 10])
    labels = anchor_clusters(tokens)
    null = matched_null(labels, (0, 1))
    assert torch.equal(null.bincount(), labels.bincount())
    assert torch.equal(null, matched_null(labels, (0, 1))) and not torch.equal(null, matched_null(labels, (0, 2)))
    assert ((null == 0) & (labels == 0)).sum() < 0.75 * (labels == 0).sum()  # half expected


def test_pairs_are_of_different_pictures_and_every_picture_comes_first_equally_often():
    pairs = picture_pairs(50, partners=7, seed=1)
    assert len(pairs) == 350 == len({tuple(pair) for pair in pairs.tolist()})
    assert (pairs[:, 0] != pairs[:, 1]).all() and (np.bincount(pairs[:, 0]) == 7).all() and pairs.max() == 49
    assert len(np.unique(pairs[:, 1])) == 50
    assert np.array_equal(pairs, picture_pairs(50, partners=7, seed=1))
    assert not np.array_equal(pairs, picture_pairs(50, partners=7, seed=2))
