"""A server that speaks the OpenAI protocol: many requests at a time, replies as they come, failures as errors that say what to do.

Retries, backoff and rate limits are the `openai` client's. A reply that is none (half JSON, no choices, an answer without text) counts as a
lost connection, so the client asks again. Everything that a server says is hostile: it is checked, and of errors only a line is shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any, NamedTuple

from pydantic import ValidationError

from spalign.config import EngineConfig
from spalign.engines.base import EngineFailed
from spalign.engines.replies import Models, Reply, told, why_none
from spalign.errors import EngineError
from spalign.text import one_line, printable, shorten

CHAT, TEXT, MODELS = "/chat/completions", "/completions", "/models"
UNSUPPORTED = frozenset({400, 403, 404, 405, 415, 422, 501})
"""Statuses by which servers say that they do not know a path or a parameter."""
LARGEST = 64 << 20
"""Bytes that a reply may have; the log-probabilities of a prompt of 100,000 tokens are about 16 MB."""
CONNECT = 10.0
"""Seconds in which a server must take a connection, however long its answers may take."""
_TURN = 0.02
"""Seconds after which a call that has no slot looks for one again."""
_PROXIES = frozenset({"ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"})
_CERTIFICATES = frozenset({"SSL_CERT_FILE", "SSL_CERT_DIR"})
_SETTINGS = _PROXIES | {"OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"}
"""Environment variables that the client reads; proxies hold passwords, so no value is shown."""
_TOO_LONG = ("context length", "context_length", "context window", "context size", "exceeds the available context", "maximum model length")


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
        self._answering: dict[str, str] = {}
        self._slots = Semaphore(config.concurrency)
        self._under_way: set[Callable[[], object]] = set()
        self._closed = False
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
        return self._read(job, next(self._ask([job]))[1])

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
        early, or is interrupted, waits for nothing. Calls of several threads have `concurrency` together, what is begun first goes first.
        """
        for i, content in self._ask(jobs, skip_long=skip_long):
            yield i, None if content is None else self._read(jobs[i], content)

    def close(self) -> None:
        """Calls under way, and those to come, fail with EngineError."""
        self._closed = True
        for end in list(self._under_way):
            end()

    def _read(self, job: Job, content: bytes) -> Reply:
        """Raises EngineFailed where another model answers than before."""
        reply = Reply.model_validate_json(content)
        if reply.model and (first := self._answering.setdefault(job.path, reply.model)) != reply.model:
            asked = self.shown(str(job.body["model"]))
            raise EngineFailed(
                f"{self.url}: first '{self.shown(first)}' answered for '{asked}', and now '{self.shown(reply.model)}'",
                hint="name one model, not a router or an alias that moves",
            )
        return reply

    def _ask(self, jobs: Sequence[Job], *, skip_long: bool = False) -> Iterator[tuple[int, Any]]:
        # a loop in a thread of its own: callers may have a running loop (notebooks), and replies are read while they work
        out: SimpleQueue[Any] = SimpleQueue()
        loop = asyncio.new_event_loop()
        task = loop.create_task(self._all(jobs, out, skip_long))

        def end() -> None:
            with contextlib.suppress(RuntimeError):  # it ended meanwhile
                loop.call_soon_threadsafe(task.cancel)

        def work() -> None:
            try:
                loop.run_until_complete(task)
                out.put(None)
            except asyncio.CancelledError:
                out.put(EngineError("the openai engine was closed", hint="make a new one"))
            except BaseException as e:  # raised where the replies are read
                out.put(e)
            finally:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.run_until_complete(loop.shutdown_default_executor())
                loop.close()

        thread = Thread(target=work, daemon=True, name="spalign-openai")
        thread.start()
        self._under_way.add(end)
        try:
            if self._closed:
                end()
            while (item := out.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._under_way.discard(end)
            end()
            thread.join()

    async def _all(self, jobs: Sequence[Job], out: SimpleQueue[Any], skip_long: bool) -> None:
        todo = deque(enumerate(jobs))
        failed: list[EngineFailed] = []

        async def worker(client: Any) -> None:
            while todo and not failed:
                i, job = todo.popleft()
                try:
                    out.put((i, await self._post(client, job)))
                except Refused as e:
                    if skip_long and e.too_long:
                        out.put((i, None))
                    else:
                        failed.append(e)
                except EngineFailed as e:
                    failed.append(e)

        async with self._client() as client, asyncio.TaskGroup() as group:
            while todo and not failed:
                if got := self._slots.acquire(blocking=False):  # calls have loops of their own, so it cannot be waited for
                    group.create_task(worker(client)).add_done_callback(lambda _: self._slots.release())
                await asyncio.sleep(0 if got else _TURN)
        if failed:
            raise failed[0]

    def _client(self) -> Any:
        import openai

        own = self._config
        try:
            return openai.AsyncOpenAI(
                base_url=self.url,
                api_key=os.environ.get(own.api_key_env) or "none",
                max_retries=own.max_retries,
                default_headers={"Accept-Encoding": "identity"},
                http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [self._check]}),
                timeout=openai.Timeout(own.timeout, connect=min(own.timeout, CONNECT)),
            )
        except Exception as e:  # whatever the settings that it reads make of it
            raise self._unsettled(e) from None

    async def _check(self, response: Any) -> None:
        """Called by the transport with every response: one that is none becomes a lost connection, which the client retries."""
        import httpx2

        if (named := response.headers.get("x-request-id")) is not None:  # the client's debug log shows it as it came
            response.headers["x-request-id"] = self.without_key(named)
        if response.headers.get("content-encoding", "").lower() not in ("", "identity"):  # a few bytes may stand for gigabytes
            raise httpx2.RemoteProtocolError("it is compressed, which was not asked for", request=response.request)
        response.stream = _capped(response)
        if not response.is_success:
            return
        content = await response.aread()
        kind = Models if response.request.url.path.endswith(MODELS) else Reply
        try:
            kind.model_validate_json(content)
        except ValidationError as e:
            raise httpx2.RemoteProtocolError(why_none(content, e), request=response.request) from None

    async def _post(self, client: Any, job: Job) -> bytes:
        import httpx2
        import openai

        try:
            if job.path == MODELS:
                response = await client.get(job.path, cast_to=httpx2.Response)
            else:
                response = await client.post(job.path, body=job.body, cast_to=httpx2.Response)
        except openai.APIStatusError as e:
            raise self._refused(e, job) from None
        except openai.APIConnectionError as e:
            raise self._lost(e, job) from None
        except Exception as e:  # what the client reads is used only now, or a server redirects to an address that is none
            raise self._unsettled(e) from None
        return bytes(response.content)

    def _unsettled(self, error: Exception) -> EngineFailed:
        why, names = type(error).__name__, _SETTINGS
        if isinstance(error, ImportError):  # what a proxy's kind needs
            why = str(error)
        elif isinstance(error, OSError):
            why, names = error.strerror or why, _CERTIFICATES
        return EngineFailed(
            f"{self.url}: no request can be made with these settings ({one_line(why)})", hint=f"mend base_url{_or_those_set(names)}"
        )

    def _lost(self, error: Any, job: Job) -> EngineFailed:
        """After the last try: no connection, silence, or a reply that is none."""
        import httpx2
        import openai

        cause = error.__cause__
        at, tried = self._at(getattr(cause, "request", error.request), job), _times(_tries(error))
        if isinstance(error, openai.APITimeoutError) and not isinstance(cause, httpx2.ConnectTimeout):
            return EngineFailed(
                f"{at}: no reply within {self._config.timeout:g} s, {tried}, to {job.what}",
                hint="raise engine.timeout or lower engine.concurrency",
            )
        if isinstance(cause, httpx2.RemoteProtocolError | httpx2.TooManyRedirects):
            return EngineFailed(
                f"{at}: no usable reply, {tried}, to {job.what}: {self.shown(str(cause))}",
                hint="see the server's log, and whether it speaks the OpenAI protocol at this address",
            )
        why = "it does not answer" if isinstance(cause, httpx2.ConnectTimeout) else self.shown(_innermost(cause))
        return EngineFailed(f"{at}: no connection, {tried} ({why})", hint=f"start the server, or mend base_url{_or_those_set(_PROXIES)}")

    def _at(self, request: Any, job: Job) -> str:
        """The address, and where it redirects to: of that no more than the host, which holds no secret."""
        import httpx2

        if request.url == httpx2.URL(self.url + job.path):
            return self.url
        return f"{self.url}, which redirects to {request.url.scheme}://{self.shown(request.url.netloc.decode())}"

    def _refused(self, error: Any, job: Job) -> Refused:
        own, status, said = self._config, error.status_code, self._line(error)
        at, tried = self._at(error.request, job), _times(_tries(error))
        model = self.shown(str(job.body.get("model", "")))
        if status in (401, 403):  # what it says may hold the key
            has = "does not accept the key in" if os.environ.get(own.api_key_env) else "wants a key, and there is none in"
            return Refused(f"{at} {has} {own.api_key_env} ({status})", status, hint=f"export {own.api_key_env}=...")
        if status == 404:
            return Refused(f"{at} has no model '{model}' at {job.path} (404): {said}", status, hint=self.other_name())
        if status == 429:
            hint = f"{self._later(error) or 'lower engine.concurrency, raise engine.max_retries'}, or see your quota"
            return Refused(f"{at}: too many requests (429), {tried}: {said}", status, hint=hint)
        if status >= 500 and status not in UNSUPPORTED:
            return Refused(f"{at} failed ({status}), {tried}, on {job.what}: {said}", status, hint=self._later(error) or "see its log")
        long = status in (400, 413, 422) and any(sign in said.lower() for sign in _TOO_LONG)
        hint = "shorten it or drop it, or let the model write less" if long else "see whether the server takes such a request"
        return Refused(f"{at} refused {job.what} ({status}): {said}", status, too_long=long, hint=hint)

    def other_name(self) -> str:
        """What to do where the server has no model of that name."""
        names = f"it serves: {self.shown(', '.join(self.served[:8]))}" if self.served else "base_url usually ends in /v1"
        return f"mend the name or base_url; {names}"

    def _later(self, error: Any) -> str:
        """When to ask again, where the server says so or let the client try less often than it may."""
        if after := self.shown(error.response.headers.get("retry-after", "")):
            return f"give the same command again {f'in {after} s' if after.isdecimal() else f'after {after}'}"
        return "" if _tries(error) > self._config.max_retries else "give the same command again later: the server wants no other try now"

    def _line(self, error: Any) -> str:
        """What the server said, on a line."""
        return self.shown(told(error.body) or "nothing more")

    def shown(self, text: str) -> str:
        return shorten(one_line(printable(self.without_key(text))), 300)

    def without_key(self, text: str) -> str:
        """What a server said, should it repeat the key."""
        key = os.environ.get(self._config.api_key_env, "")
        return text.replace(key, "[key]") if len(key) >= 8 else text


def _innermost(error: BaseException) -> str:
    """What the system said: unknown host, refused, a certificate that is none."""
    said = type(error).__name__
    inner: BaseException | None = error
    while inner is not None:
        said = str(inner) or said
        inner = inner.exceptions[0] if isinstance(inner, BaseExceptionGroup) else inner.__cause__ or inner.__context__
    return said


def _or_those_set(names: Collection[str]) -> str:
    """Which of these environment variables could be wrong; proxies also go by their names in lower case."""
    found = sorted(n for n in os.environ if n.upper() in names)
    return f", or what is wrong of {', '.join(found)}" if found else ""


def _tries(error: Any) -> int:
    """As the client counts them in the requests it sends."""
    return int(error.request.headers.get("x-stainless-retry-count", 0)) + 1


def _times(tries: int) -> str:
    return f"tried {tries} times" if tries > 1 else "tried once"


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
