"""The priority order: levels by hand, and that it is an order whatever the thresholds and resolutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spalign.constitution import Objective
from spalign.errors import DataError
from spalign.preference import best, is_scored, level, levels, met
from spalign.types import Response

properties = settings(deadline=None, max_examples=150)
NAMES = ("first", "second", "third")
scores = st.one_of(st.integers(0, 100).map(lambda i: i / 10), st.floats(0, 10), st.sampled_from([0.0, 9.0, 10.0]))
optional = st.none() | st.floats(0.05, 10) | st.sampled_from([0.1, 0.3, 2.0, 9.0])


def objective(name: str = "first", threshold: float | Literal["auto"] | None = None, resolution: float | None = None) -> Objective:
    text = {"principle": "p", "question": "q", "good_system": "g", "bad_system": "b"}
    return Objective(name=name, good_answer="yes", threshold=threshold, resolution=resolution, **text)


def response(id: str, *values: float) -> Response:
    return Response(id=id, text=id, token_ids=(1,), finished=True, scores=dict(zip(NAMES, values, strict=False)))


@st.composite
def objectives_and_responses(draw: st.DrawFn) -> tuple[list[Objective], list[Response]]:
    k = draw(st.integers(1, 3))
    objectives = [objective(name, draw(optional), draw(optional)) for name in NAMES[:k]]
    rows = draw(st.lists(st.tuples(*[scores] * k), min_size=3, max_size=4))
    return objectives, [response(f"r{i}", *row) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("score", "threshold", "resolution", "expected"),
    [
        (7.3, None, None, 7.3),
        (9.5, 9.0, None, 9.0),  # met is met
        (9.0, 9.0, None, 9.0),
        (8.9, 9.0, None, 8.9),
        (7.3, None, 2.0, 6.0),  # bins start at 0, 2, 4, 6, 8, 10
        (10.0, None, 4.0, 8.0),  # 0, 4, 8: the top of the scale lies in the last bin
        (9.0, 9.0, 2.0, 9.0),  # met stays above the bin that starts at 8 ...
        (8.9, 9.0, 2.0, 8.0),  # ... and what is not met does not reach it
        (0.3, None, 0.1, 0.3),  # 0.3 / 0.1 is 2.9999999999999996 in floats
        (0.7, None, 0.1, 0.7),  # and 0.7 / 0.1 is 6.999999999999999
        (0.29, None, 0.1, 0.2),
    ],
)
def test_level_by_hand(score: float, threshold: float | None, resolution: float | None, expected: float) -> None:
    assert level(score, objective(threshold=threshold, resolution=resolution)) == pytest.approx(expected, abs=1e-12)


def test_scores_in_one_bin_tie_exactly() -> None:
    binned = objective(resolution=0.1)
    assert level(0.3, binned) == level(0.1 + 0.2, binned) == level(0.35, binned)


def test_a_threshold_never_lets_a_bin_stand_above_it() -> None:
    # 0.3 lies in bin 3, which starts at 3 * 0.1 = 0.30000000000000004: more than the threshold, so it is capped
    below = math.nextafter(0.3, 0)
    assert level(below, objective(threshold=0.3, resolution=0.1)) <= level(5.0, objective(threshold=0.3, resolution=0.1)) == 0.3


def test_met_needs_a_threshold() -> None:
    assert not met(10.0, objective())
    assert met(9.0, objective(threshold=9.0))
    assert not met(8.999, objective(threshold=9.0))


@pytest.mark.parametrize("ask", [level, met])
@pytest.mark.parametrize("score", [0.0, 10.0])
def test_an_automatic_threshold_must_be_a_number_before_anything_is_ordered(
    ask: Callable[[float, Objective], object], score: float
) -> None:
    with pytest.raises(DataError, match="objective 'first': the threshold is still 'auto'") as caught:
        ask(score, objective(threshold="auto", resolution=0.5))
    assert "judge-check" in caught.value.hint


def test_levels_follow_the_order_of_priority() -> None:
    first, second = objective("first", threshold=8.0), objective("second", resolution=5.0)
    assert levels(response("r", 9.0, 7.0), [first, second]) == (8.0, 5.0)
    assert levels(response("r", 9.0, 7.0), [second, first]) == (5.0, 8.0)


@pytest.mark.parametrize("broken", [{"first": 1.0}, {"first": 1.0, "second": math.nan}, {"first": 1.0, "second": math.inf}])
def test_a_missing_score_is_an_error_that_names_response_and_objective(broken: dict[str, float]) -> None:
    lacking = Response(id="x7", text="t", token_ids=(1,), finished=True, scores=broken)
    objectives = [objective("first"), objective("second")]
    assert is_scored(lacking, objectives[:1])
    assert not is_scored(lacking, objectives)
    with pytest.raises(DataError, match=r"'x7' has no score for objective 'second'") as caught:
        levels(lacking, objectives)
    assert caught.value.hint


def test_best_looks_at_the_secondary_only_where_the_primary_ties() -> None:
    harmless, helpful = response("harmless", 9.0, 1.0), response("helpful", 8.0, 10.0)
    assert best([helpful, harmless], [objective("first"), objective("second")]) is harmless
    # with "met from 8" both are harmless enough, and helpfulness decides
    assert best([helpful, harmless], [objective("first", threshold=8.0), objective("second")]) is helpful


def test_ties_of_best_go_to_raw_scores_then_to_the_first_id() -> None:
    met_is_met = [objective("first", threshold=8.0)]
    assert best([response("a", 8.5), response("b", 9.5)], met_is_met).id == "b"
    assert best([response("b", 9.5), response("a", 9.5)], met_is_met).id == "a"


@properties
@given(scores, scores, optional, optional)
def test_level_never_falls_as_the_score_rises(a: float, b: float, threshold: float | None, resolution: float | None) -> None:
    o = objective(threshold=threshold, resolution=resolution)
    low, high = sorted((a, b))
    assert level(low, o) <= level(high, o)
    assert level(level(a, o), o) == level(a, o)
    assert level(a, o) <= a + 1e-8
    if met(high, o):
        assert level(high, o) == threshold


@properties
@given(objectives_and_responses())
def test_the_order_is_total_and_transitive(case: tuple[list[Objective], list[Response]]) -> None:
    # through best(): it agrees with its own pairwise choices, which a circle a > b > c > a cannot do
    objectives, responses = case
    for a, b, c in permutations(responses, 3):
        assert best([a, b], objectives) is best([b, a], objectives)
        if best([a, b], objectives) is a and best([b, c], objectives) is b:
            assert best([a, c], objectives) is a


@properties
@given(objectives_and_responses())
def test_best_does_not_depend_on_the_order_of_input(case: tuple[list[Objective], list[Response]]) -> None:
    objectives, responses = case
    winner = best(responses, objectives)
    assert all(best(shuffled, objectives) is winner for shuffled in permutations(responses))
    assert all(levels(winner, objectives) >= levels(r, objectives) for r in responses)
