"""Does a language model have to work on visual tokens? Silenced updates, and tokens that enter later (Section 7.2).

Two ways to take the work away. *Silencing* zeroes what attention or MLP adds to the visual rows, in every layer; text
still reads them (-vMHA, -vFFN). *Late entry* lets the text run alone below a layer L_in. Every arm is asked what the
baseline was asked. A run trained with late entry is compared with its twin: L_in = 0, trained beside it from the same
weights on the same batches. The paper has no such twin.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from embedlens import printed
from embedlens.claims import FAILS, HOLDS, PARTLY, UNTESTABLE, Finding, judged
from embedlens.errors import EmbedLensError
from embedlens.groups import TokenGroups
from embedlens.intervals import Interval, draws, percentile_interval, ratio_interval
from embedlens.interventions import EnterAt, ReleasedLayer0, Silence, intervene
from embedlens.labels import LabelHits, label_hits, label_ids
from embedlens.late_entry import Adapter, adapted
from embedlens.lenses import EmbedLens
from embedlens.paired import AVG, Comparison, compare, scored
from embedlens.patches import PatchGrid
from embedlens.samples import Sample
from embedlens.sweep import BASELINE, Arm, everywhere, run_arms
from embedlens.tasks import FAMILIES, Item
from embedlens.vlm import QUESTION

if TYPE_CHECKING:
    import pandas as pd

    from embedlens.vlm import Prompt, VisionLanguageModel

MHA, FFN, BOTH, RELEASED = "-vMHA", "-vFFN", "-vMHA -vFFN", "-vMHA, as released"
TEXT_MHA, TEXT_FFN = "text -MHA", "text -FFN"
OTHER = "another picture"
SHIPPED = BASELINE.name
TITLES = {"general": "General", "ocr": "OCR", "grounding": "CV-centric", "hallucination": "Hallucination", AVG: AVG}
SCORES = (*FAMILIES, AVG)
STANDARD = ("general", "hallucination")
"""The families of which the paper says that they do without visual processing; it loses 1.6 points of OCR itself."""

# Set before the first run.
KEPT = 0.05
"""An arm keeps its answers if it loses less of Avg; both of the paper's rows do (-1.3 and -4.4 points)."""
ALIKE = 0.01
"""Grounded shares of tokens are "nearly identical" if they differ by less."""
REFINED = 0.9
"""Refinement is over when so much of the way to the largest grounded share is done."""
WORDS, RULE = 5, "head-word"
"""A token is grounded if its object's label is among so many nearest words, by this rule of `embedlens.labels`."""

PAPER = "LLaVA-1.5-7B"
PAPER_LAYERS = 32
PAPER_SUFFICIENT = (4, 6)
"""Entry layers of which the paper says that they suffice."""
Found = Mapping[tuple[str, str], Comparison]
"""(arm, score) → how it differs from its baseline."""


# --- arms ------------------------------------------------------------------------------------------------------------


def entering(layer: int) -> str:
    """The arm's name: visual tokens enter at a layer, untrained."""
    return f"enter at {layer}"


def frozen_until(layer: int) -> str:
    """The arm's name: text reads visual tokens in all layers, but below this one nothing updates them."""
    return f"frozen until {layer}"


def trained(layer: int) -> str:
    """The arm's name: visual tokens enter at a layer, and the model was trained for it."""
    return f"enter at {layer}, trained"


def silence_arms() -> list[Arm]:
    """The two rows of Table 3 that need no training, what the released code does for the first, and their baseline."""
    return [
        BASELINE,
        everywhere(MHA, Silence("attention")),
        everywhere(FFN, Silence("mlp")),
        everywhere(RELEASED, Silence("attention"), ReleasedLayer0()),
    ]


def entry_arms(n_layers: int) -> list[Arm]:
    """Untrained late entry at every layer but 0, which is the baseline.

    >>> [arm.name for arm in entry_arms(3)]
    ['enter at 1', 'enter at 2']
    """
    return [everywhere(entering(layer), EnterAt(layer)) for layer in range(1, n_layers)]


def frozen_arms(n_layers: int) -> list[Arm]:
    """The control of late entry, at the quarters of the depth short of all: no updates below a layer, but reading.

    Late entry takes away two things at once: what the layers below do with visual tokens, and what text reads there.
    """
    return [
        everywhere(frozen_until(at), Silence("attention", range(at)), Silence("mlp", range(at)))
        for at in sorted({max(1, round(n_layers * quarter / 4)) for quarter in (1, 2, 3)} - {n_layers})
    ]


def ungrouped(model: VisionLanguageModel, prompts: Sequence[Prompt]) -> list[TokenGroups]:
    """Every token alive: the arms of this module treat all visual tokens alike, so no groups need be found."""
    found = []
    for prompt in prompts:
        none = torch.zeros(len(prompt.grid), dtype=torch.bool)
        found.append(TokenGroups(none, none, none, ~none, met={}))
    return found


# --- asking ----------------------------------------------------------------------------------------------------------


def asked(model: VisionLanguageModel, items: Sequence[Item], arms: Sequence[Arm], batch_size: int = 32) -> pd.DataFrame:
    """`sweep.run_arms`, for arms that look at no groups."""
    return run_arms(model, items, arms, ungrouped, batch_size)


def about_another(model: VisionLanguageModel, items: Sequence[Item], batch_size: int = 32) -> pd.DataFrame:
    """The floor: every question asked about a picture half the way round, so only the picture's content is wrong.

    The rows keep the number and the id of the question's own picture, so that they pair with it.
    """
    own = list(dict.fromkeys(item.sample.id for item in items))
    if len(own) < 2:
        raise EmbedLensError("swapping pictures needs at least two: ask about more")
    samples = {item.sample.id: item.sample for item in items}
    shown = {one: samples[own[(place + len(own) // 2) % len(own)]] for place, one in enumerate(own)}
    swapped = [Item(shown[item.sample.id], item.question) for item in items]
    table = asked(model, swapped, [Arm(OTHER, _plain)], batch_size)
    return table.assign(id=[items[number].sample.id for number in table["item"]], acted=True)


def _plain(*_: Any) -> None:
    return None


@contextmanager
def text_silenced(model: VisionLanguageModel, sublayer: str) -> Iterator[None]:
    """What `Silence` does to the visual rows, done to all text rows but the last, which has to answer.

    The control of -vMHA and -vFFN: a sublayer's update may be dispensable in any rows. In prefill alone, as there.
    """
    if model.intervention is not None:
        raise EmbedLensError("an intervention is active already: silence the text rows in a block of its own")
    rows: list[Bool[Tensor, "b s"]] = []

    @contextmanager
    def admit(
        prompts: Sequence[Prompt], start: int, total: int, side: str, *_: Any, **__: Any
    ) -> Iterator[Sequence[Prompt]]:
        longest = max(map(len, prompts))
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            begin = longest - len(prompt) if side == "left" else 0
            mask[row, begin : begin + len(prompt)] = prompt.text.cpu()
            mask[row, begin + len(prompt) - 1] = False
        rows.append(mask)
        try:
            yield prompts
        finally:
            rows.clear()

    def freeze(module: nn.Module, args: tuple, output: Any) -> Any:
        update = output[0] if isinstance(output, tuple) else output
        if not rows or update.shape[:2] != rows[0].shape:  # a decoding step
            return None
        update = update.masked_fill(rows[0].to(update.device)[..., None], 0)
        return (update, *output[1:]) if isinstance(output, tuple) else update

    def hooks(hook: Callable[..., None]) -> None:
        for layer in range(model.n_layers):
            hook(model.part(layer, sublayer).register_forward_hook, freeze)

    with model.intervening(admit, hooks):
        yield


def about_text(model: VisionLanguageModel, items: Sequence[Item], batch_size: int = 32) -> pd.DataFrame:
    """The control of Table 3: attention or MLP silenced in text rows."""
    import pandas as pd

    parts = []
    for name, sublayer in ((TEXT_MHA, "attention"), (TEXT_FFN, "mlp")):
        with text_silenced(model, sublayer):
            parts.append(asked(model, items, [Arm(name, _plain)], batch_size))
    return pd.concat(parts, ignore_index=True).assign(acted=True)


def untrained_entry(model: VisionLanguageModel, items: Sequence[Item], batch_size: int = 32) -> pd.DataFrame:
    """Late entry without training at every layer, everything that it is set beside, and the floor: one table."""
    import pandas as pd

    both = everywhere(BOTH, Silence("attention"), Silence("mlp"))  # no work on visual tokens: not tried by the paper
    arms = [*silence_arms()[:3], both, *entry_arms(model.n_layers), *frozen_arms(model.n_layers)]
    parts = [asked(model, items, arms, batch_size), about_text(model, items, batch_size)]
    return pd.concat([*parts, about_another(model, items, batch_size)], ignore_index=True)


def trained_entry(
    model: VisionLanguageModel, items: Sequence[Item], found: Sequence[Adapter], batch_size: int = 32
) -> pd.DataFrame | None:
    """Every trained run asked the same questions, each with the entry it was trained for, and the model as it is.

    None where there are no runs.
    """
    import pandas as pd

    parts = [asked(model, items, [BASELINE], batch_size)] if found else []
    for adapter in found:
        arm = everywhere(trained(adapter.layer), EnterAt(adapter.layer)) if adapter.layer else Arm(trained(0), _plain)
        with adapted(model, adapter):
            parts.append(asked(model, items, [replace(arm, seed=adapter.seed)], batch_size))
    return pd.concat(parts, ignore_index=True) if parts else None


# --- comparing -------------------------------------------------------------------------------------------------------


def compared(
    table: pd.DataFrame, arms: Sequence[str], baseline: str = SHIPPED, of: Sequence[str] = SCORES, seed: int = 0
) -> dict[tuple[str, str], Comparison]:
    """Arms with one baseline, by arm and score."""
    return {(arm, name): compare(table, arm, name, baseline, seed=seed) for arm in arms for name in of}


def late_layers(table: pd.DataFrame | None) -> list[int]:
    """Layers above 0 at which trained runs enter, of those whose every seed has its twin."""
    if table is None:
        return []
    seeds = {str(arm): set(rows["seed"]) for arm, rows in table.groupby("arm")}
    layers = [int(match[1]) for arm in seeds if (match := re.fullmatch(trained(0).replace("0", r"(\d+)"), arm))]
    return sorted(layer for layer in layers if layer and seeds[trained(layer)] == seeds.get(trained(0)))


def against_twins(table: pd.DataFrame | None, seed: int = 0) -> dict[tuple[str, str], Comparison]:
    """Trained late entry with the twins of the same seeds, differences averaged over seeds; by arm and score."""
    if table is None:
        return {}
    return compared(table, [trained(layer) for layer in late_layers(table)], trained(0), seed=seed)


def by_seed(table: pd.DataFrame | None, seed: int = 0) -> dict[tuple[int, int], Comparison]:
    """(layer, seed of the run) → its Avg against its own twin's: how far repeats lie apart."""
    if table is None:
        return {}
    return {
        (layer, int(one)): compare(table[table["seed"] == one], trained(layer), AVG, trained(0), seed=seed)
        for layer in late_layers(table)
        for one in sorted(set(table["seed"]))
    }


def entry_scores(table: pd.DataFrame, n_layers: int, of: str, seed: int = 0) -> Interval:
    """A score by untrained entry layer, the baseline at 0."""
    return stacked_scores(table, [SHIPPED, *(entering(layer) for layer in range(1, n_layers))], of, seed)


def stacked_scores(table: pd.DataFrame, arms: Sequence[str], of: str, seed: int = 0) -> Interval:
    """A score with its interval, one entry per arm."""
    found = [scored(table, arm, of, seed=seed) for arm in arms]
    return Interval(*(np.array([float(part) for part in parts]) for parts in zip(*found, strict=True)))


def frozen_layers(table: pd.DataFrame) -> list[int]:
    """Layers up to which the control of late entry was asked."""
    start = frozen_until(0).removesuffix("0")
    return sorted(int(arm.removeprefix(start)) for arm in set(table["arm"]) if arm.startswith(start))


def paper_changes() -> dict[str, dict[str, float]]:
    """Row of Table c → score → points that it differs from the paper's baseline."""
    return printed.changes(printed.TABLE_C)


def paper_entries() -> dict[int, float]:
    """L_in → Avg as the paper prints it, its untrained baseline at 0.

    >>> paper_entries()
    {0: 52.7, 4: 53.2, 5: 53.3, 6: 52.9, 8: 51.9, 10: 51.3}
    """
    found = {0: printed.TABLE_C[0].avg}
    return found | {int(row.name.split()[2].strip(",")): row.avg for row in printed.TABLE_C if "enter" in row.name}


def questions_needed(found: Comparison) -> int:
    """About how many such questions would bring the 90 % interval within the margin, if nothing differed."""
    half = (found.narrow_high - found.narrow_low) / 2
    return round(found.questions * (half / found.margin) ** 2)


def points(found: Comparison) -> Interval:
    """A change with its interval, in points."""
    return Interval(*(np.array(100 * part) for part in (found.difference, found.low, found.high)))


# --- grounding by layer (Figure g) -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Grounded:
    """How many object tokens name their object, by layer, of all runs that enter at one layer."""

    entry: int
    hits: LabelHits
    """Runs counted together, picture by picture."""

    @property
    def share(self) -> Interval:
        """Of the object tokens, by layer."""
        return ratio_interval(self.hits.grounded.T, self.hits.object_tokens)

    def steps(self, times: Float[np.ndarray, "resamples pictures"]) -> Float[np.ndarray, " resamples"]:
        """Blocks after entry until REFINED of the way to the largest share is done; 0 where it never rises."""
        own = self.hits.grounded[self.entry :].T.astype(np.float64)
        curves = (times @ own) / np.maximum(times @ self.hits.object_tokens, 1)[:, None]
        goal = curves[:, :1] + REFINED * (curves.max(1, keepdims=True) - curves[:, :1])
        return (curves >= goal).argmax(1).astype(np.float64)


@dataclass(frozen=True, eq=False)
class AtEntry:
    """Grounded tokens as they leave the projector, which is as they enter, whatever the layer."""

    object_tokens: Int[np.ndarray, " pictures"]
    grounded: Mapping[int | None, Float[np.ndarray, " pictures"]]
    """Entry layer (None: the model as it is) → grounded object tokens of each picture, mean over runs."""

    def share(self, entry: int | None, seed: int = 0) -> Interval:
        """Of the object tokens."""
        return ratio_interval(self.grounded[entry], self.object_tokens, seed=seed)

    def difference(self, entry: int, seed: int = 0) -> Interval:
        """The share less that of the twin, paired by picture."""
        return ratio_interval(self.grounded[entry] - self.grounded[0], self.object_tokens, seed=seed)


def grounded_by_entry(
    model: VisionLanguageModel, samples: Sequence[Sample], found: Sequence[Adapter], batch_size: int = 16
) -> dict[int | None, Grounded]:
    """Grounded shares by layer of the model as it is (None) and of the runs trained for each entry layer.

    A token is grounded if one of its five nearest words is a label of an object that it lies in.
    """
    runs: dict[int | None, list[LabelHits]] = {None: [_hits(model, samples, batch_size)]}
    for adapter in found:
        with ExitStack() as stack:
            stack.enter_context(adapted(model, adapter))
            if adapter.layer:
                stack.enter_context(intervene(model, EnterAt(adapter.layer)))
            runs.setdefault(adapter.layer, []).append(_hits(model, samples, batch_size))
    order = sorted(runs, key=lambda entry: -1 if entry is None else entry)
    return {entry: Grounded(entry or 0, together(runs[entry])) for entry in order}


def _hits(model: VisionLanguageModel, samples: Sequence[Sample], batch_size: int) -> LabelHits:
    lenses = {"EmbedLens": EmbedLens.from_model(model)}
    return label_hits(model, samples, (WORDS,), (RULE,), lenses, batch_size)["EmbedLens", WORDS, RULE]


def together(runs: Sequence[LabelHits]) -> LabelHits:
    """Several runs over the same pictures, their tokens counted together."""
    names = ("tokens", "object_tokens", "grounded", "label_tokens", "retrieving")
    return replace(runs[0], **{name: np.sum([getattr(run, name) for run in runs], axis=0) for name in names})


def grounded_at_entry(
    model: VisionLanguageModel, samples: Sequence[Sample], found: Sequence[Adapter], batch_size: int = 32
) -> AtEntry:
    """The same at the entry alone, which needs no language model: the tower runs once for all projectors.

    Raises:
        EmbedLensError: no picture has an object whose label has a token.
    """
    lens = EmbedLens.from_model(model)
    objects, own, seen = [], [], []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        prompts = model.prompts([sample.image for sample in batch], [QUESTION] * len(batch))
        own += [prompt.embeds[prompt.visual] for prompt in prompts]
        if found:
            seen += [states[model.feature_layer] for states in model.tower_states_of(prompts)]
        objects += [
            _labelled_objects(model, sample, prompt.grid) for sample, prompt in zip(batch, prompts, strict=True)
        ]

    def named(features: Sequence[Float[Tensor, "n d"]]) -> Float[np.ndarray, " pictures"]:
        sums = []
        for inside, tokens in zip(objects, features, strict=True):
            ids = lens.topk(tokens, WORDS)[1].cpu()
            hits = [mask & torch.isin(ids, counted).any(-1) for mask, counted in inside]
            sums.append(float(torch.stack(hits).any(0).sum()) if hits else 0.0)
        return np.array(sums)

    runs: dict[int | None, list[np.ndarray]] = {None: [named(own)]}
    for adapter in found:
        with adapted(model, adapter), torch.no_grad():
            runs.setdefault(adapter.layer, []).append(named([model.projector(states) for states in seen]))
    tokens = [int(torch.stack([mask for mask, _ in inside]).any(0).sum()) if inside else 0 for inside in objects]
    if not sum(tokens):
        raise EmbedLensError("no picture has an object whose label has a token: take more pictures")
    return AtEntry(np.array(tokens), {entry: np.mean(hits, axis=0) for entry, hits in runs.items()})


def _labelled_objects(
    model: VisionLanguageModel, sample: Sample, grid: PatchGrid
) -> list[tuple[Bool[Tensor, " n"], Int[Tensor, " ids"]]]:
    """Patches and label ids of each object whose label has a token."""
    found = []
    for entry in (entry for entry in sample.annotations if not entry["iscrowd"]):
        x, y, w, h = entry["bbox"]
        ids = label_ids(model.tokenizer, sample.category_names[entry["category_id"]], RULE)
        if ids:
            found.append((grid.inside((x, y, x + w, y + h)), torch.tensor(ids)))
    return found


def step_difference(late: Grounded, twin: Grounded, seed: int = 0, resamples: int = 2000) -> Interval:
    """Blocks of refinement after entry, less the twin's, with a bootstrap over pictures."""
    n = late.hits.grounded.shape[1]
    times = np.vstack([np.ones((1, n)), draws(n, resamples, seed)])
    change = late.steps(times) - twin.steps(times)
    return percentile_interval(np.array(change[0]), change[1:], 0.95, ())


# --- verdicts --------------------------------------------------------------------------------------------------------


def silenced_finding(found: Found, arm: str) -> Finding:
    """E49, E50: the arm keeps its answers if the interval of its change in Avg lies above minus KEPT."""
    change = found[arm, AVG]
    said = ", ".join(f"{TITLES[of]} {100 * found[arm, of].difference:+.1f}" for of in FAMILIES)
    note = f"Change of Avg against the baseline ({change.verdict}); by family, in points: {said}."
    return Finding.of(_change(change), change.questions, judged(change.low, change.high, -KEPT), note)


def standard_finding(found: Found) -> Finding:
    """E51: of four changes (General and Hallucination, -vMHA and -vFFN) "most" are no loss.

    Holds if at least three are not worse by the equivalence margin (their 90 % intervals lie above minus one point),
    fails if at least two are degradations, else partly. The value is that of the largest loss.
    """
    changes = [found[arm, of] for arm in (MHA, FFN) for of in STANDARD]
    fine = sum(change.not_worse for change in changes)
    worse = sum(change.verdict == "degradation" for change in changes)
    verdict = HOLDS if fine >= 3 else FAILS if worse >= 2 else PARTLY
    least = min(changes, key=lambda change: change.difference)
    said = ", ".join(f"{change.arm} {TITLES[change.of]} {change.text()}" for change in changes)
    note = f"Largest loss of four: {said}; {fine} shown to lose less than a point, {worse} degraded."
    return Finding.of(_change(least), least.questions, verdict, note)


def crucial_finding(found: Found, mha_over_ffn: Comparison) -> Finding:
    """E52: the caption says that visual attention is crucial for CV-centric tasks.

    Holds if -vMHA degrades grounding, and more than -vFFN does; fails if it loses less than a point, or less than
    -vFFN does; else partly.

    Args:
        mha_over_ffn: grounding under -vMHA, compared with -vFFN.
    """
    own = found[MHA, "grounding"]
    holds = own.verdict == "degradation" and mha_over_ffn.high < 0
    fails = own.not_worse or mha_over_ffn.low > 0
    verdict = HOLDS if holds else FAILS if fails else PARTLY
    note = (
        f"Change of grounding under -vMHA ({own.verdict}); under -vFFN {found[FFN, 'grounding'].text()}; the one less "
        f"the other {mha_over_ffn.text()}."
    )
    return Finding.of(_change(own), own.questions, verdict, note)


def nearest_layer(layers: Sequence[int], n_layers: int, depth: float) -> int:
    """The layer whose share of the depth is nearest to a given one; of two the earlier.

    >>> nearest_layer([1, 2, 4, 6], 8, 5 / 32)
    1
    """
    return min(layers, key=lambda layer: (abs(layer / n_layers - depth), layer))


def within_paper(layers: Sequence[int], n_layers: int) -> list[int]:
    """Those at a depth that the paper trains for: up to 10 of 32 layers."""
    deepest = max(paper_entries()) / PAPER_LAYERS
    return [layer for layer in layers if layer / n_layers <= deepest]


def trained_finding(twins: Found, layers: Sequence[int], n_layers: int) -> Finding:
    """E53: entries at the paper's depths keep their answers, as E49 counts it, against the twin; the worst decides."""
    inside = within_paper(layers, n_layers)
    if not inside:
        return _without(layers)
    changes = {layer: twins[trained(layer), AVG] for layer in inside}
    worst = min(changes.values(), key=lambda change: change.difference)
    said = "; ".join(f"entry at {layer} of {n_layers} {change.text()}" for layer, change in changes.items())
    note = f"Avg less that of the twin trained with entry at 0, the worst of the paper's depths: {said}."
    return Finding.of(_change(worst), worst.questions, judged(worst.low, worst.high, -KEPT), note)


def sufficient_finding(twins: Found, layers: Sequence[int], n_layers: int) -> Finding:
    """E54: entry nearest to the depth that "suffices" (4 to 6 of 32 layers), and nearest to the middle, lose nothing.

    Holds if both are shown to lose less than a point, fails if both are degradations, else partly.
    """
    if not layers:
        return _without(layers)
    early = nearest_layer(layers, n_layers, sum(PAPER_SUFFICIENT) / 2 / PAPER_LAYERS)
    middle = nearest_layer(layers, n_layers, 0.5)
    first, second = (twins[trained(layer), AVG] for layer in (early, middle))
    worse = [change.verdict == "degradation" for change in (first, second)]
    verdict = HOLDS if first.not_worse and second.not_worse else FAILS if all(worse) else PARTLY
    note = (
        f"Avg less the twin's with entry at {early} of {n_layers} ({first.verdict}); at the middle, {middle} of "
        f"{n_layers}: {second.text()} ({second.verdict})."
    )
    return Finding.of(_change(first), first.questions, verdict, note)


def grounded_finding(
    at_entry: AtEntry, by_layer: Mapping[int | None, Grounded], n_layers: int, seed: int = 0
) -> Finding:
    """E57: at entry all trained runs have the same grounded share, and later entry refines over more blocks.

    The first is shown if the interval of every difference to the twin lies within ALIKE, and refuted if one lies
    outside; the second is shown if the latest entry at a depth of the paper's takes more blocks than the twin, and
    refuted if it takes no more (by whole intervals). Holds if both are shown, fails if both are refuted, else partly.
    The value is the largest difference at entry.
    """
    layers = sorted(layer for layer in at_entry.grounded if layer)
    inside = within_paper(layers, n_layers)
    if 0 not in at_entry.grounded or not inside:
        return _without(layers)
    apart = {layer: at_entry.difference(layer, seed) for layer in layers}
    steps = step_difference(by_layer[max(inside)], by_layer[0], seed)
    same = all(-ALIKE < float(one.low) and float(one.high) < ALIKE for one in apart.values())
    other = any(float(one.low) > ALIKE or float(one.high) < -ALIKE for one in apart.values())
    more, no_more = float(steps.low) > 0, float(steps.high) <= 0
    verdict = HOLDS if same and more else FAILS if other and no_more else PARTLY
    most = max(apart.values(), key=lambda one: abs(float(one.value)))
    said = "; ".join(f"entry at {layer} {one.texts(3)[0]}" for layer, one in apart.items())
    note = (
        f"Grounded share of object tokens as they enter, less the twin's: {said}. Blocks of refinement with entry at "
        f"{max(inside)} less the twin's: {steps.texts(1)[0]}."
    )
    return Finding.of(most, len(at_entry.object_tokens), verdict, note)


def _without(layers: Sequence[int]) -> Finding:
    why = "none at the paper's depths" if layers else "none"
    note = f"Of runs trained for late entry there are {why} beside this model: train some with training/entry.py."
    return Finding.of(None, 0, UNTESTABLE, note)


def released_verdict(found: Comparison) -> str:
    """Whether the released rewriting of layer 0 matters for -vMHA, in words."""
    if found.verdict in ("degradation", "improvement"):
        return f"{found.text()}, so it matters"
    return f"{found.text()}, no difference beyond a point" if found.equivalent else f"{found.text()}, undecided"


def _change(found: Comparison) -> Interval:
    return Interval(*(np.array(part) for part in (found.difference, found.low, found.high)))


# --- tables ----------------------------------------------------------------------------------------------------------


def change_table(found: Found, paper: Mapping[str, str] | None = None, of: Sequence[str] = SCORES) -> pd.DataFrame:
    """Changes in points, one row per arm and score, with the paper's change of the row of the same name.

    Args:
        paper: arm → row of Table c; None leaves the paper out.
    """
    import pandas as pd

    rows = []
    for arm in dict.fromkeys(arm for arm, _ in found):
        for name in of:
            one = found[arm, name]
            row = {
                "arm": arm,
                "score": TITLES[name],
                "its baseline": f"{100 * one.baseline:.1f}",
                "here": one.text(),
                "gained, lost": f"{one.gained:g}, {one.lost:g}",
                "p": "–" if np.isnan(one.p) else f"{one.p:.3f}",
                "verdict": one.verdict,
            }
            if paper:
                row[f"paper ({PAPER})"] = f"{paper_changes()[paper[arm]][name]:+.1f}" if arm in paper else "–"
            rows.append(row)
    return pd.DataFrame(rows).set_index(["arm", "score"])


def contradiction_table() -> pd.DataFrame:
    """What the paper's tables and sentences say of the same numbers. All printed, none measured here."""
    import pandas as pd

    changes = paper_changes()
    rows = [
        {
            "where": "Table c, caption",
            "printed": "-vMHA is crucial for CV-centric tasks, -vFFN refines knowledge",
            "follows from the scores": f"CV-centric {changes[MHA]['grounding']:+.1f} with -vMHA, "
            f"{changes[FFN]['grounding']:+.1f} with -vFFN",
        },
        {
            "where": "Table c, rows L_in",
            "printed": "against the released model",
            "follows from the scores": "no L_in = 0 trained with the same recipe, so training and entry are not apart",
        },
    ]
    for one in (*printed.contradictions(), *printed.contradictory_averages()):
        rows.append(
            {
                "where": f"Table {one.table}, {one.row}, {TITLES[one.column]}",
                "printed": f"{one.printed:.1f}",
                "follows from the scores": f"{one.follows:.2f}" + (" (rounding may explain it)" * one.rounding),
            }
        )
    return pd.DataFrame(rows).set_index("where")


def interval_table(found: Sequence[Comparison], table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """How much pairing gains: half the width of the interval of each change, paired and not, in points."""
    import pandas as pd

    rows = []
    for one in found:
        apart = [scored(table, arm, one.of, seed=seed) for arm in (SHIPPED, one.arm)]
        alone = float(np.hypot(*((part.high - part.low) / 2 for part in apart)))
        rows.append(
            {
                "arm": one.arm,
                "score": TITLES[one.of],
                "change": f"{100 * one.difference:+.1f}",
                "half the interval, paired": round(50 * (one.high - one.low), 1),
                "not paired": round(100 * alone, 1),
                "questions for one point": questions_needed(one),
                "verdict": one.verdict,
            }
        )
    return pd.DataFrame(rows).set_index(["arm", "score"])


def entry_table(found: Decoupling) -> pd.DataFrame:
    """Grounded shares at entry, against the twin's, and how long they are refined; in points."""
    import pandas as pd

    rows = []
    for entry in found.at_entry.grounded:
        share, one = found.at_entry.share(entry, found.seed), found.by_layer[entry]
        row = {"runs": "as shipped" if entry is None else f"enters at {entry}", "share at entry": _points_text(share)}
        row["less the twin's"] = _points_text(found.at_entry.difference(entry, found.seed)) if entry else "–"
        steps = one.steps(np.ones((1, one.hits.grounded.shape[1])))[0]
        curve = 100 * one.share.value[one.entry :]
        row |= {"on the curve, at entry": f"{curve[0]:.1f}", "largest from there on": f"{curve.max():.1f}"}
        rows.append(row | {"blocks of refinement": int(steps)})
    return pd.DataFrame(rows).set_index("runs")


def _points_text(found: Interval) -> str:
    return Interval(*(100 * part for part in found)).texts(1)[0]


def told_of_runs(found: Sequence[Adapter]) -> dict[str, Any]:
    """How the runs were trained, for the prose."""
    layers = sorted({adapter.layer for adapter in found})
    return {
        "entries": "layer " + ", ".join(map(str, layers)) if layers else "no layer (none ship with this model)",
        "n_seeds": len({adapter.seed for adapter in found}),
        "steps": max((adapter.steps for adapter in found), default=0),
    }


# --- all of it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Decoupling:
    """Everything that Section 7.2 needs asked, with what follows from it."""

    silenced: pd.DataFrame
    """The arms of `silence_arms`, on all questions."""
    untrained: pd.DataFrame
    """`untrained_entry`, on fewer."""
    runs: pd.DataFrame | None
    """`trained_entry`, on the same; None without trained runs."""
    at_entry: AtEntry
    by_layer: Mapping[int | None, Grounded]
    n_layers: int
    seed: int = 0

    @cached_property
    def silencing(self) -> Found:
        """-vMHA and -vFFN against the baseline."""
        return compared(self.silenced, [MHA, FFN], seed=self.seed)

    @cached_property
    def controls(self) -> Found:
        """Avg of every other way to silence, and of the floor, against the baseline; on the fewer questions."""
        return compared(self.untrained, [MHA, FFN, BOTH, TEXT_MHA, TEXT_FFN, OTHER], of=[AVG], seed=self.seed)

    @cached_property
    def released(self) -> Found:
        """-vMHA as released against -vMHA as described."""
        return compared(self.silenced, [RELEASED], MHA, seed=self.seed)

    @cached_property
    def twins(self) -> Found:
        """Trained late entry against entry at 0, trained beside it."""
        return against_twins(self.runs, self.seed)

    @cached_property
    def seeds(self) -> Mapping[tuple[int, int], Comparison]:
        """The same, run by run."""
        return by_seed(self.runs, self.seed)

    @property
    def layers(self) -> list[int]:
        """Layers above 0 for which runs were trained."""
        return late_layers(self.runs)

    @cached_property
    def findings(self) -> dict[str, Finding]:
        """The verdicts."""
        mha_over_ffn = compare(self.silenced, MHA, "grounding", FFN, seed=self.seed)
        return {
            "E49": silenced_finding(self.silencing, MHA),
            "E50": silenced_finding(self.silencing, FFN),
            "E51": standard_finding(self.silencing),
            "E52": crucial_finding(self.silencing, mha_over_ffn),
            "E53": trained_finding(self.twins, self.layers, self.n_layers),
            "E54": sufficient_finding(self.twins, self.layers, self.n_layers),
            "E57": grounded_finding(self.at_entry, self.by_layer, self.n_layers, self.seed),
        }

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        of_mha, of_ffn = self.silencing[MHA, AVG], self.silencing[FFN, AVG]
        changes = [*self.silencing.values(), *self.controls.values(), *self.released.values(), *self.twins.values()]
        decided = sum(change.verdict != "undecided" for change in changes)
        widths = [change.high - change.low for change in self.silencing.values()]
        original = {
            arm: compare(self.silenced, arm, "grounding", correct="correct_original", seed=self.seed)
            for arm in (MHA, FFN)
        }
        return {
            "mha_change": of_mha.text(),
            "ffn_change": of_ffn.text(),
            "mha_verdict": of_mha.verdict,
            "ffn_verdict": of_ffn.verdict,
            "grounding_mha": self.silencing[MHA, "grounding"].text(),
            "grounding_ffn": self.silencing[FFN, "grounding"].text(),
            "original_mha": original[MHA].text(),
            "original_ffn": original[FFN].text(),
            "both_change": self.controls[BOTH, AVG].text(),
            "text_mha": self.controls[TEXT_MHA, AVG].text(),
            "text_ffn": self.controls[TEXT_FFN, AVG].text(),
            "floor_change": self.controls[OTHER, AVG].text(),
            "released_verdict": released_verdict(self.released[RELEASED, AVG]),
            "released_grounding": self.released[RELEASED, "grounding"].text(),
            "n_changes": len(changes),
            "n_decided": decided,
            "n_degraded": sum(change.verdict == "degradation" for change in changes),
            "n_equivalent": sum(change.verdict == "no degradation shown" for change in changes),
            "widest": f"{50 * max(widths):.1f}",
            "needed": questions_needed(of_mha),
            "like_paper": "could" if of_mha.high - of_mha.low < -2 * paper_changes()[MHA][AVG] / 100 else "could not",
            "untrained_said": self._untrained_said(),
            "trained_said": self._trained_said(),
            "spread_said": self._spread_said(),
            "twin_said": self._twin_said(),
        }

    def _trained_said(self) -> str:
        if not self.layers:
            return "No run beside this model is trained for late entry"
        said = [f"{self.twins[trained(layer), AVG].text()} at layer {layer}" for layer in self.layers]
        return f"Trained for late entry, Avg changes against the twin by {', '.join(said)}"

    def _untrained_said(self) -> str:
        held = frozen_layers(self.untrained)
        if not held:
            return "It has too few layers for an entry in between"
        middle = nearest_layer(held, self.n_layers, 0.5)
        names = [entering(1), entering(middle), frozen_until(middle)]
        first, late, frozen = compared(self.untrained, names, of=[AVG], seed=self.seed).values()
        return (
            f"Entry at layer 1 changes Avg by {first.text()}, entry at layer {middle} of {self.n_layers} by "
            f"{late.text()}, tokens frozen until there but read by {frozen.text()}"
        )

    def _twin_said(self) -> str:
        if self.runs is None or not self.layers:
            return "none is trained"
        alone, *late = (compare(self.runs, trained(at), AVG, SHIPPED, seed=self.seed) for at in (0, *self.layers))
        said = ", ".join(f"{one.text()} at layer {layer}" for one, layer in zip(late, self.layers, strict=True))
        return (
            f"training alone changes Avg by {alone.text()} (twins less the model as it ships), and a difference taken "
            f"as the paper takes it would read {said}"
        )

    def _spread_said(self) -> str:
        found: dict[int, list[float]] = {}
        for (layer, _), change in self.seeds.items():
            found.setdefault(layer, []).append(100 * change.difference)
        if not found or min(map(len, found.values())) < 2:
            return "There are not several seeds to lie apart"
        widest = max(max(values) - min(values) for values in found.values())
        return f"Runs that differ in nothing but the seed lie up to {widest:.1f} points apart in this difference"

    def numbers(self) -> dict[str, float]:
        """For the record: every change, by arm and score, from 0 to 1."""
        groups = {
            "silenced": self.silencing,
            "beside": self.controls,
            "released": self.released,
            "twin": self.twins,
        }
        found = {
            f"{group} {arm} {of}": change.difference
            for group, changes in groups.items()
            for (arm, of), change in changes.items()
        }
        untrained = entry_scores(self.untrained, self.n_layers, AVG, self.seed).value
        found |= {f"untrained Avg {layer}": float(value) for layer, value in enumerate(untrained)}
        found |= {
            f"grounded at entry {'as shipped' if layer is None else layer}": float(self.at_entry.share(layer).value)
            for layer in self.at_entry.grounded
        }
        return {re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"): value for name, value in found.items()}
