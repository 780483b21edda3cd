"""A rule gives one of five words, each with one meaning, and cannot forget that an interval straddles its bar."""

import itertools

import pytest

from embedlens import rules
from embedlens.stats import Estimate

CASES = {True: Estimate(2.0, 1.0, 3.0, 9), False: Estimate(-2.0, -3.0, -1.0, 9), None: Estimate(0.5, -1.0, 2.0, 9)}
KLEENE = {True: 1.0, None: 0.5, False: 0.0}


@pytest.mark.parametrize("a, b", itertools.product(CASES, repeat=2))
def test_and_or_not_are_kleenes(a, b):
    parts = {"a": CASES[a], "b": CASES[b]}
    assert KLEENE[rules.decide("a > 0 and b > 0", parts)] == min(KLEENE[a], KLEENE[b])
    assert KLEENE[rules.decide("a > 0 or b > 0", parts)] == max(KLEENE[a], KLEENE[b])
    assert KLEENE[rules.decide("not a > 0", parts)] == 1 - KLEENE[a]
    assert rules.decide("all(both > 0)", {"both": [CASES[a], CASES[b]]}) is rules.decide("a > 0 and b > 0", parts)
    assert rules.decide("any(both > 0)", {"both": [CASES[a], CASES[b]]}) is rules.decide("a > 0 or b > 0", parts)


def test_each_of_the_five_words_is_earned_by_its_own_state():
    words = {
        rules.HOLDS: (CASES[True], {}),
        rules.PARTLY: (CASES[None], {"partly": "a > -2"}),
        rules.FAILS: (CASES[False], {"partly": "a > 0"}),
        rules.UNDECIDED: (CASES[None], {"partly": "a > 1"}),
        rules.UNTESTABLE: (CASES[True], {"needs": False}),
    }
    assert set(words) == set(rules.VERDICTS)
    for word, (part, how) in words.items():
        assert rules.conclude("a > 0", {"a": part}, **how) == word


def test_one_refuted_part_is_enough_and_one_open_part_is_not():
    parts = {"a": CASES[False], "b": CASES[None], "c": CASES[True]}
    assert rules.conclude("a > 0 and b > 0", parts) == rules.FAILS
    assert rules.conclude("b > 0 and c > 0", parts) == rules.UNDECIDED
    assert rules.conclude("a > 0 and c > 0", parts, partly="c > 0") == rules.PARTLY


def test_what_was_not_measured_is_undecided_and_never_false():
    assert rules.decide("x > 0", {"x": None}) is None
    assert rules.decide("0 < x < 1 and abs(x) > 1 and not x > 2", {"x": None}) is None
    assert rules.decide("x > 0 and y > 0", {"x": None, "y": CASES[False]}) is False
    assert rules.decide("x and y", {"x": None, "y": True}) is rules.decide("x or y", {"x": None, "y": False}) is None
    assert rules.decide("x and y", {"x": None, "y": False}) is False and rules.decide("not x", {"x": None}) is None


def test_chains_bounds_and_absolute_values():
    parts = {"off": Estimate(1.0, 0.6, 1.5, 9), "rho": Estimate(-0.3, -0.4, -0.2, 9)}
    assert rules.decide("0.5 < off < 2", parts) is True
    assert rules.decide("0.7 < off < 2", parts) is None
    assert rules.decide("abs(rho) < 0.1", parts) is False
    assert rules.decide("off.low > 0.5 and off.n == 9", parts) is True
