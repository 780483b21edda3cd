"""Train the miniature: `python -m training` runs every stage that is not finished, for the machine it finds.

python -m training --recipe quick            # a few minutes, to see the path
python -m training --stage tower             # one stage
python -m training --recipe gpu --seconds 560 --out home                        # ten minutes of one H100
python -m training --recipe gpu --unpack home --stage ship                      # what came home, into the package
python -m training --recipe gpu --device cpu --tiny --seconds 60 --out home     # the same path rehearsed
"""

from __future__ import annotations

import time

BEGAN = time.time()  # a budget counts from here: imports take their share of ten minutes

import argparse  # noqa: E402
import multiprocessing  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402

from training.recipe import RECIPES, Recipe, tiny, within  # noqa: E402
from training.shipped import HOME  # noqa: E402

STAGES = ("tokenizer", "tower", "language", "alignment", "tuning", "ship")
RESERVE = 0.06  # share of a budget that is left for measuring once more and packing
GRACE = 0.04  # share of its time by which the language model may end later than the tower beside it
START = "spawn"  # of the process beside this one: a forked one could not use the GPU


def recipe_for_this_machine() -> Recipe:
    return RECIPES["gpu" if torch.cuda.is_available() else "cpu"]


def tokenizer_of(recipe: Recipe, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, learned once; an onward training keeps the one that ships."""
    if recipe.onward or recipe.shipped_tokenizer:
        return AutoTokenizer.from_pretrained(HOME)
    home = folder / "tokenizer"
    if not home.exists():
        from training.tokenizer import learn

        learn(recipe.vocabulary).save_pretrained(home)
    return AutoTokenizer.from_pretrained(home)


def learned(stage: str, recipe: Recipe, folder: Path, until: float | None = None) -> None:
    """One stage, from where it stopped to its end; no later than `until` (a time of day), if one is given."""
    torch.set_num_threads(recipe.threads)
    tokenizer = tokenizer_of(recipe, folder)
    if until is not None:
        left = max(0.01, until - time.time())
        recipe = replace(recipe, **{stage: replace(getattr(recipe, stage), seconds=left)})
    if stage == "tower":
        from training.tower import train_tower

        train_tower(recipe, tokenizer, folder)
    elif stage == "language":
        from training.talk import train_language

        train_language(recipe, tokenizer, folder)
    else:
        from training.talk import train_together

        train_together(stage, recipe, tokenizer, folder)


def together(recipe: Recipe, folder: Path) -> None:
    """Tower and language model side by side: neither needs the other, and neither fills a large GPU alone."""
    from training import __main__ as program  # by the name that another process can import it under

    until = time.time() + recipe.language.seconds if recipe.language.seconds else None
    words = ("language", recipe, folder, until)
    other = multiprocessing.get_context(START).Process(target=program.learned, args=words)
    other.start()
    try:
        learned("tower", recipe, folder)
        grace = GRACE * (recipe.language.seconds or 0)
        other.join(None if until is None else grace + max(0.0, until - time.time()))
    finally:
        if other.is_alive():  # its checkpoint is at most a minute old
            other.terminate()
            other.join()
    print(f"language ended with exit code {other.exitcode}", flush=True)


def run(
    recipe: Recipe,
    stages: Sequence[str],
    folder: Path,
    budget: float | None = None,
    out: Path | None = None,
    home: Path = HOME,
) -> None:
    """Run these stages, in order.

    Args:
        budget: seconds from the start of this program to its end; every stage gets its share of what is left.
        out: where weights and logs are packed after every stage, also if one fails.
        home: the folder that stage "ship" writes.
    """
    tokenizer = tokenizer_of(recipe, folder)
    rest = [stage for stage in STAGES[1:-1] if stage in stages]
    while rest:
        timed = recipe
        if budget is not None:
            timed = within(recipe, BEGAN + (1 - RESERVE) * budget - time.time(), rest)
        both = recipe.together and rest[:2] == ["tower", "language"]
        try:
            if both:
                together(timed, folder)
            else:
                learned(rest[0], timed, folder)
        finally:
            if out is not None:
                from training.ship import packed

                print("packed", *(file.name for file in packed(folder, out)), flush=True)
        rest = rest[2 if both and (folder / "language.pt").exists() else 1 :]
    if "ship" in stages:
        from training.ship import ship

        ship(recipe, tokenizer, folder, home)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", choices=sorted(RECIPES), help="default: the one for this machine")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only these (repeatable)")
    parser.add_argument("--folder", type=Path, default=Path(".training"), help="checkpoints and logs")
    parser.add_argument("--threads", type=int, help="of this process")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the recipe's")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: the path, with next to nothing to compute")
    parser.add_argument("--seconds", type=float, help="end after so long; every stage has its share")
    parser.add_argument("--out", type=Path, help="pack weights and logs here, in small files, in place of stage ship")
    parser.add_argument("--unpack", type=Path, metavar="OUT", help="begin with what another machine packed")
    parser.add_argument("--home", type=Path, default=HOME, help="where stage ship writes (default: the package)")
    given = parser.parse_args(arguments)
    recipe = RECIPES[given.recipe] if given.recipe else recipe_for_this_machine()
    if given.tiny:
        recipe = tiny(recipe)
    if given.threads:
        recipe = replace(recipe, threads=given.threads)
    if given.device:
        recipe = replace(recipe, device=given.device)
    if recipe.device == "cuda" and not torch.cuda.is_available() and not given.unpack:
        parser.error(f"recipe {recipe.name} is for a GPU and there is none: add --device cpu, or choose another recipe")
    stages = tuple(given.stage or (STAGES[:-1] if given.out else STAGES))
    if given.tiny and "ship" in stages and given.home == HOME:
        parser.error("a rehearsal is not shipped: name the stages with --stage, or --out, or another --home")
    folder = given.folder / recipe.name
    if given.unpack:
        from training.ship import unpacked

        unpacked(given.unpack, folder)
    run(recipe, stages, folder, given.seconds, given.out, given.home)


if __name__ == "__main__":
    main()
