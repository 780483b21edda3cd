"""The redundancy codebook: visual tokens that say nothing and that nothing misses, and what is near them.

Identify, probe, prune (2503.20540 and its released code): `build` finds tokens of low confidence alone and low cascade
divergence, rare within their picture, whose like recurs over many pictures; `Codebook.redundancy` is a token's largest
cosine to one of these prototypes; of the least redundant tokens `keep_lowest` leaves a fixed number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from embedlens.errors import EmbedLensError
from embedlens.readings import Protocol
from embedlens.redundancy import LLAVA_RMS, TokenScores, dpc_knn, place_of

if TYPE_CHECKING:
    from embedlens.vlm import VisionLanguageModel
else:
    VisionLanguageModel = object

FORMAT = "embedlens codebook 1"
COLUMNS = ("image_ids", "patches", "probability", "region", "picture", "clusters")


@dataclass(frozen=True)
class Thresholds:
    """A token below both is a candidate."""

    probability: float
    divergence: float


def quantile_thresholds(
    scores: Sequence[TokenScores], probability: float = 0.2, divergence: float = 0.3, variant: str = "released"
) -> Thresholds:
    """The values below which these shares of a model's tokens lie. Not the paper's, which has thresholds by hand for
    four models (released: 0.077 to 0.15, and 0.0018 or 0.002)."""
    if not scores or not (0 < probability <= 1 and 0 < divergence <= 1):
        what = f"{len(scores)} pictures, shares {probability} and {divergence}"
        raise EmbedLensError(f"{what}: pass at least one picture, shares above 0 up to 1")
    values = zip(*((score.probability, score.cascade(variant)) for score in scores), strict=True)
    shares = (torch.cat(part).double().quantile(at) for part, at in zip(values, (probability, divergence), strict=True))
    return Thresholds(*map(float, shares))


@dataclass(frozen=True)
class Recipe:
    """What `build` asks of a prototype. The numbers are the release's for LLaVA-1.5; shares scale to fewer pictures."""

    picture_clusters: int = 8
    #: Largest cluster of its own picture that a prototype may belong to: tokens, or as a float a share of those scored
    most_in_picture: int | float = 8
    clusters: int = 64  #: Over all pictures
    #: A cluster stays if it has members from more pictures than this, or as a float than this share of the pictures:
    #: the condition of context independence
    more_pictures: int | float = 64
    variant: str = "released"
    neighbours: int = 5
    rms: float | None = None  #: Unit of the tokens while they are clustered; see `dpc_knn`

    def __post_init__(self) -> None:
        place_of(self.variant)
        for name in ("most_in_picture", "more_pictures"):
            value = getattr(self, name)
            if value < 0 or (isinstance(value, float) and value > 1):
                raise EmbedLensError(f"{name} is {value}: pass a count, or a share from 0.0 to 1.0")


#: The release's recipe for any number of pictures: its counts as shares, its tokens' unit.
AS_SHARES = Recipe(most_in_picture=8 / 96, more_pictures=64 / 500, rms=LLAVA_RMS)


class Stages(NamedTuple):
    """How many tokens each step of `build` leaves."""

    scored: int
    candidates: int  #: Below both thresholds
    rare: int  #: Of them, those in a small cluster of their picture
    codebook: int  #: Of these, those whose cluster recurs over enough pictures


@dataclass(frozen=True, eq=False)
class Codebook:
    """Redundant prototypes as they left the projector, with where each comes from."""

    prototypes: Float[Tensor, "n d"]
    image_ids: Int[Tensor, " n"]
    patches: Int[Tensor, " n"]  #: Place in its picture; -1: not known
    probability: Float[Tensor, " n"]
    region: Float[Tensor, " n"]
    picture: Float[Tensor, " n"]
    clusters: Int[Tensor, " n"]
    model: str
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.prototypes)
        if self.prototypes.ndim != 2 or not n:
            raise EmbedLensError("the codebook is empty: raise the thresholds, or lower Recipe.more_pictures")
        for name in COLUMNS:
            if (shape := tuple(getattr(self, name).shape)) != (n,):
                raise EmbedLensError(f"{name} has shape {shape}: one entry a prototype ({n})")
        if not bool((self.prototypes.float().norm(dim=-1) > 0).all()):
            raise EmbedLensError("a prototype has length zero, which is like nothing: leave it out")

    def __len__(self) -> int:
        return len(self.prototypes)

    def check(self, model: VisionLanguageModel) -> None:
        """Refuse another model's codebook: its directions mean nothing here, even where the width agrees."""
        self._same(model.name, model.width, "build one for this model")

    def redundancy(self, tokens: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Largest cosine to a prototype; a token of length zero has 0."""
        return self.cosines(tokens).amax(-1)

    def cosines(self, tokens: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch n"]:
        """Cosine to every prototype."""
        if tokens.shape[-1] != self.prototypes.shape[1]:
            widths = f"tokens of width {tokens.shape[-1]}, a codebook of width {self.prototypes.shape[1]}"
            raise EmbedLensError(f"{widths}: use the model's own codebook")
        prototypes = functional.normalize(self.prototypes.float().to(tokens.device), dim=-1)
        return functional.normalize(tokens.float(), dim=-1) @ prototypes.T

    def double_softmax(self, tokens: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """The released score for OneVision: softmax over tokens times softmax over prototypes, largest per token."""
        cosines = self.cosines(tokens)
        return (cosines.softmax(0) * cosines.softmax(1)).amax(-1)

    def _same(self, model: str, width: int, instead: str) -> None:
        own = (self.model, self.prototypes.shape[1])
        if own != (model, width):
            kinds = "of {} (width {}), not of {} (width {})".format(*own, model, width)
            raise EmbedLensError(f"the codebook is {kinds}: {instead}")

    def extend(self, other: Codebook) -> Codebook:
        """Both codebooks' prototypes, without any training; another model's are refused."""
        self._same(other.model, other.prototypes.shape[1], "extend one with another of the same model")
        parts = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in ("prototypes", *COLUMNS)}
        parts["clusters"] = torch.cat([self.clusters, other.clusters + int(self.clusters.max()) + 1])
        provenance = {**self.provenance, "extended_with": json.dumps(other.provenance, sort_keys=True)}
        return replace(self, **parts, provenance=provenance)

    def write(self, file: Path | str) -> None:
        """As safetensors: half-precision prototypes, where each comes from, and how they were found."""
        from safetensors.torch import save_file

        tensors = {"prototypes": self.prototypes.half().contiguous()}
        tensors |= {name: getattr(self, name).contiguous() for name in COLUMNS}
        about = {"format": FORMAT, "model": self.model, "provenance": json.dumps(self.provenance, sort_keys=True)}
        save_file(tensors, str(file), metadata=about)

    @classmethod
    def read(cls, file: Path | str, model: VisionLanguageModel | None = None) -> Codebook:
        """What `write` wrote; if a model is given, a codebook of another one is refused."""
        from safetensors import SafetensorError, safe_open

        if not Path(file).is_file():
            raise EmbedLensError(f"no codebook at {file}: write one with build(...)[0].write(file)")
        try:
            with safe_open(str(file), framework="pt") as opened:
                about = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
        except SafetensorError as error:
            raise EmbedLensError(f"{file} is no safetensors file: write the codebook again ({error})") from None
        if about.get("format") != FORMAT or set(tensors) != {"prototypes", *COLUMNS}:
            raise EmbedLensError(f"{file} is no codebook of this version: write it again")
        tensors["prototypes"] = tensors["prototypes"].float()
        found = cls(**tensors, model=about["model"], provenance=json.loads(about["provenance"]))
        if model is not None:
            found.check(model)
        return found


def build(
    model: VisionLanguageModel,
    tokens: Sequence[Float[Tensor, "_ d"]],
    scores: Sequence[TokenScores],
    image_ids: Sequence[int],
    thresholds: Thresholds,
    recipe: Recipe | None = None,
    protocol: Protocol | None = None,
) -> tuple[Codebook, Stages]:
    """The codebook that some scored pictures give; EmbedLensError names the step at which no token is left.

    In every picture, all scored tokens are clustered; candidates, strictly below both thresholds, stay if their cluster
    is small. What stays of all pictures is clustered, and clusters that span enough different pictures are kept whole.
    `tokens` are all of each picture as they leave the projector, `scores` its `token_scores` by `protocol`; the same
    `image_ids` are the same picture. `recipe`: by default the release's for LLaVA-1.5.
    """
    recipe = recipe or Recipe()
    if not len(tokens) == len(scores) == len(image_ids) or not len(tokens):
        what = f"{len(tokens)} pictures' tokens, {len(scores)} scores, {len(image_ids)} ids"
        raise EmbedLensError(f"{what}: pass one each, at least one")
    kept: list[list[Tensor]] = []
    candidates, at, most = 0, place_of(recipe.variant), recipe.most_in_picture
    for every, score, image_id in zip(tokens, scores, image_ids, strict=True):
        sampled = every.detach().float().cpu()[score.places]
        low = (score.probability < thresholds.probability) & (score.cascade(recipe.variant) < thresholds.divergence)
        candidates += int(low.sum())
        labels = dpc_knn(sampled, recipe.picture_clusters, recipe.neighbours, recipe.rms)
        sizes = labels.bincount()[labels]
        keep = low.cpu() & (sizes <= (most * len(sampled) if isinstance(most, float) else most))
        own = (score.places, score.probability, score.region[:, at], score.picture[:, at])
        kept.append([part.cpu()[keep] for part in (sampled, torch.full((len(sampled),), int(image_id)), *own)])
    pool, ids, *found = (torch.cat(parts) for parts in zip(*kept, strict=True))
    if not candidates:
        raise EmbedLensError(f"no token is below both thresholds ({thresholds}): raise them, or take quantiles")
    if not len(pool):
        raise EmbedLensError(
            f"all {candidates} candidates lie in clusters of their picture beyond Recipe.most_in_picture = "
            f"{recipe.most_in_picture}: raise it"
        )
    # clusters over all pictures: an eighth of the pool where it is small
    labels = dpc_knn(pool, max(1, min(recipe.clusters, len(pool) // 8)), recipe.neighbours, recipe.rms)
    bar = recipe.more_pictures * (len(set(image_ids)) if isinstance(recipe.more_pictures, float) else 1)
    spans = torch.tensor([len(ids[labels == label].unique()) for label in range(int(labels.max()) + 1)])
    keep = (spans > bar)[labels]
    if not bool(keep.any()):
        what = f"no cluster of the {len(pool)} tokens left spans more than {recipe.more_pictures} pictures"
        raise EmbedLensError(f"{what}: lower Recipe.more_pictures, or score more pictures")
    provenance = {"pictures": str(len(image_ids)), "recipe": repr(recipe), "protocol": repr(protocol)}
    provenance["thresholds"] = f"{thresholds.probability:.6g} {thresholds.divergence:.6g}"
    columns = {name: part[keep] for name, part in zip(COLUMNS, (ids, *found, labels), strict=True)}
    book = Codebook(pool[keep], **columns, model=model.name, provenance=provenance)
    return book, Stages(sum(len(score.places) for score in scores), candidates, len(pool), len(book))


def keep_lowest(values: Float[Tensor, " n"], budget: int) -> Bool[Tensor, " n"]:
    """The `budget` tokens of lowest value; ties go to the lower place.

    >>> keep_lowest(torch.tensor([0.5, 0.1, 0.5, 0.9]), 2).tolist()
    [True, True, False, False]
    """
    checked_budget(budget, len(values))
    return values.float().cpu().argsort(stable=True).argsort() < budget


def checked_budget(budget: int, n: int) -> int:
    """The budget, if a picture of n tokens has it."""
    if not 1 <= budget <= n:
        raise EmbedLensError(f"the budget is {budget} of {n} visual tokens: keep at least 1 and at most {n}")
    return budget
