"""Memory is estimated before anything is loaded; what is exact about it is the weights."""

import json
from pathlib import Path

import pytest
import torch

from embedlens import EmbedLensError, batches, families, loading, memory
from embedlens.memory import configs


def test_a_batch_is_halved_until_it_fits_and_no_other_error_is_swallowed():
    tried, full = [], torch.OutOfMemoryError("CUDA out of memory")

    def run(batch_size, error=full):
        tried.append(batch_size)
        if batch_size > 3:
            raise error
        return "done"

    assert batches.halving(run, 16) == ("done", 2) and tried == [16, 8, 4, 2]
    with pytest.raises(RuntimeError, match="shapes"):
        batches.halving(lambda size: run(size, RuntimeError("shapes do not match")), 16)
    with pytest.raises(torch.OutOfMemoryError):
        batches.halving(lambda size: run(4), 16)


def test_batches_become_smaller_from_where_one_does_not_fit_and_none_is_measured_twice():
    tried = []

    def run(start, batch):
        tried.append((start, len(batch)))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [10 * item for item in batch]

    assert list(batches.in_batches(run, range(7), 4)) == [10 * item for item in range(7)]
    assert tried == [(0, 4), (0, 2), (2, 2), (4, 2), (6, 1)]
    assert list(batches.in_batches(run, range(2))) == [0, 10] and list(batches.in_batches(run, [])) == []
    with pytest.raises(RuntimeError, match="shapes"):
        list(batches.in_batches(lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not match")), [1, 2], 2))
    with pytest.raises(EmbedLensError, match="batch_size is 0: pass at least 1"):
        list(batches.in_batches(run, [1], 0))


def config_of_released(model):
    return configs()[model]


def test_the_weights_are_those_of_the_loaded_model(miniature):
    found = memory.needed(memory.config_of("miniature"), dtype="float32")
    parameters = list(miniature.hf.parameters())
    assert found.parameters == sum(parameter.numel() for parameter in parameters)
    assert found.weights == sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    rows = miniature.hf.get_input_embeddings().weight
    assert found.vocabulary == memory.LENSES * 4 * rows.numel()


@pytest.mark.parametrize(
    ("model", "published"),
    [("llava-hf/llava-1.5-7b-hf", 7_063_427_072), ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656)],
)
def test_published_models_have_the_number_of_parameters_that_their_checkpoints_say(model, published):
    assert memory.needed(config_of_released(model)).parameters == published


def test_fewer_bits_longer_prompts_and_larger_batches_count():
    config = memory.config_of("miniature")
    half, four = memory.needed(config), memory.needed(config, quantize="4bit")
    assert memory.needed(config, "float32").weights == 2 * half.weights
    assert half.weights / 4 < four.weights < half.weights  # embedding, head and norms stay as they are
    assert memory.needed(config, visual_tokens=576).sample > half.sample
    assert half.total(8) - half.total(1) == 7 * half.sample


@pytest.mark.parametrize("model", configs())
def test_quantisation_leaves_what_makes_visual_tokens_and_the_head_alone(model):
    """By transformers' own rule, on the modules of the published class: bitsandbytes needs a GPU."""
    from transformers import AutoModelForImageTextToText
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = config_of_released(model)
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(config)
    family = families.family_of(type(hf).__name__)
    asked = loading._quantization("4bit", family, torch.bfloat16)
    assert (asked.bnb_4bit_quant_type, asked.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    packed = {
        name: module.weight.numel()
        for name, module in hf.named_modules()
        if isinstance(module, torch.nn.Linear) and should_convert_module(name, asked.llm_int8_skip_modules)
    }
    decoder = [name for name, _ in hf.get_submodule(family.MODULES["blocks"]).named_modules() if "proj" in name]
    assert len(packed) == len(decoder) and all(family.MODULES["decoder"] in name for name in packed)
    whole, four = memory.needed(config), memory.needed(config, quantize="4bit")
    assert whole.weights - four.weights == round(sum(packed.values()) * (2 - memory.QUANTIZED["4bit"]))


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"text_config": {"torch_dtype": "float16"}}, torch.float16),
        ({"text_config": None}, torch.bfloat16),
    ],
)
def test_what_is_computed_in_is_what_the_checkpoint_was_stored_in(config, stored):
    assert loading._stored_dtype(config) == stored


def test_the_real_config_says_float16():
    real = Path(__file__).parents[2] / "shared/real/llava-1.5-7b-hf/config.json"  # beside the checkout, not in it
    if not real.is_file():
        pytest.skip("the checkpoint's own config.json is not at hand")
    assert loading._stored_dtype(json.loads(real.read_text())) == torch.float16


def test_another_dtype_than_the_usual_is_part_of_the_name(tiny_folder):
    named = {dtype: loading.load(tiny_folder, device="cpu", dtype=dtype) for dtype in ("auto", "float32", "bfloat16")}
    stored = str(loading._stored_dtype(loading._config(tiny_folder, "tiny"))).removeprefix("torch.")
    for dtype, model in named.items():
        assert model.name == f"{tiny_folder}" + f"@{dtype}" * (dtype not in ("auto", "float32", stored))
    assert named["auto"].hf.dtype == torch.float32 and named["bfloat16"].hf.dtype == torch.bfloat16


def test_what_fits_a_card_grows_with_the_card_and_falls_with_the_bits():
    """LLaVA-1.5-7B: what people report of it, too. Half precision does not fit 16 GB, and does 24; four bits fit 16."""
    llava = config_of_released("llava-hf/llava-1.5-7b-hf")
    fits = {
        bits: [memory.needed(llava, quantize=bits).pictures(gib) for gib in memory.CARDS.values()]
        for bits in (None, "8bit", "4bit")
    }
    assert fits[None][0] == 0 < fits[None][1] and fits["4bit"][0] > 0
    for counts in fits.values():
        assert counts == sorted(counts) and counts[-1] == memory.MOST
    assert all(half <= eight <= four for half, eight, four in zip(*fits.values(), strict=True))


def test_a_run_says_beforehand_what_it_takes_and_in_which_numbers(monkeypatch):
    model = "llava-hf/llava-1.5-7b-hf"
    monkeypatch.setattr(memory, "config_of", config_of_released)
    said = [memory.foretold(model, *how) for how in [("cpu", "auto"), ("cuda", "auto"), ("cuda", "auto", "4bit")]]
    assert all(text.startswith("memory: about ") and "on each device" in text for text in said)
    assert ["weights take 26.3" in said[0], "weights take 13.2" in said[1]] == [True, True] and "take 4." in said[2]


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("llava-hf/llava-1.5-7b-hf", 576),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", 10 * 729),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 1276),
        ("OpenGVLab/InternVL3-8B-hf", 13 * 256),
    ],
)
def test_tiles_and_merging_count_in_the_tokens_of_an_ordinary_picture(model, tokens):
    assert memory.visual_tokens_of(config_of_released(model)) == tokens


@pytest.mark.parametrize(
    ("given", "sentence"),
    [({"dtype": "int8"}, "unknown dtype 'int8'"), ({"quantize": "2bit"}, "unknown quantize '2bit': pass '4bit'")],
)
def test_what_cannot_be_estimated_is_refused(given, sentence):
    with pytest.raises(EmbedLensError, match=sentence):
        memory.needed(memory.config_of("miniature"), **given)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(EmbedLensError, match="no config.json"):
        memory.config_of(tmp_path)
