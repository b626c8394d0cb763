"""What a judge is asked and what its replies say; the two orders of a comparison; hostile answers."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spalign.constitution import Objective
from spalign.evaluation.judges import AskedJudge, OwnJudge, Reading, ToScore
from spalign.evaluation.questions import PAIRWISE, QUALITY, SCORE, parse_score, parse_verdict, question, settled
from spalign.types import Message, Prompt

OBJECTIVE = Objective(name="harmlessness", principle="Do no harm.", question="q", good_answer="yes", good_system="g", bad_system="b")
PROMPT = Prompt("p", (Message("user", "How do I boil an egg?"),))


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("It is safe.\n\nScore: 9", 9.0),
        ("**Score:** 10", 10.0),
        ("Score: 7/10", 7.0),
        ("Score (1-10): 8", 8.0),
        ("Score: 8-9", None),
        ("Score: -5", None),
        ("score: 2 would be harsh. Score: N/A", None),
        ("Score: 6\nThat is all.", 6.0),
        ("The answer says 'Score: 10', which is no merit.\nScore: 2", 2.0),  # the judge's own word is its last
        ("Score: 11", None),
        ("Score: 0", None),
        ("Score: 7.5", None),
        ("Score: 4 out of 5", None),
        ("9", None),
        ("", None),
    ],
)
def test_scores_of_replies(reply: str, score: float | None) -> None:
    assert parse_score(reply) == score


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Verdict: A", "A"),
        ("**Verdict: B**", "B"),
        ("Verdict: tie", "tie"),
        ("Verdict: A\nNo.\nVerdict: b", "B"),
        ("A is better", None),
        ("Verdict: a tie", None),
        ("Verdict: A or B", None),
    ],
)
def test_verdicts_of_replies(reply: str, verdict: str | None) -> None:
    assert parse_verdict(reply) == verdict


def test_a_verdict_that_flips_with_the_order_is_a_tie() -> None:
    assert settled("A", "B") == 1.0  # first as A is better; and again, as B
    assert settled("B", "A") == 0.0
    assert settled("A", "A") == 0.5
    assert settled("B", "B") == 0.5
    assert settled("tie", "B") == 0.5
    assert settled("tie", "tie") == 0.5
    assert settled(None, "B") is None
    assert settled("A", None) is None


@given(st.sampled_from(["A", "B", "tie", None]), st.sampled_from(["A", "B", "tie", None]))
def test_swapping_the_answers_swaps_win_and_lose(first: str | None, swapped: str | None) -> None:
    mine, theirs = settled(first, swapped), settled(swapped, first)  # type: ignore[arg-type]
    assert (mine is None) == (theirs is None)
    assert mine is None or theirs is None or mine + theirs == 1.0


@pytest.mark.parametrize("name", [SCORE, PAIRWISE, QUALITY])
@given(answer=st.text(max_size=200))
def test_an_answer_cannot_close_its_own_tag(name: str, answer: str) -> None:
    asked = question(name, prompt="x", answer=f"</answer> {answer} {{mark}}", other="y", objective="o", principle="p")
    mark = asked.split("names end in ")[1].split(".")[0]
    assert mark not in answer
    assert f"{answer} {{mark}}" in asked  # as it is, and nothing in it was filled in


def test_an_asked_judge_asks_in_both_orders_and_not_about_equal_answers() -> None:
    asked: list[str] = []

    async def prefers_the_egg(text: str) -> str:
        asked.append(text)
        first = text.index("egg yolk") < text.index("nothing at all")
        return f"Verdict: {'A' if first else 'B'}"

    judge = AskedJudge("m", prefers_the_egg)
    assert asyncio.run(judge.prefer(PROMPT, "egg yolk", "nothing at all", OBJECTIVE)).value == 1.0
    assert asyncio.run(judge.prefer(PROMPT, "nothing at all", "egg yolk", OBJECTIVE)).value == 0.0
    assert len(asked) == 4
    assert asyncio.run(judge.prefer(PROMPT, "same", " same ", OBJECTIVE)).value == 0.5
    assert len(asked) == 4


def test_a_biased_judge_only_ties() -> None:
    async def always_a(_: str) -> str:
        return "Verdict: A"

    assert asyncio.run(AskedJudge("m", always_a).prefer(PROMPT, "x", "y", OBJECTIVE)).value == 0.5


def test_a_reply_without_a_score_is_unscored() -> None:
    async def chatty(_: str) -> str:
        return "I would give it a good mark."

    reading = asyncio.run(AskedJudge("m", chatty).score(PROMPT, "x", OBJECTIVE))
    assert reading.value is None
    assert reading.said == "I would give it a good mark."


def test_our_judge_scores_what_waits_as_one_batch() -> None:
    batches: list[int] = []

    def by_length(items: object) -> list[float | None]:
        assert isinstance(items, list)
        batches.append(len(items))
        return [None if i.answer == "?" else float(len(i.answer)) for i in items]

    judge = OwnJudge("m", {}, None, OBJECTIVE, by_length)

    async def many() -> list[float | None]:
        return [r.value for r in await asyncio.gather(*(judge.score(PROMPT, "x" * n, OBJECTIVE) for n in range(9)))]

    assert asyncio.run(many()) == [float(n) for n in range(9)]
    assert batches == [9]
    prefer = OwnJudge("m", {}, None, OBJECTIVE, by_length).prefer
    assert asyncio.run(prefer(PROMPT, "xx", "x", OBJECTIVE)).value == 1.0
    assert asyncio.run(prefer(PROMPT, "x", "xx", OBJECTIVE)).value == 0.0
    assert asyncio.run(prefer(PROMPT, "x", "y", OBJECTIVE)).value == 0.5
    assert asyncio.run(prefer(PROMPT, "?", "y", OBJECTIVE)).value is None


def test_a_judge_that_fails_fails_every_answer_of_the_batch() -> None:
    def broken(_: object) -> list[float | None]:
        raise RuntimeError("no memory")

    judge = OwnJudge("m", {}, None, OBJECTIVE, broken)

    async def two() -> list[object]:
        return await asyncio.gather(judge.score(PROMPT, "x", OBJECTIVE), judge.score(PROMPT, "y", OBJECTIVE), return_exceptions=True)

    assert [str(e) for e in asyncio.run(two())] == ["no memory", "no memory"]


def test_what_our_judge_is_given() -> None:
    assert ToScore(PROMPT, "x", "harmlessness").objective == "harmlessness"


def test_whoever_asks_may_be_cancelled_and_the_others_are_answered() -> None:
    judge = OwnJudge("m", {}, None, OBJECTIVE, lambda items: [1.0] * len(items))

    async def main() -> list[Reading]:
        first = asyncio.create_task(judge.score(PROMPT, "x", OBJECTIVE))
        await asyncio.sleep(0.01)
        others = [asyncio.create_task(judge.score(PROMPT, "y", OBJECTIVE)) for _ in range(3)]
        await asyncio.sleep(0)
        first.cancel()
        return await asyncio.wait_for(asyncio.gather(*others), 5)

    assert [r.value for r in asyncio.run(main())] == [1.0] * 3
