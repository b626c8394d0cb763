"""A server that speaks the OpenAI protocol: many requests at a time, replies as they come, failures as errors that say what to do.

Retries, backoff and rate limits are the `openai` client's. A reply that is none (half JSON, no choices, an answer without text) counts as a
lost connection, so the client asks again. Everything that a server says is hostile: it is checked, and of errors only a line is shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError, model_validator

from spalign.config import EngineConfig
from spalign.engines.base import EngineFailed
from spalign.errors import EngineError
from spalign.text import one_line, printable, shorten

CHAT, TEXT, MODELS = "/chat/completions", "/completions", "/models"
UNSUPPORTED = frozenset({400, 403, 404, 405, 415, 422, 501})
"""Statuses by which servers say that they do not know a path or a parameter."""
LARGEST = 64 << 20
"""Bytes that a reply may have; the log-probabilities of a prompt of 100,000 tokens are about 16 MB."""
CONNECT = 10.0
"""Seconds in which a server must take a connection, however long its answers may take."""
_TOO_LONG = ("context length", "context_length", "context window", "context size", "exceeds the available context", "maximum model length")


LogProb = Annotated[float, Field(le=1e-3, allow_inf_nan=False)]
"""A finite log-probability, rounding allowed for: anything else says that the reply is broken."""


class Alternative(BaseModel):
    token: str
    logprob: LogProb


class Position(Alternative):
    top_logprobs: list[Alternative] = []


class Logprobs(BaseModel):
    """Per position: as chat replies have them (`content`), or as those of plain completions (the other three, by position)."""

    content: list[Position] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[LogProb | None] | None = None
    top_logprobs: list[dict[str, LogProb] | None] | None = None

    def first(self) -> dict[str, float]:
        """Token -> log-probability at the first position, as many as the server gave."""
        if self.content:
            return {a.token: a.logprob for a in self.content[0].top_logprobs}
        return dict(self.top_logprobs[0] or {}) if self.top_logprobs else {}


class Answer(BaseModel):
    content: str | None = None


class Choice(BaseModel):
    """text: of a plain completion. message: of a chat; without content only where the model was cut off before it said anything."""

    text: str | None = None
    message: Answer | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None

    @property
    def said(self) -> str:
        return (self.message.content if self.message else self.text) or ""

    @model_validator(mode="after")
    def _says_something(self) -> Choice:
        content = self.message.content if self.message else self.text
        if content is None and self.finish_reason not in ("length", "content_filter"):
            raise ValueError("an answer without text")
        return self


class Usage(BaseModel):
    prompt_tokens: int | None = None


class Reply(BaseModel):
    """What a server says to a request for a completion."""

    choices: list[Choice] = Field(min_length=1)
    usage: Usage | None = None

    @property
    def choice(self) -> Choice:
        return self.choices[0]


class Listed(BaseModel):
    id: str
    max_model_len: int | None = None


class Models(BaseModel):
    data: list[Listed]


class Job(NamedTuple):
    """A request. what: how an error names it."""

    path: str
    body: dict[str, Any]
    what: str = "a question"


class Refused(EngineFailed):
    """The server understood the request and said no; `status` as in HTTP. too_long: because it exceeds the model's window."""

    def __init__(self, message: str, status: int, *, too_long: bool = False, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status, self.too_long = status, too_long


class Endpoint:
    """Asks `config.base_url`. Raises EngineError at once where the `openai` package or a named key is missing."""

    def __init__(self, config: EngineConfig) -> None:
        if importlib.util.find_spec("openai") is None:
            raise EngineError("engine.kind openai needs the package openai", hint="pip install 'spalign[openai]'")
        self._config = config
        self.url = str(config.base_url)
        self.served: tuple[str, ...] = ()
        key = os.environ.get(config.api_key_env, "")
        if not key and config.api_key_env != type(config).model_fields["api_key_env"].default:
            raise EngineError(f"the environment variable {config.api_key_env} holds no key", hint="export it, or change api_key_env")
        if not all("!" <= c <= "~" for c in key):
            raise EngineError(
                f"the environment variable {config.api_key_env} holds characters that no key has",
                hint="export the key again, without spaces",
            )

    def one(self, job: Job) -> Reply:
        """The reply to one request. Raises Refused, or EngineFailed where the server cannot be used."""
        return Reply.model_validate_json(next(self._ask([job]))[1])

    def models(self) -> Models | None:
        """What the server says it serves; None where it does not say."""
        try:
            return Models.model_validate_json(next(self._ask([Job(MODELS, {})]))[1])
        except Refused as e:
            if e.status in UNSUPPORTED:
                return None
            raise

    def all(self, jobs: Sequence[Job], *, skip_long: bool) -> Iterator[tuple[int, Reply | None]]:
        """Index of the job and its reply, as they come, `concurrency` at a time.

        skip_long: a job that exceeds the model's window has None for a reply; else it is a failure like others.

        After a failure nothing new is asked; what is under way is waited for and given, then the error is raised. A caller that stops
        early, or is interrupted, waits for nothing.
        """
        for i, content in self._ask(jobs, skip_long=skip_long):
            yield i, None if content is None else Reply.model_validate_json(content)

    def _ask(self, jobs: Sequence[Job], *, skip_long: bool = False) -> Iterator[tuple[int, Any]]:
        # a loop in a thread of its own: callers may have a running loop (notebooks), and replies are read while they work
        out: SimpleQueue[Any] = SimpleQueue()
        loop = asyncio.new_event_loop()
        task = loop.create_task(self._all(jobs, out, skip_long))

        def work() -> None:
            try:
                loop.run_until_complete(task)
                out.put(None)
            except asyncio.CancelledError:
                pass
            except BaseException as e:  # raised where the replies are read
                out.put(e)
            finally:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.run_until_complete(loop.shutdown_default_executor())
                loop.close()

        thread = Thread(target=work, daemon=True, name="spalign-openai")
        thread.start()
        try:
            while (item := out.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            with contextlib.suppress(RuntimeError):  # it ended meanwhile
                loop.call_soon_threadsafe(task.cancel)
            thread.join()

    async def _all(self, jobs: Sequence[Job], out: SimpleQueue[Any], skip_long: bool) -> None:
        todo = iter(enumerate(jobs))
        failed: list[EngineFailed] = []

        async def worker(client: Any) -> None:
            for i, job in todo:
                try:
                    out.put((i, await self._post(client, job)))
                except Refused as e:
                    if skip_long and e.too_long:
                        out.put((i, None))
                    else:
                        failed.append(e)
                except EngineFailed as e:
                    failed.append(e)
                if failed:
                    return

        async with self._client() as client, asyncio.TaskGroup() as group:
            for _ in range(min(self._config.concurrency, len(jobs))):
                group.create_task(worker(client))
        if failed:
            raise failed[0]

    def _client(self) -> Any:
        import openai

        own = self._config
        return openai.AsyncOpenAI(
            base_url=self.url,
            api_key=os.environ.get(own.api_key_env) or "none",
            max_retries=own.max_retries,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [self._check]}),
            timeout=openai.Timeout(own.timeout, connect=min(own.timeout, CONNECT)),
        )

    async def _check(self, response: Any) -> None:
        """Called by the transport with every response: one that is none becomes a lost connection, which the client retries."""
        import httpx2

        if (named := response.headers.get("x-request-id")) is not None:  # the client's debug log shows it as it came
            response.headers["x-request-id"] = self.without_key(named)
        response.stream = _capped(response)
        if not response.is_success:
            return
        content = await response.aread()
        kind = Models if response.request.url.path.endswith(MODELS) else Reply
        try:
            kind.model_validate_json(content)
        except ValidationError as e:
            first = e.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"][:3]))
            why = first["msg"].removeprefix("Value error, ")
            raise httpx2.RemoteProtocolError(f"{where}: {why}" if where else why, request=response.request) from None

    async def _post(self, client: Any, job: Job) -> bytes:
        import httpx2
        import openai

        try:
            if job.path == MODELS:
                response = await client.get(job.path, cast_to=httpx2.Response)
            else:
                response = await client.post(job.path, body=job.body, cast_to=httpx2.Response)
        except openai.APIStatusError as e:
            raise self._refused(e.status_code, self._line(e), job) from None
        except openai.APITimeoutError as e:
            if isinstance(e.__cause__, httpx2.ConnectTimeout):
                raise self._unreached("it does not answer") from None
            raise EngineFailed(
                f"{self.url}: no reply within {self._config.timeout:g} s, {self._tries}, to {job.what}",
                hint="raise engine.timeout or lower engine.concurrency",
            ) from None
        except openai.APIConnectionError as e:
            cause = e.__cause__
            if isinstance(cause, httpx2.RemoteProtocolError):
                raise EngineFailed(
                    f"{self.url}: no usable reply, {self._tries}, to {job.what}: {self._shown(str(cause))}",
                    hint="see the server's log, and whether it speaks the OpenAI protocol at this address",
                ) from None
            raise self._unreached(type(cause).__name__) from None
        return bytes(response.content)

    def _unreached(self, why: str) -> EngineFailed:
        return EngineFailed(f"{self.url}: no connection, {self._tries} ({why})", hint="start the server, or mend base_url")

    @property
    def _tries(self) -> str:
        return f"tried {self._config.max_retries + 1} times" if self._config.max_retries else "tried once"

    def _refused(self, status: int, said: str, job: Job) -> Refused:
        own = self._config
        model = self._shown(str(job.body.get("model", "")))
        if status in (401, 403):  # what it says may hold the key
            has = "does not accept the key in" if os.environ.get(own.api_key_env) else "wants a key, and there is none in"
            return Refused(f"{self.url} {has} {own.api_key_env} ({status})", status, hint=f"export {own.api_key_env}=...")
        if status == 404:
            names = f"it serves: {self._shown(', '.join(self.served[:8]))}" if self.served else "base_url usually ends in /v1"
            return Refused(
                f"{self.url} has no model '{model}' at {job.path} (404): {said}", status, hint=f"mend the name or base_url; {names}"
            )
        if status == 429:
            hint = "lower engine.concurrency, raise engine.max_retries, or see your quota"
            return Refused(f"{self.url}: too many requests (429), {self._tries}: {said}", status, hint=hint)
        if status >= 500 and status not in UNSUPPORTED:
            return Refused(f"{self.url} failed ({status}), {self._tries}, on {job.what}: {said}", status, hint="see its log")
        long = status in (400, 413, 422) and any(sign in said.lower() for sign in _TOO_LONG)
        hint = "shorten it or drop it, or let the model write less" if long else "see whether the server takes such a request"
        return Refused(f"{self.url} refused {job.what} ({status}): {said}", status, too_long=long, hint=hint)

    def _line(self, error: Any) -> str:
        """What the server said, on a line."""
        body = error.body
        told = body.get("message") or body.get("detail") if isinstance(body, dict) else body
        return self._shown(str(told or "nothing more"))

    def _shown(self, text: str) -> str:
        return shorten(one_line(printable(self.without_key(text))), 300)

    def without_key(self, text: str) -> str:
        """What a server said, should it repeat the key."""
        key = os.environ.get(self._config.api_key_env, "")
        return text.replace(key, "[key]") if len(key) >= 8 else text


def _capped(response: Any) -> Any:
    """The response's stream, which breaks off where there is no end to it."""
    import httpx2

    class Capped(httpx2.AsyncByteStream):  # type: ignore[misc]
        stream = response.stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            left = LARGEST
            async for chunk in self.stream:
                left -= len(chunk)
                if left < 0:
                    raise httpx2.RemoteProtocolError(f"more than {LARGEST >> 20} MB", request=response.request)
                yield chunk

        async def aclose(self) -> None:
            await self.stream.aclose()

    return Capped()
