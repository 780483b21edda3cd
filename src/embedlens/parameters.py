"""A notebook's parameters are checked in its first cells: a misspelt name or an impossible value stops it at once.

Papermill only logs a name that the notebook does not declare, and runs on with the defaults.

>>> check({"n_images": 0})
Traceback (most recent call last):
    ...
embedlens.errors.EmbedLensError: n_images is 0: pass a whole number of at least 2, so that there is something to ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedlens.book import assigned
from embedlens.errors import EmbedLensError

INJECTED = "# Parameters"  # the first line of the cell that papermill puts behind the parameters
LEAST_PICTURES = 2
TYPES = {"str": str, "int": int, "float": float, "bool": bool}


def check(namespace: Mapping[str, Any], history: Sequence[str] = ()) -> None:
    """Refuse what a run cannot mean, before anything is loaded.

    Args:
        namespace: the notebook's variables: `globals()`.
        history: the cells run so far, as IPython keeps them: `In`. From it the names and types that the notebook
            declares are read, and those that papermill was given.

    Raises:
        EmbedLensError: a name that is not declared, a value of another type, or one that is out of bounds; all of them
            in one message.
    """
    declared, given = _declared(history)
    faults = [
        f"there is no parameter {name!r}: this notebook has {', '.join(declared)}"
        for name in given
        if declared and name not in declared
    ]
    for name, annotation in declared.items():
        value, kind = namespace.get(name), TYPES.get(annotation)
        if kind is not None and not _is_a(value, kind):
            text = f" (papermill keeps a text as it is written with -r {name} …)" if kind is str else ""
            faults.append(f"{name} is {value!r}: pass {'an' if annotation == 'int' else 'a'} {annotation}{text}")
    wrong = {fault.split(" is ")[0] for fault in faults}
    for name in dict.fromkeys([*RULES, *declared]):
        rule = rule_of(name)
        if rule is not None and name in namespace and name not in wrong:
            fault = rule(name, namespace[name])
            faults += [fault] if fault else []
    if not faults and namespace.get("quantize"):
        fault = _quantized_on(namespace.get("device"), namespace["quantize"])
        faults += [fault] if fault else []
    if faults:
        raise EmbedLensError("; ".join(faults))


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _declared(history: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Name → annotation of the parameters cell, and the names in the cell that papermill injected after it."""
    for number, source in enumerate(history):
        if number and source.startswith(INJECTED):
            return assigned(history[number - 1]), list(assigned(source))
    return {}, []


# --- what each parameter may be --------------------------------------------------------------------------------------


def _count(name: str, value: Any) -> str:
    if _is_a(value, int) and value >= LEAST_PICTURES:
        return ""
    return (
        f"{name} is {value!r}: pass a whole number of at least {LEAST_PICTURES}, so that there is something to average"
    )


def _each_kind(name: str, value: Any) -> str:
    from embedlens.tasks import FAMILIES

    least = max(sum(len(metric.kinds) for metric in family) for family in FAMILIES.values())
    if _is_a(value, int) and value >= least:
        return ""
    return f"{name} is {value!r}: pass a whole number of at least {least}, one for each kind of question in a family"


def _some(name: str, value: Any) -> str:
    return "" if _is_a(value, int) and value >= 1 else f"{name} is {value!r}: pass a whole number of at least 1"


def _seed(name: str, value: Any) -> str:
    return "" if _is_a(value, int) and value >= 0 else f"{name} is {value!r}: pass a whole number, 0 or more"


def _positive(name: str, value: Any) -> str:
    return "" if _is_a(value, float) and 0 < value < math.inf else f"{name} is {value!r}: pass a number above 0"


def _said(call: Callable[[Any], object], value: Any) -> str:
    """The sentence with which a call refuses a value; empty: it does not."""
    try:
        call(value)
    except EmbedLensError as error:
        return str(error)
    return ""


def _model(name: str, value: Any) -> str:
    from embedlens.loading import _locate

    return _said(_locate, value) if isinstance(value, str) else f"{name} is {value!r}: pass a name or a folder"


def _device(name: str, value: Any) -> str:
    from embedlens.loading import _device as placed

    return _said(placed, value)


def _quantize(name: str, value: Any) -> str:
    if not isinstance(value, str):
        return f"{name} is {value!r}: pass '4bit' or '8bit', or leave it empty"
    return _quantized_on("cuda", value) if value else ""


def _quantized_on(device: str | None, value: str) -> str:
    from embedlens.loading import _quantization

    return _said(lambda quantize: _quantization(quantize, device or "cuda"), value)


def _dataset(name: str, value: Any) -> str:
    from embedlens.samples import coco

    if not isinstance(value, str) or not value:
        return f"{name} is {value!r}: pass 'miniworld' or a COCO folder such as 'coco:/data/coco/val2017'"
    if value in ("miniworld", "patchbench"):
        return ""
    if value.startswith("coco:") or Path(value).expanduser().is_dir():
        return _said(coco._layout, value.removeprefix("coco:"))
    return f"unknown data set {value!r}: pass 'miniworld' or a COCO folder such as 'coco:/data/coco/val2017'"


def _folder(name: str, value: Any) -> str:
    if not isinstance(value, (str, Path)):
        return f"{name} is {value!r}: pass a folder"
    return f"{name} is {value!r}, which is a file: pass a folder" if value and Path(value).is_file() else ""


RULES: Mapping[str, Callable[[str, Any], str]] = {
    "model": _model,
    "dataset": _dataset,
    "n_images": _count,
    "n_questions": _each_kind,
    "n_trained": _each_kind,
    "n_fewer": _each_kind,
    "scale": _positive,
    "seed": _seed,
    "device": _device,
    "quantize": _quantize,
    "out": _folder,
    "results": _folder,
}


def rule_of(name: str) -> Callable[[str, Any], str] | None:
    """(name, value) → what is wrong with it, or nothing; any `n_…` is a count.

    >>> rule_of("n_seeds")("n_seeds", 0)
    'n_seeds is 0: pass a whole number of at least 1'
    """
    return RULES.get(name, _some if name.startswith("n_") else None)
