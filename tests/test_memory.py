"""Memory is estimated before anything is loaded; what is exact about it is the weights."""

import pytest
import torch

from embedlens import EmbedLensError, memory
from embedlens.released import configs


def test_a_batch_is_halved_until_it_fits_and_no_other_error_is_swallowed():
    tried, full = [], torch.OutOfMemoryError("CUDA out of memory")

    def run(batch_size, error=full):
        tried.append(batch_size)
        if batch_size > 3:
            raise error
        return "done"

    assert memory.halving(run, 16) == ("done", 2) and tried == [16, 8, 4, 2]
    with pytest.raises(RuntimeError, match="shapes"):
        memory.halving(lambda size: run(size, RuntimeError("shapes do not match")), 16)
    with pytest.raises(torch.OutOfMemoryError):
        memory.halving(lambda size: run(4), 16)


def config_of_released(model):
    return configs()[model]


def test_the_weights_are_those_of_the_loaded_model(miniature):
    found = memory.needed(memory.config_of("miniature"), dtype="float32")
    parameters = list(miniature.hf.parameters())
    assert found.parameters == sum(parameter.numel() for parameter in parameters)
    assert found.weights == sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    rows = miniature.hf.get_input_embeddings().weight
    assert found.vocabulary == 4 * rows.numel()


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
