"""How long the vectors of visual and text positions are, how far each block turns them, and what rescaling changes.

Section 6.2 of the paper: visual tokens are longer than text tokens, so that what a block adds turns them little; scaled
down, they are transformed as text is. A block of a pre-norm decoder adds an update to the residual stream, and reads
the stream through a norm that divides its length out. A factor on the visual tokens therefore leaves what the first
attention reads as it is, and changes how much the update weighs beside what it is added to. `first_block` separates
this arithmetic from what the model does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import cosine_similarity

from embedlens.errors import EmbedLensError
from embedlens.groups import Reference, token_groups_of
from embedlens.intervals import Interval, draws, percentile_interval
from embedlens.labels import QUESTION
from embedlens.lenses import Lens
from embedlens.samples import Sample, readable
from embedlens.tasks import ANSWER_TOKENS, Item, score
from embedlens.tracing import traces

if TYPE_CHECKING:
    from embedlens.vlm import Prompt, VisionLanguageModel

SCALES = (1.0, 0.3, 0.1, 0.03, 0.01)  # the paper scales by 0.01


@dataclass(frozen=True, eq=False)
class Course:
    """How one set of positions fares from layer to layer: means over the positions of each picture.

    A picture without such positions has nan throughout; one with a single position has nan in `centred`.
    """

    norms: Float[np.ndarray, "pictures layers"]
    """L2 norm; layer 0 is what enters the first block."""
    steps: Float[np.ndarray, "pictures blocks"]
    """cos(h_l, h_{l+1}): 1 where block l only changes the length."""
    centred: Float[np.ndarray, "pictures blocks"]
    """The same after the mean over the picture's positions is taken out at each layer: without what all share."""
    from_input: Float[np.ndarray, "pictures layers"]
    """cos(h_0, h_l): how much of the input's direction is left."""

    @property
    def n(self) -> int:
        """Pictures that have such positions."""
        return int((~np.isnan(self.norms[:, 0])).sum())


def courses(
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    scales: Sequence[float] = (1.0,),
    reference: Reference | None = None,
    batch_size: int = 8,
) -> dict[tuple[float, str], Course]:
    """Norms and layer-to-layer cosines of every picture, with its visual tokens scaled by each factor in turn.

    Sets of positions: "visual"; "text", without the first position, whose norm is of its own kind in many models;
    "all text", with it; and the groups of `embedlens.groups` ("alive", …), if a reference is given.

    Args:
        model: from `embedlens.load`.
        samples: pictures; hidden states are dropped batch by batch.
        scales: factors on the projected visual tokens; 1 is the model as it is.
        reference: from `embedlens.discover`, to tell the groups apart. They are those of the unscaled picture.
        batch_size: pictures at a time.

    Returns:
        (scale, set) → its course, one row per picture in the order of `samples`.

    Raises:
        EmbedLensError: no samples or no scales.
    """
    if not len(scales):
        raise EmbedLensError("no scales: pass at least one, such as 1.0")
    parts: dict[tuple[float, str], list[Course]] = {}
    for prompts in _prompts(model, samples, batch_size):
        masks = [_positions(prompt) for prompt in prompts]
        if reference is not None:
            found = token_groups_of(model, prompts, reference, batch_size=batch_size)
            groups = zip(masks, prompts, found, strict=True)
            masks = [m | {name: p.spread(mask) for name, mask in g.named.items()} for m, p, g in groups]
        for scale in scales:
            scaled = [prompt.rescaled(scale) for prompt in prompts]
            for named, states in zip(masks, model.hidden_states_of(scaled, batch_size), strict=True):
                for name, mask in named.items():
                    parts.setdefault((scale, name), []).append(course(states, mask))
    if not parts:
        raise EmbedLensError("no samples: pass at least one picture")
    return {key: _stacked(found) for key, found in parts.items()}


def course(states: Float[Tensor, "layers s d"], mask: Bool[Tensor, " s"]) -> Course:
    """The course of one set of positions of one prompt, a single row.

    Args:
        states: as `model.hidden_states` gives them.
        mask: the positions.
    """
    h = states[:, mask.to(states.device)].float()
    layers, n = h.shape[:2]
    if n == 0:
        empty = np.full((1, layers), np.nan)
        return Course(empty, empty[:, 1:], empty[:, 1:], empty)
    centred = h - h.mean(1, keepdim=True)
    return Course(
        norms=_row(h.norm(dim=-1)),
        steps=_row(cosine_similarity(h[1:], h[:-1], dim=-1)),
        centred=_row(cosine_similarity(centred[1:], centred[:-1], dim=-1))
        if n > 1
        else np.full((1, layers - 1), np.nan),
        from_input=_row(cosine_similarity(h, h[:1], dim=-1)),
    )


@dataclass(frozen=True, eq=False)
class FirstBlock:
    """What a factor on the visual tokens does to the first block; means over the visual tokens of each picture."""

    scales: tuple[float, ...]
    steps: Float[np.ndarray, "pictures scales"]
    """cos(h_0, h_1), measured."""
    frozen: Float[np.ndarray, "pictures scales"]
    """cos(h_0, h_1) if the block added at every scale what it adds to the unscaled tokens: arithmetic alone."""
    attention_moved: Float[np.ndarray, "pictures scales"]
    """How far the update of the attention is from the unscaled one, as a share of that one's length."""
    mlp_moved: Float[np.ndarray, "pictures scales"]
    """The same for the MLP, which reads tokens and attention update added up, so that the factor reaches it."""


def first_block(
    model: VisionLanguageModel, samples: Iterable[Sample], scales: Sequence[float] = SCALES, batch_size: int = 8
) -> FirstBlock:
    """Is a rescaled token turned more because the block does something else, or because the token is shorter?

    Raises:
        EmbedLensError: no samples or no scales.
    """
    if not len(scales):
        raise EmbedLensError("no scales: pass at least one, such as 0.01")
    rows: list[list[tuple[float, float, float, float]]] = []
    for prompts in _prompts(model, samples, batch_size):
        plain = _updates(model, prompts, 1.0, batch_size)
        batch: list[list[tuple[float, float, float, float]]] = [[] for _ in prompts]
        for scale in scales:
            scaled = _updates(model, prompts, scale, batch_size)
            for row, (x, attention, mlp), (_, attention_1, mlp_1) in zip(batch, scaled, plain, strict=True):
                row.append(
                    (
                        float(cosine_similarity(x, x + attention + mlp, dim=-1).mean()),
                        float(cosine_similarity(x, x + attention_1 + mlp_1, dim=-1).mean()),
                        _moved(attention, attention_1),
                        _moved(mlp, mlp_1),
                    )
                )
        rows += batch
    if not rows:
        raise EmbedLensError("no samples: pass at least one picture")
    columns = np.asarray(rows, dtype=np.float64)  # [pictures, scales, 4]
    return FirstBlock(tuple(scales), *(columns[..., i] for i in range(4)))


def renamed(
    model: VisionLanguageModel, samples: Iterable[Sample], lens: Lens, batch_size: int = 8
) -> Float[np.ndarray, "pictures blocks"]:
    """Share of the visual tokens of each picture whose nearest word is another one after block l than before it.

    Raises:
        EmbedLensError: no samples.
    """
    rows = []
    for prompts in _prompts(model, samples, batch_size):
        for prompt, states in zip(prompts, model.hidden_states_of(prompts, batch_size), strict=True):
            nearest = lens.topk(states[:, prompt.visual], 1)[1][..., 0]
            rows.append((nearest[1:] != nearest[:-1]).float().mean(-1).cpu().numpy().astype(np.float64))
    if not rows:
        raise EmbedLensError("no samples: pass at least one picture")
    return np.stack(rows)


def correct_at(
    model: VisionLanguageModel, items: Sequence[Item], scales: Sequence[float] = SCALES, batch_size: int = 32
) -> Float[np.ndarray, "items scales"]:
    """1 where a question is answered rightly with the visual tokens scaled by a factor, else 0.

    The same questions at every scale, so differences are paired. Scored as `embedlens.tasks.evaluate` does.

    Raises:
        EmbedLensError: no questions or no scales.
    """
    if not items or not len(scales):
        raise EmbedLensError("no questions or no scales: pass at least one of each")
    rows = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        prompts = model.prompts([item.sample.image for item in batch], [item.question.text for item in batch])
        said = [
            model.answers([prompt.rescaled(scale) for prompt in prompts], ANSWER_TOKENS, batch_size) for scale in scales
        ]
        rows += [
            [score(item.question, answer) for answer in of_item]
            for item, of_item in zip(batch, zip(*said, strict=True), strict=True)
        ]
    return np.asarray(rows, dtype=np.float64)


# --- the layer whose text norm matches -------------------------------------------------------------------------------


def matching_layer(
    visual: Float[np.ndarray, "*resamples"], text: Float[np.ndarray, "*resamples layers"]
) -> Int[np.ndarray, "*resamples"]:
    """l*: the layer whose mean text norm is closest to the mean norm of visual tokens at the input.

    The paper says that visual norms "naturally align" with middle layers and gives no definition. Of equals the first.

    >>> int(matching_layer(np.array(9.0), np.array([1.0, 4.0, 8.0, 16.0])))
    2
    """
    return np.asarray(np.abs(text - visual[..., None]).argmin(-1))


def in_the_middle(layer: Shaped[np.ndarray, "*any"], n_layers: int) -> Bool[np.ndarray, "*any"]:
    """Whether a layer lies in the middle half: from a quarter to three quarters of the blocks.

    >>> in_the_middle(np.arange(9), 8).nonzero()[0].tolist()
    [2, 3, 4, 5, 6]
    """
    return np.asarray((4 * layer >= n_layers) & (4 * layer <= 3 * n_layers))


def middle_by_accident(text: Float[np.ndarray, " layers"], points: int = 10_001) -> float:
    """Share of norms that would match a middle layer, if a norm were drawn at random between the least and the largest
    mean text norm, evenly on a log scale: what a match in the middle is worth.

    Raises:
        EmbedLensError: all text norms are equal, so that no layer matches better than another.

    >>> round(middle_by_accident(np.array([1.0, 10.0, 20.0, 30.0, 1000.0])), 2)
    0.66
    """
    low, high = float(text.min()), float(text.max())
    if not 0 < low < high:
        raise EmbedLensError(f"text norms from {low:g} to {high:g} tell no layers apart: read a model with more layers")
    drawn = np.geomspace(low, high, points)
    found = matching_layer(drawn, np.broadcast_to(text, (points, len(text))))
    return float(in_the_middle(found, len(text) - 1).mean())


# --- statistics of means, over pictures -------------------------------------------------------------------------------


def resampled_means(
    *values: Shaped[np.ndarray, "pictures ..."],  # any columns, not the same in all
    resamples: int = 2000,
    seed: int = 0,
) -> list[Float[np.ndarray, "resamples ..."]]:
    """Means over pictures in each bootstrap resample; the same pictures are drawn for all of `values`.

    A nan says that a picture has no such value; it is left out, as in `embedlens.intervals.mean_interval`.

    Raises:
        EmbedLensError: arrays of different numbers of pictures, or a column without any value.
    """
    if len({len(part) for part in values}) != 1:
        raise EmbedLensError(f"{[len(part) for part in values]} pictures: pass values of the same pictures")
    times = draws(len(values[0]), resamples, seed)
    return [_means(times, part) for part in values]


def of_means(
    statistic: Callable[..., np.ndarray],
    *values: Shaped[np.ndarray, "pictures ..."],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """A statistic of means over pictures, such as their ratio or the largest of them, with a bootstrap over pictures.

    Args:
        statistic: takes one array [resamples, *columns] of means per entry of `values`, and works along the rest.
        values: one row per picture each.

    >>> norms = np.array([[1.0, 8.0], [3.0, 8.0]])
    >>> of_means(lambda mean: mean.max(-1), norms, resamples=50).value.tolist()
    8.0
    """
    drawn = statistic(*resampled_means(*values, resamples=resamples, seed=seed))
    whole = np.asarray(statistic(*(_means(np.ones((1, len(part))), part) for part in values)), dtype=np.float64)
    flat = np.asarray(drawn, dtype=np.float64).reshape(resamples, -1)
    return percentile_interval(whole.reshape(-1), flat, level, drawn.shape[1:])


def _means(times: Float[np.ndarray, "resamples pictures"], values: np.ndarray) -> np.ndarray:
    flat = values.reshape(len(values), -1).astype(np.float64)
    there = ~np.isnan(flat)
    if not len(values) or not there.any(0).all():
        raise EmbedLensError("no picture has a value to average: take more pictures, or leave out the empty columns")
    asked = times @ there.astype(np.float64)
    drawn = np.where(asked > 0, times @ np.where(there, flat, 0), np.nan) / np.maximum(asked, 1)
    return drawn.reshape(len(times), *values.shape[1:])


# --- pieces ----------------------------------------------------------------------------------------------------------


def _prompts(model: VisionLanguageModel, samples: Iterable[Sample], batch_size: int) -> Iterator[list[Prompt]]:
    stream = readable(samples)
    while batch := list(islice(stream, batch_size)):
        yield model.prompts([sample.image for sample in batch], [QUESTION] * len(batch))


def _positions(prompt: Prompt) -> dict[str, Bool[Tensor, " s"]]:
    later = torch.ones_like(prompt.visual)
    later[0] = False
    return {"visual": prompt.visual, "text": prompt.text & later, "all text": prompt.text}


def _updates(
    model: VisionLanguageModel, prompts: Sequence[Prompt], scale: float, batch_size: int
) -> list[tuple[Float[Tensor, "n d"], Float[Tensor, "n d"], Float[Tensor, "n d"]]]:
    """Visual tokens as they enter the first block, what its attention adds, what its MLP adds; per prompt."""
    found = []
    scaled = [prompt.rescaled(scale) for prompt in prompts]
    for prompt, seen in zip(scaled, traces(model, scaled, batch_size=batch_size), strict=True):
        pre, mid, post = (h[0, prompt.visual].float() for h in (seen.resid_pre, seen.resid_mid, seen.resid_post))
        found.append((pre, mid - pre, post - mid))
    return found


def _moved(update: Float[Tensor, "n d"], unscaled: Float[Tensor, "n d"]) -> float:
    return float((update - unscaled).norm(dim=-1).mean() / unscaled.norm(dim=-1).mean().clamp_min(1e-12))


def _row(values: Float[Tensor, "layers n"]) -> Float[np.ndarray, "1 layers"]:
    return values.mean(-1)[None].cpu().numpy().astype(np.float64)


def _stacked(found: Sequence[Course]) -> Course:
    kinds = ("norms", "steps", "centred", "from_input")
    return Course(*(np.concatenate([getattr(part, kind) for part in found]) for kind in kinds))
