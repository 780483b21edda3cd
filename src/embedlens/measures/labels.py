"""Which object labels a lens finds in the visual tokens of a picture: matching, counts, chance.

Equation 2 of the paper averages over tokens (`LabelHits.token_rows`), while its sentence counts a label as found if
*any* visual token of the picture retrieves it (`LabelHits.label_rows`), beside what is found by accident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from embedlens import stats
from embedlens.errors import EmbedLensError
from embedlens.lenses import EmbedLens, Lens, LogitLens
from embedlens.patches import Box, PatchGrid
from embedlens.prompts import looked_at
from embedlens.samples import Sample
from embedlens.samples.miniworld.language import IRREGULAR, plural
from embedlens.vlm import Prompt, VisionLanguageModel

#: strict: the label or its plural as one token; head-word: or the last word of a label of several words ("phone" of
#: "cell phone"); first-piece: or the first piece of a label that is several tokens (which gives false hits).
RULES = ("strict", "head-word", "first-piece")
#: Labels whose last word is the label of something else.
FALSE_HEADS = ("hot dog",)
PLURALS = {"mouse": "mice", "skis": "skis"}
#: Any other way to get k words from every visual token of a prompt: (model, prompt, k) → ids.
Reading = Callable[[VisionLanguageModel, Prompt, int], Int[Tensor, "layers tokens k"]]


def label_ids(tokenizer: Any, label: str, rule: str = "head-word") -> tuple[int, ...]:
    """The vocabulary entries that count as a label, ascending; empty if none does. A word counts with or without a
    leading space, in lower case, Capitalised or in CAPITALS, in singular and plural. The tokenizer is byte-level BPE or
    SentencePiece; of RULES each includes the one before."""
    if rule not in RULES:
        raise EmbedLensError(f"unknown rule {rule!r}: use one of {', '.join(RULES)}")
    if not label.strip():
        raise EmbedLensError("the label is empty: pass a category name")
    words = {label, PLURALS.get(label) or _plural(label)}
    if rule != "strict" and " " in label and label not in FALSE_HEADS:
        head = label.rsplit(" ", 1)[1]
        words |= {head, _plural(head)}
    vocabulary = tokenizer.get_vocab()
    written = {form for word in words for form in (word.lower(), word.capitalize(), word.upper())}
    # Ġ is the leading space of byte-level vocabularies, ▁ that of SentencePiece, where a piece without it goes on with
    # a word: "ties" is of "properties"
    parts = "▁" in vocabulary
    forms = {space + form for form in written for space in ("", "Ġ", "▁") if space or not (parts and form.islower())}
    ids = {vocabulary[form] for form in forms if form in vocabulary}
    if rule == "first-piece" and not ids:
        pieces = tokenizer(f" {label}", add_special_tokens=False)["input_ids"]
        texts = tokenizer.convert_ids_to_tokens(pieces)
        ids = {next((i for i, text in zip(pieces, texts, strict=True) if text not in ("Ġ", "▁")), pieces[0])}
    return tuple(sorted(ids))


def _plural(name: str) -> str:
    """As the captions of the miniature world have it, and -es where English wants it."""
    return f"{name}es" if name not in IRREGULAR and name.endswith(("s", "x", "ch", "sh")) else plural(name)


@dataclass(frozen=True, eq=False)
class LabelHits:
    """What one lens found in a set of pictures, under one rule and one k. A few bytes per picture, layer and label."""

    labels: tuple[str, ...]  #: The labels that have a token under the rule
    present: Bool[np.ndarray, "pictures labels"]  #: Which labels each picture has
    retrieved: Bool[np.ndarray, "layers pictures labels"]  #: Which labels some visual token of the picture retrieves
    tokens: Int[np.ndarray, " pictures"]  #: Visual tokens of each picture
    object_tokens: Int[np.ndarray, " pictures"]  #: Of these, in the box of an object whose label counts
    grounded: Int[np.ndarray, "layers pictures"]  #: Object tokens that retrieve the label of an object they lie in
    label_tokens: Int[np.ndarray, " labels"] = field(repr=False)  #: Object tokens in a box of each, in all pictures
    retrieving: Int[np.ndarray, "layers labels"] = field(repr=False)  #: Of whatever object, that retrieve each

    def token_rows(self) -> pd.DataFrame:
        """One row per picture and layer, for `embedlens.stats`: grounded, object_tokens, tokens."""
        return self._rows(grounded=self.grounded, object_tokens=self.object_tokens, tokens=self.tokens)

    def _rows(self, **columns: np.ndarray) -> pd.DataFrame:
        """Columns [layers, pictures], or [pictures] for all layers alike, as rows of picture and layer."""
        layers, pictures = self.grounded.shape
        flat = {name: np.broadcast_to(values, (layers, pictures)).ravel() for name, values in columns.items()}
        at = {"id": np.tile(np.arange(pictures), layers), "layer": np.repeat(np.arange(layers), pictures)}
        return pd.DataFrame(at | flat)

    def label_rows(self) -> pd.DataFrame:
        """One row per picture and layer, for `embedlens.stats`: asked (labels of the picture), found, by_accident.

        `by_accident` over `asked` is what would be found if each picture were asked for the labels of another, over all
        pairs of different pictures. A picture's part of a pair is what its labels find elsewhere and what its tokens
        find of labels elsewhere, less the mean of one side, so that drawing pictures draws both.
        """
        pictures = len(self.present)
        own = (self.retrieved & self.present).sum(-1)  # [layers, pictures]
        asks = np.einsum("pn,ln->lp", self.present, self.retrieved.sum(1)) - own
        answers = np.einsum("lpn,n->lp", self.retrieved, self.present.sum(0)) - own
        accident = (asks + answers - asks.mean(1, keepdims=True)) / max(1, pictures - 1)
        return self._rows(asked=self.present.sum(-1), found=own, by_accident=accident)

    def beyond(self, seed: int = 0) -> pd.DataFrame:
        """Share of labels found less what is found by accident, by layer, as `stats.drawn` gives it."""
        parts = (stats.drawn(self.label_rows(), name, "asked", "layer", seed=seed) for name in ("found", "by_accident"))
        return next(parts) - next(parts)

    def token_chance(self) -> Float[np.ndarray, " layers"]:
        """`grounded` over `object_tokens` if each token lay in an object of another object token, drawn at random."""
        share = self.label_tokens / max(1, self.label_tokens.sum())
        return (self.retrieving @ share) / max(1, self.object_tokens.sum())


def objects(sample: Sample, grid: PatchGrid) -> list[tuple[str, Box, Bool[Tensor, " n"]]]:
    """Of each object of a picture: label, box (x0, y0, x1, y1), patches whose centre lies in it; a crowd is none."""
    shown = [entry for entry in sample.annotations if not entry.get("iscrowd")]
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (entry["bbox"] for entry in shown)]
    names = (sample.category_names[entry["category_id"]] for entry in shown)
    return [(name, box, grid.inside(box)) for name, box in zip(names, boxes, strict=True)]


def label_hits(
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    ks: Sequence[int] = (5,),
    rules: Sequence[str] = ("head-word",),
    lenses: Mapping[str, Lens | Reading] | None = None,
    batch_size: int = 8,
) -> dict[tuple[str, int, str], LabelHits]:
    """Read the visual tokens of every picture at every layer and look for the picture's labels, one forward pass each.

    Args:
        samples: pictures with COCO-style annotations, all of one data set; those that cannot be read are left out.
        ks: how many words of a token count as retrieved, at most the vocabulary.
        rules: which tokens count as a label, see RULES.
        lenses: name → lens, read at every layer, or `Reading` (such as `embedlens.redundancy.words_alone`); default:
            EmbedLens and LogitLens of the model, under these names.

    Returns:
        (name of the lens, k, rule) → what it found; layer l is `model.hidden_states(prompt)[l]`.
    """
    if not ks or not rules:
        raise EmbedLensError("no k or no rule: pass at least one of each")
    if lenses is None:
        lenses = {"EmbedLens": EmbedLens.from_model(model), "LogitLens": LogitLens.from_model(model)}
    tables: dict[str, tuple[tuple[str, ...], Bool[Tensor, "V labels"]]] = {}
    parts: dict[tuple[str, int, str], list[dict[str, np.ndarray]]] = {}
    for batch, prompts in looked_at(model, samples, batch_size):
        tables = tables or {rule: _table(model, batch[0].category_names, rule) for rule in rules}
        for sample, prompt, states in zip(batch, prompts, model.streams_of(prompts, batch_size), strict=True):
            shown = objects(sample, prompt.grid)
            for reader, lens in lenses.items():
                tokens, most = states[:, prompt.visual], max(ks)
                ids = (lens.topk(tokens, most)[1] if isinstance(lens, Lens) else lens(model, prompt, most)).cpu()
                for rule, (labels, table) in tables.items():
                    on = torch.zeros(len(prompt.grid), len(labels), dtype=torch.bool)
                    for name, _, inside in shown:
                        if name in labels:
                            on[:, labels.index(name)] |= inside
                    present = np.isin(labels, [name for name, _, _ in shown])
                    for k in ks:
                        named = table[ids[..., :k]].any(-2)  # [layers, tokens, labels]
                        parts.setdefault((reader, k, rule), []).append(_part(named, on) | {"present": present})
    hits = {}
    for key, found in parts.items():
        stacked = {name: np.stack([part[name] for part in found]) for name in found[0]}
        stacked["retrieved"], stacked["grounded"] = stacked["retrieved"].swapaxes(0, 1), stacked["grounded"].T
        stacked |= {name: stacked[name].sum(0) for name in ("label_tokens", "retrieving")}
        hits[key] = LabelHits(tables[key[2]][0], **stacked)
    return hits


def named_patches(
    model: VisionLanguageModel, sample: Sample, grid: PatchGrid, ids: Int[Tensor, "n k"], rule: str = "head-word"
) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]:
    """Of one picture's patches: which retrieve the label of an object they lie in, and which lie in an object. `ids`
    are the retrieved vocabulary entries of each patch, as `lens.topk` gives them."""
    named, covered = torch.zeros(2, len(grid), dtype=torch.bool)
    for name, _, inside in objects(sample, grid):
        counted = torch.tensor(label_ids(model.tokenizer, name, rule), dtype=torch.long)
        covered |= inside
        named |= inside & torch.isin(ids.cpu(), counted).any(-1)
    return named, covered


def largest_object(
    model: VisionLanguageModel, sample: Sample, grid: PatchGrid, rule: str = "head-word"
) -> tuple[str, int]:
    """Label and middle patch of the picture's largest object whose label has a token: one token to look at. Picked by
    what the picture holds, never by how it comes out. Of equal boxes the first counts."""
    found = [(name, box) for name, box, _ in objects(sample, grid) if label_ids(model.tokenizer, name, rule)]
    if not found:
        raise EmbedLensError(f"no object of picture {sample.id} has a label with a token: take another picture")
    name, (x0, y0, x1, y1) = max(found, key=lambda one: (one[1][2] - one[1][0]) * (one[1][3] - one[1][1]))
    return name, grid.patch_at((x0 + x1) / 2, (y0 + y1) / 2)


def _table(
    model: VisionLanguageModel, category_names: Mapping[int, str], rule: str
) -> tuple[tuple[str, ...], Bool[Tensor, "V labels"]]:
    """Labels that have tokens, and which vocabulary entry counts as which of them."""
    ids = {name: label_ids(model.tokenizer, name, rule) for name in category_names.values()}
    labels = tuple(name for name, found in ids.items() if found)
    table = torch.zeros(len(model.tokens), len(labels), dtype=torch.bool)
    for column, name in enumerate(labels):
        table[list(ids[name]), column] = True
    return labels, table


def _part(found: Bool[Tensor, "layers tokens labels"], on: Bool[Tensor, "tokens labels"]) -> dict[str, np.ndarray]:
    """What is kept of one picture."""
    kept = {"retrieved": found.any(1), "object_tokens": on.any(-1).sum(), "label_tokens": on.sum(0)}
    kept |= {"grounded": (found & on).any(-1).sum(-1), "retrieving": found[:, on.any(-1)].sum(1)}
    return {"tokens": np.array(len(on)), **{name: value.numpy() for name, value in kept.items()}}
