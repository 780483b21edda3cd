"""Norms, turns and rescaling: against plain loops over positions, and against what arithmetic demands."""

from functools import partial

import numpy as np
import pandas as pd
import pytest

import embedlens as el
from embedlens import samples
from embedlens.groups import Reference
from embedlens.lenses import EmbedLens
from embedlens.measures.norms import SCALES, by_layer, first_block
from embedlens.vlm import QUESTION


@pytest.fixture(scope="module")
def pictures():
    return samples.load("miniworld", n=3, seed=0)


@pytest.fixture(scope="module")
def rows(tiny, pictures):
    study = partial(by_layer, scales=(1.0, 0.01), lens=EmbedLens.from_model(tiny))
    return el.run(study, tiny, pictures, batch_size=2)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def looped(states, positions):
    """One position at a time: norms by layer, turn and centred turn by block."""
    pick = states[:, positions]
    norms = [np.mean([float(h.pow(2).sum()) ** 0.5 for h in layer]) for layer in pick]
    turns, centred = [], []
    for here, there in zip(pick[:-1], pick[1:], strict=True):
        turns.append(np.mean([cosine(a, b) for a, b in zip(here, there, strict=True)]))
        means = here.mean(0), there.mean(0)
        centred.append(np.mean([cosine(a - means[0], b - means[1]) for a, b in zip(here, there, strict=True)]))
    return {"norm": norms, "turn": turns, "centred": centred}


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("positions", ["visual", "text", "all text"])
def test_rows_are_what_a_loop_over_the_stock_stream_gives(tiny, pictures, rows, scale, positions):
    for sample in pictures:
        prompt = tiny.prompt(sample.image, QUESTION)
        mask = prompt.visual if positions == "visual" else prompt.text
        places = mask.nonzero()[1 if positions == "text" else 0 :, 0]
        wanted = looped(tiny.hidden_states(prompt.rescaled(scale)), places)
        own = rows[(rows.id == sample.id) & (rows.scale == scale) & (rows.positions == positions)]
        for name, values in wanted.items():
            assert own[name].dropna().tolist() == pytest.approx(values, abs=2e-4, rel=1e-4), name


def test_a_factor_scales_the_visual_norms_at_the_input_and_no_others(rows):
    first = rows[rows.layer == 0].set_index(["positions", "scale", "id"]).norm.sort_index()
    assert (first["visual", 0.01] / first["visual", 1.0]).to_numpy() == pytest.approx(0.01, rel=1e-4)
    assert (first["text", 0.01] == first["text", 1.0]).all()
    assert not np.allclose(first["text", 1.0], first["all text", 1.0])


def test_a_group_that_nobody_belongs_to_has_no_rows_and_alive_is_all_the_rest(tiny, pictures):
    none = Reference(tiny.name, tiny.width, len(tiny.tokens), 2, 0.9, None, (), None, None, None, None, None)
    found = pd.DataFrame(by_layer(tiny, pictures[:1], reference=none)[0])
    assert set(found.positions) == {"visual", "text", "all text", "alive"}
    assert found[found.positions == "alive"].norm.tolist() == found[found.positions == "visual"].norm.tolist()


def test_a_factor_reaches_the_first_attention_only_through_the_norms_epsilon(tiny, pictures):
    for module in tiny.decoder.modules():
        if hasattr(module, "variance_epsilon"):
            assert module.variance_epsilon <= 1e-5
    found = el.run(partial(first_block, scales=(1.0, 0.5, 4.0)), tiny, pictures, batch_size=3)
    assert found.attention_moved.max() < 1e-2  # epsilon and rounding
    assert found[found.scale == 1].attention_moved.max() < 1e-5
    assert found[found.scale != 1].mlp_moved.min() > 1e-2


def test_the_frozen_prediction_is_the_unscaled_update_on_a_scaled_token(tiny, pictures):
    found = el.run(partial(first_block, scales=SCALES), tiny, pictures, batch_size=3)
    for row in found.to_dict("records"):
        prompt = tiny.prompt(pictures[row["id"]].image, QUESTION)
        before, after = tiny.hidden_states(prompt)[:2, prompt.visual]
        scale = row["scale"]
        wanted = np.mean([cosine(scale * x, scale * x + (y - x)) for x, y in zip(before, after, strict=True)])
        assert row["frozen"] == pytest.approx(wanted, abs=1e-4)
        states = tiny.hidden_states(prompt.rescaled(scale))[:2, prompt.visual]
        assert row["turn"] == pytest.approx(np.mean([cosine(x, y) for x, y in zip(*states, strict=True)]), abs=1e-4)
    whole, small = (found[found.scale == scale] for scale in (1.0, SCALES[-1]))
    assert whole.turn.to_numpy() == pytest.approx(whole.frozen.to_numpy(), abs=1e-5)
    assert not np.allclose(small.turn, small.frozen, atol=1e-3)


def test_renamed_counts_tokens_whose_nearest_word_changes(tiny, pictures, rows):
    lens = EmbedLens.from_model(tiny)
    found = rows.dropna(subset="renamed")
    assert set(found.positions) == {"visual"} and set(found.scale) == {1.0}
    for sample in pictures:
        prompt = tiny.prompt(sample.image, QUESTION)
        words = [[best[0] for best in lens.words(h[prompt.visual], 1)] for h in tiny.hidden_states(prompt)]
        for block, share in zip(range(tiny.n_layers), found[found.id == sample.id].renamed, strict=True):
            pairs = list(zip(words[block], words[block + 1], strict=True))
            assert share == pytest.approx(sum(a != b for a, b in pairs) / len(pairs), abs=2 / len(pairs))
    assert 0 < found.renamed.mean() <= 1
