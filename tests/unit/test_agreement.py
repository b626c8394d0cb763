"""Two judges on the same answers: RV coefficient by hand, agreement within prompts, and where the curve breaks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spalign.constitution import Objective
from spalign.evaluation.agreement import agreement, rv_coefficient
from spalign.types import Message, Prompt, PromptGroup, Response

OBJECTIVES = [
    Objective(name=n, principle="p", question="q?", good_answer="yes", good_system="g", bad_system="b") for n in ("alpha", "beta")
]


def group(i: int, scores: list[tuple[float, float]]) -> PromptGroup:
    answers = tuple(Response(f"{i}-{j}", "text", (1,), True, scores={"alpha": a, "beta": b}) for j, (a, b) in enumerate(scores))
    return PromptGroup(Prompt(str(i), (Message("user", "x"),)), answers)


def test_rv_of_one_column_is_the_squared_correlation():
    x, y = np.array([[1.0], [2.0], [4.0]]), np.array([[2.0], [1.0], [5.0]])
    assert rv_coefficient(x, y) == pytest.approx(np.corrcoef(x[:, 0], y[:, 0])[0, 1] ** 2)


def test_rv_by_hand():
    # columns uncorrelated and of equal size: Sxx = 4 I, Syy = 4 diag(1, 0); Sxy = [[4, 0], [0, 0]]: 16 / sqrt(32 * 16)
    x = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    y = x * np.array([1.0, 0])
    assert rv_coefficient(x, y) == pytest.approx(16 / math.sqrt(32 * 16))


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=12), st.floats(0.1, 9), st.floats(0, 6.28))
def test_rv_of_a_rotated_scaled_shifted_copy_is_one(points, factor, angle):
    x = np.array(points)
    if x.std(0).max() < 1e-3:
        return
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    assert rv_coefficient(x, factor * x @ turn + 3) == pytest.approx(1, abs=1e-6)


def test_a_constant_judge_has_no_rv():
    assert math.isnan(rv_coefficient(np.ones((4, 2)), np.arange(8.0).reshape(4, 2)))


def test_agreement_within_prompts_by_hand():
    own = [group(0, [(1, 1), (2, 2), (3, 3)]), group(1, [(5, 1), (5, 2)])]
    reference = [group(0, [(1, 3), (2, 2), (3, 1)]), group(1, [(6, 1), (7, 9)])]
    found = agreement(own, reference, OBJECTIVES, ddof=1, scale=10.0)
    assert (found["prompts"], found["answers"]) == (2, 5)
    assert found["objectives"]["alpha"]["within"] == 1.0, "the pair that one judge calls equal does not count"
    assert found["objectives"]["beta"]["within"] == 1 / 4  # all three of prompt 0 reversed, that of prompt 1 alike


def test_unscored_answers_and_prompts_with_one_answer_are_left_out():
    lone = group(1, [(5, 1)])
    half = PromptGroup(lone.prompt, (*lone.candidates, Response("x", "text", (1,), True, scores={"alpha": 3})))
    found = agreement([group(0, [(1, 1), (2, 2)]), half], [group(0, [(1, 1), (2, 2)]), half], OBJECTIVES, ddof=1, scale=10.0)
    assert (found["prompts"], found["answers"]) == (1, 2)
    assert agreement([half], [half], OBJECTIVES, ddof=1, scale=10.0)["prompts"] == 0


def test_tau_is_proposed_where_agreement_breaks():
    rng = np.random.default_rng(0)
    own, reference = [], []
    for i in range(100):
        wide = 0.2 + 4 * i / 100
        scores = 5 + rng.uniform(-wide, wide, (40, 2)).clip(-5, 5)
        noise = 0.02 if i < 60 else 4.0  # the reference agrees on the 60 prompts whose scores scatter least
        own.append(group(i, scores.tolist()))
        reference.append(group(i, (scores + rng.normal(0, noise, scores.shape)).tolist()))
    found = agreement(own, reference, OBJECTIVES, ddof=1, scale=10.0)
    proposed = found["proposed"]
    assert proposed is not None
    assert 0.5 <= proposed["share"] <= 0.8
    same = agreement(own, own, OBJECTIVES, ddof=1, scale=10.0)
    assert same["proposed"] is None
    assert same["rv"][-1][1] == pytest.approx(1)
