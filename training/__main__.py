"""Train the miniature: `python -m training` runs every stage that is not finished, for the machine it finds.

python -m training --recipe quick            # a few minutes, to see the path
python -m training --stage tower             # one stage
python -m training --install                 # ship the result as src/embedlens/miniature
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from training.recipe import RECIPES, Recipe
from training.shipped import HOME

STAGES = ("tokenizer", "tower", "language", "alignment", "tuning", "ship")


def recipe_for_this_machine() -> Recipe:
    return RECIPES["gpu" if torch.cuda.is_available() else "cpu"]


def tokenizer_of(recipe: Recipe, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, learned once; an onward training keeps the one that ships."""
    if recipe.onward:
        return AutoTokenizer.from_pretrained(HOME)
    home = folder / "tokenizer"
    if not home.exists():
        from training.tokenizer import learn

        learn(recipe.vocabulary).save_pretrained(home)
    return AutoTokenizer.from_pretrained(home)


def run(recipe: Recipe, stages: tuple[str, ...], folder: Path) -> None:
    torch.set_num_threads(recipe.threads)
    tokenizer = tokenizer_of(recipe, folder)
    if "tower" in stages:
        from training.tower import train_tower

        train_tower(recipe, tokenizer, folder)
    if "language" in stages:
        from training.talk import train_language

        train_language(recipe, tokenizer, folder)
    for stage in ("alignment", "tuning"):
        if stage in stages:
            from training.talk import train_together

            train_together(stage, recipe, tokenizer, folder)
    if "ship" in stages:
        from training.ship import ship

        ship(recipe, tokenizer, folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", choices=sorted(RECIPES), help="default: the one for this machine")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only these (repeatable)")
    parser.add_argument("--folder", type=Path, default=Path(".training"), help="checkpoints and logs")
    parser.add_argument("--threads", type=int, help="of this process")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.recipe] if arguments.recipe else recipe_for_this_machine()
    if arguments.threads:
        from dataclasses import replace

        recipe = replace(recipe, threads=arguments.threads)
    run(recipe, tuple(arguments.stage or STAGES), arguments.folder / recipe.name)


if __name__ == "__main__":
    main()
