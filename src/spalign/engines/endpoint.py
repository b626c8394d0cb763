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
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any

from pydantic import ValidationError

from spalign.config import EngineConfig
from spalign.engines.base import EngineFailed
from spalign.engines.failures import UNSUPPORTED, Job, Refused, Words
from spalign.engines.replies import Listed, Models, Reply, why_none
from spalign.errors import EngineError

CHAT, TEXT, MODELS = "/chat/completions", "/completions", "/models"
LARGEST = 64 << 20
"""Bytes that a reply may have; the log-probabilities of a prompt of 100,000 tokens are about 16 MB."""
CONNECT = 10.0
"""Seconds in which a server must take a connection, however long its answers may take."""
_NO_KEY = "none"
_TURN = 0.02
"""Seconds after which a call that has no slot looks for one again."""


class Endpoint:
    """Asks `config.base_url`. Raises EngineError at once where the `openai` package or a named key is missing."""

    def __init__(self, config: EngineConfig) -> None:
        if importlib.util.find_spec("openai") is None:
            raise EngineError("engine.kind openai needs the package openai", hint="pip install 'spalign[openai]'")
        self._config = config
        self.url = str(config.base_url)
        self.words = Words(config)
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

    def models(self) -> list[Listed] | None:
        """What the server says it serves; None where it does not say."""
        try:
            return Models.model_validate_json(next(self._ask([Job(MODELS, {})]))[1]).data
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
            asked = self.words.shown(str(job.body["model"]))
            raise EngineFailed(
                f"{self.url}: first '{self.words.shown(first)}' answered for '{asked}', and now '{self.words.shown(reply.model)}'",
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
        key = os.environ.get(own.api_key_env)
        try:
            return openai.AsyncOpenAI(
                base_url=self.url,
                api_key=key or _NO_KEY,
                max_retries=own.max_retries,
                default_headers={"Accept-Encoding": "identity"},
                http_client=openai.DefaultAsyncHttpxClient(
                    event_hooks={"request": [] if key else [_without_key], "response": [self._check]}
                ),
                timeout=openai.Timeout(own.timeout, connect=min(own.timeout, CONNECT)),
            )
        except Exception as e:  # whatever the settings that it reads make of it
            raise self.words.unsettled(e) from None

    async def _check(self, response: Any) -> None:
        """Called by the transport with every response: one that is none becomes a lost connection, which the client retries."""
        import httpx2

        if (named := response.headers.get("x-request-id")) is not None:  # the client's debug log shows it as it came
            response.headers["x-request-id"] = self.words.without_key(named)
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
            raise self.words.refused(e, job) from None
        except openai.APIConnectionError as e:
            raise self.words.lost(e, job) from None
        except Exception as e:  # what the client reads is used only now, or a server redirects to an address that is none
            raise self.words.unsettled(e) from None
        return bytes(response.content)


async def _without_key(request: Any) -> None:
    """The client wants a key, and writes one into every request."""
    if request.headers.get("Authorization") == f"Bearer {_NO_KEY}":  # not one of OPENAI_CUSTOM_HEADERS
        del request.headers["Authorization"]


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
