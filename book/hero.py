"""Draw the picture of the front page: one scene, its tokens asked three ways. `python book/hero.py` writes it anew.

Once for wide pages and once for phones, where the same words take more of the width.

The scene is the one of chapter 2, the first held-out one with three kinds of objects that fill a fifth of it: picked by
what is there, not by how it comes out.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image

import embedlens as el
from embedlens import figures, redundancy
from embedlens.measures.labels import largest_object, named_patches

FOLDER = Path(__file__).parent / "_static"
FILES = {"hero.png": (figures.WIDTH, 3.1, 13, "named\nblack one: "), "hero_phone.png": (4.3, 2.45, 10.5, "named\n")}
RIGHT = figures.ORDER[2]


def scene():
    """The first held-out drawing with three kinds of objects whose boxes fill a fifth of it."""

    def filled(sample) -> float:
        boxes = [entry["bbox"] for entry in sample.annotations]
        return sum(w * h for _, _, w, h in boxes) / (sample.width * sample.height)

    return next(one for one in el.samples.load("miniworld", n=200) if len(one.labels) >= 3 and filled(one) > 0.2)


def main(folder: Path = FOLDER) -> None:
    model, sample = el.load("miniature"), scene()
    prompt = model.prompt(sample.image, "What is in the picture?")
    late = model.hidden_states(prompt)[-1][prompt.visual]
    words = {  # the first word for each token, by three readers
        "Nearest word": el.EmbedLens.from_model(model).topk(prompt.embeds[prompt.visual], k=1)[1],
        "Output head": el.LogitLens.from_model(model).topk(late, k=1)[1],
        "Read alone": redundancy.words_alone(model, prompt)[0][:, :1],
    }
    right = {name: named_patches(model, sample, prompt.grid, ids.cpu()) for name, ids in words.items()}
    followed = largest_object(model, sample, prompt.grid)[1]  # the token in the middle of the largest object

    figures.set_style()

    def outline(axes, index: int, **look) -> tuple[float, float, float]:
        left, top, past, below = prompt.grid.box(index)
        axes.add_patch(Rectangle((left, top), past - left, below - top, **look))
        return past, top, past - left

    for file, (width, height, size, label) in FILES.items():
        fig, panels = plt.subplots(1, 3, figsize=(width, height))
        for axes, (name, (named, objects)) in zip(panels, right.items(), strict=True):
            axes.imshow(sample.image)
            for index in range(len(prompt.grid)):
                outline(
                    axes, index, facecolor="none" if objects[index] else "#FFFFFFA0", edgecolor="white", linewidth=0.6
                )
            for index in torch.nonzero(named).flatten().tolist():
                past, top, side = outline(axes, index, fill=False, edgecolor=RIGHT, linewidth=2.5)
                badge = {"boxstyle": "circle,pad=0.1", "facecolor": RIGHT, "linewidth": 0}
                axes.text(
                    past - side / 4,
                    top + side / 4,
                    "✓",
                    color="white",
                    fontsize=7,
                    ha="center",
                    va="center",
                    bbox=badge,
                )
            outline(axes, followed, fill=False, edgecolor="black", linewidth=2, zorder=9)
            word = model.tokens[int(words[name][followed, 0])].strip("· ")
            axes.set_title(name, fontsize=size + 1, loc="center", pad=6)
            axes.set_xlabel(f"{int(named.sum())} of {int(objects.sum())} {label}“{word}”", fontsize=size)
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
        fig.savefig(folder / file, dpi=240)
        Image.open(folder / file).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
            folder / file, optimize=True
        )


if __name__ == "__main__":
    main()
