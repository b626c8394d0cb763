"""The openai engine against real servers on loopback: one with a real model behind it, and one that fails in every way that servers do."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from model_server import (
    HALF_JSON,
    NO_CHOICES,
    NO_CONTENT,
    Fault,
    ModelServer,
    Real,
    Scripted,
    chat_choice,
    cut,
    drop,
    elsewhere,
    endless,
    hang,
    raw,
    status,
)
from spalign.config import EngineConfig
from spalign.engines import endpoint
from spalign.engines.base import Concurrent, EngineFailed, GenerateRequest, Sampling
from spalign.engines.openai import OpenAIEngine
from spalign.engines.transformers import TransformersEngine
from spalign.errors import EngineError
from spalign.types import Message

SAMPLING = Sampling(1.0, 1.0, 16)


def config(server: ModelServer, **own: Any) -> EngineConfig:
    return EngineConfig(**{"kind": "openai", "base_url": server.url, "max_retries": 3, "timeout": 5.0, **own})


def requests(n: int, seeds: int = 2) -> list[GenerateRequest]:
    return [
        GenerateRequest(f"p{i}", (Message("user", f"Question {i}?"),), tuple(range(10 * i, 10 * i + seeds)), SAMPLING) for i in range(n)
    ]


def echoing(messages: tuple[Message, ...], seed: int) -> str:
    return f"answer to {messages[-1].content} with {seed}"


# -- A real model behind it -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine.load(str(tiny_model), EngineConfig(dtype="float32"))


@pytest.fixture(scope="module")
def server(own: TransformersEngine) -> Iterator[ModelServer]:
    with ModelServer(Real(own, always=(" Yes", " No")), names=("served",), window=own.window) as running:
        yield running


@pytest.fixture(scope="module")
def engine(server: ModelServer, tiny_model: Path) -> OpenAIEngine:
    return OpenAIEngine.load("served", config(server, tokenizer=str(tiny_model)))


def test_it_finds_out_what_the_server_can_do(engine: OpenAIEngine, own: TransformersEngine) -> None:
    assert engine.capabilities == {"generate", "choice_logprobs", "loglikelihood"}
    assert engine.window == own.window


def test_answers_are_those_of_the_model_itself_in_any_batch_and_order(engine: OpenAIEngine, own: TransformersEngine) -> None:
    def told(made: Any) -> dict[tuple[str, int], tuple[str, bool]]:
        return {(c.request_id, c.index): (c.text, c.finished) for c in made}

    asked = requests(6)
    expected = told(own.generate(asked))
    assert told(engine.generate(asked)) == expected
    one_by_one: dict[Any, Any] = {}
    for request in reversed(asked):
        one_by_one |= told(engine.generate([request]))
    assert one_by_one == expected


def test_token_ids_are_those_of_the_text_that_came(engine: OpenAIEngine, own: TransformersEngine) -> None:
    for c in engine.generate(requests(3)):
        assert list(c.token_ids) == (own.encode_response(c.text) if c.finished else own.tokens.text(c.text))


def test_choices_and_likelihoods_are_the_model_s_own(engine: OpenAIEngine, own: TransformersEngine) -> None:
    asks = [f"Is {word} good? Answer Yes or No. Answer:" for word in ("this", "that", "it")]
    for got, expected in zip(engine.choice_logprobs(asks, (" Yes", " No")), own.choice_logprobs(asks, (" Yes", " No")), strict=True):
        assert got == pytest.approx(expected, abs=1e-4)
    pairs = [(own.encode_chat((Message("user", f"Q{i}"),)), own.encode_response("some answer here")) for i in range(3)]
    for got, expected in zip(engine.loglikelihood(pairs), own.loglikelihood(pairs), strict=True):
        assert got == pytest.approx(expected, abs=1e-4)


def test_another_tokenizer_than_the_server_s_is_found_out(server: ModelServer, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tiny_model)
    other.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    other.save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=r"another tokenizer or chat template"):
        OpenAIEngine.load("served", config(server, tokenizer=str(tmp_path)))
    template = (tiny_model / "chat_template.jinja").read_text()
    silent = "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(template + silent)  # here it does not think; the server's does as it likes
    with pytest.raises(EngineError, match=r"'served' thinks before it answers") as e:
        OpenAIEngine.load("served", config(server, tokenizer=str(tmp_path)))
    assert "enable_thinking" in e.value.hint


def test_a_prompt_that_exceeds_the_window_is_named(engine: OpenAIEngine) -> None:
    long = GenerateRequest("long", (Message("user", "word " * 3000),), (1,), SAMPLING)
    with pytest.raises(EngineError, match=r"prompt 'long'.*context length") as e:
        list(engine.generate([long]))
    assert "shorten" in e.value.hint


# -- A server that fails ----------------------------------------------------------------------------------------------


@pytest.fixture
def scripted() -> Iterator[ModelServer]:
    with ModelServer(Scripted(echoing), names=("m",)) as running:
        yield running


@pytest.mark.parametrize(
    "fault",
    [status(429, retry_after="0.01"), status(500), status(503), drop, cut, HALF_JSON, NO_CHOICES, NO_CONTENT, raw(b""), raw(b"<html>")],
    ids=["429", "500", "503", "drop", "cut", "half JSON", "no choices", "no content", "empty", "html"],
)
def test_what_fails_once_is_asked_again_and_nothing_is_lost_or_made_up(scripted: ModelServer, fault: Fault) -> None:
    engine = OpenAIEngine("m", config(scripted, concurrency=3))
    scripted.faults = [fault, fault]
    got = sorted((c.request_id, c.index, c.text) for c in engine.generate(requests(3)))
    assert got == [(f"p{i}", k, f"answer to Question {i}? with {10 * i + k}") for i in range(3) for k in range(2)]


def test_a_time_out_is_asked_again(scripted: ModelServer) -> None:
    engine = OpenAIEngine("m", config(scripted, timeout=0.5))
    scripted.faults = [hang(3.0)]
    assert len(list(engine.generate(requests(1)))) == 2


def test_a_server_that_stays_silent_is_an_error_that_says_for_how_long(scripted: ModelServer) -> None:
    engine = OpenAIEngine("m", config(scripted, timeout=0.3, max_retries=1))
    scripted.fault_if = lambda path, body: hang(5.0)
    with pytest.raises(EngineFailed, match=r"no reply within 0\.3 s, tried 2 times, to prompt 'p0'") as e:
        list(engine.generate(requests(1, seeds=1)))
    assert "engine.timeout" in e.value.hint


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (status(429), r"too many requests \(429\), tried 2 times"),
        (status(500, "boom \x1b[31m\nand more"), r"failed \(500\), tried 2 times, on prompt 'p\d': boom"),
        (status(429, retry_after="3600"), r"too many requests \(429\), tried once(.|\n)*fix: give the same command again in 3600 s"),
        (status(429, x_should_retry="false"), r"\(429\), tried once(.|\n)*the server wants no other try now"),
        (status(503, retry_after="Fri, 01 Jan 2100 00:00:00 GMT"), r"\(503\), tried once(.|\n)*again after Fri, 01 Jan 2100"),
        (drop, r"no connection, tried 2 times|no usable reply"),
        (
            raw(b'{"error": {"message": "quota \\u001b[31m exceeded"}}'),
            r"no usable reply, tried 2 times, to prompt 'p\d': quota .* exceeded",
        ),
        (raw(b'{"error": "busy"}'), r"no usable reply.*: busy"),
        (raw(gzip.compress(b" " * 1000), **{"Content-Encoding": "gzip"}), r"no usable reply.*compressed, which was not asked for"),
        (elsewhere("/v1/chat/completions"), r"no usable reply.*redirects"),
        (
            elsewhere("http://me:pw@127.0.0.1:9/v1?key=pw"),
            r"which redirects to http://127\.0\.0\.1:9: no connection, tried 2 times \(.*Connect call failed",
        ),
        (HALF_JSON, r"no usable reply, tried 2 times"),
        (NO_CHOICES, r"no usable reply.*choices"),
        (status(400, "bad parameter"), r"refused prompt 'p\d' \(400\): bad parameter"),
        (status(404), r"no model 'm'.*404"),
    ],
    ids=[
        "429",
        "500",
        "429 for an hour",
        "429 for good",
        "503 for years",
        "drop",
        "error",
        "error in a word",
        "gzip",
        "loop",
        "redirect",
        "half JSON",
        "no choices",
        "400",
        "404",
    ],
)
def test_what_goes_on_failing_is_an_error_that_says_what_and_keeps_what_came(scripted: ModelServer, fault: Fault, says: str) -> None:
    engine = OpenAIEngine("m", config(scripted, max_retries=1, concurrency=1))
    scripted.fault_if = lambda path, body: fault if "Question 2" in str(body["messages"]) else None
    got = []
    with pytest.raises(EngineFailed, match=says) as e:
        got.extend(c.request_id for c in engine.generate(requests(4)))  # keeps what came before the error
    assert got == ["p0", "p0", "p1", "p1"]  # one at a time, in order: what came before the failure was handed on
    assert e.value.hint
    assert "\x1b" not in str(e.value)
    assert "pw" not in str(e.value)
    assert len(str(e.value).splitlines()) == 2  # the fix stands on the second


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(EngineError, match=r"no connection, tried once \(.*Connect call failed \('127\.0\.0\.1', 9\)") as e:
        OpenAIEngine("m", EngineConfig(kind="openai", base_url="http://127.0.0.1:9/v1", max_retries=0))
    assert "start the server" in e.value.hint


def test_a_server_that_takes_no_connection_is_not_waited_for_as_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "CONNECT", 0.3)
    with socket.socket() as deaf, contextlib.ExitStack() as waiting:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(3):  # until its queue is full: from then on nobody is let in
            other = waiting.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(deaf.getsockname())
        with pytest.raises(EngineError, match=r"no connection, tried once \(it does not answer\)"):
            OpenAIEngine("m", EngineConfig(kind="openai", base_url=f"http://127.0.0.1:{deaf.getsockname()[1]}/v1", max_retries=0))


def test_a_wrong_model_is_named_with_those_that_are_served(scripted: ModelServer) -> None:
    with pytest.raises(EngineError, match=r"no model 'other'") as e:
        OpenAIEngine("other", config(scripted))
    assert "it serves: m" in e.value.hint


def test_the_one_model_of_a_server_that_takes_any_name_has_its_own() -> None:
    with ModelServer(Scripted(echoing), names=("m",), any_name=True) as server:
        with pytest.raises(EngineError, match="no model 'other', though it answers") as e:
            OpenAIEngine("other", config(server))
        assert "it serves: m" in e.value.hint
        OpenAIEngine("m:latest", config(server))  # the same to Ollama


@pytest.mark.parametrize(("names", "says"), [((), ""), (("m", "n"), "not among the 2 models that it lists"), (("other", "n"), "")])
def test_a_name_that_a_server_takes_and_does_not_list_is_noted(names: tuple[str, ...], says: str, caplog: pytest.LogCaptureFixture) -> None:
    with ModelServer(Scripted(echoing), names=names, any_name=True) as server, caplog.at_level(logging.WARNING, logger="spalign"):
        OpenAIEngine("other", config(server))
    assert [says in m for m in caplog.messages] == ([True] if says else [])


def test_what_a_server_calls_the_model_is_noted_and_another_one_in_the_middle_is_an_error(
    scripted: ModelServer, caplog: pytest.LogCaptureFixture
) -> None:
    def called(name: str) -> Fault:
        return lambda handler, body: handler.reply({**scripted.backend.chat(body), "model": name})

    scripted.fault_if = lambda path, body: called("m-2026") if "logprobs" not in body and path.endswith("/chat/completions") else None
    with caplog.at_level(logging.WARNING, logger="spalign"):
        engine = OpenAIEngine("m", config(scripted, concurrency=1))
    assert caplog.messages == [f"note: {scripted.url} says that 'm' is 'm-2026'"]
    scripted.fault_if = lambda path, body: called("n" if "Question 1" in str(body["messages"]) else "m-2026")
    got = []
    with pytest.raises(EngineFailed, match="first 'm-2026' answered for 'm', and now 'n'"):
        got.extend(c.request_id for c in engine.generate(requests(3, seeds=1)))
    assert got == ["p0"]


def test_without_a_count_of_tokens_the_tokenizer_is_not_known_to_be_the_server_s(
    scripted: ModelServer, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="spalign"):
        OpenAIEngine.load("m", config(scripted, tokenizer=str(tiny_model)))
    assert [m for m in caplog.messages if "does not say how many tokens it reads" in m] == caplog.messages != []


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ALL_PROXY", "socks5://me:pw@127.0.0.1:1", "socksio"),
        ("HTTP_PROXY", "foo://me:pw@h", "ValueError"),
        ("http_proxy", "http://me:pw@127.0.0.1:99999", "ExceptionGroup"),
        ("SSL_CERT_FILE", "/nowhere/pw.pem", "No such file"),
        ("SSL_CERT_FILE", __file__, "no certificate"),
        ("OPENAI_ORG_ID", "pw\u00e9", "UnicodeEncodeError"),
    ],
)
def test_a_setting_that_cannot_be_is_named_and_not_shown(
    scripted: ModelServer, monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(EngineFailed, match=rf"no request can be made with these settings \(.*{says}") as e:
        OpenAIEngine("m", config(scripted))
    assert name in e.value.hint
    assert "pw" not in str(e.value)


def test_an_address_that_is_none_is_an_error() -> None:
    with pytest.raises(EngineFailed, match=r"no request can be made with these settings \(InvalidURL\)"):
        OpenAIEngine("m", EngineConfig(kind="openai", base_url="http://\uff48\uff4f\uff53\uff54/v1"))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "0.5", '"a"', "null"])
def test_absurd_log_probabilities_are_never_a_number(value: str) -> None:
    """log-probabilities are at most 0; a greater one, or none at all, says that the server is broken."""
    top = '[{"token": "Yes", "logprob": VALUE}, {"token": "No", "logprob": -1.0}]'.replace("VALUE", value)
    choice = (
        json.dumps(chat_choice("Yes"))[:-1].replace(
            '"logprobs": null', f'"logprobs": {{"content": [{{"token": "Yes", "logprob": -0.1, "top_logprobs": {top}}}]}}'
        )
        + "}"
    )
    with ModelServer(Scripted(echoing, lambda _: {"Yes": -0.1, "No": -2.0}), names=("m",)) as server:
        engine = OpenAIEngine("m", config(server, max_retries=0))
        ask = (Message("user", "Yes or No?"),)
        assert engine.choice_logprobs([ask], ("Yes", "No")) == [(-0.1, -2.0)]
        server.faults = [raw(f'{{"choices": [{choice}]}}'.encode())]
        with pytest.raises(EngineFailed, match="no usable reply"):
            engine.choice_logprobs([ask], ("Yes", "No"))


def test_a_choice_that_the_server_does_not_list_has_no_score() -> None:
    with ModelServer(Scripted(echoing, lambda _: {"Yes": -0.1, "Maybe": -2.0}), names=("m",)) as server:
        engine = OpenAIEngine("m", config(server))
        assert engine.choice_logprobs([(Message("user", "?"),)], ("Yes", "No")) == [None]
        with pytest.raises(EngineError, match="do not hold the choices"):
            engine.check_choices(("Yes", "No"), chat=True)


def test_scorers_that_need_log_probabilities_are_refused_up_front_where_there_are_none(scripted: ModelServer) -> None:
    engine = OpenAIEngine("m", config(scripted))
    assert engine.capabilities == {"generate"}
    with pytest.raises(EngineError, match="no log-probabilities") as e:
        engine.check_choices(("Yes", "No"), chat=True)
    assert "likert" in e.value.hint


def test_answers_stream_out_while_others_are_under_way(scripted: ModelServer) -> None:
    engine = OpenAIEngine("m", config(scripted, concurrency=4))
    slow = hang(60)
    scripted.fault_if = lambda path, body: slow if "Question 3" in str(body["messages"]) else None
    stream = engine.generate(requests(4, seeds=1))
    assert {next(stream).request_id for _ in range(3)} == {"p0", "p1", "p2"}  # the fourth never comes
    stream.close()  # and whoever has enough waits for nothing


def test_at_most_concurrency_requests_are_under_way() -> None:
    with ModelServer(Scripted(echoing, delay=0.05), names=("m",)) as server:
        engine = OpenAIEngine("m", config(server, concurrency=5))
        assert len(list(engine.generate(requests(10)))) == 20
        assert 2 <= server.most_under_way <= 5


def test_two_calls_at_a_time_share_the_requests_that_may_be_under_way() -> None:
    with ModelServer(Scripted(echoing, delay=0.2), names=("m",)) as server:
        engine = OpenAIEngine("m", config(server, concurrency=3))
        assert isinstance(engine, Concurrent)
        with ThreadPoolExecutor(engine.width) as threads:
            calls = [threads.submit(lambda of: [c.text for c in engine.generate(of)], [r]) for r in requests(2, seeds=4)]
            got = [sorted(call.result()) for call in calls]
        assert got == [[f"answer to Question {i}? with {10 * i + k}" for k in range(4)] for i in range(2)]
        assert server.most_under_way == 3


def test_closing_ends_calls_under_way_and_those_to_come(scripted: ModelServer) -> None:
    engine = OpenAIEngine("m", config(scripted, concurrency=2, timeout=60))
    scripted.fault_if = lambda path, body: hang(60)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(lambda: list(engine.generate(requests(2)))) for _ in range(2)]
        while scripted.under_way < 2:
            time.sleep(0.01)
        engine.close()
        for call in calls:
            with pytest.raises(EngineError, match="the openai engine was closed"):
                call.result(timeout=10)
    with pytest.raises(EngineError, match="the openai engine was closed"):
        list(engine.generate(requests(1)))


def test_hostile_answers_are_kept_as_text(scripted: ModelServer) -> None:
    nasty = "\x1b]0;owned\x07<script>alert(1)</script> \u202e" + "x" * 2_000_000
    engine = OpenAIEngine("m", config(scripted))
    scripted.faults = [raw(json.dumps({"choices": [chat_choice(nasty)]}).encode())]
    (made,) = engine.generate(requests(1, seeds=1))
    assert made.text == nasty.strip()


def test_a_reply_without_end_is_given_up(scripted: ModelServer) -> None:
    engine = OpenAIEngine("m", config(scripted, max_retries=0))
    scripted.faults = [endless]
    with pytest.raises(EngineFailed, match="no usable reply, tried once, to prompt 'p0': more than 64 MB"):
        list(engine.generate(requests(1, seeds=1)))


def test_an_answer_longer_than_asked_for_is_not_a_finished_one(engine: OpenAIEngine, server: ModelServer) -> None:
    # 15 words and the end of the turn are 16 tokens, as many as were asked for
    for count, finished in ((15, True), (16, False), (5000, False)):
        server.faults = [raw(json.dumps({"choices": [chat_choice("a" + " a" * (count - 1))]}).encode())]
        (made,) = engine.generate(requests(1, seeds=1))
        assert (made.finished, len(made.token_ids)) == (finished, count + finished)


# -- Keys -------------------------------------------------------------------------------------------------------------

SECRET = "sk-a-very-secret-key-0123456789"


def test_the_key_is_sent_and_a_server_that_repeats_it_does_not_get_it_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with ModelServer(Scripted(echoing), names=("m",), key=SECRET) as server:
        engine = OpenAIEngine("m", config(server))
        assert len(list(engine.generate(requests(1)))) == 2
        server.fault_if = lambda path, body: status(500, f"your key is {SECRET}")
        with pytest.raises(EngineFailed) as e:
            list(OpenAIEngine.generate(engine, requests(1)))
        assert SECRET not in str(e.value) + e.value.hint
        server.key, server.fault_if = "another", lambda path, body: None
        with pytest.raises(EngineError, match="does not accept the key in OPENAI_API_KEY") as refused:
            OpenAIEngine("m", config(server))
        assert SECRET not in str(refused.value) + refused.value.hint
