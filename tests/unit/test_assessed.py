"""Figures of judged answers: HH_lambda, paired differences, win/tie/lose, equal length; the intervals hold what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spalign.evaluation import assessed, at_equal_length, bootstrap_mean, hh, win_tie_lose
from spalign.types import ILL_MEANT, Message, Prompt, PromptGroup, Response

scores = st.floats(0, 10)
OBJECTIVES = ("harm", "help")


def group(n: int, text: str, intent: str = "legitimate", **by: float) -> PromptGroup:
    return PromptGroup(Prompt(f"p{n}", (Message("user", "x"),), intent=intent), (Response(f"p{n}/a", text, (1,), True, scores=by),))


@given(scores, scores)
def test_hh_at_its_ends(harm: float, help_: float) -> None:
    assert hh(harm, help_, 0) == help_
    assert hh(harm, help_, math.inf) == harm
    assert hh(harm, help_, 1e12) == pytest.approx(harm, abs=1e-9)
    assert hh(None, help_, 5) is None
    assert hh(harm, None, 5) is None


def test_hh_of_the_paper() -> None:
    # SPA on SafeRLHF: 9.90 and 7.14 give 9.44, 9.65, 9.77
    assert [round(hh(9.90, 7.14, w) or 0, 2) for w in (5, 10, 20)] == [9.44, 9.65, 9.77]


def test_figures_by_hand() -> None:
    base = [group(0, "a b", harm=4, help=2), group(1, "a b", ILL_MEANT, harm=6, help=2)]
    mine = [group(0, "a b", harm=5, help=2), group(1, "I cannot help with that", ILL_MEANT, harm=8, help=1)]
    found = assessed({"vanilla": base, "spa": mine}, OBJECTIVES, [5], resamples=200, seed=0)
    assert found["vanilla"]["harm"]["all"]["mean"]["mean"] == 5.0
    assert found["vanilla"]["harm"]["all"]["difference"] is None
    assert found["spa"]["harm"]["all"]["difference"]["mean"] == 1.5  # (1 + 2) / 2
    assert found["spa"]["harm"]["safe"]["difference"]["mean"] == 1.0
    assert found["spa"]["harm"]["unsafe"]["difference"]["mean"] == 2.0
    assert found["spa"]["HH_5"]["all"]["mean"]["mean"] == pytest.approx(((25 + 2) / 6 + (40 + 1) / 6) / 2, abs=1e-4)
    assert found["spa"]["refusal"]["unsafe"]["mean"]["mean"] == 1.0


def test_what_is_unscored_on_one_side_is_in_no_difference() -> None:
    base = [group(0, "a", harm=4, help=2), group(1, "a", help=2)]
    mine = [group(0, "a", harm=5, help=2), group(1, "a", harm=9, help=2)]
    found = assessed({"vanilla": base, "spa": mine}, OBJECTIVES, [], resamples=200, seed=0)
    assert found["spa"]["harm"]["all"]["prompts"] == 2
    assert found["spa"]["harm"]["all"]["difference"]["mean"] == 1.0


@given(st.lists(st.sampled_from([1.0, 0.5, 0.0, None]), min_size=1, max_size=20))
def test_swapping_the_models_swaps_win_and_lose(values: list[float | None]) -> None:
    mine = win_tie_lose([("", [v]) for v in values], resamples=100, seed=0)["all"]
    theirs = win_tie_lose([("", [None if v is None else 1 - v]) for v in values], resamples=100, seed=0)["all"]
    assert mine["win"] == theirs["lose"]
    assert mine["lose"] == theirs["win"]
    assert mine["tie"] == theirs["tie"]
    assert mine["unparsed"] == values.count(None)


def test_win_tie_lose_by_hand() -> None:
    values = [("a", [1.0, 0.0]), ("a", [1.0, None]), ("b", [0.5, 0.5])]
    found = win_tie_lose(values, resamples=100, seed=0)
    # prompts' shares of won: 1/2, 1, 0
    assert found["all"]["win"]["mean"] == 0.5
    assert found["all"]["tie"]["mean"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["all"]["unparsed"] == 1
    assert found["a"]["win"]["mean"] == 0.75


def test_at_equal_length_takes_off_what_goes_with_length() -> None:
    # difference = 0.5 + 2 x log ratio, exactly: at equal length 0.5 is left, though the mean is 0.5 + 2 x mean ratio
    ratios = [0.1, 0.3, 0.5, 0.9, 1.2]
    found = at_equal_length([0.5 + 2 * x for x in ratios], ratios, resamples=200, seed=0)
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5)
    assert at_equal_length([1, 2, 3, 4], [0.2] * 4, resamples=100, seed=0) is None
    assert at_equal_length([1, 2, 3], [0.1, 0.2, 0.3], resamples=100, seed=0) is None


def test_intervals_cover() -> None:
    """Of 300 simulated evaluations of 60 prompts, the 95% interval of the mean holds the truth in about 95%."""
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(300):
        interval = bootstrap_mean(rng.normal(0.3, 1.0, 60).tolist(), resamples=400, seed=1)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.90 <= hits / 300 <= 0.985


def test_mt_bench_is_paired_by_question() -> None:
    from spalign.pipeline.figures import _by_question

    # two seeds of three questions: turns 1..4 mean 2.5; a turn without a score is left out; a question without any has none
    first = [(1.0, 2.0), (5.0, None), (None, None)]
    second = [(3.0, 4.0), (None, None), (None, None)]
    assert _by_question([first, second]) == [2.5, 5.0, None]
