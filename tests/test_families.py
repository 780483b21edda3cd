"""Kept for the twin of every named checkpoint: stock numbers, the right patch for a token, words that can be read.

The checkpoints are random but of the released classes, and are loaded from disk the way a repository id is.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from stock import QUESTION, Stock, bright, picture
from torch.testing import assert_close
from twins import BY_FAMILY, SIBLINGS, TWINS, save_twin

import embedlens as el
from conftest import little_memory
from embedlens import EmbedLensError, families, prompts
from embedlens.checks import check
from embedlens.groups import discover, token_groups_of
from embedlens.measures.dead import is_word
from embedlens.measures.patch_reading import canvas_of
from embedlens.measures.readout import random_projector
from embedlens.probe import probe_picture
from embedlens.readings import ARTICLES, Protocol, Reader
from embedlens.samples import load as load_samples
from embedlens.words import textless_ids

INTERNVL = "OpenGVLab/InternVL3-8B-hf"
FAMILIES = (next(iter(TWINS)), *BY_FAMILY.values())
CLOSE = {"atol": 2e-4, "rtol": 2e-4}  # same sums in another order, in activations of size one to ten


class Case:
    """A twin on disk, wrapped and stock."""

    def __init__(self, name: str, folder, model) -> None:
        self.twin, self.sizes, self.folder, self.model = TWINS[name], TWINS[name].sizes, folder, model
        self.family = self.model.family.__name__.rpartition(".")[2]
        self.cuts = "own" in self.model.family.PREPROCESSINGS
        # The first is the default. Twins of one family cut alike, so one of them shows the other ways.
        others = self.model.family.PREPROCESSINGS[1:] if name in FAMILIES else ()
        self.ways = [self.model, *map(self.model.with_preprocessing, others)]

    @property
    def prompts(self):
        """Of unequal lengths, in numbers of visual tokens, too."""
        questions = ["what ?" + " and how many dogs ?" * i for i in range(len(self.sizes))]
        return self.model.prompts([picture(size, i) for i, size in enumerate(self.sizes)], questions)


@pytest.fixture(scope="module", params=TWINS)
def named(request, twin_of):
    """Of every checkpoint."""
    return Case(request.param, *twin_of(request.param))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, twin_of):
    """One of each family."""
    return Case(request.param, *twin_of(request.param))


# --- the stock model's numbers ---------------------------------------------------------------------------------------


def joined(model, prompt, layers):
    """Stock hidden states as the next block sees them: what a family adds between blocks is not in what it records."""
    states = [layer[0].clone() for layer in layers]
    for index in range(0 if prompt.deep is None else len(prompt.deep)):
        states[index + 1][prompt.visual] += prompt.deep[index]
    return states


def test_wrapped_forward_and_answer_are_the_stock_ones_bit_for_bit(named):
    model, stock = named.model, Stock(named.folder, named.twin.processor, square=not named.cuts)
    answers = set()
    for seed, size in enumerate(named.sizes):
        image = picture(size, seed)
        prompt, expected, inputs = model.prompt(image, QUESTION), stock.forward(image), stock.inputs(image)
        assert torch.equal(prompt.ids, inputs["input_ids"][0])
        assert torch.equal(prompt.pixel_values, inputs["pixel_values"])
        assert all(torch.equal(value, torch.as_tensor(inputs[name])) for name, value in prompt.beside.items())
        assert torch.equal(model.logits(prompt), expected.logits[0, :, : len(model.input_embeddings)])
        layers = model.hidden_states(prompt)
        assert layers.shape == (model.n_layers + 1, len(prompt), model.width)
        for index, layer in enumerate(joined(model, prompt, expected.hidden_states)[:-1]):
            assert torch.equal(layers[index], layer), f"layer {index}"
        with torch.no_grad():  # Hugging Face norms its last hidden state; ours is the one before
            assert torch.equal(model.unembed.final_norm(layers[-1]), expected.hidden_states[-1][0])
        assert torch.equal(model.unembed(layers[-1]), model.logits(prompt))
        asked = model.asked(model.prompt(image, "how many dogs are there ?"), QUESTION)  # a second question
        assert torch.equal(model.logits(asked), model.logits(prompt))
        answers.add(said := model.answer(prompt, 8))
        assert said == stock.answer(image, max_new_tokens=8)
    assert len(answers) > 1


def test_embeddings_are_the_real_rows_only_and_entries_that_start_a_word_are_read_as_it(named):
    model = named.model
    assert len(model.tokens) == len(model.input_embeddings) <= len(model.tokenizer)
    assert len(model.unembed.head.weight) == len(model.tokenizer) + named.twin.rows
    pieces = model.tokenizer.convert_ids_to_tokens(range(len(model.tokens)))
    begin = [place for place, piece in enumerate(pieces) if piece[0] in "▁Ġ" and re.fullmatch("[A-Za-z]+", piece[1:])]
    assert len(begin) > 100 and [model.tokens[place] for place in begin] == [pieces[place][1:] for place in begin]
    assert all(is_word(model.tokens[place]) for place in begin if len(pieces[place]) > 2)
    bare = {place: piece for place, piece in enumerate(pieces) if re.fullmatch("[a-z]+", piece)}
    assert bare and all(model.tokens[place] == f"·{piece}" for place, piece in bare.items())
    assert "犬" not in pieces or model.tokens[pieces.index("犬")] == "·犬"
    assert "<0x0A>" not in pieces or model.tokens[pieces.index("<0x0A>")] == "⏎"
    assert "Ċ" not in pieces or model.tokens[pieces.index("Ċ")] == "⏎"
    assert all(word and word.isprintable() for word in model.tokens)
    none = {model.tokens[place] for place in textless_ids(model.tokenizer, len(model.tokens))}
    assert "<0xE3>" in none and not none & {"dog", "the"}
    prompt = model.prompt(picture(named.sizes[0]), QUESTION)
    skipped = model.tokenizer.convert_ids_to_tokens(Reader(model, prompt, Protocol(), 1).articles.tolist())
    assert {piece[1:] for piece in skipped if piece[0] in "▁Ġ"} == set(ARTICLES)


# --- token <-> patch <-> pixel ---------------------------------------------------------------------------------------


def test_every_visual_token_has_a_patch_and_every_patch_a_token(case):
    grids = set()
    for prompt in case.prompts:
        views = prompt.grid.views
        assert int(prompt.visual.sum()) == len(prompt.grid) == sum(map(len, views))
        assert len(prompt.grid) == prompt.grid.rows * prompt.grid.cols
        grids.add(tuple((view.rows, view.cols) for view in views))
        assert_close(case.model.visual_features_of([prompt.image])[0], prompt.embeds[prompt.visual], **CLOSE)
        text = prompt.text & (prompt.ids != case.model.family.image_token_id(case.model.hf))
        assert torch.equal(prompt.embeds[text], case.model.input_embeddings[prompt.ids[text]])
    if case.cuts:
        assert len(grids) > 1
        assert any(len(views) > 1 or rows != cols for views in grids for rows, cols in views)


def squares(grid):
    """(number of the view, patch in it, its box) of patches that lie in the picture as a whole, some 8 a view."""
    for number, view in enumerate(grid.views):
        shown = [index for index in range(len(view)) if view.box(index) == view.cell(index)]
        assert len(shown) >= 3 or view.padded.any()
        for index in shown[:: max(1, len(shown) // 8)]:
            yield number, index, view.box(index)


def test_a_bright_square_changes_its_own_token_most(named):
    """In every view, of pictures of every shape; no grid that is turned or in another order would pass."""
    for model in named.ways:
        for size in named.sizes if model is named.model else [(168, 120)]:
            grey = Image.new("RGB", size, (90, 90, 90))
            grid = model.prompt(grey, QUESTION).grid
            starts = np.cumsum([0, *map(len, grid.views)])
            (before,) = model.visual_features_of([grey])
            places = list(squares(grid))
            assert len(places) >= 6
            pictures = [bright(grey, box) for *_, box in places]
            for after, (number, index, _) in zip(model.visual_features_of(pictures), places, strict=True):
                changes = (after - before).norm(dim=-1)[starts[number] : starts[number + 1]]
                at = f"{model.preprocessing}, {size}, view {number}, square at {index}"
                assert int(changes.argmax()) == index, at


def test_pixels_that_lie_elsewhere_than_the_grid_says_are_refused(case, monkeypatch):
    """Turned, mirrored, moved by two pixels, other colours: the check at load sees each."""
    wrongs = {
        "turned": lambda image: image.transpose(Image.Transpose.ROTATE_180),
        "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "moved": lambda image: image.transform(image.size, Image.Transform.AFFINE, (1, 0, 2, 0, 1, 2)),
        "other colours": lambda image: Image.merge("RGB", image.split()[::-1]),
    }
    for model in case.ways:
        for name, wrong in wrongs.items():
            told = f"under '{model.preprocessing}' its .* take preprocessor_config.json from"
            with monkeypatch.context() as patch, pytest.raises(EmbedLensError, match=told):
                patch.setattr(prompts, "shown", lambda m, picture, s=prompts.shown, w=wrong: w(s(m, picture)))
                check(model)
                pytest.fail(name)


def test_any_picture_takes_little_memory(case, tmp_path):
    paths = {size: tmp_path / f"{size[0]}.png" for size in [(30_000, 1), (16_000, 800)]}
    for size, path in paths.items():
        Image.new("RGB", size, "red").save(path, compress_level=1)
    thin = {"llava_next": 1000, "qwen2_5_vl": 1, "qwen3_vl": 1}.get(case.family, 0)
    for model in case.ways:
        for size, path in paths.items():
            if model.preprocessing == "own" and size[1] <= thin:
                with pytest.raises(EmbedLensError, match="(30000x1 px cannot be cut|is so thin).*: crop it, or pass"):
                    model.prompt(path, QUESTION)
                continue
            with little_memory(beside=4 * size[0] * size[1]):
                prompt = model.prompt(path, QUESTION)
            assert prompt.image.size == size == (prompt.grid.frame.width, prompt.grid.frame.height)
            assert len(prompt.grid) == int(prompt.visual.sum())
            assert not prompt.grid.padded[prompt.grid.patch_at(size[0] / 2 - 0.5, size[1] / 2 - 0.5)]
            shown = prompt.grid.boxes[~prompt.grid.padded]
            least, most = shown[:, :2].amin(0).tolist(), shown[:, 2:].amax(0).tolist()
            if model.preprocessing != "centre-crop":
                assert min(least) < 1 and most[0] > 0.9 * size[0] and most[1] > 0.9 * size[1]


def test_a_large_picture_is_cut_as_all_its_pixels_would_be(case, monkeypatch):
    large = picture((420, 300))
    for model in case.ways:
        seen = []
        for largest in (10**6, 400):
            for module in ("prompts", "families.llava", "pictures"):
                monkeypatch.setattr(f"embedlens.{module}.LARGEST", largest)
            seen.append(model.prompt(large, QUESTION))
        whole, shrunk = seen
        assert torch.equal(whole.ids, shrunk.ids)
        assert_close(shrunk.grid.boxes, whole.grid.boxes, rtol=0, atol=2)  # of 420 px; sides are whole pixels
        assert (whole.pixel_values - shrunk.pixel_values).abs().mean() < 0.1
        assert prompts.shown(model, large).size != (420, 300)


def test_tower_states_are_in_the_order_of_the_visual_tokens(case):
    """A bright square at a patch changes that row of the tower's first layer most, too."""
    model, size = case.model, case.sizes[1]
    grey = Image.new("RGB", size, (90, 90, 90))
    prompt = model.prompt(grey, QUESTION)
    (before,) = model.tower_states_of([prompt])
    assert before.shape[1] == len(prompt.grid) and 0 <= model.feature_layer < len(before)
    starts = np.cumsum([0, *map(len, prompt.grid.views)])
    for number, index, box in list(squares(prompt.grid))[::3]:
        (after,) = model.tower_states_of([model.prompt(bright(grey, box), QUESTION)])
        for layer in (0, model.feature_layer):
            changes = (after - before)[layer].norm(dim=-1)[starts[number] : starts[number + 1]]
            assert int(changes.argmax()) == index


def test_the_projector_makes_visual_tokens_of_the_towers_rows(case):
    """But where a token of a large picture mixes several, which is done after projecting."""
    model, made = case.model, 0
    for prompt in case.prompts:
        rows = model.tower_states_of([prompt])[0][model.feature_layer]
        with torch.no_grad():
            tokens = model.projector(rows)
        patches = prompt.grid.views[-1]
        if case.family == "llava_onevision":
            patches = model.family.tiles_grid(model.hf, prompt.image.size)
        if len(patches) == len(prompt.grid.views[-1]):
            assert_close(tokens, prompt.embeds[prompt.visual], **CLOSE)
            made += 1
    assert made
    drawn = random_projector(model.projector, seed=0)  # a control of chapter 04
    assert drawn(rows).shape == tokens.shape and not torch.allclose(drawn(rows), tokens, atol=1e-2)


# --- what is built on it ---------------------------------------------------------------------------------------------


def test_groups_part_the_visual_tokens_and_a_probe_runs(case):
    model, prompts = case.model, case.prompts
    reference = discover(model, list(load_samples("miniworld", n=4)))
    for prompt, groups in zip(prompts, token_groups_of(model, prompts, reference), strict=True):
        parts = torch.stack([groups.vit_sink, groups.llm_sink, groups.dead, groups.alive])
        assert torch.equal(parts.sum(0), torch.ones(len(prompt.grid), dtype=torch.long))
    probe = probe_picture(model, prompts[0].image)
    assert probe.table() and probe.annotated().size


def test_drawn_pictures_can_put_their_content_into_one_patch(case):
    """What chapter 06 needs: a size at which the patches of the finest view are whole pixels of the picture."""
    side, patch = canvas_of(case.model)
    grid = case.model.prompt(Image.new("RGB", (side, side)), QUESTION).grid
    x0, y0, x1, y1 = grid.cell(grid.patch_at(side / 2 + 1, side / 2 + 1))
    assert (round(x1 - x0), round(y1 - y0)) == (patch, patch)


# --- what is refused -------------------------------------------------------------------------------------------------


def broken(case, tmp_path, file: str, **changes):
    folder = shutil.copytree(case.folder, tmp_path / "broken")
    content = json.loads((folder / file).read_text())
    for name, value in changes.items():
        part, _, rest = name.partition("__")
        (content[part] if rest else content)[rest or part] = value
    (folder / file).write_text(json.dumps(content))
    return folder


BREAKS = {
    "llava_next": [
        ("preprocessor_config.json", {"size": {"shortest_edge": 42}}, "makes tiles of 42 px, .* reads 56: set size"),
        ("preprocessor_config.json", {"image_grid_pinpoints": [[56, 56]]}, "different image_grid_pinpoints: copy"),
        ("config.json", {"vision_feature_select_strategy": "full"}, "keeps the CLS token .* set it to 'default'"),
        ("processor_config.json", {"patch_size": None}, 'does not say its patch_size: add "patch_size": 14'),
        ("processor_config.json", {"num_additional_image_tokens": 0}, "image tokens, the patch grid has .*: make"),
    ],
    "llava_onevision": [
        ("processor_config.json", {"num_image_tokens": 16}, "expects 16 tokens a view, .* makes 9: set num_image"),
        ("processor_config.json", {"vision_aspect_ratio": "anyres_max_4"}, "make vision_aspect_ratio .* agree"),
        ("config.json", {"vision_feature_select_strategy": "default"}, "drops the first row, .*: set it to 'full'"),
    ],
    "qwen2_5_vl": [
        ("preprocessor_config.json", {"patch_size": 7}, "has patch_size 7, its vision tower patch_size 14: set patch"),
        ("preprocessor_config.json", {"merge_size": 1}, "has merge_size 1, its vision tower spatial_merge_size 2: set"),
    ],
    "qwen3_vl": [
        ("preprocessor_config.json", {"patch_size": 16}, "has patch_size 16, its vision tower patch_size 8: set patch"),
    ],
    "internvl": [
        ("preprocessor_config.json", {"size": {"height": 28, "width": 28}}, "tiles of 28x28 px, .* reads 56x56: set"),
        ("processor_config.json", {"image_seq_length": 64}, "writes 64 tokens a tile, .* makes 16 .*: set image_seq"),
        ("config.json", {"vision_feature_select_strategy": "full"}, "keeps the CLS token .* set it to 'default'"),
    ],
    "idefics3": [
        ("preprocessor_config.json", {"max_image_size": {"longest_edge": 32}}, "tiles of 32 px of .* reads 64: in"),
        (
            "preprocessor_config.json",
            {"size": {"longest_edge": 100}},
            "pictures of 100, .* and size to a multiple of it",
        ),
        ("processor_config.json", {"image_seq_len": 64}, "writes 64 tokens a tile, its model makes 16: set image_seq"),
    ],
}


def test_smolvlm_with_tiles_that_blocks_do_not_divide_or_without_any(monkeypatch, tmp_path):
    """As the 2.2 billion: 384 px of 27 patches of 14, six over. Loading compares pixels with the grid."""
    name = "HuggingFaceTB/SmolVLM-256M-Instruct"
    twin = TWINS[name]
    odd = twin.config | {"vision_config": twin.config["vision_config"] | {"patch_size": 5}}
    said = twin.said | {"image_seq_len": 9}
    monkeypatch.setitem(TWINS, name, replace(twin, config=odd, said=said))
    prompt = el.load(save_twin(tmp_path / "odd", name), device="cpu").prompt(picture((100, 90)), QUESTION)
    assert [(view.rows, view.cols) for view in prompt.grid.views] == [(3, 3)] * 5
    assert prompt.grid.views[-1].box(8)[2:] == (100 * 60 / 64, 90 * 60 / 64)
    whole = replace(twin, pixels=twin.pixels | {"do_image_splitting": False})
    monkeypatch.setitem(TWINS, name, whole)
    prompt = el.load(save_twin(tmp_path / "whole", name), device="cpu").prompt(picture((100, 90)), QUESTION)
    assert [len(view) for view in prompt.grid.views] == [16]


def test_a_folder_whose_parts_disagree_gets_its_sentence(case, tmp_path):
    for number, (file, changes, sentence) in enumerate(BREAKS.get(case.family, [])):
        folder = broken(case, tmp_path / str(number), file, **changes)
        with pytest.raises(EmbedLensError, match=sentence) as caught:
            el.load(folder, device="cpu")
        assert "\n" not in str(caught.value)


def test_every_family_says_what_it_cannot_do_and_was_tested_with_this_version():
    assert transformers.__version__ in families.TESTED_WITH
    for family in families.FAMILIES:
        assert family.NAME and family.CLASSES and family.EXAMPLES and isinstance(family.LIMITS, tuple)
        assert families.family_of(family.CLASSES[0]) is family
        assert set(family.MODULES) >= {"vision_tower", "projector", "decoder", "blocks", "final_norm", "head"}
    assert {name for family in families.FAMILIES for name in family.EXAMPLES} == {*TWINS, *SIBLINGS}


def test_a_placeholder_beyond_the_embedding_is_no_row_but_a_word_is_refused(tmp_path):
    folder = save_twin(tmp_path / "twin", INTERNVL)
    model = el.load(folder, device="cpu")
    rows = len(model.hf.get_input_embeddings().weight)
    assert model.tokenizer.convert_tokens_to_ids("<video>") == rows
    assert len(model.tokens) == rows and model.tokens[-1] == "</box>"
    words = json.loads((folder / "tokenizer_config.json").read_text())
    last = words["added_tokens_decoder"][str(rows)]
    word = {str(rows + 1): last | {"content": "zyzzyva", "special": False}}
    more = words | {"added_tokens_decoder": words["added_tokens_decoder"] | word}
    (folder / "tokenizer_config.json").write_text(json.dumps(more))
    with pytest.raises(EmbedLensError, match=f"has ids up to {rows + 1}, the embedding only {rows} rows: tokenizer"):
        el.load(folder, device="cpu")
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_id": rows}))
    with pytest.raises(EmbedLensError, match=f"has ids up to {rows}, the embedding only {rows} rows: tokenizer"):
        el.load(folder, device="cpu")
