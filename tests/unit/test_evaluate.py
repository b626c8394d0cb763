"""From what scorers read to scores on responses: the ensemble by hand, what is asked how often, and what stays unscored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import get_args

import pytest

from spalign.config import Scorer
from spalign.constitution import Exemplar, Objective
from spalign.engines.base import Ask, Completion, GenerateRequest
from spalign.engines.scripted import ScriptedEngine
from spalign.errors import ConstitutionError, EngineError
from spalign.selfeval import ENSEMBLE, PROBE, SCORERS, Case, Judgement, Raw, check_scorers, score_groups, score_responses
from spalign.selfeval.evaluate import all_scorers, cases_of, ensemble
from spalign.selfeval.judge import Calibration, Member
from spalign.types import Message, Prompt, PromptGroup, Response

EXEMPLARS = (Exemplar(prompt="Hi.", response="Go away!", answer="no"), Exemplar(prompt="Bye.", response="See you!", answer="yes"))


def objective(name: str, good_answer: str = "yes", exemplars: tuple[Exemplar, ...] = EXEMPLARS) -> Objective:
    text = {"principle": f"Be {name}.", "question": f"Is it {name}?", "good_system": f"good {name}", "bad_system": "b"}
    return Objective.model_validate({"name": name, "good_answer": good_answer, "exemplars": exemplars, **text})


FIRST, SECOND = objective("first"), objective("second", "no")
BOTH = (FIRST, SECOND)
ZERO = Judgement.unchecked("yes_no_zero")
LIKERT = Judgement.unchecked("likert")
PAIR = Judgement(scorer=ENSEMBLE, members={"yes_no_zero": Member(mean=1, deviation=2), "likert_expected": Member(mean=5, deviation=2.5)})


def response(text: str, id: str = "r", finished: bool = True) -> Response:
    return Response(id, text, (1,), finished)


def case(text: str, id: str = "r", *rivals: Response) -> Case:
    return Case(Prompt("p", (Message("user", "Hello?"),)), response(text, id), rivals)


def no_reply(messages: tuple[Message, ...], seed: int) -> str:
    raise AssertionError("nothing is to be generated here")


class Counting(ScriptedEngine):
    """Notes every call with what is asked. The log-odds of yes are the number that an answer is; of the digits, all are 9."""

    def __init__(self, odds: Callable[[str], float] = float, reply: Callable[[str], str] = str) -> None:
        self.calls: list[list[str]] = []

        def answer(text: str) -> str:
            return text.rsplit("Assistant: ", 1)[1].split("\n", maxsplit=1)[0]

        def score(text: str, choice: str) -> float:
            if choice.strip() in ("Yes", "No"):
                return odds(answer(text)) if choice.strip() == "Yes" else 0.0
            return 0.0 if choice == "9" else -1000.0

        super().__init__(lambda messages, seed: reply(answer(messages[0].content)), score, lambda context, text: -1.0)

    def choice_logprobs(self, asks: Sequence[Ask], choices: Sequence[str]) -> list[tuple[float, ...] | None]:
        self.calls.append([a if isinstance(a, str) else a[-1].content for a in asks])
        return super().choice_logprobs(asks, choices)

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        self.calls.append([r.messages[-1].content for r in requests])
        return super().generate(requests)

    @property
    def asked(self) -> str:
        return "\n".join(text for call in self.calls for text in call)


# The ensemble


MEMBERS = {"a": Member(mean=1.0, deviation=2.0), "b": Member(mean=0.0, deviation=0.5)}


def test_the_ensemble_by_hand() -> None:
    # (3 - 1) / 2 = 1 with deviation 1 / 2 = 0.5; (1 - 0) / 0.5 = 2 with 0.5 / 0.5 = 1: mean 1.5, deviation sqrt(0.25 + 1) / 2
    found = ensemble(MEMBERS, {"a": [Raw(3.0, 1.0)], "b": [Raw(1.0, 0.5)]})
    assert found == [Raw(1.5, pytest.approx(math.sqrt(1.25) / 2))]


def test_an_unscored_member_leaves_the_ensemble_unscored() -> None:
    found = ensemble(MEMBERS, {"a": [Raw(3.0, 1.0), None, Raw(1.0, 0.0)], "b": [None, Raw(1.0, 0.5), Raw(0.0, 0.0)]})
    assert found == [None, None, (0.0, 0.0)]


# Scores


def test_every_objective_is_scored_by_its_own_scorer_on_its_own_scale() -> None:
    # log-odds of 2: minus the centre 2 - ln 3 are ln 3, three quarters of the scale
    fitted = Judgement(scorer="yes_no_zero", calibration=Calibration(slope=1, centre=2 - math.log(3)))
    (scored,) = score_responses(Counting(), [case("2")], BOTH, {"first": fitted, "second": LIKERT})
    assert scored.scores == {"first": pytest.approx(7.5), "second": 2.0}


def test_spreads_are_in_score_points_too() -> None:
    # a written integer is on the scale already: 8, 5 and 8 deviate by sqrt(2), and both ends stay within 0..10
    engine = ScriptedEngine(lambda messages, seed: ("8", "5", "8")[seed])
    (scored,) = score_responses(engine, [case("x")], [FIRST], {"first": LIKERT})
    assert scored.spreads == {"first": pytest.approx(math.sqrt(2))}


def test_an_ensemble_is_scored_by_its_members() -> None:
    # log-odds 3: (3 - 1) / 2 = 1; all weight on the 9: (10 - 5) / 2.5 = 2; their mean 1.5, and slope 2 about 1.5 - ln(3) / 2 gives 7.5
    how = PAIR.model_copy(update={"calibration": Calibration(slope=2, centre=1.5 - math.log(3) / 2)})
    (scored,) = score_responses(Counting(), [case("3")], [FIRST], {"first": how})
    assert scored.scores == {"first": pytest.approx(7.5)}


def test_where_a_member_is_unscored_so_is_the_objective_and_no_other() -> None:
    def score(text: str, choice: str) -> float:
        return math.nan if choice in "123456789" and "Assistant: odd\n" in text else 0.0

    engine = ScriptedEngine(no_reply, score)
    found = score_responses(engine, [case("odd", "a"), case("even", "b")], BOTH, {"first": PAIR, "second": ZERO})
    assert [set(r.scores) for r in found] == [{"second"}, {"first", "second"}]
    assert [set(r.spreads) for r in found] == [{"second"}, {"first", "second"}]


def test_blank_texts_are_unscored_and_not_asked_about() -> None:
    engine = Counting()
    found = score_responses(engine, [case(" \n\t", "a"), case("1", "b")], BOTH, {"first": ZERO, "second": ZERO})
    assert [(r.id, set(r.scores)) for r in found] == [("a", set()), ("b", {"first", "second"})]
    assert [len(call) for call in engine.calls] == [2]


def test_stale_scores_and_spreads_go() -> None:
    stale = Response("c", "odd", (1,), True, scores={"first": 9.0}, spreads={"first": 1.0})
    engine = ScriptedEngine(lambda messages, seed: "hm")
    (scored,) = score_responses(engine, [Case(case("x").prompt, stale)], [FIRST], {"first": LIKERT})
    assert (scored.scores, scored.spreads) == ({}, {})


def test_nothing_but_scores_and_spreads_changes() -> None:
    before = Response("c", "2", (5, 6), True, system="caring")
    (after,) = score_responses(Counting(), [Case(case("x").prompt, before)], [FIRST], {"first": LIKERT})
    assert (after.id, after.text, after.token_ids, after.finished, after.system) == ("c", "2", (5, 6), True, "caring")


def test_a_scorer_is_asked_once_for_all_objectives_that_share_it() -> None:
    engine = Counting()
    score_responses(engine, [case("1", "a"), case("2", "b"), case("3", "c")], BOTH, {"first": PAIR, "second": ZERO})
    # yes_no_zero: three answers for both objectives; likert_expected: three for the first one only
    assert [len(call) for call in engine.calls] == [6, 3]


@pytest.mark.parametrize("scorer", [s for s in SCORERS if s != "likert"])
def test_no_scorer_calls_the_engine_more_often_for_a_second_objective(scorer: str) -> None:
    one, two = Counting(), Counting()
    rivals = (response("1", "a"), response("2", "b"))
    cases = [Case(case("x").prompt, r, rivals) for r in rivals]
    how = Judgement.unchecked(scorer)
    score_responses(one, cases, [FIRST], {"first": how})
    score_responses(two, cases, BOTH, {"first": how, "second": how})
    assert len(one.calls) == len(two.calls)


def test_the_order_of_the_cases_does_not_matter() -> None:
    texts = {"a": "1", "b": "-2", "c": " ", "d": "0.5"}
    how = {"first": PAIR, "second": Judgement.unchecked("yes_no")}

    def scores(order: Sequence[str]) -> dict[str, tuple[object, object]]:
        found = score_responses(Counting(), [case(texts[i], i) for i in order], BOTH, how)
        assert [r.id for r in found] == list(order)
        return {r.id: (r.scores, r.spreads) for r in found}

    assert all(scores(order) == scores("abcd") for order in permutations("abcd"))


@pytest.mark.parametrize("scorer", SCORERS)
def test_no_answers_is_no_error(scorer: str) -> None:
    assert score_responses(Counting(), [], [FIRST], {"first": Judgement.unchecked(scorer)}) == []


# Groups


def test_groups_come_back_in_order_and_unfinished_candidates_are_not_asked_about() -> None:
    engine = Counting()
    groups = [
        PromptGroup(Prompt("p1", (Message("user", "one"),)), (response("0", "1a"), response("77", "1b", finished=False))),
        PromptGroup(Prompt("p2", (Message("user", "two"),)), (response("0", "2a"),)),
    ]
    scored = score_groups(engine, groups, BOTH, {"first": ZERO, "second": ZERO})
    assert [[(r.id, dict(r.scores)) for r in g.candidates] for g in scored] == [
        [("1a", {"first": 5.0, "second": 5.0}), ("1b", {})],
        [("2a", {"first": 5.0, "second": 5.0})],
    ]
    assert "77" not in engine.asked


def test_rivals_are_the_finished_candidates_of_the_group() -> None:
    one, cut, two = response("1", "a"), response("2", "b", finished=False), response("3", "c")
    group = PromptGroup(Prompt("p", (Message("user", "x"),)), (one, cut, two))
    draft, cut_draft = response("4", "d"), response("5", "e", finished=False)
    assert cases_of(group, [draft, cut_draft, one]) == [Case(group.prompt, draft, (one, two)), Case(group.prompt, one, (one, two))]


# What is refused, and when


def test_a_scorer_that_the_engine_cannot_serve_is_refused_before_any_work() -> None:
    engine = ScriptedEngine(no_reply)  # so that the likert scorer would fail loudly
    with pytest.raises(EngineError, match="the scorer 'yes_no' needs 'choice_logprobs'"):
        score_responses(engine, [case("x")], BOTH, {"first": LIKERT, "second": Judgement.unchecked("yes_no")})
    check_scorers(engine, BOTH, {"first": LIKERT, "second": LIKERT})


def test_the_members_of_an_ensemble_are_checked() -> None:
    with pytest.raises(EngineError, match="the scorer 'yes_no_zero' needs 'choice_logprobs'"):
        check_scorers(ScriptedEngine(no_reply), [FIRST], {"first": PAIR})


def test_only_the_objectives_that_a_scorer_judges_must_suit_it() -> None:
    bare = objective("bare", exemplars=())
    few = Judgement.unchecked("yes_no")
    check_scorers(Counting(), [FIRST, bare], {"first": few, "bare": ZERO})
    with pytest.raises(ConstitutionError, match="objective 'bare' has no exemplars"):
        check_scorers(Counting(), [FIRST, bare], {"first": few, "bare": few})


def test_the_config_names_every_scorer_there_is() -> None:
    assert set(get_args(Scorer)) == {"auto", *all_scorers()}
    assert all_scorers() == (*(s.name for s in SCORERS.values()), PROBE, ENSEMBLE)
