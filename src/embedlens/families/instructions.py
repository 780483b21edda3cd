"""How a model is asked for short answers: the words that the authors of its family evaluate with.

Each family has its own words for a short answer and a box, its own unit and frame of the numbers. A model that this
repository trained is asked the questions of the drawn world as they stand.

Sources: LLaVA's docs/Evaluation.md, its `conv_vicuna_v1` and, for the frame of its boxes, its issue 606 (for LLaVA-NeXT
and -OneVision nobody says; their boxes are those of 1.5's data); `qwen2_vl/prompt.py` of VLMEvalKit and Qwen's cookbook
on spatial understanding; `internvl_chat/eval` (vqa, mmbench, refcoco) of InternVL.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

TRAINED_HERE = "A chat between a user and an assistant."  # begins every prompt of a model of this repository
VICUNA_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
REGION = "Please provide the bounding box coordinate of the region this sentence describes: {}"


@dataclass(frozen=True)
class Instructions:
    """What is written behind or instead of a question, and what the numbers of a box mean."""

    name: str  #: Of the set, for records
    short: str = ""  #: Behind a question with a short answer
    yes_no: str = ""  #: Behind one that is answered with yes or no
    letter: str = ""  #: Behind one with options
    box: str = ""  #: Instead of a request for a box, with {} for what is described
    written: str = "{}"  #: What stands around the numbers of a box when the model writes it
    unit: str = "fractions"  #: Of those numbers; or "thousandths", or "pixels" of the picture as the model reads it
    frame: str = "padded"  #: Of what: the letterboxed square, or the "original" picture
    system: str = ""  #: The system prompt that the model was trained with, where its chat template has none

    @property
    def parameters(self) -> dict[str, str]:
        """For a record: what a reader needs to ask the same."""
        system = {"system_prompt": "vicuna_v1"} if self.system == VICUNA_V1 else {}
        return {"instructions": self.name, "boxes": f"{self.unit}, {self.frame} picture"} | system


OWN = Instructions("as trained here")
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
#: Where no authors' own are known here: SmolVLM and Idefics3, whose model cards name no prompts of their evaluation.
ANY = Instructions("short answers", SHORT, SHORT, LETTER, REGION)
LLAVA = Instructions("LLaVA-1.5", SHORT, SHORT, LETTER, REGION, system=VICUNA_V1)
QWEN = Instructions(
    "Qwen-VL",
    short="\nPlease try to answer the question with short words or phrases if possible.",
    yes_no=" Please answer yes or no.",
    letter="\nPlease select the correct answer from the options above.",
    box="Locate {}, output its bbox coordinates using JSON format.",
    written='```json\n[\n\t{{"bbox_2d": {}, "label": "{}"}}\n]\n```',
    unit="pixels",
    frame="original",
)
QWEN3 = replace(QWEN, unit="thousandths")
INTERNVL = replace(LLAVA, name="InternVL", box=REGION.format("<ref>{}</ref>"), unit="thousandths", frame="original")
INTERNVL = replace(INTERNVL, written="<ref>{1}</ref><box>[{0}]</box>", system="")

_OF: WeakKeyDictionary[Any, Instructions] = WeakKeyDictionary()


def instructions_of(model: Any) -> Instructions:
    """Those of a model's family; its system prompt only where the chat format lacks one and takes it."""
    if model not in _OF:
        _OF[model] = _found(model)
    return _OF[model]


def _found(model: Any) -> Instructions:
    wanted: Instructions = model.family.INSTRUCTIONS
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    system = {"role": "system", "content": [{"type": "text", "text": wanted.system}]}
    try:
        plain, with_system = (
            model.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            for turns in ([user], [system, user])
        )
    except Exception:  # what a template raises is whatever its author wrote; `prompts.written` says so
        return replace(wanted, system="")
    if TRAINED_HERE in plain:
        return OWN
    takes = plain.startswith("USER:") and with_system == f"{wanted.system} {plain}"
    return wanted if takes else replace(wanted, system="")
