"""The recipe: every stage is deterministic, resumes exactly, and trains the parts it says and no others."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from training import __main__ as program
from training import data, talk, tower
from training.data import Encoder, conversations
from training.loop import autocast, pace, progress
from training.recipe import CPU, NOTHING, QUICK, RECIPES, Stage, within
from training.ship import continued, packed, ship, unpacked
from training.shipped import shipped

SHORT = Stage(steps=10, batch=2, lr=1e-3, warmup=2)
SIZES = {"vision_width": 32, "vision_layers": 3, "vision_heads": 2, "text_width": 32, "text_layers": 2, "text_heads": 2}
SIZES |= {"text_mlp": 48, "reader_layers": 1, "measured": 1, "threads": 1, "workers": 0}
STAGES = dict.fromkeys(("tower", "language"), replace(SHORT, muon_lr=1e-3)) | {"alignment": SHORT, "tuning": SHORT}
TINY = replace(QUICK, name="tiny", **SIZES, **STAGES)


@pytest.fixture(scope="module")
def tokenizer():
    from training.tokenizer import learn

    return learn(600, documents=300, rare=5)


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """A folder with every stage of a tiny recipe trained for ten steps."""
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
    batch = conversations(TINY, "tuning", "train", 0, 2, Encoder(tokenizer))
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
    batch = conversations(TINY, "tuning", "train", 0, 1, encoder)
    drawn = scene.scene(scene.rng_of("train", 300_000_000), "train")
    item = miniworld.sample(300_000_000, "train")
    question = tokenizer.decode(batch.ids[0, (batch.block[0] == 1) & (batch.weight[0] == 0)])
    prompt = model.prompt(item.image, question.removeprefix("\n").removesuffix(" ASSISTANT:"))
    assert prompt.ids.tolist() == batch.ids[0, : len(prompt)].tolist()
    pixels = normalised(torch.from_numpy(pixels_of(drawn, TINY)).permute(2, 0, 1)[None])
    torch.testing.assert_close(prompt.pixel_values, pixels, atol=1e-5, rtol=0)
    assert samples.load(n=1)[0].image.tobytes() != item.image.tobytes()
    assert scene.is_heldout_word("") is False


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


def test_an_experiment_ships_its_log_and_no_weights(tokenizer, trained, tmp_path):
    (tmp_path / "training.json").write_text('{"stages": {"tower": 1}}')
    words = replace(TINY, name="words", experiment=True, tower=NOTHING, alignment=NOTHING, tuning=NOTHING)
    ship(words, tokenizer, trained, tmp_path)
    ship(replace(words, name="both", tuning=TINY.tuning), tokenizer, trained, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["training.json"]
    log = json.loads((tmp_path / "training.json").read_text())
    tried = {name: run["stage"] for name, run in log["experiments"].items()}
    assert log["stages"] == {"tower": 1} and log["experiments"]["words"]["log"][-1]["step"] == TINY.language.steps
    assert tried == {"words": "language", "both_language": "language", "both_tuning": "tuning"}
    ship(words, tokenizer, trained, tmp_path / "candidate")  # no miniature there: whole, to be measured
    assert (tmp_path / "candidate" / "model.safetensors").exists()


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


def test_ten_minutes_of_a_gpu_are_rehearsed_end_to_end(tmp_path, monkeypatch):
    """One call: tower and language side by side, alignment, tuning, and small files from which stage ship ships."""
    monkeypatch.setattr(program, "START", "fork")  # without a GPU, and quicker
    monkeypatch.setattr(program, "BEGAN", time.time())
    call = ["--recipe", "gpu", "--device", "cpu", "--tiny", "--seconds", "3"]
    program.main([*call, "--folder", str(tmp_path / "there"), "--out", str(tmp_path / "out")])
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["log.json", "weights-01-of-01"]
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    assert set(log) == {"tower", "language", "alignment", "tuning"}
    assert all(run[0]["step"] == 0 and run[-1]["step"] >= 1 for run in log.values())
    home = [*call[:5], "--folder", str(tmp_path / "here"), "--unpack", str(tmp_path / "out")]
    program.main([*home, "--stage", "ship", "--home", str(tmp_path / "home")])
    there = weights(tmp_path / "there" / "gpu_tiny", "tuning")
    shipped_there = LlavaForConditionalGeneration.from_pretrained(tmp_path / "home").state_dict()
    assert equal({name: value.half() for name, value in there.items()}, shipped_there)
    with pytest.raises(ValueError, match="without its optimiser"):
        program.main([*call, "--folder", str(tmp_path / "here"), "--stage", "tuning"])


def test_a_rehearsal_never_overwrites_the_miniature(tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main(["--recipe", "quick", "--tiny", "--folder", str(tmp_path)])
    assert "is not shipped" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_comes_home_is_in_files_below_the_limit_and_whole(trained, tmp_path):
    part = 100_000
    files = packed(trained, tmp_path / "out", part)
    assert len(files) > 3 and all(file.stat().st_size <= part for file in files[:-1])
    unpacked(tmp_path / "out", tmp_path / "here")
    assert equal(weights(tmp_path / "here", "tuning"), {k: v.half() for k, v in weights(trained, "tuning").items()})
    assert not any("vision." in name for name in weights(tmp_path / "here", "tower"))  # it is in tuning's already
    with pytest.raises(FileExistsError, match="another --folder"):
        unpacked(tmp_path / "out", tmp_path / "here")
    recipe = RECIPES["gpu"]  # eight files at most, counted without training: fp16 weights of the whole, and the heads
    with torch.device("meta"):
        whole = LlavaForConditionalGeneration(talk.configured(recipe, recipe.vocabulary, 3))
        heads = tower.Captioner(recipe, recipe.vocabulary)
    numbers = [p.numel() for p in whole.parameters()]
    numbers += [p.numel() for name, p in heads.named_parameters() if not name.startswith("vision.")]
    assert -(-2 * sum(numbers) // 15_000_000) + 1 < 8
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match="not all"):
        unpacked(tmp_path / "out", tmp_path / "nowhere")


def test_a_stage_with_a_time_follows_the_clock():
    timed = Stage(1000, batch=1, lr=1.0, warmup=10, seconds=100.0)
    assert progress(1, timed, 50.0) == 0.5 and progress(900, timed, 50.0) == 0.9 and progress(1, timed, 200.0) == 1.0
    assert pace(500, timed, 0.0) == 1.0 and pace(500, timed, 1.0) == pytest.approx(0.05)
    assert pace(4, timed, 0.0) == 0.5  # the warm-up is counted in steps
    shares = [stage.seconds for stage in (within(RECIPES["gpu"], 20.4, ["alignment", "tuning"])).__dict__.values()
              if isinstance(stage, Stage)]  # fmt: skip
    assert sum(shares[2:]) == pytest.approx(20.4)
    with pytest.raises(ValueError, match="tower of recipe cpu is ended by its steps"):
        within(CPU, 60.0, ["tower"])


def test_a_killed_stage_with_a_time_goes_on_with_the_time_that_is_left(tokenizer, tmp_path):
    def lasting(seconds):
        return replace(TINY, language=replace(SHORT, steps=10**6, seconds=seconds, measurements=1))

    talk.train_language(lasting(1000.0), tokenizer, tmp_path, stop_after=2)
    before = torch.load(tmp_path / "language.pt", weights_only=True)
    timed = lasting(before["seconds"] + 0.5)
    assert before["step"] == 2
    talk.train_language(timed, tokenizer, tmp_path)
    after = torch.load(tmp_path / "language.pt", weights_only=True)
    assert after["step"] > 2 and after["seconds"] >= before["seconds"] + 0.5 and after["log"][0] == before["log"][0]
    stopped = (tmp_path / "language.pt").read_bytes()
    talk.train_language(timed, tokenizer, tmp_path)
    assert (tmp_path / "language.pt").read_bytes() == stopped


def test_half_precision_is_taken_only_where_the_machine_has_it(tokenizer, monkeypatch):
    batch = conversations(TINY, "language", "train", 0, 2, Encoder(tokenizer))
    for has, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        with autocast("cpu"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == talk.additive(batch).dtype == dtype


def test_sinks_are_measured_as_defined(tokenizer):
    """A planted sink: one head value per block cannot do it, so <s> gets a key that every query points at."""
    model = talk.initialised(LlamaForCausalLM(TINY.text_config(len(tokenizer)))).eval()
    encoder = Encoder(tokenizer)

    def outputs(batch):
        return talk.predicted(model.model, model.lm_head, model.model.embed_tokens(batch.ids), batch, TINY)

    def found():
        with torch.no_grad():
            return talk.sinks(model.model, outputs, TINY, "language", encoder)

    usual = found()
    assert len(usual["bos"]) == TINY.text_layers and len(usual["peak"]) == TINY.text_layers + 1
    for block in model.model.layers:
        block.self_attn.q_proj.weight.data.zero_()  # uniform attention: <s> gets one over the tokens seen
    even = found()["bos"]
    batch = conversations(TINY, "language", "heldout", 0, 24, encoder)
    text = batch.block >= 0
    text[:, 0] = False
    expected = (1 / batch.mask()[:, 0].sum(-1).float())[text].mean().item()
    assert even == pytest.approx([expected] * TINY.text_layers, rel=1e-3)
    model.model.embed_tokens.weight.data[1] = 0.0
    model.model.embed_tokens.weight.data[1, 3] = 50.0  # <s>: one massive dimension
    assert found()["peak"][0] == pytest.approx(TINY.text_width**0.5, rel=1e-3) and usual["peak"][0] < 5
    assert model.config._attn_implementation == model.model.config._attn_implementation


def test_a_further_tower_begins_with_the_decoder_and_encoder_it_learned_with(tokenizer, trained, tmp_path, monkeypatch):
    heads = tmp_path / "heads.safetensors"
    tower.keep_heads(weights(trained, "tower"), heads)
    monkeypatch.setattr(tower, "HEADS", heads)
    fresh = tower.Captioner(TINY, len(tokenizer))
    kept = tower.kept_heads(fresh)
    assert kept and equal(kept, {name: weights(trained, "tower")[name].half() for name in kept})
    assert {name.split(".")[0] for name in kept} > {"decoder", "encoder", "text_embed"}
    other = tower.Captioner(replace(TINY, reader_layers=2), len(tokenizer))
    assert tower.kept_heads(other) == {}  # of another shape: begin anew
