"""Every choice that makes the miniature, in one place. A recipe is a value: change a field, get another model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from transformers import CLIPVisionConfig, LlamaConfig

SYSTEM = "A chat between a user and an assistant. "
USER, ASSISTANT = "USER: ", " ASSISTANT:"


@dataclass(frozen=True)
class Stage:
    """How long and how fast one stage learns.

    Attributes:
        steps: optimiser steps.
        batch: pictures (or documents) per step.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon for hidden matrices; None trains everything with AdamW.
        weight_decay: decoupled, on matrices only.
        warmup: steps of linear warm-up; then cosine to a twentieth of the peak.
        seconds: how long the stage may take. Its schedule then follows the clock, and it ends at `steps` or at this
            time, whichever comes first. Such a training depends on the machine: it resumes, but is not repeatable.
        workers: processes that draw its batches; None: the recipe's.
        seen: how often the tower sees a picture: a GPU learns faster than its cores draw.
        measurements: on held-out pictures, evenly spaced; a stage of fewer than ten steps for each is measured once.
    """

    steps: int
    batch: int
    lr: float
    muon_lr: float | None = None
    weight_decay: float = 0.1
    warmup: int = 100
    seconds: float | None = None
    workers: int | None = None
    seen: int = 1
    measurements: int = 10


@dataclass(frozen=True)
class Recipe:
    name: str
    seed: int = 0
    image_size: int = 112
    patch: int = 14
    vocabulary: int = 2048
    vision_width: int = 192
    vision_layers: int = 6
    vision_heads: int = 3
    text_width: int = 256
    text_layers: int = 8
    text_heads: int = 4
    text_mlp: int = 688
    reader_layers: int = 2  # of the captioning decoder, which is thrown away after stage "tower"
    longest: int = 176  # tokens of a row in training; questions beyond are left out
    letterbox: bool = True  # False: square pictures only
    mention_background: float = 0.25  # share of captions
    freeze_language_in_alignment: bool = True
    onward: int = 0  # how many trainings came before: begins at the shipped weights, with pictures not seen yet
    tower_words: float = 0.4  # share of the tower's pictures with something written on them
    asks: Mapping[str, float] | None = None  # questions of a kind in a conversation; None: those of training.data.SHARE
    pairs: bool = False  # True: nothing but two different objects in every picture or description
    relation_first: bool = False  # True: many batches of pairs, at first side by side; every relation asked both ways
    tower_learns: bool = False  # True: stage "tuning" trains the tower too (LLaVA-NeXT does), and that by Muon
    experiment: bool = False  # True: its log ships, no weights
    shipped_tokenizer: bool = False  # True: none is learned; an onward training has it anyway
    together: bool = False  # True: tower and language learn at the same time, in two processes
    heads: Stage | None = None  # before an onward "tower": new decoder and text encoder on the frozen old tower
    contrastive: float = 1.0  # loss weights of the tower
    captioning: float = 2.0
    tower: Stage = field(default=Stage(steps=6500, batch=48, lr=1.5e-3, muon_lr=4e-3, weight_decay=0.05, warmup=100))
    language: Stage = field(default=Stage(steps=2600, batch=16, lr=2e-3, muon_lr=4e-3, warmup=50))
    alignment: Stage = field(default=Stage(steps=400, batch=64, lr=2e-3, weight_decay=0.0))
    tuning: Stage = field(default=Stage(steps=3000, batch=24, lr=6e-4, weight_decay=0.05))
    measured: int = 8  # held-out batches per measurement
    threads: int = 2
    workers: int = 1
    device: str = "cpu"

    @property
    def scale(self) -> float:
        """How much larger than the world's 112 px the pictures are drawn."""
        return self.image_size / 112

    @property
    def visual_tokens(self) -> int:
        return (self.image_size // self.patch) ** 2

    def vision_config(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(
            hidden_size=self.vision_width,
            intermediate_size=4 * self.vision_width,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=self.patch,
            projection_dim=self.vision_width,
            hidden_act="gelu_pytorch_tanh",  # CLIP's quick_gelu is not fused on CPUs
        )

    def text_config(self, vocabulary: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.text_width,
            intermediate_size=self.text_mlp,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.text_heads,
            num_key_value_heads=self.text_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )


CPU = Recipe("cpu")
QUICK = replace(
    CPU,
    name="quick",
    tower=replace(CPU.tower, steps=300),
    language=replace(CPU.language, steps=150),
    alignment=replace(CPU.alignment, steps=60),
    tuning=replace(CPU.tuning, steps=120),
)
# Another session of training for the miniature that ships. The tower sees more writing, at first single large
# characters: the first training had left it unable to tell letters apart. Peaks are lower: nothing starts at noise.
ONWARD = replace(
    CPU,
    name="onward",
    seed=1,
    onward=1,
    tower_words=0.6,
    heads=Stage(steps=250, batch=48, lr=2e-3, muon_lr=4e-3, warmup=20),
    tower=replace(CPU.tower, steps=10000, lr=1e-3, muon_lr=2.5e-3, warmup=200),
    language=replace(CPU.language, steps=2200, lr=1e-3, muon_lr=2e-3),
    alignment=replace(CPU.alignment, steps=250),
    tuning=replace(CPU.tuning, steps=4600, muon_lr=1.2e-3),
)
LONG = 1_000_000  # steps of a stage that the clock ends
# Experiments, not miniatures: does anything but relation questions stand in the way of relation answers? Both begin at
# the weights that ship and ask about nothing else, one from descriptions in words, one from pictures.
NOTHING = Stage(steps=0, batch=1, lr=0.0)
RELATION = replace(
    ONWARD,
    name="relation",
    onward=2,
    asks={"relation": 6.0},
    pairs=True,
    experiment=True,
    heads=None,
    tower=NOTHING,
    alignment=NOTHING,
)
RELATION_WORDS = replace(
    RELATION,
    name="relation_words",
    language=Stage(steps=250, batch=64, lr=1.5e-3, muon_lr=3e-3, warmup=50),
    tuning=NOTHING,
)
RELATION_PICTURES = replace(
    RELATION,
    name="relation_pictures",
    language=NOTHING,
    tuning=Stage(steps=250, batch=32, lr=6e-4, muon_lr=1.2e-3, weight_decay=0.05, warmup=50),
)
# The decoder learns on with AdamW alone, as LLaVA's did: Muon keeps massive activations, and with them sinks, from
# forming. An hour and a quarter of one core, whatever else it does: the stages' ends are set by the clock.
ONWARD2 = replace(
    ONWARD,
    name="onward2",
    seed=2,
    onward=4,  # 2 and 3 were the experiments and the late-entry adapters
    relation_first=True,
    experiment=True,
    heads=None,
    tower=NOTHING,
    language=Stage(LONG, batch=16, lr=6e-4, warmup=40, seconds=2700, measurements=5),
    alignment=Stage(LONG, batch=16, lr=1e-3, weight_decay=0.0, warmup=10, seconds=120, measurements=1),
    tuning=Stage(LONG, batch=24, lr=4e-4, weight_decay=0.05, warmup=40, seconds=4200, measurements=6),
    threads=1,
)
# The tower, which bounds what any answer can say, learns on as in recipe `onward`, for as long as the clock lets it:
# with new heads, and the learning rate of a model that is past its start.
ONWARD3 = replace(
    ONWARD,
    name="onward3",
    seed=3,
    onward=5,
    experiment=True,
    heads=Stage(steps=250, batch=48, lr=2e-3, muon_lr=4e-3, warmup=20, measurements=1),
    tower=Stage(LONG, batch=48, lr=8e-4, muon_lr=2e-3, weight_decay=0.05, warmup=100, seconds=7200, measurements=8),
    language=NOTHING,
    alignment=NOTHING,
    tuning=NOTHING,
    threads=1,
)
# The tower learns from the answers themselves, as in LLaVA-NeXT, where captions alone had taught it before.
ONWARD4 = replace(
    ONWARD,
    name="onward4",
    seed=4,
    onward=6,
    experiment=True,
    tower_learns=True,
    asks={"existence": 1.5, "object": 1.2, "where": 2.0, "count": 2.0, "box": 2.0, "text": 2.0, "relation": 1.5}
    | {"colour": 0.5, "text_colour": 0.3},
    heads=None,
    tower=NOTHING,
    language=NOTHING,
    alignment=NOTHING,
    tuning=Stage(
        LONG, batch=24, lr=4e-4, muon_lr=1.5e-3, weight_decay=0.05, warmup=100, seconds=7200, measurements=12
    ),
    threads=1,
)
# Sized for ten minutes of one H100 with 16 cores, which draw the pictures; not run yet (see the model card).
GPU = replace(
    CPU,
    name="gpu",
    image_size=168,
    vision_width=256,
    vision_layers=8,
    vision_heads=4,
    text_width=288,
    text_layers=12,
    text_heads=6,
    text_mlp=768,
    longest=272,
    relation_first=True,
    shipped_tokenizer=True,
    together=True,
    tower=Stage(LONG, batch=256, lr=1e-3, muon_lr=3e-3, weight_decay=0.05, warmup=300, seconds=310, workers=10, seen=2),
    language=Stage(LONG, batch=128, lr=2e-3, warmup=300, seconds=310, workers=4),
    alignment=Stage(LONG, batch=128, lr=2e-3, weight_decay=0.0, seconds=35, measurements=2),
    tuning=Stage(LONG, batch=128, lr=5e-4, weight_decay=0.05, seconds=165),
    threads=4,
    workers=14,
    device="cuda",
)


def tiny(recipe: Recipe) -> Recipe:
    """The same path with next to nothing to compute: a rehearsal on any machine, not a model."""
    stages = {
        name: replace(stage, batch=2, warmup=2, workers=None, measurements=1)
        for name, stage in stages_of(recipe).items()
        if stage.steps
    }
    return replace(
        recipe,
        name=f"{recipe.name}_tiny",
        image_size=56,
        vision_width=32,
        vision_layers=3,
        vision_heads=2,
        text_width=32,
        text_layers=2,
        text_heads=2,
        text_mlp=48,
        reader_layers=1,
        measured=1,
        threads=1,
        workers=0,
        **stages,
    )


def stages_of(recipe: Recipe) -> dict[str, Stage]:
    return {name: getattr(recipe, name) for name in ("tower", "language", "alignment", "tuning")}


def within(recipe: Recipe, seconds: float, stages: Collection[str]) -> Recipe:
    """The recipe with the times of these stages in the same proportions, and `seconds` in all.

    Raises:
        ValueError: if one of them is ended by its steps alone.

    >>> shorter = within(GPU, 51.0, ("tower", "language", "alignment", "tuning"))
    >>> [stage.seconds for stage in stages_of(shorter).values()]
    [31.0, 31.0, 3.5, 16.5]
    """
    times = {}
    for name, stage in stages_of(recipe).items():
        if name in stages and stage.steps:
            if stage.seconds is None:
                raise ValueError(f"stage {name} of recipe {recipe.name} is ended by its steps: choose one with times")
            times[name] = stage.seconds
    both = min(times["tower"], times["language"]) if recipe.together and {"tower", "language"} <= set(times) else 0.0
    share = max(0.01, seconds) / max(0.01, sum(times.values()) - both)
    return replace(recipe, **{name: replace(getattr(recipe, name), seconds=share * t) for name, t in times.items()})


@dataclass(frozen=True)
class LateEntry:
    """How the adapters of trained late entry are made; see training/entry.py.

    Attributes:
        start: the recipe of the weights they begin at.
        layers: blocks at which visual tokens enter; 0 is the twin the others are compared with.
        seeds: repeats, each with pictures of its own.
        rank: of the additions to every matrix of the language model's blocks.
        stage: AdamW on the projector and the additions.
    """

    start: Recipe
    layers: tuple[int, ...] = (0, 1, 2, 4, 6)
    seeds: int = 2
    rank: int = 4
    stage: Stage = field(default=Stage(steps=600, batch=24, lr=2e-3, weight_decay=0.0, warmup=20))

    def recipe(self, seed: int) -> Recipe:
        """The start's recipe with this stage for tuning, on pictures that neither it nor another seed has seen."""
        return replace(
            self.start, name=f"entry_seed{seed}", onward=self.start.onward + 1 + seed, tuning=self.stage, measured=4
        )


LATE_ENTRY = LateEntry(ONWARD)
RECIPES = {
    recipe.name: recipe
    for recipe in (CPU, QUICK, ONWARD, ONWARD2, ONWARD3, ONWARD4, RELATION_WORDS, RELATION_PICTURES, GPU)
}
