"""Where the answer looks: attention of the prompt's last position and of each answer token to the visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import index

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.tracing import reading
from embedlens.vlm import Prompt, VisionLanguageModel

NEUTRAL = "Write a general description of the image."


@torch.no_grad()
def attention(
    model: VisionLanguageModel, prompt: Prompt, answer: str | Sequence[int] | None = None, question: bool = False
) -> Float[Tensor, "layers heads queries n_visual"]:
    """How much of its attention each query gives to each visual token, in every layer and head.

    One forward of the stock model, on its own attention kernel: only the rows asked for are computed beside it, so no
    [queries, keys] matrix is held. Rows sum to the share of attention that falls on the picture, at most 1.

    Args:
        answer: what the model says, such as `model.answer(prompt)`, or its ids; it is read as if generated: a word that
            is glued to the prompt has its space.
        question: whether every token of `question_ids` is a query, too.

    Returns:
        float32, on the CPU. Queries: the prompt's last position, which chooses the answer's first token, then each
        token of the answer; before them those of the question, whose last is that position. Under `embedlens.Prune`
        the removed tokens get 0.

    Raises:
        EmbedLensError: no such answer, one longer than the model has positions, or a kernel that cannot be read.

    >>> import embedlens as el
    >>> model = el.load("miniature")
    >>> prompt = model.prompt(el.samples.load("miniworld", n=1, seed=0)[0].image, "What is in the picture?")
    >>> tuple(el.attention(model, prompt).shape)
    (8, 4, 1, 64)
    """
    ids = answer_ids(model, prompt, answer)
    queries = len(ids) + (len(question_ids(model, prompt)) if question else 1)
    return _run(model, prompt, ids, queries, lambda weights, visual: weights[..., visual])


@torch.no_grad()
def rollout(
    model: VisionLanguageModel, prompt: Prompt, answer: str | Sequence[int] | None = None
) -> Float[Tensor, "layers queries n_visual"]:
    """How much of each query may stem from each visual token: attention multiplied through all layers up to each.

    `attention` alone cannot be rolled out: text on visual columns is one step, while below it visual tokens mix and
    text hands on. So this runs the model again and reads the rows of *all* positions, heads averaged, a layer at a
    time. It takes a block for half what stood there and half what it attends to (Abnar & Zuidema 2020, section 3):
    the size of values, MLPs and what heads do differently are left out. It says where something can have come from,
    not what is used; a sink that everything looks at gets much, whatever it holds.

    Args:
        answer: as in `attention`; the queries are the same.

    Returns:
        float32, on the CPU, after each layer; what is missing to 1 stems from text. While a layer runs, its
        [heads, s, s] are held.
    """
    ids = answer_ids(model, prompt, answer)
    below: list[Tensor] = []

    def rolled(weights: Float[Tensor, "h s s"], visual: Bool[Tensor, " s"]) -> Float[Tensor, "q n"]:
        under = below.pop() if below else torch.eye(len(visual), device=visual.device)[:, visual]
        under = under.to(weights.device)  # layers may lie on several
        below.append((weights.mean(0) @ under + under) / 2)
        return below[0][-1 - len(ids) :]

    return _run(model, prompt, ids, len(prompt) + len(ids), rolled)


def question_ids(model: VisionLanguageModel, prompt: Prompt) -> Int[Tensor, " tokens"]:
    """What stands behind the picture: the question and what the chat format puts around it. Text before sees none."""
    marked = (prompt.ids == model.family.image_token_id(model.hf)).nonzero()
    return prompt.ids[min(int(marked.max()) + 1, len(prompt) - 1) :]


def _run(
    model: VisionLanguageModel,
    prompt: Prompt,
    ids: Int[Tensor, " tokens"],
    queries: int,
    read: Callable[[Float[Tensor, "h q s"], Bool[Tensor, " s"]], Float[Tensor, "*batch n"]],
) -> Float[Tensor, "layers *batch n_visual"]:
    """What `read` makes of each layer's attention, given which positions are visual; 0 for tokens that were removed."""
    model.check_length(prompt, len(ids))
    whole, kept = followed_by(model, prompt, ids), list[Tensor]()
    with model.running([whole]) as (entered,):

        def take(weights: Float[Tensor, "h q s"]) -> None:
            if weights.shape[-1] != len(entered):
                raise EmbedLensError("an intervention changes the sequence between layers: read attention without it")
            kept.append(read(weights, entered.visual.to(weights.device)).cpu())

        with reading(model, lambda query, key, *how: take(_weights(query[:, :, -queries:], key, *how)[0])):
            model.decoder(inputs_embeds=entered.embeds[None], attention_mask=None, use_cache=False)
    given = torch.stack(kept)
    if len(entered) == len(whole):
        return given
    left = torch.zeros_like(whole.visual)
    left[entered.rows] = True
    found = given.new_zeros(*given.shape[:-1], int(whole.visual.sum()))
    found[..., left[whole.visual].cpu()] = given
    return found


def answer_ids(
    model: VisionLanguageModel, prompt: Prompt, answer: str | Sequence[int] | None
) -> Int[Tensor, " tokens"]:
    """The ids of an answer, as the model would have generated them; none for None."""
    if answer is None:
        return torch.zeros(0, dtype=torch.long)
    words, rows = model.tokenizer, model.hf.get_input_embeddings().weight.shape[0]
    try:
        given = words(answer, add_special_tokens=False)["input_ids"] if isinstance(answer, str) else answer
        ids = [index(one) for one in given]
    except TypeError:
        ids = [-1]
    if not ids:
        raise EmbedLensError("the answer is empty: pass what the model says, or leave answer out")
    if min(ids) < 0 or max(ids) >= rows:
        raise EmbedLensError(
            f"the answer is no text and no ids of {model.name}: pass text, or ids from 0 to {rows - 1}"
        )
    last = int(prompt.ids[-1])
    apart = last in words.added_tokens_decoder or words.decode([last])[-1:].isspace()
    if isinstance(answer, str) and not apart and not answer[0].isspace():
        if not words.convert_ids_to_tokens(ids[0]).startswith("▁"):  # which SentencePiece writes by itself
            ids = words(f" {answer}", add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def relative(
    found: Float[Tensor, "*batch n_visual"], neutral: Float[Tensor, "*batch n_visual"]
) -> Float[Tensor, "*batch n_visual"]:
    """Attention to each token as a multiple of what a neutral prompt gives it: sinks and habits divide out.

    Args:
        found: from `attention`, of the question.
        neutral: of the same picture and queries, of `model.asked(prompt, NEUTRAL)`.

    Source: Zhang et al., "MLLMs know where to look" (ICLR 2025), relative attention.

    >>> relative(torch.tensor([0.4, 0.2]), torch.tensor([0.1, 0.2])).tolist()
    [4.0, 1.0]
    """
    return found / neutral.clamp(min=torch.finfo(neutral.dtype).tiny)


def followed_by(model: VisionLanguageModel, prompt: Prompt, ids: Int[Tensor, " tokens"]) -> Prompt:
    """The prompt with text behind it, which stands at the positions that generation would give it."""
    if not len(ids):
        return prompt
    ids = ids.to(prompt.ids.device)
    positions = prompt.positions
    if positions is not None:
        next_ones = positions.max() + 1 + torch.arange(len(ids), device=positions.device)
        positions = torch.cat([positions, next_ones.expand(len(positions), -1)], dim=1)
    rows = prompt.rows
    if rows is not None:  # a prompt that has lost tokens: text goes on behind its last row
        rows = torch.cat([rows, rows.max() + 1 + torch.arange(len(ids), device=rows.device)])
    embeds = model.hf.get_input_embeddings()(ids).to(prompt.embeds.dtype)
    return replace(
        prompt,
        ids=torch.cat([prompt.ids, ids]),
        embeds=torch.cat([prompt.embeds, embeds]),
        visual=torch.cat([prompt.visual, torch.zeros_like(ids, dtype=torch.bool)]),
        rows=rows,
        positions=positions,
        said=prompt.said + len(ids),
    )


def _weights(
    query: Float[Tensor, "b h q c"], key: Float[Tensor, "b h s c"], mask: Tensor | None, scaling: float
) -> Float[Tensor, "b h q s"]:
    """softmax(q k^T) of the last q rows of a causal sequence, float32."""
    queries = query.shape[2]
    scores = query.float() @ key.float().mT * scaling  # products rounded to bfloat16 are 4 % off
    if mask is None:
        last = torch.ones(queries, key.shape[2], dtype=torch.bool, device=key.device)
        mask = last.tril(key.shape[2] - queries)
    else:
        mask = mask[:, :, -queries:, : key.shape[2]]
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(-1)
