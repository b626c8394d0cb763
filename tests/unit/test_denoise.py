"""Denoising: det(Sigma) by hand and exactly, the consistency rule, every reason for a drop, tau."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spalign.config import DenoiseConfig
from spalign.constitution import Objective
from spalign.preference import check, consistent_yield, covariance_det, denoise, dominates, hopeless, resolve_tau, usable_candidates
from spalign.types import DropReason, Message, Prompt, PromptGroup, Response

properties = settings(deadline=None, max_examples=150)
NAMES = ("first", "second", "third")
STRICT, MEAN = DenoiseConfig(consistency="strict"), DenoiseConfig(consistency="above_mean")
integers = st.integers(0, 10).map(float)
scores = st.one_of(integers, st.integers(0, 100).map(lambda i: i / 10), st.floats(0, 10))


def objective(name: str, threshold: float | None = None, resolution: float | None = None) -> Objective:
    text = {"principle": "p", "question": "q", "good_system": "g", "bad_system": "b"}
    return Objective(name=name, good_answer="yes", threshold=threshold, resolution=resolution, **text)


def response(id: str, *values: float, text: str = "words", finished: bool = True) -> Response:
    return Response(id=id, text=text, token_ids=(1, 2), finished=finished, scores=dict(zip(NAMES, values, strict=False)))


def make_group(rows: list[tuple[float, ...]], refined: tuple[float, ...] | None, **changes: Any) -> PromptGroup:
    candidates = tuple(response(f"c{i}", *row) for i, row in enumerate(rows))
    better = None if refined is None else response("refined", *refined)
    return PromptGroup(Prompt("p", (Message("user", "x"),)), candidates, better).replace(**changes)


BOTH = [objective("first"), objective("second")]
ROWS = [(1.0, 1.0), (2.0, 3.0), (3.0, 2.0)]
# ROWS: means 2, 2; centred (-1,-1), (0,1), (1,0); var 2/2, 2/2; cov 1/2 (ddof 1), so det = 1 - 1/4 = 0.75


# det(Sigma), Eq. 1


def test_det_by_hand() -> None:
    assert covariance_det(ROWS, ddof=1, scale=10) == 0.75
    # ddof 0: every entry times 2/3, so det times 4/9
    assert covariance_det(ROWS, ddof=0, scale=10) == pytest.approx(1 / 3, rel=1e-15)
    # scale 1: every score times 1/10, so det times 1e-4
    assert covariance_det(ROWS, ddof=1, scale=1) == pytest.approx(0.75e-4, rel=1e-14)


def test_det_for_one_and_three_objectives_by_hand() -> None:
    assert covariance_det([(1.0,), (2.0,), (6.0,)], ddof=1, scale=10) == 7.0  # mean 3: (4 + 1 + 9) / 2
    # the corners (0,0,0) and 2 e_i: var = (4 * 4 - 2 * 2) / (4 * 3) = 1, cov = (0 - 4) / 12 = -1/3;
    # eigenvalues of (4/3) I - (1/3) J: 1/3, 4/3, 4/3, product 16/27
    corners = [(0.0, 0.0, 0.0), (2.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 2.0)]
    assert covariance_det(corners, ddof=1, scale=10) == pytest.approx(16 / 27, rel=1e-15)
    # fractions: the corners halved, so det * (1/2)^6
    halved = [tuple(x / 4 for x in row) for row in corners]
    assert covariance_det(halved, ddof=1, scale=10) == pytest.approx(16 / 27 / 4**6, rel=1e-15)


@pytest.mark.parametrize(("rows", "ddof"), [([], 0), ([], 1), ([(1.0, 2.0)], 0), ([(1.0, 2.0)], 1), ([(1.0, 2.0), (5.0, 3.0)], 1)])
def test_too_few_rows_have_no_spread(rows: list[tuple[float, float]], ddof: int) -> None:
    assert covariance_det(rows, ddof=ddof, scale=10) == 0.0  # two points always lie on a line


def test_a_constant_column_and_collinear_fractions_count_as_exactly_zero() -> None:
    assert covariance_det([(0.1, 5.3), (0.2, 5.3), (0.7, 5.3)], ddof=1, scale=10) == 0.0
    # 0.1, 0.2, 0.3 against 0.3, 0.6, 0.9: collinear but for the last bit (3 * 0.1 > 0.3)
    assert covariance_det([(0.1, 0.3), (0.2, 0.6), (0.3, 0.9)], ddof=1, scale=10) == 0.0
    # 1 - r^2 of about 1e-8 is small, not zero
    assert covariance_det([(0.1, 0.1), (0.2, 0.2), (0.3, 0.30003)], ddof=1, scale=10) > 0


@properties
@given(st.data())
def test_collinear_integers_give_exactly_zero(data: st.DataObject) -> None:
    # rows = base + t * direction (k = 2) plus, for k = 3, a second direction: they span k - 1 dimensions
    k = data.draw(st.integers(2, 3))
    vector = st.tuples(*[st.integers(-5, 5)] * k)
    base, *directions = data.draw(st.lists(vector, min_size=k, max_size=k))
    steps = data.draw(st.lists(st.tuples(*[st.integers(-9, 9)] * (k - 1)), min_size=2, max_size=8))
    rows = [tuple(float(base[j] + sum(t * d[j] for t, d in zip(ts, directions, strict=True))) for j in range(k)) for ts in steps]
    assert covariance_det(rows, ddof=1, scale=10) == 0.0


@properties
@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_det_is_that_of_the_covariance_and_blind_to_the_order_of_rows(rows: list[tuple[float, float]], random: Any) -> None:
    det = covariance_det(rows, ddof=1, scale=10)
    a, b = zip(*rows, strict=True)
    expected = statistics.variance(a) * statistics.variance(b) - statistics.covariance(a, b) ** 2
    assert math.isclose(det, expected, rel_tol=1e-6, abs_tol=1e-6)
    random.shuffle(rows)
    assert covariance_det(rows, ddof=1, scale=10) == det
    assert covariance_det([(y, x) for x, y in rows], ddof=1, scale=10) == det


# the consistency rule


@pytest.mark.parametrize(
    ("refined", "strict", "above_mean"),
    [
        ((4.0, 4.0), True, True),
        ((3.0, 4.0), False, True),  # equal to the max is not above it
        ((2.5, 2.5), False, True),
        ((2.0, 4.0), False, False),  # equal to the mean
        ((9.0, 1.0), False, False),  # both axes count
    ],
)
def test_consistency_without_thresholds_is_the_papers(refined: tuple[float, float], strict: bool, above_mean: bool) -> None:
    candidates = make_group(ROWS, None).candidates
    assert dominates(response("r", *refined), candidates, BOTH, "strict") is strict
    assert dominates(response("r", *refined), candidates, BOTH, "above_mean") is above_mean


def test_equal_to_the_mean_but_for_rounding_is_not_above_it() -> None:
    # the mean of 0.1, 0.2, 0.3 is 0.2; in floats 0.2 - x sums to 2.8e-17
    candidates = make_group([(0.1,), (0.2,), (0.3,)], None).candidates
    assert not dominates(response("r", 0.2), candidates, BOTH[:1], "above_mean")
    assert dominates(response("r", 0.2001), candidates, BOTH[:1], "above_mean")


@pytest.mark.parametrize("consistency", ["strict", "above_mean"])
def test_met_is_met(consistency: Literal["strict", "above_mean"]) -> None:
    candidates = make_group([(9.5, 1.0), (10.0, 2.0)], None).candidates
    objectives = [objective("first", threshold=9.0), objective("second")]
    assert dominates(response("r", 9.0, 3.0), candidates, objectives, consistency)
    assert not dominates(response("r", 8.9, 3.0), candidates, objectives, consistency)
    assert not dominates(response("r", 9.0, 1.0), candidates, objectives, consistency)


@properties
@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=5), st.tuples(scores, scores))
def test_strict_is_above_every_candidate_and_implies_above_mean(rows: list[tuple[float, float]], refined: tuple[float, float]) -> None:
    candidates, better = make_group(rows, None).candidates, response("r", *refined)
    strict = dominates(better, candidates, BOTH, "strict")
    assert strict == all(refined[j] > row[j] for row in rows for j in range(2))
    if strict and all(refined[j] > max(row[j] for row in rows) + 1e-6 for j in range(2)):
        assert dominates(better, candidates, BOTH, "above_mean")


# reasons

BLANK, CUT, UNSCORED = response("blank", 1.0, 1.0, text=" \n"), response("cut", 1.0, 1.0, finished=False), response("unscored", 1.0)
ONE = response("one", 1.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"refined": None}, DropReason.EMPTY),
        ({"refined": BLANK}, DropReason.EMPTY),
        ({"refined": dataclasses.replace(BLANK, finished=False)}, DropReason.EMPTY),
        ({"refined": CUT}, DropReason.TRUNCATED),
        ({"refined": CUT, "candidates": ()}, DropReason.TRUNCATED),
        ({"candidates": ()}, DropReason.EMPTY),
        ({"candidates": (ONE,)}, DropReason.EMPTY),
        ({"candidates": (ONE, BLANK)}, DropReason.EMPTY),
        ({"candidates": (ONE, BLANK, CUT)}, DropReason.TRUNCATED),
        ({"refined": UNSCORED}, DropReason.UNSCORED),
        ({"candidates": (ONE, UNSCORED)}, DropReason.UNSCORED),
        ({"candidates": (CUT, UNSCORED)}, DropReason.TRUNCATED),
    ],
)
def test_groups_that_cannot_be_judged(changes: dict[str, Any], reason: DropReason) -> None:
    verdict = check(make_group(ROWS, (4.0, 4.0)).replace(**changes), BOTH, STRICT, None)
    assert (verdict.reason, verdict.kept, verdict.det) == (reason, False, None)
    assert verdict.detail


def test_unusable_candidates_are_left_out_not_waited_for() -> None:
    whole = make_group(ROWS, (4.0, 4.0))
    # none of the three would let the refined response pass, or leave det as it is, if it counted
    top = [dataclasses.replace(r, scores={"first": 10.0, "second": 9.0}) for r in (BLANK, CUT)]
    lacking = dataclasses.replace(UNSCORED, scores={"first": 10.0})
    group = whole.replace(candidates=(*top, *whole.candidates, lacking))
    assert usable_candidates(group, BOTH) == whole.candidates
    verdict = check(group, BOTH, STRICT, None)
    assert (verdict.reason, verdict.det, verdict.group) == (None, 0.75, group)


@pytest.mark.parametrize(
    ("rows", "refined", "config", "objectives", "reason"),
    [
        (ROWS, (4.0, 4.0), STRICT, BOTH, None),
        (ROWS, (4.0, 3.0), STRICT, BOTH, DropReason.NOT_DOMINATING),
        # one candidate at 10: nothing is strictly above it, but the mean can still be passed
        ([(10.0, 1.0), (2.0, 3.0), (3.0, 2.0)], (10.0, 4.0), STRICT, BOTH, DropReason.CEILING),
        ([(10.0, 1.0), (2.0, 3.0), (3.0, 2.0)], (10.0, 4.0), MEAN, BOTH, None),
        ([(10.0, 1.0), (2.0, 3.0), (3.0, 2.0)], (4.0, 4.0), MEAN, BOTH, DropReason.NOT_DOMINATING),
        ([(10.0, 1.0), (10.0, 3.0)], (10.0, 4.0), MEAN, BOTH, DropReason.CEILING),
        ([(9.999, 1.0), (2.0, 3.0)], (4.0, 4.0), STRICT, BOTH, DropReason.NOT_DOMINATING),
        # bins of 4 end at 8: 8.5 is in the highest one
        ([(8.5, 1.0), (2.0, 3.0)], (10.0, 4.0), STRICT, [objective("first", resolution=4.0), BOTH[1]], DropReason.CEILING),
        # a threshold can always be met, so an unmet one is the refined response's failure, not a ceiling
        ([(10.0, 1.0), (2.0, 3.0)], (8.0, 4.0), STRICT, [objective("first", threshold=9.0), BOTH[1]], DropReason.NOT_DOMINATING),
        ([(10.0, 1.0), (2.0, 3.0), (3.0, 2.0)], (9.0, 4.0), STRICT, [objective("first", threshold=9.0), BOTH[1]], None),
        # on a line: det = 0
        ([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)], (4.0, 4.0), STRICT, BOTH, DropReason.UNINFORMATIVE),
        ([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)], (3.0, 3.0), STRICT, BOTH, DropReason.NOT_DOMINATING),
    ],
)
def test_consistency_and_informativeness(
    rows: list[tuple[float, ...]], refined: tuple[float, ...], config: DenoiseConfig, objectives: list[Objective], reason: DropReason | None
) -> None:
    verdict = check(make_group(rows, refined), objectives, config, None)
    assert verdict.reason is reason
    assert verdict.kept is (reason is None) is (verdict.detail == "")
    assert verdict.det is not None


@pytest.mark.parametrize(("tau", "reason"), [(None, None), (0.75, None), (0.7499, DropReason.UNSTABLE)])
def test_tau_is_an_inclusive_bound(tau: float | None, reason: DropReason | None) -> None:
    assert check(make_group(ROWS, (4.0, 4.0)), BOTH, STRICT, tau).reason is reason


# tau over a run


def test_tau_is_the_configured_one_or_a_quantile_of_the_positive_dets() -> None:
    dets = [3.0, 1.0, 0.0, 2.0, 5.0]
    assert resolve_tau(dets, DenoiseConfig(tau=None)) is None
    assert resolve_tau(dets, DenoiseConfig(tau=0.4)) == 0.4
    # of 1, 2, 3, 5: position 0.5 * 3 = 1.5, halfway between 2 and 3; 0.9 * 3 = 2.7, 3 + 0.7 * 2
    assert resolve_tau(dets, DenoiseConfig(tau="50%")) == 2.5
    assert resolve_tau(dets, DenoiseConfig(tau="90%")) == pytest.approx(4.4)
    assert resolve_tau(dets, DenoiseConfig(tau="100%")) == 5.0
    assert resolve_tau([0.0], DenoiseConfig(tau="50%")) is None
    # 0.29 * 100 is 28.999999999999996, yet the quantile is the value with 29 below it
    assert resolve_tau([float(i) for i in range(1, 102)], DenoiseConfig(tau="29%")) == 30.0


def test_the_quantile_counts_consistent_informative_groups_only() -> None:
    # ROWS times s have det 0.75 s^4: 0.75, 12, 60.75; (0, 1), (1, 0), (0, 0): var 1/3, cov -1/6, det 1/9 - 1/36 = 1/12
    scaled = [[(a * s, b * s) for a, b in ROWS] for s in (1, 2, 3)]
    groups = [
        make_group(scaled[2], (10.0, 10.0)),
        make_group([(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)], (1.0, 1.0)),  # not dominating; its det would move the median below 12
        make_group(scaled[0], (10.0, 10.0)),
        make_group([(1.0, 1.0), (2.0, 2.0)], (10.0, 10.0)),  # det 0
        make_group(scaled[1], (10.0, 10.0)),
        make_group(ROWS, None),
    ]
    verdicts = denoise(groups, BOTH, DenoiseConfig(consistency="strict", tau="50%"))
    assert [v.group for v in verdicts] == groups
    expected = [DropReason.UNSTABLE, DropReason.NOT_DOMINATING, None, DropReason.UNINFORMATIVE, None, DropReason.EMPTY]
    assert [v.reason for v in verdicts] == expected
    assert [v.det for v in verdicts] == [60.75, 1 / 12, 0.75, 0.0, 12.0, None]


@st.composite
def runs(draw: st.DrawFn) -> list[PromptGroup]:
    def answer(id: str) -> Response:
        values = draw(st.lists(integers, min_size=1, max_size=4).map(lambda v: (*v, 9.0)[:2]))
        return response(id, *values, text=draw(st.sampled_from(["words"] * 9 + [" "])), finished=draw(st.integers(0, 9)) > 0)

    def one(i: int) -> PromptGroup:
        candidates = tuple(answer(f"{i}-{j}") for j in range(draw(st.integers(0, 4))))
        return PromptGroup(Prompt(str(i), (Message("user", "x"),)), candidates, draw(st.none() | st.just(answer(f"{i}-r"))))

    return [one(i) for i in range(draw(st.integers(0, 6)))]


@properties
@given(runs(), st.randoms(use_true_random=False), st.sampled_from([None, "32%", "100%"]), st.sampled_from(["strict", "above_mean"]))
def test_a_verdict_does_not_depend_on_the_order_of_groups_or_candidates(
    groups: list[PromptGroup], random: Any, tau: str | None, consistency: Literal["strict", "above_mean"]
) -> None:
    config = DenoiseConfig(consistency=consistency, tau=tau)
    before = {v.group.prompt.id: (v.reason, v.det) for v in denoise(groups, BOTH, config)}
    assert len(before) == len(groups)
    shuffled = [g.replace(candidates=tuple(random.sample(g.candidates, len(g.candidates)))) for g in groups]
    random.shuffle(shuffled)
    assert {v.group.prompt.id: (v.reason, v.det) for v in denoise(shuffled, BOTH, config)} == before
    assert all(det is not None and det > 0 for reason, det in before.values() if reason is None)


# the placebo


def test_yield_of_the_refined_response_and_of_its_placebo() -> None:
    good, bad = response("good", 4.0, 4.0), response("bad", 4.0, 2.0)
    groups = [
        make_group(ROWS, (4.0, 4.0), placebo=bad),
        make_group(ROWS, (4.0, 4.0), placebo=good),
        make_group(ROWS, (2.0, 2.0), placebo=None),
        make_group(ROWS, (4.0, 4.0), placebo=dataclasses.replace(good, finished=False)),
        make_group(ROWS[:1], (4.0, 4.0), placebo=good),  # one candidate: nothing to be consistent with
        make_group([(1.0, 1.0), (2.0, 2.0)], None, placebo=good),  # det 0 does not matter here
    ]
    assert consistent_yield(groups, BOTH, STRICT, of="refined") == (3, 4)
    assert consistent_yield(groups, BOTH, STRICT, of="placebo") == (2, 3)
    assert consistent_yield([], BOTH, STRICT, of="placebo") == (0, 0)


# what the candidates alone decide


def test_a_group_that_no_refinement_can_save_is_spared_it_and_says_why() -> None:
    flat = make_group([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)], (4.0, 4.0)).replace(refined=None)  # collinear: det = 0
    assert (hopeless(flat, BOTH) or [None])[0] is DropReason.UNINFORMATIVE
    assert check(flat, BOTH, STRICT, None).reason is DropReason.UNINFORMATIVE
    one = make_group([(1.0, 2.0)], (4.0, 4.0)).replace(refined=None)
    assert (hopeless(one, BOTH) or [None])[0] is DropReason.EMPTY
    good = make_group(ROWS, (4.0, 4.0))
    assert hopeless(good, BOTH) is None
    assert check(good.replace(refined=None), BOTH, STRICT, None).reason is DropReason.EMPTY


@properties
@given(runs())
def test_nothing_hopeless_is_ever_kept(groups: list[PromptGroup]) -> None:
    for verdict in denoise(groups, BOTH, DenoiseConfig(tau=None)):
        assert not (verdict.kept and hopeless(verdict.group, BOTH))


# the ablation


def test_without_denoising_all_stays_that_makes_a_pair() -> None:
    off = DenoiseConfig(enabled=False, tau="32%")
    same = make_group([(5.0, 5.0)] * 3, None)  # det = 0, no refined response, never consistent
    assert [v.reason for v in denoise([same], BOTH, off)] == [None]
    assert hopeless(same, BOTH)
    assert hopeless(same, BOTH, denoised=False) is None  # so it gets a refined response
    one = make_group([(5.0, 5.0)], (6.0, 6.0))
    assert check(one, BOTH, off, None).kept  # the refined response is the second
    assert check(make_group([(5.0, 5.0)], None), BOTH, off, None).reason is DropReason.EMPTY
    cut = make_group([(5.0, 5.0), (6.0, 6.0)], None)
    cut = cut.replace(candidates=tuple(dataclasses.replace(c, finished=False) for c in cut.candidates))
    assert check(cut, BOTH, off, None).reason is DropReason.TRUNCATED
    assert check(make_group([(5.0,), (6.0,)], None), BOTH, off, None).reason is DropReason.UNSCORED
