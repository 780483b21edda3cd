"""How alike the tokens of a group are, how they move, what reads them, and what they would say (Section 5.2).

"Similarity within a cluster" is the mean cosine of pairs of tokens of one picture at a layer, or the cosine of a token
to itself one layer later; each also with the mean of all visual tokens, of other pictures, removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributions import Categorical
from torch.nn.functional import normalize

from embedlens.errors import EmbedLensError
from embedlens.groups import RARE, Reference, near_word, token_groups_of
from embedlens.lenses import EmbedLens, LogitLens
from embedlens.prompts import looked_at, prompts_of
from embedlens.samples import Sample
from embedlens.sweep import generator, random_tokens
from embedlens.tracing import traces
from embedlens.vlm import Prompt, VisionLanguageModel

DIRECTIONS = 100  # random ones a picture, whose nearest entries no_words is held against
#: Beside the four groups: all that are not dead; and as many tokens as are dead, drawn at random.
GROUPS = ("alive", "dead", "ViT sink", "LLM sink", "remaining", "random")
Common = Mapping[str, Mapping[str, Float[Tensor, "_ _"]]]
""""stream" (layer 0 enters the language model) or "tower" → group, or "all" → mean of its unit tokens by layer."""


def is_word(entry: str) -> bool:
    """Whether a readable vocabulary entry starts a word and has letters only, at least two: the rule for "fragmented or
    non-semantic pieces", a lower bound, as a piece that starts a longer word passes.

    >>> [is_word(entry) for entry in ("dog", "·og", ",", "a", "<s>", "bott")]
    [True, False, False, False, False, True]
    """
    return entry.isalpha() and len(entry) > 1


def checked(model: VisionLanguageModel, samples: Sequence[Sample], reference: Reference) -> Reference:
    """The reference; without its dead word, unless in both halves of these pictures one token in a thousand is near."""
    lens, half = EmbedLens.from_model(model), len(samples) // 2
    tokens = model.visual_features_of([sample.image for sample in samples])
    near = [near_word(rows, lens, reference.dead_id).float() for rows in tokens]
    there = all(float(torch.cat(part).mean()) >= RARE for part in (near[:half], near[half:]) if part)
    return reference if there else replace(reference, dead_id=None)


def pairwise_cosine(
    tokens: Float[Tensor, "*layers n d"], masks: Bool[Tensor, "groups n"]
) -> Float[Tensor, "*layers groups"]:
    """Mean cosine of all pairs of different tokens of each group, without holding the pairs. A zero vector has cosine 0
    to everything; a group of fewer than two tokens is nan."""
    units = normalize(tokens.float(), dim=-1)
    members = masks.to(units.device).float()
    sums = (members @ units).pow(2).sum(-1)  # [*layers, groups]: pairs, and each token with itself
    own = units.pow(2).sum(-1) @ members.T
    n = members.sum(-1)
    pairs = torch.where(n > 1, n * (n - 1), torch.full_like(n, torch.nan))
    return (sums - own) / pairs


def group_means(values: Float[Tensor, "*layers n"], masks: Bool[Tensor, "groups n"]) -> Float[Tensor, "*layers groups"]:
    """Mean of a value over the tokens of each group; nan for a group without tokens."""
    members = masks.to(values.device).float()
    return (values.float() @ members.T) / members.sum(-1)


def common(
    model: VisionLanguageModel, samples: Iterable[Sample], reference: Reference, seed: int = 0, batch_size: int = 8
) -> Common:
    """Means of the normalised visual tokens, of all and of each group that has any; memory stays as the pictures grow.
    `samples` are other pictures than those that will be held against it."""
    names, sums = (*GROUPS, "all"), {"stream": torch.zeros(()), "tower": torch.zeros(())}
    counts = torch.zeros(len(names), dtype=torch.float64)
    for batch, prompts in looked_at(model, samples, batch_size):
        named = masks_of(model, batch, prompts, reference, seed)
        towers, streams = model.tower_states_of(prompts), model.streams_of(prompts, len(prompts))
        for prompt, groups, tower, states in zip(prompts, named, towers, streams, strict=True):
            members = torch.stack([*(groups[name] for name in GROUPS), torch.ones_like(groups["dead"])]).float()
            counts += members.sum(-1)
            for where, tokens in (("stream", states[:, prompt.visual]), ("tower", tower)):
                units = normalize(tokens.float(), dim=-1)
                sums[where] = sums[where] + (members.to(units.device) @ units).double().cpu()  # [layers, groups, d]
    return {
        where: {name: (total[:, at] / counts[at]).float() for at, name in enumerate(names) if counts[at]}
        for where, total in sums.items()
    }


def by_group(
    model: VisionLanguageModel, samples: Sequence[Sample], reference: Reference, shared: Common, seed: int = 0
) -> list[list[dict[str, Any]]]:
    """Every group of GROUPS in every picture at every layer; `shared` is from `common`, on other pictures.

    Returns:
        per sample, rows of part, group and layer, means over the group's tokens, if it has any. Of part "picture" at
        layer 0: tokens, share (of the visual tokens), in_bars, no_words (nearest entry is none by `is_word`), entropy
        (nats, of the LogitLens distribution at the last layer); and no_words of the group "random directions".
        Of part "stream": inside (cosine of pairs, of at least two tokens), aligned (cosine to the group's direction in
        other pictures), both also `_removed`, with the mean of other pictures' visual tokens taken out; and, of the
        block after the layer, kept (cosine of a token to itself behind the block) and the attention of the text after
        the picture: attention (share of all keys), of_visual (share of visual keys) and per_token.
        Of part "tower": norm, norm_l1, aligned, aligned_removed.
    """
    lens, reader = EmbedLens.from_model(model), LogitLens.from_model(model)
    words = torch.tensor([is_word(entry) for entry in model.tokens])
    prompts = prompts_of(model, samples)
    named = masks_of(model, samples, prompts, reference, seed)
    masks = [
        {name: prompt.spread(mask) for name, mask in groups.items()} | {"all": prompt.visual}
        for prompt, groups in zip(prompts, named, strict=True)
    ]
    rows: list[list[dict[str, Any]]] = []
    towers, streams = model.tower_states_of(prompts), traces(model, prompts, masks, len(prompts))
    for sample, prompt, groups, tower, trace in zip(samples, prompts, named, towers, streams, strict=True):
        members, tower = torch.stack([groups[name] for name in GROUPS]), tower.float()
        sizes, states = members.sum(-1), trace.stream[:, prompt.visual].float()
        asking = torch.arange(len(prompt)) > int(prompt.visual.nonzero()[-1])
        if not bool(asking.any()):
            raise EmbedLensError("no text stands after the picture, so nothing reads it: use a chat format that asks")
        mass = {name: share[:, asking.to(share.device)].mean(-1).cpu() for name, share in trace.attention.items()}
        attention, units = torch.stack([mass[name] for name in GROUPS]), normalize(states, dim=-1)
        entropy = Categorical(logits=reader.scores(states[-1]).float()).entropy()
        of_picture = {
            "tokens": sizes.float()[:, None],
            "share": (sizes / members.shape[1])[:, None],
            "in_bars": group_means(prompt.grid.padded.float()[None], members).T,
            "no_words": group_means((~words[lens.topk(states[0], 1)[1][:, 0].cpu()]).float()[None], members).T,
            "entropy": group_means(entropy[None], members).T,
        }
        of_stream = {
            **_likeness(states, members, shared["stream"], pairs=True),
            "kept": group_means((units[:-1] * units[1:]).sum(-1), members).T,
            "attention": attention,
            "of_visual": attention / mass["all"],
            "per_token": attention / sizes[:, None],
        }
        norms = {"norm": tower.norm(dim=-1), "norm_l1": tower.abs().sum(-1)}
        of_tower = {name: group_means(values, members).T for name, values in norms.items()}
        of_tower |= _likeness(tower, members, shared["tower"])
        anywhere = generator(sample.id, "random directions", seed).standard_normal((DIRECTIONS, model.width))
        entries = lens.topk(torch.from_numpy(anywhere).float().to(states.device), 1)[1].cpu()
        chance = {"part": "picture", "group": "random directions", "layer": 0}
        rows.append([chance | {"no_words": float((~words[entries]).float().mean())}])
        for part, values in {"picture": of_picture, "stream": of_stream, "tower": of_tower}.items():
            rows[-1] += _rows(part, values, sizes)
    return rows


def masks_of(
    model: VisionLanguageModel, samples: Sequence[Sample], prompts: Sequence[Prompt], reference: Reference, seed: int
) -> list[dict[str, Bool[Tensor, " n"]]]:
    """The masks of GROUPS for each picture; its id and the seed decide which tokens are the random ones."""
    found, of = [], token_groups_of(model, prompts, reference, batch_size=len(prompts))
    for sample, groups in zip(samples, of, strict=True):
        rng, everywhere = generator(sample.id, "random", seed), torch.ones_like(groups.dead)
        drawn = random_tokens(everywhere, int(groups.dead.sum()), rng)
        found.append({**groups.named, "remaining": ~groups.dead, "random": drawn})
    return found


def _likeness(
    states: Float[Tensor, "layers n d"],
    members: Bool[Tensor, "groups n"],
    shared: Mapping[str, Float[Tensor, "layers d"]],
    pairs: bool = False,
) -> dict[str, Float[Tensor, "groups layers"]]:
    """Cosine to the group's direction elsewhere and, on wish, of pairs; raw and with the common mean removed."""
    found, units = {}, normalize(states, dim=-1)
    center, size = shared["all"].to(units.device), members.sum(-1)[:, None]
    nowhere = torch.full_like(center, torch.nan)
    directions = torch.stack([shared.get(name, nowhere).to(units.device) for name in GROUPS])
    for removed, mean in (("", torch.zeros_like(center)), ("_removed", center)):
        tokens = normalize(units - mean[:, None], dim=-1)
        if pairs:
            found[f"inside{removed}"] = pairwise_cosine(tokens, members).T
        cosines = torch.einsum("lnd,gld->gln", tokens, normalize(directions - mean, dim=-1)).cpu()
        found[f"aligned{removed}"] = (cosines * members[:, None]).sum(-1) / size
    return found


def _rows(
    where: str, values: Mapping[str, Float[Tensor, "groups layers"]], sizes: Int[Tensor, " groups"]
) -> list[dict[str, Any]]:
    """One row per group that has tokens and per layer; what is not defined there is left out."""
    lists, rows = {name: value.cpu().tolist() for name, value in values.items()}, []
    for at, name in enumerate(GROUPS):
        for layer in range(max(len(of[at]) for of in lists.values()) if sizes[at] else 0):
            there = {key: of[at][layer] for key, of in lists.items() if layer < len(of[at])}
            known = {key: value for key, value in there.items() if value == value}
            rows.append({"part": where, "group": name, "layer": layer, **known})
    return rows


def chosen_by_half(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    reference: Reference,
    shared: Common,
    splits: int = 3,
    seed: int = 0,
) -> list[list[dict[str, Any]]]:
    """Is a dead token's likeness to the others a result of how it was chosen? Choose on half, measure on the rest.

    Dead tokens are chosen at layer 0 by their direction, so that they are alike there by construction. Here they are
    chosen by a random half of the coordinates, each half once, and their cosine is taken on the *other* half. Returns
    per sample, a row of means over splits, or none where no split chooses two tokens: selected_on, other_half and, of
    any two tokens of the picture, any_tokens, the last two also `_mean_removed`.
    """
    embedding = model.input_embeddings
    orders = [np.random.default_rng((seed, split)).permutation(model.width) for split in range(splits)]
    halves = [torch.from_numpy(order).to(embedding.device).tensor_split(2) for order in orders]
    columns = [pair for one, other in halves for pair in ((one, other), (other, one))]
    lenses = [EmbedLens(embedding[:, chosen], model.tokens) for chosen, _ in columns]
    center = shared["stream"]["all"][0].to(embedding.device)
    found: list[list[dict[str, Any]]] = []
    for tokens in map(torch.Tensor.float, model.visual_features_of([s.image for s in samples], len(samples))):
        apart, each = normalize(tokens, dim=-1) - center, []
        for (chosen, rest), lens in zip(columns, lenses, strict=True):
            dead = near_word(tokens[:, chosen], lens, reference.dead_id)
            pools = torch.stack([dead, torch.ones_like(dead)])
            row = {"selected_on": float(pairwise_cosine(tokens[:, chosen], pools)[0])}
            for removed, part in (("", tokens), ("_mean_removed", apart)):
                cosines = pairwise_cosine(part[:, rest], pools).tolist()
                row |= {f"{name}{removed}": x for name, x in zip(("other_half", "any_tokens"), cosines, strict=True)}
            each.append(row)
        means = pd.DataFrame(each).dropna().mean()
        found.append([] if means.isna().any() else [means.to_dict()])
    return found
