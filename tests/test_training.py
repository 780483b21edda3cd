"""The recipe: every stage is deterministic, resumes exactly, and trains the parts it says and no others."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from training import data, talk, tower
from training.data import Encoder, conversations
from training.recipe import CPU, QUICK, RECIPES, Stage
from training.ship import continued, ship
from training.shipped import shipped

SHORT = Stage(steps=20, batch=2, lr=1e-3, warmup=2)
TINY = replace(
    QUICK,
    name="tiny",
    vision_width=32,
    vision_layers=3,
    vision_heads=2,
    text_width=32,
    text_layers=2,
    text_heads=2,
    text_mlp=48,
    reader_layers=1,
    tower=replace(SHORT, muon_lr=1e-3),
    language=replace(SHORT, muon_lr=1e-3),
    alignment=SHORT,
    tuning=SHORT,
    measured=1,
    threads=1,
    workers=0,
)


@pytest.fixture(scope="module")
def tokenizer():
    from training.tokenizer import learn

    return learn(600, documents=300, rare=5)


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """A folder with every stage of a tiny recipe trained for 20 steps."""
    folder = tmp_path_factory.mktemp("training")
    tower.train_tower(TINY, tokenizer, folder)
    talk.train_language(TINY, tokenizer, folder)
    for stage in ("alignment", "tuning"):
        talk.train_together(stage, TINY, tokenizer, folder)
    return folder


def weights(folder, stage):
    return torch.load(folder / f"{stage}.pt", weights_only=True)["module"]


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stage", ["tower", "language", "tuning"])
def test_training_twice_and_resuming_give_equal_weights(stage, tokenizer, trained, tmp_path):
    for part in ("tower", "language", "alignment"):
        if part != stage:
            (tmp_path / f"{part}.pt").write_bytes((trained / f"{part}.pt").read_bytes())
    train = {
        "tower": tower.train_tower,
        "language": talk.train_language,
        "tuning": lambda *rest, **options: talk.train_together("tuning", *rest, **options),
    }[stage]
    train(TINY, tokenizer, tmp_path, stop_after=7)
    assert not equal(weights(tmp_path, stage), weights(trained, stage))
    train(TINY, tokenizer, tmp_path)
    assert equal(weights(tmp_path, stage), weights(trained, stage))


def test_alignment_trains_the_projector_alone_and_tuning_leaves_the_tower(tokenizer, trained, tmp_path):
    for part in ("tower", "language"):
        (tmp_path / f"{part}.pt").write_bytes((trained / f"{part}.pt").read_bytes())
    start = talk.assembled(TINY, tokenizer, tmp_path).state_dict()
    for stage, frozen in {
        "alignment": ("vision_tower", "language_model", "lm_head"),
        "tuning": ("vision_tower",),
    }.items():
        after = weights(trained, stage)
        changed = {name for name in start if not torch.equal(start[name], after[name])}
        assert not [name for name in changed if any(part in name for part in frozen)]
        assert any("multi_modal_projector" in name for name in changed)


def test_questions_of_a_row_do_not_see_each_other(tokenizer):
    """A question packed with others gets the logits that it gets alone."""
    model = talk.untrained(TINY, tokenizer)
    batch = conversations(TINY, "tuning", "train", 0, 2, Encoder(tokenizer), 0)
    logits, *_ = talk.with_pictures(model.eval(), batch, TINY)
    first = replace(batch, weight=torch.where(batch.block == 1, batch.weight, 0.0))
    alone = replace(
        first, ids=torch.where(batch.block <= 1, batch.ids, 5), image=batch.image
    )  # other questions overwritten
    of_first = (batch.weight[:, 1:] > 0).nonzero(as_tuple=True)
    chosen = batch.block[:, 1:][of_first] == 1
    again, *_ = talk.with_pictures(model, alone, TINY)
    torch.testing.assert_close(logits[chosen], again, atol=2e-2, rtol=0)  # bfloat16 autocast
    everything = replace(batch, ids=torch.where(batch.block == 0, 5, batch.ids), image=batch.image)
    other, *_ = talk.with_pictures(model, everything, TINY)
    assert not torch.allclose(logits, other, atol=2e-2)  # the prefix is seen


def test_what_training_asks_is_what_the_processor_writes(tokenizer, trained, tmp_path):
    import embedlens as el
    from embedlens import samples
    from embedlens.samples import miniworld
    from embedlens.samples.miniworld import scene
    from training.data import normalised, pixels_of

    ship(TINY, tokenizer, trained, tmp_path)
    model = el.load(tmp_path)
    encoder = Encoder(tokenizer)
    batch = conversations(TINY, "tuning", "train", 0, 1, encoder, 0)
    drawn = miniworld.scene_of(300_000_000, "train")
    item = miniworld.sample(300_000_000, "train")
    question = tokenizer.decode(batch.ids[0, (batch.block[0] == 1) & (batch.weight[0] == 0)])
    prompt = model.prompt(item.image, question.removeprefix("\n").removesuffix(" ASSISTANT:"))
    assert prompt.ids.tolist() == batch.ids[0, : len(prompt)].tolist()
    pixels = normalised(torch.from_numpy(pixels_of(drawn, TINY)).permute(2, 0, 1)[None])
    torch.testing.assert_close(prompt.pixel_values, pixels, atol=1e-5, rtol=0)
    assert samples.load(n=1)[0].image.tobytes() != item.image.tobytes()
    assert scene.is_heldout_word("") is False


def test_recipes_are_named_and_the_shipped_model_is_one_of_them(miniature):
    assert set(RECIPES) == {"cpu", "quick", "onward", "relation_words", "relation_pictures", "gpu"}
    assert miniature.hf.config.text_config.hidden_size in {CPU.text_width, RECIPES["gpu"].text_width}


def test_a_missing_stage_says_which_command_makes_it(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="--stage tower"):
        talk.assembled(TINY, tokenizer, tmp_path)


def test_an_onward_training_begins_at_what_ships_and_sees_other_pictures(miniature):
    onward = RECIPES["onward"]
    tower.Captioner(onward, len(miniature.tokenizer)).vision.load_state_dict(shipped().model.vision_tower.state_dict())
    indices = [data.seeded(recipe, "tower", "train", 0).random() for recipe in (CPU, onward)]
    assert indices[0] != indices[1]
    heldout = [data.seeded(recipe, "tower", "heldout", 0).random() for recipe in (CPU, onward)]
    assert heldout[0] == heldout[1]  # measured on the same pictures, so that the curves go on
    early, late = (data.options(onward, progress, "tower") for progress in (0.0, 0.9))
    assert early["writing"] > 1 and early["lengths"][0] > 0.9 and "writing" not in late


def test_the_relation_experiments_ask_nothing_else_and_begin_at_what_ships(miniature, tmp_path):
    encoder = Encoder(miniature.tokenizer)
    for name, stage in (("relation_words", "language"), ("relation_pictures", "tuning")):
        recipe = RECIPES[name]
        batch = conversations(recipe, stage, "train", 0, 8, encoder, recipe.tuning.steps)
        asked = {data.KINDS[kind] for kind in batch.kind.unique().tolist() if kind >= 0}
        assert "relation" in asked and asked <= {"relation", "caption"}
        usual = conversations(RECIPES["onward"], stage, "train", 0, 8, encoder, 1).kind.unique().tolist()
        assert {data.KINDS[kind] for kind in usual if kind >= 0} > {"relation", "where", "colour"}
    begun = talk.assembled(RECIPES["relation_pictures"], miniature.tokenizer, tmp_path)
    assert equal(begun.state_dict(), shipped().state_dict())


def test_an_experiment_ships_its_log_and_no_weights(tokenizer, trained, tmp_path):
    (tmp_path / "training.json").write_text('{"stages": {"tower": 1}}')
    ship(replace(TINY, name="tried", asks={"relation": 1.0}), tokenizer, trained, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["training.json"]
    log = json.loads((tmp_path / "training.json").read_text())
    assert log["stages"] == {"tower": 1} and log["experiments"]["tried"]["stage"] == "language"
    assert log["experiments"]["tried"]["log"][-1]["step"] == TINY.language.steps


def test_the_log_of_an_onward_training_continues_the_one_before():
    def log(name, steps):
        entries = [
            {"step": step, "samples": 2 * step, "seconds": 0.5 * step, "loss": 1.0} for step in range(1, steps + 1)
        ]
        stage = {"steps": steps, "seconds": steps // 2, "log": entries}
        history = [{"stage": "tower", "step": 1, "change": "shortened"}]
        return {"recipe": {"name": name}, "stages": {"tower": stage}, "history": history}

    both = continued(log("cpu", 4), log("onward", 6))
    assert [entry["step"] for entry in both["stages"]["tower"]["log"]] == list(range(1, 11))
    assert both["stages"]["tower"]["log"][-1]["samples"] == 20 and both["stages"]["tower"]["steps"] == 10
    assert [entry["step"] for entry in both["history"]] == [1, 4, 5]
    assert both["recipe"]["name"] == "onward"
