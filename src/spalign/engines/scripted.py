"""An engine whose answers are functions of yours: for tests, and for trying a pipeline without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from spalign.engines.base import Ask, Capability, Completion, GenerateRequest
from spalign.errors import EngineError
from spalign.types import Message

EOS = 0


class ScriptedEngine:
    """Answers by function; a token is one Unicode code point plus one, and token 0 ends a turn.

    reply: (messages, seed) -> text. score: (what is asked as text, choice) -> log-probability. weigh: (context as text, continuation) ->
    log-probability of each of its tokens. represent: (context as text, continuation) -> its representation, the same for all depths.
    Without the last three the engine only generates. A conversation as text has a line a turn, "role: content".
    """

    def __init__(
        self,
        reply: Callable[[tuple[Message, ...], int], str],
        score: Callable[[str, str], float] | None = None,
        weigh: Callable[[str, str], float] | None = None,
        represent: Callable[[str, str], Sequence[float]] | None = None,
        *,
        window: int = 100_000,
    ) -> None:
        self.name = "scripted"
        self._reply, self._score, self._weigh, self._represent, self._window = reply, score, weigh, represent, window
        verbs: dict[Capability, object] = {
            "generate": reply,
            "choice_logprobs": score,
            "loglikelihood": weigh,
            "representations": represent,
        }
        self.capabilities: frozenset[Capability] = frozenset(v for v, function in verbs.items() if function)

    @property
    def window(self) -> int:
        return self._window

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        for request in requests:
            for index, seed in enumerate(request.seeds):
                ids = self.encode_response(self._reply(request.messages, seed))[: request.sampling.max_new_tokens]
                finished = ids[-1] == EOS
                text = _text(ids)
                yield Completion(request.id, index, text, tuple(ids), finished)

    def choice_logprobs(self, asks: Sequence[Ask], choices: Sequence[str]) -> list[tuple[float, ...] | None]:
        if self._score is None:
            raise EngineError("this scripted engine has no score function", hint="give one: ScriptedEngine(reply, score)")
        texts = [a if isinstance(a, str) else _text(self.encode_chat(a)) for a in asks]
        return [tuple(self._score(t, c) for c in choices) if len(t) <= self._window else None for t in texts]

    def loglikelihood(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, ...] | None]:
        if self._weigh is None:
            raise EngineError("this scripted engine was made without a weigh function", hint="give one: ScriptedEngine(reply, weigh=weigh)")
        return [
            (self._weigh(_text(context), _text(y)),) * len(y) if context and y and len(context) + len(y) <= self._window else None
            for context, y in requests
        ]

    def representations(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], depths: Sequence[float]
    ) -> list[tuple[float, ...] | None]:
        if self._represent is None:
            raise EngineError("this scripted engine has no represent function", hint="give one: ScriptedEngine(reply, represent=represent)")
        return [
            tuple(self._represent(_text(context), _text(y))) * len(depths)
            if context and y and len(context) + len(y) <= self._window
            else None
            for context, y in requests
        ]

    def check_choices(self, choices: Sequence[str], *, chat: bool = False) -> None:
        """Any choice will do: the score function takes it as text."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return [ord(c) + 1 for m in messages for c in f"{m.role}: {m.content}\n"]

    def encode_response(self, text: str) -> list[int]:
        return [*(ord(c) + 1 for c in text), EOS]


def _text(ids: Sequence[int]) -> str:
    return "".join(chr(i - 1) for i in ids if i != EOS)
