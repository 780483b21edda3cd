"""What a model is called in records, figures and sentences: a quantised one is not the model that was published.

>>> signed("llava-hf/llava-1.5-7b-hf", "4bit")
'llava-hf/llava-1.5-7b-hf@4bit'
"""

from __future__ import annotations

MINIATURE = "miniature"
AT = "@"


def signed(name: str, *ways: str | None) -> str:
    """A model's name with what sets it apart from the model as published; what is None or empty does not.

    Args:
        name: as passed to `embedlens.load`.
        ways: the quantisation, a preprocessing that is not the family's.

    >>> signed("/data/mine/", "4bit", None)
    '/data/mine@4bit'
    """
    return AT.join([name.rstrip("/"), *filter(None, ways)])


def unsigned(name: str) -> str:
    """The name that was passed to `embedlens.load`.

    >>> unsigned("miniature@8bit")
    'miniature'
    """
    return name.partition(AT)[0]


def kind_of_result(model: str) -> str:
    """Which of the book's kinds of result a run on this model gives: "miniature" or "full scale".

    >>> kind_of_result("llava-hf/llava-1.5-7b-hf")
    'full scale'
    """
    return "miniature" if unsigned(model) == MINIATURE else "full scale"
