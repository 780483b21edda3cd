"""Trained late entry: the runs begin equal, learn what they say, and their adapters run as they were trained."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.utils import parametrize

import embedlens as el
from embedlens import stats, tasks
from embedlens.errors import EmbedLensError
from embedlens.measures import adapters
from embedlens.measures import entry as late_entry
from training import entry
from training.data import Batch
from training.recipe import LATE_ENTRY, LateEntry, Stage
from training.shipped import shipped

SHORT = LateEntry(
    replace(LATE_ENTRY.start, threads=1, workers=0),
    layers=(0, 3),
    rank=2,
    stage=Stage(steps=2, batch=2, lr=1e-2, weight_decay=0.0, warmup=1),
)


@pytest.fixture(scope="module")
def sample():
    return el.samples.load("miniworld", n=1, seed=5)[0]


@pytest.fixture
def own():
    """A wrapped miniature of the test's own: these tests change weights."""
    return el.load("miniature", device="cpu")


def moved_arms():
    """Arms whose additions are not zero, with no training."""
    base = shipped()
    base.set_attn_implementation("eager")
    arms = entry.Arms(base, SHORT, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in arms.arms.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.05 if "up" in name else 0.01))
    return arms


def row(prompt):
    """A prompt as a training batch of one row."""
    n = len(prompt)
    return Batch(
        ids=prompt.ids[None],
        weight=torch.zeros(1, n),
        block=torch.zeros(1, n, dtype=torch.long),
        position=torch.arange(n)[None],
        kind=torch.full((1, n), -1),
        image=prompt.visual[None],
    )


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Arms that differ from the shipped weights, and the folder beside which a model would find them."""
    arms, home = moved_arms(), tmp_path_factory.mktemp("home")
    entry.written(arms, SHORT, 0, home / adapters.FOLDER)
    return arms, home


def adapter_of(home, layer):
    return adapters.Adapter(layer, 0, 2, home / adapters.FOLDER / f"entry{layer}_seed0.safetensors", "")


def test_every_arm_begins_at_the_shipped_weights(own, sample):
    prompt = own.prompt(sample.image, "What is this?")
    base = shipped()
    base.set_attn_implementation("eager")
    arms = entry.Arms(base, SHORT, 0)
    with torch.no_grad():
        seen = torch.stack(own.tower_states_of([prompt]))[:, own.feature_layer]
        logits = arms.head(arms.arms["0"](seen, row(prompt)))[0]
    torch.testing.assert_close(logits[:, : own._n_rows], own.logits(prompt), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("layer", [0, 3])
def test_a_saved_adapter_runs_as_it_was_trained(own, sample, moved, layer):
    arms, home = moved
    adapter = adapter_of(home, layer)
    plain = own.logits(own.prompt(sample.image, "What is this?"))
    with adapter.on(own), el.intervene(own, el.EnterAt(layer)):
        prompt = own.prompt(sample.image, "What is this?")
        ran = own.logits(prompt)
    with torch.no_grad():
        seen = torch.stack(own.tower_states_of([prompt]))[:, own.feature_layer]
        trained = arms.head(arms.arms[str(layer)](seen, row(prompt)))[0, :, : own._n_rows]
    text = ~prompt.visual
    assert (ran - plain)[text].abs().max() > 0.1
    torch.testing.assert_close(ran[text], trained[text], atol=0.05, rtol=0.01)  # the file is fp16


def test_the_own_weights_come_back_even_after_an_error(own, moved):
    before = {name: value.clone() for name, value in own.hf.state_dict().items()}
    with pytest.raises(RuntimeError), adapter_of(moved[1], 3).on(own):
        raise RuntimeError
    assert all(torch.equal(value, before[name]) for name, value in own.hf.state_dict().items())


def test_adapters_are_listed_by_seed_and_layer_and_a_folder_without_has_none(own, tiny, moved, monkeypatch):
    assert adapters.adapters(tiny) == ()
    monkeypatch.setattr(own.hf, "name_or_path", str(moved[1]))
    assert [(found.seed, found.layer, found.steps) for found in adapters.adapters(own)] == [(0, 0, 2), (0, 3, 2)]


def test_adapters_of_other_weights_are_refused(own, moved, monkeypatch):
    monkeypatch.setattr(own.hf, "name_or_path", str(moved[1]))
    with torch.no_grad():
        own.hf.model.multi_modal_projector.linear_1.bias.add_(1)
    with pytest.raises(EmbedLensError, match=r"other weights.*training\.entry"):
        adapters.adapters(own)


def test_a_file_that_is_no_adapter_is_named(own, tmp_path, monkeypatch):
    (tmp_path / adapters.FOLDER).mkdir()
    (tmp_path / adapters.FOLDER / "broken.safetensors").write_bytes(b"nothing")
    monkeypatch.setattr(own.hf, "name_or_path", str(tmp_path))
    with pytest.raises(EmbedLensError, match=r"broken\.safetensors.*remake"):
        adapters.adapters(own)


def test_an_adapter_of_another_shape_is_refused(tiny, moved):
    with pytest.raises(EmbedLensError, match="does not fit"), adapter_of(moved[1], 3).on(tiny):
        pass


def test_the_shipped_adapters_are_those_of_the_recipe(miniature):
    found = adapters.adapters(miniature)
    wanted = [(seed, layer, LATE_ENTRY.stage.steps) for seed in range(LATE_ENTRY.seeds) for layer in LATE_ENTRY.layers]
    assert [(adapter.seed, adapter.layer, adapter.steps) for adapter in found] == wanted


def test_arms_trained_twice_or_resumed_get_the_same_weights_and_leave_the_rest_alone(tmp_path):
    short = replace(SHORT, layers=(3,))
    whole = entry.train_arms(short, 0, tmp_path / "whole")
    entry.train_arms(short, 0, tmp_path / "parts", stop_after=1)
    resumed = entry.train_arms(short, 0, tmp_path / "parts")
    kept, again = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in kept.items())
    base = shipped()
    language = base.model.language_model.state_dict()
    arm = whole.arms["3"]
    changed = [
        path
        for path, module in arm.language.named_modules()
        if parametrize.is_parametrized(module) and not torch.equal(module.weight, language[f"{path}.weight"])
    ]
    assert len(changed) == 7 * len(base.model.language_model.layers)
    assert torch.equal(arm.language.embed_tokens.weight, base.model.language_model.embed_tokens.weight)
    tower = base.model.vision_tower.state_dict()
    assert all(torch.equal(value, tower[name]) for name, value in whole.tower.state_dict().items())


def test_seeds_see_other_pictures(tmp_path):
    def first(seed):
        encoder = entry.Encoder(entry.AutoTokenizer.from_pretrained(entry.HOME))
        recipe = SHORT.recipe(seed)
        return next(entry.batches(recipe, "tuning", recipe.tuning, encoder)(0, 0.0)).pixels

    assert not torch.equal(first(0), first(1))


# --- arms and grounding ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def items():
    return tasks.family_questions("general", 5)[:2] + tasks.family_questions("grounding", 2)


@dataclass(frozen=True)
class Run:
    """A trained run that shifts the projector's weights, and logs that it was put on."""

    layer: int
    seed: int
    log: list

    @contextmanager
    def on(self, model):
        self.log.append((self.layer, self.seed))
        own = [parameter.detach().clone() for parameter in model.projector.parameters()]
        with torch.no_grad():
            for parameter in model.projector.parameters():
                parameter.add_(0.1 * (1 + self.layer + 10 * self.seed))
        yield
        with torch.no_grad():
            for parameter, value in zip(model.projector.parameters(), own, strict=True):
                parameter.copy_(value)


def runs_of(*layers: int) -> list[Run]:
    log = []
    return [Run(layer, seed, log) for seed in (0, 1) for layer in layers]


def test_frozen_rows_stand_still_below_their_layer_and_are_read_all_the_way(tiny, items):
    prompt = tiny.prompt(items[0].sample.image, "What is in the picture?")
    plain, until = tiny.hidden_states(prompt), 1
    (groups,) = late_entry._ungrouped(tiny, [prompt])
    with el.intervene(tiny, *late_entry.frozen_until(until).act(groups, prompt.grid, np.random.default_rng(0))):
        held = tiny.hidden_states(prompt)
    visual = prompt.visual
    assert all(torch.equal(held[layer, visual], held[0, visual]) for layer in range(until + 1))
    assert not torch.equal(held[until + 1, visual], held[0, visual])
    with el.intervene(tiny, el.EnterAt(until)):
        late = tiny.hidden_states(prompt)
    assert torch.equal(held[0], plain[0])
    assert not torch.allclose(held[until, ~visual], late[until, ~visual], atol=1e-4)  # text has read them, below


def test_another_picture_is_asked_the_same_and_pairs_with_the_own_one(tiny, items):
    found = late_entry.about_another(tiny, items)
    assert found["id"].tolist() == [item.sample.id for item in items]
    assert found["question"].tolist() == [item.question.text for item in items]
    shown = [items[(place + 2) % 4].sample for place in range(4)]
    tokens = tasks.answer_tokens(tiny)
    said = [tiny.answer(tiny.prompt(s.image, i.question.text), tokens) for s, i in zip(shown, items, strict=True)]
    assert found["prediction"].tolist() == said
    with pytest.raises(EmbedLensError, match="at least two"):
        late_entry.about_another(tiny, items[:1])


def test_every_run_is_asked_with_its_own_weights_and_entry(tiny, items):
    runs = runs_of(0, 1)
    found = late_entry.trained_runs(tiny, items, runs)
    assert runs[0].log == [(0, 0), (1, 0), (0, 1), (1, 1)]
    named = [(late_entry.entering(layer, trained=True), seed) for layer in (0, 1) for seed in (0, 1)]
    wanted = dict.fromkeys([("baseline", 0), *named], len(items))
    assert found.groupby(["arm", "seed"]).size().to_dict() == wanted
    with runs[1].on(tiny), el.intervene(tiny, el.EnterAt(1)):
        tokens = tasks.answer_tokens(tiny)
        said = [tiny.answer(tiny.prompt(item.sample.image, item.question.text), tokens) for item in items]
    rows = found[(found["arm"] == named[2][0]) & (found["seed"] == 0)]
    assert rows["prediction"].tolist() == said


def test_what_is_grounded_at_entry_is_layer_zero_of_what_is_grounded_by_layer(tiny):
    samples = el.samples.load("miniworld", n=6, seed=3)
    runs = runs_of(0, 2)
    at_entry = el.run(partial(late_entry.at_entry, runs=runs), tiny, samples, batch_size=4)
    layers = late_entry.by_layer(tiny, samples, runs)
    keys = ["entry", "run"]
    wanted = layers[layers.layer == 0].groupby(keys)[["object_tokens", "grounded"]].sum()
    found = at_entry.groupby(keys)[["object_tokens", "grounded"]].sum()
    pd.testing.assert_frame_equal(found, wanted, check_dtype=False)
    assert len(wanted) == 5
    of_late = layers[layers.entry == late_entry.entering(2, trained=True)].pivot_table("grounded", "id", "layer", "sum")
    assert of_late[0].tolist() == of_late[2].tolist()  # they wait below their entry


def test_a_later_entry_that_rises_longer_takes_more_blocks():
    def share(grounded):
        rows = [
            {"id": i, "layer": layer, "grounded": g, "of": 10} for layer, g in enumerate(grounded) for i in range(9)
        ]
        return stats.drawn(pd.DataFrame(rows), "grounded", over="of", by="layer", resamples=20)

    flat, rising = share([5] * 9), share([1, 1, *range(1, 8)])
    more = stats.estimate(late_entry.refinement(rising, 2) - late_entry.refinement(flat, 0), n=9)
    assert (more.value, more.low, more.high) == (6, 6, 6)
