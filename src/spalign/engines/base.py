"""What an engine is: the verbs that the stages use, and the requests they take."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

from spalign.errors import EngineError
from spalign.types import Message

Capability = Literal["generate", "choice_logprobs", "loglikelihood", "representations"]
Ask = str | tuple[Message, ...]
"""What is asked: a plain text to be continued, or a conversation whose assistant turn is opened by the chat template."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy; top_p is the nucleus; max_new_tokens counts the end-of-sequence token."""

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt and one completion per seed. The completion depends on prompt and seed, not on what runs beside it."""

    id: str
    messages: tuple[Message, ...]
    seeds: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Completion:
    """token_ids: as generated, the end-of-sequence token included where the model gave one (`finished`)."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finished: bool


class Engine(Protocol):
    """A source of text and probabilities. `capabilities` names the verbs it really has."""

    name: str
    capabilities: frozenset[Capability]

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        """Completions as they finish, in no particular order."""
        ...

    def choice_logprobs(self, asks: Sequence[Ask], choices: Sequence[str]) -> list[tuple[float, ...] | None]:
        """Natural log-probability of each one-token choice after each ask; None where the ask exceeds the window.

        The asks are all plain texts or all conversations. What several begin with alike is run once where the engine can.
        """
        ...

    def loglikelihood(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, ...] | None]:
        """Natural log-probability of every token of each continuation after its context, both as token ids; (continuation,) per request.

        None where context and continuation exceed the window, or one of them is empty.
        """
        ...

    def representations(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], depths: Sequence[float]
    ) -> list[tuple[float, ...] | None]:
        """Mean hidden state over the tokens of each continuation after its context; (len(depths) * hidden size,) per request.

        depths: which layers, one after the other, from 0 (embeddings) to 1 (the last). None as in `loglikelihood`.
        """
        ...

    def check_choices(self, choices: Sequence[str], *, chat: bool = False) -> None:
        """Raises EngineError where a choice is not one token, so that `choice_logprobs` could not take it."""
        ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation with the assistant's turn opened, as `generate` feeds them."""
        ...

    def encode_response(self, text: str) -> list[int]:
        """Token ids of `text` as an assistant's complete turn, end-of-sequence token included."""
        ...

    @property
    def window(self) -> int:
        """Most tokens that prompt and completion may have together."""
        ...


class EngineFailed(EngineError):
    """The engine can do what it was asked for, and did not: its server is gone, or refuses."""


class NoTokenizer(EngineError):
    """The model's tokenizer is not here: a served model that only answers."""


@runtime_checkable
class Batching(Protocol):
    """An engine whose completions depend on what runs beside them in their last bits, and so now and then in a token."""

    def batches(self, requests: Sequence[GenerateRequest]) -> list[list[tuple[GenerateRequest, int]]]:
        """What `generate` runs together: (request, which of its seeds). `generate` of some batches' requests is those batches again."""
        ...


@runtime_checkable
class Concurrent(Protocol):
    """An engine that works on several calls at the same time, and gives each what it would give it alone, up to rounding."""

    width: int
    """So many calls, of as many threads, keep it busy."""

    def close(self) -> None:
        """Calls under way fail with EngineError."""
        ...


Generate = Callable[[Sequence[GenerateRequest]], Iterator[Completion]]


def only(generate: Generate, requests: Sequence[GenerateRequest], wanted: Container[tuple[str, int]]) -> Iterator[Completion]:
    """What an engine's `generate` gives of the completions that are `wanted`: (id of the request, which of its seeds)."""
    asked = {r.id: [i for i in range(len(r.seeds)) if (r.id, i) in wanted] for r in requests}
    some = [replace(r, seeds=tuple(r.seeds[i] for i in asked[r.id])) for r in requests if asked[r.id]]
    for completion in generate(some) if some else ():
        yield replace(completion, index=asked[completion.request_id][completion.index])


def count_tokens(engine: Engine, messages: Sequence[Message]) -> int:
    """Tokens of the conversation with the assistant's turn opened; where the tokenizer is not here, what they are at most."""
    try:
        return len(engine.encode_chat(messages))
    except NoTokenizer:  # a token is at least a byte; what stands around a turn is short
        return sum(len(m.content.encode("utf-8", "replace")) + 50 for m in messages)


def require(engine: Engine, capability: Capability, user: str) -> None:
    """Refuse before any work starts where `engine` cannot do what `user` (a scorer, a stage) needs."""
    if capability not in engine.capabilities:
        raise EngineError(
            f"{user} needs '{capability}', which the engine '{engine.name}' does not have",
            hint="use the likert scorer, which only generates, or an engine that has it: transformers has all; see docs/engines.md",
        )
