"""An engine whose answers are functions of yours: for tests, and for trying a pipeline without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from spalign.engines.base import Capability, Completion, GenerateRequest
from spalign.types import Message

EOS = 0


class ScriptedEngine:
    """Answers by function; a token is one Unicode code point plus one, and token 0 ends a turn.

    reply: (messages, seed) -> text. score: (plain text, choice) -> log-probability; without it the engine only generates.
    """

    def __init__(
        self,
        reply: Callable[[tuple[Message, ...], int], str],
        score: Callable[[str, str], float] | None = None,
        *,
        window: int = 100_000,
    ) -> None:
        self.name = "scripted"
        self._reply, self._score, self._window = reply, score, window
        self.capabilities: frozenset[Capability] = frozenset({"generate", "choice_logprobs"} if score else {"generate"})

    @property
    def window(self) -> int:
        return self._window

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        for request in requests:
            for index, seed in enumerate(request.seeds):
                ids = self.encode_response(self._reply(request.messages, seed))[: request.sampling.max_new_tokens]
                finished = ids[-1] == EOS
                text = "".join(chr(i - 1) for i in ids if i != EOS)
                yield Completion(request.id, index, text, tuple(ids), finished)

    def choice_logprobs(self, texts: Sequence[str], choices: Sequence[str]) -> list[tuple[float, ...] | None]:
        if self._score is None:
            raise NotImplementedError("this scripted engine was made without a score function")
        return [tuple(self._score(t, c) for c in choices) if len(t) <= self._window else None for t in texts]

    def check_choices(self, choices: Sequence[str]) -> None:
        """Any choice will do: the score function takes it as text."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return [ord(c) + 1 for m in messages for c in f"{m.role}: {m.content}\n"]

    def encode_response(self, text: str) -> list[int]:
        return [*(ord(c) + 1 for c in text), EOS]
