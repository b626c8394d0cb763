"""Who can judge an answer: a model of Inspect's that is asked in words, or one of ours that is read off in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from spalign.constitution import Objective
from spalign.evaluation.questions import PAIRWISE, QUALITY, SCORE, fingerprint, parse_score, parse_verdict, question, settled
from spalign.types import Prompt

CLOSE = 0.5
"""Score points by which a judge that only scores must tell two answers apart, or they tie."""


@dataclass(frozen=True, slots=True)
class Reading:
    """value: None where the judge gave none: unscored, never a default. said: its replies, to be read by people."""

    value: float | None
    said: str = ""


class Judge(Protocol):
    """asks: what it is asked and in which version, for the records. top: of its scale; bottom likewise."""

    name: str
    asks: dict[str, str]
    scale: tuple[int, int]

    async def score(self, prompt: Prompt, answer: str, objective: Objective) -> Reading:
        """How far the answer follows the objective's principle, on `scale`, higher is better."""
        ...

    async def prefer(self, prompt: Prompt, first: str, second: str, objective: Objective) -> Reading:
        """1: the first answer is better, 0: the second, 0.5: a tie, or a verdict that flips with their order."""
        ...

    async def quality(self, prompt: Prompt, answer: str, reference: str) -> Reading:
        """The answer's general quality, on `scale`."""
        ...


class AskedJudge:
    """A model of Inspect's, asked in words (`questions`), greedily where it can be.

    generate: a text in, the model's reply out (Inspect's `Model.generate`, whose retries and rate limits are its own).
    """

    scale = (1, 10)

    def __init__(self, name: str, generate: Callable[[str], Any]) -> None:
        self.name, self._generate = name, generate
        self.asks = {q: fingerprint(q) for q in (SCORE, PAIRWISE, QUALITY)}

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


class OwnJudge:
    """A local model by the scorer that its check found best per objective: scores of 0..10, many answers at a time.

    It compares two answers by their scores, so the order in which they stand cannot matter. Of quality it knows what the last objective
    says. score_many: what the pipeline makes of `spalign.selfeval.score_responses`.
    """

    scale = (0, 10)

    def __init__(self, name: str, asks: dict[str, str], helpful: Objective, score_many: Callable[[Sequence[ToScore]], list[float | None]]):
        self.name, self.asks, self._helpful = name, asks, helpful
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
    """Calls of many coroutines as few calls of `do`, in a thread: what waits while one runs is the next one."""

    def __init__(self, do: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        self._do = do
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._busy = False

    async def __call__(self, item: Any) -> Any:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if not self._busy:
            self._busy = True
            try:
                while self._waiting:
                    await asyncio.sleep(0.05)  # so that the others have asked too
                    batch, self._waiting = self._waiting, []
                    await self._run(batch)
            finally:
                self._busy = False
        return await future

    async def _run(self, batch: Sequence[tuple[Any, asyncio.Future[Any]]]) -> None:
        try:
            found = await asyncio.to_thread(self._do, [item for item, _ in batch])
        except BaseException as e:
            for _, future in batch:
                if not future.done():
                    future.set_exception(e if isinstance(e, Exception) else asyncio.CancelledError())
            if not isinstance(e, Exception):
                raise
            return
        for (_, future), value in zip(batch, found, strict=True):
            if not future.done():
                future.set_result(value)
