"""What a model says about pictures with all their content in one patch, and what that patch's token is close to.

The pictures are those of `embedlens.samples.patchbench`; Section 7.1 and Appendix F of the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from embedlens.asking import instructed
from embedlens.batches import in_batches
from embedlens.errors import EmbedLensError
from embedlens.lenses import Lens
from embedlens.measures.labels import label_ids
from embedlens.prefix import Case, answers
from embedlens.prompts import QUESTION
from embedlens.samples import patchbench
from embedlens.samples.miniworld.sprites import COLOURS
from embedlens.samples.patchbench import AXES, GROUND, INK, SURROUND, OnePatch, canonical, correct, follows
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
    axes: Sequence[str] = AXES,
    swap: bool = False,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Ask the questions of every picture on some of `patchbench.AXES`; one row each, picture by picture.

    `swap` is the control: each question is asked about another picture of the same group, half the group further on,
    and its answer is judged by the picture it belongs to. Returns columns id (the picture that the question belongs
    to), group, axis, question, answer, said, correct, and for questions about colour follows (one of
    `patchbench.FOLLOWS`), else "".
    """
    asked = []
    for other, picture in zip(_shifted(pictures) if swap else pictures, pictures, strict=True):
        own = [(picture, axis, instructed(model, one)) for axis, one in picture.asked.items() if axis in axes]
        asked += [(other.image, own)] if own else []
    if not asked:
        raise EmbedLensError("no question to ask: pass at least one picture that has a question on these axes")

    def run(start: int, part: Sequence[Any]) -> list[str]:  # a picture runs once for all its questions
        firsts = model.prompts([image for image, _ in part], [own[0][2].text for _, own in part])
        cases = []
        for first, (_, own) in zip(firsts, part, strict=True):
            cases += [Case(first), *(Case(model.asked(first, question.text)) for _, _, question in own[1:])]
        return answers(model, cases, ANSWER_TOKENS, max(1, batch_size // 4))  # they are remembered

    said = list(in_batches(run, asked, batch_size))
    rows = (row for _, own in asked for row in own)
    columns = ["id", "group", "axis", "question", "answer", "said", "correct", "follows"]
    table = [
        (picture.id, picture.group, axis, question.text, question.answer, words, correct(question, words))
        + (follows(picture, words) if axis == "colour" else "",)
        for (picture, axis, question), words in zip(rows, said, strict=True)
    ]
    return pd.DataFrame(table, columns=columns)


def _shifted(pictures: Sequence[OnePatch]) -> list[OnePatch]:
    """For each picture another of its group, half the group further on."""
    shown = list(pictures)
    for group in dict.fromkeys(picture.group for picture in pictures):
        members = [at for at, picture in enumerate(pictures) if picture.group == group]
        if len(members) < 2:
            raise EmbedLensError(f"the group {group!r} has one picture: a swap needs two of each group")
        for i, at in enumerate(members):
            shown[at] = pictures[members[(i + len(members) // 2) % len(members)]]
    return shown


def recolour_rows(model: VisionLanguageModel, cases: Sequence[OnePatch]) -> pd.DataFrame:
    """What becomes of the answer about a text's colour when the text, its patch or the surround is recoloured. Returns
    one row per case and part that is recoloured: id, part, follows (what the answer follows before), said before and
    after, stays (the answer is as before) and turns (it is the new colour)."""
    before, found, changes = ask(model, cases, ["colour"]), [], [patchbench.probes(case) for case in cases]
    new = [str(change[INK].ink) for change in changes]
    for part in (INK, GROUND, SURROUND):
        after = ask(model, [change[part] for change in changes], ["colour"]).said
        own = before[["id", "follows", "said"]].assign(part=part, after=after)
        after = after.map(canonical)
        found.append(own.assign(stays=after == before.said.map(canonical), turns=after == new))
    return pd.concat(found, ignore_index=True)


def colour_rows(
    model: VisionLanguageModel, pictures: Sequence[OnePatch], lenses: Mapping[str, Lens], k: int = 5
) -> pd.DataFrame:
    """Whether the patch with content is near the colours of the picture, layer by layer. Returns one row per picture,
    lens, part (INK, GROUND, SURROUND) and layer: held (the k best words have the part's colour) and nearest (of all
    names of colours that are one token it is the best)."""
    ids = {colour: torch.tensor(label_ids(model.tokenizer, colour, "strict"), dtype=torch.long) for colour in COLOURS}
    known = torch.cat(list(ids.values()))
    if not len(known):
        raise EmbedLensError("no name of a colour is one token of this vocabulary: a lens cannot read colours here")
    shown, found = {INK: "ink", GROUND: "ground", SURROUND: "surround"}, []
    for picture, state in zip(pictures, content_states(model, pictures), strict=True):  # scores of V words are large
        for name, lens in lenses.items():
            held, best = lens.topk(state, k)[1].cpu(), known[lens.scores(state).cpu()[:, known].argmax(-1)]
            for part, of in shown.items():
                own = ids[str(getattr(picture, of))]
                rows = {"held": torch.isin(held, own).any(-1).numpy(), "nearest": torch.isin(best, own).numpy()}
                place = {"lens": name, "part": part, "id": picture.id, "layer": range(len(state))}
                found.append(pd.DataFrame(rows | place))
    return pd.concat(found, ignore_index=True)


def twin_rows(pictures: Sequence[OnePatch], answers: pd.DataFrame, control: pd.DataFrame) -> pd.DataFrame:
    """Answers of `ask` about the colour of a text on a white patch beside those about its twin on a coloured one, and
    beside `control`, those about another picture (`swap`).

    Returns:
        one row per pair: white, colour and habit (1 where the colour is right on the white patch, on the coloured one,
        and on the white one about another picture), follows (on the coloured patch), by_chance (how often a wrong
        answer there names the patch, and so the surround), says_white (on the white patch), white_surround, covered.
    """
    own, other = (table[table.axis == "colour"].set_index("id") for table in (answers, control))
    return pd.DataFrame(
        {
            "pair": pair,
            "white": float(own.correct[a.id]),
            "colour": float(own.correct[b.id]),
            "habit": float(other.correct[a.id]),
            "follows": own.follows[b.id],
            "by_chance": np.mean([follows(b, colour) == GROUND for colour in COLOURS if colour != b.ink]),
            "says_white": canonical(str(own.said[a.id])) == "white",
            "white_surround": a.surround == "white",
            "covered": float(b.covered.mean()),
        }
        for pair, (a, b) in enumerate(patchbench.twins(pictures))
    )


def piece_rows(model: VisionLanguageModel, pictures: Sequence[OnePatch], seed: int = 0) -> pd.DataFrame:
    """Whether two capitals are read that are one vocabulary entry, and whether two that are several, in the same texts.
    Returns one row per picture and half ("one piece", "several pieces"; one that has no string is left out): own and
    other (1 where the string is read, about its own picture and about another of its half)."""
    draw, found = np.random.default_rng(seed), []
    halves = {half: some for half, some in patchbench.strings(model.tokenizer, length=2).items() if some}
    drawn = {half: [replace(p, text=str(draw.choice(some))) for p in pictures] for half, some in halves.items()}
    for half, texts in drawn.items():
        own, other = (ask(model, texts, AXES[:1], swap=swap).correct.astype(float) for swap in (False, True))
        found.append(pd.DataFrame({"id": range(len(texts)), "half": half, "own": own, "other": other}))
    return pd.concat(found, ignore_index=True)


def content_states(
    model: VisionLanguageModel, pictures: Sequence[OnePatch], batch_size: int = 32
) -> Float[Tensor, "pictures layers d"]:
    """The residual stream of the one patch that holds the content, through all layers."""

    def run(_: int, batch: Sequence[OnePatch]) -> Iterator[Tensor]:
        prompts = model.prompts([picture.image for picture in batch], [QUESTION] * len(batch))
        for picture, prompt, stream in zip(batch, prompts, model.streams_of(prompts, batch_size), strict=True):
            x0, y0, x1, y1 = picture.box
            index = prompt.grid.patch_at((x0 + x1) / 2, (y0 + y1) / 2)
            if not np.allclose(prompt.grid.cell(index), picture.box, atol=0.01):
                raise EmbedLensError(
                    f"the content lies at {picture.box}, the patch there at {prompt.grid.cell(index)}: draw the "
                    "pictures with the side and patch that canvas_of gives for this model"
                )
            yield stream[:, prompt.visual][:, index]

    return torch.stack(list(in_batches(run, pictures, batch_size)))
