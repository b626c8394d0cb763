"""A server that speaks the OpenAI protocol over real sockets on loopback: scripted or with a real model behind it, and faulty on demand.

with ModelServer(Scripted(lambda messages, seed: "hi")) as server:
    server.faults = [status(500), drop()]      # the next two requests for completions meet these, then all is well
    OpenAIEngine("m", EngineConfig(kind="openai", base_url=server.url))
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol, Self

from spalign.types import Message

Json = dict[str, Any]
Fault = Callable[["Handler", Json], None]
"""Answers a request in place of the model, or does not."""


class Unsupported(Exception):
    """What the backend does not know: a 400, or another status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Backend(Protocol):
    def chat(self, body: Json) -> Json: ...

    def text(self, body: Json) -> Json: ...


class ModelServer:
    """names: what it says it serves. any_name: it takes others, too. window: max_model_len as vLLM tells it. key: what it asks for.

    `requests` holds (path, headers, body) of all that came for a completion. `faults`: one a request, taken from the front;
    `fault_if`: a fault for requests of a kind, for as long as it is set.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        names: Sequence[str] = ("served",),
        any_name: bool = False,
        window: int | None = None,
        key: str | None = None,
    ) -> None:
        self.backend, self.names, self.any_name, self.window, self.key = backend, tuple(names), any_name, window, key
        self.requests: list[tuple[str, dict[str, str], Json]] = []
        self.faults: list[Fault] = []
        self.fault_if: Callable[[str, Json], Fault | None] = lambda path, body: None
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.released = threading.Event()

        class Bound(Handler):
            server_of = self

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that went away is no news."""

        self._http = Server(("127.0.0.1", 0), Bound)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def asked(self, path: str = "") -> list[Json]:
        return [body for p, _, body in self.requests if p.endswith(path)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: ModelServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, value: Any, status: int = 200, headers: Json | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def error(self, status: int, message: str, headers: Json | None = None) -> None:
        self.reply({"error": {"message": message, "type": "error", "code": None}}, status, headers)

    def do_GET(self) -> None:
        server = self.server_of
        if not self.path.endswith("/models"):
            self.error(404, "no such path")
        elif self._allowed():
            window = {} if server.window is None else {"max_model_len": server.window}
            self.reply({"object": "list", "data": [{"id": n, "object": "model", **window} for n in server.names]})

    def _allowed(self) -> bool:
        given = self.headers.get("Authorization", "")
        if self.server_of.key is None or given == f"Bearer {self.server_of.key}":
            return True
        self.error(401, f"Incorrect API key provided: {given.removeprefix('Bearer ')}. Header: {given}")
        return False

    def do_POST(self) -> None:
        server = self.server_of
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            fault = server.faults.pop(0) if server.faults else server.fault_if(self.path, body)
        try:
            if fault is not None:
                fault(self, body)
            elif self._allowed():
                self._answer(body)
        finally:
            with server.lock:
                server.under_way -= 1

    def _answer(self, body: Json) -> None:
        server = self.server_of
        if body["model"] not in server.names and not server.any_name:
            return self.error(404, f"The model `{body['model']}` does not exist.")
        try:
            made = (server.backend.chat if self.path.endswith("/chat/completions") else server.backend.text)(body)
        except Unsupported as e:
            return self.error(e.status, str(e))
        return self.reply({"id": "x", "object": "completion", "created": 0, "model": body["model"], **made})


# ---- faults


def status(code: int, message: str = "something is wrong", **headers: str) -> Fault:
    return lambda handler, body: handler.error(code, message, {k.replace("_", "-"): v for k, v in headers.items()})


def raw(data: bytes, **headers: str) -> Fault:
    """A reply of these bytes with status 200."""
    return lambda handler, body: handler.reply(data, 200, headers)


def elsewhere(url: str, code: int = 307) -> Fault:
    return lambda handler, body: handler.reply(b"", code, {"Location": url})


def drop(handler: Handler, body: Json) -> None:
    """The connection ends without a word."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def cut(handler: Handler, body: Json) -> None:
    """The connection ends in the middle of a reply."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.wfile.flush()
    drop(handler, body)


def endless(handler: Handler, body: Json) -> None:
    """A reply that goes on for as long as someone reads it."""
    handler.close_connection = True
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    with contextlib.suppress(OSError):
        handler.wfile.write(b'{"choices": [{"message": {"content": "')
        while not handler.server_of.released.is_set():
            handler.wfile.write(b"x" * (1 << 20))


def hang(seconds: float) -> Fault:
    """No reply for so long, or until the server ends."""

    def fault(handler: Handler, body: Json) -> None:
        handler.server_of.released.wait(seconds)
        with contextlib.suppress(OSError):
            drop(handler, body)

    return fault


HALF_JSON = raw(b'{"choices": [{"index": 0, "message": {"role": "assistant", "conte')
NO_CHOICES = raw(b'{"choices": []}')
NO_CONTENT = raw(b'{"choices": [{"message": {"content": null}, "text": null, "finish_reason": "stop"}]}')


# ---- what stands behind it


def chat_choice(text: str | None, finish_reason: str = "stop", logprobs: Json | None = None) -> Json:
    return {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason, "logprobs": logprobs}


class Scripted:
    """Answers by a function of (messages, seed). alternatives: (messages or text) -> token -> log-probability, at most 20.

    A word is a token. Without alternatives it has no log-probabilities, and says so with a 400. delay: seconds an answer takes.
    """

    def __init__(
        self,
        answer: Callable[[tuple[Message, ...], int], str],
        alternatives: Callable[[Any], dict[str, float]] | None = None,
        *,
        delay: float = 0.0,
    ) -> None:
        self.answer, self.alternatives, self.delay = answer, alternatives, delay

    def chat(self, body: Json) -> Json:
        time.sleep(self.delay)
        if body.get("logprobs") and self.alternatives is None:
            raise Unsupported("logprobs are not supported")
        messages = tuple(Message(m["role"], m["content"]) for m in body["messages"])
        words = self.answer(messages, body.get("seed", 0)).split(" ")
        limit = body.get("max_tokens") or body["max_completion_tokens"]
        top = None
        if body.get("logprobs") and self.alternatives:
            found = [{"token": t, "logprob": v} for t, v in list(self.alternatives(messages).items())[: body["top_logprobs"]]]
            top = {"content": [{"token": words[0], "logprob": -0.1, "top_logprobs": found}]}
        done = len(words) < limit  # the end takes a token
        return {"choices": [chat_choice(" ".join(words[:limit]), "stop" if done else "length", top)]}

    def text(self, body: Json) -> Json:
        if self.alternatives is None:
            raise Unsupported("no such path", 404)
        if body.get("echo"):
            raise Unsupported("echo is not supported")
        found = dict(list(self.alternatives(body["prompt"]).items())[: body["logprobs"]])
        logprobs = {"tokens": ["x"], "token_logprobs": [-0.1], "top_logprobs": [found]}
        return {"choices": [{"index": 0, "text": "x", "finish_reason": "length", "logprobs": logprobs}]}


class Real:
    """A TransformersEngine as a server has it: chat with log-probabilities, plain completions of one token, prompts echoed.

    always: tokens that stand among the alternatives even where they are unlikely (a model of random weights never has " Yes" there).
    """

    def __init__(self, engine: Any, always: Sequence[str] = ()) -> None:
        self.engine, self.lock = engine, threading.Lock()
        self.always = [engine.tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in always]

    def chat(self, body: Json) -> Json:
        from spalign.engines.base import GenerateRequest, Sampling

        messages = tuple(Message(m["role"], m["content"]) for m in body["messages"])
        prompt = self.engine.encode_chat(messages)
        if len(prompt) + body["max_tokens"] > self.engine.window:
            raise Unsupported(f"This model's maximum context length is {self.engine.window} tokens.")
        sampling = Sampling(body.get("temperature", 1.0), body.get("top_p", 1.0), body["max_tokens"])
        with self.lock:
            (made,) = self.engine.generate([GenerateRequest("x", messages, (body.get("seed", 0),), sampling)])
            logprobs = None
            if body.get("logprobs"):
                ids = [*prompt, *made.token_ids]
                tops = self._tops(ids, len(prompt), body["top_logprobs"], self._logprobs(ids))
                logprobs = {"content": [{"token": t, "logprob": v, "top_logprobs": top} for t, v, top in tops]}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(made.token_ids)}
        return {"choices": [chat_choice(made.text, "stop" if made.finished else "length", logprobs)], "usage": usage}

    def text(self, body: Json) -> Json:
        prompt = body["prompt"]
        ids = list(self.engine.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt
        if len(ids) + body["max_tokens"] > self.engine.window:
            raise Unsupported(f"This model's maximum context length is {self.engine.window} tokens.")
        with self.lock:
            all_ = self._logprobs(ids)
            tops = self._tops([*ids, int(all_[-1].argmax())], 0 if body.get("echo") else len(ids), body["logprobs"], all_)
        logprobs = {
            "tokens": [t for t, _, _ in tops],
            "token_logprobs": [v for _, v, _ in tops],
            "top_logprobs": [{a["token"]: a["logprob"] for a in top} if top else None for _, _, top in tops],
        }
        return {"choices": [{"index": 0, "text": tops[-1][0], "finish_reason": "length", "logprobs": logprobs}]}

    def _logprobs(self, ids: Sequence[int]) -> Any:
        import torch

        with torch.inference_mode():
            return self.engine.model(torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)

    def _tops(self, ids: Sequence[int], start: int, k: int, all_: Any) -> list[tuple[str, float | None, list[Json]]]:
        """(token, its log-probability, the k likeliest in its place) from position `start` on; the first of all has neither.

        all_: log-probabilities after each of the ids but perhaps the last.
        """
        out: list[tuple[str, float | None, list[Json]]] = []
        for i in range(start, len(ids)):
            text = self.engine.tokenizer.decode([ids[i]])
            if i == 0:
                out.append((text, None, []))
                continue
            places = dict.fromkeys([*all_[i - 1].topk(k).indices.tolist(), *self.always])
            top = [{"token": self.engine.tokenizer.decode([p]), "logprob": float(all_[i - 1, p])} for p in places]
            value = float(all_[i - 1, ids[i]])
            assert math.isfinite(value)
            out.append((text, value, top))
        return out
