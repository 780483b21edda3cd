"""Promises of the list of models: every example of a family has a size, of a model of the family's own class."""

from __future__ import annotations

import re

import torch
from transformers import AutoModelForImageTextToText

from embedlens.families import FAMILIES
from embedlens.memory import needed
from embedlens.released import RELEASED, size_lines


def test_every_example_of_a_family_is_a_model_of_its_class_with_a_size():
    sizes = size_lines()
    assert set(sizes) == {name for family in FAMILIES for name in family.EXAMPLES} and len(RELEASED) == len(sizes)
    for one in RELEASED:
        (family,) = [family for family in FAMILIES if one.name in family.EXAMPLES]
        with torch.device("meta"):
            assert type(AutoModelForImageTextToText.from_config(one.config)).__name__ in family.CLASSES
        assert "GiB in bfloat16" in sizes[one.name]


def test_sizes_are_near_those_that_the_names_say():
    """A tower comes on top of the language model that a name usually counts; names are round."""
    for one in RELEASED:
        found = re.search(r"([\d.]+)b\b", one.name.lower())
        said = float(found.group(1)) if found else 0
        assert said * 0.9 < needed(one.config).parameters / 1e9 < said * 1.2 + 0.4, one.name
