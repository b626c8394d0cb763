"""Preference pairs: Eq. 2 and the weights of Eq. 3 by hand, the cap, the balance of lengths."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spalign.config import PairsConfig
from spalign.constitution import Objective
from spalign.errors import DataError
from spalign.preference import levels, make_pairs, select_pairs, usable_candidates, weights
from spalign.types import Message, PreferencePair, Prompt, PromptGroup, Response

properties = settings(deadline=None, max_examples=150)
NAMES = ("first", "second", "third")


def objective(name: str, threshold: float | None = None, resolution: float | None = None) -> Objective:
    text = {"principle": "p", "question": "q", "good_system": "g", "bad_system": "b"}
    return Objective(name=name, good_answer="yes", threshold=threshold, resolution=resolution, **text)


def response(id: str, *values: float, tokens: tuple[int, ...] | None = None, finished: bool = True) -> Response:
    ids = tuple(id.encode()) if tokens is None else tokens
    return Response(id=id, text=id, token_ids=ids, finished=finished, scores=dict(zip(NAMES, values, strict=False)))


def make_group(*candidates: Response, refined: Response | None = None) -> PromptGroup:
    return PromptGroup(Prompt("p", (Message("user", "x"),)), candidates, refined)


def config(delta: float = 0.5, cap: int | None = None, balance: bool = False) -> PairsConfig:
    return PairsConfig(delta=delta, max_per_prompt=cap, balance_length=balance)


BOTH = [objective("first"), objective("second")]


# Eq. 2


def test_pairs_by_hand() -> None:
    group = make_group(response("a", 5.0, 1.0), response("b", 5.0, 3.0), refined=response("r", 6.0, 2.0))
    # r > b: 1 - 1 on the axes: margin 2, gap 0; r > a: 1 + 1: margin 2, gap 2; b > a: 0 + 2, the secondary decides
    rows = [(p.id, p.margin, p.gap, p.decided_by) for p in make_pairs(group, BOTH, config())]
    assert rows == [("b>a", 2.0, 2.0, "second"), ("r>a", 2.0, 2.0, "first"), ("r>b", 2.0, 0.0, "first")]


def test_levels_are_compared_not_raw_scores() -> None:
    objectives = [objective("first", threshold=8.0), objective("second")]
    group = make_group(response("a", 10.0, 1.0), response("b", 8.0, 3.0), response("c", 7.0, 9.0))
    # levels a (8, 1), b (8, 3), c (7, 9): b > a by 2; a > c: 1 + 8, gap |1 - 8|; b > c: 1 + 6, gap 5
    rows = [(p.id, p.margin, p.gap, p.decided_by) for p in make_pairs(group, objectives, config())]
    assert rows == [("a>c", 9.0, 7.0, "first"), ("b>c", 7.0, 5.0, "first"), ("b>a", 2.0, 2.0, "second")]


def test_delta_is_inclusive_up_to_float_noise() -> None:
    group = make_group(response("a", 0.3), response("b", 0.1))
    # 0.3 - 0.1 is 0.19999999999999998
    assert len(make_pairs(group, BOTH[:1], config(delta=0.2))) == 1
    assert make_pairs(group, BOTH[:1], config(delta=0.2001)) == []


def test_a_gap_that_is_only_float_noise_is_zero() -> None:
    # (0.3 - 0.1) + (0.4 - 0.6) is 2.8e-17 in floats
    (pair,) = make_pairs(make_group(response("a", 0.3, 0.4), response("b", 0.1, 0.6)), BOTH, config(delta=0.1))
    assert (pair.id, pair.gap) == ("a>b", 0.0)


def test_the_same_tokens_stand_once_under_the_first_id() -> None:
    twins = response("b", 5.0, tokens=(7, 8)), response("a", 4.0, tokens=(7, 8))
    group = make_group(twins[0], twins[1], response("c", 1.0), refined=response("d", 9.0, tokens=(7, 8)))
    assert [p.id for p in make_pairs(group, BOTH[:1], config())] == ["a>c"]


def test_cut_blank_and_unscored_responses_enter_no_pair() -> None:
    good, low = response("good", 9.0, 9.0), response("low", 1.0, 1.0)
    blank = Response(id="blank", text=" ", token_ids=(3,), finished=True, scores={"first": 5.0, "second": 5.0})
    cut, unscored = response("cut", 5.0, 5.0, finished=False), response("unscored", 5.0)
    assert [p.id for p in make_pairs(make_group(blank, cut, unscored, low, good), BOTH, config())] == ["good>low"]
    for refined in (blank, cut, unscored, None):
        assert [p.id for p in make_pairs(make_group(low, good, refined=refined), BOTH, config())] == ["good>low"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Objective], PromptGroup]:
    """Scores in steps of 0.5 and bins of whole steps: any two different levels differ by at least 0.5."""
    k = draw(st.integers(1, 3))
    steps = st.integers(0, 20).map(lambda i: i / 2)
    threshold, resolution = st.sampled_from([None, 4.0, 8.5]), st.sampled_from([None, 0.5, 2.0])
    objectives = [objective(name, draw(threshold), draw(resolution)) for name in NAMES[:k]]
    rows = draw(st.lists(st.tuples(st.integers(1, 4), st.tuples(*[steps] * k)), min_size=2, max_size=5))
    answers = [response(f"c{i}", *row, tokens=(i,) * length) for i, (length, row) in enumerate(rows)]
    return objectives, make_group(*answers[1:], refined=answers[0])


@properties
@given(cases(), st.sampled_from([0.4, 3.0]), st.randoms(use_true_random=False))
def test_pairs_do_not_depend_on_the_order_of_input(case: tuple[list[Objective], PromptGroup], delta: float, random: Any) -> None:
    objectives, group = case
    pairs = make_pairs(group, objectives, config(delta))
    assert group.refined is not None
    *others, refined = random.sample([*group.candidates, group.refined], len(group.candidates) + 1)
    assert make_pairs(make_group(*others, refined=refined), objectives, config(delta)) == pairs


@properties
@given(cases())
def test_pairs_are_a_strict_order_and_lack_nothing(case: tuple[list[Objective], PromptGroup]) -> None:
    objectives, group = case
    assert group.refined is not None
    # delta is below the least difference: exactly one pair for any two responses whose levels differ
    wins = {(p.chosen.id, p.rejected.id) for p in make_pairs(group, objectives, config(0.4))}
    everyone = (*usable_candidates(group, objectives), group.refined)
    for a, b in product(everyone, everyone):
        tie = levels(a, objectives) == levels(b, objectives)
        assert ((a.id, b.id) in wins) + ((b.id, a.id) in wins) == (0 if tie else 1)
    for a, b, c in product(everyone, repeat=3):
        if (a.id, b.id) in wins and (b.id, c.id) in wins:
            assert (a.id, c.id) in wins


@properties
@given(cases(), st.sampled_from([0.4, 3.0]))
def test_margin_and_gap(case: tuple[list[Objective], PromptGroup], delta: float) -> None:
    objectives, group = case
    pairs = make_pairs(group, objectives, config(delta))
    for p in pairs:
        up, down = levels(p.chosen, objectives), levels(p.rejected, objectives)
        first = next(j for j in range(len(objectives)) if up[j] != down[j])
        assert (p.decided_by, up[first] > down[first]) == (objectives[first].name, True)
        assert p.margin >= max(p.gap, delta - 1e-9)
        assert p.gap == abs(sum(up) - sum(down))  # exact in steps of 0.5
    assert [p.margin for p in pairs] == sorted((p.margin for p in pairs), reverse=True)


# the cap and the balance


def pair(name: str, length: int, margin: float, prompt: str = "p") -> PreferencePair:
    """A pair whose winner has `length` tokens more (or fewer) than its loser."""
    won, lost = response(name, tokens=(0,) * (10 + length)), response("loser", tokens=(0,) * 10)
    return PreferencePair(Prompt(prompt, ()), won, lost, margin=margin, gap=margin, decided_by="first")


def names(groups: list[list[PreferencePair]]) -> list[str]:
    return [" ".join(p.chosen.id for p in group) for group in groups]


def test_without_cap_and_balance_all_pairs_stay_by_margin() -> None:
    chosen = select_pairs([[pair("a", -1, 1.0), pair("b", -1, 2.0)], []], config())
    assert (names(chosen.pairs), chosen.capped, chosen.unbalanced) == (["b a", ""], 0, 0)


def test_a_plain_cap_keeps_the_greatest_margins() -> None:
    chosen = select_pairs([[pair("s1", -1, 5.0), pair("s2", -1, 4.0), pair("l1", 1, 3.0)]], config(cap=2))
    assert (names(chosen.pairs), chosen.capped, chosen.unbalanced) == (["s1 s2"], 1, 0)


def test_a_balanced_cap_takes_shorter_and_longer_winners_in_turn() -> None:
    pairs = [pair("s1", -1, 9.0), pair("s2", -1, 8.0), pair("s3", -1, 7.0), pair("l1", 1, 2.0), pair("l2", 1, 1.0), pair("n1", 0, 6.0)]
    chosen = select_pairs([pairs], config(cap=4, balance=True))
    assert (names(chosen.pairs), chosen.capped, chosen.unbalanced) == (["s1 s2 l1 l2"], 2, 0)


def test_an_odd_cap_begins_with_the_kind_of_the_greatest_margin() -> None:
    shorter, longer = pair("s", -1, 1.0), pair("l", 1, 2.0)
    assert names(select_pairs([[shorter, longer]], config(cap=1, balance=True)).pairs) == ["l"]
    assert names(select_pairs([[pair("s", -1, 3.0), longer]], config(cap=1, balance=True)).pairs) == ["s"]


def test_pairs_of_equal_length_stand_in_for_the_kind_that_lacks() -> None:
    pairs = [pair("s1", -1, 9.0), pair("s2", -1, 8.0), pair("s3", -1, 7.0), pair("n1", 0, 6.0)]
    # s1, then n1 in a longer one's place, then s2; over the run 2 shorter, 0 longer: s2 goes, then s1; n1 is the last pair
    chosen = select_pairs([pairs], config(cap=3, balance=True))
    assert (names(chosen.pairs), chosen.capped, chosen.unbalanced) == (["n1"], 1, 2)


def test_the_balance_takes_the_least_margins_of_the_frequent_kind_over_the_whole_run() -> None:
    groups = [[pair("s1", -1, 5.0), pair("s2", -1, 1.0)], [pair("s3", -1, 4.0), pair("s4", -1, 3.0), pair("l1", 1, 0.6)], []]
    # 4 shorter, 1 longer: three have to go: s2 (1.0), s4 (3.0), s3 (4.0; l1 stays behind)
    chosen = select_pairs(groups, config(balance=True))
    assert (names(chosen.pairs), chosen.capped, chosen.unbalanced) == (["s1", "l1", ""], 0, 3)


def test_a_group_never_loses_its_last_pair_for_its_length() -> None:
    # s1 has the least margin of all, and is all that its group has; s3 goes instead; then only last pairs remain
    groups = [[pair("s1", -1, 0.5)], [pair("s2", -1, 4.0), pair("s3", -1, 3.0)]]
    chosen = select_pairs(groups, config(balance=True))
    assert (names(chosen.pairs), chosen.unbalanced) == (["s1", "s2"], 1)


selections = st.lists(st.lists(st.tuples(st.integers(-2, 2), st.integers(1, 5)), max_size=6), max_size=4)


@properties
@given(selections, st.none() | st.integers(1, 4), st.booleans(), st.randoms(use_true_random=False))
def test_selection(spec: list[list[tuple[int, int]]], cap: int | None, balance: bool, random: Any) -> None:
    groups = [[pair(f"{g}-{i}", n, float(m), str(g)) for i, (n, m) in enumerate(rows)] for g, rows in enumerate(spec)]
    chosen = select_pairs(groups, config(cap=cap, balance=balance))
    assert len(chosen.pairs) == len(groups)
    for given_pairs, kept in zip(groups, chosen.pairs, strict=True):
        assert all(p in given_pairs for p in kept)
        assert len({p.id for p in kept}) == len(kept)
        assert bool(kept) == bool(given_pairs)
        assert cap is None or len(kept) <= cap
    assert sum(map(len, groups)) - sum(map(len, chosen.pairs)) == chosen.capped + chosen.unbalanced
    if balance:
        lengths = [[len(p.chosen.token_ids) - 10 for p in kept] for kept in chosen.pairs]
        shorter, longer = sum(n < 0 for ns in lengths for n in ns), sum(n > 0 for ns in lengths for n in ns)
        frequent = (lambda n: n < 0) if shorter > longer else (lambda n: n > 0)
        assert shorter == longer or all(len(ns) == 1 for ns in lengths if any(map(frequent, ns)))
    else:
        assert chosen.unbalanced == 0
    shuffled = [random.sample(rows, len(rows)) for rows in groups]
    assert select_pairs(shuffled[::-1], config(cap=cap, balance=balance)).pairs == chosen.pairs[::-1]


# Eq. 3


def test_weights_by_hand() -> None:
    assert weights([1.0, 2.0, 3.0], 1.0) == [0.5, 1.0, 1.5]  # mean 2
    assert weights([1.0, 2.0, 3.0], 2.0) == [0.25, 1.0, 2.25]
    assert weights([0.0, 4.0], 0.5) == [0.0, math.sqrt(2)]
    assert weights([0.0, 4.0], 0.0) == [1.0, 1.0]
    assert weights([0.0, 0.0], 0.0) == [1.0, 1.0]
    assert weights([], 1.0) == []


def test_weights_of_a_batch_without_any_gap_say_what_to_do() -> None:
    with pytest.raises(DataError, match="gap 0") as caught:
        weights([0.0, 0.0], 1.0)
    assert "train.alpha=0" in caught.value.hint


@pytest.mark.parametrize("wrong", [-0.5, math.nan, math.inf])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_weights_refuse_impossible_gaps(wrong: float, alpha: float) -> None:
    with pytest.raises(DataError, match="gap is"):
        weights([1.0, wrong], alpha)


@properties
@given(st.lists(st.floats(0.001, 20), min_size=1, max_size=8), st.floats(0, 3), st.floats(0.1, 10))
def test_weights_rise_with_the_gap_and_do_not_depend_on_its_unit(gaps: list[float], alpha: float, unit: float) -> None:
    own = weights(gaps, alpha)
    assert own == pytest.approx(weights([g * unit for g in gaps], alpha), rel=1e-9)
    assert weights(gaps, 0.0) == [1.0] * len(gaps)
    assert math.isclose(math.fsum(weights(gaps, 1.0)), len(gaps), rel_tol=1e-12)
    assert all(own[i] <= own[j] for i in range(len(gaps)) for j in range(len(gaps)) if gaps[i] <= gaps[j])


# baselines


def test_a_weighted_sum_orders_by_the_mean_and_not_by_priority() -> None:
    group = make_group(response("a", 6.0, 1.0), response("b", 5.0, 4.0))
    weighted = config().model_copy(update={"weights": (1.0, 1.0)})
    # means a 3.5, b 4.5: b > a; margin 1 + 3 and gap |3 - 1| as by priority, where a > b; the second's lead decides
    assert [(p.id, p.margin, p.gap, p.decided_by) for p in make_pairs(group, BOTH, weighted)] == [("b>a", 4.0, 2.0, "second")]
    assert [p.id for p in make_pairs(group, BOTH, config())] == ["a>b"]


@pytest.mark.parametrize(("weights_", "winner"), [((1.0, 0.0), "a"), ((0.0, 2.0), "b")])
def test_a_weight_of_zero_leaves_one_objective(weights_: tuple[float, float], winner: str) -> None:
    group = make_group(response("a", 6.0, 1.0), response("b", 5.0, 4.0))
    (pair,) = make_pairs(group, BOTH, config().model_copy(update={"weights": weights_}))
    assert pair.chosen.id == winner
    assert pair.margin == (1.0 if winner == "a" else 3.0)


@properties
@given(st.lists(st.tuples(*[st.integers(0, 10).map(float)] * 2), min_size=2, max_size=6))
def test_equal_weights_pair_what_priority_pairs_but_for_ties(rows: list[tuple[float, float]]) -> None:
    group = make_group(*(response(f"c{i}", *row) for i, row in enumerate(rows)))
    mine = {frozenset(p.id.split(">")): p for p in make_pairs(group, BOTH, config())}
    for pair in make_pairs(group, BOTH, config().model_copy(update={"weights": (2.0, 2.0)})):
        same = mine[frozenset(pair.id.split(">"))]
        assert (pair.margin, pair.gap) == (pytest.approx(same.margin), pytest.approx(same.gap))


@properties
@given(st.lists(st.tuples(*[st.floats(0, 10)] * 2), min_size=2, max_size=6))
def test_only_the_refined_response_wins_where_that_is_asked_for(rows: list[tuple[float, float]]) -> None:
    group = make_group(*(response(f"c{i}", *row) for i, row in enumerate(rows[1:])), refined=response("r", *rows[0]))
    every = make_pairs(group, BOTH, config())
    asked = make_pairs(group, BOTH, config().model_copy(update={"chosen": "refined"}))
    assert asked == [p for p in every if p.chosen.id == "r"]
