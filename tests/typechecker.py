"""What checks the package's signatures while tests run: beartype, for which an int may stand where a float is asked."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_beartyped = beartype(conf=BeartypeConf(is_pep484_tower=True))
_within: dict[tuple[str, str, str], Callable[..., Any]] = {}


def checked(signature: Callable[..., Any]) -> Callable[..., Any]:
    """Of functions within functions, which Python defines at every call, the check is made once.

    jaxtyping hands over functions that have the signature to check and no body. Made anew for every object that the
    miniature world places, checks were nine tenths of the time that it took to draw a scene.
    """
    if "<locals>" not in signature.__qualname__ or signature.__name__.startswith("__"):
        return _beartyped(signature)
    key = (signature.__module__, signature.__qualname__, repr(signature.__annotations__))
    if key not in _within:
        _within[key] = _beartyped(signature)
    return _within[key]
