"""Trained late entry: the runs begin equal, learn what they say, and their adapters run as they were trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.utils import parametrize

import embedlens as el
from embedlens import late_entry
from embedlens.errors import EmbedLensError
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


def moved_arms(layers=(0, 3)):
    """Arms whose additions are not zero, with no training."""
    base = shipped()
    base.set_attn_implementation("eager")
    arms = entry.Arms(base, replace(SHORT, layers=layers), 0)
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


def saved(arms, folder, layers=(0, 3)):
    entry.written(arms, replace(SHORT, layers=layers), 0, folder)
    return {path.name: path for path in folder.iterdir()}


def test_every_arm_begins_at_the_shipped_weights(own, sample):
    prompt = own.prompt(sample.image, "What is this?")
    base = shipped()
    base.set_attn_implementation("eager")
    arms = entry.Arms(base, SHORT, 0)
    with torch.no_grad():
        seen = own.tower_states([prompt])[:, own.feature_layer]
        logits = arms.head(arms.arms["0"](seen, row(prompt)))[0]
    torch.testing.assert_close(logits[:, : own._n_rows], own.logits(prompt), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("layer", [0, 3])
def test_a_saved_adapter_runs_as_it_was_trained(own, sample, tmp_path, layer):
    arms = moved_arms()
    path = saved(arms, tmp_path)[f"entry{layer}_seed0.safetensors"]
    adapter = late_entry.Adapter(layer, 0, 2, path, "")
    plain = own.logits(own.prompt(sample.image, "What is this?"))
    with late_entry.adapted(own, adapter), el.intervene(own, el.EnterAt(layer)):
        prompt = own.prompt(sample.image, "What is this?")
        ran = own.logits(prompt)
    with torch.no_grad():
        seen = own.tower_states([prompt])[:, own.feature_layer]
        trained = arms.head(arms.arms[str(layer)](seen, row(prompt)))[0, :, : own._n_rows]
    text = ~prompt.visual
    assert (ran - plain)[text].abs().max() > 0.1
    torch.testing.assert_close(ran[text], trained[text], atol=0.05, rtol=0.01)  # the file is fp16


def test_the_own_weights_come_back_even_after_an_error(own, tmp_path):
    before = {name: value.clone() for name, value in own.hf.state_dict().items()}
    path = saved(moved_arms(), tmp_path)["entry3_seed0.safetensors"]
    with pytest.raises(RuntimeError), late_entry.adapted(own, late_entry.Adapter(3, 0, 2, path, "")):
        raise RuntimeError
    assert all(torch.equal(value, before[name]) for name, value in own.hf.state_dict().items())


def test_adapters_are_listed_by_seed_and_layer_and_a_folder_without_has_none(own, tiny, tmp_path, monkeypatch):
    assert late_entry.adapters(tiny) == ()
    saved(moved_arms(), tmp_path / late_entry.FOLDER)
    monkeypatch.setattr(own.hf, "name_or_path", str(tmp_path))
    assert [(found.seed, found.layer, found.steps) for found in late_entry.adapters(own)] == [(0, 0, 2), (0, 3, 2)]


def test_adapters_of_other_weights_are_refused(own, tmp_path, monkeypatch):
    saved(moved_arms(), tmp_path / late_entry.FOLDER)
    monkeypatch.setattr(own.hf, "name_or_path", str(tmp_path))
    with torch.no_grad():
        own.hf.model.multi_modal_projector.linear_1.bias.add_(1)
    with pytest.raises(EmbedLensError, match=r"other weights.*training\.entry"):
        late_entry.adapters(own)


def test_a_file_that_is_no_adapter_is_named(own, tmp_path, monkeypatch):
    (tmp_path / late_entry.FOLDER).mkdir()
    (tmp_path / late_entry.FOLDER / "broken.safetensors").write_bytes(b"nothing")
    monkeypatch.setattr(own.hf, "name_or_path", str(tmp_path))
    with pytest.raises(EmbedLensError, match=r"broken\.safetensors.*remake"):
        late_entry.adapters(own)


def test_an_adapter_of_another_shape_is_refused(tiny, tmp_path):
    path = saved(moved_arms(), tmp_path)["entry3_seed0.safetensors"]
    with (
        pytest.raises(EmbedLensError, match="does not fit"),
        late_entry.adapted(tiny, late_entry.Adapter(3, 0, 2, path, "")),
    ):
        pass


def test_the_shipped_adapters_are_those_of_the_recipe(miniature):
    found = late_entry.adapters(miniature)
    wanted = [(seed, layer, LATE_ENTRY.stage.steps) for seed in range(LATE_ENTRY.seeds) for layer in LATE_ENTRY.layers]
    assert [(adapter.seed, adapter.layer, adapter.steps) for adapter in found] == wanted


def test_arms_trained_twice_or_resumed_get_the_same_weights_and_leave_the_rest_alone(tmp_path):
    whole = entry.train_arms(SHORT, 0, tmp_path / "whole")
    entry.train_arms(SHORT, 0, tmp_path / "parts", stop_after=1)
    resumed = entry.train_arms(SHORT, 0, tmp_path / "parts")
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
        return next(entry.batches(recipe, "tuning", recipe.tuning, encoder)(0)).pixels

    assert not torch.equal(first(0), first(1))
