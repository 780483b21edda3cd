"""Which of two lenses finds the labels of a picture, layer by layer: E13 and E14 (Section 3.2), and their ablations.

What each lens finds is measured by `embedlens.labels`; here it is held against chance, one lens against the other, and
against other ways to count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from embedlens import claims, figures
from embedlens.claims import Finding
from embedlens.intervals import Interval, ratio_interval
from embedlens.labels import QUESTION, RULES, LabelHits, label_hits, label_ids, largest_object
from embedlens.lenses import EmbedLens, LogitLens
from embedlens.samples import Sample
from embedlens.words import textless_ids

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from embedlens.vlm import Prompt, VisionLanguageModel

SUBSTANTIAL = 0.25  # of all labels, beyond chance; set before the run
KS = (1, 3, 5)
LENSES = ("EmbedLens", "LogitLens")
Hits = Mapping[tuple[str, int, str], LabelHits]  # as `label_hits` gives them


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Labels that both lenses find in the same tokens of the same pictures, by layer (claims E13 and E14)."""

    n_pictures: int
    middle: int
    """Last of the shallow and middle layers."""
    recall: Mapping[str, Interval]
    """Lens → share of labels found."""
    chance: Mapping[str, Interval]
    """The same of the labels of other pictures: mean and spread over permutations."""
    excess: Mapping[str, Interval]
    """Recall less chance, both redone in every resample."""
    lead: Interval
    """Recall of EmbedLens less that of LogitLens, paired."""
    lead_beyond_chance: Interval
    """The same, each less its chance."""
    mean_lead: Interval
    """Mean of `lead` over layers 0 to `middle`; 0-d."""

    @property
    def n_layers(self) -> int:
        """Layers read, the input included."""
        return len(self.lead.value)

    @property
    def ahead(self) -> int:
        """Shallow and middle layers at which the interval of the lead lies above zero."""
        return int((self.lead.low[: self.middle + 1] > 0).sum())

    @property
    def ahead_beyond_chance(self) -> int:
        """The same, chance taken off both lenses."""
        return int((self.lead_beyond_chance.low[: self.middle + 1] > 0).sum())

    def table(self) -> pd.DataFrame:
        """What each lens finds, and its chance, by layer."""
        columns = {}
        for lens in LENSES:
            columns[f"{lens} finds"] = self.recall[lens].texts()
            columns[f"{lens}, chance"] = self.chance[lens].texts()
        return self._by_layer(columns)

    def lead_table(self) -> pd.DataFrame:
        """By how much EmbedLens leads, by layer."""
        leads = {"lead of EmbedLens": self.lead, "the same less chance": self.lead_beyond_chance}
        return self._by_layer({name: found.texts() for name, found in leads.items()})

    def _by_layer(self, columns: Mapping[str, list[str]]) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(columns, index=pd.RangeIndex(self.n_layers, name="layer"))

    def findings(self) -> dict[str, Finding]:
        """E13 and E14."""
        beyond = self.excess["EmbedLens"].at(0)
        layers = self.middle + 1
        e13 = lead_verdict(
            float(self.mean_lead.low), float(self.mean_lead.high), min(self.ahead, self.ahead_beyond_chance), layers
        )
        return {
            "E13": Finding.of(
                self.mean_lead,
                self.n_pictures,
                e13,
                f"Lead of EmbedLens over LogitLens, mean of layers 0 to {self.middle}. Its interval is above 0 at "
                f"{self.ahead} of these {layers} layers, and at {self.ahead_beyond_chance} after chance is taken off "
                "both.",
            ),
            "E14": Finding.of(
                beyond,
                self.n_pictures,
                substantial_verdict(float(beyond.low), float(beyond.high)),
                f"Share of labels found at layer 0, less chance: {self.recall['EmbedLens'].value[0]:.3f} less "
                f"{self.chance['EmbedLens'].value[0]:.3f}.",
            ),
        }

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        recall, chance = self.recall, self.chance
        behind = np.flatnonzero(self.lead.value < 0)
        layers = f"layer{'s' if len(behind) > 1 else ''} {', '.join(map(str, behind))}"
        above = {lens: int((recall[lens].value > chance[lens].high).sum()) for lens in LENSES}
        return {
            "recall_first": recall["EmbedLens"].at(0),
            "chance_first": chance["EmbedLens"].at(0),
            "logit_first": recall["LogitLens"].value[0],
            "logit_chance_first": chance["LogitLens"].value[0],
            "last_middle": self.middle,
            "n_middle": self.middle + 1,
            "mean_lead": self.mean_lead,
            "ahead": self.ahead,
            "ahead_beyond_chance": self.ahead_beyond_chance,
            "behind_layers": layers if len(behind) else "no layer",
            "beyond_first": self.excess["EmbedLens"].at(0),
            "embed_above_chance": above["EmbedLens"],
            "logit_above_chance": above["LogitLens"],
            "n_layers_read": self.n_layers,
        }

    def numbers(self) -> dict[str, float]:
        """What the record keeps of it."""
        kinds = {"recall": self.recall, "chance": self.chance, "excess": self.excess}
        return {
            f"{kind}_{lens}_layer_{at}": float(x)
            for kind, by_lens in kinds.items()
            for lens, found in by_lens.items()
            for at, x in enumerate(found.value)
        }


def retrieval(embed: LabelHits, logit: LabelHits, middle: int, permutations: int = 1000, seed: int = 0) -> Retrieval:
    """Hold two lenses against chance and against one another.

    Args:
        embed, logit: what each finds in the same pictures.
        middle: last of the shallow and middle layers.
        permutations: of the pictures' label sets, for chance.
        seed: of the permutations and the bootstrap.
    """
    lenses = dict(zip(LENSES, (embed, logit), strict=True))
    asked, ahead = embed.present.sum(-1), embed.found - logit.found
    return Retrieval(
        n_pictures=len(embed.present),
        middle=middle,
        recall={name: hits.recall(seed=seed) for name, hits in lenses.items()},
        chance={name: hits.permuted(permutations, seed=seed) for name, hits in lenses.items()},
        excess={name: hits.excess(seed=seed) for name, hits in lenses.items()},
        lead=ratio_interval(ahead, asked, seed=seed),
        lead_beyond_chance=embed.excess_over(logit, seed=seed),
        mean_lead=ratio_interval(ahead[:, : middle + 1].mean(1), asked, seed=seed),
    )


def substantial_verdict(low: float, high: float, bar: float = SUBSTANTIAL) -> str:
    """E14, "a substantial portion of the labels": more than a quarter of them beyond chance.

    It does not hold if the interval neither lies above zero nor reaches the bar.

    >>> substantial_verdict(0.3, 0.4), substantial_verdict(0.1, 0.2), substantial_verdict(-0.1, 0.1)
    ('holds', 'partly', 'does not hold')
    """
    return claims.HOLDS if low > bar else claims.PARTLY if low > 0 or high > bar else claims.FAILS


def lead_verdict(low: float, high: float, ahead: int, layers: int) -> str:
    """E13, "more labels at shallow and middle layers": in the mean of these layers, and at each, chance taken off too.

    Args:
        low, high: interval of the mean lead.
        ahead: layers at which the lead lies above zero, with chance and without.
        layers: shallow and middle layers.

    >>> lead_verdict(0.1, 0.2, 6, 6), lead_verdict(0.1, 0.2, 5, 6), lead_verdict(-0.2, -0.1, 0, 6)
    ('holds', 'partly', 'does not hold')
    """
    verdict = claims.judged(low, high)
    return claims.PARTLY if verdict == claims.HOLDS and ahead < layers else verdict


def who_finds_more(lead: Interval) -> str:
    """At how many layers the lead of EmbedLens lies above zero with its whole interval, and at how many below.

    >>> who_finds_more(Interval(np.array([0.2, -0.1]), np.array([0.1, -0.3]), np.array([0.3, 0.1])))
    'EmbedLens finds more at 1 of 2 layers, LogitLens at 0'
    """
    more, fewer = int((lead.low > 0).sum()), int((lead.high < 0).sum())
    return f"EmbedLens finds more at {more} of {len(lead.value)} layers, LogitLens at {fewer}"


def recall_figure(found: Retrieval, model: str) -> Figure:
    """Labels found by each lens, by layer, each with its chance; its title counts `who_finds_more`."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.4))
    axes.axvspan(-0.3, found.middle + 0.5, color=figures.SHADE, zorder=0)
    place: dict[str, Any] = {"xycoords": "axes fraction", "va": "top", "fontsize": 10, "color": "#555555"}
    axes.annotate("shallow and middle", (0.02, 0.97), **place)
    for lens, look in figures.LENSES.items():
        chance = found.chance[lens]
        figures.layer_curve(axes, *found.recall[lens], lens, look)
        figures.chance_curve(axes, chance.value, f"chance, {lens}", look.line, chance.low, chance.high)
    axes.set_ylim(0, 1)
    axes.set_ylabel("labels found (top 5 of any token)")
    axes.set_title(who_finds_more(found.lead))
    figures.label_ends(axes)
    figures.sign(fig, model, f"n = {found.n_pictures} held-out pictures; more: by the whole interval of the difference")
    return fig


def excess_figure(found: Retrieval, model: str) -> Figure:
    """Labels found less chance, by lens and layer, with the bar of E14."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.0))
    axes.axvspan(-0.3, found.middle + 0.5, color=figures.SHADE, zorder=0)
    for lens, look in figures.LENSES.items():
        figures.layer_curve(axes, *found.excess[lens], lens, look)
    axes.axhline(SUBSTANTIAL, color=figures.FACT, linestyle="--", linewidth=1.2)
    axes.annotate("bar of E14", (0, SUBSTANTIAL + 0.01), color=figures.FACT, fontsize=10)
    axes.axhline(0, color=figures.CHANCE, linewidth=1.2)
    axes.set_ylabel("labels found, less chance")
    axes.set_title(f"Beyond chance,\n{who_finds_more(found.lead_beyond_chance)}")
    figures.label_ends(axes)
    figures.sign(fig, model, f"n = {found.n_pictures} held-out pictures; more: by the whole interval of the difference")
    return fig


# --- other ways to count, other ways to read -------------------------------------------------------------------------


def rules_figure(hits: Hits, middle: int, model: str, seed: int = 0) -> Figure:
    """Labels found less chance for every rule and number of words, by layer and lens."""
    from matplotlib import pyplot as plt

    settings = [(rule, k) for rule in RULES for k in KS]
    won = [
        hits["EmbedLens", k, rule].excess_over(hits["LogitLens", k, rule], resamples=2).value for rule, k in settings
    ]
    ahead_in = sum(float(value[: middle + 1].mean()) > 0 for value in won)
    fig, grid = plt.subplots(len(RULES), len(KS), figsize=(figures.WIDTH, 6.2), sharex=True, sharey=True)
    for axes, (rule, k) in zip(grid.flat, settings, strict=True):
        for lens, look in figures.LENSES.items():
            figures.layer_curve(axes, *hits[lens, k, rule].excess(seed=seed, resamples=500), lens, look)
        axes.axhline(0, color=figures.CHANCE, linewidth=1.0)
        axes.set_xlabel("")
        axes.set_title(f"{rule}, top {k}", fontsize=11, fontweight="normal")
    grid[0, 0].legend(loc="upper left")
    fig.supylabel("labels found, less chance", fontsize=12)
    figures.headline(fig, f"EmbedLens has the higher mean in {ahead_in} of {len(settings)} ways to count")
    n = len(hits["EmbedLens", KS[0], RULES[0]].present)
    figures.sign(fig, model, f"by layer, n = {n} held-out pictures; means of layers 0 to {middle}")
    return fig


def rules_table(hits: Hits, seed: int = 0) -> pd.DataFrame:
    """Layer 0 under every rule and number of words."""
    import pandas as pd

    rows = [
        {
            "lens": lens,
            "rule": rule,
            "k": k,
            "finds": found.recall(seed=seed).texts()[0],
            "chance": round(float(found.permuted(200, seed=seed).value[0]), 2),
            "labels": len(found.labels),
            "N": found.n_pairs,
        }
        for (lens, k, rule), found in hits.items()
    ]
    return pd.DataFrame(rows).set_index(["lens", "rule", "k"]).sort_index()


@dataclass(frozen=True, eq=False)
class Readings:
    """Both lenses as they are and changed: norm, vocabulary entries without text, mean of the embedding rows."""

    pairs: Mapping[str, tuple[LabelHits, LabelHits]]
    """Reading → what EmbedLens and what LogitLens finds; the unchanged one first."""
    middle: int
    n_textless: int
    seed: int

    @property
    def leads(self) -> list[Interval]:
        """Mean lead of EmbedLens over the shallow and middle layers, by reading."""
        found = [((e.found - o.found)[:, : self.middle + 1].mean(1), e.present.sum(-1)) for e, o in self.pairs.values()]
        return [ratio_interval(*part, seed=self.seed) for part in found]

    def table(self) -> pd.DataFrame:
        """Labels found at layer 0, and the lead, by reading."""
        import pandas as pd

        columns = {
            "EmbedLens, layer 0, less chance": [e.excess(seed=self.seed) for e, _ in self.pairs.values()],
            "LogitLens, layer 0, less chance": [o.excess(seed=self.seed) for _, o in self.pairs.values()],
            "lead of EmbedLens, shallow and middle": self.leads,
        }
        rows = {name: [found.texts()[0] for found in column] for name, column in columns.items()}
        return pd.DataFrame(rows, index=pd.Index(self.pairs, name="reading"))

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        signs = [np.sign(float(found.value)) for found in self.leads]
        centred, _ = self.pairs["embedding rows less their mean"]
        return {
            "ablations_turn": sum(bool(sign != signs[0]) for sign in signs[1:]) or "none",
            "recall_centred": centred.recall(seed=self.seed).value[0],
            "n_textless": self.n_textless,
        }


def readings(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    embed: LabelHits,
    logit: LabelHits,
    middle: int,
    seed: int = 0,
) -> Readings:
    """Read the same pictures with LogitLens without the final norm, without entries that are no text, rows centred.

    Args:
        embed, logit: what the unchanged lenses find in these pictures.
    """
    textless = textless_ids(model.tokenizer, len(model.tokens))
    rows = model.input_embeddings.float()
    changed = {
        "no norm": LogitLens.from_model(model, norm=False),
        "embed": EmbedLens.from_model(model, exclude=textless),
        "logit": LogitLens.from_model(model, exclude=textless),
        "centred": EmbedLens(rows - rows.mean(0), model.tokens),
    }
    found = {name: hits for (name, _, _), hits in label_hits(model, samples, lenses=changed).items()}
    pairs = {
        "as above": (embed, logit),
        "LogitLens without final norm": (embed, found["no norm"]),
        "text only, both lenses": (found["embed"], found["logit"]),
        "embedding rows less their mean": (found["centred"], logit),
    }
    return Readings(pairs, middle, len(textless), seed)


def tokens_figure(embed: LabelHits, logit: LabelHits, model: str, seed: int = 0) -> Figure:
    """Object tokens that name their object, by layer and lens; the title counts bands that lie above chance whole."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.0))
    above = {}
    for (lens, look), found in zip(figures.LENSES.items(), (embed, logit), strict=True):
        rate, chance = found.token_rate(seed=seed), found.token_chance()
        above[lens] = int((rate.low > chance).sum())
        figures.layer_curve(axes, *rate, lens, look)
        figures.chance_curve(axes, chance, f"chance, {lens}", look.line)
    axes.set_ylim(0, 1)
    axes.set_ylabel("object tokens that name their object")
    axes.set_title("Layers above chance: " + ", ".join(f"{lens} {n} of {len(chance)}" for lens, n in above.items()))
    figures.label_ends(axes)
    objects = int(embed.object_tokens.sum())
    figures.sign(fig, model, f"n = {objects} object tokens of {len(embed.tokens)} held-out pictures")
    return fig


# --- one token, followed through the network -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Followed:
    """What both lenses read from the token in the middle of one object, by layer."""

    prompt: Prompt
    label: str
    patch: int
    words: Mapping[str, tuple[str, ...]]
    """Lens → its five best words at each layer."""
    ranks: Mapping[str, Int[np.ndarray, " layers"]]
    """Lens → place of the label among all entries; 1 is the first."""

    def table(self) -> pd.DataFrame:
        """Words and rank of the label, by layer."""
        import pandas as pd

        columns: dict[str, Any] = {}
        for lens, words in self.words.items():
            columns[f"{lens}, five best words"] = list(words)
            columns[f"rank of {self.label}, {lens}"] = self.ranks[lens].tolist()
        layers = len(self.ranks["EmbedLens"])
        return pd.DataFrame(columns, index=pd.RangeIndex(layers, name="layer"))

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        told: dict[str, Any] = {"followed": self.label}
        for lens, short in (("EmbedLens", "embed"), ("LogitLens", "logit")):
            told[f"rank_{short}_first"] = int(self.ranks[lens][0])
            told[f"rank_{short}_last"] = int(self.ranks[lens][-1])
        return told


def follow(model: VisionLanguageModel, sample: Sample) -> Followed:
    """Read the token in the middle of the picture's largest object at every layer.

    Raises:
        EmbedLensError: no object of the picture has a label with a token.
    """
    prompt = model.prompt(sample.image, QUESTION)
    label, patch = largest_object(model, sample, prompt.grid)
    states = model.hidden_states(prompt)[:, prompt.visual][:, patch]
    words, ranks = {}, {}
    for lens, reader in (("EmbedLens", EmbedLens.from_model(model)), ("LogitLens", LogitLens.from_model(model))):
        words[lens] = tuple("   ".join(best) for best in reader.words(states, 5))
        ranks[lens] = reader.rank(states, label_ids(model.tokenizer, label)).cpu().numpy()
    return Followed(prompt, label, patch, words, ranks)


def followed_figure(found: Followed, model: str) -> Figure:
    """The picture with the patch of the token, the label written on it."""
    chosen = np.arange(len(found.prompt.grid)) == found.patch
    words = [found.label if at else "" for at in chosen]
    title = f"The token that is followed: {found.label}"
    footer = figures.signature(model, "one held-out picture")
    return figures.patch_figure(found.prompt.image, found.prompt.grid, words, title, chosen, footer)
