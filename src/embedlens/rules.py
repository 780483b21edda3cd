"""A verdict's rule: an expression over named estimates, judged with three values and printed as it stands.

    conclude("rise > 0 and settled > 0.1", {"rise": rise, "settled": settled}, partly="rise > 0")

Each of the five words has one meaning:

    holds               the rule is true with the whole of every interval
    partly              it is not, and one of the rules `partly`, each a part of the paper's own sentence, is
    does not hold       it is false with the whole interval
    undecided           intervals straddle their bars
    not testable here   what the claim is about does not exist here, or the model cannot do the task
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from embedlens.errors import EmbedLensError

HOLDS, PARTLY, FAILS = "holds", "partly", "does not hold"
UNDECIDED, UNTESTABLE = "undecided", "not testable here"
VERDICTS = (HOLDS, PARTLY, FAILS, UNDECIDED, UNTESTABLE)
SHAPES = dict(zip(VERDICTS, "●◐○◇–", strict=True))  # for pages, so that nobody needs to tell colours apart


def conclude(rule: str, parts: Mapping[str, Any], partly: str | Sequence[str] = (), needs: bool = True) -> str:
    """The verdict on a rule.

    Args:
        rule: see `decide`.
        partly: rules, each a part of the paper's sentence.
        needs: whether what the claim is about exists here. Nor is anything testable here that an undecided rule asks of
            questions which the model cannot answer (`Estimate.testable`).

    >>> from embedlens.stats import Estimate
    >>> spread = {"a": Estimate(0.1, 0.0, 0.3, 9)}
    >>> conclude("a > 0.2", spread), conclude("a > 0.2", spread, partly="a > -0.1"), conclude("a > 0.2", {"a": None})
    ('undecided', 'partly', 'undecided')
    """
    if not needs:
        return UNTESTABLE
    whole = decide(rule, parts)
    if whole:
        return HOLDS
    if any(decide(part, parts) for part in ([partly] if isinstance(partly, str) else partly)):
        return PARTLY
    if whole is None and any(not getattr(part, "testable", True) for part in _each(parts.values())):
        return UNTESTABLE
    return UNDECIDED if whole is None else FAILS


def _each(parts: Iterable[Any]) -> Iterator[Any]:
    for part in parts:
        yield from part if isinstance(part, (list, tuple)) else [part]


def decide(rule: str, parts: Mapping[str, Any]) -> bool | None:
    """A rule over named estimates: True, False, or None where an interval straddles a bar or a part is not known.

    `and`, `or` and `not` are Kleene's: what is not known decides only where it matters. `all(xs > 0)` and `any(xs > 0)`
    speak of several estimates.

    Args:
        rule: a Python expression, such as "rise > 0 and settled > 0.1".
        parts: name → `Estimate`, number, truth value, list of estimates, or None for what is not known.

    Raises:
        EmbedLensError: a name that is not among the parts, or nothing that could be true or false.

    >>> from embedlens.stats import Estimate
    >>> clear, open_ = Estimate(0.4, 0.3, 0.5, 9), Estimate(0.1, -0.1, 0.3, 9)
    >>> decide("a > 0.2", {"a": clear}), decide("a > 0.2 and b > 0", {"a": clear, "b": open_})
    (True, None)
    >>> decide("a < 0.2 and b > 0", {"a": clear, "b": open_}), decide("all(s > 0)", {"s": [clear, open_]})
    (False, None)
    """
    known: dict[str, Any] = {name: _Unknown() if part is None else part for name, part in parts.items()}
    known |= {name: _Several(part) for name, part in parts.items() if isinstance(part, (list, tuple))}
    calls = {"__builtins__": {}, "abs": abs, "all": _every, "any": _some, "_not": _opposite}
    try:
        tree = ast.fix_missing_locations(_ThreeValued().visit(ast.parse(rule, mode="eval")))
        return _truth(eval(compile(tree, "<rule>", "eval"), calls, known))
    except (SyntaxError, NameError, TypeError, AttributeError) as error:
        raise EmbedLensError(f"the rule {rule!r} cannot be judged ({error}): it may name {', '.join(parts)}") from None


class _ThreeValued(ast.NodeTransformer):
    """Python's `and`, `or`, `not` and a < b < c want two values; these calls take three."""

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        return _call("all" if isinstance(node.op, ast.And) else "any", ast.List(node.values, ast.Load()))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return _call("_not", node.operand) if isinstance(node.op, ast.Not) else node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        sides = [node.left, *node.comparators]
        pairs = zip(sides, node.ops, sides[1:], strict=False)
        found: list[ast.expr] = [ast.Compare(left, [operation], [right]) for left, operation, right in pairs]
        return found[0] if len(found) == 1 else _call("all", ast.List(found, ast.Load()))


def _call(name: str, argument: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), [argument], [])


def _every(values: Iterable[Any]) -> bool | None:
    found = [_truth(value) for value in values]
    return False if False in found else None if None in found else True


def _some(values: Iterable[Any]) -> bool | None:
    found = [_truth(value) for value in values]
    return True if True in found else None if None in found else False


def _opposite(value: Any) -> bool | None:
    truth = _truth(value)
    return None if truth is None else not truth


def _truth(value: Any) -> bool | None:
    if value is None or isinstance(value, _Unknown):
        return None
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{value!r} is neither true nor false: compare it with a bar")
    return bool(value)


class _Unknown:
    """What was not measured: no comparison with it is decided."""

    def _undecided(self, bar: object) -> None:
        return None

    __gt__ = __lt__ = __ge__ = __le__ = _undecided

    def __abs__(self) -> _Unknown:
        return self

    def __getattr__(self, name: str) -> _Unknown:
        return self


class _Several:
    """Several estimates, compared one by one."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = [_Unknown() if part is None else part for part in parts]

    def _compared(self, how: Callable[[Any], Any]) -> list[bool | None]:
        return [how(part) for part in self.parts]

    def __gt__(self, bar: float) -> list[bool | None]:
        return self._compared(lambda part: part > bar)

    def __lt__(self, bar: float) -> list[bool | None]:
        return self._compared(lambda part: part < bar)

    def __ge__(self, bar: float) -> list[bool | None]:
        return self._compared(lambda part: part >= bar)

    def __le__(self, bar: float) -> list[bool | None]:
        return self._compared(lambda part: part <= bar)
