"""The likelihood scorers: the contexts word for word, and their mean differences by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from spalign.constitution import Objective
from spalign.engines.scripted import ScriptedEngine
from spalign.errors import EngineError
from spalign.selfeval import Case, Raw, Scorer
from spalign.selfeval.contrastive import ContrastiveScorer, PmiScorer
from spalign.types import Message, Prompt, Response

CONTRASTIVE, PMI = ContrastiveScorer(), PmiScorer()
ALL = pytest.mark.parametrize("scorer", [CONTRASTIVE, PMI], ids=lambda s: s.name)


def objective(name: str = "kindness", good: str = "Be kind.", bad: str = "Be rude.") -> Objective:
    return Objective(name=name, principle="p", question="q", good_answer="yes", good_system=good, bad_system=bad)


def case(text: str = "Sure.", *turns: Message) -> Case:
    return Case(Prompt("p", turns or (Message("user", "Why?"),)), Response("r", text, (1,), True))


def no_reply(messages: tuple[Message, ...], seed: int) -> str:
    raise AssertionError("the likelihood scorers generate nothing")


class PerToken(ScriptedEngine):
    """Gives each continuation's tokens the log-probabilities of the first context that its text begins with, cut to its length."""

    def __init__(self, given: dict[str, tuple[float, ...]], window: int = 100_000) -> None:
        super().__init__(no_reply, weigh=lambda context, text: 0.0, window=window)
        self.given, self.calls = given, 0

    def loglikelihood(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, ...] | None]:
        self.calls += 1
        texts = ["".join(chr(i - 1) for i in context) for context, _ in requests]
        return [
            next(found for start, found in self.given.items() if text.startswith(start))[: len(y)]
            for text, (_, y) in zip(texts, requests, strict=True)
        ]


def weighed(scorer: Scorer, engine: ScriptedEngine, cases: list[Case], *objectives: Objective) -> list[list[Raw | None]]:
    return scorer.score(engine, cases, objectives or [objective()])


# The contexts


@pytest.mark.parametrize(
    ("scorer", "bad"),
    [(CONTRASTIVE, "system: Be rude.\nuser: Why?\n"), (PMI, "system: Be kind.\nuser: Hello!\n")],
    ids=lambda x: getattr(x, "name", ""),
)
def test_good_and_bad_context_word_for_word(scorer: Scorer, bad: str) -> None:
    asked = []

    def weigh(context: str, text: str) -> float:
        asked.append((context, text))
        return -1.0

    weighed(scorer, ScriptedEngine(no_reply, weigh=weigh), [case("Sure.\nReally.")])
    assert asked == [("system: Be kind.\nuser: Why?\n", "Sure.\nReally."), (bad, "Sure.\nReally.")]


def test_a_system_turn_of_the_prompt_gives_way_and_its_other_turns_stay() -> None:
    asked = []

    def weigh(context: str, text: str) -> float:
        asked.append(context)
        return -1.0

    turns = (Message("system", "Be a pirate."), Message("user", "Hi!"), Message("assistant", "Ahoy!"), Message("user", "Why?"))
    weighed(CONTRASTIVE, ScriptedEngine(no_reply, weigh=weigh), [case("Sure.", *turns)])
    assert asked == [f"system: {s}\nuser: Hi!\nassistant: Ahoy!\nuser: Why?\n" for s in ("Be kind.", "Be rude.")]


# The numbers


def test_contrastive_by_hand() -> None:
    # every token is 0.5 nats likelier under the good system prompt
    engine = ScriptedEngine(no_reply, weigh=lambda context, text: -1.0 if "Be kind." in context else -1.5)
    assert weighed(CONTRASTIVE, engine, [case()]) == [[Raw(0.5, 0.0)]]


def test_pmi_by_hand() -> None:
    # -0.25 nats a token after the question, -2 after a greeting; what the bad system prompt makes of it does not matter
    engine = ScriptedEngine(no_reply, weigh=lambda context, text: -2.0 if "Hello!" in context else -9.0 if "rude" in context else -0.25)
    assert weighed(PMI, engine, [case()]) == [[Raw(1.75, 0.0)]]


@pytest.mark.parametrize(("scorer", "bad"), [(CONTRASTIVE, "system: Be rude."), (PMI, "system: Be kind.\nuser: Hello!")])
def test_mean_and_standard_error_over_the_tokens(scorer: Scorer, bad: str) -> None:
    # "ab" and the end of the turn are three tokens; leads 1, 0 and 2: mean 1, variance (0 + 1 + 1) / 2 = 1, standard error 1 / sqrt(3)
    engine = PerToken({bad: (-2.0, -2.0, -5.0), "system: Be kind.\nuser: Why?": (-1.0, -2.0, -3.0)})
    assert weighed(scorer, engine, [case("ab")]) == [[Raw(1.0, pytest.approx(1 / math.sqrt(3)))]]


def test_one_token_has_no_standard_error() -> None:
    engine = PerToken({"system: Be kind.": (-1.0,), "system: Be rude.": (-4.0,)})
    assert weighed(CONTRASTIVE, engine, [case("ab")]) == [[Raw(3.0, 0.0)]]


def test_the_mean_does_not_grow_with_the_length() -> None:
    engine = ScriptedEngine(no_reply, weigh=lambda context, text: -1.0 if "Be kind." in context else -1.5)
    ((short, long),) = weighed(CONTRASTIVE, engine, [case("a"), case("a" * 500)])
    assert short is not None
    assert long is not None
    assert long.value == pytest.approx(short.value)


@ALL
def test_scores_come_back_per_objective_and_in_the_order_of_the_cases(scorer: Scorer) -> None:
    def weigh(context: str, text: str) -> float:
        good = context.startswith("system: good") and "Hello!" not in context
        return float(text) * (10 if "good 2" in context else 1) if good else 0.0

    objectives = [objective("one", "good 1", "bad 1"), objective("two", "good 2", "bad 2")]
    found = weighed(scorer, ScriptedEngine(no_reply, weigh=weigh), [case("3"), case("1"), case("2")], *objectives)
    assert [[raw and raw.value for raw in per] for per in found] == [[3, 1, 2], [30, 10, 20]]


@ALL
def test_everything_is_asked_in_one_call(scorer: Scorer) -> None:
    engine = PerToken({"system: ": (-1.0,) * 50})
    weighed(scorer, engine, [case("a"), case("b")], objective("one"), objective("two"))
    assert engine.calls == 1


# No score


@ALL
def test_a_text_past_the_window_is_unscored_and_the_others_are_not(scorer: Scorer) -> None:
    engine = ScriptedEngine(no_reply, weigh=lambda context, text: -1.0, window=100)
    assert weighed(scorer, engine, [case("w" * 100), case("ok")]) == [[None, (0.0, 0.0)]]


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
@ALL
def test_no_number_from_the_model_is_no_score(scorer: Scorer, broken: float) -> None:
    engine = ScriptedEngine(no_reply, weigh=lambda context, text: broken if "Be kind." in context else -1.0)
    assert weighed(scorer, engine, [case()]) == [[None]]


@ALL
def test_an_engine_without_likelihoods_is_refused(scorer: Scorer) -> None:
    with pytest.raises(EngineError, match=f"the scorer '{scorer.name}' needs 'loglikelihood'"):
        scorer.check(ScriptedEngine(no_reply, lambda text, choice: 0.0), [objective()])
