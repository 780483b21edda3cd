"""Kept for the twin of every named checkpoint: stock numbers, the right patch for a token, interventions that act.

The checkpoints are random but of the released classes, and are loaded from disk the way a repository id is.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText
from twins import BY_FAMILY, SIBLINGS, TWINS, VICUNA, save_twin

import embedlens as el
from conftest import little_memory
from embedlens import (
    EmbedLensError,
    EnterAt,
    LeaveAt,
    Prune,
    ReleasedLayer0,
    Rescale,
    Silence,
    SkipSublayers,
    families,
    intervene,
    prompts,
)
from embedlens.checks import check
from embedlens.families.instructions import VICUNA_V1
from embedlens.groups import discover, token_groups_of
from embedlens.measures.patch_reading import canvas_of
from embedlens.measures.readout import random_projector
from embedlens.pictures import squared
from embedlens.probe import probe_picture
from embedlens.samples import load as load_samples

QUESTION = "what is in the picture ?"
CLOSE = {"atol": 2e-4, "rtol": 2e-4}  # same sums in another order, in activations of size one to ten


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


class Stock:
    """The same folder through transformers alone, loaded apart from the wrapper."""

    def __init__(self, folder, processor: str, square: bool) -> None:
        self.square = square  # LLaVA-1.5 was trained on pictures padded before its processor cuts them
        released = getattr(transformers, processor)

        def without_video(cls):  # its video half cannot be loaded without torchvision
            return [part for part in released.get_attributes() if part != "video_processor"]

        still = type(processor, (released,), {"get_attributes": classmethod(without_video)})
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = still.from_pretrained(folder, backend="pil")

    def inputs(self, image, question=QUESTION):
        if self.square:
            mean = self.processor.image_processor.image_mean
            image = squared(image, "letterbox", tuple(int(255 * part) for part in mean))
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        if self.processor.chat_template == VICUNA:  # trained with a system prompt that the template lacks
            turns.insert(0, {"role": "system", "content": [{"type": "text", "text": VICUNA_V1}]})
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        return self.processor(images=image, text=text, return_tensors="pt")

    @torch.no_grad()
    def forward(self, image, question=QUESTION):
        return self.model(**self.inputs(image, question), output_hidden_states=True)

    @torch.no_grad()
    def answer(self, image, question=QUESTION, max_new_tokens=16):
        inputs = self.inputs(image, question)
        ids = self.model.generate(**inputs, do_sample=False, repetition_penalty=1.0, max_new_tokens=max_new_tokens)
        return self.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


class Case:
    """A twin on disk, wrapped and stock."""

    def __init__(self, name: str, folder, model) -> None:
        self.twin, self.sizes, self.folder, self.model = TWINS[name], TWINS[name].sizes, folder, model
        self.family = self.model.family.__name__.rpartition(".")[2]
        self.cuts = "own" in self.model.family.PREPROCESSINGS
        # The first is the default. Twins of one family cut alike, so one of them shows the other ways.
        others = self.model.family.PREPROCESSINGS[1:] if name in {*BY_FAMILY.values(), next(iter(TWINS))} else ()
        self.ways = [self.model, *map(self.model.with_preprocessing, others)]
        self.stock = Stock(self.folder, self.twin.processor, square=not self.cuts)

    @property
    def prompts(self):
        """Of unequal lengths, in numbers of visual tokens, too."""
        questions = ["what ?" + " and how many dogs ?" * i for i in range(len(self.sizes))]
        return self.model.prompts([picture(size, i) for i, size in enumerate(self.sizes)], questions)


@pytest.fixture(scope="module", params=TWINS)
def case(request, twin_of):
    return Case(request.param, *twin_of(request.param))


@pytest.fixture(scope="module")
def model(case):
    return case.model


@pytest.fixture(scope="module")
def prompt(case):
    return case.model.prompt(picture(case.sizes[1]), QUESTION)


def random_mask(prompt, seed: int = 0, share: float = 0.4) -> torch.Tensor:
    return torch.rand(len(prompt.grid), generator=torch.Generator().manual_seed(seed)) < share


# --- the stock model's numbers ---------------------------------------------------------------------------------------


def joined(model, prompt, layers):
    """Stock hidden states as the next block sees them: what a family adds between blocks is not in what it records."""
    states = [layer[0].clone() for layer in layers]
    for index in range(0 if prompt.deep is None else len(prompt.deep)):
        states[index + 1][prompt.visual] += prompt.deep[index]
    return states


def test_wrapped_forward_is_the_stock_forward_bit_for_bit(case):
    model, stock = case.model, case.stock
    for seed, size in enumerate(case.sizes):
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


def test_answer_is_what_stock_generate_says(case):
    answers = set()
    for seed, size in enumerate(case.sizes):
        image = picture(size, seed)
        answer = case.model.answer(case.model.prompt(image, QUESTION))
        assert answer == case.stock.answer(image)
        answers.add(answer)
    assert len(answers) > 1


def test_a_second_question_about_a_picture_is_the_question_asked_at_once(case):
    for size in case.sizes:
        first = case.model.prompt(picture(size), "how many dogs are there ?")
        again, anew = case.model.asked(first, QUESTION), case.model.prompt(picture(size), QUESTION)
        assert torch.equal(case.model.logits(again), case.model.logits(anew))


def test_a_batch_of_unequal_lengths_equals_one_by_one(case):
    model, prompts = case.model, case.prompts
    assert len({len(prompt) for prompt in prompts}) == len(prompts)
    assert model.answers(prompts, max_new_tokens=6) == [model.answer(prompt, max_new_tokens=6) for prompt in prompts]
    named = [{"visual": prompt.visual} for prompt in prompts]
    for stream, seen, prompt in zip(
        list(model.streams_of(prompts)), el.traces(model, prompts, named), prompts, strict=True
    ):
        assert_close(stream, model.hidden_states(prompt), **CLOSE)
        assert_close(seen.stream, stream, **CLOSE)
        alone = el.trace(model, prompt, {"visual": prompt.visual})
        assert_close(seen.attention["visual"], alone.attention["visual"], **CLOSE)
        assert torch.equal(alone.stream, model.hidden_states(prompt))


def test_embeddings_are_the_real_rows_only(case):
    model = case.model
    assert len(model.input_embeddings) <= len(model.tokenizer)
    assert len(model.unembed.head.weight) == len(model.tokenizer) + case.twin.rows
    assert len(model.tokens) == len(model.input_embeddings)


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
    """(number of the view, patch in it, its box) of patches that lie in the picture as a whole, at most 12 a view."""
    for number, view in enumerate(grid.views):
        shown = [index for index in range(len(view)) if view.box(index) == view.cell(index)]
        assert len(shown) >= 3 or view.padded.any()
        for index in shown[:: 1 + len(shown) // 12]:
            yield number, index, view.box(index)


def test_a_bright_square_changes_its_own_token_most(case):
    """In every view, of pictures of every shape; no grid that is turned or in another order would pass."""
    for model in case.ways:
        for size in case.sizes if model is case.model else [(168, 120)]:
            grey = Image.new("RGB", size, (90, 90, 90))
            grid = model.prompt(grey, QUESTION).grid
            starts = np.cumsum([0, *map(len, grid.views)])
            (before,) = model.visual_features_of([grey])
            places = list(squares(grid))
            assert len(places) >= 6
            pictures = []
            for _, _, (x0, y0, x1, y1) in places:
                bright = np.asarray(grey).copy()
                bright[round(y0) : round(y1), round(x0) : round(x1)] = (255, 255, 60)
                pictures.append(Image.fromarray(bright))
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
    for number, index, (x0, y0, x1, y1) in squares(prompt.grid):
        bright = np.asarray(grey).copy()
        bright[round(y0) : round(y1), round(x0) : round(x1)] = (255, 255, 60)
        (after,) = model.tower_states_of([model.prompt(Image.fromarray(bright), QUESTION)])
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


# --- interventions ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model, prompt, rows=None, enter=0):
    """The stock blocks one by one on some rows of the prompt; text alone below `enter`. What leaves each, unmasked.

    Positions, the causal mask and what a family adds between blocks are put together here anew.
    """
    rows = torch.arange(len(prompt)) if rows is None else rows
    positions = torch.arange(len(prompt))[None] if prompt.positions is None else prompt.positions
    text = ~prompt.visual[rows]
    h, streams = prompt.embeds[None, rows], [prompt.embeds[rows]]
    kept = torch.isin(prompt.visual.nonzero()[:, 0], rows)
    for index, block in enumerate(model.blocks):
        seen = text if index < enter else torch.ones_like(text)
        place = positions[:, rows[seen]]
        rotary = model.decoder.rotary_emb(h, place if prompt.positions is None else place[:, None])
        mask = torch.full((int(seen.sum()),) * 2, float("-inf")).triu(1)[None, None]
        h = h.clone()
        h[:, seen] = block(h[:, seen], attention_mask=mask, position_embeddings=rotary)
        if prompt.deep is not None and index < len(prompt.deep):
            h[:, ~text] += prompt.deep[index][kept]
        streams.append(h[0])
    return streams


def test_the_blocks_by_hand_give_the_model(case):
    for prompt in case.prompts:
        for seen, expected in zip(case.model.hidden_states(prompt), by_hand(case.model, prompt), strict=True):
            assert_close(seen, expected, **CLOSE)


def test_a_no_op_changes_nothing_bit_for_bit(case):
    model, prompts = case.model, case.prompts
    plain, texts = list(model.streams_of(prompts)), model.answers(prompts, max_new_tokens=4)
    for nothing in (Rescale(1.0), EnterAt(0)):
        with intervene(model, nothing):
            assert all(map(torch.equal, list(model.streams_of(prompts)), plain))
            assert model.answers(prompts, max_new_tokens=4) == texts


def test_pruning_equals_running_the_shorter_sequence(model, prompt):
    mask = random_mask(prompt)
    rows = (~prompt.spread(mask)).nonzero()[:, 0]
    with intervene(model, Prune(mask)):
        layers, logits = model.hidden_states(prompt), model.logits(prompt)
    for seen, expected in zip(layers, by_hand(model, prompt, rows), strict=True):
        assert_close(seen, expected, **CLOSE)
    assert not torch.allclose(logits, model.logits(prompt)[rows], atol=1e-2)


def test_renumbering_works_or_is_refused_with_the_fix(model, prompt):
    with_own = prompt.positions is not None
    try:
        with intervene(model, Prune(random_mask(prompt), positions="renumber")):
            seen = model.hidden_states(prompt)
    except EmbedLensError as error:
        assert with_own and "by row and column" in str(error) and str(error).endswith("pass positions='keep'")
    else:
        assert not with_own
        short = prompt.without(random_mask(prompt))
        assert_close(seen, model.hidden_states(replace(short, rows=None)), **CLOSE)


@pytest.mark.parametrize("layer", [1])
def test_entering_late_equals_two_phases_by_hand(model, prompt, layer):
    with intervene(model, EnterAt(layer)):
        layers = model.hidden_states(prompt)
    for seen, expected in zip(layers, by_hand(model, prompt, enter=layer), strict=True):
        assert_close(seen, expected, **CLOSE)
    assert not torch.allclose(layers[-1][-1], model.hidden_states(prompt)[-1][-1], atol=1e-2)


@pytest.mark.parametrize("layer", [0, 2])
def test_leaving_half_way_equals_the_sequence_that_is_shorter_from_there_on(model, prompt, layer):
    mask = random_mask(prompt)
    rows = (~prompt.spread(mask)).nonzero()[:, 0]
    with intervene(model, LeaveAt(mask, layer)):
        layers = model.hidden_states(prompt)
    whole = by_hand(model, prompt)
    joined = shorter_from(model, prompt, whole[layer], rows, layer)
    for seen, expected in zip(layers[layer:], joined, strict=True):
        assert_close(seen[rows], expected, **CLOSE)
    for seen, expected in zip(layers[: layer + 1], whole, strict=False):
        assert_close(seen, expected, **CLOSE)
    assert not torch.allclose(layers[-1][-1], whole[-1][-1], atol=1e-2)


def shorter_from(model, prompt, stream, rows, layer):
    """What `by_hand` gives from a layer on, begun at that layer with some rows of a stream."""
    positions = torch.arange(len(prompt))[None] if prompt.positions is None else prompt.positions
    kept = torch.isin(prompt.visual.nonzero()[:, 0], rows)
    h, streams = stream[None, rows], [stream[rows]]
    for index in range(layer, model.n_layers):
        place = positions[:, rows]
        rotary = model.decoder.rotary_emb(h, place if prompt.positions is None else place[:, None])
        mask = torch.full((len(rows),) * 2, float("-inf")).triu(1)[None, None]
        h = model.blocks[index](h, attention_mask=mask, position_embeddings=rotary)
        if prompt.deep is not None and index < len(prompt.deep):
            h = h.clone()
            h[:, prompt.visual[rows]] += prompt.deep[index][kept]
        streams.append(h[0])
    return streams


def test_skipping_and_silencing_leave_exactly_their_rows_without_update(model, prompt):
    mask = random_mask(prompt)
    with intervene(model, SkipSublayers(mask, at=[0.5, 1])):
        seen = el.trace(model, prompt)
    assert torch.equal((seen.resid_mid[1] == seen.resid_pre[1]).all(-1), prompt.spread(mask))
    with intervene(model, Silence("attention"), Silence("mlp", layers=[0])):
        silent = el.trace(model, prompt, {"visual": prompt.visual})
    for pre, mid in zip(silent.resid_pre, silent.resid_mid, strict=True):
        assert torch.equal((mid == pre).all(-1), prompt.visual)
    assert (silent.attention["visual"][:, -1] > 0).all()


def test_rescaling_scales_all_that_the_picture_brings(model, prompt):
    with intervene(model, Rescale(0.01)):
        seen = model.logits(prompt)
    assert torch.equal(seen, model.logits(prompt.rescaled(0.01))) and not torch.equal(seen, model.logits(prompt))
    assert_close(prompt.rescaled(0.5).embeds[prompt.visual], prompt.embeds[prompt.visual] / 2)
    assert torch.equal(prompt.rescaled(0.5).embeds[prompt.text], prompt.embeds[prompt.text])


def test_the_released_layer_0_acts_on_visual_rows_and_on_what_follows(model, prompt):
    plain = el.trace(model, prompt)
    with intervene(model, ReleasedLayer0()) as run:
        seen = el.trace(model, prompt)
    assert run.fired == 1
    first = int(prompt.visual.nonzero()[0])
    assert torch.equal(seen.resid_mid[0][:first], plain.resid_mid[0][:first])
    assert not torch.isclose(seen.resid_mid[0], plain.resid_mid[0], atol=1e-3).all(-1)[prompt.visual].any()


ARMS = {
    "prune": lambda masks: [Prune(masks)],
    "skip": lambda masks: [SkipSublayers(masks, at=[0.5, 1])],
    "leave": lambda masks: [LeaveAt(masks, 1)],
    "several": lambda masks: [Rescale(2.0), EnterAt(1), Prune(masks), Silence("mlp", layers=[2])],
}


@pytest.mark.parametrize("arm", ARMS)
def test_decoding_with_a_cache_equals_running_the_whole_sequence_anew(case, arm):
    """Greedy answers of padded batches, in prefill and steps, against a fresh forward for every new token."""
    model, prompts = case.model, case.prompts
    masks = [random_mask(prompt, seed) for seed, prompt in enumerate(prompts)]
    ends = torch.tensor(model.hf.generation_config.eos_token_id).flatten().tolist()  # Qwen's has two
    with intervene(model, *ARMS[arm](masks)):
        texts = model.answers(prompts, max_new_tokens=4)
    for prompt, mask, text in zip(prompts, masks, texts, strict=True):
        new: list[int] = []
        with intervene(model, *ARMS[arm]([mask])):
            while len(new) < 4 and not set(new[-1:]) & set(ends):
                new.append(int(model.logits(extended(model, prompt, new))[-1].argmax()))
        assert text == model.tokenizer.decode(new, skip_special_tokens=True).strip()


def extended(model, prompt, new: list[int]):
    """The prompt with new tokens at its end."""
    ids = torch.tensor(new, dtype=prompt.ids.dtype)
    positions = prompt.positions
    if positions is not None:
        following = positions.max() + 1 + torch.arange(len(new))
        positions = torch.cat([positions, following.expand(len(positions), -1)], dim=1)
    return replace(
        prompt,
        ids=torch.cat([prompt.ids, ids]),
        embeds=torch.cat([prompt.embeds, model.input_embeddings[ids]]),
        visual=torch.cat([prompt.visual, torch.zeros(len(new), dtype=torch.bool)]),
        positions=positions,
    )


# --- what is built on it ---------------------------------------------------------------------------------------------


def test_lenses_and_groups_run(case):
    model, prompts = case.model, case.prompts
    samples = list(load_samples("miniworld", n=4))
    reference = discover(model, samples)
    for prompt, groups in zip(prompts, token_groups_of(model, prompts, reference), strict=True):
        parts = torch.stack([groups.vit_sink, groups.llm_sink, groups.dead, groups.alive])
        assert torch.equal(parts.sum(0), torch.ones(len(prompt.grid), dtype=torch.long))
    stream = model.hidden_states(prompts[0])
    assert len(el.EmbedLens.from_model(model).words(stream[0, prompts[0].visual], k=2)) == len(prompts[0].grid)
    scores, ids = el.LogitLens.from_model(model).topk(stream[-1], k=3)
    expected = model.logits(prompts[0]).topk(3)
    assert torch.equal(ids, expected.indices) and torch.equal(scores, expected.values)
    probe = probe_picture(model, prompts[0].image)
    assert probe.table() and probe.annotated().size


def test_drawn_pictures_can_put_their_content_into_one_patch(model):
    """What chapter 06 needs: a size at which the patches of the finest view are whole pixels of the picture."""
    side, patch = canvas_of(model)
    grid = model.prompt(Image.new("RGB", (side, side)), QUESTION).grid
    x0, y0, x1, y1 = grid.cell(grid.patch_at(side / 2 + 1, side / 2 + 1))
    assert (round(x1 - x0), round(y1 - y0)) == (patch, patch)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_preprocessing_that_llava_does_not_have_is_refused(tiny_folder):
    with pytest.raises(EmbedLensError, match="unknown preprocessing 'own': choose one of letterbox, centre-crop, stre"):
        el.load(tiny_folder, device="cpu", preprocessing="own")


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


@pytest.mark.parametrize("name", BY_FAMILY.values())
def test_a_small_checkpoint_does_not_depend_on_what_ran_before(name, tmp_path):
    from safetensors.torch import load_file

    saved = []
    for before in (1, 2):
        torch.manual_seed(before)
        saved.append(load_file(save_twin(tmp_path / str(before), name) / "model.safetensors"))
    assert saved[0].keys() == saved[1].keys()
    assert not [key for key, weight in saved[0].items() if not torch.equal(weight, saved[1][key])]
