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


def test_capabilities_are_what_it_really_has() -> None:
    only_text: Engine = ScriptedEngine(lambda m, s: "")
    both: Engine = ScriptedEngine(lambda m, s: "", lambda t, c: 0.0)
    assert only_text.capabilities == {"generate"}
    assert both.capabilities == {"generate", "choice_logprobs"}
    with pytest.raises(NotImplementedError, match="without a score function"):
        only_text.choice_logprobs(["x"], [" Yes"])


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
