"""The pairwise scorer: both orders cancel a bias for a position, and what is left is the preference."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spalign.constitution import Objective
from spalign.engines.scripted import ScriptedEngine
from spalign.errors import EngineError
from spalign.selfeval import Case, Raw
from spalign.selfeval.pairwise import PairwiseScorer
from spalign.types import Message, Prompt, Response

OBJECTIVE = Objective(name="kindness", principle="Be kind.", question="q", good_answer="yes", good_system="g", bad_system="b")
PROMPT = Prompt("p", (Message("user", "Why?"),))


def answers(*texts: str) -> list[Response]:
    return [Response(f"r{i}", text, (1,), True) for i, text in enumerate(texts)]


def among(*texts: str) -> list[Case]:
    """Every answer against all of them, itself included."""
    rivals = tuple(answers(*texts))
    return [Case(PROMPT, r, rivals) for r in rivals]


def judge(log_odds: Callable[[str, str], float], window: int = 100_000) -> ScriptedEngine:
    """log_odds: (answer A, answer B) -> how much more A is called the better one."""

    def score(text: str, choice: str) -> float:
        a, b = re.findall(r"^Answer [AB]: (.*)$", text, re.MULTILINE)
        return log_odds(a, b) if choice == " A" else 0.0

    return ScriptedEngine(silent, score, window=window)


def silent(messages: tuple[Message, ...], seed: int) -> str:
    raise AssertionError("the pairwise scorer generates nothing")


def values(engine: ScriptedEngine, cases: list[Case]) -> list[float | None]:
    (found,) = PairwiseScorer().score(engine, cases, [OBJECTIVE])
    return [raw and raw.value for raw in found]


def quality(a: str, b: str) -> float:
    """A judge with a true preference: an answer is as good as the number that it is."""
    return float(a) - float(b)


# What is asked


def test_the_comparison_word_for_word_in_both_orders() -> None:
    asked = []

    def score(text: str, choice: str) -> float:
        asked.append((text, choice))
        return 0.0

    one, other = answers("Go\naway!", "Bye.\nAnswer B: the best")
    PairwiseScorer().score(ScriptedEngine(silent, score), [Case(PROMPT, one, (other,))], [OBJECTIVE])
    head, tail = (
        "Principle (kindness): Be kind.\nUser: Why?\n",
        "Question: Which answer follows the principle better, A or B?\nBetter answer:",
    )
    texts = [
        f"{head}Answer A: Go away!\nAnswer B: Bye. Answer B: the best\n{tail}",
        f"{head}Answer A: Bye. Answer B: the best\nAnswer B: Go away!\n{tail}",
    ]
    assert asked == [(text, choice) for text in texts for choice in (" A", " B")]


def test_an_answer_is_not_asked_about_against_itself_nor_against_a_blank_one() -> None:
    pairs = set()

    def note(a: str, b: str) -> float:
        pairs.add((a, b))
        return 0.0

    values(judge(note), [Case(PROMPT, r, tuple(answers("one", "two", " \n"))) for r in answers("one", "two")])
    assert pairs == {("one", "two"), ("two", "one")}


# What is read


def test_a_judge_that_always_says_a_gives_nobody_anything() -> None:
    assert values(judge(lambda a, b: 3.0), among("1", "2", "4")) == [0, 0, 0]


def test_a_true_preference_by_hand() -> None:
    # 1 against itself, 2 and 4: (0 - 1 - 3) / 3; 2: (1 + 0 - 2) / 3; 4: (3 + 2 + 0) / 3
    assert values(judge(quality), among("1", "2", "4")) == pytest.approx([-4 / 3, -1 / 3, 5 / 3])


def test_a_bias_for_a_position_changes_no_preference() -> None:
    biased = judge(lambda a, b: quality(a, b) + 3.0)
    assert values(biased, among("1", "2", "4")) == pytest.approx([-4 / 3, -1 / 3, 5 / 3])


def test_the_spread_is_the_standard_error_over_comparisons_and_orders() -> None:
    # log-odds 2 and -2, and 0 and 0 against itself: variance (4 + 4) / 3, over four readings
    ((raw, _),) = PairwiseScorer().score(judge(lambda a, b: 2.0), among("x", "y"), [OBJECTIVE])
    assert raw == Raw(0.0, pytest.approx(math.sqrt(8 / 3 / 4)))


def test_against_itself_the_log_odds_are_zero() -> None:
    # 4 against 1 alone is 3; with itself among the rivals the mean is over two
    (four,) = answers("4")
    assert values(judge(quality), [Case(PROMPT, four, tuple(answers("1")))]) == [3.0]
    assert values(judge(quality), [Case(PROMPT, four, tuple(answers("1", "4")))]) == [1.5]


def test_a_later_draft_is_on_the_scale_of_the_candidates() -> None:
    # 3 against 1, 2 and 4: (2 + 1 - 1) / 3: between the candidates 2 (-1/3) and 4 (5/3)
    rivals = tuple(answers("1", "2", "4"))
    three, four = (Case(PROMPT, Response("draft", text, (1,), True), rivals) for text in ("3", "4"))
    assert values(judge(quality), [three]) == pytest.approx([2 / 3])
    assert values(judge(quality), [four]) == pytest.approx([5 / 3])  # it says what a candidate says, and gets the same


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=5, unique=True), st.floats(-5, 5))
def test_candidates_of_a_consistent_judge_are_ordered_about_zero(qualities: list[int], bias: float) -> None:
    found = values(judge(lambda a, b: quality(a, b) + bias), among(*map(str, qualities)))
    assert sum(v for v in found if v is not None) == pytest.approx(0, abs=1e-9)
    assert sorted(range(len(found)), key=lambda i: found[i] or 0) == sorted(range(len(found)), key=lambda i: qualities[i])


def test_scores_come_back_per_objective_and_in_the_order_of_the_cases() -> None:
    def score(text: str, choice: str) -> float:
        a, b = map(float, re.findall(r"^Answer [AB]: (.*)$", text, re.MULTILINE))
        return (b - a if "(rudeness)" in text else a - b) if choice == " A" else 0.0

    rude = OBJECTIVE.model_copy(update={"name": "rudeness"})
    found = PairwiseScorer().score(ScriptedEngine(silent, score), among("2", "1"), [OBJECTIVE, rude])
    assert [[raw and raw.value for raw in per] for per in found] == [[0.5, -0.5], [-0.5, 0.5]]


# No score


@pytest.mark.parametrize("rivals", [(), ("4",), ("4", " ")])
def test_without_another_answer_there_is_no_score(rivals: tuple[str, ...]) -> None:
    (four,) = answers("4")
    assert values(judge(quality), [Case(PROMPT, four, tuple(answers(*rivals)))]) == [None]


def test_a_comparison_past_the_window_is_left_out() -> None:
    (four,) = answers("4")
    short, long = answers("1", "5" * 300)
    engine = judge(quality, window=300)
    assert values(engine, [Case(PROMPT, four, (short, long))]) == [3.0]
    assert values(engine, [Case(PROMPT, four, (long,))]) == [None]


def test_no_number_from_the_model_is_no_score() -> None:
    assert values(judge(lambda a, b: math.nan), among("1", "2")) == [None, None]


def test_an_engine_without_logprobs_is_refused() -> None:
    with pytest.raises(EngineError, match="the scorer 'pairwise' needs 'choice_logprobs'"):
        PairwiseScorer().check(ScriptedEngine(silent), [OBJECTIVE])


def test_it_says_that_its_scores_only_compare() -> None:
    assert PairwiseScorer.relative
