"""Promises of the wrapper around the miniature and LLaVA-1.5; those of all families are in test_families.py."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image
from stock import QUESTION, Stock, bright, picture
from tiny_llava import save_tiny_llava

from embedlens import EmbedLensError, claims, load, loading
from embedlens.families import llava
from embedlens.patches import PREPROCESSINGS

SIZES = [(56, 56), (80, 60), (60, 100), (97, 41)]


@pytest.fixture(scope="module")
def stock(tiny_folder):
    return Stock(tiny_folder)


def test_the_miniature_is_the_stock_model_bit_for_bit(miniature):
    model, stock = miniature, Stock(loading._locate("miniature"))
    for seed, size in enumerate(SIZES):
        image = picture(size, seed)
        prompt, expected, inputs = model.prompt(image, QUESTION), stock.forward(image), stock.inputs(image)
        assert torch.equal(prompt.ids, inputs["input_ids"][0])
        assert torch.equal(prompt.pixel_values, inputs["pixel_values"])
        assert torch.equal(model.logits(prompt), expected.logits[0, :, : len(model.input_embeddings)])
        layers = model.hidden_states(prompt)
        for index in range(model.n_layers):
            assert torch.equal(layers[index], expected.hidden_states[index][0]), f"layer {index}"
        with torch.no_grad():  # Hugging Face norms its last hidden state; ours is the one before
            assert torch.equal(model.unembed.final_norm(layers[-1]), expected.hidden_states[-1][0])
        assert model.answer(prompt) == stock.answer(image)
        assert int((prompt.ids == model.tokenizer.bos_token_id).sum()) == 1
    assert model.prompts([], []) == [] and model.answers([]) == [] and list(model.streams_of([])) == []


def test_the_miniature_answers_a_picture_in_under_a_third_of_a_second(miniature):
    """CPU seconds of one thread, best of five, so that other work on the machine does not count."""
    image, spent, threads = picture((640, 480)), [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            start = time.process_time()
            miniature.answer(miniature.prompt(image, "What is in the picture?"))
            spent.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(spent) < 0.3


def test_answer_stops_at_the_length_asked_for(tiny, stock):
    prompt = tiny.prompt(picture(), QUESTION)
    assert tiny.answer(prompt, max_new_tokens=3) == stock.answer(picture(), max_new_tokens=3)


def moved_most(model, image: Image.Image, step: int = 1) -> tuple[list[int], list[int]]:
    """(patches that a bright square is drawn at, the token that it moves most), of patches shown as a whole."""
    grid = model.prompt(image, QUESTION).grid
    shown = [index for index in range(len(grid)) if grid.box(index) == grid.cell(index)][::step]
    before, *after = model.visual_features_of([image, *(bright(image, grid.box(index)) for index in shown)])
    return shown, [int((each - before).norm(dim=-1).argmax()) for each in after]


@pytest.mark.parametrize(("size", "step"), [((112, 112), 1), ((63, 112), 3)])
def test_a_bright_square_changes_its_own_token_most_in_the_miniature(miniature, size, step):
    shown, moved = moved_most(miniature, Image.new("RGB", size, (90, 90, 90)), step)
    assert moved == shown and len(shown) > 8


PLAIN = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 3}
PLAIN |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "processor_class": "LlavaProcessor"}
# As preprocessor_config.json of published checkpoints says, at the size of the tiny tower.
CLIP = PLAIN | {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56}, "do_center_crop": True}
CLIP |= {"crop_size": {"height": 56, "width": 56}, "do_convert_rgb": True}
SIGLIP = PLAIN | {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56}}


def republished(source, folder, **fields):
    """A copy of a checkpoint folder with another image processor, laid out as on the hub."""
    shutil.copytree(source, folder)
    text = json.loads((folder / "processor_config.json").read_text())
    text.pop("image_processor", None)
    (folder / "processor_config.json").write_text(json.dumps(text))
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return folder


def test_a_published_image_processor_shows_the_picture_where_the_grid_says(tiny_folder, tmp_path):
    """It cannot pad by itself; nor can CLIP's, which the twin of LLaVA-1.5 has."""
    whole = load(republished(tiny_folder, tmp_path / "hub", **SIGLIP), device="cpu")
    assert type(whole.processor.image_processor).__name__.startswith(SIGLIP["image_processor_type"])
    for model in (whole, whole.with_preprocessing("centre-crop"), whole.with_preprocessing("stretch")):
        shown, moved = moved_most(model, Image.new("RGB", (160, 120), (90, 90, 90)))
        assert moved == shown and len(shown) >= 4


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"do_normalize": False}, "under 'letterbox' its CLIPImage.* take preprocessor_config"),
        ({"do_rescale": False}, "under 'letterbox' its CLIPImage.* take preprocessor_config"),
        # It cuts tiles, five axes of pixels for the four that the tower reads.
        ({"image_processor_type": "LlavaNextImageProcessor"}, "its LlavaNextImage.* does not show a picture where"),
    ],
)
def test_an_image_processor_that_cannot_be_made_right_is_refused(tiny_folder, tmp_path, wrong, sentence):
    with pytest.raises(EmbedLensError, match=sentence) as caught:
        load(republished(tiny_folder, tmp_path / "hub", **CLIP | wrong), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS)
def test_a_picture_up_to_4096_px_is_the_stock_one_bit_for_bit(tiny, stock, preprocessing):
    model, side = tiny.with_preprocessing(preprocessing), {"height": 56, "width": 56}
    settings = {
        "letterbox": {"do_pad": True, "do_center_crop": False, "size": side},
        "centre-crop": {"do_pad": False, "do_center_crop": True, "size": {"shortest_edge": 56}},
        "stretch": {"do_pad": False, "do_center_crop": False, "size": side},
    }[preprocessing]
    for size in [(4096, 64), (200, 1)]:
        expected = stock.processor.image_processor(picture(size), **settings, return_tensors="pt")
        assert torch.equal(model.prompt(picture(size), QUESTION).pixel_values, expected["pixel_values"])


def test_pictures_come_as_path_image_or_array(tiny, tmp_path):
    image = picture()
    image.save(tmp_path / "picture.png")
    forms = [image, tmp_path / "picture.png", str(tmp_path / "picture.png"), np.asarray(image)]
    first, *others = [tiny.prompt(form, QUESTION) for form in forms]
    assert all(torch.equal(first.pixel_values, other.pixel_values) for other in others)


def test_embeddings_are_the_real_rows_only(tiny, tmp_path):
    assert len(tiny.input_embeddings) == len(tiny.tokenizer) == tiny.hf.config.text_config.vocab_size - 7
    assert tiny.logits(tiny.prompt(picture(), QUESTION)).shape[-1] == len(tiny.input_embeddings)
    # Placeholders that close the vocabulary, as in llava-hf checkpoints, are no words either.
    other = load(save_tiny_llava(tmp_path / "closing", specials_first=False, tied=True), device="cpu")
    assert len(other.input_embeddings) == len(other.tokenizer) - 2
    assert {"<pad>", "<image>"} & set(other.tokens) == set()
    assert other.tied and not tiny.tied and "untied" in repr(tiny)


@pytest.fixture
def broken(tiny_folder, tmp_path):
    """A copy of the checkpoint to break."""
    return shutil.copytree(tiny_folder, tmp_path / "broken")


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def drop_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if "layers.1.mlp" in name))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def forget_shard(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "x-1.safetensors"}}')


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json of .*: check the spelling .*says nothing"),
        (lambda f: (f / "config.json").write_text("{"), "no config.json of .*: check .*not a valid JSON file"),
        (
            lambda f: edit_json(f / "config.json", architectures=["Qwen2VLForConditionalGeneration"]),
            "is a Qwen2VLForConditionalGeneration, which is not supported: pass .* LlavaForConditionalGeneration",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "download the model again .*no file named model.safetensors"),
        (forget_shard, r"cannot be loaded: save or download the model again .*x-1.safetensors"),
        (drop_tensor, r"lack 1 tensors \(model.language_model.layers.1.mlp.*\): save the whole model"),
        (lambda f: cut_in_half(f / "model.safetensors"), "the weights of .* cannot be loaded: save or download"),
        (lambda f: (f / "processor_config.json").unlink(), "has no (usable|image) processor.*add"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no usable processor: add the files that processor.save_"),
        (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template: add chat_template.jinja"),
    ],
)
def test_a_broken_folder_gets_its_sentence(broken, damage, sentence):
    damage(broken)
    with pytest.raises(EmbedLensError, match=sentence) as caught:
        load(broken, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name_or_folder": "miniatur"}, "no folder 'miniatur': pass 'miniature', the folder that holds"),
        ({"name_or_folder": "./no/such/folder"}, "no folder './no/such/folder': pass 'miniature'"),
        ({"name_or_folder": ""}, "no folder '': pass 'miniature', the folder"),
        ({"name_or_folder": "nobody/nothing"}, "no config.json of 'nobody/nothing' .*: check the spelling"),
        ({"name_or_folder": __file__}, "no folder .*test_vlm.py': pass 'miniature', the folder that holds config"),
        ({"device": "gpu"}, "unknown device 'gpu': pass 'cpu', 'cuda'"),
        ({"device": "xpu"}, "unsupported device 'xpu': pass 'cpu', 'cuda'"),
        ({"dtype": "float8"}, "unknown dtype 'float8': pass one of 'float32', 'float16', 'bfloat16'"),
        ({"dtype": torch.int8}, "unknown dtype torch.int8"),
        ({"quantize": "2bit"}, "unknown quantize '2bit': pass '4bit' or '8bit', or leave it out"),
        ({"preprocessing": "pad"}, "unknown preprocessing 'pad': choose one of letterbox, centre-crop, stretch"),
    ],
)
def test_a_bad_argument_of_load_gets_its_sentence(tiny_folder, arguments, sentence):
    with pytest.raises(EmbedLensError, match=sentence) as caught:
        load(**{"name_or_folder": tiny_folder, "device": "cpu", **arguments})
    assert "\n" not in str(caught.value)


def test_a_quantised_model_is_called_so_and_has_records_of_its_own(tiny_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "check_quantization", lambda *_: None)
    monkeypatch.setattr(loading, "_quantization", lambda *_: None)  # the weights stay whole here
    whole, packed = (load(tiny_folder, device="cpu", quantize=quantize) for quantize in (None, "4bit"))
    assert (whole.name, packed.name) == (str(tiny_folder), f"{tiny_folder}@4bit")
    files = [claims.write(tmp_path, model.name, "01", 2, 0, {}, {}) for model in (whole, packed)]
    assert files[0] != files[1] and claims.read(files[1]).model == packed.name
    assert claims.kind_of_result("miniature@4bit") == "miniature"


def test_another_preprocessing_shares_the_weights_and_leaves_the_first_model_alone(tiny_folder):
    model = load(tiny_folder, device="cpu")
    image = Image.linear_gradient("L").resize((90, 40)).convert("RGB")
    before = model.prompt(image, "What?").embeds
    stretched = model.with_preprocessing("stretch")
    assert stretched.hf is model.hf and stretched.name == model.name
    loaded = load(tiny_folder, device="cpu", preprocessing="stretch")
    assert torch.equal(stretched.prompt(image, "What?").embeds, loaded.prompt(image, "What?").embeds)
    assert torch.equal(model.prompt(image, "What?").embeds, before)
    assert not torch.equal(stretched.prompt(image, "What?").embeds, before)


@pytest.mark.parametrize(
    ("gpu", "arguments", "sentence"),
    [
        (False, {"device": "cuda"}, "'cuda' is asked for, but PyTorch sees no CUDA GPU: pass device='cpu'"),
        (False, {"device": "cpu", "quantize": "4bit"}, "quantize='4bit' needs a CUDA GPU, .*sees none: leave it out"),
        (True, {"device": "cpu", "quantize": "4bit"}, "quantize='4bit' needs a CUDA GPU, .*not cpu: pass dev"),
        (True, {"quantize": "8bit"}, "quantize='8bit' needs bitsandbytes: pip install bitsandbytes"),
    ],
)
def test_what_this_machine_cannot_do_gets_its_sentence(tiny_folder, monkeypatch, gpu, arguments, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(EmbedLensError, match=sentence):
        load(tiny_folder, **arguments)


def test_weights_that_ignore_the_picture_are_refused(broken):
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    for name in tensors:  # attention writes nothing: no position reads another
        if "language_model" in name and "o_proj" in name:
            tensors[name].zero_()
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(EmbedLensError, match="answers the same with its visual tokens blanked"):
        load(broken, device="cpu")


def test_a_wrong_module_path_is_found_when_the_model_is_built(tiny_folder, monkeypatch):
    monkeypatch.setitem(llava.MODULES, "final_norm", "model.language_model.layers.0.input_layernorm")
    with pytest.raises(EmbedLensError, match="do not turn the last block's output into its logits: correct MODULES"):
        load(tiny_folder, device="cpu")
    monkeypatch.setitem(llava.MODULES, "final_norm", "language_model.norm")
    with pytest.raises(EmbedLensError, match="has no module language_model.norm: install the version in"):
        load(tiny_folder, device="cpu")


def test_what_is_longer_than_the_model_has_positions_is_refused_with_the_numbers(tiny):
    """Beyond them a decoder answers nothing, or anything; the random LLaVA has 512."""
    from embedlens import prefix

    most = tiny.hf.config.get_text_config().max_position_embeddings
    prompt = tiny.prompt(picture(), QUESTION)
    room = most - len(prompt)
    assert isinstance(tiny.answer(prompt, room), str)  # all of it may be used
    sentence = rf"{len(prompt)} tokens, 16 of them visual, and {room + 1} new tokens take up to {most + 1} positions.*"
    for ask in (lambda new: tiny.answer(prompt, new), lambda new: prefix.answers(tiny, [prefix.Case(prompt)], new)):
        with pytest.raises(EmbedLensError, match=sentence + rf"has {most}: shorten the question or allow fewer"):
            ask(room + 1)
    long = "what ? " * most
    for write in (lambda: tiny.prompt(picture(), long), lambda: tiny.asked(prompt, long)):
        with pytest.raises(EmbedLensError, match=rf"16 of them visual, take up to .* has {most}: shorten"):
            write()
