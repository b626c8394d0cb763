"""Who can judge an answer: a model of Inspect's that is asked in words, or one of ours that is read off in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from spalign.constitution import Objective
from spalign.evaluation.questions import PAIRWISE, QUALITY, SCORE, fingerprint, parse_score, parse_verdict, question, settled
from spalign.types import Prompt

_MOST = 256
"""Answers in one batch: what Ctrl-C waits for."""
CLOSE = 0.5
"""Score points by which a judge that only scores must tell two answers apart, or they tie."""


@dataclass(frozen=True, slots=True)
class Reading:
    """value: None where the judge gave none: unscored, never a default. said: its replies, to be read by people."""

    value: float | None
    said: str = ""


class Judge(Protocol):
    """asks: what it is asked and in which version, for the records. scale: least and greatest score.

    identity: everything that its answers depend on, as JSON, for digests.
    """

    name: str
    asks: dict[str, str]
    scale: tuple[int, int]
    identity: Any

    async def score(self, prompt: Prompt, answer: str, objective: Objective) -> Reading:
        """How far the answer follows the objective's principle, on `scale`, higher is better."""
        ...

    async def prefer(self, prompt: Prompt, first: str, second: str, objective: Objective) -> Reading:
        """1: the first answer is better, 0: the second, 0.5: a tie, or a verdict that flips with their order."""
        ...

    async def quality(self, prompt: Prompt, answer: str, reference: str) -> Reading:
        """The answer's general quality, on `scale`."""
        ...


def asks() -> dict[str, str]:
    """The questions in words, each with its fingerprint."""
    return {q: fingerprint(q) for q in (SCORE, PAIRWISE, QUALITY)}


class AskedJudge:
    """A model of Inspect's, asked in words (`questions`), greedily where it can be.

    generate: a text in, the model's reply out: `InspectModel`, whose retries and rate limits are Inspect's.
    """

    scale = (1, 10)

    def __init__(self, name: str, generate: Any, identity: Any = None) -> None:
        self.name, self._generate, self.identity = name, generate, identity
        self.asks = asks()

    def check(self) -> None:
        """Raises EngineError where it cannot be asked."""
        if not self._generate.local:  # a model that runs here is loaded when the others have answered
            self._generate.check()

    def close(self) -> None:
        """Give back what a model that runs here holds."""
        self._generate.close()

    async def score(self, prompt: Prompt, answer: str, objective: Objective) -> Reading:
        reply = await self._ask(SCORE, prompt, answer, objective=objective)
        return Reading(parse_score(reply), reply)

    async def prefer(self, prompt: Prompt, first: str, second: str, objective: Objective) -> Reading:
        if first.strip() == second.strip():
            return Reading(0.5, "the answers are the same")
        one = await self._ask(PAIRWISE, prompt, first, second, objective=objective)
        two = await self._ask(PAIRWISE, prompt, second, first, objective=objective)
        return Reading(settled(parse_verdict(one), parse_verdict(two)), f"{one}\n\n--- in the other order ---\n\n{two}")

    async def quality(self, prompt: Prompt, answer: str, reference: str) -> Reading:
        reply = await self._ask(QUALITY, prompt, answer, reference)
        return Reading(parse_score(reply), reply)

    async def _ask(self, name: str, prompt: Prompt, answer: str, other: str = "", objective: Objective | None = None) -> str:
        told = {"objective": objective.name, "principle": objective.principle} if objective else {}
        return str(await self._generate(question(name, prompt=prompt.text, answer=answer, other=other, **told)))


@dataclass(frozen=True, slots=True)
class ToScore:
    """An answer and the objective on which a judge of ours scores it."""

    prompt: Prompt
    answer: str
    objective: str


ScoreMany = Callable[[Sequence[ToScore]], list[float | None]]


class OwnJudge:
    """A local model by the scorer that its check found best per objective: scores of 0..10, many answers at a time.

    It compares two answers by their scores, so the order in which they stand cannot matter. Of quality it knows what the last objective
    says. score_many: what the pipeline makes of `spalign.selfeval.score_responses`.
    """

    scale = (0, 10)

    def __init__(
        self,
        name: str,
        asks: dict[str, str],
        identity: Any,
        helpful: Objective,
        score_many: Callable[[Sequence[ToScore]], list[float | None]],
    ) -> None:
        self.name, self.asks, self.identity, self._helpful = name, asks, identity, helpful
        self._batched = _Batched(score_many)

    async def score(self, prompt: Prompt, answer: str, objective: Objective) -> Reading:
        return Reading(await self._batched(ToScore(prompt, answer, objective.name)))

    async def prefer(self, prompt: Prompt, first: str, second: str, objective: Objective) -> Reading:
        a, b = await asyncio.gather(self.score(prompt, first, objective), self.score(prompt, second, objective))
        if a.value is None or b.value is None:
            return Reading(None)
        lead = a.value - b.value
        return Reading(0.5 if abs(lead) < CLOSE else float(lead > 0), f"{a.value:.2f} against {b.value:.2f}")

    async def quality(self, prompt: Prompt, answer: str, reference: str) -> Reading:
        return await self.score(prompt, answer, self._helpful)


class _Batched:
    """Calls of many coroutines as few calls of `do`, in a thread: what waits while one runs is the next one, up to _MOST."""

    def __init__(self, do: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        self._do = do
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._driver: asyncio.Task[None] | None = None

    async def __call__(self, item: Any) -> Any:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._driver is None or self._driver.done():  # a task of its own: whoever asks may be cancelled
            self._driver = asyncio.create_task(self._drive())
        return await future

    async def _drive(self) -> None:
        while self._waiting:
            await asyncio.sleep(0.05)  # so that the others have asked too
            wanted = [(item, future) for item, future in self._waiting if not future.done()]
            batch, self._waiting = wanted[:_MOST], wanted[_MOST:]
            try:
                found: Sequence[Any] = await asyncio.to_thread(self._do, [item for item, _ in batch])
            except Exception as e:
                found = [e] * len(batch)
            for (_, future), value in zip(batch, found, strict=True):
                if not future.done():
                    if isinstance(value, Exception):
                        future.set_exception(value)
                    else:
                        future.set_result(value)
