"""The figures of silenced updates and late entry; what they show is measured in `embedlens.chapters.decoupling`.

What the paper printed stands in a panel of its own, in the colour of facts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Shaped

from embedlens import figures
from embedlens.chapters.decoupling import (
    BOTH,
    FFN,
    MHA,
    OTHER,
    PAPER,
    PAPER_LAYERS,
    SCORES,
    SHIPPED,
    TEXT_FFN,
    TEXT_MHA,
    TITLES,
    Decoupling,
    entry_scores,
    frozen_layers,
    frozen_until,
    nearest_layer,
    paper_changes,
    paper_entries,
    points,
    stacked_scores,
    trained,
)
from embedlens.figures import Look
from embedlens.intervals import Interval
from embedlens.paired import AVG, MARGIN, scored
from embedlens.tasks import FAMILIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS = {
    MHA: Look("#0072B2", "o"),
    FFN: Look("#D55E00", "s", "--"),
    "untrained": Look("#4D4D4D", "o"),
    "trained": Look("#009E73", "D"),
    "frozen": Look("#CC79A7", "^", "-."),
    OTHER: Look(figures.CHANCE, "", ":"),
}

# --- figures ---------------------------------------------------------------------------------------------------------


def silence_figure(found: Decoupling) -> Figure:
    """Changes under -vMHA and -vFFN by family, with the margin; the paper's in a panel of its own."""
    from matplotlib import pyplot as plt

    fig, (here, paper) = plt.subplots(1, 2, figsize=(figures.WIDTH, 3.9), sharey=True, width_ratios=(1.5, 1))
    rows = np.arange(len(SCORES), dtype=float)
    here.axvspan(-100 * MARGIN, 100 * MARGIN, color="#DDDDDD", linewidth=0)
    for shift, arm in ((-0.15, MHA), (0.15, FFN)):
        changes = [points(found.silencing[arm, of]) for of in SCORES]
        figures.dots(here, rows + shift, changes, LOOKS[arm], arm, along="x")
        told = [paper_changes()[arm][of] for of in SCORES]
        paper.plot(told, rows + shift, linestyle="none", marker=LOOKS[arm].marker, color=figures.FACT)
    for axes in (here, paper):
        axes.axvline(0, color="#333333", linewidth=1)
        axes.set_xlabel("change in points")
    here.set_yticks(rows, [TITLES[of] for of in SCORES])
    here.invert_yaxis()
    here.set_title("here", fontsize=12)
    paper.set_title(f"paper ({PAPER})", fontsize=12, color=figures.FACT)
    fig.legend(loc="outside lower left", ncols=2, fontsize=10)
    costs = [f"{arm} {100 * found.silencing[arm, AVG].difference:+.1f}" for arm in (MHA, FFN)]
    figures.headline(fig, f"Change of Avg: {', '.join(costs)} points")
    return fig


def control_figure(found: Decoupling) -> Figure:
    """Avg of every silencing, of its controls and of the floor, beside the baseline."""
    from matplotlib import pyplot as plt

    names = [MHA, FFN, BOTH, TEXT_MHA, TEXT_FFN, OTHER]
    called = {TEXT_MHA: "-MHA of the text", TEXT_FFN: "-FFN of the text"}
    value, low, high = (100 * part for part in stacked_scores(found.untrained, [SHIPPED, *names], AVG, found.seed))
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 0.42 * len(names) + 1.3))
    axes.axvspan(low[0], high[0], color="#DDDDDD", linewidth=0)
    axes.axvline(value[0], color="#333333", linewidth=1.5)
    axes.annotate(SHIPPED, (value[0], -0.75), (4, 0), textcoords="offset points", fontsize=10, va="center")
    for at, name in enumerate(names):
        visual = name in (MHA, FFN, BOTH)
        look = LOOKS["trained"] if visual else Look(figures.ARMS[OTHER].colour, "X" if name == OTHER else "v")
        dot = Interval(*(np.array(part[at + 1]) for part in (value, low, high)))
        figures.dots(axes, np.array([float(at)]), [dot], look, along="x")
    axes.set_yticks(range(len(names)), [called.get(name, name) for name in names])
    axes.set_ylim(len(names) - 0.5, -1.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("Avg in points, with 95 % interval")
    left = value[1 + names.index(BOTH)]
    figures.headline(fig, f"Avg is {value[0]:.0f}; {left:.0f} with no work on visual tokens at all")
    return fig


def entry_figure(found: Decoupling) -> Figure:
    """Untrained late entry by family: score against entry layer, with the floor of another picture."""
    from matplotlib import pyplot as plt

    fig, panels = plt.subplots(2, 2, figsize=(figures.WIDTH, 5.4), sharex=True, sharey=True)
    reached = None
    for axes, family in zip(panels.flat, FAMILIES, strict=True):
        curve = entry_scores(found.untrained, found.n_layers, family, found.seed)
        floor = scored(found.untrained, OTHER, family, seed=found.seed)
        axes.axhspan(100 * float(floor.low), 100 * float(floor.high), color=figures.CHANCE, alpha=0.15, linewidth=0)
        axes.axhline(100 * float(floor.value), color=figures.CHANCE, linestyle=":", linewidth=1.5)
        _curve(axes, np.arange(found.n_layers), curve, LOOKS["untrained"])
        if family == "grounding":
            met = [at for at in range(found.n_layers) if (curve.low[at:] <= float(floor.high)).all()]
            reached = met[0] if met else None
        axes.set_title(TITLES[family], fontsize=12)
        axes.set_ylim(0, 102)
        axes.set_xticks(np.arange(found.n_layers)[:: max(1, found.n_layers // 8)])
    for axes in panels[1]:
        axes.set_xlabel("layer of entry, untrained")
    for axes in panels[:, 0]:
        axes.set_ylabel("score in points")
    panels[0, 0].annotate(OTHER, (0.02, 0.02), xycoords="axes fraction", fontsize=10, color=figures.CHANCE)
    said = "does not reach the floor" if reached is None else f"is at the floor from layer {reached} on"
    figures.headline(fig, f"Untrained late entry: CV-centric {said}")
    return fig


def depth_figure(found: Decoupling) -> Figure:
    """Avg against the depth of entry: untrained, its control, trained, the floor; below, apart, the paper's row."""
    from matplotlib import pyplot as plt

    n = found.n_layers
    fig, (here, paper) = plt.subplots(2, 1, figsize=(figures.WIDTH, 6.2), sharex=True, height_ratios=(2, 1))
    floor = float(scored(found.untrained, OTHER, AVG, seed=found.seed).value)
    here.axhline(100 * floor, color=figures.CHANCE, linestyle=":", linewidth=1.5, label=OTHER)
    bare = entry_scores(found.untrained, n, AVG, found.seed)
    _curve(here, np.arange(n) / n, bare, LOOKS["untrained"], "enters late, untrained")
    held = frozen_layers(found.untrained)
    kept = stacked_scores(found.untrained, [SHIPPED, *(frozen_until(layer) for layer in held), BOTH], AVG, found.seed)
    _curve(here, np.array([0, *held, n]) / n, kept, LOOKS["frozen"], "frozen until then, but read")
    title = "Late entry without training; none is trained for this model"
    if found.runs is not None and found.layers:
        layers = [0, *found.layers]
        taught = stacked_scores(found.runs, [trained(layer) for layer in layers], AVG, found.seed)
        _curve(here, np.array(layers) / n, taught, LOOKS["trained"], "enters late, trained for it")
        middle = nearest_layer(found.layers, n, 0.5)
        both = 100 * bare.value[middle], 100 * taught.value[layers.index(middle)]
        title = f"Entry at layer {middle} of {n}: Avg {both[0]:.0f} untrained, {both[1]:.0f} trained for it"
    here.set_ylabel("Avg in points")
    here.set_ylim(bottom=0)
    here.legend(fontsize=10, loc="upper right")
    told = paper_entries()
    late = [layer for layer in told if layer]
    paper.plot([layer / PAPER_LAYERS for layer in late], [told[layer] for layer in late], "D-", color=figures.FACT)
    paper.axhline(told[0], color=figures.FACT, linestyle="--", linewidth=1.2)
    place = {"xytext": (0, 4), "textcoords": "offset points", "fontsize": 10, "ha": "right"}
    paper.annotate("its baseline, not trained further", (0.98, told[0]), color=figures.FACT, **place)
    paper.set_title(f"paper: {PAPER}, trained, no twin at 0", fontsize=12, color=figures.FACT)
    paper.set_xlabel("layer of entry, as a share of all layers")
    paper.set_ylabel("Avg in points")
    paper.set_xlim(-0.02, 1.02)
    paper.set_ylim(min(told.values()) - 1, max(told.values()) + 1)
    figures.headline(fig, title)
    return fig


def twin_figure(found: Decoupling) -> Figure:
    """Trained late entry less its twin: pooled with interval, and each seed; below, apart, the paper less its baseline.

    The paper's difference mixes entry with training.
    """
    from matplotlib import pyplot as plt

    fig, (here, paper) = plt.subplots(2, 1, figsize=(figures.WIDTH, 5.6), sharex=True, height_ratios=(2, 1))
    layers, n = found.layers, found.n_layers
    here.axhspan(-100 * MARGIN, 100 * MARGIN, color="#DDDDDD", linewidth=0)
    title = "No run is trained for late entry beside this model"
    if layers:
        places = np.array(layers) / n
        changes = [points(found.twins[trained(layer), AVG]) for layer in layers]
        figures.dots(here, places, changes, LOOKS["trained"], "all seeds")
        for number, seed in enumerate(sorted({seed for _, seed in found.seeds})):
            values = [100 * found.seeds[layer, seed].difference for layer in layers]
            marker = figures.MARKERS[(2 * number + 4) % len(figures.MARKERS)]
            here.plot(places + 0.015, values, marker, color="#888888", markersize=5, label=f"seed {seed}")
        here.legend(fontsize=10, loc="lower left", ncols=3)
        least, most = (f"{edge(float(change.value) for change in changes):+.0f}" for edge in (max, min))
        title = f"Avg after trained late entry, less the twin's: {least} to {most} points"
    told = {layer: value - paper_entries()[0] for layer, value in paper_entries().items() if layer}
    paper.plot([layer / PAPER_LAYERS for layer in told], list(told.values()), "D", color=figures.FACT)
    paper.set_title(f"paper: {PAPER}, trained less not trained", fontsize=12, color=figures.FACT)
    paper.set_xlabel("layer of entry, as a share of all layers")
    paper.set_xlim(-0.02, 1.02)
    paper.set_ylim(min(told.values()) - 1, max(told.values()) + 1)
    for axes in (here, paper):
        axes.axhline(0, color="#333333", linewidth=1)
        axes.set_ylabel("change in points")
    figures.headline(fig, title)
    return fig


def grounded_figure(found: Decoupling) -> Figure:
    """Grounded share of object tokens by layer, one line per entry layer, marked where its tokens enter."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.4))
    shipped = found.by_layer[None]
    layers = np.arange(found.n_layers + 1)
    for number, (entry, one) in enumerate(found.by_layer.items()):
        colour = "#222222" if entry is None else figures.ORDER[(number - 1) % len(figures.ORDER)]
        value, low, high = (100 * part for part in one.share)
        if entry is None or entry == max(e or 0 for e in found.by_layer):  # bands of all would hide the lines
            axes.fill_between(layers, low, high, color=colour, alpha=0.1, linewidth=0)
        name = "as shipped" if entry is None else f"enters at {entry}"
        axes.plot(layers, value, "--" if entry is None else "-", color=colour, label=name)
        marker = figures.MARKERS[number % len(figures.MARKERS)]
        axes.plot([one.entry], [value[one.entry]], marker, color=colour, markersize=9)
    axes.plot(layers, 100 * shipped.hits.token_chance(), color=figures.CHANCE, linewidth=1.2, label="chance")
    axes.set_xlabel("layer (0 = what enters the language model; marked: the entry)")
    axes.set_ylabel("object tokens that name\ntheir object, in points")
    axes.set_ylim(bottom=0)
    axes.set_xticks(layers[:: max(1, len(layers) // 12)])
    figures.label_ends(axes, least=0.075)
    ends = [
        [100 * one.share.value[at] for one in found.by_layer.values()] for at in (0, found.n_layers)
    ]  # what enters waits unchanged: its share at layer 0 is that at entry
    said = [f"{min(one):.1f} to {max(one):.1f}" if len(one) > 1 else f"{one[0]:.1f}" for one in ends]
    title = f"Grounded: {said[0]} points at entry, {said[1]} at the end"
    figures.headline(fig, title)
    return fig


def _curve(axes: Axes, places: Shaped[np.ndarray, " n"], found: Interval, look: Look, label: str = "") -> None:
    value, low, high = (100 * np.asarray(part) for part in found)
    axes.fill_between(places, low, high, color=look.colour, alpha=0.12, linewidth=0)
    axes.plot(places, value, color=look.colour, marker=look.marker, linestyle=look.line, label=label or None)
