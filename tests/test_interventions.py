"""Each intervention does to the stock modules of every family what it says, and nothing else, then or later."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from stock import picture
from torch.testing import assert_close
from twins import BY_FAMILY

import embedlens as el
from benchmarks.sweep import eager
from embedlens import EmbedLensError, EnterAt, LeaveAt, Prune, ReleasedLayer0, Rescale, Silence, intervene
from embedlens.interventions import SkipSublayers

CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # same sums in another order, or by another kernel


def prompts_of(model, n: int = 3):
    """Of unequal lengths, in pictures of other shapes too where a family cuts them."""
    sizes = [(80, 60), (60, 90), (97, 41), (80, 60)][:n]
    questions = ["what ?" + " and how many dogs ?" * i for i in range(n)]
    return model.prompts([picture(size, i) for i, size in enumerate(sizes)], questions)


def random_mask(prompt, seed: int = 0, share: float = 0.4) -> torch.Tensor:
    return torch.rand(len(prompt.grid), generator=torch.Generator().manual_seed(seed)) < share


@pytest.fixture(scope="module")
def prompt(tiny):
    return prompts_of(tiny, 1)[0]


@pytest.fixture(scope="module", params=["tiny", *BY_FAMILY])
def model(request, tiny, twin_of):
    return tiny if request.param == "tiny" else twin_of(BY_FAMILY[request.param])[1]


#: Arms by name; each is built from one mask per prompt.
ARMS = {
    "prune, keep": lambda masks: [Prune(masks)],
    "prune, renumber": lambda masks: [Prune(masks, positions="renumber")],
    "skip": lambda masks: [SkipSublayers(masks, at=[0.5, 1])],
    "skip some": lambda masks: [SkipSublayers([~m for m in masks], at=[0]), SkipSublayers(masks, at=[0, 1.5])],
    "silence attention": lambda masks: [Silence("attention")],
    "silence an mlp": lambda masks: [Silence("mlp", layers=(1,))],
    "silence all": lambda masks: [Silence("attention"), Silence("mlp")],
    "silence text": lambda masks: [Silence("attention", rows="text")],
    "enter at 1": lambda masks: [EnterAt(1)],
    "enter at 2": lambda masks: [EnterAt(2)],
    "leave at 0": lambda masks: [LeaveAt(masks, 0)],
    "leave in stages": lambda masks: [LeaveAt(masks, 1, "renumber"), LeaveAt([~mask for mask in masks], 2, "renumber")],
    "rescale": lambda masks: [Rescale(0.3)],
    "enter and leave": lambda masks: [EnterAt(1), LeaveAt(masks, 2), Prune([m & (m.cumsum(0) % 2 > 0) for m in masks])],
    "several": lambda masks: [Rescale(2.0), EnterAt(1), Prune(masks), Silence("mlp", layers=[2]),
                              SkipSublayers([~mask for mask in masks], at=[1])],
    "released": lambda masks: [Silence("attention"), ReleasedLayer0()],
}
TOGETHER = ("prune, keep", "skip", "leave in stages", "enter and leave", "several", "released")  # all kinds once


@torch.no_grad()
def stock_logits(model, embeds, positions):
    """Stock logits of a sequence at given rotary positions. The mask keeps gaps from being read as a new sequence."""
    mask = torch.ones(1, len(embeds), dtype=torch.long)
    output = model.hf(inputs_embeds=embeds[None], position_ids=positions[None], attention_mask=mask, use_cache=False)
    return output.logits[0, :, : len(model.input_embeddings)]


def extended(model, prompt, new: list[int]):
    """The prompt with new tokens at its end."""
    ids = torch.tensor(new, dtype=prompt.ids.dtype)
    positions = prompt.positions
    if positions is not None:
        following = positions.max() + 1 + torch.arange(len(new))
        positions = torch.cat([positions, following.expand(len(positions), -1)], dim=1)
    parts = {"ids": torch.cat([prompt.ids, ids]), "embeds": torch.cat([prompt.embeds, model.input_embeddings[ids]])}
    visual = torch.cat([prompt.visual, torch.zeros(len(new), dtype=torch.bool)])
    return replace(prompt, **parts, visual=visual, positions=positions)


@torch.no_grad()
def by_hand(model, prompt, plan=()):
    """The stock norms, attentions and MLPs one after the other, on the rows that are there. What enters the first and
    leaves each, [2 n_layers + 1, rows, d].

    Positions, the causal mask and what a family adds between blocks are put together here anew.
    """

    def of(kind):
        return [value for value in plan if isinstance(value, kind)]

    for value in of(Rescale):
        prompt = prompt.rescaled(value.factor)
    positions = (torch.arange(len(prompt))[None] if prompt.positions is None else prompt.positions).clone()
    there, text = torch.ones(len(prompt), dtype=torch.bool), prompt.text.clone()
    text[-1] = False
    kept = there

    def without(value):
        nonlocal there
        there = there & ~prompt.spread(value.mask[0])
        if value.positions == "renumber":
            positions[:, there] = torch.arange(int(there.sum()))

    for value in of(Prune):
        without(value)
        kept = there
    h, streams = prompt.embeds, [prompt.embeds]
    for layer, block in enumerate(model.blocks):
        for value in of(LeaveAt):
            if value.layer == layer:
                without(value)
        rows = there & (prompt.text if any(layer < value.layer for value in of(EnterAt)) else there)
        place = positions[:, rows]
        rotary = model.decoder.rotary_emb(h[None], place if prompt.positions is None else place[:, None])
        mask = torch.full((int(rows.sum()),) * 2, float("-inf")).triu(1)[None, None]
        for number, name in enumerate(("attention", "mlp")):
            still = torch.zeros_like(there)
            for value in of(SkipSublayers):
                if layer + number / 2 in value.at:
                    still |= prompt.spread(value.mask[0])
            for value in of(Silence):
                if value.sublayer == name and layer in (value.layers or range(model.n_layers)):
                    still |= prompt.visual if value.rows == "visual" else text
            if name == "attention":
                normed = block.input_layernorm(h[None, rows])
                update = block.self_attn(normed, position_embeddings=rotary, attention_mask=mask)[0]
            else:
                update = block.mlp(block.post_attention_layernorm(h[None, rows]))
            updated = h.clone()
            updated[rows] += update[0]
            h = torch.where(still[:, None], h, updated)
            streams.append(h)
        if prompt.deep is not None and layer < len(prompt.deep):
            streams[-1] = h = h.clone()
            h[prompt.visual] += prompt.deep[layer]
    return torch.stack(streams)[:, kept]


def answered_by_hand(model, prompt, plan, steps: int) -> str:
    """Greedy, every token from the whole sequence anew."""
    new: list[int] = []
    ends = torch.tensor(model.hf.generation_config.eos_token_id).flatten().tolist()  # Qwen's has two
    while len(new) < steps and not set(new[-1:]) & set(ends):
        new.append(int(model.unembed(by_hand(model, extended(model, prompt, new), plan)[-1, -1]).argmax()))
    return model.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("nothing", [Rescale(1.0), EnterAt(0)], ids=repr)
def test_a_no_op_changes_nothing_bit_for_bit(model, nothing):
    prompts = prompts_of(model)
    plain = [model.logits(prompts[0]), *model.streams_of(prompts)]
    texts = model.answers(prompts, max_new_tokens=4)
    with intervene(model, nothing) as run:
        seen = [model.logits(prompts[0]), *model.streams_of(prompts)]
        assert model.answers(prompts, max_new_tokens=4) == texts
    assert run.fired >= 3  # a forward of prompts each
    assert all(map(torch.equal, seen, plain))
    with intervene(model, Rescale(1.01)):
        assert not torch.equal(model.logits(prompts[0]), plain[0])


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


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "released"])
def test_an_intervention_is_what_the_stock_sublayers_do_by_hand(model, arm):
    """Stream by stream, then token by token of an answer that is decoded with a cache."""
    prompt = prompts_of(model, 1)[0]
    plan = ARMS[arm]([random_mask(prompt)])
    if prompt.positions is not None and any(getattr(value, "positions", "") == "renumber" for value in plan):
        with pytest.raises(EmbedLensError, match="by row and column.*pass positions='keep'$"), intervene(model, *plan):
            model.logits(prompt)
        return
    with intervene(model, *plan) as run:
        seen, answer = el.trace(model, prompt).sublayers, model.answer(prompt, max_new_tokens=4)
    assert all(run.counts)
    assert_close(seen, by_hand(model, prompt, plan), **CLOSE)
    if arm != "silence text":  # which acts in prefill only
        assert answer == answered_by_hand(model, prompt, plan, 4)
    assert not torch.allclose(seen[-1][-1], model.hidden_states(prompt)[-1, -1], atol=1e-2)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_pruning_equals_running_the_shorter_sequence(tiny, prompt, positions):
    kept = ~prompt.spread(random_mask(prompt))
    rows = kept.nonzero()[:, 0]
    keep, renumber = (stock_logits(tiny, prompt.embeds[kept], places) for places in (rows, torch.arange(len(rows))))
    with intervene(tiny, Prune(~kept[prompt.visual], positions=positions)):
        pruned = tiny.logits(prompt)
    assert_close(pruned, keep if positions == "keep" else renumber, **CLOSE)
    assert not torch.allclose(keep, renumber, atol=1e-2)
    assert not torch.allclose(pruned, tiny.logits(prompt)[kept], atol=1e-2)  # it did prune something


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


@pytest.mark.parametrize("arm", TOGETHER)
def test_a_batch_of_unequal_lengths_equals_one_by_one(tiny, arm):
    together_is_one_by_one(tiny, arm)


@pytest.mark.parametrize("arm", ["", "enter and leave"])
@pytest.mark.parametrize("family", BY_FAMILY)
def test_a_batch_of_any_family_equals_one_by_one(twin_of, family, arm):
    together_is_one_by_one(twin_of(BY_FAMILY[family])[1], arm)


def together_is_one_by_one(model, arm):
    def acting(masks):
        return intervene(model, *ARMS[arm](masks)) if arm else nullcontext()

    prompts = prompts_of(model)
    assert len({len(prompt) for prompt in prompts}) == 3
    masks = [random_mask(prompt, seed) for seed, prompt in enumerate(prompts)]
    named = [{"some": torch.arange(len(prompt)) % 3 == 0, "visual": prompt.visual} for prompt in prompts]
    with acting(masks):
        texts = model.answers(prompts, max_new_tokens=4, batch_size=2)
        streams = list(model.streams_of(prompts, batch_size=2))
        seen = list(el.traces(model, prompts, named, batch_size=2))
    for index, prompt in enumerate(prompts):
        with acting([masks[index]]):
            assert texts[index] == model.answer(prompt, max_new_tokens=4)
            assert_close(streams[index], model.hidden_states(prompt), **CLOSE)
            alone = el.trace(model, prompt, named[index])
        assert_close(seen[index].sublayers, alone.sublayers, **CLOSE)
        for name in alone.attention:
            assert_close(seen[index].attention[name], alone.attention[name], **CLOSE)
        plain = model.hidden_states(prompt)[-1, -1]
        assert torch.allclose(streams[index][-1, -1], plain, atol=1e-2) is not bool(arm)


def test_the_released_layer_0_acts_on_visual_rows_and_on_what_follows(model):
    prompt = prompts_of(model, 1)[0]
    plain = el.trace(model, prompt)
    with intervene(model, ReleasedLayer0()) as run:
        seen = el.trace(model, prompt)
        model.answer(prompt, 3)
    assert run.fired == 2  # in prefill only
    first = int(prompt.visual.nonzero()[0])
    assert torch.equal(seen.resid_mid[0][:first], plain.resid_mid[0][:first])
    assert not torch.isclose(seen.resid_mid[0], plain.resid_mid[0], atol=1e-3).all(-1)[prompt.visual].any()


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
    with intervene(tiny, ReleasedLayer0()):
        assert_close(el.trace(tiny, prompt).resid_mid[0], expected, **CLOSE)


def ones(n: int = 16) -> torch.Tensor:
    return torch.ones(n, dtype=torch.bool)


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
    with intervene(tiny, Prune([random_mask(prompt) for prompt in prompts])) as run:
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


def test_a_prompt_without_some_tokens_takes_no_mask_and_a_rescaled_one_keeps_its_text(tiny, prompt):
    mask = random_mask(prompt)
    assert torch.equal(prompt.without(mask).embeds, prompt.embeds[~prompt.spread(mask)])
    assert int(prompt.without(mask).visual.sum()) == int((~mask).sum())
    half = prompt.rescaled(0.5).embeds
    assert torch.equal(half, torch.where(prompt.visual[:, None], prompt.embeds / 2, prompt.embeds))
    with pytest.raises(EmbedLensError, match="spread the mask on the whole prompt"):
        prompt.without(mask).spread(mask)
