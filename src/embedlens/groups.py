"""Sink, dead and alive visual tokens: how a model's groups are found, and which token belongs to which.

`discover` looks at some pictures and writes down what tells the groups apart (Sections 4.1, 4.2 and 5.1 of the paper),
`token_groups` applies it. What stands out is judged by one rule: Tukey's outer fence on a log scale, three
interquartile ranges above the third quartile. Where nothing does, the group is empty, and `Reference.notes` says so.
For LLaVA-1.5-7B the paper found norm 75, phi 20 in dimensions 1415 and 2533, and the reference ids 1141 (ViT sinks),
26673 (LLM sinks) and 30296 (dead).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn.functional import normalize

from embedlens.batches import in_batches
from embedlens.clusters import anchor_clusters, centroids, text_centroid
from embedlens.errors import EmbedLensError
from embedlens.lenses import EmbedLens
from embedlens.prompts import looked_at
from embedlens.samples import Sample, calibration, photographs, readable
from embedlens.vlm import Prompt, VisionLanguageModel

MEMBERSHIPS = ("top3", "centroid")
RARE = 0.001  # a share of tokens below this is no group
CALIBRATION = 64  # pictures, where none are given
WORDS = 3  # nearest words that count in the released code's membership


@dataclass(frozen=True)
class Reference:
    """What tells the groups of one model apart, as `discover` found it."""

    model: str
    width: int
    n_words: int  #: Width of the residual stream and size of the vocabulary, to refuse another model's
    n_pictures: int
    threshold: float  #: Cosine of the anchor clusters
    vit_norm: float | None  #: A patch of larger L2 norm at the tower's last layer is a ViT sink; None: none stands out
    sink_dims: tuple[int, ...]  #: Dimensions of the residual stream that the first token excites; empty: none
    sink_layer: int | None  #: Index into `model.hidden_states` from which on it does
    phi_threshold: float | None
    dead_id: int | None  #: Nearest word of the centroid of the largest text-distant cluster, in most pictures
    vit_sink_id: int | None
    llm_sink_id: int | None
    notes: Mapping[str, str] = field(default_factory=dict)  #: Group → how it was found, or why there is none


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """Every visual token of one picture in exactly one group."""

    vit_sink: Bool[Tensor, " n"]
    llm_sink: Bool[Tensor, " n"]
    dead: Bool[Tensor, " n"]
    alive: Bool[Tensor, " n"]
    #: Group → tokens that meet its definition, before precedence decides; these may overlap
    met: Mapping[str, Bool[Tensor, " n"]] = field(repr=False)
    #: Tokens whose patch shows some of an object's box, where the boxes are known: `sweep.run_arms` adds them
    on_things: Bool[Tensor, " n"] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not bool((torch.stack(list(self.named.values())).sum(0) == 1).all()):
            raise EmbedLensError("the groups overlap or leave tokens out: build them with token_groups")

    @property
    def named(self) -> dict[str, Bool[Tensor, " n"]]:
        """Group names of the book's palette → masks."""
        return {"alive": self.alive, "dead": self.dead, "ViT sink": self.vit_sink, "LLM sink": self.llm_sink}

    @property
    def sink(self) -> Bool[Tensor, " n"]:
        """Sinks of either kind."""
        return self.vit_sink | self.llm_sink

    @property
    def names(self) -> list[str]:
        """The group of each token."""
        return [next(name for name, mask in self.named.items() if mask[i]) for i in range(len(self.alive))]


def fence(values: Shaped[np.ndarray, " n"]) -> float:
    """Tukey's outer fence on a log scale: what lies beyond it stands out from the bulk.

    Source: Tukey, Exploratory Data Analysis (1977), section 2D. Of log-normal values one in 400,000 lies beyond.

    >>> round(fence(np.exp(np.array([0.0, 1.0, 2.0, 3.0]))) / np.e**6.75, 6)
    1.0
    """
    if not len(values):
        raise EmbedLensError("no values: pass at least one")
    logs = np.log(np.maximum(np.asarray(values, dtype=np.float64), 1e-12))
    first, third = np.quantile(logs, [0.25, 0.75])
    return float(np.exp(third + 3 * (third - first)))


def ratios(h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """|x_i| over the root mean square of x: how far each dimension stands out within its own vector, at most √d."""
    scale = h.float().pow(2).mean(-1, keepdim=True).sqrt()
    return h.float().abs() / torch.where(scale > 0, scale, 1.0)


def ratio_fence(largest: Shaped[np.ndarray, " n"], width: int) -> float:
    """`fence` of tokens' largest |x|/RMS, in the same unit and below its end, √width; 1 at width 1, where all are 1.

    The fence is that of |x_i| over the RMS of the *other* dimensions, which has no end.

    >>> ratio_fence(np.array([11.0, 12.0, 13.0, 14.0]), 576) < 24 < fence(np.array([9.0, 12.0, 13.0, 16.0]))
    True
    >>> ratio_fence(np.ones(3), width=1)
    1.0
    """
    if width == 1:
        return 1.0
    largest = np.asarray(largest, dtype=np.float64)
    rest = np.maximum((width - largest**2) / (width - 1), 1e-12)
    beyond = fence(largest / np.sqrt(rest))
    return float(beyond * np.sqrt(width / (width - 1 + beyond**2)))


def phi(h: Float[Tensor, "*batch d"], dims: Sequence[int]) -> Float[Tensor, "*batch"]:
    """How strongly a vector excites the sink dimensions: the largest |x_i| / RMS(x) among them.

    Section 4.2 of the paper, whose printed formula has its bars misplaced. Zero where there are no such dimensions.

    >>> phi(torch.tensor([[3.0, 4.0, 0.0, 0.0]]), [1]).tolist()
    [1.600000023841858]
    """
    if not len(dims):
        return h.new_zeros(h.shape[:-1], dtype=torch.float32)
    if not all(0 <= index < h.shape[-1] for index in dims):
        raise EmbedLensError(f"sink dimensions {tuple(dims)} of vectors of width {h.shape[-1]}: pass 0 to width - 1")
    return ratios(h)[..., list(dims)].amax(-1)


def discover(
    model: VisionLanguageModel, samples: Iterable[Sample] | None = None, threshold: float = 0.9, batch_size: int = 8
) -> Reference:
    """Find what tells this model's sink, dead and alive tokens apart; fewer than one token in a thousand are no group.

    1. ViT sinks: L2 norms at the tower's last layer, pooled over pictures; the threshold is their `fence`.
    2. LLM sinks: at each layer, the `ratio_fence` of every other token's largest |x|/RMS. A dimension is a sink
       dimension if the *first* token of the sequence lies beyond it there in at least half of the layers from the first
       to the last but one. The threshold of phi is halfway, on a log scale, between the median token and the first one.
    3. Dead: in every picture, the largest anchor cluster whose centroid lies further from the words' centroid than
       the picture's other tokens do; its nearest word. The reference word is the one of most pictures; if no word is
       found in half of them, there is none.

    `samples` are pictures to look at; default: 64 training pictures of the miniature world.
    """
    if samples is None:
        samples = calibration("miniworld", CALIBRATION, scale=max(1.0, model.canvas_side / 112))
    samples = list(readable(samples))
    if len(samples) < 2:
        raise EmbedLensError(f"{len(samples)} pictures: what tells groups apart needs at least two, better 50")
    lens, words = EmbedLens.from_model(model), text_centroid(model)
    norms: list[Float[np.ndarray, " n"]] = []
    largest: list[Float[np.ndarray, "layers m"]] = []
    first = np.zeros(0)
    distant: list[tuple[int, int] | None] = []
    for _, prompts in looked_at(model, samples, batch_size):
        norms += [states[-1].float().norm(dim=-1).cpu().numpy() for states in model.tower_states_of(prompts)]
        for prompt, states in zip(prompts, model.streams_of(prompts, batch_size), strict=True):
            ratio = ratios(states).cpu()
            first = ratio[:, 0].numpy()  # the same for every picture: nothing stands before it
            at = np.linspace(0, len(prompt) - 2, 64).round().astype(int)  # as many in every prompt, so that they stack
            largest.append(ratio[:, 1:].amax(-1).numpy()[:, at])
            tokens = prompt.embeds[prompt.visual].float()
            inside = text_distant_cluster(tokens, words, threshold)
            nearest = lens.topk(normalize(tokens[inside], dim=-1).mean(0, keepdim=True), 1)[1] if inside.any() else None
            distant.append(None if nearest is None else (int(nearest), int(inside.sum())))
    notes: dict[str, str] = {}
    vit_norm, notes["ViT sink"] = _vit_norm(np.concatenate(norms))
    dims, layer, phi_threshold, notes["LLM sink"] = sink_dims(first, np.stack(largest))
    dead_id, notes["dead"] = _dead_id(distant, model.tokens)
    found = vit_norm, dims, layer, phi_threshold, dead_id
    measured = Reference(model.name, model.width, len(model.tokens), len(samples), threshold, *found, None, None, notes)
    return _with_words(measured, model, samples, lens, batch_size)


def _with_words(
    measured: Reference, model: VisionLanguageModel, samples: Sequence[Sample], lens: EmbedLens, batch_size: int
) -> Reference:
    """The nearest words of the sinks' mean directions, which a second look at the pictures gives."""
    if measured.vit_norm is None and not measured.sink_dims:
        return measured
    sums, counts = torch.zeros(2, model.width), [0, 0]
    for _, prompts in looked_at(model, samples, batch_size):
        for kind, masks in enumerate(_sinks(model, prompts, measured)):
            for prompt, mask in zip(prompts, masks, strict=True):
                rows = prompt.embeds[prompt.visual][mask.to(prompt.embeds.device)].float().cpu()
                sums[kind] += normalize(rows, dim=-1).sum(0)
                counts[kind] += len(rows)
    vit, llm = (int(lens.topk(total[None], 1)[1]) if n else None for total, n in zip(sums, counts, strict=True))
    return replace(measured, vit_sink_id=vit, llm_sink_id=llm)


def _vit_norm(norms: Float[np.ndarray, " patches"]) -> tuple[float | None, str]:
    border = fence(norms)
    share = float((norms > border).mean())
    return border if share >= RARE else None, (
        f"{share:.2%} of the patches have a norm beyond the outer fence of {border:.1f} at the tower's last layer "
        f"(largest {norms.max():.1f}, median {np.median(norms):.1f}); {RARE:.1%} are needed."
    )


def sink_dims(
    of_first: Float[np.ndarray, "layers d"], largest: Float[np.ndarray, "pictures layers m"]
) -> tuple[tuple[int, ...], int | None, float | None, str]:
    """(dimensions, first layer, threshold of phi, how)."""
    n = len(of_first)
    fences = np.array([ratio_fence(largest[:, layer].ravel(), of_first.shape[1]) for layer in range(n)])
    middle, beyond = slice(1, max(2, n - 1)), of_first > fences[:, None]
    dims = np.flatnonzero(beyond[middle].mean(0) >= 0.5)
    if not len(dims):
        top = int(of_first[middle].max(0).argmax())
        at = int(of_first[middle, top].argmax()) + 1
        what = "The first token excites no dimension beyond what other tokens do: its largest |x|/RMS is "
        what += f"{of_first[at, top]:.1f} (dimension {top}, layer {at}), their outer fence there {fences[at]:.1f}."
        return (), None, None, what
    dims = dims[np.argsort(-of_first[middle][:, dims].mean(0), kind="stable")][:4]
    layer = int(np.flatnonzero(beyond[:, dims].any(1) & (np.arange(n) > 0))[0])
    of_bos = float(of_first[layer:, dims].max(1)[: max(1, n - 1 - layer)].mean())
    usual = float(np.median(largest[:, layer : max(layer + 1, n - 1)]))
    found = tuple(map(int, dims))
    how = f"From layer {layer} on the first token excites {', '.join(map(str, found))}: phi {of_bos:.1f}, where the "
    return found, layer, float(np.sqrt(of_bos * usual)), f"{how}median token's largest |x|/RMS is {usual:.1f}."


def text_distant_cluster(
    tokens: Float[Tensor, "n d"], words: Float[Tensor, " d"], threshold: float = 0.9
) -> Bool[Tensor, " n"]:
    """The largest anchor cluster of a picture, of two tokens or more, that lies further from words than its other
    tokens do; may be empty. `words` is the model's `clusters.text_centroid`."""
    labels = anchor_clusters(tokens.float(), threshold)
    to_words = normalize(tokens.float(), dim=-1) @ words.to(tokens.device)
    for cluster in range(int((labels.bincount() > 1).sum())):  # largest first
        inside = labels == cluster
        if bool(inside.all()) or to_words[inside].mean() < to_words[~inside].mean():
            return inside
    return torch.zeros_like(labels, dtype=torch.bool)


def _dead_id(distant: Sequence[tuple[int, int] | None], tokens: Sequence[str]) -> tuple[int | None, str]:
    found = [one for one in distant if one is not None]
    if not found:
        return None, "No picture has a cluster that lies further from words than its other tokens do."
    votes = Counter(word for word, _ in found)
    word, count = min(votes.items(), key=lambda item: (-item[1], item[0]))
    note = (
        f"The largest text-distant cluster (median {np.median([size for _, size in found]):.0f} tokens) is nearest to "
        f"{tokens[word]!r} (id {word}) in {count / len(distant):.0%} of {len(distant)} pictures; half are needed."
    )
    return word if count >= len(distant) / 2 else None, note


_REFERENCES: WeakKeyDictionary[VisionLanguageModel, dict[tuple[str, int] | None, Reference]] = WeakKeyDictionary()


def reference_of(model: VisionLanguageModel, dataset: str = "miniworld", seed: int = 0) -> Reference:
    """`discover` in pictures of a data set, once per model: in photographs where photographs are measured, else in
    training pictures of the miniature world. `dataset` and `seed` are those of `embedlens.samples.calibration`."""
    known, key = _REFERENCES.setdefault(model, {}), (dataset, seed) if photographs(dataset) else None
    if key not in known:
        known[key] = discover(model, None if key is None else calibration(dataset, CALIBRATION, seed))
    return known[key]


def token_groups(
    model: VisionLanguageModel, prompt: Prompt, reference: Reference | None = None, membership: str = "top3"
) -> TokenGroups:
    """Which visual token of a picture is sink, dead or alive, by a reference from `discover`; default:
    `reference_of(model)`.

    A token is dead if the reference word is among its three nearest words (membership "top3", as in the released code),
    or if it lies in a cluster whose centroid is nearest to that word ("centroid", as the paper says).
    """
    return token_groups_of(model, [prompt], reference, membership)[0]


def token_groups_of(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    reference: Reference | None = None,
    membership: str = "top3",
    batch_size: int = 8,
) -> list[TokenGroups]:
    """`token_groups` of several prompts, run together."""
    reference = reference_of(model) if reference is None else reference
    if membership not in MEMBERSHIPS:
        raise EmbedLensError(f"unknown membership {membership!r}: use one of {', '.join(MEMBERSHIPS)}")
    if (reference.width, reference.n_words) != (model.width, len(model.tokens)):
        raise EmbedLensError(
            f"the reference is of {reference.model} (width {reference.width}, {reference.n_words} words), the model is "
            f"{model.name} (width {model.width}, {len(model.tokens)} words): run discover on this model"
        )
    lens = EmbedLens.from_model(model)

    def run(_: int, batch: Sequence[Prompt]) -> Iterator[TokenGroups]:
        for prompt, *sinks in zip(batch, *_sinks(model, batch, reference), strict=True):
            tokens, (vit, llm) = prompt.embeds[prompt.visual], (mask.cpu() for mask in sinks)
            dead = near_word(tokens, lens, reference.dead_id).cpu()
            if membership == "centroid" and reference.dead_id is not None:
                labels = anchor_clusters(tokens.float(), reference.threshold)
                dead = (lens.topk(centroids(tokens, labels), 1)[1][:, 0] == reference.dead_id)[labels].cpu()
            sink = llm | vit  # sinks come before dead ones
            met = {"LLM sink": llm, "ViT sink": vit, "dead": dead}
            yield TokenGroups(vit & ~llm, llm, dead & ~sink, ~(dead | sink), met)

    return list(in_batches(run, prompts, batch_size))


def near_word(tokens: Float[Tensor, "n d"], lens: EmbedLens, word: int | None) -> Bool[Tensor, " n"]:
    """Tokens that have a word among their WORDS nearest; none if there is no word."""
    return (lens.topk(tokens, WORDS)[1] == (-1 if word is None else word)).any(-1)


def _sinks(
    model: VisionLanguageModel, prompts: Sequence[Prompt], reference: Reference
) -> tuple[list[Bool[Tensor, " n"]], list[Bool[Tensor, " n"]]]:
    """ViT sinks and LLM sinks of each prompt."""
    vit = llm = [torch.zeros(len(prompt.grid), dtype=torch.bool) for prompt in prompts]
    if reference.vit_norm is not None:
        vit = [rows[-1].float().norm(dim=-1) > reference.vit_norm for rows in model.tower_states_of(prompts)]
    layer, dims = reference.sink_layer, reference.sink_dims
    if dims and layer is not None and reference.phi_threshold is not None:
        streams = zip(model.streams_of(prompts, len(prompts)), prompts, strict=True)
        llm = [phi(stream[layer, prompt.visual], dims) >= reference.phi_threshold for stream, prompt in streams]
    return vit, llm
