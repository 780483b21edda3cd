"""The miniature that ships: where an onward training begins, and what it adds its log to."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

HOME = Path(__file__).parent.parent / "src" / "embedlens" / "miniature"


def shipped() -> LlavaForConditionalGeneration:
    """In float32, as it is trained."""
    return LlavaForConditionalGeneration.from_pretrained(HOME, dtype=torch.float32)
