"""What the steps of a run share: configuration, folder, prompts, and models that are loaded when first needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from spalign.config import RunConfig
from spalign.constitution import Constitution, Objective
from spalign.engines.base import Ask, Completion, Engine, GenerateRequest, count_tokens
from spalign.errors import PromptError
from spalign.report import Progress
from spalign.report.progress import Tick
from spalign.store import RunFolder, Stage
from spalign.types import Message, Prompt

EngineFactory = Callable[[str], Engine]


class MeteredEngine:
    """An engine that counts the tokens it generates and tells a progress bar; `inner` is the engine as it is."""

    def __init__(self, engine: Engine) -> None:
        self.inner = engine
        self.name, self.capabilities = engine.name, engine.capabilities
        self.tokens = 0
        self.tick: Tick = lambda _: None

    @property
    def window(self) -> int:
        return self.inner.window

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        for completion in self.inner.generate(requests):
            self.tokens += len(completion.token_ids)
            self.tick(1)
            yield completion

    def choice_logprobs(self, asks: Sequence[Ask], choices: Sequence[str]) -> list[tuple[float, ...] | None]:
        return self.inner.choice_logprobs(asks, choices)

    def loglikelihood(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, ...] | None]:
        return self.inner.loglikelihood(requests)

    def representations(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], depths: Sequence[float]
    ) -> list[tuple[float, ...] | None]:
        return self.inner.representations(requests, depths)

    def check_choices(self, choices: Sequence[str], *, chat: bool = False) -> None:
        self.inner.check_choices(choices, chat=chat)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return self.inner.encode_chat(messages)

    def encode_response(self, text: str) -> list[int]:
        return self.inner.encode_response(text)


class Policy:
    """A model by name or folder, loaded when first used. `digest` says which model it is without loading it.

    served: it runs on a server. weights: where the model is that can be trained; default: `name`, None for a served one that is not here.
    """

    def __init__(self, name: str, digest: str, factory: EngineFactory, *, served: bool = False, weights: str | None = None) -> None:
        self.name, self.digest, self._factory, self.served = name, digest, factory, served
        self.weights = weights or (None if served else name)
        self._engine: MeteredEngine | None = None

    @property
    def engine(self) -> MeteredEngine:
        if self._engine is None:
            self._engine = MeteredEngine(self._factory(self.name))
        return self._engine

    def free(self) -> None:
        """Give the memory back; the next use loads again. A served model has none here."""
        if self.served or self._engine is None:
            return
        if close := getattr(self._engine.inner, "close", None):  # a process of its own
            close()
        self._engine = None


@dataclass(frozen=True, slots=True)
class Step:
    """One stage of the run: where it stands on disk, and how it is done."""

    name: str
    stage: Stage
    do: Callable[[], dict[str, Any]]


@dataclass
class Context:
    """A run in progress."""

    config: RunConfig
    constitution: Constitution
    folder: RunFolder
    ui: Progress
    train_prompts: list[Prompt]
    heldout_prompts: list[Prompt]
    make_engine: EngineFactory
    make_judge: EngineFactory
    named_judge: Policy | None = None
    """The model that judges, where it is not the policy itself."""
    shares_checks: bool = False
    """Whether checks of judges are kept for other runs: not where the engine is the caller's own."""
    reference_judge: Policy | None = None
    """A second judge, whose scores are compared with the run's."""

    @cached_property
    def objectives(self) -> tuple[Objective, ...]:
        return self.constitution.objectives

    def check_fit(self, policy: Policy, prompts: Sequence[Prompt]) -> None:
        """Raises PromptError, before anything is generated, for prompts that leave no room for an answer."""
        room = policy.engine.window - self.config.sample.max_new_tokens
        systems = [*(v.text for v in self.constitution.system_variants), self.constitution.good_system]
        longest = max(systems, key=len)
        for p in prompts:
            messages = p.with_system(longest)
            if (
                sum(len(m.content.encode("utf-8", "replace")) + 50 for m in messages) > room
                and (n := count_tokens(policy.engine, messages)) > room
            ):
                raise PromptError(
                    f"prompt '{p.id}' has {n} tokens; with sample.max_new_tokens {self.config.sample.max_new_tokens} "
                    f"it exceeds the model's window of {policy.engine.window}",
                    hint="shorten or drop it, or lower sample.max_new_tokens",
                )

    @contextlib.contextmanager
    def metered(self, policy: Policy, name: str, total: int, unit: str) -> Iterator[MeteredEngine]:
        """The policy's engine with a progress bar of `total` completions and scores."""
        engine = policy.engine
        with self.ui.stage(name, total, unit) as tick:
            engine.tick = tick
            try:
                yield engine
            finally:
                engine.tick = lambda _: None
