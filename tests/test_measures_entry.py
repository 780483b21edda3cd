"""Trained late entry: the runs begin equal, learn what they say, and their adapters run as they were trained."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

import embedlens as el
from embedlens import tasks
from embedlens.errors import EmbedLensError
from embedlens.measures import adapters
from embedlens.measures import entry as late_entry
from training import entry
from training.data import Batch
from training.recipe import LATE_ENTRY, LateEntry, Stage
from training.shipped import shipped

START = replace(LATE_ENTRY.start, threads=1, workers=0)
STAGE = Stage(steps=2, batch=2, lr=1e-2, weight_decay=0.0, warmup=1)
SHORT = LateEntry(START, layers=(0, 3), rank=2, stage=STAGE)


@pytest.fixture(scope="module")
def sample():
    return el.samples.load("miniworld", n=1, seed=5)[0]


@pytest.fixture
def own():
    """A wrapped miniature of the test's own: these tests change weights."""
    return el.load("miniature", device="cpu")


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Arms that differ from the shipped weights without training, and the folder where a model would find them."""
    arms, home = untrained(), tmp_path_factory.mktemp("home")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in arms.arms.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.05 if "up" in name else 0.01))
    entry.written(arms, SHORT, 0, home / adapters.FOLDER)
    return arms, home


def untrained():
    base = shipped()
    base.set_attn_implementation("eager")
    return entry.Arms(base, SHORT, 0)


def row(prompt):
    """A prompt as a training batch of one row."""
    n = len(prompt)
    own = {"ids": prompt.ids[None], "image": prompt.visual[None], "position": torch.arange(n)[None]}
    none = {"weight": torch.zeros(1, n), "block": torch.zeros(1, n).long(), "kind": torch.full((1, n), -1)}
    return Batch(**own, **none)


def adapter_of(home, layer):
    return adapters.Adapter(layer, 0, 2, home / adapters.FOLDER / f"entry{layer}_seed0.safetensors", "")


def test_every_arm_begins_at_the_shipped_weights_and_a_saved_adapter_runs_as_it_was_trained(own, sample, moved):
    def trained(arms, layer, prompt):
        with torch.no_grad():
            seen = torch.stack(own.tower_states_of([prompt]))[:, own.feature_layer]
            return arms.head(arms.arms[str(layer)](seen, row(prompt)))[0, :, : own._n_rows]

    prompt = own.prompt(sample.image, "What is this?")
    plain, text = own.logits(prompt), ~prompt.visual
    torch.testing.assert_close(trained(untrained(), 0, prompt), plain, atol=2e-4, rtol=1e-3)
    arms, home = moved
    for layer in (0, 3):
        with adapter_of(home, layer).on(own), el.intervene(own, el.EnterAt(layer)):
            prompt = own.prompt(sample.image, "What is this?")
            ran = own.logits(prompt)
        assert (ran - plain)[text].abs().max() > 0.1
        # the file is fp16
        torch.testing.assert_close(ran[text], trained(arms, layer, prompt)[text], atol=0.05, rtol=0.01)


def test_adapters_belong_to_their_weights_and_leave_them_as_they_were(
    own, tiny, miniature, moved, tmp_path, monkeypatch
):
    shipped_with = [(adapter.seed, adapter.layer, adapter.steps) for adapter in adapters.adapters(miniature)]
    steps, seeds = LATE_ENTRY.stage.steps, range(LATE_ENTRY.seeds)
    assert shipped_with == [(seed, layer, steps) for seed in seeds for layer in LATE_ENTRY.layers]
    assert adapters.adapters(tiny) == ()
    before = {name: value.clone() for name, value in own.hf.state_dict().items()}
    with pytest.raises(RuntimeError), adapter_of(moved[1], 3).on(own):
        raise RuntimeError
    assert all(torch.equal(value, before[name]) for name, value in own.hf.state_dict().items())
    with pytest.raises(EmbedLensError, match="does not fit"), adapter_of(moved[1], 3).on(tiny):
        pass
    monkeypatch.setattr(own.hf, "name_or_path", str(moved[1]))
    assert [(found.seed, found.layer, found.steps) for found in adapters.adapters(own)] == [(0, 0, 2), (0, 3, 2)]
    with torch.no_grad():
        own.hf.model.multi_modal_projector.linear_1.bias.add_(1)
    with pytest.raises(EmbedLensError, match=r"other weights.*training\.entry"):
        adapters.adapters(own)
    (tmp_path / adapters.FOLDER).mkdir()
    (tmp_path / adapters.FOLDER / "broken.safetensors").write_bytes(b"nothing")
    monkeypatch.setattr(own.hf, "name_or_path", str(tmp_path))
    with pytest.raises(EmbedLensError, match=r"broken\.safetensors.*remake"):
        adapters.adapters(own)


def test_arms_trained_twice_or_resumed_get_the_same_weights_and_leave_the_rest_alone(tmp_path, monkeypatch):
    short, made = replace(SHORT, layers=(3,)), LateEntry.recipe
    monkeypatch.setattr(LateEntry, "recipe", lambda late, seed: replace(made(late, seed), measured=1))
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

    encoder = entry.Encoder(entry.AutoTokenizer.from_pretrained(entry.HOME))
    recipes = [SHORT.recipe(seed) for seed in (0, 1)]  # seeds see other pictures
    seen = [next(entry.batches(one, "tuning", one.tuning, encoder)(0, 0.0)).pixels for one in recipes]
    assert not torch.equal(*seen)


@pytest.fixture(scope="module")
def items():
    return tasks.family_questions("general", 5)[:2] + tasks.family_questions("grounding", 2)


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
