"""What a linear probe reads from visual tokens: content that cosines near one can hide.

Tokens whose pairwise cosine is .99 can still differ in directions that a later layer, or a probe, reads without
effort: a direction that all share adds to every cosine and takes nothing away. So a multinomial logistic regression is
trained on the tokens of some pictures and asked about the tokens of others, beside the same on projectors with random
weights (what the vision tower alone gives) and beside the most frequent answer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from PIL.Image import Image
from torch import Tensor, nn

from embedlens.errors import EmbedLensError
from embedlens.groups import QUESTION, Reference, token_groups_of
from embedlens.intervals import Interval, ratio_interval
from embedlens.patches import PatchGrid
from embedlens.samples import Sample, readable

if TYPE_CHECKING:
    from embedlens.vlm import VisionLanguageModel

#: sRGB of plain colour names, the eleven basic ones of English and cyan.
COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "red": (205, 40, 40),
    "orange": (240, 135, 35),
    "yellow": (245, 215, 55),
    "green": (50, 150, 60),
    "cyan": (70, 200, 215),
    "blue": (40, 80, 200),
    "purple": (125, 60, 165),
    "pink": (245, 145, 190),
    "brown": (130, 85, 50),
}
#: What is asked of a token: the mean colour of its patch, the object in whose box its centre lies, and, of tokens in no
#: box, the object whose box is nearest.
QUESTIONS = ("colour of the patch", "object it lies in", "nearest object beside it")
NONE = -1  # no answer: the token is left out
LEAST_TOKENS = 10  # to train on, of a class
LEAST_PICTURES = 10  # to be asked about: fewer have no interval to speak of


def patch_colours(image: Image, grid: PatchGrid) -> Int[np.ndarray, " n"]:
    """Index into COLOURS of the mean colour of the pixels that each patch shows; -1 if it shows none.

    The nearest sRGB value counts. A pixel belongs to a patch if its centre does.

    >>> from PIL import Image
    >>> from embedlens import Frame
    >>> red = Image.new("RGB", (4, 2), (200, 30, 30))
    >>> [list(COLOURS)[i] if i >= 0 else None for i in patch_colours(red, PatchGrid(2, 2, Frame.stretch(4, 2)))]
    ['red', 'red', 'red', 'red']
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    height, width = pixels.shape[:2]
    palette = np.array(list(COLOURS.values()), dtype=np.float64)
    found = np.full(len(grid), NONE)
    for index in range(len(grid)):
        if grid.padded[index]:
            continue
        x0, y0, x1, y1 = grid.box(index)
        cols = np.flatnonzero((np.arange(width) + 0.5 >= x0) & (np.arange(width) + 0.5 < x1))
        rows = np.flatnonzero((np.arange(height) + 0.5 >= y0) & (np.arange(height) + 0.5 < y1))
        if len(cols) and len(rows):
            mean = pixels[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].mean((0, 1))
            found[index] = int(((palette - mean) ** 2).sum(-1).argmin())
    return found


def patch_objects(sample: Sample, grid: PatchGrid) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """(category of the object each patch lies in, category of the nearest object of a patch that lies in none).

    A patch lies in the smallest box that holds its centre; distance is from the centre to the edge of a box. Crowds
    and patches in the bars are left out; -1 where there is no answer.
    """
    inside, beside = np.full(len(grid), NONE), np.full(len(grid), NONE)
    boxes = [(entry["category_id"], *entry["bbox"]) for entry in sample.annotations if not entry.get("iscrowd")]
    if not boxes:
        return inside, beside
    boxes.sort(key=lambda box: box[3] * box[4])
    categories = np.array([box[0] for box in boxes])
    x0, y0, w, h = np.array([box[1:] for box in boxes], dtype=np.float64).T
    x, y = grid.centres.double().numpy().T[:, :, None]
    across = np.maximum(np.maximum(x0 - x, x - (x0 + w)), 0)
    down = np.maximum(np.maximum(y0 - y, y - (y0 + h)), 0)
    covered = (x >= x0) & (x < x0 + w) & (y >= y0) & (y < y0 + h)
    within, seen = covered.any(1), ~grid.padded.numpy()
    inside[within & seen] = categories[covered.argmax(1)][within & seen]
    beside[~within & seen] = categories[np.hypot(across, down).argmin(1)][~within & seen]
    return inside, beside


def random_projector(projector: nn.Module, seed: int) -> nn.Module:
    """The same architecture with weights drawn anew, each part by its own default initialisation.

    Raises:
        EmbedLensError: a part has weights but no default initialisation.
    """
    drawn = copy.deepcopy(projector).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, part in drawn.named_modules():
            own = list(part.parameters(recurse=False))
            if not own:
                continue
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
            elif "Norm" in type(part).__name__ and [weight.ndim for weight in own] == [1]:
                nn.init.ones_(own[0])  # the gains of transformers' RMSNorms, which cannot reset themselves
            else:
                raise EmbedLensError(
                    f"{name or 'the projector'} ({type(part).__name__}) has weights but no reset_parameters: "
                    "initialise it by hand"
                )
    first = next(projector.parameters())
    return drawn.to(first.device, first.dtype).eval()


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Visual tokens of many pictures before the projector, with what is known about each."""

    before: Float[Tensor, "tokens v"]
    """Vision-tower states that the projector reads."""
    picture: Int[np.ndarray, " tokens"]
    """Number of the picture."""
    dead: Bool[np.ndarray, " tokens"]
    alive: Bool[np.ndarray, " tokens"]
    answers: Mapping[str, Int[np.ndarray, " tokens"]]
    """One of QUESTIONS → class, -1 if there is none."""

    @property
    def n_pictures(self) -> int:
        return int(self.picture.max()) + 1


def token_table(
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    reference: Reference,
    membership: str = "top3",
    per_picture: int = 48,
    seed: int = 0,
    batch_size: int = 16,
) -> TokenTable:
    """Tokens to probe: of each picture at most `per_picture` dead and as many alive ones, drawn at random.

    Raises:
        EmbedLensError: no samples.
    """
    rows: list[tuple[Tensor, np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]] = []
    for number, (sample, grid, groups, before) in enumerate(
        _pictures(model, samples, reference, membership, batch_size)
    ):
        rng = np.random.default_rng((seed, number))
        dead, alive = groups
        chosen = np.concatenate(
            [rng.permutation(np.flatnonzero(mask))[:per_picture] for mask in (dead & ~alive, alive & ~dead)]
        )
        chosen.sort()
        answers = [patch_colours(sample.image, grid), *patch_objects(sample, grid)]
        at = torch.from_numpy(chosen).to(before.device)
        rows.append(
            (
                before[at].float().cpu(),
                np.full(len(chosen), number),
                dead[chosen],
                alive[chosen],
                [of[chosen] for of in answers],
            )
        )
    if not rows:
        raise EmbedLensError("no samples: pass at least one picture")
    states, numbers, are_dead, are_alive, found = zip(*rows, strict=True)
    answers_of = {name: np.concatenate([of[i] for of in found]) for i, name in enumerate(QUESTIONS)}
    picture, dead, alive = (np.concatenate(part) for part in (numbers, are_dead, are_alive))
    return TokenTable(torch.cat(states), picture, dead, alive, answers_of)


def _pictures(
    model: VisionLanguageModel, samples: Iterable[Sample], reference: Reference, membership: str, batch_size: int
) -> Iterator[tuple[Sample, PatchGrid, tuple[np.ndarray, np.ndarray], Float[Tensor, "n v"]]]:
    stream = readable(samples)
    while batch := list(islice(stream, batch_size)):
        prompts = model.prompts([sample.image for sample in batch], [QUESTION] * len(batch))
        found = token_groups_of(model, prompts, reference, membership, batch_size=batch_size)
        read = [states[model.feature_layer] for states in model.tower_states_of(prompts)]
        for sample, prompt, groups, before in zip(batch, prompts, found, read, strict=True):
            yield sample, prompt.grid, (groups.dead.numpy(), groups.alive.numpy()), before


@torch.no_grad()
def projected(projector: nn.Module, before: Float[Tensor, "tokens v"]) -> Float[np.ndarray, "tokens d"]:
    """The tokens as a projector hands them to the language model."""
    first = next(projector.parameters())
    parts = [projector(part.to(first.device, first.dtype)).float().cpu() for part in before.split(8192)]
    return torch.cat(parts).numpy()


def projector_of(model: VisionLanguageModel) -> nn.Module:
    """The model's own projector, taking the tower's states of a token as `model.tower_states_of` gives them."""
    return model.projector


@dataclass(frozen=True, eq=False)
class Readout:
    """How often a probe is right about the tokens of pictures it was not trained on."""

    classes: tuple[int, ...]
    n_train: int
    """Tokens that the probe was trained on."""
    hits: Float[np.ndarray, " pictures"]
    """Right answers in each test picture; mean over repeats."""
    majority: Float[np.ndarray, " pictures"]
    """Right answers of always the most frequent class of the training tokens."""
    asked: Int[np.ndarray, " pictures"]
    """Tokens asked in each test picture."""

    def accuracy(self, seed: int = 0) -> Interval:
        """Share of right answers over all test tokens, bootstrap over pictures."""
        return ratio_interval(self.hits, self.asked, seed=seed)

    def baseline(self, seed: int = 0) -> Interval:
        """The same for the most frequent class."""
        return ratio_interval(self.majority, self.asked, seed=seed)

    def gain(self, over: Readout | None = None, seed: int = 0) -> Interval:
        """Accuracy less that of the most frequent class, or less that of another probe on the same tokens; paired.

        Raises:
            EmbedLensError: the other probe was asked about other tokens.
        """
        if over is not None and not np.array_equal(self.asked, over.asked):
            raise EmbedLensError("the two probes were asked about different tokens: compare those of one group")
        other = self.majority if over is None else over.hits
        return ratio_interval(self.hits - other, self.asked, seed=seed)


def linear_readout(
    vectors: Sequence[Float[np.ndarray, "tokens d"]],
    answers: Int[np.ndarray, " tokens"],
    picture: Int[np.ndarray, " tokens"],
    most_tokens: int = 1500,
    most_classes: int = 10,
    seed: int = 0,
) -> Readout | None:
    """Train a probe on the tokens of two thirds of the pictures, ask it about those of the rest.

    Every dimension is standardised by the training tokens, so a direction that all tokens share plays no part. Only
    the most frequent classes of the training tokens are asked for, and the majority is counted among the same.

    Args:
        vectors: the same tokens in one or several forms (several random projectors); their hits are averaged.
        answers: class of each token; -1 leaves it out.
        picture: number of each token's picture; no picture is on both sides.
        most_tokens: training tokens at most, drawn at random.
        most_classes: classes at most.

    Returns:
        None if there are not two classes with LEAST_TOKENS training tokens each, or fewer than LEAST_PICTURES pictures
        with tokens to ask about.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(seed)
    pictures = np.unique(picture)
    testing = np.isin(picture, rng.permutation(pictures)[: len(pictures) // 3])
    known = np.flatnonzero((answers != NONE) & ~testing)
    names, counts = np.unique(answers[known], return_counts=True)
    order = np.lexsort((names, -counts))[:most_classes]
    names, counts = names[order], counts[order]
    names = names[counts >= LEAST_TOKENS]
    train = known[np.isin(answers[known], names)]
    test = np.flatnonzero(testing & np.isin(answers, names))
    if len(names) < 2 or len(np.unique(picture[test])) < LEAST_PICTURES:
        return None
    train = np.sort(rng.permutation(train)[:most_tokens])
    usual = _most_frequent(answers[train])
    right = np.zeros(len(test))
    for form in vectors:
        scaler = StandardScaler().fit(form[train])
        probe = LogisticRegression(C=0.1, max_iter=300)
        probe.fit(scaler.transform(form[train]), answers[train])
        right += (probe.predict(scaler.transform(form[test])) == answers[test]) / len(vectors)
    asked = np.unique(picture[test])
    place = np.searchsorted(asked, picture[test])
    return Readout(
        classes=tuple(int(name) for name in names),
        n_train=len(train),
        hits=np.bincount(place, right, len(asked)),
        majority=np.bincount(place, answers[test] == usual, len(asked)).astype(np.float64),
        asked=np.bincount(place, minlength=len(asked)),
    )


def readouts(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    reference: Reference,
    membership: str = "top3",
    projectors: int = 3,
    seed: int = 0,
) -> dict[tuple[str, str, str], Readout | None]:
    """Every question to dead and to alive tokens, after the model's own projector and after random ones.

    Args:
        projectors: how many with new weights; their hits are averaged.

    Returns:
        (one of QUESTIONS, "dead" or "alive", "own projector" or "random projectors") → readout, None where too few
        tokens qualify.
    """
    table = token_table(model, samples, reference, membership, seed=seed)
    own = projector_of(model)
    forms = {
        "own projector": [projected(own, table.before)],
        "random projectors": [projected(random_projector(own, seed + i), table.before) for i in range(projectors)],
    }
    return {
        (asked, name, form): linear_readout(
            [vector[mask] for vector in vectors], table.answers[asked][mask], table.picture[mask], seed=seed
        )
        for asked in QUESTIONS
        for name, mask in (("dead", table.dead), ("alive", table.alive))
        for form, vectors in forms.items()
    }


def _most_frequent(answers: Shaped[np.ndarray, " n"]) -> int:
    names, counts = np.unique(answers, return_counts=True)
    return int(names[counts.argmax()])
