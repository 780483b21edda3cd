"""Who is in the groups of visual tokens, and which words stand there: E01 to E04, E12, E19 and E31.

Groups are found and told apart by `embedlens.groups`. This module counts them picture by picture, holds the shares
against the rounded ones that the paper prints, and looks at what words are near to which group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from embedlens import claims, figures
from embedlens.claims import Finding
from embedlens.clusters import ClusterStudy, text_centroid
from embedlens.errors import EmbedLensError
from embedlens.groups import Reference, TokenGroups, token_groups_of
from embedlens.intervals import Interval, beyond_seen, mean_interval
from embedlens.labels import QUESTION, named_patches
from embedlens.lenses import EmbedLens
from embedlens.measures.dead import is_word
from embedlens.measures.hubs import random_directions
from embedlens.samples import Sample

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from embedlens.vlm import Prompt, VisionLanguageModel

ROWS = ("alive", "dead", "ViT sink", "LLM sink", "sink", "C0", "not C0")
COLUMNS = {
    "share": "share of tokens",
    "inside": "inside an object",
    "to text": "cosine to the words' centroid",
    "no words": "nearest entry is no word",
}
NEAR, NEAR_SINKS = 0.10, 0.05  # how far from a printed "about" counts as the same; set before the run
PRINTED = {"alive": 0.6, "dead": 0.3}  # shares that the paper prints for LLaVA-1.5-7B
ONE_WORD, MOSTLY_ONE_WORD = 0.9, 0.5  # of the pictures, E19; set before the run
MOSTLY = 0.5  # of the dead tokens, E31; set before the run


@dataclass(frozen=True, eq=False)
class Census:
    """Per picture and group: share of tokens, nearness to words, what lies in objects. Columns are (measure, group)."""

    table: pd.DataFrame
    membership: str
    """How dead tokens were told: "top3" by their word, "cluster" C0 as a stand-in."""
    c0_share: float
    seed: int

    def over(self, measure: str, group: str, less: str = "") -> Interval | None:
        """Mean over pictures of a measure of one group, or of that less another group's; None: no picture has both.

        Args:
            less: the other group, of the same picture.
        """
        values = self.table[measure, group]
        values = values - self.table[measure, less] if less else values
        return mean_interval(values.to_numpy(float), seed=self.seed) if values.notna().any() else None

    def shown(self) -> pd.DataFrame:
        """Every measure of every group, with intervals."""
        import pandas as pd

        columns = {said: [texts(self.over(key, name)) for name in ROWS] for key, said in COLUMNS.items()}
        return pd.DataFrame(columns, index=list(ROWS))

    def share(self, group: str) -> float:
        """Mean share of a group."""
        return float(self.table["share", group].mean())

    def findings(self) -> dict[str, Finding]:
        """E01 to E04, and E12."""
        dead = f"Share of visual tokens that are dead (by {self.membership}); C0 holds {self.c0_share:.3f}"
        nearer, alive = self.nearer, self.nearer_alive
        alive_low = None if self.membership == "cluster" or alive is None else float(alive.low)
        far = claims.UNTESTABLE if nearer is None else far_verdict(float(nearer.low), alive_low)
        note = f"Cosine to the words' centroid, tokens outside C0 less C0; alive less dead: {texts(alive)}."
        return {
            "E01": self._about("alive", 0.6, NEAR, "Share of visual tokens that are alive"),
            "E02": self._about("alive", 0.4, NEAR, "Share of visual tokens that are sink or dead", one_minus=True),
            "E03": self._about("dead", 0.3, NEAR, dead),
            "E04": self._about("sink", 0.1, NEAR_SINKS, "Share of visual tokens that are sinks of either kind"),
            "E12": Finding.of(
                nearer,
                len(self.table),
                far,
                "No picture has tokens both in C0 and outside." if nearer is None else note,
            ),
        }

    @property
    def nearer(self) -> Interval | None:
        """Cosine to the words' centroid of tokens outside C0 less that of C0."""
        return self.over("to text", "not C0", less="C0")

    @property
    def nearer_alive(self) -> Interval | None:
        """The same of alive tokens less dead ones."""
        return self.over("to text", "alive", less="dead")

    def _about(self, group: str, printed: float, near: float, note: str, one_minus: bool = False) -> Finding:
        shares = self.table["share", group].to_numpy(float)
        found = beyond_seen(mean_interval(1 - shares if one_minus else shares, seed=self.seed), len(shares))
        verdict = about_verdict(float(found.low), float(found.high), printed, near)
        return Finding.of(found, len(self.table), verdict, f"{note}; within {near:g} of {printed:g} holds.")

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        found = {
            "top3": "By the discovered rules ",
            "cluster": "No word marks dead tokens here; with C0 in their place, ",
        }
        shares = {name: self.share(key) for name, key in (("alive", "alive"), ("dead", "dead"), ("sinks", "sink"))}
        nearer = self.nearer
        side = "not comparable" if nearer is None else "nearer" if nearer.value > 0 else "farther"
        return shares | {
            "visible_share": f"{1 - 0.05 ** (1 / len(self.table)):.1%}",
            "c0_inside": percent(self.over("inside", "C0")),
            "not_c0_inside": percent(self.over("inside", "not C0")),
            "groups_sentence": f"{found[self.membership]}{shares['alive']:.0%} of the tokens are alive, "
            f"{shares['dead']:.0%} dead and {shares['sinks']:.0%} sinks.",
            "nearer_or_farther": side,
            "nearer_by": "–" if nearer is None else f"{abs(nearer.value):.3f}",
            "nearer_alive": texts(self.nearer_alive),
        }

    def numbers(self) -> dict[str, float]:
        """What the record keeps of it."""
        kept = {f"share_{name.replace(' ', '_')}": self.share(name) for name in ROWS}
        return kept | {"c0_inside_objects": float(self.table["inside", "C0"].mean())}


def census(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    study: ClusterStudy,
    reference: Reference,
    membership: str = "top3",
    seed: int = 0,
    batch_size: int = 16,
) -> Census:
    """Count every group in every picture, in one pass.

    Args:
        samples: pictures.
        study: clusters of the same pictures.
        reference, membership: as for `token_groups`.
        seed: of the bootstrap.
    """
    import pandas as pd

    lens, text = EmbedLens.from_model(model), text_centroid(model)
    words = word_entries(model)
    rows = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        prompts = model.prompts([sample.image for sample in batch], [QUESTION] * len(batch))
        found = token_groups_of(model, prompts, reference, membership)
        largest = study.largest[start : start + batch_size]
        for sample, prompt, groups, c0 in zip(batch, prompts, found, largest, strict=True):
            tokens = prompt.embeds[prompt.visual].float()
            units = tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            no_words = ~words[lens.topk(tokens, 5)[1].cpu().numpy()]
            rows.append(_of_picture(sample, prompt, groups, c0, (units @ text).cpu().numpy(), no_words))
    c0_share = float(mean_interval(study.shares[:, :1], seed=seed).value[0])
    return Census(pd.DataFrame(rows), membership, c0_share, seed)


def word_entries(model: VisionLanguageModel) -> Bool[np.ndarray, " V"]:
    """Which vocabulary entries start a word and have letters only (`measures.dead.is_word`)."""
    return np.array([is_word(entry) for entry in model.tokens])


def _of_picture(
    sample: Sample,
    prompt: Prompt,
    groups: TokenGroups,
    largest: Bool[np.ndarray, " n"],
    closeness: Float[np.ndarray, " n"],
    no_words: Bool[np.ndarray, "n 5"],
) -> dict[tuple[str, str], float]:
    """Per group: its share, cosine to the words' centroid, no word nearest (or of five), share inside an object."""
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (entry["bbox"] for entry in sample.annotations)]
    inside = np.any([prompt.grid.inside(box).numpy() for box in boxes] or [np.zeros(len(largest), bool)], axis=0)
    masks = {name: mask.numpy() for name, mask in (dict(groups.named) | {"sink": groups.sink}).items()}
    masks |= {"C0": largest, "not C0": ~largest}
    row = {("share", name): float(mask.mean()) for name, mask in masks.items()}
    for name, mask in masks.items():
        there = bool(mask.any())
        row["to text", name] = float(closeness[mask].mean()) if there else np.nan
        row["no words", name] = float(no_words[mask, 0].mean()) if there else np.nan
        row["no words of five", name] = float(no_words[mask].mean()) if there else np.nan
        row["inside", name] = float(inside[mask].mean()) if there else np.nan
    return row


def about_verdict(low: float, high: float, printed: float, near: float) -> str:
    """E01 to E04, "about so much": the whole interval lies near the printed share, or none of it does.

    >>> about_verdict(0.55, 0.62, 0.6, 0.1), about_verdict(0.45, 0.55, 0.6, 0.1), about_verdict(0.1, 0.2, 0.6, 0.1)
    ('holds', 'partly', 'does not hold')
    """
    if printed - near <= low and high <= printed + near:
        return claims.HOLDS
    return claims.FAILS if low > printed + near or high < printed - near else claims.PARTLY


def far_verdict(nearer_low: float, alive_low: float | None) -> str:
    """E12, "dead tokens are far from words, alive ones near".

    The first difference is of C0, chosen by size alone, since a dead word is discovered from a cluster that is chosen
    to be far from words. It holds if both differences lie above zero, and in part if one of them does.

    Args:
        nearer_low: lower bound of the cosine to the words' centroid of tokens outside C0 less that of C0.
        alive_low: the same of alive tokens less dead ones; None where "dead" is only a stand-in, or no token is.

    >>> far_verdict(0.1, 0.2), far_verdict(0.1, -0.2), far_verdict(-0.1, None)
    ('holds', 'partly', 'does not hold')
    """
    return claims.counted(low > 0 for low in (nearer_low, alive_low) if low is not None)


def groups_figure(found: Census, stand_in: str, model: str) -> Figure:
    """Share of each group, with the two shares that the paper prints.

    Args:
        stand_in: said behind the title where "dead" is no group of this model.
    """
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 2.9))
    shares = {name: found.over("share", name) for name in ("alive", "dead", "ViT sink", "LLM sink")}
    figures.interval_bars(axes, {name: share for name, share in shares.items() if share}, figures.GROUPS, digits=1)
    for at, name in enumerate(shares):
        if name in PRINTED:
            mark = ([PRINTED[name]] * 2, [at - 0.45, at + 0.45])
            axes.plot(*mark, color="white", linewidth=4)  # so that the mark shows on a bar
            axes.plot(*mark, color=figures.FACT, linestyle="--", linewidth=1.6)
    place: dict[str, Any] = {"ha": "center", "va": "bottom", "color": figures.FACT, "fontsize": 10}
    axes.annotate("paper (7B)", (PRINTED["alive"], -0.47), **place)
    axes.set_ylim(3.6, -0.85)
    axes.set_xlabel("share of the visual tokens")
    axes.set_title(f"{found.share('alive'):.0%} of the visual tokens are alive{stand_in}")
    figures.sign(fig, model, f"n = {len(found.table)} held-out pictures")
    return fig


# --- E19 and E31: the words at dead tokens ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DeadWords:
    """Which word is nearest to C0 from picture to picture, and whether dead tokens are near words (E19, E31)."""

    nearest: Int[np.ndarray, " pictures"]
    """The vocabulary entry nearest to C0 of each picture."""
    entries: tuple[str, ...]
    """The vocabulary, readable."""
    empty: Interval | None
    """Share of the dead tokens whose nearest entry is no word; None: no picture has dead tokens."""
    of_five: Interval | None
    """The same of their five nearest."""
    alive: Interval | None
    """As `empty`, of the alive tokens."""
    at_random: float
    """As `empty`, of random directions."""
    in_vocabulary: float
    """Share of the vocabulary that is no word."""
    membership: str
    seed: int

    @property
    def usual(self) -> int:
        """The entry that is nearest to C0 in most pictures."""
        return int(np.bincount(self.nearest).argmax())

    @property
    def agreeing(self) -> Interval:
        """Share of the pictures in which it is."""
        return mean_interval((self.nearest == self.usual).astype(float), seed=self.seed)

    def table(self, most: int = 6) -> pd.DataFrame:
        """The words nearest to C0, by how many pictures they are so in."""
        import pandas as pd

        often = [(self.entries[i], int(count)) for i, count in enumerate(np.bincount(self.nearest)) if count]
        return pd.DataFrame(sorted(often, key=lambda row: -row[1])[:most], columns=["word nearest to C0", "pictures"])

    def findings(self) -> dict[str, Finding]:
        """E19 and E31."""
        word = f"here {self.entries[self.usual]!r} (id {self.usual})"
        lows = None if self.empty is None else float(self.empty.low)
        wordless = (
            f"Share of dead tokens (by {self.membership}) nearest to no word, bar one half; random directions: "
            f"{self.at_random:.3f}; among the five nearest: {texts(self.of_five)}."
        )
        return {
            "E19": Finding.of(
                self.agreeing,
                len(self.nearest),
                one_word_verdict(float(self.agreeing.low)),
                f"Share of pictures whose C0 is nearest to one and the same word, {word}; bar 0.9.",
            ),
            "E31": Finding.of(
                self.empty,
                len(self.nearest),
                claims.UNTESTABLE if lows is None else wordless_verdict(lows, self.at_random),
                "No picture has dead tokens." if lows is None else wordless,
            ),
        }

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        return {
            "agreeing": self.agreeing,
            "usual_word": f"“{self.entries[self.usual]}”",
            "dead_no_words": percent(self.empty),
            "alive_no_words": percent(self.alive),
            "in_vocabulary": self.in_vocabulary,
            "random_no_words": self.at_random,
            "dead_no_words_of_five": percent(self.of_five),
        }


def dead_words(model: VisionLanguageModel, study: ClusterStudy, counted: Census, seed: int = 0) -> DeadWords:
    """What words say of C0 and of dead tokens, beside a hundred random directions a picture.

    Args:
        counted: census of the pictures of `study`.
    """
    words = word_entries(model)
    directions = random_directions(100 * len(counted.table), model.width, seed)
    answers = EmbedLens.from_model(model).topk(directions, 1)[1].cpu().numpy()
    return DeadWords(
        nearest=study.nearest[:, 0],
        entries=tuple(model.tokens),
        empty=counted.over("no words", "dead"),
        of_five=counted.over("no words of five", "dead"),
        alive=counted.over("no words", "alive"),
        at_random=float((~words[answers]).mean()),
        in_vocabulary=float(1 - words.mean()),
        membership=counted.membership,
        seed=seed,
    )


def one_word_verdict(low: float) -> str:
    """E19, "one and the same word is nearest": in more than 90 % of the pictures; in part in more than half.

    >>> one_word_verdict(0.95), one_word_verdict(0.7), one_word_verdict(0.4)
    ('holds', 'partly', 'does not hold')
    """
    return claims.HOLDS if low > ONE_WORD else claims.PARTLY if low > MOSTLY_ONE_WORD else claims.FAILS


def wordless_verdict(low: float, at_random: float) -> str:
    """E31, "dead tokens are nearest to punctuation and pieces": more than half, and more than of random directions.

    >>> wordless_verdict(0.7, 0.6), wordless_verdict(0.7, 0.8), wordless_verdict(0.1, 0.8)
    ('holds', 'partly', 'does not hold')
    """
    return claims.counted([low > MOSTLY, low > at_random])


# --- to look at: one map of tokens and words, one token with several meanings ---------------------------------------


@dataclass(frozen=True, eq=False)
class JointMap:
    """Visual tokens and words in one t-SNE map."""

    places: Float[np.ndarray, "points 2"]
    kinds: tuple[str, ...]
    """Group of each point; "text" for a word."""
    n_pictures: int

    @property
    def n_words(self) -> int:
        """Points that are words."""
        return sum(kind == "text" for kind in self.kinds)

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        return {"n_shown_tokens": len(self.kinds) - self.n_words, "n_shown_words": self.n_words}


def joint_map(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    reference: Reference,
    membership: str = "top3",
    most: int = 600,
    seed: int = 0,
) -> JointMap:
    """t-SNE by cosine distance of visual tokens and input embeddings, at most so many of each, drawn at random."""
    from sklearn.manifold import TSNE

    rng = np.random.default_rng(seed)
    prompts = model.prompts([sample.image for sample in samples], [QUESTION] * len(samples))
    kinds = np.concatenate([part.names for part in token_groups_of(model, prompts, reference, membership)])
    tokens = np.concatenate([prompt.embeds[prompt.visual].float().cpu().numpy() for prompt in prompts])
    taken = np.sort(rng.choice(len(tokens), min(most, len(tokens)), replace=False))
    words = np.sort(rng.choice(len(model.tokens), min(most, len(model.tokens)), replace=False))
    together = np.concatenate([tokens[taken], model.input_embeddings[words].float().cpu().numpy()])
    settings: dict[str, Any] = {"metric": "cosine", "init": "pca", "perplexity": 30, "max_iter": 500, "n_jobs": 1}
    places = TSNE(random_state=seed, **settings).fit_transform(together)
    return JointMap(places, (*map(str, kinds[taken]), *["text"] * len(words)), len(prompts))


def joint_map_figure(found: JointMap, stand_in: str, model: str) -> Figure:
    """The map, points by group."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 5.0))
    kinds = np.array(found.kinds)
    for name in ("text", "alive", "dead", "ViT sink", "LLM sink"):
        at, look = np.flatnonzero(kinds == name), figures.GROUPS[name]
        if len(at):
            label = f"{'words' if name == 'text' else name} ({len(at)})"
            style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "alpha": 0.6, "linewidth": 0}
            x, y = found.places[at].T
            axes.scatter(x, y, s=14, label=label, **style)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("t-SNE 1 (no unit)")
    axes.set_ylabel("t-SNE 2 (no unit)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=4, markerscale=1.8)
    axes.set_title(f"Visual tokens and words in one t-SNE map{stand_in}")
    figures.sign(fig, model, f"n = {len(kinds) - found.n_words} visual tokens of {found.n_pictures} held-out pictures")
    return fig


@dataclass(frozen=True, eq=False)
class Meanings:
    """One patch that is near several words at once."""

    prompt: Prompt
    patch: int
    words: tuple[str, ...]
    """Nearest first."""
    cosines: Float[np.ndarray, " words"]


def several_meanings(model: VisionLanguageModel, samples: Sequence[Sample], words: int = 8) -> Meanings:
    """The patch whose fifth word is nearest, among those in an object that have its label among their five.

    Where no patch qualifies, all patches outside the bars compete.

    Raises:
        EmbedLensError: no pictures.
    """
    if not samples:
        raise EmbedLensError("no pictures to look for a patch in: pass at least one")
    lens = EmbedLens.from_model(model)
    prompts = model.prompts([sample.image for sample in samples], [QUESTION] * len(samples))
    found = []
    for sample, prompt in zip(samples, prompts, strict=True):
        cosines, ids = lens.topk(prompt.embeds[prompt.visual], words)
        named, _ = named_patches(model, sample, prompt.grid, ids[:, :5])
        score = np.where(prompt.grid.padded, -2, cosines[:, 4].cpu().numpy()) + 10 * named.numpy()
        at = int(score.argmax())
        heard = tuple(model.tokens[i] for i in ids[at].tolist())
        found.append((float(score.max()), Meanings(prompt, at, heard, cosines[at].float().cpu().numpy())))
    return max(found, key=lambda entry: entry[0])[1]


def meanings_figure(found: Meanings, model: str) -> Figure:
    """The patch in its picture, and the cosines to its nearest words."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    fig, (left, right) = plt.subplots(1, 2, figsize=(figures.WIDTH, 3.6), width_ratios=(1.1, 1))
    left.imshow(found.prompt.image, interpolation="nearest")
    x0, y0, x1, y1 = found.prompt.grid.box(found.patch)
    for colour, width in (("white", 5), (figures.GROUPS["alive"].colour, 2.5)):
        frame = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=width)
        left.add_patch(frame)
    left.set_axis_off()
    n = len(found.words)
    right.barh(range(n), found.cosines, color=figures.LENSES["EmbedLens"].colour)
    right.set_yticks(range(n), [word.replace("$", r"\$") for word in found.words])
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    right.set_xlabel("cosine to the word's embedding")
    count = {8: "eight"}.get(n, str(n))
    figures.headline(fig, f"One patch and its {count} nearest words")
    figures.sign(fig, model, "one token of one held-out picture")
    return fig


def texts(found: Interval | None, digits: int = 3) -> str:
    """A value with its interval, or a dash where there is none.

    >>> texts(None)
    '–'
    """
    return "–" if found is None else found.texts(digits)[0]


def percent(found: Interval | None) -> str:
    """A share in per cent, or a dash.

    >>> percent(Interval(np.array(0.25), np.array(0.2), np.array(0.3)))
    '25%'
    """
    return "–" if found is None else f"{found.value:.0%}"
