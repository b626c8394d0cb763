"""What the steps of a run share: configuration, folder, prompts, and models that are loaded when first needed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any

import msgspec

from spalign.config import RunConfig
from spalign.constitution import Constitution, Objective
from spalign.engines.base import Ask, Batching, Completion, Concurrent, Engine, GenerateRequest, count_tokens, only
from spalign.errors import PromptError
from spalign.report import Progress
from spalign.report.progress import Tick
from spalign.store import Journal, RunFolder, Stage, digest
from spalign.types import Message, Prompt

EngineFactory = Callable[[str], Engine]


class _Kept(msgspec.Struct):
    """What a journal holds of a completion."""

    text: str
    token_ids: tuple[int, ...]
    finished: bool


def _kept(journal: Journal, key: str) -> _Kept | None:
    row = journal.get(key)
    try:
        return None if row is None else msgspec.convert(row, _Kept)
    except msgspec.ValidationError:
        journal.drop(key)
        return None


def recorded(engine: Engine, model: str, requests: Sequence[GenerateRequest], journal: Journal) -> Iterator[Completion]:
    """The completions of `requests`: those that the journal holds, and those that `engine` gives, written before they are handed on.

    A completion goes by model (its digest), messages, seed and sampling: what else is asked for beside it does not matter. But where it
    does in the last bits, a batch of which something is missing runs as it would have run without the interruption.
    """
    what = {r.id: digest([model, [(m.role, m.content) for m in r.messages], astuple(r.sampling)]) for r in requests}
    each = [[(r, i)] for r in requests for i in range(len(r.seeds))]
    missing, again = set[tuple[str, int]](), set[tuple[str, int]]()
    for batch in engine.batches(requests) if isinstance(engine, Batching) else each:
        rows = [_kept(journal, f"{what[r.id]}-{r.seeds[i]}") for r, i in batch]
        lacks = {(r.id, i) for (r, i), row in zip(batch, rows, strict=True) if row is None}
        missing |= lacks
        again |= {(r.id, i) for r, i in batch} if lacks else set()
        for (request, i), row in zip(batch, rows, strict=True):
            if row is not None:
                yield Completion(request.id, i, row.text, row.token_ids, row.finished)
    seeds = {r.id: r.seeds for r in requests}
    for completion in only(engine.generate, requests, again):
        name, i = completion.request_id, completion.index
        if (name, i) in missing:
            facts = {"text": completion.text, "token_ids": completion.token_ids, "finished": completion.finished}
            journal.append(f"{what[name]}-{seeds[name][i]}", facts)
            yield completion


class MeteredEngine:
    """An engine that counts the tokens it generates and tells a progress bar; `inner` is the engine as it is.

    model: its digest. stage: where it works: completions that stand in its journal are not generated again, and every new one is written
    there before it is handed on. Several threads may call it; an engine that is not `Concurrent` has one call at a time.
    """

    def __init__(self, engine: Engine, model: str, stage: Stage | None = None, turn: threading.RLock | None = None) -> None:
        self.inner, self.model, self.stage = engine, model, stage
        self.name, self.capabilities = engine.name, engine.capabilities
        self.tick: Tick = lambda _: None
        self._turn = turn or threading.RLock()
        self._count = threading.local()

    def of_stage(self, stage: Stage) -> MeteredEngine:
        """The same engine for another purpose, counted apart."""
        return MeteredEngine(self.inner, self.model, stage, self._turn)

    @property
    def tokens(self) -> int:
        """Generated for the calling thread."""
        return getattr(self._count, "tokens", 0)

    @property
    def width(self) -> int:
        """How many threads' calls run at the same time."""
        return self.inner.width if isinstance(self.inner, Concurrent) else 1

    def stop(self) -> None:
        """Calls under way fail, where others than this thread's can be."""
        if isinstance(self.inner, Concurrent):
            self.inner.close()

    def _alone(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if isinstance(self.inner, Concurrent) else self._turn

    @property
    def window(self) -> int:
        return self.inner.window

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        journal = self.stage.journal if self.stage else None
        with self._alone():
            for completion in self.inner.generate(requests) if journal is None else recorded(self.inner, self.model, requests, journal):
                self._count.tokens = self.tokens + len(completion.token_ids)
                self.tick(1)
                yield completion

    def choice_logprobs(self, asks: Sequence[Ask], choices: Sequence[str]) -> list[tuple[float, ...] | None]:
        with self._alone():
            return self.inner.choice_logprobs(asks, choices)

    def loglikelihood(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, ...] | None]:
        with self._alone():
            return self.inner.loglikelihood(requests)

    def representations(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], depths: Sequence[float]
    ) -> list[tuple[float, ...] | None]:
        with self._alone():
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
    made_by: the stage that trained it.
    """

    def __init__(
        self,
        name: str,
        digest: str,
        factory: EngineFactory,
        *,
        served: bool = False,
        weights: str | None = None,
        made_by: Stage | None = None,
    ) -> None:
        self.name, self.digest, self._factory, self.served, self.made_by = name, digest, factory, served, made_by
        self.weights = weights or (None if served else name)
        self._engine: MeteredEngine | None = None
        self._loading = threading.Lock()

    @property
    def engine(self) -> MeteredEngine:
        with self._loading:
            if self._engine is None:
                self._engine = MeteredEngine(self._factory(self.name), self.digest)
            return self._engine

    def scoring(self, stage: Stage) -> MeteredEngine:
        """The engine for scores, which are counted by responses instead of tokens; what it writes goes into the stage's journal."""
        return self.engine.of_stage(stage)

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

    def __post_init__(self) -> None:
        self.folder.tell = self.ui.line

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
    def metered(self, policy: Policy, name: str, total: int, unit: str, stage: Stage) -> Iterator[MeteredEngine]:
        """The policy's engine with a progress bar of `total` completions and scores, and with the stage's journal."""
        engine = policy.engine.of_stage(stage)
        with self.ui.stage(name, total, unit) as engine.tick:
            yield engine
