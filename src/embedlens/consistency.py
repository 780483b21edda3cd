"""How alike the tokens of a group are, how they move, what reads them, and what they would say (Section 5.2).

"Similarity within a cluster" can be read in two ways, and both are here: the mean cosine of pairs of tokens of one
picture at a layer, and the cosine of a token to itself one layer later. A high cosine can be a direction that *all*
tokens share, so every cosine is also taken with the mean of all visual tokens removed; means and directions come from
other pictures than those they are held against.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from embedlens.clusters import anchor_clusters
from embedlens.errors import EmbedLensError
from embedlens.groups import QUESTION, RARE, Reference, TokenGroups, near_word, token_groups_of
from embedlens.lenses import EmbedLens, LogitLens
from embedlens.samples import Sample, readable
from embedlens.tracing import Trace, traces

if TYPE_CHECKING:
    from embedlens.vlm import Prompt, VisionLanguageModel

#: Beside the four groups: all that are not dead; as many tokens as are dead, drawn at random; and the patches of
#: largest norm at the tower's last layer, to look at in a model whose norms do not stand out.
ARMS = ("alive", "dead", "ViT sink", "LLM sink", "remaining", "random", "highest norm")
HIGHEST = 5  # patches of highest norm


def is_word(entry: str) -> bool:
    """Whether a readable vocabulary entry starts a word and has letters only, at least two.

    The rule for "fragmented or non-semantic pieces", for which the paper has no metric. A piece that starts a longer
    word passes, so the share of pieces that it finds is a lower bound.

    >>> [is_word(entry) for entry in ("dog", "·og", ",", "a", "<s>", "bott")]
    [True, False, False, False, False, True]
    """
    return entry.isalpha() and len(entry) > 1


def membership_for(model: VisionLanguageModel, samples: Sequence[Sample], reference: Reference) -> str:
    """How to tell dead tokens: by their word ("top3") where both halves of these pictures have such, else "cluster".

    "cluster", the largest cluster of each picture, is a stand-in, and what is found of it has to say so.
    """
    if reference.dead_id is None:
        return "cluster"
    lens = EmbedLens.from_model(model)
    tokens = model.visual_features_of([sample.image for sample in samples])
    near = [near_word(rows, lens, reference.dead_id).float() for rows in tokens]
    parts = [part for part in (near[: len(near) // 2], near[len(near) // 2 :]) if len(part)]
    return "top3" if all(float(torch.cat(part).mean()) >= RARE for part in parts) else "cluster"


def pairwise_cosine(
    tokens: Float[Tensor, "*layers n d"], masks: Bool[Tensor, "groups n"]
) -> Float[Tensor, "*layers groups"]:
    """Mean cosine of all pairs of different tokens of each group, without holding the pairs.

    Args:
        tokens: any length; a zero vector has cosine 0 to everything.
        masks: the tokens of each group.

    Returns:
        nan for a group of fewer than two tokens.

    >>> pairwise_cosine(torch.tensor([[1.0, 0], [2, 0], [0, 1]]), torch.ones(1, 3, dtype=torch.bool)).tolist()
    [0.3333333432674408]
    """
    units = normalize(tokens.float(), dim=-1)
    members = masks.to(units.device).float()
    sums = (members @ units).pow(2).sum(-1)  # [*layers, groups]: pairs, and each token with itself
    own = units.pow(2).sum(-1) @ members.T
    n = members.sum(-1)
    pairs = torch.where(n > 1, n * (n - 1), torch.full_like(n, torch.nan))
    return (sums - own) / pairs


def entropy(logits: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch"]:
    """Shannon entropy of the softmax, in nats; log(V) if all entries are equally likely.

    >>> round(float(entropy(torch.zeros(4))), 4), round(float(entropy(torch.tensor([100.0, 0, 0, 0]))), 4)
    (1.3863, 0.0)
    """
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs.clamp_min(torch.finfo(torch.float32).min)).sum(-1)


def group_means(values: Float[Tensor, "*layers n"], masks: Bool[Tensor, "groups n"]) -> Float[Tensor, "*layers groups"]:
    """Mean of a value over the tokens of each group; nan for a group without tokens.

    >>> group_means(torch.tensor([1.0, 3.0]), torch.tensor([[True, True], [False, False]])).tolist()
    [2.0, nan]
    """
    members = masks.to(values.device).float()
    return (values.float() @ members.T) / members.sum(-1)


def layer_cosines(states: Float[Tensor, "layers n d"]) -> Float[Tensor, "layers layers n"]:
    """Cosine of each token's state at one layer to its own state at another."""
    units = normalize(states.float(), dim=-1).transpose(0, 1)
    return (units @ units.mT).permute(1, 2, 0)


@dataclass(frozen=True, eq=False)
class Common:
    """What the visual tokens of some pictures share at every layer, to hold other pictures against."""

    n_pictures: int
    center: Float[Tensor, "layers d"]
    """Mean of all normalised visual tokens in the language model, layer 0 as they enter."""
    tower_center: Float[Tensor, "tower v"]
    """The same in the vision tower."""
    direction: Mapping[str, Float[Tensor, "layers d"]] = field(repr=False)
    """Group → mean of its normalised tokens. A group without a token is left out."""
    tower_direction: Mapping[str, Float[Tensor, "tower v"]] = field(repr=False)


@dataclass(frozen=True, eq=False)
class GroupStudy:
    """What was measured of each group in each picture; nan where a picture has no such token."""

    groups: tuple[str, ...]
    sizes: Int[np.ndarray, "pictures groups"]
    in_bars: Float[np.ndarray, "pictures groups"]
    """Share of the tokens that show no pixel of the picture."""
    no_words: Float[np.ndarray, "pictures groups"]
    """Share of the tokens whose nearest vocabulary entry at layer 0 is no word by `is_word`."""
    inside: Float[np.ndarray, "pictures groups layers"]
    """Mean cosine of pairs of tokens of the picture's group."""
    inside_removed: Float[np.ndarray, "pictures groups layers"]
    """The same, the mean of other pictures' visual tokens removed."""
    kept: Float[np.ndarray, "pictures groups moves"]
    """Cosine of a token to itself one layer later; entry l is from layer l to l + 1."""
    aligned: Float[np.ndarray, "pictures groups layers"]
    """Cosine of a token to the group's mean direction in other pictures."""
    aligned_removed: Float[np.ndarray, "pictures groups layers"]
    attention: Float[np.ndarray, "pictures groups blocks"]
    """Share of the attention of the text after the picture that falls on the group, of all keys."""
    attention_visual: Float[np.ndarray, "pictures blocks"]
    """The same for all visual tokens together."""
    entropy: Float[np.ndarray, "pictures groups"]
    """Nats of the LogitLens distribution at the last layer."""
    tower_norms: Float[np.ndarray, "pictures groups tower"]
    """L2 norm in the vision tower; layer 0 is its embedding."""
    tower_norms_l1: Float[np.ndarray, "pictures groups tower"]
    tower_aligned: Float[np.ndarray, "pictures groups tower"]
    """`aligned` in the vision tower."""
    tower_aligned_removed: Float[np.ndarray, "pictures groups tower"]
    tower_map: Float[np.ndarray, "pictures groups tower tower"]
    """Cosine of a patch at one layer of the tower to itself at another."""

    def __len__(self) -> int:
        return len(self.sizes)

    def of(self, name: str, group: str) -> Float[np.ndarray, pictures * rest]:
        """One measure of one group, such as `of("inside", "dead")`."""
        if group not in self.groups:
            raise EmbedLensError(f"no group {group!r}: choose one of {', '.join(self.groups)}")
        values: np.ndarray = getattr(self, name)
        return values[:, self.groups.index(group)].astype(np.float64)

    def has(self, group: str, least: int = 1) -> bool:
        """Whether some picture has at least so many tokens of the group."""
        return bool((self.of("sizes", group) >= least).any())

    def share(self, group: str) -> Float[np.ndarray, " pictures"]:
        """The group's share of the picture's visual tokens."""
        return self.of("sizes", group) / (self.of("sizes", "dead") + self.of("sizes", "remaining"))

    def attention_of_visual(self, group: str) -> Float[np.ndarray, "pictures blocks"]:
        """Share of the attention on visual tokens that falls on the group."""
        return self.of("attention", group) / self.attention_visual

    def attention_per_token(self, group: str) -> Float[np.ndarray, "pictures blocks"]:
        """Attention that a token of the group gets on average, of all keys."""
        sizes = self.of("sizes", group)[:, None]
        return np.where(sizes > 0, self.of("attention", group) / np.maximum(sizes, 1), np.nan)


def arms(groups: TokenGroups, norms: Float[Tensor, " n"], seed: int | Sequence[int]) -> dict[str, Bool[Tensor, " n"]]:
    """The masks of ARMS for one picture.

    Args:
        norms: of the patches at the tower's last layer.
        seed: of the random tokens; make it differ from picture to picture.
    """
    drawn = torch.zeros_like(groups.dead)
    order = np.random.default_rng(seed).permutation(len(drawn))
    drawn[torch.from_numpy(order[: int(groups.dead.sum())])] = True
    highest = torch.zeros_like(groups.dead)
    highest[norms.float().cpu().topk(min(HIGHEST, len(norms))).indices] = True
    return {**groups.named, "remaining": ~groups.dead, "random": drawn, "highest norm": highest}


def common(
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    reference: Reference,
    membership: str = "top3",
    batch_size: int = 8,
) -> Common:
    """Means of all visual tokens and of each group, layer by layer; memory does not grow with the pictures.

    Args:
        samples: other pictures than those that will be held against it.
        reference, membership: as for `token_groups`.

    Raises:
        EmbedLensError: no samples.
    """
    sums: dict[str, Tensor] = {}
    tower_sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    pictures = 0
    for prompts, found, tower in _batches(model, samples, reference, membership, batch_size):
        streams = model.hidden_states_of(prompts, batch_size)
        for i, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
            masks = arms(found[i], tower[i][-1].norm(dim=-1), (0, pictures + i))
            masks["all"] = torch.ones_like(found[i].dead)
            members = torch.stack(list(masks.values())).to(stream.device).float()
            by_layer = members @ normalize(stream[:, prompt.visual].float(), dim=-1)  # [layers, groups, d]
            by_tower = members @ normalize(tower[i].float(), dim=-1)
            for column, (name, mask) in enumerate(masks.items()):
                sums[name] = sums.get(name, 0) + by_layer[:, column].double()
                tower_sums[name] = tower_sums.get(name, 0) + by_tower[:, column].double()
                counts[name] = counts.get(name, 0) + int(mask.sum())
        pictures += len(prompts)
    if not pictures:
        raise EmbedLensError("no samples: pass at least one picture to take means of")
    kept = [name for name, count in counts.items() if count]
    means = {name: (sums[name] / counts[name]).float() for name in kept}
    tower_means = {name: (tower_sums[name] / counts[name]).float() for name in kept}
    return Common(pictures, means.pop("all"), tower_means.pop("all"), means, tower_means)


def group_study(
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    reference: Reference,
    shared: Common,
    membership: str = "top3",
    seed: int = 0,
    batch_size: int = 8,
) -> GroupStudy:
    """Measure every group in every picture, at every layer: one forward pass a picture, of which numbers are kept.

    Args:
        model: from `embedlens.load`.
        samples: pictures; read one batch at a time.
        reference, membership: as for `token_groups`.
        shared: from `common`, on other pictures.
        seed: of the random tokens, together with the place of the picture.

    Raises:
        EmbedLensError: no samples, or a model that puts no text after the picture.
    """
    lens, reader = EmbedLens.from_model(model), LogitLens.from_model(model)
    words = torch.tensor([is_word(entry) for entry in model.tokens])
    rows: list[dict[str, np.ndarray]] = []
    for prompts, found, tower in _batches(model, samples, reference, membership, batch_size):
        named = [arms(groups, tower[i][-1].norm(dim=-1), (seed, len(rows) + i)) for i, groups in enumerate(found)]
        masks = [
            {
                name: prompt.spread(mask)
                for name, mask in (named[i] | {"all": torch.ones_like(named[i]["dead"])}).items()
            }
            for i, prompt in enumerate(prompts)
        ]
        for i, trace in enumerate(traces(model, prompts, masks, batch_size)):
            rows.append(_of_stream(prompts[i], trace, named[i], shared, lens, reader, words))
            rows[-1] |= _of_tower(tower[i], named[i], shared)
    if not rows:
        raise EmbedLensError("no samples: pass at least one picture")
    return GroupStudy(groups=ARMS, **{name: np.stack([row[name] for row in rows]) for name in rows[0]})


def _batches(
    model: VisionLanguageModel, samples: Iterable[Sample], reference: Reference, membership: str, batch_size: int
) -> Iterator[tuple[list[Prompt], list[TokenGroups], list[Float[Tensor, "tower n v"]]]]:
    stream = readable(samples)
    while batch := list(islice(stream, batch_size)):
        prompts = model.prompts([sample.image for sample in batch], [QUESTION] * len(batch))
        yield (
            prompts,
            token_groups_of(model, prompts, reference, membership, batch_size=batch_size),
            model.tower_states_of(prompts),
        )


def _of_stream(
    prompt: Prompt,
    trace: Trace,
    named: Mapping[str, Bool[Tensor, " n"]],
    shared: Common,
    lens: EmbedLens,
    reader: LogitLens,
    words: Bool[Tensor, " V"],
) -> dict[str, np.ndarray]:
    """What the language model says of one picture's groups."""
    members = torch.stack([named[name] for name in ARMS])
    states = trace.stream[:, prompt.visual].float()
    units = normalize(states, dim=-1)
    centred = normalize(units - shared.center.to(units.device)[:, None], dim=-1)
    nearest = lens.topk(states[0], 1)[1][:, 0].cpu()
    asking = torch.arange(len(prompt)) > int(prompt.visual.nonzero()[-1])
    if not bool(asking.any()):
        raise EmbedLensError("no text stands after the picture, so nothing reads it: use a chat format that asks")
    mass = {name: share[:, asking.to(share.device)].mean(-1) for name, share in trace.attention.items()}
    values = {
        "sizes": members.sum(-1),
        "in_bars": group_means(prompt.grid.padded.float(), members),
        "no_words": group_means((~words[nearest]).float(), members),
        "inside": pairwise_cosine(units, members).T,
        "inside_removed": pairwise_cosine(centred, members).T,
        "kept": group_means((units[:-1] * units[1:]).sum(-1), members).T,
        "aligned": _aligned(units, members, shared.direction, None),
        "aligned_removed": _aligned(centred, members, shared.direction, shared.center),
        "attention": torch.stack([mass[name] for name in ARMS]),
        "attention_visual": mass["all"],
        "entropy": group_means(entropy(reader.scores(states[-1])), members),
    }
    return {name: value.cpu().numpy() for name, value in values.items()}


def _of_tower(
    states: Float[Tensor, "tower n v"], named: Mapping[str, Bool[Tensor, " n"]], shared: Common
) -> dict[str, np.ndarray]:
    """What the vision tower says of one picture's groups."""
    members = torch.stack([named[name] for name in ARMS])
    units = normalize(states.float(), dim=-1)
    centred = normalize(units - shared.tower_center.to(units.device)[:, None], dim=-1)
    values = {
        "tower_norms": group_means(states.float().norm(dim=-1), members).T,
        "tower_norms_l1": group_means(states.float().abs().sum(-1), members).T,
        "tower_aligned": _aligned(units, members, shared.tower_direction, None),
        "tower_aligned_removed": _aligned(centred, members, shared.tower_direction, shared.tower_center),
        "tower_map": group_means(layer_cosines(states), members).permute(2, 0, 1),
    }
    return {name: value.cpu().numpy() for name, value in values.items()}


def _aligned(
    units: Float[Tensor, "layers n d"],
    members: Bool[Tensor, "groups n"],
    directions: Mapping[str, Float[Tensor, "layers d"]],
    center: Float[Tensor, "layers d"] | None,
) -> Float[Tensor, "groups layers"]:
    """Mean cosine of each group's tokens to its direction, less the centre if there is one."""
    found = []
    for name, mask in zip(ARMS, members, strict=True):
        if name not in directions:
            found.append(torch.full(units.shape[:1], torch.nan))
            continue
        direction = directions[name] if center is None else directions[name] - center
        cosines = (units @ normalize(direction.to(units.device), dim=-1)[..., None])[..., 0]
        found.append(group_means(cosines, mask[None])[:, 0].cpu())
    return torch.stack(found)


def halves(d: int, splits: int = 3, seed: int = 0) -> list[tuple[Int[Tensor, " a"], Int[Tensor, " b"]]]:
    """Random halves of the coordinates, each once as the half to select on and once as the other.

    >>> [(a.tolist(), b.tolist()) for a, b in halves(2, splits=1)]
    [([0], [1]), ([1], [0])]
    """
    found = []
    for split in range(splits):
        order = torch.from_numpy(np.random.default_rng((seed, split)).permutation(d))
        one, other = order[: d // 2].sort().values, order[d // 2 :].sort().values
        found += [(one, other), (other, one)]
    return sorted(found, key=lambda pair: pair[0].tolist())


#: Columns of `selection_study`.
SELECTION = ("selected on", "other half", "other half, mean removed", "any tokens", "any tokens, mean removed")


def selection_study(
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    reference: Reference,
    shared: Common,
    membership: str = "top3",
    splits: int = 3,
    seed: int = 0,
    batch_size: int = 16,
) -> Float[np.ndarray, "pictures 5"]:
    """Is a dead token's likeness to the others a result of how it was chosen? Choose on half, measure on the rest.

    Dead tokens are chosen at layer 0 by their direction, so that they are alike there by construction. Here they are
    chosen by a random half of the coordinates, and their pairwise cosine is taken on the *other* half.

    Returns:
        Mean over splits, one column per name of SELECTION; nan where no two tokens are chosen.

    Raises:
        EmbedLensError: no samples.
    """
    rows = model.input_embeddings
    columns = [(a.to(rows.device), b.to(rows.device)) for a, b in halves(model.width, splits, seed)]
    lenses = [EmbedLens(rows[:, chosen], model.tokens) for chosen, _ in columns]
    center = shared.center[0].to(rows.device)
    found: list[Float[np.ndarray, " columns"]] = []
    stream = readable(samples)
    while batch := list(islice(stream, batch_size)):
        for tokens in map(torch.Tensor.float, model.visual_features_of([s.image for s in batch], batch_size)):
            each = []
            for (chosen, rest), lens in zip(columns, lenses, strict=True):
                if membership == "cluster":
                    dead = anchor_clusters(tokens[:, chosen], reference.threshold) == 0
                else:
                    dead = near_word(tokens[:, chosen], lens, reference.dead_id)
                masks = torch.stack([dead, torch.ones_like(dead)])
                whole = normalize(tokens, dim=-1)
                one = pairwise_cosine(tokens[:, chosen], masks)
                other = pairwise_cosine(tokens[:, rest], masks)
                removed = pairwise_cosine((whole - center)[:, rest], masks)
                each.append(torch.stack([one[0], other[0], removed[0], other[1], removed[1]]))
            values = torch.stack(each).double().cpu().numpy()
            there = ~np.isnan(values).any(1)
            found.append(values[there].mean(0) if there.any() else np.full(len(SELECTION), np.nan))
    if not found:
        raise EmbedLensError("no samples: pass at least one picture")
    return np.stack(found)
