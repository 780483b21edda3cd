"""Sinks are measured as defined, and an instrument that finds none in the miniature finds those that were planted."""

from functools import partial

import numpy as np
import pytest
import torch

import embedlens as el
from embedlens import samples
from embedlens.engine import intervene
from embedlens.errors import EmbedLensError
from embedlens.groups import discover, token_groups_of
from embedlens.interventions import Prune, SkipSublayers
from embedlens.measures import sinks
from embedlens.measures.planted import LLM, VIT, planted
from embedlens.tracing import trace
from embedlens.vlm import QUESTION


@pytest.fixture(scope="module")
def calibration():
    return list(samples.load("miniworld", n=16, split="train"))


@pytest.fixture(scope="module")
def bare(miniature, calibration):
    return discover(miniature, calibration)


@pytest.fixture(scope="module")
def copy(miniature):
    return planted(miniature)


@pytest.fixture(scope="module")
def reference(copy, calibration):
    return discover(copy, calibration)


@pytest.fixture(scope="module")
def rows(copy, pictures, reference):
    return el.run(partial(sinks.by_sublayer, reference=reference), copy, pictures, batch_size=2)


@pytest.fixture(scope="module")
def arms(copy, pictures, reference):
    return el.run(partial(sinks.by_arm, reference=reference), copy, pictures, batch_size=2)


def named(places) -> torch.Tensor:
    return torch.zeros(64, dtype=torch.bool).index_fill(0, torch.tensor(places), True)


def test_the_miniature_has_no_sinks_and_the_planted_copy_has_exactly_those_that_were_planted(
    miniature, copy, pictures, bare, reference
):
    assert not any(sinks.has(bare).values()) and copy.name != miniature.name  # or records would be mixed
    assert sinks.has(reference) == {"ViT sink": True, "LLM sink": True}
    assert reference.sink_dims == (copy.width - 1,) and reference.sink_layer == 2  # from after MLP-2 on
    prompts = copy.prompts([picture.image for picture in pictures], [QUESTION] * len(pictures))
    for groups in token_groups_of(copy, prompts, reference):
        assert torch.equal(groups.vit_sink, named(VIT)) and torch.equal(groups.llm_sink, named(LLM))
    stock, seen = sinks.spread(miniature, pictures, batch_size=2), sinks.spread(copy, pictures, batch_size=2)
    assert not stock.beyond.any() and (stock.first.max(1) < stock.ratio_fences).all()  # the model is as it was
    assert seen.beyond[-1] == pytest.approx(len(VIT) / 64)
    excited = seen.first.max(1) > seen.ratio_fences
    assert excited.tolist() == [False, False] + [True] * (copy.n_layers - 1)


def test_planted_sinks_turn_to_bos_at_the_second_mlp_take_attention_and_keep_their_rank(rows, copy):
    mlp = sinks.aligner_of(copy.n_layers)
    mean = rows.pivot_table(index="positions", columns="sublayer", values=["cosine", "phi", "attention", "kept"])
    cosine, phi, attention = (mean[name] for name in ("cosine", "phi", "attention"))
    assert abs(cosine.loc["LLM sink"].loc[: mlp - 1]).max() < 0.1 and cosine.loc["LLM sink"].loc[mlp:].min() > 0.99
    assert abs(cosine.loc["ViT sink"]).max() < 0.1 and cosine.loc["first"].min() > 0.999
    assert phi.loc["LLM sink"].loc[:2].max() < 2 and phi.loc["LLM sink"].loc[mlp:].min() > 15
    after = attention.loc[:, mlp:]
    assert after.loc["first"].min() > 3 and after.loc["LLM sink"].min() > 3  # times uniform
    assert (after.loc["ViT sink"] < 0.1).all() and after.loc["alive"].mean() > 2 * after.loc["ViT sink"].mean()
    kept = mean["kept"].loc["like first"]
    assert kept.loc[mlp:].min() == 1 and kept.loc[: mlp - 1].max() < 0.5


@pytest.mark.parametrize("kind, places, word", [("ViT sink", VIT, -1), ("LLM sink", LLM, -2)])
def test_planted_sinks_are_one_vector_with_one_word_in_every_picture(copy, pictures, reference, kind, places, word):
    table, alike = sinks.entries(copy, pictures, kind, reference, repeats=2, batch_size=2)
    assert alike["cosine"] > 0.99 and alike["variance"] < 1e-5 and alike["beyond"] > 0.1 and alike["random"] < 0.9
    assert (table.word == 1).all()
    tokens = copy.visual_features_of([pictures[0].image])[0][list(places)]
    assert el.EmbedLens.from_model(copy).topk(tokens, 1)[1].unique().tolist() == [len(copy.tokens) + word]
    assert table.random_word.mean() < 1
    assert (table.inside == (kind == "ViT sink")).all()  # planted to be the most alike of all
    assert table.all_inside.to_numpy() == pytest.approx(len(VIT) / 64)


def test_pruning_sends_the_attention_of_planted_sinks_to_bos_and_skipping_the_mlp_unmakes_them(arms, copy):
    mean = arms.groupby("arm")[[*sinks.REGIONS]].mean()
    assert mean.sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-4)
    freed, gained = mean.own["as it is"], mean.BOS["pruned"] - mean.BOS["as it is"]
    assert freed > 0.3 and mean.own["pruned"] == 0 and gained > 0.4 * freed
    assert mean.others["others pruned"] == 0 and mean.own["others pruned"] > freed
    assert mean.own["skipped"] < 0.1 * freed and mean.own["others skipped"] == pytest.approx(freed, rel=0.01)
    late = arms[arms.sublayer >= sinks.aligner_of(copy.n_layers)].groupby("arm").cosine.mean()
    assert late["as it is"] > 0.99 and late["others skipped"] > 0.99 and late["skipped"] < 0.2
    moved = sinks.moved(arms, sinks.aligner_of(copy.n_layers))
    assert moved["to_prompt"].value > 0.4 and moved["attention_lost"].value > 0.9
    assert moved["change"].value == pytest.approx(late["skipped"] - late["as it is"], abs=0.01)


def test_a_kind_that_the_model_lacks_has_no_rows(miniature, pictures, bare):
    rows = el.run(partial(sinks.by_sublayer, reference=bare), miniature, pictures, batch_size=2)
    assert set(rows.positions) == {"first", "text", "dead", "alive", "like first", "like other"}
    assert "phi" not in rows and rows.dropna(subset="attention").sublayer.max() == 2 * miniature.n_layers - 2
    assert sinks.by_arm(miniature, pictures[:2], bare) == [[], []]
    with pytest.raises(EmbedLensError, match="no picture has"):
        sinks.entries(miniature, pictures[:2], "LLM sink", bare)
    for vit, llm in (((1, 2), (2,)), ((64,), (1,))):  # both at once, or not there
        with pytest.raises(EmbedLensError, match="name different ones below 64"):
            planted(miniature, vit, llm)


def test_pictures_of_unequal_token_counts_are_read(twin_of, pictures):
    _, model = twin_of("llava-hf/llava-v1.6-vicuna-7b-hf")
    reference = discover(model, pictures)
    tokens = [len(model.prompt(picture.image, QUESTION).grid) for picture in pictures]
    seen = sinks.spread(model, pictures, batch_size=2)
    assert len(set(tokens)) > 1 and seen.norms.shape[1] >= sum(tokens)  # the tower sees what the layout leaves out
    rows = el.run(partial(sinks.by_sublayer, reference=reference), model, pictures, batch_size=2)
    assert rows.groupby("id").size().gt(0).all() and len(rows.id.unique()) == len(pictures)
    with pytest.raises(EmbedLensError, match="cannot be planted"):
        planted(model)


def test_rows_agree_with_one_prompt_at_a_time(copy, pictures, rows):
    prompt, mask = copy.prompt(pictures[1].image, QUESTION), named(LLM)
    spread = prompt.spread(mask)
    seen = trace(copy, prompt, {"own": spread})
    own = rows[(rows.id == pictures[1].id) & (rows.positions == "LLM sink")].set_index("sublayer")
    for at, states in enumerate(seen.sublayers):
        cosines = [float(torch.cosine_similarity(states[0], states[i], dim=0)) for i in spread.nonzero()[:, 0]]
        assert own.cosine[at] == pytest.approx(np.mean(cosines), abs=1e-4)
    received = sinks.attention_per_token(seen.attention["own"], len(LLM), sinks.queries_of(prompt))
    assert own.attention.dropna().to_numpy() == pytest.approx(received.numpy(), rel=1e-3)


@pytest.mark.parametrize("arm", ["pruned", "skipped"])
def test_arms_agree_with_one_prompt_under_the_intervention(copy, pictures, reference, arms, arm):
    prompt, mask = copy.prompt(pictures[2].image, QUESTION), named(LLM)
    acting = Prune(mask) if arm == "pruned" else SkipSublayers(mask, [1.5])
    first = torch.arange(len(prompt)) == 0
    with intervene(copy, acting):
        seen = trace(copy, prompt, {"first": first})
    queries = sinks.queries_of(prompt)
    queries = queries[~prompt.spread(mask)] if arm == "pruned" else queries
    own = arms[(arms.id == pictures[2].id) & (arms.arm == arm)].dropna(subset="BOS")
    assert own.BOS.to_numpy() == pytest.approx(seen.attention["first"][:, queries].mean(-1).numpy(), rel=1e-3)
    if arm == "pruned":  # random others belong to the picture, whatever stands beside it
        turned = el.run(partial(sinks.by_arm, reference=reference), copy, pictures[2:0:-1], batch_size=2)
        drawn = [of[(of.id == pictures[2].id) & (of.arm == "as it is")].others.mean() for of in (arms, turned)]
        assert drawn[0] == pytest.approx(drawn[1], rel=1e-3)
