"""Which object labels a lens finds in the visual tokens of a picture: matching, recall, chance, intervals.

Equation 2 of the paper averages over tokens, while its sentence counts a label as found if *any* visual token of the
picture retrieves it. Here the sentence is `LabelHits.recall` and the equation is `LabelHits.token_rate`.

What counts as a label's token is a rule (RULES), what counts as retrieved is k; both are arguments. With many tokens
of k words each a picture touches many labels by accident, so every recall stands beside the recall of labels that
belong to other pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.intervals import Interval, draws, percentile_interval, ratio_interval
from embedlens.lenses import EmbedLens, Lens, LogitLens
from embedlens.patches import PatchGrid
from embedlens.samples import Sample, readable
from embedlens.samples.miniworld.language import IRREGULAR, plural
from embedlens.vlm import QUESTION

if TYPE_CHECKING:
    from embedlens.vlm import VisionLanguageModel

#: strict: the label or its plural as one token; head-word: or the last word of a label of several words ("phone" of
#: "cell phone"); first-piece: or the first piece of a label that is several tokens (which gives false hits).
RULES = ("strict", "head-word", "first-piece")
LENSES: tuple[type[EmbedLens] | type[LogitLens], ...] = (EmbedLens, LogitLens)


def label_ids(tokenizer: Any, label: str, rule: str = "head-word") -> tuple[int, ...]:
    """The vocabulary entries that count as a label, ascending; empty if none does.

    A word counts with or without a leading space, in lower case, Capitalised or in CAPITALS, in singular and plural.

    Args:
        tokenizer: byte-level BPE or SentencePiece, as Hugging Face loads it.
        label: a category name such as "cell phone".
        rule: one of RULES; each includes the one before.

    Raises:
        EmbedLensError: unknown rule, or an empty label.
    """
    if rule not in RULES:
        raise EmbedLensError(f"unknown rule {rule!r}: use one of {', '.join(RULES)}")
    if not label.strip():
        raise EmbedLensError("the label is empty: pass a category name")
    words = {label, _plural(label)}
    if rule != "strict" and " " in label:
        head = label.rsplit(" ", 1)[1]
        words |= {head, _plural(head)}
    vocabulary = tokenizer.get_vocab()
    written = {form for word in words for form in (word.lower(), word.capitalize(), word.upper())}
    # Ġ is the leading space of byte-level vocabularies, ▁ that of SentencePiece
    ids = {vocabulary[space + form] for form in written for space in ("", "Ġ", "▁") if space + form in vocabulary}
    if rule == "first-piece" and not ids:
        pieces = tokenizer(f" {label}", add_special_tokens=False)["input_ids"]
        texts = tokenizer.convert_ids_to_tokens(pieces)
        ids = {next((i for i, text in zip(pieces, texts, strict=True) if text not in ("Ġ", "▁")), pieces[0])}
    return tuple(sorted(ids))


def _plural(name: str) -> str:
    """As the captions of the miniature world have it, and -es where English wants it.

    >>> [_plural(name) for name in ("dog", "knife", "bench", "cell phone")]
    ['dogs', 'knives', 'benches', 'cell phones']
    """
    return f"{name}es" if name not in IRREGULAR and name.endswith(("s", "x", "ch", "sh")) else plural(name)


@dataclass(frozen=True, eq=False)
class LabelHits:
    """What one lens found in a set of pictures, under one rule and one k. A few bytes per picture, layer and label."""

    labels: tuple[str, ...]
    """The labels that have a token under the rule."""
    present: Bool[np.ndarray, "pictures labels"]
    """Which labels each picture has."""
    retrieved: Bool[np.ndarray, "layers pictures labels"]
    """Which labels some visual token of the picture retrieves."""
    tokens: Int[np.ndarray, " pictures"]
    """Visual tokens of each picture."""
    object_tokens: Int[np.ndarray, " pictures"]
    """Of these, tokens whose patch centre lies in the box of an object whose label counts."""
    grounded: Int[np.ndarray, "layers pictures"]
    """Object tokens that retrieve the label of an object they lie in."""
    label_tokens: Int[np.ndarray, " labels"] = field(repr=False)
    """Object tokens in a box of each label, over all pictures."""
    retrieving: Int[np.ndarray, "layers labels"] = field(repr=False)
    """Object tokens, of whatever object, that retrieve each label, over all pictures."""

    def token_rows(self) -> pd.DataFrame:
        """One row per picture and layer, for `embedlens.stats`: grounded, object_tokens, tokens."""
        layers, pictures = self.grounded.shape
        return pd.DataFrame(
            {
                "id": np.tile(np.arange(pictures), layers),
                "layer": np.repeat(np.arange(layers), pictures),
                "grounded": self.grounded.reshape(-1),
                "object_tokens": np.tile(self.object_tokens, layers),
                "tokens": np.tile(self.tokens, layers),
            }
        )

    @property
    def n_pairs(self) -> int:
        """N of the recall: (picture, label) pairs."""
        return int(self.present.sum())

    @property
    def found(self) -> Int[np.ndarray, "pictures layers"]:
        """How many of its own labels each picture retrieves."""
        return (self.retrieved & self.present).sum(-1).T

    def recall(self, **bootstrap: Any) -> Interval:
        """Share of (picture, label) pairs whose label some visual token of the picture retrieves, by layer.

        Keyword arguments are those of `ratio_interval`.
        """
        return ratio_interval(self.found, self.present.sum(-1), **bootstrap)

    def token_rate(self, of: Literal["object tokens", "all tokens"] = "object tokens", **bootstrap: Any) -> Interval:
        """Share of tokens that retrieve the label of an object they lie in, by layer (Eq. 2 read to the letter)."""
        return ratio_interval(
            self.grounded.T, self.object_tokens if of == "object tokens" else self.tokens, **bootstrap
        )

    def permuted(self, permutations: int = 1000, seed: int = 0, level: float = 0.95) -> Interval:
        """Recall when each picture is asked for the labels of another: mean over permutations, and their spread.

        Pictures are permuted with their whole label sets, so that label frequencies, co-occurrence and the number of
        labels stay as they are.
        """
        generator = np.random.default_rng(seed)
        orders = [generator.permutation(len(self.present)) for _ in range(permutations)]
        present = self.present.astype(np.float32)
        drawn = []
        for layer in self.retrieved.astype(np.float32):
            shared = present @ layer.T  # [i, j]: labels of picture i that picture j retrieves
            drawn.append([shared[order, np.arange(len(order))].sum() for order in orders])
        rates = np.asarray(drawn).T / self.n_pairs
        return percentile_interval(rates.mean(0), rates, level, rates.shape[1:])

    def chance(self) -> Float[np.ndarray, " layers"]:
        """What `permuted` tends to when no picture may keep its own labels, in closed form."""
        return self._excess(np.ones((1, len(self.present))))[1][0]

    def excess(self, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
        """Recall minus `chance`, with a bootstrap over pictures in which both are computed anew."""
        value, chance = self._excess(np.ones((1, len(self.present))))
        drawn, drawn_chance = self._excess(draws(len(self.present), resamples, seed))
        return percentile_interval((value - chance)[0], drawn - drawn_chance, level, value.shape[1:])

    def excess_over(self, other: LabelHits, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
        """`excess` of this lens minus that of another on the same pictures, by layer, paired."""
        whole, drawn = np.ones((1, len(self.present))), draws(len(self.present), resamples, seed)
        mine, theirs = (hits._excess(whole) for hits in (self, other))
        value = (mine[0] - mine[1]) - (theirs[0] - theirs[1])
        mine, theirs = (hits._excess(drawn) for hits in (self, other))
        return percentile_interval(value[0], (mine[0] - mine[1]) - (theirs[0] - theirs[1]), level, value.shape[1:])

    def _excess(
        self, draws: Float[np.ndarray, "resamples pictures"]
    ) -> tuple[Float[np.ndarray, "resamples layers"], Float[np.ndarray, "resamples layers"]]:
        """Recall and chance of pictures drawn so many times each.

        Chance pairs the labels of each picture with every picture that is not it: per label, (number of pictures that
        have it) x (number that retrieve it), less the pairs of a picture with itself.
        """
        present = self.present.astype(np.float64)
        n = draws.sum(1, keepdims=True)
        asked = draws @ present.sum(1)
        others = np.maximum((draws * (n - draws)) @ present.sum(1), 1)
        own = (self.retrieved & self.present).sum(-1).astype(np.float64)  # [layers, pictures]
        recall = (draws @ own.T) / np.maximum(asked, 1)[:, None]
        with_label = draws @ present
        pairs = np.stack([(with_label * (draws @ layer.astype(np.float64))).sum(-1) for layer in self.retrieved], -1)
        return recall, (pairs - (draws**2) @ own.T) / others[:, None]

    def token_chance(self) -> Float[np.ndarray, " layers"]:
        """`token_rate` over object tokens if every one had the label of an object token drawn at random."""
        share = self.label_tokens / max(1, self.label_tokens.sum())
        return (self.retrieving @ share) / max(1, self.object_tokens.sum())


def label_hits(
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    ks: Sequence[int] = (5,),
    rules: Sequence[str] = ("head-word",),
    lenses: Mapping[str, Lens] | None = None,
    batch_size: int = 8,
) -> dict[tuple[str, int, str], LabelHits]:
    """Read the visual tokens of every picture at every layer and look for the picture's labels.

    One forward pass a picture, whatever the number of lenses, ks and rules; hidden states are dropped batch by batch.

    Args:
        model: from `embedlens.load`.
        samples: pictures with COCO-style annotations, all of one data set; crowds are left out, and so are, with a
            warning, pictures that cannot be read, see `embedlens.samples.readable`.
        ks: how many words of a token count as retrieved.
        rules: which tokens count as a label, see RULES.
        lenses: name → lens; default: EmbedLens and LogitLens of the model, under these names.
        batch_size: pictures at a time.

    Returns:
        (name of the lens, k, rule) → what it found; layer l is `model.hidden_states(prompt)[l]`.

    Raises:
        EmbedLensError: no samples, no k, or k larger than the vocabulary.
    """
    if not ks or not rules:
        raise EmbedLensError("no k or no rule: pass at least one of each")
    readers = {lens.__name__: lens.from_model(model) for lens in LENSES} if lenses is None else dict(lenses)
    tables: dict[str, tuple[tuple[str, ...], Bool[Tensor, "V labels"]]] = {}
    parts: dict[tuple[str, int, str], list[dict[str, np.ndarray]]] = {}
    stream = readable(samples)
    while batch := list(islice(stream, batch_size)):
        if not tables:
            tables = {rule: _table(model, batch[0].category_names, rule) for rule in rules}
        prompts = model.prompts([sample.image for sample in batch], [QUESTION] * len(batch))
        for sample, prompt, states in zip(batch, prompts, model.hidden_states_of(prompts, batch_size), strict=True):
            entries = [entry for entry in sample.annotations if not entry["iscrowd"]]
            objects = [(sample.category_names[entry["category_id"]], entry["bbox"]) for entry in entries]
            inside = [(name, prompt.grid.inside((x, y, x + w, y + h))) for name, (x, y, w, h) in objects]
            for reader, lens in readers.items():
                ids = lens.topk(states[:, prompt.visual], max(ks))[1].cpu()
                for rule, (labels, table) in tables.items():
                    on = torch.zeros(int(prompt.visual.sum()), len(labels), dtype=torch.bool)
                    for name, covered in inside:
                        if name in labels:
                            on[:, labels.index(name)] |= covered
                    named = {name for name, _ in objects}
                    for k in ks:
                        found = table[ids[..., :k]].any(-2)  # [layers, tokens, labels]
                        parts.setdefault((reader, k, rule), []).append(_part(found, on, labels, named))
    if not parts:
        raise EmbedLensError("no samples: pass at least one picture")
    return {key: _together(tables[key[2]][0], found) for key, found in parts.items()}


def named_patches(
    model: VisionLanguageModel, sample: Sample, grid: PatchGrid, ids: Int[Tensor, "n k"], rule: str = "head-word"
) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]:
    """Of one picture's patches: which retrieve the label of an object they lie in, and which lie in an object.

    Args:
        grid: `prompt.grid` of the picture.
        ids: retrieved vocabulary entries of each patch, as `lens.topk` gives them.
    """
    named = torch.zeros(len(grid), dtype=torch.bool)
    covered = torch.zeros(len(grid), dtype=torch.bool)
    for entry in (entry for entry in sample.annotations if not entry["iscrowd"]):
        x, y, w, h = entry["bbox"]
        inside = grid.inside((x, y, x + w, y + h))
        counted = label_ids(model.tokenizer, sample.category_names[entry["category_id"]], rule)
        covered |= inside
        named |= inside & torch.isin(ids.cpu(), torch.tensor(counted, dtype=torch.long)).any(-1)
    return named, covered


def largest_object(
    model: VisionLanguageModel, sample: Sample, grid: PatchGrid, rule: str = "head-word"
) -> tuple[str, int]:
    """Label and middle patch of the picture's largest object whose label has a token: one token to look at.

    Picked by what the picture holds, never by how it comes out. Crowds are left out; of equal boxes the first counts.

    Raises:
        EmbedLensError: no object of the picture has a label with a token.
    """
    found = [
        (entry["bbox"], sample.category_names[entry["category_id"]])
        for entry in sample.annotations
        if not entry["iscrowd"] and label_ids(model.tokenizer, sample.category_names[entry["category_id"]], rule)
    ]
    if not found:
        raise EmbedLensError(f"no object of picture {sample.id} has a label with a token: take another picture")
    (x, y, w, h), name = max(found, key=lambda entry: entry[0][2] * entry[0][3])
    return name, grid.patch_at(x + w / 2, y + h / 2)


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


def _part(
    found: Bool[Tensor, "layers tokens labels"],
    on: Bool[Tensor, "tokens labels"],
    labels: tuple[str, ...],
    named: set[str],
) -> dict[str, np.ndarray]:
    """What is kept of one picture."""
    of_object = on.any(-1)
    return {
        "present": np.array([name in named for name in labels]),
        "retrieved": found.any(1).numpy(),
        "tokens": np.array(len(on)),
        "object_tokens": of_object.sum().numpy(),
        "grounded": (found & on).any(-1).sum(-1).numpy(),
        "label_tokens": on.sum(0).numpy(),
        "retrieving": found[:, of_object].sum(1).numpy(),
    }


def _together(labels: tuple[str, ...], parts: list[dict[str, np.ndarray]]) -> LabelHits:
    stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    return LabelHits(
        labels=labels,
        present=stacked["present"],
        retrieved=stacked["retrieved"].swapaxes(0, 1),
        tokens=stacked["tokens"],
        object_tokens=stacked["object_tokens"],
        grounded=stacked["grounded"].T,
        label_tokens=stacked["label_tokens"].sum(0),
        retrieving=stacked["retrieving"].sum(0),
    )
