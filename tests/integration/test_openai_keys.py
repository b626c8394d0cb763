"""Where the key of a served model goes when the server is hostile: nowhere but to that server, and into no log."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from model_server import Handler, Json, ModelServer, Scripted, status
from spalign.config import EngineConfig
from spalign.engines.base import EngineFailed, GenerateRequest, Sampling
from spalign.engines.openai import OpenAIEngine
from spalign.types import Message

SECRET = "sk-a-very-secret-key-0123456789"
ASK = [GenerateRequest("p", (Message("user", "Hi"),), (1,), Sampling(1.0, 1.0, 8))]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with ModelServer(Scripted(lambda messages, seed: "hello"), names=("m",), key=SECRET) as running:
        yield running


def engine(server: ModelServer) -> OpenAIEngine:
    return OpenAIEngine("m", EngineConfig(kind="openai", base_url=server.url, max_retries=0, timeout=5.0))


def test_a_server_that_sends_us_elsewhere_does_not_send_the_key_there(server: ModelServer) -> None:
    def elsewhere(handler: Handler, body: Json) -> None:
        handler.reply(b"", 307, {"Location": f"{other.url}/chat/completions"})

    with ModelServer(Scripted(lambda messages, seed: "from elsewhere"), names=("m",)) as other:
        made = engine(server)
        server.faults = [elsewhere]
        assert [c.text for c in made.generate(ASK)] == ["from elsewhere"]
        ((_, headers, _),) = other.requests
    assert any(SECRET in v for _, sent, _ in server.requests for v in sent.values()), "the key is sent where it belongs"
    assert not any(SECRET in v for v in headers.values())


def authorizations(server: ModelServer) -> set[str | None]:
    """What came with the requests; names of headers come in any case."""
    return {next((v for k, v in headers.items() if k.lower() == "authorization"), None) for _, headers, _ in server.requests}


def test_no_key_is_sent_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ModelServer(Scripted(lambda messages, seed: "hello"), names=("m",)) as running:
        assert [c.text for c in engine(running).generate(ASK)] == ["hello"]
        assert authorizations(running) == {None}
        running.requests.clear()
        monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Basic bWU6cHc=")  # a gateway's own way
        list(engine(running).generate(ASK))
        assert authorizations(running) == {"Basic bWU6cHc="}
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        monkeypatch.delenv("OPENAI_CUSTOM_HEADERS")
        running.requests.clear()
        list(engine(running).generate(ASK))
        assert authorizations(running) == {f"Bearer {SECRET}"}


@pytest.mark.parametrize("name", ["OPENAI_ORG_ID", "OPENAI_CUSTOM_HEADERS"])
def test_a_setting_that_no_header_can_hold_is_named_without_its_value(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "org-s3cret\r" if name == "OPENAI_ORG_ID" else "X-Gateway: s3cret-\rvalue")
    with pytest.raises(EngineFailed, match=r"no request can be made with these settings \(LocalProtocolError\)") as e:
        list(engine(server).generate(ASK))
    assert name in e.value.hint
    assert "s3cret" not in str(e.value)


@pytest.mark.parametrize("code", [200, 500])
def test_the_client_s_debug_log_does_not_show_a_key_that_the_server_repeats(
    server: ModelServer, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    made = engine(server)
    if code == 200:
        server.faults = [lambda handler, body: handler.reply(server.backend.chat(body), 200, {"x-request-id": f"for {SECRET}"})]
    else:
        server.faults = [status(500, f"your key is {SECRET}", x_request_id=f"for {SECRET}")]
    with caplog.at_level(logging.DEBUG, logger="openai"):  # as OPENAI_LOG=debug does
        if code == 200:
            assert [c.text for c in made.generate(ASK)] == ["hello"]
        else:
            with pytest.raises(EngineFailed, match=r"your key is \[key\]"):
                list(made.generate(ASK))
    assert "request_id: for [key]" in caplog.text
    assert SECRET not in caplog.text
