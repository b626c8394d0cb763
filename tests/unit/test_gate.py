"""The priority gate: numbers by hand, and what must hold for any scores."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spalign.config import GateConfig
from spalign.errors import ConfigError
from spalign.evaluation import GateResult, compare, primary_gate, priority_gate
from spalign.types import Message, Prompt, PromptGroup, Response

score = st.integers(0, 1000).map(lambda i: i / 100)
pair = st.tuples(st.none() | score, st.none() | score)


def gate(before, after, margin=0.5, confidence=0.95, resamples=200, seed=0) -> GateResult:
    return priority_gate(before, after, margin=margin, confidence=confidence, resamples=resamples, seed=seed)


def of(differences, **changes) -> GateResult:
    return gate([5.0] * len(differences), [5.0 + d for d in differences], **changes)


# by hand


def test_equal_scores_hold():
    r = gate([3.0, 7.0, 5.0], [3.0, 7.0, 5.0])
    assert r == GateResult("held", 0.0, 0.0, 0.5, 0.95, 3, 0)
    assert r.passed


@pytest.mark.parametrize(("fall", "verdict"), [(0.25, "held"), (0.5, "lost"), (1.0, "lost")])
def test_an_even_fall_is_its_own_bound(fall, verdict):
    """All differences are alike, so every resample has the same mean. A fall by the whole margin is lost: lower > -margin is strict."""
    r = gate([5.0] * 10, [5.0 - fall] * 10)
    assert (r.difference, r.lower, r.verdict) == (-fall, -fall, verdict)


def test_the_bound_of_two_prompts():
    """Differences -1 and +3: a resample of two has mean -1, 1 or 3 with probability 1/4, 1/2, 1/4. The mean is 1; the 5% quantile lies in
    the lowest quarter: -1. At confidence 0.6 the 40% quantile lies in the middle half: 1."""
    wide = of([-1.0, 3.0], margin=0.5, resamples=2000)
    assert (wide.difference, wide.lower, wide.verdict) == (1.0, -1.0, "not shown")
    assert of([-1.0, 3.0], margin=0.5, confidence=0.6, resamples=2000).lower == 1.0
    assert of([-1.0, 3.0], margin=1.5, resamples=2000).verdict == "held"


def test_the_bound_is_one_sided():
    """400 differences of -1 or +1, as many of each: the mean of a resample has deviation 1/20, and the normal 5% quantile is 1.645 of those
    below the mean: -0.082, not the two-sided -0.098."""
    r = of([-1.0, 1.0] * 200, resamples=20_000)
    assert r.lower == pytest.approx(-1.645 / 20, abs=0.006)


def test_it_lost_or_it_is_not_shown():
    # mean -0.8 < -0.5: it fell, however wide the interval
    assert of([-3.0, 1.4]).verdict == "lost"
    # mean -0.2 > -0.5, and one resample in four has mean -2: too wide to tell
    r = of([-2.0, 1.6], resamples=2000)
    assert (r.verdict, r.lower) == ("not shown", -2.0)
    assert not r.passed


def test_unscored_prompts_are_left_out_and_counted():
    r = gate([5.0, None, 5.0, 5.0, float("nan")], [4.0, 9.0, None, 6.0, 5.0], margin=3)
    assert (r.prompts, r.unscored, r.difference) == (2, 3, 0.0)


@pytest.mark.parametrize("scores", [[], [None], [None, None, None]])
def test_without_any_scored_prompt_it_is_no_pass(scores):
    r = gate(scores, scores)
    assert (r.passed, r.verdict, r.difference, r.lower) == (False, "not shown", None, None)
    assert (r.prompts, r.unscored) == (0, len(scores))
    assert "alpha not scored before and after on any prompt" in r.text("alpha")


def test_one_prompt_shows_nothing_though_its_bootstrap_has_no_spread():
    assert of([2.0]).verdict == "not shown"
    assert of([-2.0]).verdict == "lost"


def test_a_model_whose_answers_cannot_be_scored_does_not_pass_on_the_few_that_can():
    before = [5.0] * 10
    assert gate(before, [5.0] * 5 + [None] * 5).verdict == "held"
    assert gate(before, [5.0] * 4 + [None] * 6).verdict == "not shown"


def test_how_many_prompts_would_do():
    """Width of the bound 1.8, room 0.3 down to the margin: 36 times as many prompts bring it to 0.3, and one more below that."""
    r = GateResult("not shown", -0.2, -2.0, 0.5, 0.95, 10, 0)
    assert r.wanted_prompts() == pytest.approx(361, abs=1)  # 1.8 and 0.3 are not exact
    assert GateResult("held", 0.1, 0.0, 0.5, 0.95, 10, 0).wanted_prompts() is None
    assert GateResult("lost", -1.0, -2.0, 0.5, 0.95, 10, 0).wanted_prompts() is None
    assert GateResult("not shown", -0.4999999, -2.0, 0.5, 0.95, 10, 0).wanted_prompts() is None  # no sensible number
    assert GateResult("not shown", 0.0, 0.0, 0.5, 0.95, 4, 6).wanted_prompts() is None  # it is scores that lack


def test_the_text_has_the_figures():
    assert GateResult("held", 0.3, -0.117, 0.5, 0.95, 48, 0).text("harm") == (
        "harm +0.30, one-sided 95% lower bound -0.12 on 48 prompts; must stay above -0.5"
    )
    assert "on 46 prompts (2 more not scored on both sides)" in GateResult("held", 0.3, 0.1, 0.5, 0.95, 46, 2).text("harm")


def test_a_list_of_other_length_is_a_mistake():
    with pytest.raises(ValueError, match="zip"):
        gate([1.0, 2.0], [1.0])


def test_a_loss_of_the_margin_passes_one_time_in_twenty():
    """48 prompts whose true difference is -0.5, the margin: the chance to pass is what confidence leaves, 5%; 400 trials have deviation
    1.1%, and a percentile interval of 48 values is slightly too narrow."""
    rng = random.Random(3)
    passed = sum(of([rng.gauss(-0.5, 1.7) for _ in range(48)], resamples=400, seed=i).passed for i in range(400))
    assert 400 * 0.02 <= passed <= 400 * 0.095


# for any scores


@given(st.lists(pair, min_size=1, max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_prompts_does_not_matter(pairs, rng):
    shuffled = pairs[:]
    rng.shuffle(shuffled)
    assert gate(*zip(*pairs, strict=True)) == gate(*zip(*shuffled, strict=True))


@given(st.lists(st.tuples(score, score), min_size=1, max_size=12), st.floats(-5, 5))
@settings(max_examples=60, deadline=None)
def test_a_constant_shift_raises_the_bound_by_as_much(pairs, shift):
    before, after = zip(*pairs, strict=True)
    one, other = gate(before, after), gate(before, [y + shift for y in after])
    assert other.difference == pytest.approx(one.difference + shift, abs=1e-9)
    assert other.lower == pytest.approx(one.lower + shift, abs=1e-9)


@given(st.lists(pair, min_size=1, max_size=12), st.floats(0.01, 10), st.floats(0.01, 10))
@settings(max_examples=60, deadline=None)
def test_what_passes_passes_a_wider_margin(pairs, a, b):
    narrow, wide = (gate(*zip(*pairs, strict=True), margin=m) for m in sorted((a, b)))
    assert wide.passed or not narrow.passed
    assert narrow.verdict == "lost" or wide.verdict != "lost"


@given(st.lists(pair, min_size=1, max_size=12), st.floats(0.5, 0.99), st.floats(0.5, 0.99))
@settings(max_examples=60, deadline=None)
def test_more_confidence_never_raises_the_bound(pairs, a, b):
    assume(any(None not in p for p in pairs))
    bold, careful = (gate(*zip(*pairs, strict=True), confidence=c) for c in sorted((a, b)))
    assert careful.lower <= bold.lower
    assert bold.passed or not careful.passed


@given(st.lists(pair, min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_what_passes_has_its_mean_and_its_bound_above_the_margin(pairs):
    r = gate(*zip(*pairs, strict=True))
    assert r.prompts + r.unscored == len(pairs)
    if r.passed:
        assert r.difference > -0.5
        assert r.lower > -0.5
        assert r.prompts >= 2


# of groups, and in the comparison


def group(pid: str, *scores: float | None) -> PromptGroup:
    answers = tuple(Response(f"{pid}/{i}", "a b", (5, 2), True, scores={} if s is None else {"harm": s}) for i, s in enumerate(scores))
    return PromptGroup(Prompt(pid, (Message("user", "q"),)), candidates=answers)


def test_a_prompt_counts_once_by_the_mean_of_its_scored_answers():
    before = [group("a", 4.0, 6.0), group("b", 3.0, None), group("c", None, None)]
    after = [group("a", 6.0, 6.0), group("b", 2.0, 2.0), group("c", 9.0, 9.0)]
    # a: 5 -> 6, b: 3 -> 2 (the unscored answer is left out), c has no score before: mean 0 over two prompts
    r = primary_gate(before, after, "harm", GateConfig(margin=2), resamples=200, seed=0)
    assert (r.difference, r.prompts, r.unscored, r.margin) == (0.0, 2, 1, 2)


def test_the_comparison_asks_the_same_gate():
    before, after = [group("a", 5.0), group("b", 5.0)], [group("a", 4.0), group("b", 4.0)]
    for config in (GateConfig(margin=2), GateConfig(margin=0.25)):
        check = compare(before, after, ["harm"], resamples=200, seed=0, gate=config).checks[0]
        r = primary_gate(before, after, "harm", config, resamples=200, seed=0)
        assert (check.name, check.passed, check.text) == ("primary holds", r.passed, r.text("harm"))
        assert check.passed == (config.margin == 2)


@pytest.mark.parametrize("changes", ["margin=0", "margin=-1", "margin=11", "confidence=1", "confidence=0.4", "enabled=maybe"])
def test_settings_that_make_no_gate_are_refused(changes):
    from spalign.config import config_from

    with pytest.raises(ConfigError, match=r"evaluation\.gate"):
        config_from({"name": "x"}, (f"evaluation.gate.{changes}",))
