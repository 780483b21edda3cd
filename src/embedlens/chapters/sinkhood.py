"""Are there sinks, and do they behave as the paper says? Verdicts and figures of Section 4 and Appendix D.2.

Measured by `embedlens.sinks`; here are the claims E15 to E26 and E30, each with its rule as a function of numbers.
What pruning sinks does to answers and to attention is `embedlens.chapters.sink_removal`.

Where a model has no sinks of a kind, the tokens that come nearest stand in for them. Stand-ins are no sinks: a claim
about sinks that they meet is met in part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from embedlens import claims, figures
from embedlens.claims import Finding
from embedlens.clusters import picture_pairs
from embedlens.figures import GROUPS, Look
from embedlens.groups import QUESTION, RARE
from embedlens.intervals import Interval, ratio_interval
from embedlens.sinks import (
    ARMS,
    KINDS,
    SinkStudy,
    curve,
    found_kinds,
    group_curves,
    labels_of,
    most_alike_cluster,
    overlap,
    pair_cosines,
    pair_curve,
    picking_layer,
    share_interval,
    times,
)
from embedlens.tracing import sublayer_names

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from embedlens.samples import Sample
    from embedlens.vlm import VisionLanguageModel

#: Cosine and variance between pictures, as the paper has them (Sections 4.1 and 4.2).
ALIKE = {"ViT sink": (0.99, 1e-5), "LLM sink": (0.95, 1e-4)}
DISREGARDED = 0.5  # times the attention of the other visual tokens; set before the run, as the next two
SUBSTANTIAL = 0.1  # of cosine to BOS, mean from MLP-2 on
MARKED = 0.1  # of the attention on the tokens
BOS = Look(figures.ORDER[4], "v", "-")
SHORT = {"dead": "largest cluster", "ViT sink": "highest norms", "LLM sink": "highest phi"}


# --- what is read from a study ---------------------------------------------------------------------------------------


class Alike(NamedTuple):
    """How alike the centroids of two pictures are, of one kind of token; pairs of pictures, layer 0."""

    cosine: Interval
    random: Interval
    """Of as many random visual tokens of the same pictures."""
    beyond: Interval
    """Difference of the two, paired."""
    centred: Interval
    """Cosine after the mean of all visual tokens is taken out."""
    centred_random: Interval
    variance: float
    """Of the cosine, over pairs."""


class Change(NamedTuple):
    """A value with what it is compared to, and their paired difference."""

    own: Interval
    other: Interval
    beyond: Interval


@dataclass(frozen=True, eq=False)
class Sinkhood:
    """A study of sinks, read for the claims E15 to E26 and E30."""

    study: SinkStudy
    model: str
    n_layers: int
    feature_layer: int
    tokens: Sequence[str] = field(repr=False)
    """The vocabulary."""
    seed: int = 0

    @property
    def n(self) -> int:
        return len(self.study)

    @property
    def found(self) -> dict[str, bool]:
        """Which kinds the model has."""
        return found_kinds(self.study.reference)

    @property
    def named(self) -> dict[str, str]:
        """What to call each kind: sinks, or what stands in for them."""
        return labels_of(self.study.reference)

    @property
    def sublayers(self) -> list[str]:
        return sublayer_names(self.n_layers)

    @cached_property
    def pairs(self) -> Int[np.ndarray, "pairs 2"]:
        return picture_pairs(self.n, seed=self.seed)

    @property
    def absent(self) -> Interval:
        """ "No picture has one", with the share of pictures that could have gone unseen."""
        return share_interval(0, self.n)

    def seen(self, kind: str) -> bool:
        """Whether the model has a kind, and these pictures show it."""
        return self.found[kind] and bool(self.study.counts(kind).any())

    @cached_property
    def alike(self) -> dict[str, Alike]:
        """E15 and E23."""
        found = {}
        for at, kind in enumerate(KINDS):
            means, drawn = self.study.means[at], self.study.random_means[at]
            own, random = pair_cosines(means, self.pairs), pair_cosines(drawn, self.pairs)
            moved, moved_random = (pair_cosines(part, self.pairs, self.study.center) for part in (means, drawn))
            there = own[np.isfinite(own)]
            found[kind] = Alike(
                cosine=pair_curve(own, self.pairs, self.seed),
                random=pair_curve(random, self.pairs, self.seed),
                beyond=pair_curve(own - random, self.pairs, self.seed),
                centred=pair_curve(moved, self.pairs, self.seed),
                centred_random=pair_curve(moved_random, self.pairs, self.seed),
                variance=float(np.var(there)) if len(there) else 0.0,
            )
        return found

    @cached_property
    def clustered(self) -> Change:
        """Share of the ViT kind in the cluster that is most alike across pictures, beside all tokens' (E16)."""
        cluster = most_alike_cluster(self.study.cluster_means, self.pairs)
        inside = self.study.in_cluster("ViT sink", cluster)
        return self._change(inside[:, 0], inside[:, 1])

    @cached_property
    def worded(self) -> dict[str, Change]:
        """Share of pictures whose centroid is nearest to the commonest word, beside random sets' (E17, E18)."""
        return {kind: self._change(*self.study.agreeing(kind)) for kind in KINDS}

    @cached_property
    def attended(self) -> dict[str, Interval]:
        """Attention per token over that of the other visual tokens, mean of layers (E20)."""
        per_token = self.study.attention.mean(1)
        return {kind: times(per_token[:, at], per_token[:, 3], self.seed) for at, kind in enumerate(KINDS)}

    @cached_property
    def rising(self) -> tuple[Change, Interval, Interval]:
        """Rise of phi of the LLM kind beside the other patches'; phi in layers 0 and 1, and in the later ones (E22).

        The layer by which the tokens were picked is left out: the highest of many numbers are high there by selection.
        """
        picked = picking_layer(self.study.reference, self.n_layers)
        later = [layer for layer in range(2, self.n_layers) if layer != picked] or [self.n_layers]
        phi = self.study.phi
        rises = phi[:, later].mean(1) - phi[:, :2].mean(1)
        early, late = (curve(phi[:, part, 1].mean(1), self.seed) for part in ([0, 1], later))
        return self._change(rises[:, 1], rises[:, 3]), early, late

    @cached_property
    def turning(self) -> Change:
        """Rise of the cosine to BOS at MLP-2, of the LLM kind beside the other patches (E24)."""
        steps = np.diff(self.study.cosine, axis=1)[:, self.study.aligner - 1]
        return self._change(steps[:, 1], steps[:, 3])

    @property
    def largest_turn(self) -> int | None:
        """The sublayer at which the LLM kind turns most to BOS."""
        steps = curve(np.diff(self.study.cosine, axis=1)[:, :, 1], self.seed).value
        return int(steps.argmax()) + 1 if np.isfinite(steps).all() else None

    @cached_property
    def leads(self) -> tuple[Interval, Interval]:
        """After MLP-2: lead of the LLM over the ViT kind, and of the ViT kind over other patches, in cosine to BOS."""
        llm, vit, others = (self.study.cosine[:, self.study.aligner, column] for column in (1, 0, 3))
        return curve(llm - vit, self.seed), curve(vit - others, self.seed)

    @cached_property
    def staying(self) -> tuple[Change, Interval]:
        """Share of the five most like BOS at MLP-2 that stays, beside another text token's; the share before (E26)."""
        study, at = self.study, self.study.aligner
        kept, other = study.kept[:, at + 1 :].mean(1), study.kept_of_other[:, at + 1 :].mean(1)
        return self._change(kept, other), curve(study.kept[:, max(1, at - 2) : at].mean(1), self.seed)

    @cached_property
    def skipped(self) -> Skipped:
        """What skipping MLP-2 changes (E30)."""
        effect, late = self.study.skipping, slice(self.study.aligner, None)
        own, others = effect.change("skipped", late), effect.change("skipped for others", late)
        return Skipped(
            cosine=curve(own[:, 0], self.seed),
            beyond=curve(own[:, 0] - others[:, 0], self.seed),
            attention=curve(own[:, 1], self.seed),
            held=curve(effect.mass[:, 0].mean(1), self.seed),
            overall=curve((effect.visual_mass[:, 1] - effect.visual_mass[:, 0]).mean(1), self.seed),
        )

    def dead_share(self, kind: str) -> Interval:
        """Of the tokens of a kind, the share that meets the definition of dead tokens as well."""
        own, dead = self.study.met(kind), self.study.met("dead")
        both = np.array([(a & b).sum() for a, b in zip(own, dead, strict=True)])
        asked = self.study.counts(kind)
        return ratio_interval(both, asked, seed=self.seed) if asked.any() else curve(np.full(self.n, np.nan))

    @property
    def standing(self) -> str:
        """A sentence on what the page looks at: sinks, or what stands in for them."""
        lacking = [kind for kind in KINDS if not self.found[kind]]
        if not lacking:
            return "This model has both kinds of sinks."
        stand_ins = " and the ".join(self.named[kind] for kind in lacking)
        return f"This model has no {'s and no '.join(lacking)}s. In their place stand the {stand_ins} of each picture."

    def _change(self, own: np.ndarray, other: np.ndarray) -> Change:
        return Change(*(curve(values, self.seed) for values in (own, other, own - other)))


class Skipped(NamedTuple):
    """Changes when MLP-2 is skipped for the LLM kind; nan where no picture has such tokens."""

    cosine: Interval
    """Of their cosine to BOS, mean from MLP-2 on."""
    beyond: Interval
    """The same less the change when it is skipped for as many random others."""
    attention: Interval
    """Of the share of attention on them, mean of layers."""
    held: Interval
    """That share as it is."""
    overall: Interval
    """Change of the attention on all visual tokens."""


def sinkhood(model: VisionLanguageModel, study: SinkStudy, seed: int = 0) -> Sinkhood:
    """Read a study for the claims."""
    return Sinkhood(study, model.name, model.n_layers, model.feature_layer, model.tokens, seed)


# --- the rules, set before the run -----------------------------------------------------------------------------------
# Comparisons with the nan of an empty group are met by nothing.


def graded(holds: bool, partly: bool) -> str:
    """The first that is met.

    >>> graded(False, True)
    'partly'
    """
    return claims.HOLDS if holds else claims.PARTLY if partly else claims.FAILS


def at_best(verdict: str, all_found: bool) -> str:
    """A claim about sinks that are not there can hold in part only: it was measured on stand-ins.

    >>> at_best("holds", all_found=False)
    'partly'
    """
    return claims.PARTLY if verdict == claims.HOLDS and not all_found else verdict


def alike_verdict(low: float, variance: float, beyond_low: float, bounds: tuple[float, float]) -> str:
    """E15, E23: the paper's cosine and variance, and more than random sets; alike beyond these only is "partly".

    >>> alike_verdict(0.996, 1e-6, 0.1, ALIKE["ViT sink"]), alike_verdict(0.9, 1e-6, 0.1, ALIKE["ViT sink"])
    ('holds', 'partly')
    """
    cosine, spread = bounds
    return graded(low > cosine and variance < spread and beyond_low > 0, beyond_low > 0)


def share_verdict(low: float, high: float) -> str:
    """E21, some but not most visual tokens are LLM sinks: more than one in a thousand, less than half.

    >>> share_verdict(0.02, 0.1), share_verdict(0.6, 0.7)
    ('holds', 'partly')
    """
    return graded(low > RARE and high < 0.5, low > 0)


def cluster_verdict(low: float, surplus_low: float) -> str:
    """E16: more than half of them lie in the cluster, and more than of all tokens; the second alone is "partly"."""
    return graded(low > 0.5 and surplus_low > 0, surplus_low > 0)


def word_verdict(low: float, surplus_low: float) -> str:
    """E17, E18: one word in more than half of the pictures, and more often than in random sets; one is "partly"."""
    return graded(low > 0.5 and surplus_low > 0, low > 0.5 or surplus_low > 0)


def disregard_verdict(high: float) -> str:
    """E20, "largely disregards": less than half of what another visual token gets; less at all is "partly"."""
    return graded(high < DISREGARDED, high < 1)


def onset_verdict(rise_low: float, beyond_low: float, early_high: float, late_low: float, bar: float) -> str:
    """E22: phi rises from below the threshold of sinks to above it; a rise beyond that of others is "partly"."""
    return graded(rise_low > 0 and early_high < bar < late_low, rise_low > 0 and beyond_low > 0)


def turn_verdict(jump_low: float, beyond_low: float, largest: bool) -> str:
    """E24: the cosine to BOS rises at MLP-2, more than others' and nowhere more; without the last it is "partly"."""
    turns = jump_low > 0 and beyond_low > 0
    return graded(turns and largest, turns)


def apart_verdict(lead_low: float, vit_low: float) -> str:
    """E25: the LLM kind leads the ViT kind, and the ViT kind does not lead other patches; the first is "partly"."""
    return graded(lead_low > 0 and not vit_low > 0, lead_low > 0)


def stay_verdict(low: float, beyond_low: float, before_low: float, chance: float) -> str:
    """E26: more than half stay, more than of the control, and more than chance before; above chance is "partly"."""
    return graded(low > 0.5 and beyond_low > 0 and before_low > chance, low > chance)


def skip_verdict(cosine_high: float, beyond_high: float, attention_high: float, held: float) -> str:
    """E30: the cosine falls by more than 0.1 and beyond the control, attention by more than a tenth of what it was.

    >>> skip_verdict(-0.3, -0.2, -0.02, 0.1), skip_verdict(-0.3, -0.2, -0.001, 0.1), skip_verdict(0.0, 0.0, 0.0, 0.1)
    ('holds', 'partly', 'does not hold')
    """
    falls = cosine_high < -SUBSTANTIAL and beyond_high < 0
    fades = attention_high < -MARKED * held
    return graded(falls and fades, falls or fades)


def low(found: Interval) -> float:
    """The lower bound, as rules take it."""
    return float(found.low)


def high(found: Interval) -> float:
    """The upper bound."""
    return float(found.high)


# --- the findings ----------------------------------------------------------------------------------------------------


def said(found: Interval, digits: int = 2) -> str:
    """A value with its interval, for prose.

    >>> said(Interval(np.array(np.nan), np.array(np.nan), np.array(np.nan)))
    'not measurable'
    """
    return "not measurable" if np.isnan(found.value) else found.texts(digits)[0]


def judged_on(
    named: Mapping[str, str],
    found: Mapping[str, bool],
    interval: Interval,
    n: int,
    verdict: str,
    note: str,
    kinds: Sequence[str],
) -> Finding:
    """A finding about kinds of sinks that says what stood in for those the model lacks, and holds only without."""
    if np.isnan(interval.value):
        return Finding.of(None, n, claims.UNTESTABLE, f"No picture has such tokens. {note}")
    lacking = [kind for kind in kinds if not found[kind]]
    if lacking:
        stand_ins = " and ".join(named[kind] for kind in lacking)
        note = f"No {'s, no '.join(lacking)}s: measured on the {stand_ins}. {note}"
    return Finding.of(interval, n, at_best(verdict, not lacking), note)


def findings(seen: Sinkhood) -> dict[str, Finding]:
    """E15 to E18, E20 to E26 and E30."""
    study, names = seen.study, seen.sublayers
    e15, e23 = (_alike(seen, kind) for kind in KINDS)
    if not seen.seen("ViT sink"):
        note = f"Share of pictures with a ViT sink: {said(seen.absent)}. {e15.note}"
        e15 = Finding.of(seen.absent, seen.n, claims.FAILS, note)

    words = [_word(seen, kind) for kind in KINDS]

    rise, early, late = seen.rising
    bar = float(study.reference.phi_threshold or np.inf)
    onset = onset_verdict(low(rise.own), low(rise.beyond), high(early), low(late), bar)
    onset_note = f"Rise of phi from layers 0 and 1 to the later ones; other visual tokens {said(rise.other)}."

    jump, largest = seen.turning, seen.largest_turn
    turn = turn_verdict(low(jump.own), low(jump.beyond), largest == study.aligner)
    turn_note = f"Rise of the cosine to BOS at {names[study.aligner]}; others {said(jump.other, 3)}; "
    turn_note += f"largest rise {'nowhere' if largest is None else f'at {names[largest]}'}."

    ahead, vit_ahead = seen.leads
    apart_note = f"Lead of the LLM kind in cosine to BOS after {names[study.aligner]}; "
    apart_note += f"the ViT kind leads other patches by {said(vit_ahead)}."

    kept, before = seen.staying
    stay = stay_verdict(low(kept.own), low(kept.beyond), low(before), study.kept_by_chance)
    stay_note = f"Share still among the first five after {names[study.aligner]}; "
    stay_note += f"another text token {said(kept.other)}, chance {study.kept_by_chance:.2f}."

    skip = seen.skipped
    skipping = skip_verdict(high(skip.cosine), high(skip.beyond), high(skip.attention), float(skip.held.value))
    skip_note = f"Change of the cosine to BOS from {names[study.aligner]} on; "
    skip_note += f"of the attention on them {said(skip.attention, 4)}."

    inside, vit = seen.clustered, seen.attended["ViT sink"]
    cluster_note = f"Share of them in the cluster most alike across pictures; of all tokens {said(inside.other)}."
    attention_note = "Attention per token over that of the other visual tokens, mean of layers."

    def on(interval: Interval, verdict: str, note: str, *kinds: str) -> Finding:
        return judged_on(seen.named, seen.found, interval, seen.n, verdict, note, kinds)

    return {
        "E15": e15,
        "E16": on(inside.own, cluster_verdict(low(inside.own), low(inside.beyond)), cluster_note, "ViT sink"),
        "E17": words[0],
        "E18": words[1],
        "E20": on(vit, disregard_verdict(high(vit)), attention_note, "ViT sink"),
        "E21": _share(seen),
        "E22": on(rise.own, onset, onset_note, "LLM sink"),
        "E23": e23,
        "E24": on(jump.own, turn, turn_note, "LLM sink"),
        "E25": on(ahead, apart_verdict(low(ahead), low(vit_ahead)), apart_note, *KINDS),
        "E26": on(kept.own, stay, stay_note),
        "E30": on(skip.cosine, skipping, skip_note, "LLM sink"),
    }


def _alike(seen: Sinkhood, kind: str) -> Finding:
    found = seen.alike[kind]
    verdict = alike_verdict(low(found.cosine), found.variance, low(found.beyond), ALIKE[kind])
    note = f"Cosine of centroids of two pictures {said(found.cosine)}, variance {found.variance:.1e}; "
    note += f"random sets {said(found.random)}."
    return judged_on(seen.named, seen.found, found.cosine, seen.n, verdict, note, [kind])


def _share(seen: Sinkhood) -> Finding:
    if not seen.seen("LLM sink"):
        why = seen.study.reference.notes["LLM sink"]
        note = f"Share of pictures with an LLM sink: {said(seen.absent)}. {why}"
        return Finding.of(seen.absent, seen.n, claims.FAILS, note)
    share = ratio_interval(seen.study.counts("LLM sink"), seen.study.tokens, seed=seen.seed)
    note = f"Share of visual tokens that are LLM sinks, in dimensions {seen.study.dims}."
    return Finding.of(share, seen.n, share_verdict(low(share), high(share)), note)


def _word(seen: Sinkhood, kind: str) -> Finding:
    own, random, beyond = seen.worded[kind]
    at = seen.study.word_of(kind)
    name = "–" if at is None else seen.tokens[at]
    note = f"Share of pictures whose centroid is nearest to {name!r}: {said(own)}; random sets agree in {said(random)}."
    return judged_on(seen.named, seen.found, own, seen.n, word_verdict(low(own), low(beyond)), note, [kind])


def told(seen: Sinkhood, found: Mapping[str, Finding]) -> dict[str, str]:
    """What the prose says, by key."""
    study, names, skip = seen.study, seen.sublayers, seen.skipped
    norms, most = np.concatenate(study.norms, axis=1), study.first.max(1)
    top = _inner_top(seen)
    kept, before = seen.staying
    return {
        "vit_note": study.reference.notes["ViT sink"],
        "llm_note": study.reference.notes["LLM sink"],
        "vit_name": seen.named["ViT sink"],
        "llm_name": seen.named["LLM sink"],
        "standing": seen.standing,
        "dead_vit": said(seen.dead_share("ViT sink")),
        "dead_llm": said(seen.dead_share("LLM sink")),
        "dead_all": f"{np.concatenate(study.met('dead')).mean():.2f}",
        "first_moves": "nothing" if study.first_moves == 0 else f"{study.first_moves:.0e}",
        "beyond_read": f"{_beyond(seen)[seen.feature_layer]:.2%}",
        "beyond_last": f"{_beyond(seen)[-1]:.2%}",
        "norm_over_median": f"{norms[-1].max() / np.median(norms[-1]):.1f}",
        "first_top": f"{most[top]:.1f}",
        "fence_there": f"{study.ratio_fences[top]:.1f}",
        "unseen": f"{float(seen.absent.high):.1%}",
        **{f"{name.lower()}_note": found[name].note for name in ("E15", "E17", "E18", "E21", "E23")},
        "in_cluster": said(seen.clustered.own),
        "in_cluster_all": said(seen.clustered.other),
        "in_cluster_surplus": said(seen.clustered.beyond),
        "bos_gets": said(curve(study.attention_on_first.mean(1), seen.seed)),
        "vit_times": said(seen.attended["ViT sink"]),
        "llm_times": said(seen.attended["LLM sink"]),
        "phi_rise": said(seen.rising[0].own),
        "phi_rise_others": said(seen.rising[0].other),
        "aligner": f"{names[study.aligner]} (layer {study.aligner // 2 - 1})",
        "jump": said(seen.turning.own, 3),
        "jump_others": said(seen.turning.other, 3),
        "largest_rise": "nowhere" if seen.largest_turn is None else f"at {names[seen.largest_turn]}",
        "ahead": said(seen.leads[0]),
        "kept_after": said(kept.own),
        "kept_other_after": said(kept.other),
        "kept_beyond": said(kept.beyond),
        "kept_before": said(before),
        "kept_chance": f"{study.kept_by_chance:.2f}",
        "skip_cosine": said(skip.cosine, 3),
        "skip_beyond": said(skip.beyond, 3),
        "skip_attention": said(skip.attention, 4),
        "skip_held": said(skip.held, 3),
        "skip_overall": said(skip.overall, 4),
    }


def numbers(seen: Sinkhood) -> dict[str, float]:
    """What the record keeps beside the verdicts."""
    study = seen.study
    kept: dict[str, Any] = {f"norm_beyond_fence_layer_{at}": part for at, part in enumerate(_beyond(seen))}
    kept |= {f"first_ratio_layer_{at}": value for at, value in enumerate(study.first.max(1))}
    kept |= {f"fence_of_ratio_layer_{at}": value for at, value in enumerate(study.ratio_fences)}
    received = {**group_curves(study.attention, seen.seed), "first": curve(study.attention_on_first, seen.seed)}
    for group, value in received.items():
        kept |= {f"attention_{group.replace(' ', '_')}_layer_{at}": part for at, part in enumerate(value.value)}
    skip = seen.skipped
    changed = {
        "attention_change": skip.attention,
        "attention_before": skip.held,
        "visual_attention_change": skip.overall,
    }
    kept |= {f"skipping_{key}": value.value for key, value in changed.items() if not np.isnan(value.value)}
    kept |= {f"has_{kind.replace(' ', '_')}s": int(seen.found[kind]) for kind in KINDS}
    return {name: float(value) for name, value in kept.items()}


def _beyond(seen: Sinkhood) -> np.ndarray:
    """Share of the patches beyond the fence, by layer of the tower."""
    return (np.concatenate(seen.study.norms, axis=1) > seen.study.norm_fences[:, None]).mean(1)


def _inner_top(seen: Sinkhood) -> int:
    """The layer between the first and the last at which a dimension of BOS is largest."""
    most = seen.study.first.max(1)
    return 1 + int(most[1 : seen.n_layers].argmax()) if seen.n_layers > 1 else 0


# --- tables ----------------------------------------------------------------------------------------------------------


def looked_at(seen: Sinkhood) -> str:
    """Which tokens are sinks here, or stand in for them, and how many a picture has."""
    lines = []
    for kind in KINDS:
        many = f"{seen.study.counts(kind).mean():.1f} of {seen.study.tokens.mean():.0f}"
        lines += [f"{kind}s: {seen.study.reference.notes[kind]}"]
        lines += [f"   looked at below: {seen.named[kind]}, {many} tokens a picture"]
    return "\n".join(lines)


def alike_table(seen: Sinkhood) -> pd.DataFrame:
    """Cosine between the centroids of two pictures, beside random sets, and less the common mean."""
    import pandas as pd

    columns = ["cosine", "random sets", "difference", "less the common mean", "random sets, less the mean"]
    rows = {
        seen.named[kind]: [said(value, 3) for value in found[:5]] + [f"{found.variance:.1e}"]
        for kind, found in seen.alike.items()
    }
    return pd.DataFrame(rows, index=[*columns, "variance over pairs"]).T


def words_table(seen: Sinkhood, ks: Sequence[int] = (1, 3)) -> pd.DataFrame:
    """How well "near the reference word" finds the tokens told by norm or phi."""
    import pandas as pd

    reference, rows = seen.study.reference, {}
    for kind, known in zip(KINDS, (reference.vit_sink_id, reference.llm_sink_id), strict=True):
        word = seen.study.word_of(kind) if known is None else known
        if word is None:  # no picture has the kind
            continue
        for k in ks:
            met = overlap(seen.study.met(kind), seen.study.near(word, k), seen.seed)
            told = [said(value) for value in (met.precision, met.recall, met.jaccard)]
            rows[seen.named[kind], f"{seen.tokens[word]}, top {k}"] = told
    return pd.DataFrame(rows, index=["precision", "recall", "Jaccard"]).T.rename_axis(
        ["told by norm or phi", "told by word"]
    )


# --- figures ---------------------------------------------------------------------------------------------------------


def scene_figure(model: VisionLanguageModel, seen: Sinkhood, samples: Sequence[Sample]) -> Figure:
    """The first picture with three labels, its patches outlined by group, with the nearest words of layer 0."""
    full = [at for at, sample in enumerate(samples) if len(sample.labels) >= 3] or [0]
    sample, groups = samples[full[0]], seen.study.groups[full[0]]
    words = [seen.tokens[ids[0]] for ids in seen.study.nearest[full[0]]]
    standing = [figures.INITIALS[kind] for kind in KINDS if not seen.found[kind]]
    title = "Sinks, dead and other tokens of one scene"
    if standing:
        title = f"No sinks: {' and '.join(standing)} mark{'s' * (len(standing) == 1)} what comes nearest to them"
    short = {"alive": "other"} | {kind: kind if seen.found[kind] else name for kind, name in SHORT.items()}
    grid = model.prompt(sample.image, QUESTION).grid
    footer = figures.signature(seen.model, "one held-out picture")
    return figures.group_figure(sample.image, grid, groups.named, words, title, footer, short)


def norms_figure(seen: Sinkhood) -> Figure:
    """Norms of all patches at every layer of the tower, with the outer fence (E15)."""
    from matplotlib import pyplot as plt

    norms, fences, beyond = np.concatenate(seen.study.norms, axis=1), seen.study.norm_fences, _beyond(seen)
    bins = np.geomspace(norms.min() * 0.95, max(norms.max(), fences.max()) * 1.1, 120)
    fig, grid = plt.subplots(len(norms), 1, figsize=(figures.WIDTH, 0.62 * len(norms) + 1.5), sharex=True)
    for layer, axes in enumerate(np.atleast_1d(grid)):
        axes.hist(norms[layer], bins, color=GROUPS["alive"].colour)
        axes.axvline(fences[layer], color=figures.FACT, linestyle="--", linewidth=1.4)
        axes.set_xscale("log")
        axes.set_yticks([])
        axes.set_ylim(top=1.5 * axes.get_ylim()[1])  # room for the note
        read = ", read by the projector" if layer == seen.feature_layer else ""
        note = f"layer {layer}{read}: {beyond[layer]:.2%} beyond"
        axes.annotate(note, (0.01, 0.9), xycoords="axes fraction", va="top", fontsize=10)
    _plain_ticks(axes.xaxis)
    axes.set_xlabel("L2 norm of a patch (dashed: outer fence)")
    who = f"{beyond[-1]:.2%} of the patches stand" if beyond[-1] else "No patch stands"
    figures.headline(fig, f"{who} out in norm at the tower's last layer")
    figures.sign(fig, seen.model, f"n = {norms.shape[1]} patches of {seen.n} pictures")
    return fig


def excitement_figure(seen: Sinkhood) -> Figure:
    """The largest dimension of BOS by layer, beside all other tokens' and their fence (E21)."""
    from matplotlib import pyplot as plt

    study = seen.study
    most, others, fences = study.first.max(1), np.concatenate(study.largest, axis=1), study.ratio_fences
    middle, lower, upper = np.quantile(others, [0.5, 0.25, 0.75], axis=1)
    inner = slice(1, seen.n_layers)
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 3.9))
    figures.layer_curve(axes, middle, lower, upper, "other tokens", GROUPS["alive"])
    figures.layer_curve(axes, fences, fences, fences, "their fence", Look(figures.FACT, "", "--"))
    figures.layer_curve(axes, most, most, most, "BOS", GROUPS["text"])
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis)
    axes.set_ylabel("largest |x| / RMS of a token")
    excited = int((most[inner] > fences[inner]).sum())
    axes.set_title(f"BOS is beyond the fence in {excited} of {seen.n_layers - 1} inner layers")
    figures.label_ends(axes)
    figures.sign(fig, seen.model, f"n = {others.shape[1]} tokens of {seen.n} pictures")
    return fig


def centroids_figure(seen: Sinkhood) -> Figure:
    """Cosine between the centroids of two pictures, of each kind and of random sets (E15, E23)."""
    from matplotlib import pyplot as plt

    rows = [
        (kind, which, value)
        for kind in KINDS
        for which, value in ((seen.named[kind], seen.alike[kind].cosine), ("random, as many", seen.alike[kind].random))
    ]
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 3.0))
    for y, (kind, which, value) in enumerate(reversed(rows)):
        if np.isnan(value.value):
            axes.annotate("none in any picture", (0.5, y), va="center", ha="center", color=figures.CHANCE)
            continue
        look = GROUPS[kind] if which == seen.named[kind] else Look(figures.CHANCE, "o")
        axes.hlines(y, value.low, value.high, color=look.colour)
        axes.plot(value.value, y, look.marker, color=look.colour)
    for kind, y in zip(KINDS, (3, 1), strict=True):
        axes.plot([ALIKE[kind][0]] * 2, [y - 1.35, y + 0.35], "--", color=figures.FACT, linewidth=1.2)
    axes.annotate("paper (7B)", (ALIKE["ViT sink"][0], 3.5), color=figures.FACT, fontsize=10, ha="right")
    axes.set_yticks(range(len(rows)), [which for _, which, _ in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.1)
    axes.set_xlabel("cosine between the centroids of two pictures, layer 0")
    figures.headline(fig, f"Beyond random sets: {', '.join(_beyond_random(seen, kind) for kind in KINDS)}")
    figures.sign(fig, seen.model, f"{len(seen.pairs)} pairs of n = {seen.n} pictures")
    return fig


def _beyond_random(seen: Sinkhood, kind: str) -> str:
    value, name = float(seen.alike[kind].beyond.value), kind if seen.found[kind] else SHORT[kind]
    return f"{name} {'not measurable' if np.isnan(value) else f'{value:+.2f}'}"


def attention_figure(seen: Sinkhood) -> Figure:
    """Attention per token that each group gets from the text after the picture, by layer (E20)."""
    from matplotlib import pyplot as plt

    bos = curve(seen.study.attention_on_first, seen.seed)
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.3))
    for group, value in group_curves(seen.study.attention, seen.seed).items():
        figures.layer_curve(axes, *value, seen.named[group], GROUPS[group])
    figures.layer_curve(axes, *bos, "BOS", BOS)
    axes.axhline(1, color=figures.CHANCE, linewidth=1.2)
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis)
    axes.set_xlabel("layer (0 = first block)")
    axes.set_ylabel("attention per token (1 = uniform)")
    axes.set_title(f"BOS gets {bos.value.mean():.1f} times uniform attention, mean of layers")
    axes.legend(*axes.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.0, 0.5))
    figures.sign(fig, seen.model, f"n = {seen.n} pictures")
    return fig


def phi_figure(seen: Sinkhood) -> Figure:
    """Phi of each group by layer, with the layer by which tokens were picked (E22)."""
    from matplotlib import pyplot as plt

    study = seen.study
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.0))
    for group, value in group_curves(study.phi, seen.seed).items():
        figures.layer_curve(axes, *value, seen.named[group], GROUPS[group])
    of_bos = study.first[:, list(study.dims)].max(1)
    figures.layer_curve(axes, of_bos, of_bos, of_bos, "BOS", BOS)
    if study.reference.phi_threshold is not None:
        axes.axhline(study.reference.phi_threshold, color=figures.FACT, linestyle="--", linewidth=1.2)
    picked = picking_layer(study.reference, seen.n_layers)
    axes.axvline(picked, color="#B0B0B0", linewidth=1.0)
    axes.annotate(" picked here", (picked, axes.get_ylim()[1]), va="top", fontsize=10, color="#555555")
    axes.set_ylabel(f"phi, dimensions {' and '.join(map(str, study.dims))}")
    _, early, late = seen.rising
    rise = "none" if np.isnan(late.value) else f"{early.value:.1f} in layers 0 and 1, {late.value:.1f} later"
    figures.headline(fig, f"phi of the {seen.named['LLM sink']}: {rise}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figures.sign(fig, seen.model, f"n = {seen.n} pictures")
    return fig


def turning_figure(seen: Sinkhood) -> Figure:
    """Cosine to BOS of each group after every sublayer, MLP-2 shaded (E24, E25)."""
    from matplotlib import pyplot as plt

    at, names = seen.study.aligner, seen.sublayers
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.4))
    for group, value in group_curves(seen.study.cosine, seen.seed).items():
        figures.layer_curve(axes, *value, seen.named[group], GROUPS[group])
    _along_sublayers(axes, seen)
    axes.set_ylim(min(-0.3, axes.get_ylim()[0]), 1.02)
    axes.annotate(names[at], (at, 0.98), ha="center", va="top", fontsize=10, color="#555555")
    axes.set_ylabel("cosine to BOS")
    where = "nowhere" if seen.largest_turn is None else f"at {names[seen.largest_turn]}"
    axes.set_title(f"{_capital(seen.named['LLM sink'])}: largest turn to BOS {where}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figures.sign(fig, seen.model, f"n = {seen.n} pictures")
    return fig


def staying_figure(seen: Sinkhood) -> Figure:
    """Ranks of the five most like BOS at MLP-2, and the share that stays, beside another text token's (E26)."""
    from matplotlib import pyplot as plt

    study = seen.study
    fig, (upper, lower) = plt.subplots(2, 1, figsize=(figures.WIDTH, 6.6), sharex=True)
    for row, ranks in enumerate(np.median(study.places, axis=0)):
        colour, marker = figures.ORDER[row % len(figures.ORDER)], figures.MARKERS[row % len(figures.MARKERS)]
        upper.plot(ranks, color=colour, marker=marker, label=f"{row + 1}.", linewidth=1.4)
    upper.set_yscale("log")
    upper.invert_yaxis()
    upper.set_yticks([1, 2, 5, 10, 20, 50], [1, 2, 5, 10, 20, 50])
    upper.axhline((study.tokens.mean() + 1) / 2, color=figures.CHANCE, linewidth=1.2)
    upper.set_ylabel("rank, median of pictures")
    upper.legend(title=f"at {seen.sublayers[study.aligner]}", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figures.layer_curve(lower, *curve(study.kept, seen.seed), "BOS", GROUPS["LLM sink"])
    figures.layer_curve(lower, *curve(study.kept_of_other, seen.seed), "another\ntext token", GROUPS["text"])
    figures.chance_curve(lower, np.full(len(seen.sublayers), study.kept_by_chance), "chance")
    lower.set_ylim(0, 1.05)
    lower.set_ylabel("share still among the first five")
    for axes in (upper, lower):
        _along_sublayers(axes, seen)
    upper.set_xlabel("")
    figures.label_ends(lower, least=0.12)
    kept, other, _ = seen.staying[0]
    upper.set_title(f"{kept.value:.0%} of the five most like BOS stay, {other.value:.0%} of the control")
    figures.sign(fig, seen.model, f"n = {seen.n} pictures")
    return fig


def skipping_figure(seen: Sinkhood) -> Figure:
    """Cosine to BOS and attention of the LLM kind: as it is, with MLP-2 skipped, skipped for others (E30)."""
    from matplotlib import pyplot as plt

    looks = (GROUPS["LLM sink"], Look("#222222", "v", "--"), Look(figures.CHANCE, "", ":"))
    effect, name = seen.study.skipping, seen.sublayers[seen.study.aligner]
    fig, (upper, lower) = plt.subplots(2, 1, figsize=(figures.WIDTH, 6.4))
    for arm, (label, look) in enumerate(zip(ARMS, looks, strict=True)):
        for axes, values in ((upper, effect.cosine), (lower, effect.mass)):
            figures.layer_curve(axes, *curve(values[:, arm], seen.seed), label, look)
    _along_sublayers(upper, seen)
    upper.set_ylabel("cosine to BOS")
    lower.set_xlabel("layer (0 = first block)")
    lower.set_ylabel("share of attention on them")
    lower.set_ylim(bottom=0)
    upper.legend(title=name, loc="center left", bbox_to_anchor=(1.0, 0.5))
    change = seen.skipped.cosine.value
    by = "nothing to skip" if np.isnan(change) else f"cosine {round(float(change), 3) + 0.0:+.3f}"
    upper.set_title(f"{name} skipped for the {seen.named['LLM sink']}: {by}")
    figures.sign(fig, seen.model, f"n = {seen.n} pictures")
    return fig


def _along_sublayers(axes: Axes, seen: Sinkhood) -> None:
    names, at = seen.sublayers, seen.study.aligner
    shown = np.arange(0, len(names), max(1, len(names) // 17))
    axes.set_xticks(shown, [names[place] for place in shown], rotation=60, fontsize=9)
    axes.set_xlim(-0.3, len(names) - 0.7)
    axes.set_xlabel("after sublayer")
    axes.axvspan(at - 0.5, at + 0.5, color="#F0EBD8", zorder=0)


def _plain_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, written as plain numbers."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
