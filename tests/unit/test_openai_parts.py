"""The openai engine's pure parts: options, replies as they are read, what identifies a served model, keys that cannot be."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
from pydantic import ValidationError

from spalign.config import EngineConfig, RunConfig, config_from, engine_at
from spalign.engines import endpoint
from spalign.engines.abilities import echoed
from spalign.engines.base import NoTokenizer, count_tokens
from spalign.engines.endpoint import Endpoint
from spalign.engines.make import identify, weights_of
from spalign.engines.openai import _SPECIAL, _chosen
from spalign.engines.replies import Logprobs, Models, Reply
from spalign.errors import ConfigError, EngineError, ModelError
from spalign.types import Message

URL = "http://localhost:8000/v1"


def served(**options: Any) -> EngineConfig:
    return EngineConfig(kind="openai", base_url=URL, **options)


# ---- options


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"kind": "openai"}, "kind openai needs base_url"),
        ({"base_url": URL}, "base_url and tokenizer are for a served model"),
        ({"tokenizer": "org/name"}, "base_url and tokenizer are for a served model"),
        ({"kind": "openai", "base_url": "localhost:8000"}, "expected an address such as http://localhost:8000/v1"),
        ({"kind": "openai", "base_url": "file:///etc/passwd"}, "expected an address"),
        ({"kind": "openai", "base_url": "http://host:99999/v1"}, "expected an address"),
        ({"kind": "openai", "base_url": "http://[half/v1"}, "expected an address"),
        ({"kind": "openai", "base_url": "http://me:sk-secret@host/v1"}, "without user, password, query or fragment"),
        ({"kind": "openai", "base_url": "http://host/v1?api-key=sk-secret"}, "without user, password, query or fragment"),
        ({"kind": "openai", "base_url": URL, "api_key_env": "sk-secret"}, "engine.api_key_env"),
        ({"kind": "openai", "base_url": URL, "api_key": "sk-secret"}, "unknown key 'engine.api_key'"),
    ],
)
def test_options_that_cannot_be_are_refused_and_no_secret_is_repeated(engine: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as e:
        config_from({"name": "x", "engine": engine})
    assert says in str(e.value)
    assert "sk-secret" not in str(e.value)


def test_digests_of_runs_without_a_server_are_as_before() -> None:
    assert EngineConfig(batch_size=7).matters() == {"kind": "transformers", "dtype": "auto", "device": "auto", "trust_remote_code": False}


def test_where_a_server_is_and_how_patiently_it_is_asked_does_not_matter() -> None:
    other = EngineConfig(kind="openai", base_url="https://elsewhere/v1/", concurrency=2, timeout=3, max_retries=1, api_key_env="OTHER")
    assert other.matters() == served().matters()
    assert other.base_url == "https://elsewhere/v1"


def test_what_a_run_makes_runs_here() -> None:
    here = served(dtype="float32", batch_size=3, tokenizer="org/name").here()
    assert here == EngineConfig(dtype="float32", batch_size=3)


def test_a_judge_runs_as_its_own_engine_says_else_as_the_policy_does_without_its_tokenizer() -> None:
    same = RunConfig(name="x", engine=served(tokenizer="org/name"))
    assert same.judge_engine == served()
    own = config_from({"name": "x", "self_evaluation": {"judge": "j", "judge_engine": {"kind": "openai", "base_url": URL}}})
    assert (own.engine.kind, own.judge_engine) == ("transformers", served())


def test_the_address_on_the_command_line_is_checked_like_that_in_a_file() -> None:
    assert engine_at(None) == EngineConfig()
    assert engine_at(URL) == served()
    with pytest.raises(ConfigError, match="--base-url: base_url: expected an address"):
        engine_at("nowhere")


# ---- which model it is


def test_a_served_model_is_its_name_and_the_local_model_that_it_is_said_to_be() -> None:
    assert identify("gpt-x", served()) == "served:gpt-x"
    assert identify("llama3:8b", served(tokenizer="org/name")) == "served:llama3:8b as hub:org/name"
    assert identify("org/name", served()) == "served:org/name as hub:org/name"
    assert identify("org/name", EngineConfig()) == "hub:org/name"


def test_weights_are_those_of_the_tokenizer_or_of_the_name() -> None:
    assert weights_of("gpt-x", served()) is None
    assert weights_of("gpt-x", served(tokenizer="org/name")) == "org/name"
    assert weights_of("org/name", served()) == "org/name"
    assert weights_of("gpt-x", EngineConfig()) == "gpt-x"  # refused where it is loaded
    with pytest.raises(ModelError, match="no such file or folder"):
        weights_of("gpt-x", served(tokenizer="./nowhere"))


def test_without_a_tokenizer_tokens_are_counted_as_what_they_are_at_most() -> None:
    class Silent:
        def encode_chat(self, messages: Any) -> list[int]:
            raise NoTokenizer("not here")

    # "naïve" is 6 bytes, and 50 for what stands around each of two turns
    assert count_tokens(Silent(), (Message("system", ""), Message("user", "naïve"))) == 6 + 2 * 50  # type: ignore[arg-type]


# ---- replies


def reply(**choice: Any) -> Reply:
    return Reply.model_validate_json(json.dumps({"choices": [choice]}))


@pytest.mark.parametrize(
    "body",
    [
        "{}",
        '{"choices": []}',
        '{"choices": null}',
        '{"choices": {}}',
        '{"choices": [{}]}',
        '{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}',
        '{"choices": [{"message": {"content": null}}]}',
        '{"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}',
        '{"choices": [{"message": {"content": "half \\ud83d"}, "finish_reason": "stop"}]}',
        '{"choices": [{"text": "x", "logprobs": {"top_logprobs": [{"a": "b"}]}}]}',
        '{"choices": [{"text": "x"',
        "<html>busy</html>",
        '{"choices": ' + "[" * 100_000,
        "",
    ],
)
def test_what_is_no_reply_is_not_read_as_one(body: str) -> None:
    with pytest.raises(ValidationError):
        Reply.model_validate_json(body)


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_an_answer_that_was_cut_off_before_it_began_is_empty(reason: str) -> None:
    assert reply(message={"content": None}, finish_reason=reason).choice.said == ""


@pytest.mark.parametrize(
    ("reason", "finished"),
    [("stop", True), ("eos", True), ("eos_token", True), ("length", False), ("content_filter", False), (None, False), ("abort", None)],
)
def test_a_finished_answer_goes_by_several_words(reason: str | None, finished: bool | None) -> None:
    assert reply(message={"content": "x"}, finish_reason=reason).choice.finished is finished


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ('{"object": "list", "data": [{"id": "a", "max_model_len": 9}]}', ["a"]),
        ('[{"id": "a"}, {"id": "b", "type": "chat"}]', ["a", "b"]),
        ('{"data": []}', []),
        ('{"data": [{"name": "a"}, "b", {"id": 5}]}', []),
        ('{"data": null}', None),
        ('{"models": []}', None),
        ("5", None),
    ],
)
def test_what_a_server_serves_is_read_in_any_shape_or_not_at_all(body: str, names: list[str] | None) -> None:
    said = Models.model_validate_json(body).data
    assert (None if said is None else [m.id for m in said]) == names


def test_alternatives_are_read_in_the_three_ways_that_servers_write_them() -> None:
    chat = {"content": [{"token": "Yes", "logprob": -0.1, "top_logprobs": [{"token": "Yes", "logprob": -0.1, "bytes": [1]}]}]}
    plain = {"tokens": [" Yes"], "token_logprobs": [-0.1], "top_logprobs": [{" Yes": -0.1, " No": -2.5}], "text_offset": [0]}
    assert Logprobs.model_validate(chat).first() == {"Yes": -0.1}
    assert Logprobs.model_validate(plain).first() == {" Yes": -0.1, " No": -2.5}
    for nothing in ({}, {"content": []}, {"content": None}, {"top_logprobs": []}, {"top_logprobs": [None]}):
        assert Logprobs.model_validate(nothing).first() == {}


def test_a_choice_that_is_not_among_the_alternatives_gets_no_number() -> None:
    there = reply(text="x", logprobs={"top_logprobs": [{" Yes": -0.1, " No": -2.5, "No": -1.0}]})
    assert _chosen(there, (" No", " Yes")) == (-2.5, -0.1)
    assert _chosen(there, (" Yes", " Maybe")) is None
    assert _chosen(there, ("Yes", "No")) is None, "another token, without its space"
    assert _chosen(reply(text="x"), (" Yes", " No")) is None
    assert _chosen(None, (" Yes", " No")) is None


def test_echoed_log_probabilities_are_those_of_the_answer_s_tokens() -> None:
    found = reply(text="abcde", logprobs={"token_logprobs": [None, -1.0, -2.0, -3.0, -4.0]})
    assert echoed(found, 2, 2, URL) == (-2.0, -3.0)
    for context, length in ((0, 2), (3, 3)):  # the first token has none; the sixth is not there
        with pytest.raises(EngineError, match=f"for {length - 1} of {length} tokens"):
            echoed(found, context, length, URL)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("<|im_end|>\n<|im_start|>assistant", "< |im_end|>\n< |im_start|>assistant"),
        ("</s><s>[INST] x [/INST]", "< /s>< s>[ INST] x [ /INST]"),
        ("<end_of_turn><start_of_turn>model", "< end_of_turn>< start_of_turn>model"),
        ("<|eot_id|><|start_header_id|>", "< |eot_id|>< |start_header_id|>"),
        ("a < b | c > d, x[0], <b>bold</b>", "a < b | c > d, x[0], <b>bold</b>"),
    ],
)
def test_without_a_tokenizer_what_commonly_opens_or_closes_a_turn_is_taken_apart(text: str, safe: str) -> None:
    assert _SPECIAL.sub(lambda m: f"{m[0]} ", text) == safe


# ---- keys


def test_a_named_key_that_is_not_there_is_missed_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(EngineError, match="the environment variable MY_KEY holds no key"):
        Endpoint(served(api_key_env="MY_KEY"))


@pytest.mark.parametrize("key", ["sk-secret\n", "sk secret", "sk-sécret"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(EngineError) as e:
        Endpoint(served(api_key_env="MY_KEY"))
    assert "MY_KEY holds characters that no key has" in str(e.value)
    assert key.strip() not in str(e.value)


def test_the_key_is_held_by_nothing_that_is_printed_or_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1234")
    made = Endpoint(served())
    assert "sk-secret" not in repr(vars(made)) + repr(made) + repr(served()) + json.dumps(served().model_dump())
    assert made.words.without_key("you sent sk-secret-1234, sk-secret-1234") == "you sent [key], [key]"


def test_a_short_key_takes_no_word_out_of_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "test")
    assert Endpoint(served()).words.without_key("a test") == "a test"


def test_a_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(endpoint.importlib.util, "find_spec", lambda name, *a: None if name == "openai" else real(name, *a))
    with pytest.raises(EngineError) as e:
        Endpoint(served())
    assert e.value.hint == "pip install 'spalign[openai]'"
