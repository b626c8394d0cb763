"""What a server that speaks the OpenAI protocol says: checked as it comes in, because whatever it says is hostile."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, model_validator

LogProb = Annotated[float, Field(le=1e-3, allow_inf_nan=False)]
"""A finite log-probability, rounding allowed for: anything else says that the reply is broken."""


_ENDED = frozenset({"stop", "eos", "eos_token", "stop_sequence", "end", "end_turn"})
_CUT = frozenset({None, "length", "max_tokens", "content_filter", "tool_calls", "function_call"})
"""Finish reasons: the protocol's, and other words for them that servers have."""


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
    def finished(self) -> bool | None:
        """Whether the model came to its end by itself; None where the server's word for it is not known."""
        return True if self.finish_reason in _ENDED else False if self.finish_reason in _CUT else None

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
    model: str | None = None

    @property
    def choice(self) -> Choice:
        return self.choices[0]


class Listed(BaseModel):
    id: str
    max_model_len: int | None = None


class Models(BaseModel):
    """What a server says it serves: an object with `data`, or, with some, the bare list. None where it says nothing of the kind."""

    data: list[Listed] | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_any_shape(cls, said: Any) -> Any:
        listed = said.get("data") if isinstance(said, dict) else said
        if not isinstance(listed, list):
            return {}
        return {"data": [one for one in listed if isinstance(one, dict) and isinstance(one.get("id"), str)]}


class Failure(BaseModel):
    """What some servers say in place of a reply, with status 200."""

    error: Any


def told(error: Any) -> str:
    """What an error says, in the ways that servers write it."""
    return str((error.get("message") or error.get("detail") if isinstance(error, dict) else error) or "")


def why_none(content: bytes, error: ValidationError) -> str:
    """Why that is no reply: what it says itself, or what it lacks."""
    with contextlib.suppress(ValidationError):
        if said := told(Failure.model_validate_json(content).error):
            return said
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where, why = ".".join(map(str, first["loc"][:3])), first["msg"].removeprefix("Value error, ")
    return f"{where}: {why}" if where else why
