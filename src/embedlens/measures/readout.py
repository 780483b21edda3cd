"""What a linear probe reads from visual tokens: content that cosines near one can hide.

A multinomial logistic regression is trained on the tokens of some pictures and asked about those of others, beside the
same on projectors with random weights (what the vision tower alone gives) and the most frequent answer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor, nn

from embedlens.errors import EmbedLensError
from embedlens.groups import Reference, token_groups_of
from embedlens.patches import PatchGrid
from embedlens.prompts import looked_at
from embedlens.samples import Sample
from embedlens.vlm import VisionLanguageModel

#: sRGB of plain colour names, the eleven basic ones of English and cyan.
COLOURS = {"black": (20, 20, 20), "white": (245, 245, 245), "grey": (128, 128, 128), "red": (205, 40, 40)}
COLOURS |= {"orange": (240, 135, 35), "yellow": (245, 215, 55), "green": (50, 150, 60), "cyan": (70, 200, 215)}
COLOURS |= {"blue": (40, 80, 200), "purple": (125, 60, 165), "pink": (245, 145, 190), "brown": (130, 85, 50)}
#: What is asked of a token: the mean colour of its patch, the object in whose box its centre lies, and, of tokens in no
#: box, the object whose box is nearest.
QUESTIONS = ("colour of the patch", "object it lies in", "nearest object beside it")
#: A probe behind the model's own projector, probes behind random ones, and always saying the same.
READERS = ("own projector", "random projectors", "most frequent answer")
NONE = -1  # no answer: the token is left out
LEAST_TOKENS, MOST_TOKENS = 10, 1500  # to train on: of a class at least, drawn from all at most
MOST_CLASSES = 10
LEAST_PICTURES = 10  # to be asked about: fewer have no interval to speak of


def patch_colours(image: Image, grid: PatchGrid) -> Int[np.ndarray, " n"]:
    """Index into COLOURS, nearest in sRGB, of the mean of the pixels whose centre each patch shows, or NONE."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    rows, cols = (np.arange(side) + 0.5 for side in pixels.shape[:2])
    palette, found = np.array(list(COLOURS.values()), dtype=np.float64), np.full(len(grid), NONE)
    for index in (~grid.padded).nonzero()[:, 0].tolist():
        x0, y0, x1, y1 = grid.box(index)
        shown = pixels[(rows >= y0) & (rows < y1)][:, (cols >= x0) & (cols < x1)]
        if shown.size:
            found[index] = int(((palette - shown.mean((0, 1))) ** 2).sum(-1).argmin())
    return found


def patch_objects(sample: Sample, grid: PatchGrid) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """(category of the object each patch lies in, category of the nearest object of a patch that lies in none). A patch
    lies in the smallest box that holds its centre; distance is from the centre to the edge of a box. Crowds and patches
    in the bars are left out; NONE where there is no answer."""
    boxes = [(entry["category_id"], *entry["bbox"]) for entry in sample.annotations if not entry.get("iscrowd")]
    if not boxes:
        return np.full(len(grid), NONE), np.full(len(grid), NONE)
    boxes.sort(key=lambda box: box[3] * box[4])
    categories, (x0, y0, w, h) = np.array([box[0] for box in boxes]), np.array([box[1:] for box in boxes], float).T
    x, y = grid.centres.double().numpy().T[:, :, None]
    across = np.maximum(np.maximum(x0 - x, x - (x0 + w)), 0)
    down = np.maximum(np.maximum(y0 - y, y - (y0 + h)), 0)
    covered = (x >= x0) & (x < x0 + w) & (y >= y0) & (y < y0 + h)
    within, seen = covered.any(1), ~grid.padded.numpy()
    inside = np.where(within & seen, categories[covered.argmax(1)], NONE)
    return inside, np.where(~within & seen, categories[np.hypot(across, down).argmin(1)], NONE)


def random_projector(projector: nn.Module, seed: int) -> nn.Module:
    """The same architecture with weights drawn anew, each part by its own default initialisation."""
    drawn = copy.deepcopy(projector).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, part in drawn.named_modules():
            own, kind = list(part.parameters(recurse=False)), type(part).__name__
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
            elif "Norm" in kind and [weight.ndim for weight in own] == [1]:
                nn.init.ones_(own[0])  # the gains of transformers' RMSNorms, which cannot reset themselves
            elif own:
                what = f"{name or 'the projector'} ({kind}) has weights but no reset_parameters"
                raise EmbedLensError(f"{what}: initialise it by hand")
    first = next(projector.parameters())
    return drawn.to(first.device, first.dtype).eval()


def token_table(
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    reference: Reference,
    per_picture: int = 48,
    seed: int = 0,
    batch_size: int = 16,
) -> tuple[Float[Tensor, "tokens v"], pd.DataFrame]:
    """Tokens to probe: of each picture at most `per_picture` dead and as many alive ones, drawn by its id and the seed.
    Returns the vision-tower states that the projector reads, and for each a row: id of its picture, dead, alive and the
    class by each of QUESTIONS, NONE if there is none."""
    states, parts = [], []
    for batch, prompts in looked_at(model, samples, batch_size):
        found = token_groups_of(model, prompts, reference, batch_size=batch_size)
        for sample, prompt, groups, tower in zip(batch, prompts, found, model.tower_states_of(prompts), strict=True):
            rng = np.random.default_rng((seed, sample.id))
            masks = [groups.dead.numpy(), groups.alive.numpy()]
            chosen = np.sort(np.concatenate([rng.permutation(np.flatnonzero(mask))[:per_picture] for mask in masks]))
            known = [patch_colours(sample.image, prompt.grid), *patch_objects(sample, prompt.grid)]
            states.append(tower[model.feature_layer][torch.from_numpy(chosen).to(tower.device)].float().cpu())
            parts.append([np.full(len(chosen), sample.id), *(column[chosen] for column in (*masks, *known))])
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    return torch.cat(states), pd.DataFrame(dict(zip(("id", "dead", "alive", *QUESTIONS), columns, strict=True)))


@torch.no_grad()
def projected(projector: nn.Module, before: Float[Tensor, "tokens v"]) -> Float[np.ndarray, "tokens d"]:
    """The tokens as a projector hands them to the language model."""
    first = next(projector.parameters())
    parts = [projector(part.to(first.device, first.dtype)).float().cpu() for part in before.split(8192)]
    return torch.cat(parts).numpy()


def linear_readout(
    vectors: Sequence[Float[np.ndarray, "tokens d"]],
    answers: Int[np.ndarray, " tokens"],
    picture: Int[np.ndarray, " tokens"],
    seed: int = 0,
) -> pd.DataFrame | None:
    """Train a probe on the tokens of two thirds of the pictures, ask it about those of the rest.

    Every dimension is standardised by the training tokens. Only their most frequent classes are asked for.

    Args:
        vectors: the same tokens in one or several forms (several random projectors); their hits are averaged.
        answers: class of each token; NONE leaves it out.
        picture: id of each token's picture; no picture is on both sides.

    Returns:
        a row per test picture: id, hits and majority (right answers of the probe, and of always the most frequent
        class), asked (tokens). None if there are not two classes with LEAST_TOKENS training tokens each, or fewer than
        LEAST_PICTURES pictures with tokens to ask about.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng, pictures = np.random.default_rng(seed), np.unique(picture)
    testing = np.isin(picture, rng.permutation(pictures)[: len(pictures) // 3])
    known = np.flatnonzero((answers != NONE) & ~testing)
    names, counts = np.unique(answers[known], return_counts=True)
    order = np.lexsort((names, -counts))[:MOST_CLASSES]
    names = names[order][counts[order] >= LEAST_TOKENS]
    train, test = known[np.isin(answers[known], names)], np.flatnonzero(testing & np.isin(answers, names))
    if len(names) < 2 or len(np.unique(picture[test])) < LEAST_PICTURES:
        return None
    train, right = np.sort(rng.permutation(train)[:MOST_TOKENS]), np.zeros(len(test))
    seen, often = np.unique(answers[train], return_counts=True)
    for form in vectors:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
        right += (probe.fit(form[train], answers[train]).predict(form[test]) == answers[test]) / len(vectors)
    right_of = {"hits": right, "majority": answers[test] == seen[often.argmax()], "asked": np.ones(len(test))}
    return pd.DataFrame({"id": picture[test], **right_of}).groupby("id", as_index=False).sum()


def readouts(
    model: VisionLanguageModel, samples: Sequence[Sample], reference: Reference, projectors: int = 3, seed: int = 0
) -> pd.DataFrame:
    """Every question to dead and to alive tokens, after the model's own projector, after several with new weights, and
    unseen. Returns per test picture, question (one of QUESTIONS), group ("dead", "alive") and reader (one of READERS):
    id, hits and asked; none where too few tokens qualify."""
    before, table = token_table(model, samples, reference, seed=seed)
    anew = [random_projector(model.projector, seed + number) for number in range(projectors)]
    own, *random = (projected(projector, before) for projector in (model.projector, *anew))
    columns, found = ["id", "question", "group", "reader", "hits", "asked"], []
    behind = {READERS[0]: [own], READERS[1]: random}
    for question, group, (name, forms) in product(QUESTIONS, ("dead", "alive"), behind.items()):
        mask = table[group].to_numpy()
        answers, picture = (table[column].to_numpy()[mask] for column in (question, "id"))
        rows = linear_readout([form[mask] for form in forms], answers, picture, seed=seed)
        if rows is not None:
            rows = rows.assign(question=question, group=group, reader=name)
            found += [rows, rows.assign(hits=rows["majority"], reader=READERS[2])][: 2 if name == READERS[0] else 1]
    return pd.concat(found or [pd.DataFrame(columns=columns)], ignore_index=True)[columns]
