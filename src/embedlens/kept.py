"""What was computed once, on disk: a digest of everything that it depends on, and files that are whole or not there.

Equal digests mean equal results.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import textwrap
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

import torch
from joblib.hashing import NumpyHasher
from torch import Tensor, nn

from embedlens.errors import writing
from embedlens.samples import Sample
from embedlens.vlm import VisionLanguageModel

T = TypeVar("T")
ROWS = "EMBEDLENS_ROWS"  # in the environment: the folder in which studies keep what they measure
LIBRARIES = ("jaxtyping", "beartype")  # whose decorators do not change what a study gives
AT_ONCE = 2**22  # values of a weight that are read at a time


def digest(value: Any) -> str:
    """Of numbers, texts, arrays, models, functions (source, what they enclose and name) and what is made of them, by
    value: the same in every process. TypeError: something in it is not known by its value, such as a generator.

    >>> digest({"a": 1, "b": (2.0, "x")}) == digest({"b": (2.0, "x"), "a": 1}) != digest({"a": 1})
    True
    """
    try:
        return _Digest().hash(value)[:20]
    except Exception as error:  # whatever a pickler meets in objects that are not made to be pickled
        raise TypeError(f"it is not known by its value ({error})") from error


class _Digest(NumpyHasher):
    """joblib's, with models and functions by what they do, and the same object twice like two equal ones."""

    def __init__(self) -> None:
        super().__init__("sha256")
        self.fast = True  # remembers no objects, only values
        self.met: dict[Any, int] = {}  # functions; lambdas, and what factories make, share a name

    def save(self, value: Any) -> None:
        if isinstance(value, VisionLanguageModel):
            value = of_model(value)
        elif isinstance(value, nn.Module):
            value = _qualname(type(value)), _weights(value)
        elif isinstance(value, Tensor):
            value = str(value.dtype), tuple(value.shape), _checksum(value)
        elif inspect.ismethod(value):
            value = value.__func__, value.__self__
        elif inspect.isfunction(value):
            value = self._of_function(value)
        super().save(value)

    def _of_function(self, function: Any) -> Any:
        name, inner = _qualname(function), getattr(function, "__wrapped__", None)
        if inner and (name.startswith("embedlens.") or function.__globals__["__name__"].split(".")[0] in LIBRARIES):
            return self._of_function(inner)  # what such a decorator does depends on nothing of the user's
        if function in self.met:  # it calls itself, or is there twice
            return name, self.met[function]
        self.met[function] = len(self.met)
        outer = inspect.getclosurevars(function)
        beside = {} if name.startswith("embedlens.") else outer.globals  # of this package all sources count
        own = {
            key: value
            for key, value in beside.items()
            if isinstance(value, (bool, int, float, str, tuple))
            or (inspect.isfunction(value) and value.__module__ == function.__module__)
        }
        return name, source_of(function), outer.nonlocals, function.__defaults__, function.__kwdefaults__, own


def source_of(thing: Any) -> str:
    """Source of a function or class without comments and spacing; its byte code where there is no source to read."""
    return _source(getattr(thing, "__code__", thing))  # of its code: a decorator's own, not that of what it wraps


@cache
def _source(thing: Any) -> str:
    code = thing if inspect.iscode(thing) else None
    try:
        source = textwrap.dedent(inspect.getsource(thing))
    except (OSError, TypeError):
        return _byte_code(code)
    if code and code.co_name == "<lambda>":  # its source is the line that it stands in, with others perhaps
        source += _byte_code(code)
    try:
        return ast.unparse(ast.parse(source))
    except SyntaxError:  # a lambda in the middle of an expression
        return source


def _byte_code(code: Any) -> str:
    """What a code object does, without where it stands."""
    if code is None:
        return ""
    sets = [sorted(map(repr, value)) if isinstance(value, frozenset) else value for value in code.co_consts]
    return repr((code.co_code, code.co_names, [_byte_code(one) if inspect.iscode(one) else one for one in sets]))


@cache
def sources() -> str:
    """Digest of this package's sources, and the versions of what they run on."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    total = hashlib.sha256("/".join(map(version, ("torch", "transformers"))).encode())
    for path in files:
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:20]


def of_study(study: Callable[..., Any]) -> str:
    """Digest of a study: its code, and what is bound to it. TypeError: something bound is not known by its value."""
    code = "" if isinstance(study, partial) or inspect.isroutine(study) else source_of(type(study))
    return digest((code, study))


def of_model(model: VisionLanguageModel) -> dict[str, str]:
    """What a model's answers depend on: every weight, how it reads pictures, and what is done to it meanwhile."""
    run = getattr(model.intervention, "__self__", None)
    return {
        "model": str(model.name),
        "class": type(model.hf).__name__,
        "dtype": str(model.hf.dtype),
        "preprocessing": model.preprocessing,
        "weights": _weights(model.hf),
        "interventions": digest(run.interventions) if run is not None else "",
    }


def of_sample(sample: Sample) -> str:
    """Digest of a sample: what is known about it, and how its picture is made, which is not done for it."""
    known = (sample.id, sample.width, sample.height, sample.annotations, sample.captions, sample.questions)
    try:
        return digest((known, sample.draw))
    except TypeError:
        return digest(known)


def _weights(module: nn.Module) -> str:
    named = [*module.named_parameters(), *module.named_buffers()]
    return digest([(name, str(value.dtype), tuple(value.shape), _checksum(value)) for name, value in named])


def _checksum(values: Tensor) -> int:
    """Of every bit, where the tensor lies: sums of integers come out the same in any order, on any device."""
    if values.is_meta or not values.numel():
        return 0
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    total = 0
    for part in values.detach().contiguous().reshape(-1).view(integer).split(AT_ONCE):
        places = torch.arange(1, 2 * len(part), 2, device=part.device)
        total = (total * 1_000_003 + int((part.long() * places).sum())) % 2**64
    return total


def _qualname(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


# --- files -----------------------------------------------------------------------------------------------------------


def put(path: Path, content: Any) -> None:
    """Write what JSON can hold, floats exactly; a process that is killed meanwhile leaves no file, or the whole one."""
    data = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    part = path.with_name(f"{path.name}.{os.getpid()}-{token_hex(4)}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                file.write(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def get(path: Path) -> Any:
    """What `put` wrote; None where there is nothing, or, with a warning, where it is damaged."""
    try:
        check, _, data = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if hashlib.sha256(data).hexdigest().encode() != check:
        warnings.warn(f"{path} is damaged: what it held is measured again", stacklevel=2)
        return None
    return json.loads(data.decode("utf-8", "surrogatepass"))


def remembered(
    what: Any, make: Callable[[], T], folder: Path | str | None = None, worth: Callable[[T], bool] = lambda made: True
) -> T:
    """What `make()` gives, from a file in `folder` where it was made before of the same `what`, which names the file.

    Args:
        what: all that it depends on beside this package; of what is not known by its value nothing is kept.
        make: gives numbers, texts, lists and dicts with text keys.
        folder: by default that of `EMBEDLENS_ROWS`; without it everything is made anew.
        worth: whether what was made is to be kept.
    """
    folder = folder or os.environ.get(ROWS)
    if not folder:
        return make()
    try:
        path = Path(folder).expanduser() / f"{digest((what, sources()))}.json"
    except TypeError:
        return make()
    found = get(path)
    if found is None:
        found = make()
        if worth(found):
            put(path, found)
    return found
