"""Sinks: do any stand out, how alike they are, how like BOS, how much attended (Sections 4.1 to 4.3, Appendix D).

Which tokens are sinks a `Reference` tells; where a model has none of a kind, there are no rows of it. The state of the
first token (BOS) is the same for all pictures. `embedlens.measures.planted` makes the positive control.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from embedlens.clusters import anchor_clusters, centroids, cross_image_similarity, picture_pairs
from embedlens.engine import intervene
from embedlens.errors import EmbedLensError
from embedlens.groups import Reference, fence, phi, ratio_fence, ratios, token_groups_of
from embedlens.interventions import Intervention, Prune, SkipSublayers
from embedlens.lenses import EmbedLens
from embedlens.prompts import looked_at, prompts_of
from embedlens.samples import Sample
from embedlens.stats import Estimate, drawn, drawn_pairs, estimate, estimates
from embedlens.sweep import generator, random_tokens
from embedlens.tracing import traces
from embedlens.vlm import Prompt, VisionLanguageModel

KINDS = ("ViT sink", "LLM sink")
FEW = 5  # tokens followed through the network, as in the paper's Figure 4
CLUSTERS = 6  # largest clusters of a picture that are compared across pictures
REGIONS = ("BOS", "text before", "own", "others", "other patches", "text after")


def has(reference: Reference) -> dict[str, bool]:
    """Which kinds the model has, as `discover` saw it: a threshold, and calibration tokens beyond it."""
    llm = bool(reference.sink_dims) and reference.llm_sink_id is not None
    return {"ViT sink": reference.vit_norm is not None and reference.vit_sink_id is not None, "LLM sink": llm}


def aligner_of(n_layers: int) -> int:
    """Row of `Trace.sublayers` that the paper calls MLP-2: 4, or the last MLP of a shorter model."""
    return min(4, 2 * n_layers)


@dataclass(frozen=True, eq=False)
class Spread:
    """What sinks would stand out from: norms in the tower, excited dimensions in the language model; all tokens."""

    norms: Float[np.ndarray, "tower_layers patches"] = field(repr=False)  #: L2, index 0 = the tower's embedding
    norm_fences: Float[np.ndarray, " tower_layers"]  #: `groups.fence` of each layer's
    #: Largest |x|/RMS of every token but the first, index 0 = what enters the first block
    largest: Float[np.ndarray, "states tokens"] = field(repr=False)
    ratio_fences: Float[np.ndarray, " states"]  #: `groups.ratio_fence` of each layer's
    first: Float[np.ndarray, "states d"] = field(repr=False)  #: |x|/RMS of the first token

    @property
    def beyond(self) -> Float[np.ndarray, " tower_layers"]:
        """Share of the patches beyond it."""
        return (self.norms > self.norm_fences[:, None]).mean(1)

    @property
    def excitement(self) -> pd.DataFrame:
        """By layer, the largest |x|/RMS of BOS, and of the others as median and quartiles: as `figures.bands` draws."""
        most = self.first.max(1)
        rows = {"BOS": (most, most, most), "others": np.quantile(self.largest, [0.5, 0.25, 0.75], axis=1)}
        parts = [pd.DataFrame(dict(zip(("value", "low", "high"), row, strict=True))) for row in rows.values()]
        return pd.concat(parts, keys=list(rows), names=["of", "layer"]).reset_index()


def spread(model: VisionLanguageModel, samples: Iterable[Sample], batch_size: int = 8) -> Spread:
    """Norms and excited dimensions of all tokens of some pictures, read a batch at a time."""
    norms, largest, first = [], [], np.zeros((0, 0))
    for _, prompts in looked_at(model, samples, batch_size):
        norms += [states.float().norm(dim=-1).cpu().numpy() for states in model.tower_states_of(prompts)]
        for states in model.streams_of(prompts, batch_size):
            ratio = ratios(states).cpu()
            first = first if len(first) else ratio[:, 0].numpy()  # one for all pictures: nothing stands before it
            largest.append(ratio[:, 1:].amax(-1).numpy())
    of_tower, of_model = np.concatenate(norms, axis=1), np.concatenate(largest, axis=1)
    fences = np.array([ratio_fence(layer, first.shape[1]) for layer in of_model])
    return Spread(of_tower, np.array([fence(layer) for layer in of_tower]), of_model, fences, first)


def by_sublayer(
    model: VisionLanguageModel, samples: Sequence[Sample], reference: Reference
) -> list[list[dict[str, Any]]]:
    """What becomes of each group of tokens on its way: cosine to BOS, phi, the attention it gets.

    Returns:
        per sample, one row per positions and sublayer (0 = the input, 2 l + 1 the attention of block l, 2 l + 2 its
        MLP), means over the tokens. Positions: "first" (BOS), "text" without it, and the groups that the picture has.
        cosine (to BOS); after whole blocks phi, if the model has sink dimensions, and attention
        (`attention_per_token`, from text after the picture, in the block that follows).
        Two more, "like first" and "like other": the FEW visual tokens most like BOS, and most like another text token,
        after MLP-2; kept, the share of them among the first FEW at each sublayer.
    """
    prompts = prompts_of(model, samples)
    groups = token_groups_of(model, prompts, reference, batch_size=len(prompts))
    masks: list[dict[str, Bool[Tensor, " s"]]] = []  # disjoint, they cover all positions
    for prompt, found in zip(prompts, groups, strict=True):
        first = torch.arange(len(prompt), device=prompt.visual.device) == 0
        masks.append({"first": first, "text": prompt.text & ~first})
        masks[-1] |= {name: prompt.spread(mask) for name, mask in found.named.items()}
    rows: list[list[dict[str, Any]]] = []
    for prompt, named, seen in zip(prompts, masks, traces(model, prompts, masks, len(prompts)), strict=True):
        own: list[dict[str, Any]] = []
        states, queries = seen.sublayers, queries_of(prompt)
        cosine = cosine_to(states, 0)
        excited = phi(seen.stream, reference.sink_dims)
        for name, mask in named.items():
            size = int(mask.sum())
            received = attention_per_token(seen.attention[name], size, queries)
            for at in range(len(states) if size else 0):
                row: dict[str, Any] = {"positions": name, "sublayer": at, "cosine": float(cosine[at, mask].mean())}
                if at % 2 == 0 and reference.sink_dims:
                    row["phi"] = float(excited[at // 2, mask].mean())
                if at % 2 == 0 and at < len(states) - 1:
                    row["attention"] = float(received[at // 2])
                own.append(row)
        texts = prompt.text.nonzero()[1:, 0]
        before = texts[texts < int(prompt.visual.nonzero()[0, 0])]  # the same in every picture too
        other = int(before[-1] if len(before) else texts[-1])
        for name, position in (("like first", 0), ("like other", other)):
            ranks = followed(cosine_to(states, position)[:, prompt.visual], aligner_of(model.n_layers))
            share = (ranks <= len(ranks)).double().mean(0)
            own += [{"positions": name, "sublayer": at, "kept": float(share[at])} for at in range(len(share))]
        rows.append(own)
    return rows


def by_arm(
    model: VisionLanguageModel, samples: Sequence[Sample], reference: Reference, seed: int = 0
) -> list[list[dict[str, Any]]]:
    """Where the attention of text after the picture falls, and how like BOS the LLM sinks are, before and after.

    Arms: "as it is"; "pruned"; "skipped", MLP-2 for the sinks; and both for as many random other tokens, "others
    pruned" and "others skipped", drawn for picture, arm and seed.

    Returns:
        per sample, one row per arm and sublayer, as `by_sublayer` counts: before each block the share of attention on
        each of REGIONS ("own" are the sinks, "others" those drawn), and, where they are not pruned, cosine of the sinks
        to BOS. None for a picture that has no such token, or more of them than others.
    """
    prompts = prompts_of(model, samples)
    found = token_groups_of(model, prompts, reference, batch_size=len(prompts))
    own = [groups.llm_sink.cpu() for groups in found]
    some = [at for at, mask in enumerate(own) if 0 < int(mask.sum()) < int((~mask).sum())]
    rows: list[list[dict[str, Any]]] = [[] for _ in samples]
    if not some:
        return rows
    chosen, own = [prompts[at] for at in some], [own[at] for at in some]
    rngs = [generator(samples[at].id, "others", seed) for at in some]
    others = [random_tokens(~mask, int(mask.sum()), rng) for mask, rng in zip(own, rngs, strict=True)]
    regions = [_regions(*parts) for parts in zip(chosen, own, others, strict=True)]
    mlp = [aligner_of(model.n_layers) / 2 - 0.5]
    removed = {"pruned": own, "others pruned": others}
    arms: dict[str, Intervention | None] = {"as it is": None, **{arm: Prune(masks) for arm, masks in removed.items()}}
    arms |= {"skipped": SkipSublayers(own, mlp), "others skipped": SkipSublayers(others, mlp)}
    for arm, acting in arms.items():
        with nullcontext() if acting is None else intervene(model, acting):
            for place, seen in enumerate(traces(model, chosen, regions, len(chosen))):
                queries, named = queries_of(chosen[place]), regions[place]["own"]
                if arm in removed:
                    left = ~chosen[place].spread(removed[arm][place].to(queries.device))
                    queries, named = queries[left], named[left]
                cosine = cosine_to(seen.sublayers, 0)
                for at in range(len(cosine)):
                    row: dict[str, Any] = {"arm": arm, "sublayer": at}
                    if arm != "pruned":
                        row["cosine"] = float(cosine[at, named].mean())
                    if at % 2 == 0 and at < len(cosine) - 1:
                        row |= {name: float(seen.attention[name][at // 2, queries].mean()) for name in REGIONS}
                    rows[some[place]].append(row)
    return rows


def entries(
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    kind: str,
    reference: Reference,
    repeats: int = 5,
    seed: int = 0,
    batch_size: int = 8,
) -> tuple[pd.DataFrame, dict[str, Estimate | float]]:
    """One kind of sink where it enters layer 0, beside random sets of as many visual tokens of the same pictures.

    Returns:
        per picture that has any: word and random_word, whether the own centroid, and what share of the random ones, is
        nearest to the entry that is commonest among them (E17, E18); inside and all_inside, the share of the kind and
        of all tokens that lie in the cluster most alike across pictures (E16).
        And, of two pictures or more, the cosine between the centroids of two (E15, E23), bootstrapped over pictures:
        cosine; random (of as many random tokens); beyond (their paired difference); centred (cosine without the mean
        of all visual tokens); and its variance over pairs.
    """
    lens, parts = EmbedLens.from_model(model), []
    for batch, prompts in looked_at(model, samples, batch_size):
        found = token_groups_of(model, prompts, reference, batch_size=batch_size)
        for sample, prompt, groups in zip(batch, prompts, found, strict=True):
            if not bool((mask := groups.met[kind].cpu()).any()):
                continue
            tokens, rng = prompt.embeds[prompt.visual].float(), generator(sample.id, kind, seed)
            units, labels = normalize(tokens, dim=-1).cpu(), anchor_clusters(tokens, reference.threshold).cpu()
            size, everywhere = int(mask.sum()), torch.ones_like(mask)
            sets = [mask, *(random_tokens(everywhere, size, rng) for _ in range(repeats))]
            means = torch.stack([units[part].mean(0) for part in sets])
            words = lens.topk(means.to(tokens.device), 1)[1][:, 0].cpu().numpy()
            middles = centroids(tokens.cpu(), labels, CLUSTERS)
            parts.append((sample.id, means, units.mean(0), words, mask, labels, middles))
    if not parts:
        raise EmbedLensError(f"no picture has an {kind}: ask `has(reference)` first, or take more pictures")
    ids, own_means, centers, own_words, masks, clusters, of_clusters = zip(*parts, strict=True)
    means, words = torch.stack(own_means), np.stack(own_words)
    pairs = picture_pairs(len(ids), seed=seed) if len(ids) > 1 else np.zeros((0, 2), dtype=int)
    likeness = [torch.zeros(len(part)) for part in of_clusters]  # of each cluster, summed over the partners
    for one, other in pairs:
        likeness[one] += cross_image_similarity(of_clusters[one], of_clusters[other])
    inside = [labels == total.argmax() for labels, total in zip(clusters, likeness, strict=True)]
    own, random = words[:, 0], words[:, 1:]
    table = pd.DataFrame(
        {
            "id": ids,
            "word": (own == np.bincount(own).argmax()).astype(float),
            "random_word": (random == np.bincount(random.ravel()).argmax()).mean(1),
            "inside": [float(part[mask].double().mean()) for part, mask in zip(inside, masks, strict=True)],
            "all_inside": [float(part.double().mean()) for part in inside],
        }
    )
    if len(ids) < 2:
        return table, {}
    one, other = torch.from_numpy(pairs).unbind(1)
    units = (normalize(part, dim=-1) for part in (means, means - torch.stack(centers).mean(0)))
    raw, centred = ((part[one] * part[other]).sum(-1).numpy() for part in units)
    cosines = pd.DataFrame({"cosine": raw[:, 0], "random": raw[:, 1:].mean(1), "centred": centred[:, 0]})
    cosines["beyond"] = cosines["cosine"] - cosines["random"]
    alike = estimates(drawn_pairs(cosines, pairs, seed=seed))
    return table, {"variance": float(np.var(raw[:, 0])), **{str(name): part for name, part in alike.items()}}


def cosine_to(states: Float[Tensor, "sublayers s d"], position: int) -> Float[Tensor, "sublayers s"]:
    """Cosine of every position to one of them, sublayer by sublayer."""
    units = normalize(states.float(), dim=-1)
    return torch.einsum("lsd,ld->ls", units, units[:, position])


def followed(values: Float[Tensor, "sublayers n"], at: int, k: int = FEW) -> Int[Tensor, "k sublayers"]:
    """The places, at every sublayer, of the k tokens that come first at one sublayer (Figure 4, right), from 1.

    >>> followed(torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 4.0]]), at=0, k=2).tolist()
    [[1, 2], [2, 3]]
    """
    order = values.argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) + 1)[:, order[at, :k]].T


def attention_per_token(
    mass: Float[Tensor, "layers s"], size: int, queries: Bool[Tensor, " s"]
) -> Float[Tensor, " layers"]:
    """Attention that a token of a set of `size` gets, mean over the queries, which see all of it, of `mass`, the share
    that falls on the set: in units of 1 / (q + 1), what each key that position q sees would get of even attention."""
    at = queries.nonzero()[:, 0].to(mass.device)
    return (mass[:, at] * (at + 1) / max(size, 1)).mean(-1)


def moved(arms: pd.DataFrame, mlp: int, seed: int = 0) -> dict[str, Estimate]:
    """What pruning LLM sinks does to attention, and letting them skip MLP-2 (the sublayer `mlp`, see `aligner_of`) to
    attention and to their likeness to BOS; from rows of `by_arm`. Returns to_prompt (of the attention that pruning
    frees, the part that goes to the text before the picture), beyond_due (more than its share), change (in cosine to
    BOS), beyond_control (of other tokens that skip), attention_lost."""
    arms = arms.assign(prompt=arms.BOS + arms["text before"])
    arms["due"] = arms.prompt / (1 - arms.own) * arms.own  # the prompt's gain if every key kept its share
    mass = {of: drawn(arms.dropna(subset=of), of, by="arm", seed=seed) for of in ("prompt", "own", "due")}
    cosine = drawn(arms[arms.sublayer >= mlp].dropna(subset="cosine"), "cosine", by="arm", seed=seed)
    freed, gained = mass["own"]["as it is"], mass["prompt"]["pruned"] - mass["prompt"]["as it is"]
    parts = {"to_prompt": gained / freed, "beyond_due": (gained - mass["due"]["as it is"]) / freed}
    parts |= {"change": cosine["skipped"] - cosine["as it is"], "attention_lost": 1 - mass["own"]["skipped"] / freed}
    parts["beyond_control"] = cosine["skipped"] - cosine["others skipped"]
    return {name: estimate(part, arms.id.nunique()) for name, part in parts.items()}


def queries_of(prompt: Prompt) -> Bool[Tensor, " s"]:
    """Text that sees the whole picture: the positions after its last visual token."""
    last = int(prompt.visual.nonzero()[-1, 0])
    return prompt.text & (torch.arange(len(prompt), device=prompt.visual.device) > last)


def _regions(prompt: Prompt, own: Bool[Tensor, " n"], others: Bool[Tensor, " n"]) -> dict[str, Bool[Tensor, " s"]]:
    """REGIONS over all positions, disjoint."""
    at, text = torch.arange(len(prompt), device=prompt.visual.device), prompt.text
    later = at > int(prompt.visual.nonzero()[0, 0])
    parts = [prompt.spread(mask) for mask in (own, others, ~(own | others))]
    return dict(zip(REGIONS, (text & (at == 0), text & (at > 0) & ~later, *parts, text & later), strict=True))
