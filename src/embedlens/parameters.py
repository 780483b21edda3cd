"""A notebook's parameters are checked in its first cells: a misspelt name or an impossible value stops it at once.

Papermill only logs a name that the notebook does not declare, and runs on with the defaults.

>>> check({"n_images": 0})
Traceback (most recent call last):
    ...
embedlens.errors.EmbedLensError: n_images is 0: pass a whole number of at least 2, so that there is something to ...
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from embedlens import loading, memory, tasks
from embedlens.errors import EmbedLensError
from embedlens.model_names import MINIATURE, unsigned
from embedlens.pictures import open_picture
from embedlens.samples import coco

INJECTED = "# Parameters"  # the first line of the cell that papermill puts behind the parameters
TYPES = {"str": str, "int": int, "float": float, "bool": bool}
KINDS = max(sum(len(metric.kinds) for metric in family) for family in tasks.FAMILIES.values())  # of questions


def check(namespace: Mapping[str, Any], history: Sequence[str] = ()) -> None:
    """Refuse what a run cannot mean, before anything is loaded.

    Args:
        namespace: the notebook's variables: `globals()`.
        history: the cells run so far, IPython's `In`: the names and types that are declared, and those that are given.

    Raises:
        EmbedLensError: a name that is not declared, a value of another type, or one out of bounds; all in one message.
    """
    at = next((at for at, cell in enumerate(history) if at and cell.startswith(INJECTED)), 0)
    declared, given = (assigned(history[at - 1]), assigned(history[at])) if at else ({}, {})
    faults = {name: f"there is no parameter {name!r}: this notebook has {', '.join(declared)}" for name in given}
    faults = {name: fault for name, fault in faults.items() if name not in declared}
    for name, annotation in declared.items():
        if annotation in TYPES and not _is_a(namespace.get(name), TYPES[annotation]):
            text = f" (papermill keeps a text as it is written with -r {name} …)" if annotation == "str" else ""
            article = "an" if annotation == "int" else "a"
            faults[name] = f"{name} is {namespace.get(name)!r}: pass {article} {annotation}{text}"
    for name in dict.fromkeys([*RULES, *declared]):
        rule = rule_of(name)
        fault = rule(namespace[name]) if rule and name in namespace and name not in faults else ""
        if fault:
            faults[name] = f"{name} is {namespace[name]!r}: {fault}" if fault.startswith("pass ") else fault
    if not faults and namespace.get("quantize"):
        device = namespace.get("device") or "cuda"
        faults["quantize"] = _said(lambda how: loading.check_quantization(how, device), namespace["quantize"])
    if any(faults.values()):
        raise EmbedLensError("; ".join(filter(None, faults.values())))
    if {"model", "device"} <= {*namespace} and unsigned(str(namespace["model"])) != MINIATURE:
        device, dtype, quantize = (namespace.get(name) or None for name in ("device", "dtype", "quantize"))
        with suppress(EmbedLensError):  # `load` says what is wrong with a model
            print(memory.foretold(str(namespace["model"]), device, dtype, quantize))
            print("Larger batches are halved where they do not fit; bars say how long each study will take.")


def assigned(source: str) -> dict[str, str]:
    """Name → annotation, or nothing, of what a cell assigns.

    >>> assigned("n_images: int = 4  # pictures")
    {'n_images': 'int'}
    """
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return {}
    found: dict[str, str] = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign):
            found |= {target.id: "" for target in node.targets if isinstance(target, ast.Name)}
    return found


def _is_a(value: Any, kind: type) -> bool:
    return type(value) is kind or kind is float and type(value) is int


def _whole(least: int, why: str = "") -> Callable[[Any], str]:
    said = f"pass a whole number of at least {least}{why}" if least else "pass a whole number, 0 or more"
    return lambda value: "" if _is_a(value, int) and value >= least else said


def _said(call: Callable[[Any], object], value: Any, instead: str = "") -> str:
    """The sentence with which a call refuses a text, `instead` for what is no text; empty: neither."""
    if instead and not isinstance(value, str):
        return instead
    try:
        call(value)
    except EmbedLensError as error:
        return str(error)
    return ""


def _dataset(value: str) -> None:
    if value.startswith("coco:") or (value and Path(value).expanduser().is_dir()):
        coco._layout(value.removeprefix("coco:"))
    elif value not in ("miniworld", "patchbench"):
        raise EmbedLensError(f"unknown data set {value!r}: {DATASET}")


def _folder(value: Any) -> str:
    if not isinstance(value, (str, Path)):
        return "pass a folder"
    return f"{value} is a file: pass a folder" if value and Path(value).is_file() else ""


DATASET = "pass 'miniworld' or a COCO folder such as 'coco:/data/coco/val2017'"
DTYPE = f"pass 'auto' or one of {', '.join(map(repr, loading.DTYPES))}"
QUANTIZE = "pass '4bit' or '8bit', or leave it empty"
OF_EACH_KIND = _whole(KINDS, ", one for each kind of question in a family")
RULES: Mapping[str, Callable[[Any], str]] = {
    "model": lambda value: _said(loading._locate, value, "pass a name or a folder"),
    "dataset": lambda value: _said(_dataset, value, DATASET),
    "n_images": _whole(2, ", so that there is something to average"),
    "n_questions": OF_EACH_KIND,
    "n_trained": OF_EACH_KIND,
    "n_fewer": OF_EACH_KIND,
    "scale": lambda value: "" if _is_a(value, float) and 0 < value < math.inf else "pass a number above 0",
    "seed": _whole(0),
    "device": lambda value: _said(loading._device, value),
    "quantize": lambda value: _said(lambda how: loading.check_quantization(how or None, "cuda"), value, QUANTIZE),
    "dtype": lambda value: "" if value in (loading.AUTO, *loading.DTYPES) else DTYPE,
    "picture": lambda value: _said(lambda file: file and open_picture(file), value, "pass a picture file, or nothing"),
    "question": lambda value: "" if isinstance(value, str) and value.strip() else "pass a question",
    "out": _folder,
    "results": _folder,
}


def rule_of(name: str) -> Callable[[Any], str] | None:
    """Value → what is wrong with it, or nothing; any `n_…` is a count.

    >>> rule_of("n_seeds")(0)
    'pass a whole number of at least 1'
    """
    return RULES.get(name, _whole(1) if name.startswith("n_") else None)
