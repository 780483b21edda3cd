"""Promises of the interventions: each does to the stock modules what it says, and nothing else, then or later."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import embedlens as el
from benchmarks.sweep import eager
from embedlens import (
    EmbedLensError,
    EnterAt,
    LeaveAt,
    Prune,
    ReleasedLayer0,
    Rescale,
    Silence,
    SkipSublayers,
    intervene,
)

CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # same sums in another order, or by another kernel


def picture(seed: int = 0, size: tuple[int, int] = (80, 60)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def prompts_of(model, n: int = 3):
    return model.prompts([picture(i) for i in range(n)], ["what ?" + " and how many dogs ?" * i for i in range(n)])


def random_mask(prompt, seed: int = 0, share: float = 0.4) -> torch.Tensor:
    return torch.rand(len(prompt.grid), generator=torch.Generator().manual_seed(seed)) < share


@pytest.fixture(scope="module")
def prompt(tiny):
    return prompts_of(tiny, 1)[0]


def per_prompt(prompts, share: float = 0.4) -> list[torch.Tensor]:
    return [random_mask(prompt, seed, share) for seed, prompt in enumerate(prompts)]


def _some_of(mask: torch.Tensor) -> torch.Tensor:
    """Every other of the marked tokens."""
    return mask & (mask.cumsum(0) % 2 == 0)


#: Arms by name; each is built from one mask per prompt. All but the last act the same with and without a cache.
ARMS = {
    "prune, keep": lambda masks: [Prune(masks)],
    "prune, renumber": lambda masks: [Prune(masks, positions="renumber")],
    "skip": lambda masks: [SkipSublayers(masks, at=[0.5, 1])],
    "silence attention": lambda masks: [Silence("attention")],
    "silence an mlp": lambda masks: [Silence("mlp", layers=(1,))],
    "enter at 1": lambda masks: [EnterAt(1)],
    "enter at 2": lambda masks: [EnterAt(2)],
    "leave at 1": lambda masks: [LeaveAt(masks, 1)],
    "leave in stages": lambda masks: [LeaveAt(masks, 1, "renumber"), LeaveAt([~mask for mask in masks], 2, "renumber")],
    "rescale": lambda masks: [Rescale(0.3)],
    "enter and leave": lambda masks: [EnterAt(1), LeaveAt(masks, 2), Prune([_some_of(mask) for mask in masks])],
    "several": lambda masks: [
        Rescale(2.0),
        EnterAt(1),
        Prune(masks),
        Silence("mlp", layers=[2]),
        SkipSublayers([~mask for mask in masks], at=[1]),
    ],
    "released": lambda masks: [Silence("attention"), ReleasedLayer0()],
}
CACHED = [name for name in ARMS if name != "released"]
TOGETHER = ("prune, keep", "skip", "leave in stages", "enter and leave", "several", "released")  # all kinds once


@torch.no_grad()
def stock_logits(model, embeds, positions):
    """Stock logits of a sequence at given rotary positions. The mask keeps gaps from being read as a new sequence."""
    mask = torch.ones(1, len(embeds), dtype=torch.long)
    output = model.hf(inputs_embeds=embeds[None], position_ids=positions[None], attention_mask=mask, use_cache=False)
    return output.logits[0, :, : len(model.input_embeddings)]


def greedy(model, next_logits, steps: int = 8) -> str:
    """Greedy text without a cache: `next_logits` gives the logits after a list of new ids."""
    new: list[int] = []
    while len(new) < steps:
        new.append(int(next_logits(new).argmax()))
        if new[-1] == model.tokenizer.eos_token_id:
            break
    return model.tokenizer.decode(new, skip_special_tokens=True).strip()


def extended(model, prompt, new: list[int]):
    """The prompt with new tokens at its end."""
    ids = torch.tensor(new, dtype=prompt.ids.dtype)
    embeds = torch.cat([prompt.embeds, model.input_embeddings[ids]])
    visual = torch.cat([prompt.visual, torch.zeros(len(new), dtype=torch.bool)])
    return replace(prompt, ids=torch.cat([prompt.ids, ids]), embeds=embeds, visual=visual)


# --- nothing else is changed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [Rescale(1.0), EnterAt(0)], ids=repr)
def test_a_no_op_changes_nothing_bit_for_bit(tiny, nothing):
    prompts = prompts_of(tiny)
    plain = [tiny.logits(prompts[0]), *tiny.streams_of(prompts)]
    texts = tiny.answers(prompts)
    with intervene(tiny, nothing) as run:
        seen = [tiny.logits(prompts[0]), *tiny.streams_of(prompts)]
        assert tiny.answers(prompts) == texts
    assert run.fired == 3  # one forward of prompts each
    assert all(map(torch.equal, seen, plain))
    with intervene(tiny, Rescale(1.01)):
        assert not torch.equal(tiny.logits(prompts[0]), plain[0])


def state(model):
    """Everything that an intervention may touch on the model, to be compared."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.hf.modules()]
    return hooks, model.intervention, ALL_ATTENTION_FUNCTIONS["sdpa"]


@pytest.mark.parametrize("arm", ARMS)
def test_everything_is_as_before_after_the_block_and_after_an_exception(tiny, prompt, arm):
    before, logits = state(tiny), tiny.logits(prompt)
    interventions = ARMS[arm]([random_mask(prompt)])
    with intervene(tiny, *interventions):
        assert not torch.equal(tiny.logits(prompt)[-1], logits[-1])
        assert state(tiny) != before
    assert state(tiny) == before
    with pytest.raises(EmbedLensError, match=f"{type(interventions[0]).__name__} never acted: run a prompt"):
        with intervene(tiny, *interventions) as run:
            assert run.fired == 0

    calls = []

    def broken(*_):
        calls.append(1)
        if len(calls) == 3:  # in the second step of decoding
            raise ZeroDivisionError

    hook = tiny.blocks[1].register_forward_hook(broken)
    with pytest.raises(ZeroDivisionError), intervene(tiny, *interventions):
        tiny.answer(prompt)
    hook.remove()
    assert state(tiny) == before
    assert torch.equal(tiny.logits(prompt), logits)


# --- pruning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_pruning_equals_running_the_shorter_sequence(tiny, prompt, positions):
    mask = random_mask(prompt)
    kept = ~prompt.spread(mask)
    rows = kept.nonzero()[:, 0]
    places = rows if positions == "keep" else torch.arange(len(rows))
    following = len(prompt) if positions == "keep" else len(rows)

    def shorter(new):
        embeds = torch.cat([prompt.embeds[kept], tiny.input_embeddings[torch.tensor(new, dtype=torch.long)]])
        return stock_logits(tiny, embeds, torch.cat([places, following + torch.arange(len(new))]))

    with intervene(tiny, Prune(mask, positions=positions)) as run:
        pruned, text = tiny.logits(prompt), tiny.answer(prompt, max_new_tokens=8)
        layers = tiny.hidden_states(prompt)
    assert run.fired == 3
    assert pruned.shape == (int(kept.sum()), len(tiny.input_embeddings))
    assert layers.shape[1] == len(pruned)
    assert_close(pruned, shorter([]), **CLOSE)
    assert text == greedy(tiny, lambda new: shorter(new)[-1])
    assert not torch.allclose(pruned, tiny.logits(prompt)[kept], atol=1e-2)  # it did prune something
    other = torch.arange(len(rows)) if positions == "keep" else rows
    assert not torch.allclose(pruned, stock_logits(tiny, prompt.embeds[kept], other), atol=1e-2)


def test_a_trace_of_a_pruned_prompt_has_the_remaining_rows_and_takes_whole_masks(tiny, prompt):
    mask = random_mask(prompt)
    kept = ~prompt.spread(mask)
    masks = {"text": prompt.text, "visual": prompt.visual, "gone": prompt.spread(mask)}
    with intervene(tiny, Prune(mask)):
        seen = el.trace(tiny, prompt, masks)
        alone = el.trace(tiny, prompt)
    assert seen.stream.shape[1] == int(kept.sum())
    assert torch.equal(seen.sublayers, alone.sublayers)
    assert_close(seen.attention["text"] + seen.attention["visual"], torch.ones(tiny.n_layers, int(kept.sum())))
    assert not seen.attention["gone"].any()
    assert el.trace(tiny, prompt, masks).attention["gone"].any()


# --- decoding and batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", CACHED)
def test_decoding_with_a_cache_equals_running_the_whole_sequence_anew(tiny, prompt, arm):
    """Step by step logits of stock generate against a fresh forward of the prompt with the new tokens."""
    interventions = ARMS[arm]([random_mask(prompt)])
    with intervene(tiny, *interventions):
        with tiny.running([prompt], side="left") as (entered,), torch.no_grad():
            out = tiny.hf.generate(
                inputs_embeds=entered.embeds[None],
                attention_mask=torch.ones(1, len(entered), dtype=torch.long),
                do_sample=False,
                max_new_tokens=6,
                output_logits=True,
                return_dict_in_generate=True,
            )
        new = out.sequences[0].tolist()
        assert len(new) > 2
        for step in range(len(new)):
            anew = tiny.logits(extended(tiny, prompt, new[:step]))[-1]
            assert_close(out.logits[step][0, : len(anew)], anew, **CLOSE)
    plain = tiny.logits(extended(tiny, prompt, new[:-1]))[-1]
    assert not torch.allclose(anew, plain, atol=1e-2)


@pytest.mark.parametrize("arm", TOGETHER)
def test_a_batch_of_unequal_lengths_equals_one_by_one(tiny, arm):
    prompts = prompts_of(tiny, 3)
    assert len({len(prompt) for prompt in prompts}) == 3
    masks = per_prompt(prompts)
    named = [{"some": torch.arange(len(prompt)) % 3 == 0, "visual": prompt.visual} for prompt in prompts]
    with intervene(tiny, *ARMS[arm](masks)):
        texts = tiny.answers(prompts, max_new_tokens=8, batch_size=2)
        streams = list(tiny.streams_of(prompts, batch_size=2))
        seen = list(el.traces(tiny, prompts, named, batch_size=2))
    for index, prompt in enumerate(prompts):
        with intervene(tiny, *ARMS[arm]([masks[index]])):
            assert texts[index] == tiny.answer(prompt, max_new_tokens=8)
            assert_close(streams[index], tiny.hidden_states(prompt), **CLOSE)
            alone = el.trace(tiny, prompt, named[index])
        assert_close(seen[index].sublayers, alone.sublayers, **CLOSE)
        for name in alone.attention:
            assert_close(seen[index].attention[name], alone.attention[name], **CLOSE)
        plain = tiny.hidden_states(prompt)[-1, -1]
        assert not torch.allclose(streams[index][-1, -1], plain, atol=1e-2)


@pytest.mark.parametrize("arm", ("silence attention", "leave in stages", "several"))
def test_eager_attention_gives_what_sdpa_gives(tiny, arm):
    prompts = prompts_of(tiny, 3)
    with intervene(tiny, *ARMS[arm](per_prompt(prompts))):
        streams, texts = list(tiny.streams_of(prompts)), tiny.answers(prompts, max_new_tokens=8)
        with eager(tiny):
            others, other_texts = list(tiny.streams_of(prompts)), tiny.answers(prompts, max_new_tokens=8)
    assert texts == other_texts
    for one, other in zip(others, streams, strict=True):
        assert_close(one, other, **CLOSE)


# --- entering late ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 2])
def test_entering_late_equals_two_phases_by_hand(tiny, prompt, layer):
    """Below the entry a physically shorter sequence of text, from there on all rows: the stock blocks, by hand."""
    places = torch.arange(len(prompt))
    mask = None

    @torch.no_grad()
    def by_hand(whole):
        text, order = ~whole.visual, torch.arange(len(whole))
        h, streams = whole.embeds[None, text], []
        for index, block in enumerate(tiny.blocks):
            if index == layer:
                joined = whole.embeds[None].clone()
                joined[:, text] = h
                h = joined
            now = order[text] if index < layer else order
            streams.append(h[0])
            rotary = tiny.decoder.rotary_emb(h, now[None])
            h = block(h, attention_mask=mask, position_embeddings=rotary)
        return [*streams, h[0]]

    with intervene(tiny, EnterAt(layer)):
        seen = el.trace(tiny, prompt, {"visual": prompt.visual})
        answer = tiny.answer(prompt, max_new_tokens=8)
    expected = by_hand(prompt)
    for index, stream in enumerate(seen.stream):
        assert_close(stream[prompt.text] if index < layer else stream, expected[index], **CLOSE)
        if index <= layer:
            assert torch.equal(stream[prompt.visual], prompt.embeds[prompt.visual])
    for index in range(layer):
        assert torch.equal(seen.resid_mid[index][prompt.visual], prompt.embeds[prompt.visual])
        assert not seen.attention["visual"][index, prompt.text].any()
    assert seen.attention["visual"][layer, places[-1]] > 0
    assert answer == greedy(tiny, lambda new: tiny.unembed(by_hand(extended(tiny, prompt, new))[-1][-1]))
    assert not torch.allclose(expected[-1][-1], tiny.hidden_states(prompt)[-1, -1], atol=1e-2)


# --- leaving half-way ------------------------------------------------------------------------------------------------


def leaving_by_hand(model, whole, stages, positions):
    """The stock blocks on a sequence that becomes physically shorter at each stage: [(rows that stay, layer), ...]."""
    places = rows = torch.arange(len(whole))
    h, streams = whole.embeds[None], []
    with torch.no_grad():
        for index, block in enumerate(model.blocks):
            for stay, layer in stages:
                if index == layer:
                    left = stay[rows]
                    h, rows, places = h[:, left], rows[left], places[left]
                    places = torch.arange(len(rows)) if positions == "renumber" else places
            streams.append((rows, h[0]))
            rotary = model.decoder.rotary_emb(h, places[None])
            h = block(h, attention_mask=None, position_embeddings=rotary)
    return [*streams, (rows, h[0])]


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("layers", [[0], [1, 2]])
def test_leaving_equals_a_sequence_that_is_shorter_from_there_on(tiny, prompt, layers, positions):
    masks = [random_mask(prompt, seed, 0.3) for seed in range(len(layers))]
    stays = [~prompt.spread(torch.stack(masks[: stage + 1]).any(0)) for stage in range(len(layers))]
    values = [LeaveAt(mask, layer, positions) for mask, layer in zip(masks, layers, strict=True)]
    with intervene(tiny, *values) as run:
        seen = tiny.hidden_states(prompt)
        answer = tiny.answer(prompt, max_new_tokens=8)
    assert all(run.counts)

    def by_hand(new):
        after = torch.ones(len(new), dtype=torch.bool)
        stages = [(torch.cat([stay, after]), layer) for stay, layer in zip(stays, layers, strict=True)]
        return leaving_by_hand(tiny, extended(tiny, prompt, new), stages, positions)

    for stream, (rows, expected) in zip(seen, by_hand([]), strict=True):
        assert_close(stream[rows], expected, **CLOSE)
    assert answer == greedy(tiny, lambda new: tiny.unembed(by_hand(new)[-1][1][-1]))
    assert not torch.allclose(seen[-1][-1], tiny.hidden_states(prompt)[-1, -1], atol=1e-2)
    gone = prompt.spread(masks[0])
    assert torch.equal(seen[-1][gone], seen[layers[0]][gone])  # they wait where they left
    assert not torch.allclose(seen[-1][~gone], seen[layers[0]][~gone], atol=1e-2)
    other = "renumber" if positions == "keep" else "keep"
    assert not torch.allclose(
        seen[-1][-1],
        leaving_by_hand(tiny, prompt, [*zip(stays, layers, strict=True)], other)[-1][1][-1],
        atol=1e-3,
    )


# --- skipping and silencing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [[0], [1.5], [0.5, 1, 1.5]])
def test_skipping_leaves_exactly_the_masked_rows_without_update(tiny, prompt, at):
    mask = random_mask(prompt)
    rows = prompt.spread(mask)
    with intervene(tiny, SkipSublayers(mask, at=at)) as run:
        seen = el.trace(tiny, prompt).sublayers
    plain = el.trace(tiny, prompt).sublayers
    assert run.fired == len(at)
    for index in range(2 * tiny.n_layers):  # sublayer index/2 leads from row index to row index + 1
        updated = (seen[index + 1] != seen[index]).any(-1)
        assert torch.equal(updated, ~rows if index / 2 in at else torch.ones_like(rows)), index / 2
        if index / 2 < at[0]:
            assert torch.equal(seen[index + 1], plain[index + 1])
    others = seen[int(2 * at[0]) + 1][~rows]
    assert torch.equal(others, plain[int(2 * at[0]) + 1][~rows])  # the update of the others is the stock one


def test_skipped_rows_still_serve_keys_and_values(tiny, prompt):
    """Brute force: the blocks by hand, with the skipped rows put back after the sublayer."""
    mask, at = random_mask(prompt, 3), {0, 1.5}
    rows = prompt.spread(mask)
    h = prompt.embeds[None]
    rotary = tiny.decoder.rotary_emb(h, torch.arange(len(prompt))[None])
    with torch.no_grad():
        for layer, block in enumerate(tiny.blocks):
            for part, place in (("attention", layer), ("mlp", layer + 0.5)):
                if part == "attention":
                    normed = block.input_layernorm(h)
                    update = block.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]
                else:
                    update = block.mlp(block.post_attention_layernorm(h))
                h = h + torch.where(rows[None, :, None], torch.tensor(0.0), update) if place in at else h + update
    with intervene(tiny, SkipSublayers(mask, at=sorted(at))):
        seen = tiny.hidden_states(prompt)[-1]
    assert_close(seen, h[0], **CLOSE)
    with intervene(tiny, SkipSublayers(mask, at=[0, 1.5]), Prune(random_mask(prompt, 4))):
        pruned = tiny.hidden_states(prompt)[-1]
    assert not torch.allclose(pruned[-1], h[0, -1], **CLOSE)


def test_masks_of_several_interventions_at_one_sublayer_add_up(tiny, prompt):
    one, other = random_mask(prompt, 1), random_mask(prompt, 2)
    with intervene(tiny, SkipSublayers(one, at=[0, 1]), SkipSublayers(other, at=[1])) as run:
        seen = el.trace(tiny, prompt)
    assert run.counts == [2, 1]
    for layer, mask in ((0, one), (1, one | other)):
        updated = (seen.resid_mid[layer] != seen.resid_pre[layer]).any(-1)
        assert torch.equal(~updated, prompt.spread(mask))


def test_silencing_all_updates_leaves_visual_rows_unchanged_through_all_layers(tiny, prompt):
    with intervene(tiny, Silence("attention"), Silence("mlp")) as run:
        seen = el.trace(tiny, prompt, {"visual": prompt.visual})
    assert run.counts == [tiny.n_layers, tiny.n_layers]
    plain = el.trace(tiny, prompt)
    for stream, stock in zip(seen.sublayers[1:], plain.sublayers[1:], strict=True):
        assert torch.equal(stream[prompt.visual], prompt.embeds[prompt.visual])
        assert not torch.isclose(stock[prompt.visual], prompt.embeds[prompt.visual]).all(-1).any()
        assert (stream != seen.sublayers[0]).any(-1)[prompt.text].all()
    assert (seen.attention["visual"][:, -1] > 0).all()  # text keeps reading them


def test_rescaling_is_running_the_rescaled_prompt(tiny, prompt):
    with intervene(tiny, Rescale(0.01)):
        seen, text = tiny.logits(prompt), tiny.answer(prompt)
    assert torch.equal(seen, tiny.logits(prompt.rescaled(0.01)))
    assert text == tiny.answer(prompt.rescaled(0.01))
    assert not torch.equal(seen, tiny.logits(prompt))


# --- the released layer 0 --------------------------------------------------------------------------------------------


def test_the_released_layer_0_moves_attention_as_the_released_code_does(tiny, prompt):
    """The full weights of layer 0, rewritten as facts about the release say, times the values."""
    with eager(tiny):
        with torch.no_grad():
            stock = tiny.decoder(inputs_embeds=prompt.embeds[None], output_attentions=True, use_cache=False)
    weights = stock.attentions[0][0].clone()  # [heads, queries, keys]
    places = prompt.visual.nonzero()[:, 0]
    first, after = int(places[0]), int(places[-1]) + 1
    mass = weights[:, after:, prompt.visual].sum(-1)
    weights[:, first:, prompt.visual] = 0
    weights[:, after:, first] = mass
    attention = tiny.part(0, "attention")
    with torch.no_grad():
        values = attention.v_proj(tiny.blocks[0].input_layernorm(prompt.embeds))
        values = values.unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        values = values.repeat_interleave(attention.num_key_value_groups, 0)
        expected = prompt.embeds + attention.o_proj((weights @ values).transpose(0, 1).flatten(1))
    with intervene(tiny, ReleasedLayer0()) as run:
        seen = el.trace(tiny, prompt)
        assert run.fired == 1
        tiny.answer(prompt)
        assert run.fired == 2  # in prefill only
    assert_close(seen.resid_mid[0], expected, **CLOSE)
    plain = el.trace(tiny, prompt)
    assert torch.equal(seen.resid_mid[0][:first], plain.resid_mid[0][:first])
    assert not torch.isclose(seen.resid_mid[0], plain.resid_mid[0], atol=1e-3).all(-1)[first:].any()


# --- what is refused -------------------------------------------------------------------------------------------------


def ones(n: int = 16) -> torch.Tensor:
    return torch.ones(n, dtype=torch.bool)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Prune(torch.ones(16)), "the mask of Prune is torch.float32: pass a torch.bool tensor"),
        (lambda: Prune(torch.eye(2).bool()), "shape \\(2, 2\\): pass one True or False per visual token, and a list"),
        (lambda: Prune(~ones()), "the mask of Prune is empty: mark at least one visual token, or run without"),
        (lambda: Prune([]), "the mask of Prune is empty"),
        (lambda: Prune(ones()), "removes all 16 visual tokens of a picture; keep at least one"),
        (lambda: Prune(torch.arange(16) > 3, positions="shift"), "pass 'keep' or 'renumber'"),
        (lambda: SkipSublayers(ones(), at=[]), "skips nothing: name sublayers, for example at="),
        (lambda: SkipSublayers(ones(), at=[1.25]), "no sublayer 1.25: pass n for the attention of layer n, n \\+ 0.5"),
        (lambda: LeaveAt(ones(), 1, positions="shift"), "pass 'keep' or 'renumber'"),
        (lambda: Silence("ffn"), "no sublayer 'ffn': pass 'attention' or 'mlp'"),
        (lambda: Silence("mlp", layers=[]), "silences nothing: name layers, or leave layers out"),
        (lambda: Rescale(float("nan")), "the factor is nan: pass a finite number"),
    ],
)
def test_a_broken_value_is_refused_with_the_fix(build, message):
    with pytest.raises(EmbedLensError, match=message):
        build()


@pytest.mark.parametrize(
    ("interventions", "message"),
    [
        ([], "pass at least one"),
        ([EnterAt(3)], "no layer 3 in .*: pass 0 to 2"),
        ([LeaveAt(ones(), 3)], "no layer 3 in .*: pass 0 to 2"),
        ([LeaveAt(ones(), -1)], "no layer -1 in .*: pass 0 to 2"),
        ([Silence("mlp", layers=[0, 3])], "no layer 3 in .*: pass 0 to 2"),
        ([SkipSublayers(ones(), at=[3.5])], "no layer 3 in .*: pass 0 to 2"),
        ([Prune(torch.arange(16) > 3)] * 2, "several Prune: pass one"),
        ([EnterAt(1), EnterAt(2)], "several EnterAt: pass one"),
        ([Prune(torch.arange(15) > 3)], "shape \\(15,\\), the picture 16 visual tokens: pass one True or False"),
        ([Prune([torch.arange(16) > 3] * 2)], "Prune has 2 masks for 1 prompts: pass a list with one mask per prompt"),
        ([Prune(torch.arange(16) > 3), SkipSublayers(torch.arange(16) > 3, at=[1])], "SkipSublayers never acted"),
    ],
    ids=repr,
)
def test_what_does_not_fit_model_or_prompt_is_refused_with_the_fix(tiny, prompt, interventions, message):
    before = state(tiny)
    with pytest.raises(EmbedLensError, match=message), intervene(tiny, *interventions):
        tiny.answer(prompt)
    assert state(tiny) == before


def test_one_mask_is_for_one_prompt(tiny):
    prompts = prompts_of(tiny, 2)
    with pytest.raises(EmbedLensError, match="1 masks for 2 prompts"), intervene(tiny, Prune(random_mask(prompts[0]))):
        tiny.answers(prompts, batch_size=1)
    with intervene(tiny, Prune(per_prompt(prompts))) as run:
        tiny.answers(prompts, batch_size=1)
    assert run.fired == 2


def test_blocks_do_not_nest_and_unannounced_forwards_are_refused(tiny, prompt):
    before = state(tiny)
    with pytest.raises(EmbedLensError, match="pass all of them to one intervene"):
        with intervene(tiny, Rescale(2.0)), intervene(tiny, EnterAt(1)):
            tiny.answer(prompt)
    for announced, message in (
        (nullcontext(), "this forward was not announced: call model.answer"),
        (tiny.running([prompt]), "run what model.running returned"),
    ):
        with pytest.raises(EmbedLensError, match=message), intervene(tiny, Prune(random_mask(prompt))), torch.no_grad():
            announced = tiny.running([prompt]) if message.startswith("run") else announced
            with announced:
                tiny.hf(inputs_embeds=prompt.embeds[None], use_cache=False)
    assert state(tiny) == before


def test_kernels_that_cannot_be_changed_are_refused(tiny, prompt, monkeypatch):
    monkeypatch.setattr(tiny.decoder.config, "_attn_implementation_internal", "flash_attention_2")
    for value in (EnterAt(1), LeaveAt(random_mask(prompt), 0), ReleasedLayer0()):
        with pytest.raises(EmbedLensError, match="set_attn_implementation"), intervene(tiny, value):
            tiny.logits(prompt)


def test_a_prompt_without_some_tokens_takes_no_mask(tiny, prompt):
    mask = random_mask(prompt)
    assert torch.equal(prompt.without(mask).embeds, prompt.embeds[~prompt.spread(mask)])
    assert int(prompt.without(mask).visual.sum()) == int((~mask).sum())
    with pytest.raises(EmbedLensError, match="spread the mask on the whole prompt"):
        prompt.without(mask).spread(mask)


@pytest.mark.parametrize("sublayer", ["attention", "mlp"])
def test_silenced_text_but_its_last_position_gets_no_update_and_everything_else_does(tiny, sublayer):
    prompt = tiny.prompt(picture(), "What is in the picture?")
    still = prompt.text.clone()
    still[-1] = False
    with intervene(tiny, Silence(sublayer, rows="text")):
        seen = el.trace(tiny, prompt)
    before, after = (seen.resid_pre, seen.resid_mid) if sublayer == "attention" else (seen.resid_mid, seen.resid_post)
    assert torch.equal(before[:, still], after[:, still])
    assert (before != after).any(-1)[:, ~still].all()
