"""What an engine is: the two verbs that the stages use, and the requests they take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from spalign.errors import EngineError
from spalign.types import Message

Capability = Literal["generate", "choice_logprobs"]


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

    def choice_logprobs(self, texts: Sequence[str], choices: Sequence[str]) -> list[tuple[float, ...] | None]:
        """Natural log-probability of each one-token choice after each plain text; None where the text exceeds the window."""
        ...

    def check_choices(self, choices: Sequence[str]) -> None:
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


def require(engine: Engine, capability: Capability, user: str) -> None:
    """Refuse before any work starts where `engine` cannot do what `user` (a scorer, a stage) needs."""
    if capability not in engine.capabilities:
        raise EngineError(
            f"{user} needs '{capability}', which the engine '{engine.name}' does not have",
            hint="use the likert scorer, or an engine that gives token log-probabilities (transformers)",
        )
