"""What differs between model families: one small file each, found by the class name in a checkpoint's config.json."""

from __future__ import annotations

from types import ModuleType

from embedlens.families import idefics3, internvl, llava, llava_next, llava_onevision, qwen2_5_vl, qwen3_vl

FAMILIES: tuple[ModuleType, ...] = (llava, llava_next, llava_onevision, qwen2_5_vl, qwen3_vl, internvl, idefics3)

#: Versions of transformers with which the tests of every family ran.
TESTED_WITH = ("5.20.0", "5.23.0")


def supported_classes() -> list[str]:
    """Class names that `embedlens.load` accepts, as written in `architectures` of config.json.

    >>> supported_classes()[0]
    'LlavaForConditionalGeneration'
    """
    return [name for family in FAMILIES for name in family.CLASSES]


def family_of(class_name: str) -> ModuleType | None:
    """The family whose checkpoints name this class, or None."""
    return next((family for family in FAMILIES if class_name in family.CLASSES), None)
