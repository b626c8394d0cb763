"""Scores against labels: every statistic by hand, its invariances, and small simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spalign.selfeval.statistics import (
    auc,
    auc_interval,
    best_accuracy,
    correlation,
    equal_error_threshold,
    errors_at,
    fit_logistic,
    recall_threshold,
    threshold_interval,
)

properties = settings(deadline=None, max_examples=80)
Rows = tuple[list[float], list[int]]


@st.composite
def rows(draw: st.DrawFn, most: int = 14) -> Rows:
    """Scores in tenths, with many ties, and at least one answer of each label."""
    labels = [0, 1, *draw(st.lists(st.integers(0, 1), max_size=most - 2))]
    scores = draw(st.lists(st.integers(-9, 9), min_size=len(labels), max_size=len(labels)))
    return [s / 10 for s in scores], labels


# AUC


def test_auc_by_hand() -> None:
    # good 3 and 1.5, bad 1 and 2: 3 > 1, 3 > 2, 1.5 > 1, but 1.5 < 2
    assert auc([3, 1.5, 1, 2], [1, 1, 0, 0]) == 0.75


def test_a_tie_counts_half() -> None:
    # good 2, bad 2 and 1: one half and one whole of two pairs
    assert auc([2, 2, 1], [1, 0, 0]) == 0.75
    assert auc([4, 4, 4], [1, 0, 0]) == 0.5


@pytest.mark.parametrize("labels", [[1, 1], [0, 0], []])
def test_auc_of_one_label_is_not_defined(labels: list[int]) -> None:
    assert math.isnan(auc([float(i) for i, _ in enumerate(labels)], labels))


@properties
@given(rows())
def test_swapping_the_labels_gives_the_complement(data: Rows) -> None:
    scores, labels = data
    assert auc(scores, [1 - y for y in labels]) == pytest.approx(1 - auc(scores, labels), abs=1e-12)


@properties
@given(rows())
def test_auc_sees_only_the_order(data: Rows) -> None:
    scores, labels = data
    assert auc([math.exp(5 * s) - 3 for s in scores], labels) == auc(scores, labels)
    assert auc([-s for s in scores], labels) == pytest.approx(1 - auc(scores, labels), abs=1e-12)


# Its interval


def noise(prompts: int, seed: int, *, shared: bool = False) -> tuple[list[float], list[int], list[str]]:
    """Four answers a prompt whose scores know nothing of the labels. shared: one label and almost one score for all four."""
    draw = np.random.default_rng(seed)
    clusters = [f"p{i // 4}" for i in range(4 * prompts)]
    if not shared:
        return draw.normal(size=4 * prompts).tolist(), draw.permutation([0, 1] * (2 * prompts)).tolist(), clusters
    scores = np.repeat(draw.normal(size=prompts), 4) + 0.01 * draw.normal(size=4 * prompts)
    return scores.tolist(), np.repeat(draw.permutation([0, 1] * (prompts // 2)), 4).tolist(), clusters


def coverage(samples: list[tuple[list[float], list[int], list[str]]]) -> float:
    """Share of the samples whose interval holds one half, the AUC of noise."""
    intervals = [auc_interval(*sample) for sample in samples]
    return sum(low <= 0.5 <= high for low, high in intervals) / len(intervals)


@pytest.mark.parametrize("seed", range(8))
def test_the_interval_holds_the_auc(seed: int) -> None:
    scores, labels, clusters = noise(12, seed)
    scores = [s + 0.7 * y for s, y in zip(scores, labels, strict=True)]
    low, high = auc_interval(scores, labels, clusters)
    assert 0 <= low < auc(scores, labels) < high <= 1


def test_the_interval_covers_one_half_on_noise() -> None:
    # 95 % of 120 samples, give or take four standard errors (7 points) and the bootstrap's own optimism
    assert 0.85 <= coverage([noise(12, seed) for seed in range(120)]) <= 1.0


def test_answers_to_one_prompt_are_drawn_together() -> None:
    # four answers that say the same are one piece of evidence: counted as four, the interval is half as wide and misses one half too often
    samples = [noise(16, seed, shared=True) for seed in range(60)]
    apart = [(scores, labels, [f"{i}" for i, _ in enumerate(labels)]) for scores, labels, _ in samples]
    assert coverage(samples) >= 0.85
    assert coverage(apart) <= 0.75


def test_copies_within_a_prompt_change_nothing() -> None:
    scores, labels, clusters = noise(6, 0)
    twice = [[x for x in column for _ in range(2)] for column in (scores, labels, clusters)]
    assert auc_interval(*twice) == pytest.approx(auc_interval(scores, labels, clusters), abs=1e-12)


def test_one_prompt_alone_has_no_width() -> None:
    # there is one way to draw it: AUC of good 3, 1.5 and bad 1, 2
    assert auc_interval([3, 1.5, 1, 2], [1, 1, 0, 0], ["p"] * 4) == (0.75, 0.75)


def test_the_interval_of_one_label_is_not_defined() -> None:
    assert all(map(math.isnan, auc_interval([1.0, 2.0], [1, 1], ["a", "b"])))


def test_the_interval_is_the_same_every_time_and_follows_the_seed() -> None:
    sample = noise(12, 3)
    assert auc_interval(*sample) == auc_interval(*sample)
    assert auc_interval(*sample, seed=1) != auc_interval(*sample)


# Thresholds. good 2, 4, 5, 6; bad 0, 1, 3, 4.5

SCORES, LABELS = [2, 4, 5, 6, 0, 1, 3, 4.5], [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("threshold", "missed", "passed"),
    [
        (-1, 0, 1),
        (2, 0, 0.5),  # 2 itself is not below; 3 and 4.5 are above
        (3.5, 0.25, 0.25),
        (4.5, 0.5, 0.25),  # 4.5 itself passes
        (7, 1, 0),
    ],
)
def test_errors_by_hand(threshold: float, missed: float, passed: float) -> None:
    assert errors_at(threshold, SCORES, LABELS) == (missed, passed)


def test_equal_errors_by_hand() -> None:
    # midway between 3 and 4 one good of four (2) is below, and one bad of four (4.5) above
    assert equal_error_threshold(SCORES, LABELS) == 3.5


def test_equal_errors_of_separable_answers_lie_midway() -> None:
    assert equal_error_threshold([1, 2, 6, 9], [0, 0, 1, 1]) == 4.0


def test_of_two_thresholds_equally_good_the_lower_one() -> None:
    # good 1 and 3, bad 2: at 1.5 half of the good is below and the bad passes, at 2.5 half is below and it does not: both half apart
    assert equal_error_threshold([1, 3, 2], [1, 1, 0]) == 1.5


@properties
@given(rows())
def test_no_score_as_threshold_has_errors_more_equal(data: Rows) -> None:
    def apart(t: float) -> float:
        missed, passed = errors_at(t, *data)
        return abs(missed - passed)

    assert all(apart(equal_error_threshold(*data)) <= apart(t) for t in [*data[0], math.inf])


def test_recall_by_hand() -> None:
    # of the bad 0, 1, 2, 3, 4 one in five may pass: from midway between 3 and 3.5 on only 4 does
    scores, labels = [0, 1, 2, 3, 4, 2.5, 3.5, 5], [0, 0, 0, 0, 0, 1, 1, 1]
    assert recall_threshold(scores, labels, recall=0.8) == 3.25
    assert recall_threshold(scores, labels, recall=0.81) == 4.5


@properties
@given(rows(), st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.9, 0.95, 0.99]))
def test_at_least_that_share_of_the_bad_is_below_and_no_lower_threshold_does_it(data: Rows, recall: float) -> None:
    found = recall_threshold(*data, recall=recall)
    allowed = 1 - recall + 1e-9
    assert errors_at(found, *data)[1] <= allowed
    below = [s for s in data[0] if s < found]
    assert not below or errors_at(max(below), *data)[1] > allowed


def test_accuracy_is_the_mean_over_both_labels() -> None:
    # good 3, bad 0, 1, 2, 4: midway between 2 and 3 no good is missed and a quarter of the bad passes; four of five rows would be 0.8
    assert best_accuracy([3, 0, 1, 2, 4], [1, 0, 0, 0, 0]) == 0.875


@properties
@given(rows())
def test_accuracy_is_no_worse_than_guessing_and_whole_where_the_labels_part(data: Rows) -> None:
    assert best_accuracy(*data) >= 0.5
    assert (best_accuracy(*data) == 1) == (auc(*data) == 1)


# The threshold's interval


def test_the_threshold_of_one_prompt_has_no_width() -> None:
    assert threshold_interval(equal_error_threshold, SCORES, LABELS, ["p"] * 8) == (3.5, 3.5)


def test_a_draw_that_lacks_a_label_is_left_out() -> None:
    def find(scores: object, labels: object) -> float:
        assert {0, 1} <= set(labels)  # type: ignore[call-overload]
        return 7.0

    # of two prompts, one all good and one all bad, half of the draws hold one of them twice
    assert threshold_interval(find, [1, 2, 3, 4], [1, 1, 0, 0], ["a", "a", "b", "b"]) == (7.0, 7.0)


def test_the_threshold_lies_in_its_interval_which_narrows_with_more_prompts() -> None:
    def interval(prompts: int) -> tuple[float, float, float]:
        scores, labels, clusters = noise(prompts, 5)
        scores = [s + 2 * y for s, y in zip(scores, labels, strict=True)]
        return (*threshold_interval(equal_error_threshold, scores, labels, clusters), equal_error_threshold(scores, labels))

    low, high, found = interval(6)
    assert low < found < high
    narrow_low, narrow_high, _ = interval(60)
    assert narrow_high - narrow_low < (high - low) / 2  # ten times the prompts: about a third


# The logistic fit


def test_the_fit_of_two_answers_by_hand() -> None:
    # Platt's targets are (1 + 1) / (1 + 2) and 1 / (1 + 2): odds 2 at 1 and 1/2 at 0, so slope * (1 - 0.5) = ln 2
    slope, centre = fit_logistic([0.0, 1.0], [0, 1])
    assert slope == pytest.approx(2 * math.log(2))
    assert centre == pytest.approx(0.5)


@pytest.mark.parametrize(("slope", "centre"), [(1.7, -0.6), (0.3, 4.0)])
def test_slope_and_centre_come_back_from_a_large_sample(slope: float, centre: float) -> None:
    draw = np.random.default_rng(0)
    raw = draw.normal(centre, 2 / slope, size=40_000)
    labels = (draw.random(len(raw)) < 1 / (1 + np.exp(-slope * (raw - centre)))).astype(int)
    found = fit_logistic(raw.tolist(), labels.tolist())
    assert found[0] == pytest.approx(slope, rel=0.05)
    assert found[1] == pytest.approx(centre, abs=0.05 / slope)


def test_separable_answers_give_a_finite_fit_by_hand() -> None:
    # 100 bad answers at 0 and 100 good ones at 1: the fit meets the targets 1/102 and 101/102, odds of 101
    slope, centre = fit_logistic([0.0] * 100 + [1.0] * 100, [0] * 100 + [1] * 100)
    assert slope == pytest.approx(2 * math.log(101))
    assert centre == pytest.approx(0.5)


def test_the_slope_is_not_positive_on_inverted_labels() -> None:
    slope, centre = fit_logistic([0.0, 1.0], [1, 0])
    assert slope == pytest.approx(-2 * math.log(2))
    assert centre == pytest.approx(0.5)


def test_a_constant_input_has_no_slope() -> None:
    assert fit_logistic([3.5] * 4, [0, 1, 0, 1]) == (0.0, 3.5)


@properties
@given(rows(), st.sampled_from([0.01, 1.0, 300.0]), st.floats(-50, 50))
def test_the_fit_follows_the_units_of_its_input(data: Rows, unit: float, zero: float) -> None:
    raw, labels = data
    raw = [*raw, 1.0]  # not constant
    labels = [*labels, 1]
    slope, centre = fit_logistic(raw, labels)
    moved = fit_logistic([unit * x + zero for x in raw], labels)
    assert moved[0] * unit == pytest.approx(slope, rel=1e-4, abs=1e-6)
    if abs(slope) > 1e-3:  # else the centre is wherever
        assert (moved[1] - zero) / unit == pytest.approx(centre, rel=1e-3, abs=1e-3)


@properties
@given(rows())
def test_the_sign_of_the_slope_says_which_label_has_the_higher_mean(data: Rows) -> None:
    scores, labels = data
    good, bad = ([s for s, y in zip(scores, labels, strict=True) if y == side] for side in (1, 0))
    lead = sum(good) / len(good) - sum(bad) / len(bad)
    slope, _ = fit_logistic(scores, labels)
    assert math.isfinite(slope)
    if abs(lead) > 1e-9:
        assert slope * lead > 0


def test_an_outlier_on_its_own_side_does_not_move_the_fit() -> None:
    alone = fit_logistic([0.0] * 50 + [5.0] * 50, [0] * 50 + [1] * 50)
    slope, centre = fit_logistic([0.0] * 50 + [5.0] * 50 + [-50.0], [0] * 50 + [1] * 50 + [0])
    assert centre == pytest.approx(alone[1], abs=0.01)
    assert slope == pytest.approx(alone[0], rel=0.1)


def test_a_far_outlier_gives_no_warning() -> None:  # pytest turns one into an error
    slope, centre = fit_logistic([0.0] * 100 + [5.0] * 100 + [-500.0], [0] * 100 + [1] * 100 + [0])
    assert slope > 0
    assert centre == pytest.approx(2.5, abs=0.01)


# Rank correlation


def test_correlation_with_ties_by_hand() -> None:
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4; about their mean 2.5: -1.5, 0, 0, 1.5 and -1.5, 0.5, -0.5, 1.5
    # products 2.25 + 2.25 = 4.5; squares 4.5 and 5
    assert correlation([1, 2, 2, 9], [10, 30, 20, 70]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_correlation_sees_only_the_order() -> None:
    assert correlation([1, 2, 3, 4], [1, 10, 100, 1e6]) == pytest.approx(1)
    assert correlation([1, 2, 3, 4], [0, -1, -5, -6]) == pytest.approx(-1)


@pytest.mark.parametrize(("a", "b"), [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [5, 5, 5]), ([1], [2]), ([], [])])
def test_correlation_with_a_constant_is_not_defined(a: list[float], b: list[float]) -> None:
    assert math.isnan(correlation(a, b))


@properties
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=10))
def test_correlation_is_symmetric_and_turns_with_its_input(pairs: list[tuple[int, int]]) -> None:
    a, b = ([float(p[i]) for p in pairs] for i in (0, 1))
    found = correlation(a, b)
    assert correlation(b, a) == pytest.approx(found, nan_ok=True)
    assert correlation([-x for x in a], b) == pytest.approx(-found, nan_ok=True)
    assert not abs(found) > 1 + 1e-12
