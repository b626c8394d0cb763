"""What a server that speaks the OpenAI protocol can do: asked with a few small requests, not believed."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spalign.engines.base import EngineFailed
from spalign.engines.endpoint import CHAT, TEXT, Endpoint
from spalign.engines.failures import UNSUPPORTED, Job, Refused
from spalign.engines.replies import Reply
from spalign.engines.tokens import ChatTokens
from spalign.errors import EngineError
from spalign.types import Message

_HELLO = (Message("user", "Is water wet? Answer with one word."),)
_SENTENCE = "The sky is blue and the grass is green."
_TOP = (20, 5)  # how many alternatives servers give: vLLM, llama.cpp and OpenAI 20, some hosted ones 5


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the server was found to do.

    limit: its name for max_tokens. seeds: it takes them. chat_top, text_top: alternatives per token, with their log-probabilities, after a
    conversation and after plain text (0: none). echo: log-probabilities of a prompt that is given as token ids. window: None if not told.
    """

    limit: str
    seeds: bool
    chat_top: int
    text_top: int
    echo: bool
    window: int | None


def probe(endpoint: Endpoint, model: str, tokens: ChatTokens | None) -> Abilities:
    """What the server can do; raises EngineError where the model does not answer, or where `tokens` are not those of the model.

    What could not be found out is a warning of the log `spalign`.
    """
    listed = endpoint.models() or []
    endpoint.words.served = tuple(m.id for m in listed)
    window = next((m.max_model_len for m in listed if m.id == model), None)
    reply, limit, seeds, chat_top = _probe_chat(endpoint, model)
    _check_name(endpoint, model, reply)
    counted = reply.usage.prompt_tokens if reply.usage else None
    if tokens and not counted:
        _note(f"{endpoint.url} does not say how many tokens it reads: whether '{model}' has the tokenizer named here is not known")
    if tokens and counted and counted != (own := len(tokens.chat(_HELLO))):
        if counted == len(tokens.chat(_HELLO, thinking=True)):
            raise EngineError(
                f"{endpoint.url}: '{model}' thinks before it answers, and its answers are to be judged and trained on",
                hint="have the server switch it off; vLLM: --default-chat-template-kwargs '{\"enable_thinking\": false}'",
            )
        raise EngineError(
            f"{endpoint.url}: '{model}' reads a question of {own} tokens as {counted}: it has another tokenizer or chat template",
            hint="set engine.tokenizer to the very model that is served, and serve it with its own chat template",
        )
    weighs = tokens is not None and _probe_prompt(endpoint, model, tokens)
    return Abilities(limit, seeds, chat_top, _probe_text(endpoint, model), weighs, window)


def _check_name(endpoint: Endpoint, model: str, reply: Reply) -> None:
    """Raises EngineError where the server has one model, of another name; some that list several take more names than they list."""
    names = {name.removesuffix(":latest") for name in endpoint.words.served}
    called = model.removesuffix(":latest")  # Ollama's way
    if names and called not in names:
        if len(names) == 1 and "*" not in min(names):
            raise EngineError(f"{endpoint.url} has no model '{model}', though it answers", hint=endpoint.words.other_name())
        _note(f"{endpoint.url} answers as '{model}', which is not among the {len(names)} models that it lists")
    if reply.model and reply.model.removesuffix(":latest") != called:
        _note(f"{endpoint.url} says that '{model}' is '{endpoint.words.shown(reply.model)}'")


def _note(text: str) -> None:
    logging.getLogger("spalign").warning("note: %s", text)


def _probe_chat(endpoint: Endpoint, model: str) -> tuple[Reply, str, bool, int]:
    """An answer, and what was taken to get it: the name of the limit, a seed, so many alternatives."""
    hello = {"model": model, "messages": [{"role": m.role, "content": m.content} for m in _HELLO]}
    refused: list[Refused] = []
    for limit, seeds, top in itertools.product(("max_tokens", "max_completion_tokens"), (True, False), (*_TOP, 0)):
        asked = {limit: 16} | ({"seed": 1} if seeds else {}) | ({"logprobs": True, "top_logprobs": top} if top else {})
        try:
            reply = endpoint.one(Job(CHAT, hello | asked, "a first question"))
        except Refused as e:
            if e.status not in (400, 422):
                raise
            refused.append(e)
        else:
            return reply, limit, seeds, _given(reply, top)
    raise refused[-1]


def _probe_text(endpoint: Endpoint, model: str) -> int:
    """How many alternatives the server gives after plain text."""
    for top in _TOP:
        body = {"model": model, "prompt": _SENTENCE, "max_tokens": 1, "temperature": 1.0, "logprobs": top}
        try:
            return _given(endpoint.one(Job(TEXT, body)), top)
        except Refused as e:
            if e.status not in UNSUPPORTED:
                raise
    return 0


def _given(reply: Reply, top: int) -> int:
    logprobs = reply.choice.logprobs
    return min(len(logprobs.first()), top) if logprobs else 0


def _probe_prompt(endpoint: Endpoint, model: str, tokens: ChatTokens) -> bool:
    """Whether the server gives the log-probabilities of a prompt in token ids, and reads them as `tokens` does."""
    ids = tokens.text(_SENTENCE)
    try:
        reply = endpoint.one(Job(TEXT, echo(model, ids)))
        echoed(reply, 1, len(ids) - 1, endpoint.url)
    except Refused as e:
        if e.status not in UNSUPPORTED:
            raise
        return False
    except EngineFailed:
        raise
    except EngineError:  # it answers without them
        return False
    read = "".join((reply.choice.logprobs.tokens or [])[: len(ids)]) if reply.choice.logprobs else ""
    return re.findall("[A-Za-z]", read) == re.findall("[A-Za-z]", _SENTENCE)  # servers show spaces in many ways


def echo(model: str, ids: Sequence[int]) -> dict[str, Any]:
    return {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 1.0, "echo": True, "logprobs": 1}


def echoed(reply: Reply, context: int, length: int, url: str) -> tuple[float, ...]:
    logprobs = reply.choice.logprobs
    values = (logprobs.token_logprobs or [])[context : context + length] if logprobs else []
    known = tuple(v for v in values if v is not None)
    if len(known) != length:
        raise EngineError(
            f"{url} gave log-probabilities for {len(known)} of {length} tokens of an answer", hint="use a likert or yes/no scorer"
        )
    return known
