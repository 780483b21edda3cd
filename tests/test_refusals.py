"""What cannot be done is refused with a sentence that says what to pass instead."""

import inspect
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from embedlens import codebook, groups, lmms, prefix, pruner_arms, redundancy, samples, scoring, stats, sweep, tasks
from embedlens.arms import random_block
from embedlens.claims import Finding
from embedlens.clusters import anchor_clusters, centroids, cross_image_similarity, picture_pairs
from embedlens.errors import EmbedLensError
from embedlens.interventions import EnterAt, LeaveAt, Prune, Rescale, Silence, SkipSublayers
from embedlens.lenses import EmbedLens
from embedlens.measures import hubs, patch_reading, scores
from embedlens.measures.labels import label_hits, label_ids
from embedlens.patches import Frame, PatchGrid
from embedlens.pictures import open_picture
from embedlens.probe import probe_picture
from embedlens.readings import Protocol
from embedlens.rules import decide
from embedlens.samples import patchbench

EYE, PAIRS = torch.eye(3), np.array([[0, 1], [1, 2], [2, 0]])
ONCE = pd.DataFrame({"id": [0, 1], "layer": [0, 1], "value": [1.0, math.nan]})
GRID = PatchGrid(2, 2, Frame.letterbox(4, 4))
ONES, SOME = torch.ones(16, dtype=torch.bool), torch.arange(16) > 3
LENS, WHAT = EmbedLens(torch.eye(16), list("abcdefghijklmnop")), "what is in the picture?"
unchecked = inspect.unwrap(anchor_clusters)  # without the shape check that only tests have


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (lambda: anchor_clusters(EYE, 0.0), "above 0 and at most 1"),
        (lambda: anchor_clusters(EYE, 0.9, "random"), "greedy, raster"),
        (lambda: unchecked(torch.zeros(0, 4)), "at least one"),
        (lambda: unchecked(torch.zeros(2, 3, 4)), "one picture"),
        (lambda: unchecked(torch.full((2, 2), torch.inf)), "not finite"),
        (lambda: centroids(EYE, torch.tensor([0, 1])), "label"),
        (lambda: centroids(EYE, torch.tensor([0, 2, 2])), "gaps"),
        (lambda: cross_image_similarity(torch.zeros(0, 3), EYE), "at least one of each picture"),
        (lambda: picture_pairs(1), "at least two"),
        (lambda: codebook.keep_lowest(torch.zeros(4), 5), "budget is 5 of 4 visual tokens: keep at least 1 and at m"),
        (lambda: codebook.Recipe(more_pictures=1.5), "a count, or a share"),
        (lambda: codebook.quantile_thresholds([], 0, 0.3), "shares above 0"),
        (lambda: Protocol(replacement="noise"), "use one of 'row 0'"),
        (lambda: redundancy.divergence(torch.zeros(3), torch.zeros(3), "mine"), "'released' or 'textbook'"),
        (lambda: redundancy.window(4, GRID), "pass 0 to 3"),
        (lambda: redundancy.dpc_knn(torch.zeros(0, 3), 2), "each is at least 1"),
        (lambda: pruner_arms.shares_of([64], [1.5]), "above 0 up to 1"),
        (lambda: Frame.of("pad", 3, 4, 56), "unknown preprocessing 'pad': choose one of letterbox, centre-crop, str"),
        (lambda: Frame.letterbox(0, 4), "a picture of 0x4 has no pixels"),
        (lambda: PatchGrid(0, 4, Frame.letterbox(4, 4)), "a grid of 0x4 patches is empty"),
        (lambda: GRID.box(4), "no patch 4: this grid of 2x2 has 0 to 3"),
        (lambda: groups.phi(torch.ones(2, 4), (4,)), "pass 0 to width - 1"),
        (lambda: groups.fence(np.zeros(0)), "at least one"),
        (lambda: label_ids(None, "dog", "loose"), "strict"),
        (lambda: label_ids(None, " "), "empty"),
        (lambda: hubs.coverage(np.zeros(3, dtype=int)), "no answers"),
        (lambda: hubs.matched_directions(torch.zeros(1, 3), 5), "no covariance: pass at least two"),
        (lambda: patch_reading._shifted(patchbench.pictures(7)[2:]), "the group 'object' has one picture"),
        (lambda: patchbench.pictures(1, patch=4), "a patch of 4 px"),
        (lambda: patchbench.pictures(1, side=10), "no larger than the picture"),
        (lambda: patchbench.probes(patchbench.pictures(1)[0]), "an object's patch has the colour of its surround"),
        (lambda: patchbench.strings(None, 4), "the length is 4"),
        (lambda: samples.load("imagenet"), "unknown data set 'imagenet'"),
        (lambda: samples.load(split="test"), "unknown split 'test'"),
        (lambda: samples.load(n=0), "at least one"),
        (lambda: samples.load(seed=-1), "seed is -1"),
        (lambda: samples.load(scale=0), "scale"),
        (lambda: tasks.questions("taste"), "unknown kind of question 'taste'"),
        (lambda: tasks.family_questions("taste"), "unknown family 'taste'"),
        (lambda: tasks.family_questions("ocr", n=2), "n is 2: ocr has 3 kinds"),
        (lambda: tasks.questionnaires(4), "general has 5 kinds"),
        (lambda: scoring.box_score(tasks.questions("colour", 1)[0], "red"), "asks for no box"),
        (lambda: scoring.box_score(tasks.questions("box", 1)[0], "[0, 0, 1, 1]", "mine"), "unknown frame 'mine'"),
        (lambda: stats.drawn(ONCE, "value", by="layer"), "nothing was asked of 1"),
        (lambda: stats.drawn(ONCE, "norm"), "no column norm"),
        (lambda: stats.drawn_pairs(pd.DataFrame({0: [math.nan] * 3}), PAIRS), "no pair has a value"),
        (lambda: stats.estimate(pd.Series([1.0, 1.0])), "pass n="),
        (lambda: stats.Estimate(math.nan, 0, 1, 3), "three finite numbers"),
        (lambda: Finding(0.1, 0.0, 0.2, 5, "true", "x"), "unknown verdict 'true'"),
        (lambda: Finding(0.3, 0.0, 0.2, 5, "holds", "x"), "outside its interval"),
        (lambda: Finding(0.1, math.nan, 0.2, 5, "holds", "x"), "finite"),
        (lambda: Finding(0.1, 0.0, 0.2, 0, "holds", "x"), "at least one sample"),
        (lambda: Finding(0.1, 0.0, 0.2, 5, "holds", " "), "note is empty"),
        (lambda: Prune(torch.ones(16)), "the mask of Prune is torch.float32: pass a torch.bool tensor"),
        (lambda: Prune(torch.eye(2).bool()), r"shape \(2, 2\): pass one True or False per visual token, and a list"),
        (lambda: Prune(~ONES), "the mask of Prune is empty: mark at least one visual token, or run without"),
        (lambda: Prune([]), "the mask of Prune is empty"),
        (lambda: Prune(ONES), "removes all 16 visual tokens of a picture; keep at least one"),
        (lambda: Prune(SOME, positions="shift"), "pass 'keep' or 'renumber'"),
        (lambda: SkipSublayers(ONES, at=[]), "skips nothing: name sublayers, for example at="),
        (lambda: SkipSublayers(ONES, at=[1.25]), r"no sublayer 1.25: pass n for the attention of layer n, n \+ 0.5"),
        (lambda: LeaveAt(ONES, 1, positions="shift"), "pass 'keep' or 'renumber'"),
        (lambda: Silence("ffn"), "no sublayer 'ffn': pass 'attention' or 'mlp'"),
        (lambda: Silence("mlp", layers=[]), "silences nothing: name layers, or leave layers out"),
        (lambda: Rescale(float("nan")), "the factor is nan: pass a finite number"),
        (lambda: LENS.topk(torch.zeros(3, 15)), r"\(3, 15\), this lens reads width 16: pass hidden states of"),
        (lambda: LENS.topk(torch.zeros(3, 16), 0), "k is 0: pass 1 to 16"),
        (lambda: LENS.topk(torch.zeros(3, 16), 17), "k is 17: pass 1 to 16"),
        (lambda: LENS.rank(torch.zeros(3, 16), []), r"the ids are \[\]: pass at least one, from 0 to 15"),
        (lambda: LENS.rank(torch.zeros(3, 16), [16]), r"the ids are \[16\]"),
        (lambda: EmbedLens(torch.zeros(3, 2), ["a"]), "3 embedding rows but 1 tokens"),
        (lambda: open_picture(np.zeros((4, 4, 3))), "dtype float64: pass uint8, for example"),
        (lambda: open_picture(np.zeros((3, 4, 5), dtype=np.uint8)), r"\(3, 4, 5\): pass \[h, w\], .* \(channels last"),
        (lambda: open_picture(np.zeros((2, 4, 4, 3), dtype=np.uint8)), r"shape \(2, 4, 4, 3\)"),
        (lambda: open_picture(np.zeros((0, 4, 3), dtype=np.uint8)), "has no pixels"),
        (lambda: lmms.arm_of("prune_all"), "unknown intervention 'prune_all': use one of none, prune_dead"),
        (lambda: lmms.arm_of("enter_at"), "enter_at needs layer: add layer=… to --model_args"),
        (lambda: lmms.arm_of("rescale"), "rescale needs factor"),
        (lambda: lmms.arm_of("none", seed=0.5), "seed is 0.5"),
        (lambda: lmms.arm_of("enter_at", layer=-1.0), "layer is -1.0: pass a whole number"),
        (lambda: lmms.arm_of("none", seed="x"), "seed is 'x'"),
        (lambda: lmms.batch_size_of("0"), "pass a number of at least 1, or auto"),
        (lambda: lmms.batch_size_of("auto:4"), "pass a number of at least 1, or auto"),
        (lambda: lmms.batch_size_of(None), "pass a number of at least 1, or auto"),
        (lambda: lmms.generation({"do_sample": True}), "answers here are greedy"),
        (lambda: lmms.generation({"temperature": 0.7}), "answers here are greedy"),
        (lambda: lmms.generation({"num_beams": 3}), "answers here are greedy"),
        (lambda: sweep.everywhere("x"), "arm 'x' does nothing"),
        (lambda: sweep.repeated("x", sweep.members, seeds=0), "seeds is 0"),
        (lambda: random_block(ONES[:3], 1, GRID, np.random.default_rng(0)), "the pool has 3 tokens, the grid 4"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_to_pass(asked, sentence):
    with pytest.raises(EmbedLensError, match=sentence):
        asked()


def items(n: int = 2) -> list[tasks.Item]:
    return tasks.family_questions("general", 5)[:n]


def twice() -> list[tasks.Item]:
    one, other = items()
    return [one, tasks.Item(replace(other.sample, id=one.sample.id), other.question)]


def nothing(model, prompts):
    """Groups of pictures in which everything is alive."""
    none = torch.zeros(16, dtype=torch.bool)
    return [groups.TokenGroups(none, none, none, ~none, {})] * len(prompts)


EMPTY, SINK = Image.new("RGB", (9, 9)), sweep.pruning("x", partial(sweep.members, names=["sink"]))


def listed(groups, grid, rng):
    return [Prune([SOME])]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (lambda m, p: groups.discover(m, samples.load(n=1)), "at least two"),
        (lambda m, p: label_hits(m, []), "at least one picture"),
        (lambda m, p: scores.scored(m, samples.load(n=1)), "at least two"),
        (lambda m, p: patch_reading.ask(m, []), "no question to ask"),
        (lambda m, p: tasks.evaluate(m, []), "no questions"),
        (lambda m, p: redundancy.readings_of(m, p, [16]), "16 tokens: pass some of 0 to 15"),
        (lambda m, p: redundancy.readings_of(m, p, [1], batch_size=0), "pass at least 1"),
        (lambda m, p: redundancy.readings_of(m, p.without(torch.arange(16) < 3), [1]), "pass the whole prompt"),
        (lambda m, p: redundancy.token_scores(m, [p], [torch.tensor([0])] * 2), "one set per picture"),
        (lambda m, p: m.prompt(EMPTY, " \n"), "the question is empty: ask something"),
        (lambda m, p: m.prompt(EMPTY, "what is <image> ?"), "holds the image placeholder <image>: leave it out"),
        (lambda m, p: m.prompts([EMPTY], [WHAT] * 2), "1 pictures, 2 questions: pass one question per picture"),
        (lambda m, p: m.answer(p, max_new_tokens=0), "max_new_tokens is 0: allow at least 1"),
        (lambda m, p: probe_picture(m, EMPTY, layer=4), r"no layer 4 in .*: pass 0 \(what enters the first .*\) to 3"),
        (lambda m, p: probe_picture(m, EMPTY, lens="tuned"), "unknown lens 'tuned': pass one of 'embed', 'logit'"),
        (lambda m, p: prefix.answers(m, [prefix.Case(p)], batch_size=0), "batch_size 0"),
        (lambda m, p: prefix.answers(m, [prefix.Case(p, (Prune(SOME[:9]),))]), "the mask has shape"),
        (lambda m, p: prefix.answers(m, [prefix.Case(p, (EnterAt(9),))]), "there is no layer 9"),
        (lambda m, p: sweep.run_arms(m, [], [sweep.BASELINE]), "0 questions and 1 arms"),
        (lambda m, p: sweep.run_arms(m, items(), []), "questions and 0 arms"),
        (lambda m, p: sweep.run_arms(m, items(), [sweep.BASELINE] * 2), "two arms are named 'baseline' with seed 0"),
        (lambda m, p: sweep.run_arms(m, items(), [sweep.BASELINE], batch_size=0), "batch_size is 0"),
        (lambda m, p: sweep.run_arms(m, twice(), [sweep.BASELINE], nothing), "two pictures have the id"),
        (lambda m, p: sweep.run_arms(m, items(), [sweep.Arm("x", listed)], nothing), "gave Prune a list of masks"),
        (lambda m, p: sweep.run_arms(m, items(), [sweep.BASELINE], lambda *_: []), "groups gave 0 results"),
        (lambda m, p: sweep.run_arms(m, items(), [SINK], nothing), "no group sink: use alive"),
    ],
)
def test_a_model_is_not_asked_what_has_no_answer(tiny, asked, sentence):
    with pytest.raises(EmbedLensError, match=sentence):
        asked(tiny, tiny.prompt(samples.load(n=1)[0].image, WHAT))


@pytest.mark.parametrize("rule", ["b > 0", "a >", "a", "a and a > 0", "a > a", "__import__('os')", "len(a) > 0"])
def test_a_rule_that_cannot_be_judged_is_refused(rule):
    with pytest.raises(EmbedLensError):
        decide(rule, {"a": stats.Estimate(2.0, 1.0, 3.0, 9)})
