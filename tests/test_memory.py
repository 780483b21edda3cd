"""Memory is estimated before anything is loaded, its weights exactly; the page says what is so, a GPU measures it."""

import re
import sys
from pathlib import Path

import book_build as book
import pytest
import torch
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from benchmarks import full_size
from embedlens import EmbedLensError, batches, families, loading, memory
from embedlens.__main__ import app
from embedlens.memory import configs, sizes

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "book/gpu.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"<!-- memory: .*? -->\n(.*?)\n<!-- end -->", re.S)


@pytest.fixture(scope="module", autouse=True)
def built_once():
    """A model is built once a config and device: it takes a third of a second, and the table asks for forty."""
    build, made = AutoModelForImageTextToText.from_config, {}

    def from_config(config):
        key = str(torch.get_default_device()) + config.to_json_string()
        made[key] = made.get(key) or build(config)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForImageTextToText, "from_config", from_config)
        yield


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
    assert memory.needed(configs()[model]).parameters == published


def test_fewer_bits_longer_prompts_and_larger_batches_count():
    config = memory.config_of("miniature")
    half, four = memory.needed(config), memory.needed(config, quantize="4bit")
    assert memory.needed(config, "float32").weights == 2 * half.weights
    assert half.weights / 4 < four.weights < half.weights  # embedding, head and norms stay as they are
    assert memory.needed(config, visual_tokens=576).sample > half.sample
    assert half.total(8) - half.total(1) == 7 * half.sample


@pytest.mark.parametrize("model", [family.EXAMPLES[0] for family in families.FAMILIES])
def test_quantisation_leaves_what_makes_visual_tokens_and_the_head_alone(model):
    """By transformers' own rule, on the modules of the published class: bitsandbytes needs a GPU."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = configs()[model]
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


def test_another_dtype_than_the_usual_is_part_of_the_name(tiny_folder):
    named = {dtype: loading.load(tiny_folder, device="cpu", dtype=dtype) for dtype in ("auto", "float32", "bfloat16")}
    stored = str(loading._stored_dtype(loading._config(tiny_folder, "tiny"))).removeprefix("torch.")
    for dtype, model in named.items():
        assert model.name == f"{tiny_folder}" + f"@{dtype}" * (dtype not in ("auto", "float32", stored))
    assert named["auto"].hf.dtype == torch.float32 and named["bfloat16"].hf.dtype == torch.bfloat16


def test_what_fits_a_card_grows_with_the_card_and_falls_with_the_bits():
    """LLaVA-1.5-7B: what people report of it, too. Half precision does not fit 16 GB, and does 24; four bits fit 16."""
    llava = configs()["llava-hf/llava-1.5-7b-hf"]
    needs = {bits: memory.needed(llava, quantize=bits) for bits in (None, "8bit", "4bit")}
    fits = {bits: [need.pictures(gib) for gib in memory.CARDS.values()] for bits, need in needs.items()}
    assert fits[None][0] == 0 < fits[None][1] and fits["4bit"][0] > 0
    for counts in fits.values():
        assert counts == sorted(counts) and counts[-1] == memory.MOST
    assert all(half <= eight <= four for half, eight, four in zip(*fits.values(), strict=True))


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
    assert memory.visual_tokens_of(configs()[model]) == tokens


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(EmbedLensError, match="no config.json"):
        memory.config_of(tmp_path)


def test_every_example_of_a_family_is_a_model_of_its_class_and_of_the_size_that_its_name_says():
    """A tower comes on top of the language model that a name usually counts; names are round."""
    known = configs()
    assert list(known) == sizes().index.tolist()
    assert set(known) == {name for family in families.FAMILIES for name in family.EXAMPLES}
    for name, config in known.items():
        (family,) = [family for family in families.FAMILIES if name in family.EXAMPLES]
        with torch.device("meta"):
            assert type(AutoModelForImageTextToText.from_config(config)).__name__ in family.CLASSES
        found = re.search(r"([\d.]+)([bm])\b", name.lower())
        said = float(found[1]) / {"b": 1, "m": 1000}[found[2]] if found else 0
        assert said * 0.9 < memory.needed(config).parameters / 1e9 < said * 1.2 + 0.4, name


def test_the_table_of_memory_is_what_the_function_gives():
    table = sizes().reset_index()
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    assert BLOCK.search(PAGE)[1].strip() == "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_commands_of_the_page_name_parameters_and_flags_that_exist():
    lines = PAGE.replace("\\\n", " ").splitlines()
    runs = [line for line in lines if line.startswith("papermill notebooks/")]
    assert any("-p quantize 4bit" in line for line in runs)
    for line in runs:
        assert set(re.findall(r"-p (\w+)", line)) <= set(book.declared_parameters(ROOT / line.split()[1]))
    said = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200"}).output
    asked = [line.split("embedlens run ")[1] for line in lines if "embedlens run " in line]
    flags = {flag for line in asked for flag in re.findall(r"(?<= )--?[a-z][a-z-]*", line)}
    assert {"--model", "--dataset", "-n"} <= flags and not [flag for flag in flags if flag not in said]


def test_every_way_is_measured_and_no_memory_is_claimed_without_a_gpu(miniature, monkeypatch):
    monkeypatch.setattr("embedlens.sweep.answer_tokens", lambda _: 3)  # random weights never end an answer
    found = full_size.measured(memory.config_of("miniature"), "float32", "cpu", repeats=1)
    assert [name.split(":")[0] for name in found["ways"]] == ["retrieval", "trace", "prefill", "prefill", "sweep"]
    assert all(way["seconds"]["median"] > 0 and way["peak GiB"] is None for way in found["ways"].values())
    assert found["parameters"] == sum(parameter.numel() for parameter in miniature.hf.parameters())


def test_without_a_gpu_nothing_is_measured_or_written(tmp_path, monkeypatch):
    out = tmp_path / "full_size.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(full_size, "measured", lambda *_, **__: pytest.fail("it measures"))
    monkeypatch.setattr(sys, "argv", ["full_size", "--out", str(out)])
    with pytest.raises(SystemExit, match="nothing is measured"):
        full_size.main()
    assert not out.exists()
