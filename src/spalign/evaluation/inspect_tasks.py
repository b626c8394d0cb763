"""Judging as tasks of Inspect: answers that exist are scored, so that logs open in `inspect view` and an interrupted evaluation goes on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spalign.errors import EngineError
from spalign.evaluation.judges import Reading
from spalign.text import printable, shorten
from spalign.types import Message, Prompt

Read = Callable[["Case"], Awaitable[Reading]]


@dataclass(frozen=True, slots=True)
class Case:
    """An answer to be judged; other: a second answer, or a reference. id: unique in its task."""

    id: str
    prompt: Prompt
    answer: str
    other: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def judge_cases(name: str, cases: Sequence[Case], reads: Mapping[str, Read], logs: Path, *, at_once: int) -> dict[str, dict[str, Any]]:
    """Case id -> name of a reading -> {value, said}: every case judged by every one of `reads`, by Inspect.

    name: of the task. logs: folder of its logs; what stands there of the same task is not done again. at_once: cases under way.
    Raises EngineError where the judge failed for good; what is judged stays in the logs.
    """
    from inspect_ai import Task, eval_set
    from inspect_ai.dataset import MemoryDataset
    from inspect_ai.log import read_eval_log

    by_id = {case.id: case for case in cases}
    task = Task(
        dataset=MemoryDataset([_sample(case) for case in cases], name=name),
        solver=_given(by_id),
        scorer=[_scorer(key, read, by_id) for key, read in reads.items()],
        name=name,
    )
    logs.mkdir(parents=True, exist_ok=True)
    done, found = eval_set(
        task,
        log_dir=str(logs),
        model=None,
        max_samples=at_once,
        retry_attempts=2,
        retry_immediate=True,
        display="none",
        log_level="error",
        score_display=False,
        log_realtime=False,
        ctl_server=False,
    )
    log = read_eval_log(found[0].location)
    if not done or log.status != "success":
        why = log.error.message if log.error else log.status
        raise EngineError(
            f"judging stopped ({name}): {shorten(printable(' '.join(str(why).split())), 400)}",
            hint="see that the judge can be reached; what it has judged is kept, and the same command goes on",
        )
    return {
        str(sample.id): {
            key: {"value": _value(score.value), "said": score.explanation or ""} for key, score in (sample.scores or {}).items()
        }
        for sample in log.samples or []
    }


class InspectModel:
    """A text in, the reply of Inspect's model out; `await` it.

    Each task of Inspect's has an event loop of its own, and a client of a server lives in one: it is closed whenever nothing is under way.
    Raises EngineError where Inspect has no such model, or a package or key is missing.
    """

    def __init__(self, name: str, base_url: str | None, *, max_tokens: int, connections: int) -> None:
        from inspect_ai.model import GenerateConfig

        self._name, self._base_url = name, base_url
        self._config = GenerateConfig(temperature=0.0, max_tokens=max_tokens, max_connections=connections)
        self._model: Any = None
        self._under_way = 0
        asyncio.run(self._tried())

    async def _tried(self) -> None:
        """Made once before anything else is done, to see that it can be."""
        self._open()
        await self._close()

    def _open(self) -> Any:
        from inspect_ai.model import get_model

        if self._model is None:
            try:
                self._model = get_model(self._name, base_url=self._base_url, config=self._config, memoize=False)
            except Exception as e:  # of each provider its own
                raise EngineError(
                    f"the judge '{self._name}' cannot be used: {shorten(printable(' '.join(str(e).split())), 300)}",
                    hint="name a model as Inspect does (openai/..., anthropic/..., vllm/..., hf/...), with its package installed and its "
                    "key set; or spalign/NAME for a local one",
                ) from e
        return self._model

    async def _close(self) -> None:
        from inspect_ai.model import ModelAPI

        if type(self._model.api).aclose is not ModelAPI.aclose:  # a client of a server; what runs here stays loaded
            model, self._model = self._model, None
            await model.api.aclose()

    async def __call__(self, text: str) -> str:
        self._under_way += 1
        try:
            return str((await self._open().generate(text)).completion)
        finally:
            self._under_way -= 1
            if not self._under_way:
                await self._close()


def _sample(case: Case) -> Any:
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}

    def turn(message: Message) -> Any:
        return kinds[message.role](content=message.content)

    facts = {"topic": case.prompt.topic, "intent": case.prompt.intent, **({"other": case.other} if case.other else {}), **case.facts}
    return Sample(id=case.id, input=[turn(m) for m in case.prompt.messages], metadata=facts)


def _given(cases: Mapping[str, Case]) -> Any:
    """The solver: the answer that exists."""
    from inspect_ai.model import ModelOutput
    from inspect_ai.solver import solver

    def given() -> Any:
        async def solve(state: Any, _: Any) -> Any:
            state.output = ModelOutput.from_content("given", cases[str(state.sample_id)].answer)
            state.messages.append(state.output.choices[0].message)
            return state

        return solve

    return solver(name="given_answer")(given)()


def _scorer(key: str, read: Read, cases: Mapping[str, Case]) -> Any:
    from inspect_ai.scorer import Score, mean, scorer, stderr

    def judged() -> Any:
        async def score(state: Any, _: Any) -> Any:
            reading = await read(cases[str(state.sample_id)])
            if reading.value is None:
                return Score.unscored(reason="grader_failed", explanation=reading.said)
            return Score(value=reading.value, explanation=reading.said)

        return score

    return scorer(metrics=[mean(), stderr()], name=key)(judged)()


def _value(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
