"""A verdict's rule: an expression over named estimates, judged with three values and printed as it stands.

    conclude("rise > 0 and settled > 0.1", {"rise": rise, "settled": settled}, partly="rise > 0")

Each of the five words has one meaning:

    holds               the rule is true with the whole of every interval
    partly              it is not, and one of the rules `partly`, each a part of the paper's own sentence, is
    does not hold       it is false with the whole interval, and no such part is true
    undecided           intervals straddle their bars
    not testable here   what the claim is about does not exist here, or the model cannot do the task
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from embedlens.errors import EmbedLensError

HOLDS, PARTLY, FAILS = "holds", "partly", "does not hold"
UNDECIDED, UNTESTABLE = "undecided", "not testable here"
VERDICTS = (HOLDS, PARTLY, FAILS, UNDECIDED, UNTESTABLE)
SHAPES = dict(zip(VERDICTS, "●◐○◇–", strict=True))  # for pages, so that nobody needs to tell colours apart


def conclude(rule: str, parts: Mapping[str, Any], partly: str | Sequence[str] = (), needs: bool = True) -> str:
    """The verdict on a rule (see `decide`), of which `partly` are rules of parts of the paper's sentence.

    `needs` is whether what the claim is about exists here. Nor is anything testable here that an undecided rule asks of
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
    every = (one for part in parts.values() for one in (part if isinstance(part, (list, tuple)) else [part]))
    if whole is None and not all(getattr(part, "testable", True) for part in every):
        return UNTESTABLE
    return UNDECIDED if whole is None else FAILS


def decide(rule: str, parts: Mapping[str, Any]) -> bool | None:
    """A rule over named estimates: True, False, or None where an interval straddles a bar or a part is not known.

    `and`, `or` and `not` are Kleene's: what is not known decides only where it matters. `all(xs > 0)` and `any(xs > 0)`
    speak of several estimates.

    `parts`: name → `Estimate`, number, truth value, list of estimates, or None for what is not known.
    Raises:
        EmbedLensError: a name that is not among the parts, or nothing that could be true or false.

    >>> from embedlens.stats import Estimate
    >>> clear, open_ = Estimate(0.4, 0.3, 0.5, 9), Estimate(0.1, -0.1, 0.3, 9)
    >>> decide("a > 0.2", {"a": clear}), decide("a > 0.2 and b > 0", {"a": clear, "b": open_})
    (True, None)
    >>> decide("a < 0.2 and b > 0", {"a": clear, "b": open_}), decide("all(s > 0)", {"s": [clear, open_]})
    (False, None)
    """
    try:
        return _truth(_value(ast.parse(rule, mode="eval").body, parts))
    except (SyntaxError, KeyError, TypeError, AttributeError) as error:
        raise EmbedLensError(f"the rule {rule!r} cannot be judged ({error}): it may name {', '.join(parts)}") from None


OPERATIONS: Mapping[type, Callable[[Any, Any], Any]] = {
    **{ast.Gt: operator.gt, ast.Lt: operator.lt, ast.GtE: operator.ge, ast.LtE: operator.le, ast.Eq: operator.eq},
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
}


def _value(node: ast.expr, parts: Mapping[str, Any]) -> Any:
    """A part of a rule's syntax tree; None is what is not known."""
    match node:
        case ast.Constant(value):
            return value
        case ast.Name(name):
            return parts[name]
        case ast.Attribute(whole, name):
            return _known(lambda value: getattr(value, name), _value(whole, parts))
        case ast.UnaryOp(ast.Not(), operand):
            return _known(operator.not_, _truth(_value(operand, parts)))
        case ast.UnaryOp(ast.USub(), operand):
            return _known(operator.neg, _value(operand, parts))
        case ast.BinOp(left, operation, right):
            return _known(OPERATIONS[type(operation)], _value(left, parts), _value(right, parts))
        case ast.BoolOp(operation, values):
            return _joined(isinstance(operation, ast.And), [_value(value, parts) for value in values])
        case ast.Compare(left, operations, others):
            sides = [_value(side, parts) for side in (left, *others)]
            pairs = zip(sides, operations, sides[1:], strict=False)
            found = [_compared(OPERATIONS[type(operation)], one, other) for one, operation, other in pairs]
            return found[0] if len(found) == 1 else _joined(True, found)
        case ast.Call(ast.Name("abs"), [argument]):
            return _known(abs, _value(argument, parts))
        case ast.Call(ast.Name("all" | "any" as how), [argument]):
            return _joined(how == "all", _value(argument, parts))
    raise TypeError(f"{ast.unparse(node)} is no part of a rule")


def _known(operation: Callable[..., Any], *values: Any) -> Any:
    return None if any(value is None for value in values) else operation(*values)


def _compared(operation: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
    """Several estimates are compared one by one."""
    several = isinstance(one, (list, tuple))
    return [_known(operation, part, other) for part in one] if several else _known(operation, one, other)


def _joined(every: bool, values: Iterable[Any]) -> bool | None:
    """Kleene's and, or his or."""
    found = [_truth(value) for value in values]
    return not every if (not every) in found else None if None in found else every


def _truth(value: Any) -> bool | None:
    if value is not None and not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{value!r} is neither true nor false: compare it with a bar")
    return None if value is None else bool(value)
