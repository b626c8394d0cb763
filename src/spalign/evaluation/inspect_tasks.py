"""Judging as tasks of Inspect: answers that exist are scored, so that logs open in `inspect view` and an interrupted evaluation goes on."""

from __future__ import annotations

import asyncio
import math
import os
import re
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spalign.config import JudgeConfig
from spalign.errors import EngineError, SpalignError
from spalign.evaluation.judges import Reading
from spalign.text import printable, shorten, without_keys
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
    failed: list[SpalignError] = []
    task = Task(
        dataset=MemoryDataset([_sample(case) for case in cases], name=name),
        solver=_given(by_id),
        scorer=[_scorer(key, read, by_id, failed) for key, read in reads.items()],
        name=name,
    )
    logs.mkdir(parents=True, exist_ok=True)
    done, found = eval_set(
        task,
        log_dir=str(logs),
        model=None,
        max_samples=at_once,
        retry_attempts=0,  # a model that does not answer is asked again by its provider, not the whole task
        retry_immediate=False,
        display="none",
        log_level="error",
        score_display=False,
        log_realtime=False,
        ctl_server=False,
    )
    if not found:  # Ctrl-C, which Inspect takes for an end
        raise KeyboardInterrupt
    log = read_eval_log(found[0].location)
    if log.status == "cancelled":
        raise KeyboardInterrupt
    if not done or log.status != "success":
        if failed:
            raise failed[-1]
        raise EngineError(
            f"judging stopped ({name}): {_clean(log.error.message if log.error else log.status)}",
            hint="see that the judge can be reached and its key is right; what it has judged is kept, and the same command goes on",
        )
    return {
        str(sample.id): {
            key: {"value": _value(score.value), "said": score.explanation or ""} for key, score in (sample.scores or {}).items()
        }
        for sample in log.samples or []
    }


def _clean(message: Any) -> str:
    """A library's message on one line, without its markup and without keys."""
    text = re.sub(r"\[/?(?:bold|red|blue|green|yellow|dim|italic|link)[^\]]*\]", "", str(message))
    return shorten(printable(" ".join(without_keys(text, os.environ).split())), 400)


LOCAL = ("hf/", "vllm/", "sglang/", "llama-cpp-python/", "mlx/", "transformer_lens/", "nnterp/")
"""Providers of Inspect's that run a model on this machine, unless they are given a server."""


class InspectModel:
    """A text in, the reply of Inspect's model out; `await` it.

    Each task of Inspect's has an event loop of its own, and a client of a server lives in one: it is closed whenever nothing is under way.
    A model that runs here is loaded when it is first asked, and stays until `close`.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self._judge = config
        self.local = config.model.startswith(LOCAL) and config.base_url is None
        self._model: Any = None
        self._under_way = 0

    def check(self) -> None:
        """Ask one question, without patience. Raises EngineError where a model, package or key is missing, or nobody answers."""
        impatient = InspectModel(self._judge.model_copy(update={"max_retries": 1}))

        async def once(_: Case) -> Reading:
            await impatient("Reply with the word: ready")
            return Reading(1.0)

        with tempfile.TemporaryDirectory() as folder:
            try:
                judge_cases("is it there", [Case("0", Prompt("0", (Message("user", "-"),)), "-")], {"there": once}, Path(folder), at_once=1)
            except EngineError as e:
                raise e if e.message.startswith("the judge") else self._unusable(e.message.partition(": ")[2]) from e

    def _open(self) -> Any:
        from inspect_ai.model import GenerateConfig, get_model

        judge = self._judge
        if self._model is None:
            greedy = (
                {"temperature": 1.0, "top_k": 1} if judge.model.startswith("hf/") else {"temperature": 0.0}
            )  # which transformers refuses
            config = GenerateConfig(
                **greedy,
                max_tokens=judge.max_tokens,
                max_connections=judge.connections,
                max_retries=judge.max_retries,
                attempt_timeout=judge.timeout,
            )
            try:
                self._model = get_model(judge.model, base_url=judge.base_url, config=config, memoize=False, **judge.args)
            except Exception as e:  # of each provider its own
                raise self._unusable(e) from e
        return self._model

    def _unusable(self, e: object) -> EngineError:
        return EngineError(
            f"the judge '{self._judge.model}' cannot be used: {_clean(e) or type(e).__name__}",
            hint="name a model as Inspect does (openai/..., anthropic/..., vllm/..., hf/...), with its package installed, its server up "
            "and its key set; or spalign/NAME for a local one",
        )

    async def _done(self) -> None:
        if not self.local and self._model is not None:
            model, self._model = self._model, None
            await model.api.aclose()

    def close(self) -> None:
        """End a model that runs here."""
        if self._model is not None:
            model, self._model = self._model, None
            asyncio.run(model.api.aclose())

    async def __call__(self, text: str) -> str:
        self._under_way += 1
        try:
            return str((await self._open().generate(text)).completion)
        finally:
            self._under_way -= 1
            if not self._under_way:
                await self._done()


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


def _scorer(key: str, read: Read, cases: Mapping[str, Case], failed: list[SpalignError]) -> Any:
    """failed: gets the errors that say themselves what to do."""
    from inspect_ai.scorer import Score, mean, scorer, stderr

    def judged() -> Any:
        async def score(state: Any, _: Any) -> Any:
            try:
                reading = await read(cases[str(state.sample_id)])
            except SpalignError as e:
                failed.append(e)
                raise
            if reading.value is None:
                return Score.unscored(reason="grader_failed", explanation=reading.said)
            return Score(value=reading.value, explanation=reading.said)

        return score

    return scorer(metrics=[mean(), stderr()], name=key)(judged)()


def _value(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
