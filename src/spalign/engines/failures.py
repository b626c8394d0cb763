"""What can go wrong with a server, in words: what it says is cut to a line and shown without the key, settings without their values."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any, NamedTuple

from spalign.config import EngineConfig
from spalign.engines.base import EngineFailed
from spalign.engines.replies import told
from spalign.text import one_line, printable, shorten

UNSUPPORTED = frozenset({400, 403, 404, 405, 415, 422, 501})
"""Statuses by which servers say that they do not know a path or a parameter."""
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


class Words:
    """Errors of the server at `config.base_url`. served: the models that it lists."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.url = str(config.base_url)
        self.served: tuple[str, ...] = ()

    def unsettled(self, error: Exception) -> EngineFailed:
        """No request can be made: what the client reads of its environment, or the address, is none."""
        why, names = type(error).__name__, _SETTINGS
        if isinstance(error, ImportError):  # what a proxy's kind needs
            why = str(error)
        elif isinstance(error, OSError):
            why, names = error.strerror or why, _CERTIFICATES
        return EngineFailed(
            f"{self.url}: no request can be made with these settings ({one_line(why)})", hint=f"mend base_url{_or_those_set(names)}"
        )

    def lost(self, error: Any, job: Job) -> EngineFailed:
        """After the last try: no connection, silence, or a reply that is none."""
        import httpx2
        import openai

        cause = error.__cause__
        if isinstance(cause, httpx2.LocalProtocolError):  # it says what it was given
            return self.unsettled(cause)
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

    def refused(self, error: Any, job: Job) -> Refused:
        """The server's own no, after the last try."""
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
        """What a server said, on a line, without the key."""
        return shorten(one_line(printable(self.without_key(text))), 300)

    def without_key(self, text: str) -> str:
        """As it was said, should it repeat the key."""
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
