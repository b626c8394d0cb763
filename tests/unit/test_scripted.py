"""The scripted engine keeps the promises of `Engine`, so that what is tested with it is tested."""

from __future__ import annotations

import pytest

from spalign.engines.base import Engine, GenerateRequest, Sampling, require
from spalign.engines.scripted import EOS, ScriptedEngine
from spalign.errors import EngineError
from spalign.types import Message

HELLO = (Message("user", "hello"),)


def request(id: str = "r", *, seeds: tuple[int, ...] = (0,), limit: int = 100) -> GenerateRequest:
    return GenerateRequest(id, HELLO, seeds, Sampling(1.0, 1.0, limit))


def test_one_completion_per_seed_with_request_and_index() -> None:
    engine = ScriptedEngine(lambda messages, seed: f"{messages[-1].content} {seed}")
    found = {(c.request_id, c.index): c.text for c in engine.generate([request("a", seeds=(7, 9)), request("b", seeds=(7,))])}
    assert found == {("a", 0): "hello 7", ("a", 1): "hello 9", ("b", 0): "hello 7"}


def test_tokens_are_code_points_plus_one_and_the_end_is_token_zero() -> None:
    (c,) = ScriptedEngine(lambda m, s: "a\0é").generate([request()])
    assert c.token_ids == (ord("a") + 1, 1, ord("é") + 1, EOS)  # 98, 1, 234, 0: even the NUL is not the end
    assert c.finished
    assert c.text == "a\0é"


@pytest.mark.parametrize(("limit", "text", "finished"), [(2, "ab", False), (3, "abc", False), (4, "abc", True)])
def test_max_new_tokens_counts_the_end_of_sequence_token(limit: int, text: str, finished: bool) -> None:
    (c,) = ScriptedEngine(lambda m, s: "abc").generate([request(limit=limit)])
    assert (c.text, c.finished, len(c.token_ids)) == (text, finished, limit)


def test_an_empty_reply_is_just_the_end() -> None:
    (c,) = ScriptedEngine(lambda m, s: "").generate([request()])
    assert (c.text, c.token_ids, c.finished) == ("", (EOS,), True)


def test_what_is_generated_is_what_encode_response_gives() -> None:
    engine = ScriptedEngine(lambda m, s: "two words")
    (c,) = engine.generate([request()])
    assert list(c.token_ids) == engine.encode_response("two words")


def test_choice_logprobs_in_order_and_none_past_the_window() -> None:
    engine = ScriptedEngine(lambda m, s: "", lambda text, choice: float(len(text) * len(choice)), window=3)
    assert engine.choice_logprobs(["ab", "abcd", "abc"], [" Y", " No"]) == [(4.0, 6.0), None, (6.0, 9.0)]
    assert engine.window == 3


def test_a_conversation_is_asked_as_its_turns_a_line_each() -> None:
    asked = []

    def score(text: str, choice: str) -> float:
        asked.append((text, choice))
        return -1.0

    engine = ScriptedEngine(lambda m, s: "", score)
    assert engine.choice_logprobs([(Message("system", "Be kind."), *HELLO)], ["Yes", "No"]) == [(-1.0, -1.0)]
    assert asked == [("system: Be kind.\nuser: hello\n", "Yes"), ("system: Be kind.\nuser: hello\n", "No")]


def test_a_conversation_counts_against_the_window_as_it_is_encoded() -> None:
    # "user: hello" and a newline are 12 characters
    assert [ScriptedEngine(lambda m, s: "", lambda t, c: 0.0, window=window).choice_logprobs([HELLO], ["Yes"]) for window in (11, 12)] == [
        [None],
        [(0.0,)],
    ]


def weighing(window: int = 100) -> ScriptedEngine:
    """A token of `text` after `context` has the log-probability -(the context's length + 10 of the text's)."""
    return ScriptedEngine(lambda m, s: "", weigh=lambda context, text: -float(len(context) + 10 * len(text)), window=window)


def test_loglikelihood_gives_every_token_its_number_in_order() -> None:
    engine = weighing()
    context, answer = engine.encode_chat([Message("user", "x")]), engine.encode_response("ab")
    # "user: x" and a newline are 8 characters, "ab" is 2 and, with the end of the turn, 3 tokens
    assert engine.loglikelihood([(context, answer), (context[:1], answer[:1])]) == [(-28.0,) * 3, (-11.0,)]


def test_loglikelihood_takes_context_and_continuation_as_text() -> None:
    asked = []

    def weigh(context: str, text: str) -> float:
        asked.append((context, text))
        return 0.0

    engine = ScriptedEngine(lambda m, s: "", weigh=weigh)
    engine.loglikelihood([(engine.encode_chat(HELLO), engine.encode_response("a\0b"))])
    assert asked == [("user: hello\n", "a\0b")]


def test_representations_are_those_of_context_and_continuation_once_a_depth() -> None:
    engine = ScriptedEngine(lambda m, s: "", represent=lambda context, text: (float(len(context)), float(len(text))))
    request = (engine.encode_chat(HELLO), engine.encode_response("ab"))
    assert engine.representations([request], [0.4, 0.6]) == [(12.0, 2.0, 12.0, 2.0)]


@pytest.mark.parametrize(("context", "answer", "fits"), [(3, 2, True), (4, 2, False), (3, 3, False), (0, 2, False), (3, 0, False)])
def test_representations_are_none_past_the_window_and_where_one_side_is_empty(context: int, answer: int, fits: bool) -> None:
    engine = ScriptedEngine(lambda m, s: "", represent=lambda c, t: [1.0], window=5)
    (found,) = engine.representations([([98] * context, [99] * answer)], [0.5])
    assert (found is not None) is fits


@pytest.mark.parametrize(("context", "answer", "fits"), [(3, 2, True), (4, 2, False), (3, 3, False), (0, 2, False), (3, 0, False)])
def test_loglikelihood_is_none_past_the_window_and_where_one_side_is_empty(context: int, answer: int, fits: bool) -> None:
    (found,) = weighing(window=5).loglikelihood([([98] * context, [99] * answer)])
    assert (found is not None) is fits


def test_capabilities_are_what_it_really_has() -> None:
    only_text: Engine = ScriptedEngine(lambda m, s: "")
    judge: Engine = ScriptedEngine(lambda m, s: "", lambda t, c: 0.0)
    weigher: Engine = ScriptedEngine(lambda m, s: "", weigh=lambda c, t: 0.0)
    assert only_text.capabilities == {"generate"}
    reader: Engine = ScriptedEngine(lambda m, s: "", represent=lambda c, t: [0.0])
    assert judge.capabilities == {"generate", "choice_logprobs"}
    assert reader.capabilities == {"generate", "representations"}
    assert weigher.capabilities == {"generate", "loglikelihood"}


def test_what_it_was_not_given_is_an_error_that_says_how_to_give_it() -> None:
    only_text = ScriptedEngine(lambda m, s: "")
    with pytest.raises(EngineError, match="has no score function") as e:
        only_text.choice_logprobs(["x"], [" Yes"])
    assert "ScriptedEngine(reply, score)" in e.value.hint
    with pytest.raises(EngineError, match="without a weigh function") as e:
        only_text.loglikelihood([([1], [2])])
    assert "ScriptedEngine(reply, weigh=weigh)" in e.value.hint
    with pytest.raises(EngineError, match="has no represent function") as e:
        only_text.representations([([1], [2])], [0.5])
    assert "ScriptedEngine(reply, represent=represent)" in e.value.hint


def test_require_names_user_capability_engine_and_a_way_out() -> None:
    engine = ScriptedEngine(lambda m, s: "")
    require(engine, "generate", "sampling")
    with pytest.raises(EngineError, match=r"the scorer 'yes_no' needs 'choice_logprobs', which the engine 'scripted' does not have") as e:
        require(engine, "choice_logprobs", "the scorer 'yes_no'")
    assert "likert" in e.value.hint


def test_encode_chat_tells_roles_and_turns_apart() -> None:
    engine = ScriptedEngine(lambda m, s: "")
    as_user = engine.encode_chat([Message("user", "x")])
    assert as_user == [ord(c) + 1 for c in "user: x\n"]
    assert engine.encode_chat([Message("system", "x")]) != as_user
    assert engine.encode_chat([Message("user", "x"), Message("user", "y")])[: len(as_user)] == as_user
