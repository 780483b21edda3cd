"""What a model says about pictures with all their content in one patch, and what that patch's token is close to.

The pictures are those of `embedlens.samples.patchbench`; Section 7.1 and Appendix F of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from PIL import Image
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.intervals import Interval
from embedlens.labels import QUESTION, label_ids
from embedlens.samples.miniworld.sprites import COLOURS
from embedlens.samples.patchbench import GROUND, INK, SURROUND, OnePatch, correct, follows

if TYPE_CHECKING:
    import pandas as pd

    from embedlens.lenses import Lens
    from embedlens.vlm import VisionLanguageModel

ANSWER_TOKENS = 8  # no name, colour or string of the set is longer


def canvas_of(model: VisionLanguageModel) -> tuple[int, int]:
    """(side, patch) in px: pictures of this size are not resampled; of several views, the patch of the finest."""
    side = model.canvas_side
    grid = model.prompt(Image.new("RGB", (side, side)), QUESTION).grid
    widths = [view.cell(0)[2] - view.cell(0)[0] for view in grid.views]
    return side, round(min(widths))


def ask(
    model: VisionLanguageModel,
    pictures: Sequence[OnePatch],
    axes: Sequence[str] | None = None,
    swap: bool = False,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Ask the questions of every picture; one row each, picture by picture.

    Args:
        axes: of `patchbench.AXES`; None: all three.
        swap: control: each question is asked about another picture of the same group, half the group further on, and
            its answer is judged by the picture it belongs to.

    Returns:
        columns id (the picture that the question belongs to), group, axis, question, answer, said, correct, and for
        questions about colour follows (one of `patchbench.FOLLOWS`), else "".

    Raises:
        EmbedLensError: no pictures, none that answers these axes, or a swap in a group of one.
    """
    import pandas as pd

    shown = _shifted(pictures) if swap else list(pictures)
    rows, seen = [], []
    for picture, other in zip(pictures, shown, strict=True):
        for axis, question in picture.asked.items():
            if axes is None or axis in axes:
                rows.append((picture, axis, question))
                seen.append(other)
    if not rows:
        raise EmbedLensError("no question to ask: pass at least one picture that has a question on these axes")
    said: list[str] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        images = [picture.image for picture in seen[start : start + batch_size]]
        prompts = model.prompts(images, [question.text for _, _, question in batch])
        said += model.answers(prompts, max_new_tokens=ANSWER_TOKENS, batch_size=batch_size)
    return pd.DataFrame(
        {
            "id": picture.id,
            "group": picture.group,
            "axis": axis,
            "question": question.text,
            "answer": question.answer,
            "said": words,
            "correct": correct(question, words),
            "follows": follows(picture, words) if axis == "colour" else "",
        }
        for (picture, axis, question), words in zip(rows, said, strict=True)
    )


def _shifted(pictures: Sequence[OnePatch]) -> list[OnePatch]:
    """For each picture another of its group, half the group further on."""
    groups: dict[str, list[int]] = {}
    for at, picture in enumerate(pictures):
        groups.setdefault(picture.group, []).append(at)
    alone = [name for name, members in groups.items() if len(members) < 2]
    if alone:
        raise EmbedLensError(f"the group {alone[0]!r} has one picture: a swap needs two of each group")
    shown = list(pictures)
    for members in groups.values():
        for i, at in enumerate(members):
            shown[at] = pictures[members[(i + len(members) // 2) % len(members)]]
    return shown


def share(found: Shaped[np.ndarray, " n"], level: float = 0.95) -> Interval:
    """A share with Wilson's interval; of nothing it is 0, and anything from 0 to 1.

    >>> [round(float(part), 2) for part in share(np.array([True, False, True, True]))]
    [0.75, 0.3, 0.95]
    >>> [float(part) for part in share(np.zeros(0, bool))]
    [0.0, 0.0, 1.0]
    """
    from scipy.stats import binomtest

    n, right = len(found), int(np.asarray(found, dtype=bool).sum())
    if not n:
        return Interval(np.asarray(0.0), np.asarray(0.0), np.asarray(1.0))
    bounds = binomtest(right, n).proportion_ci(level, "wilson")
    low, high = min(bounds.low, right / n), max(bounds.high, right / n)  # rounding must not cut the share off
    return Interval(np.asarray(right / n), np.asarray(low), np.asarray(high))


def content_states(
    model: VisionLanguageModel, pictures: Sequence[OnePatch], batch_size: int = 32
) -> Float[Tensor, "pictures layers d"]:
    """The residual stream of the one patch that holds the content, through all layers.

    Raises:
        EmbedLensError: the content is no single patch of this model's grid.
    """
    found = []
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        prompts = model.prompts([picture.image for picture in batch], [QUESTION] * len(batch))
        streams = model.hidden_states_of(prompts, batch_size)
        for picture, prompt, stream in zip(batch, prompts, streams, strict=True):
            x0, y0, x1, y1 = picture.box
            index = prompt.grid.patch_at((x0 + x1) / 2, (y0 + y1) / 2)
            if not np.allclose(prompt.grid.cell(index), picture.box, atol=0.01):
                raise EmbedLensError(
                    f"the content lies at {picture.box}, the patch there at {prompt.grid.cell(index)}: draw the "
                    "pictures with the side and patch that canvas_of gives for this model"
                )
            found.append(stream[:, prompt.visual][:, index])
    return torch.stack(found)


def colours_held(
    lens: Lens, tokenizer: Any, states: Float[Tensor, "pictures layers d"], k: int = 5
) -> Bool[np.ndarray, "pictures layers colours"]:
    """Which colour names the k best words of each state hold, in the order of `COLOURS`."""
    ids = lens.topk(states, k)[1]
    rows = [torch.tensor(label_ids(tokenizer, colour, "strict"), device=ids.device) for colour in COLOURS]
    return torch.stack([torch.isin(ids, row).any(-1) for row in rows], -1).cpu().numpy()


def nearest_colour(
    lens: Lens, tokenizer: Any, states: Float[Tensor, "pictures layers d"]
) -> Bool[np.ndarray, "pictures layers colours"]:
    """Which of the colour names has the best score, in the order of `COLOURS`; one in each state.

    A colour that is no single token of the vocabulary is never the best.

    Raises:
        EmbedLensError: no colour is a single token.
    """
    ids = [label_ids(tokenizer, colour, "strict") for colour in COLOURS]
    if not any(ids):
        raise EmbedLensError("no name of a colour is one token of this vocabulary: a lens cannot read colours here")
    best = []
    for state in states:  # one picture at a time: scores of the whole vocabulary are large
        scores = lens.scores(state)
        no = scores.new_full(scores.shape[:-1], -torch.inf)
        best.append(torch.stack([scores[..., list(row)].amax(-1) if row else no for row in ids], -1).argmax(-1))
    return (torch.stack(best)[..., None].cpu() == torch.arange(len(ids))).numpy()


def by_part(
    pictures: Sequence[OnePatch], colours: Bool[np.ndarray, "pictures layers colours"]
) -> dict[str, Bool[np.ndarray, "pictures layers"]]:
    """Of what each state gives per colour, that of the content, of the patch background and of the surround.

    >>> from dataclasses import replace
    >>> from embedlens.samples.patchbench import pictures
    >>> picture = replace(pictures(4)[3], ink="red", ground="white", surround="orange")
    >>> {part: found.tolist() for part, found in by_part([picture], np.eye(10, dtype=bool)[None, :2]).items()}
    {'content': [[True, False]], 'patch background': [[False, False]], 'surround': [[False, True]]}
    """
    names = list(COLOURS)
    parts: dict[str, list[str | None]] = {
        INK: [picture.ink for picture in pictures],
        GROUND: [picture.ground for picture in pictures],
        SURROUND: [picture.surround for picture in pictures],
    }
    return {
        part: np.stack([colours[i, :, names.index(str(colour))] for i, colour in enumerate(shown)])
        for part, shown in parts.items()
    }
