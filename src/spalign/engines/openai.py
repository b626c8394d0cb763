"""The openai engine: a model that someone else runs, behind a server that speaks the OpenAI protocol (vLLM, llama.cpp, Ollama, hosted).

What such a server can do differs; it is asked once, at the start, and `capabilities` are what it really has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spalign.config import EngineConfig
from spalign.engines.abilities import echo, echoed, probe
from spalign.engines.base import Ask, Capability, Completion, EngineFailed, GenerateRequest, NoTokenizer
from spalign.engines.endpoint import CHAT, TEXT, Endpoint
from spalign.engines.failures import Job
from spalign.engines.models import locate, resolve
from spalign.engines.replies import Reply
from spalign.engines.tokens import ChatTokens
from spalign.errors import EngineError, ModelError
from spalign.types import Message

UNBOUNDED = 1 << 20
_MASK = 0x7FFFFFFF  # a seed that every server takes
_SPECIAL = re.compile(r"<(?=\|[^|<>\s]{1,40}\|>|/?s>|(?:start|end)_of_turn>|[be]os>|｜)|\[(?=/?INST\]|/?SYSTEM_PROMPT\])")


class OpenAIEngine:
    """One request a completion, many at a time; completions stream out as they finish. Nothing is held open between two calls.

    Takes calls of several threads at the same time (`width`): requests of the later ones go out where those of the earlier have ended.
    """

    name = "openai"
    width = 4

    def __init__(self, model: str, config: EngineConfig, tokens: ChatTokens | None = None) -> None:
        """Asks the server what it can do. tokens: the model's own tokenizer, where it is here. Raises EngineError."""
        self.model, self.tokens = model, tokens
        self._endpoint = Endpoint(config)
        self.abilities = probe(self._endpoint, model, tokens)
        found: set[Capability] = {"generate"}
        if self.abilities.chat_top or self.abilities.text_top:
            found.add("choice_logprobs")
        if self.abilities.echo:
            found.add("loglikelihood")
        self.capabilities: frozenset[Capability] = frozenset(found)
        self._taken: set[tuple[bool, tuple[str, ...]]] = set()

    @classmethod
    def load(cls, name: str, config: EngineConfig) -> OpenAIEngine:
        """The model that the server calls `name`, with the tokenizer of the local model of that name, or of config.tokenizer."""
        return cls(name, config, _tokens(name, config))

    def close(self) -> None:
        """Calls under way, and those to come, fail with EngineError."""
        self._endpoint.close()

    @property
    def window(self) -> int:
        return self.abilities.window or UNBOUNDED

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        work = [(request, i) for request in requests for i in range(len(request.seeds))]
        jobs = [self._generation(request, seed) for request in requests for seed in request.seeds]
        for n, reply in self._endpoint.all(jobs, skip_long=False):
            assert reply is not None
            request, i = work[n]
            yield self._completion(request, i, reply)

    def _generation(self, request: GenerateRequest, seed: int) -> Job:
        how = request.sampling
        body = self._conversation(request.messages) | {
            "temperature": how.temperature,
            "top_p": how.top_p,
            self.abilities.limit: how.max_new_tokens,
        }
        if self.abilities.seeds:
            body["seed"] = seed & _MASK
        return Job(CHAT, body, f"prompt '{request.id}'")

    def _completion(self, request: GenerateRequest, index: int, reply: Reply) -> Completion:
        """A server that writes on after the limit gives no finished answer: it could be longer than what training has room for."""
        finished = reply.choice.finished
        if finished is None:
            reason = self._endpoint.words.shown(str(reply.choice.finish_reason))
            raise EngineFailed(
                f"{self._endpoint.url}: whether the answer to prompt '{request.id}' is finished is not known: finish_reason '{reason}'",
                hint="see the server's log; if it is its word for a finished answer, report it",
            )
        text = self._endpoint.words.without_key(reply.choice.said).strip()
        ids: list[int] = []
        if self.tokens:
            ids = self.tokens.response(text)
            finished = finished and len(ids) <= request.sampling.max_new_tokens
            ids = ids if finished else ids[:-1]
        return Completion(request.id, index, text, tuple(ids), finished)

    def choice_logprobs(self, asks: Sequence[Ask], choices: Sequence[str]) -> list[tuple[float, ...] | None]:
        """As in the protocol; None also where a choice is not among the alternatives that the server gives: nothing is made up for it."""
        if not asks:
            return []
        self._check_top(choices, chat=not isinstance(asks[0], str))
        distinct = list(dict.fromkeys(asks))
        jobs = [self._question(a) for a in distinct]
        found = {distinct[n]: _chosen(reply, choices) for n, reply in self._endpoint.all(jobs, skip_long=True)}
        return [found[ask] for ask in asks]

    def _question(self, ask: Ask) -> Job:
        plain = {"temperature": 1.0, "top_p": 1.0}  # the model's own probabilities
        if isinstance(ask, str):
            text = {"model": self.model, "prompt": self._defused(ask), "max_tokens": 1, "logprobs": self.abilities.text_top}
            return Job(TEXT, text | plain)
        top = {self.abilities.limit: 1, "logprobs": True, "top_logprobs": self.abilities.chat_top}
        return Job(CHAT, self._conversation(ask) | top | plain)

    def loglikelihood(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, ...] | None]:
        if not self.abilities.echo:
            raise EngineError(f"{self._endpoint.url} gives no log-probabilities of a prompt", hint="use a likert or yes/no scorer")
        keys = list(dict.fromkeys((tuple(c), tuple(y)) for c, y in requests if c and y and len(c) + len(y) <= self.window))
        jobs = [Job(TEXT, echo(self.model, [*c, *y])) for c, y in keys]
        found: dict[Any, tuple[float, ...]] = {}
        for n, reply in self._endpoint.all(jobs, skip_long=True):
            if reply is not None:
                context, y = keys[n]
                found[keys[n]] = echoed(reply, len(context), len(y), self._endpoint.url)
        return [found.get((tuple(c), tuple(y))) for c, y in requests]

    def representations(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], depths: Sequence[float]
    ) -> list[tuple[float, ...] | None]:
        raise EngineError("a served model does not show its representations", hint="use another scorer, or the engine transformers")

    def check_choices(self, choices: Sequence[str], *, chat: bool = False) -> None:
        """Also raises EngineError where the server does not give them in an easy case."""
        if (chat, tuple(choices)) in self._taken:
            return
        self._check_top(choices, chat=chat)
        if self.tokens:
            for choice in choices:
                self.tokens.one(choice, chat=chat)
        listed = ", ".join(choices)
        ask: Ask = (Message("user", f"Reply with one of these and nothing else: {listed}"),)
        if not chat:
            ask = "".join(f"Answer:{c}\n" for c in choices) + "Answer:"
        if self.choice_logprobs([ask], choices) == [None]:
            raise EngineError(
                f"{self._endpoint.url}: the {self._top(chat)} alternatives that the server gives do not hold the choices {listed}",
                hint="use another scorer; likert needs no log-probabilities",
            )
        self._taken.add((chat, tuple(choices)))

    def _top(self, chat: bool) -> int:
        return self.abilities.chat_top if chat else self.abilities.text_top

    def _check_top(self, choices: Sequence[str], *, chat: bool) -> None:
        if (top := self._top(chat)) >= len(choices):
            return
        asked, other = ("a conversation", "yes_no") if chat else ("plain text", "yes_no_zero")
        if top:
            raise EngineError(f"{self._endpoint.url} gives {top} alternatives a token, and there are {len(choices)} choices", hint=_INSTEAD)
        also = f"use the scorer {other}, or likert, which only generates" if self._top(not chat) else _INSTEAD
        raise EngineError(f"{self._endpoint.url} gives no log-probabilities after {asked}", hint=also)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return self._needed().chat(messages)

    def encode_response(self, text: str) -> list[int]:
        return self._needed().response(text)

    def _needed(self) -> ChatTokens:
        if self.tokens is None:
            raise NoTokenizer(
                f"the tokenizer of the served model '{self.model}' is not here",
                hint="name it: engine.tokenizer, a local folder or hub id of the model that is served",
            )
        return self.tokens

    def _conversation(self, messages: Sequence[Message]) -> dict[str, Any]:
        return {"model": self.model, "messages": [{"role": m.role, "content": self._defused(m.content)} for m in messages]}

    def _defused(self, text: str) -> str:
        """As ChatTokens.defused; without the tokenizer, what commonly reads as a special token."""
        return self.tokens.defused(text) if self.tokens else _SPECIAL.sub(lambda m: f"{m[0]} ", text)


_INSTEAD = "use the likert scorer, which only generates, or a server that gives them (vLLM)"


def _tokens(name: str, config: EngineConfig) -> ChatTokens | None:
    """The tokenizer that config names (may be fetched), or that of `name` if it is a model on this machine."""
    wanted = config.tokenizer or name
    try:
        where = locate(wanted)
    except ModelError:
        if config.tokenizer:
            raise
        return None
    from spalign.engines.loading import load_tokenizer

    cached = config.tokenizer is None and not isinstance(where, Path)
    try:
        tokenizer = load_tokenizer(
            resolve(wanted), trust_remote_code=config.trust_remote_code, **({"local_files_only": True} if cached else {})
        )
    except (OSError, ValueError, KeyError, ImportError) as e:
        if cached:  # an id of the server that only looks like one of the hub
            return None
        raise ModelError(
            f"the tokenizer of '{wanted}' cannot be loaded: {str(e).splitlines()[0]}",
            hint="name a local folder or a hub id: engine.tokenizer",
        ) from e
    return ChatTokens(tokenizer)


def _chosen(reply: Reply | None, choices: Sequence[str]) -> tuple[float, ...] | None:
    logprobs = reply.choice.logprobs if reply else None
    found = logprobs.first() if logprobs else {}
    return tuple(found[c] for c in choices) if all(c in found for c in choices) else None
