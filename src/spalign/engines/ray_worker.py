"""What runs in the cluster: the workers, one engine each, and the desk at which they take their calls."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from spalign.config import EngineConfig
from spalign.engines.base import Batching, Completion, Engine, GenerateRequest
from spalign.errors import EngineError, SpalignError
from spalign.startup import slim
from spalign.text import printable, shorten

BEAT = 5.0
"""Seconds between two signs of life of a worker."""


class Desk:
    """An actor: the calls in their order, who does them, when each worker was last heard of, and what went wrong after one was lost.

    patience: seconds without a sign of life after which a worker is taken to be lost.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._calls: list[bytes | None] = []
        self._more = asyncio.Event()
        self._waiting: dict[int, tuple[int, float]] = {}
        """ticket -> place among the calls, and since when, until it is begun."""
        self._begun: Counter[int] = Counter()
        self._with: dict[int, str] = {}
        self._unwanted: set[int] = set()
        self._failed: dict[int, bytes] = {}
        self._heard: dict[str, tuple[float, bytes]] = {}
        self._idle: dict[str, float] = {}
        self._opened = time.monotonic()

    async def put(self, ticket: int, call: bytes) -> None:
        self._waiting[ticket] = (len(self._calls), time.monotonic())
        self._calls.append(call)
        self._more.set()

    async def take(self, place: int) -> bytes:
        """The call at that place. Who asks again for one that was begun has been told before, and gets nothing in its place."""
        while place >= len(self._calls):
            self._more.clear()
            await self._more.wait()
        return self._calls[place] or b""

    async def hear(self, worker: str, handle: bytes) -> None:
        self._heard[worker] = (time.monotonic(), handle)
        if worker not in self._with.values():
            self._idle.setdefault(worker, time.monotonic())

    async def workers(self) -> list[bytes]:
        """Handles of all that were ever heard of."""
        return [handle for _, handle in self._heard.values()]

    async def begin(self, ticket: int, worker: str) -> int:
        """Which try this is; 0: it is not wanted any more."""
        if ticket in self._unwanted:
            return 0
        self._leaves(ticket)
        self._idle.pop(worker, None)
        self._with[ticket] = worker
        self._begun[ticket] += 1
        return self._begun[ticket]

    async def end(self, ticket: int) -> None:
        """Its worker has done it."""
        if worker := self._with.get(ticket):
            self._idle[worker] = time.monotonic()
        self._forget(ticket)

    async def fail(self, ticket: int, error: bytes) -> None:
        self._failed[ticket] = error

    async def state(self, ticket: int) -> tuple[bytes | None, bool, bool, float]:
        """Its error; whether it is lost: with a worker that has not been heard of for so long, or not begun though one has been idle for so
        long; whether it was begun; and for how many seconds no worker at all has been heard of."""
        now = time.monotonic()
        silent = now - max((at for at, _ in self._heard.values()), default=self._opened)
        if worker := self._with.get(ticket):
            return self._failed.get(ticket), now - self._heard[worker][0] > self._patience, True, silent
        since = self._waiting[ticket][1] if ticket in self._waiting else now
        there = [at for worker, at in self._idle.items() if now - self._heard[worker][0] < self._patience]
        idle = any(now - max(at, since) > self._patience for at in there)
        return self._failed.get(ticket), idle, False, silent

    async def give_up(self, ticket: int) -> None:
        self._forget(ticket)

    def _forget(self, ticket: int) -> None:
        self._unwanted.add(ticket)
        self._leaves(ticket)
        self._with.pop(ticket, None)
        self._begun.pop(ticket, None)

    def _leaves(self, ticket: int) -> None:
        """It waits no longer, and its call need not be kept."""
        if found := self._waiting.pop(ticket, None):
            self._calls[found[0]] = None


class Worker:
    """What runs in the cluster: an engine, loaded at the first call, also after the process was lost and started again.

    A batch is one call, (ticket, verb, arguments); of it come rows (ticket, kind, value): values, and an end or an error. Of a call that
    was lost with a worker, Ray passes over as many rows as have arrived; an error would be among them, so the desk has it then.
    """

    def __init__(self, name: str, config: EngineConfig, desk: Any, tries: int) -> None:
        import ray

        slim()
        self._name, self._config, self._desk, self._tries = name, config, desk, tries
        self._engine: Any = None
        me = ray.get_runtime_context()
        self._me, handle = me.get_actor_id(), pickle.dumps(me.current_actor)

        def hear() -> None:
            ray.get(desk.hear.remote(self._me, handle))

        def beat() -> None:
            while True:
                time.sleep(BEAT)
                hear()

        hear()
        threading.Thread(target=beat, daemon=True).start()

    def __call__(self, batch: Any) -> Iterator[Any]:
        import ray

        call = batch["call"][0].as_py()
        if not call:
            return
        ticket, verb, arguments = pickle.loads(call)
        attempt = ray.get(self._desk.begin.remote(ticket, self._me))
        if not attempt:
            return
        try:
            if attempt > self._tries:
                raise too_often(self._tries)
            for value in getattr(self, verb)(*arguments):
                yield table("row", pickle.dumps((ticket, "value", value)))
            yield table("row", pickle.dumps((ticket, "end", None)))
            self._desk.end.remote(ticket)
        except Exception as e:
            error = e if isinstance(e, SpalignError) else _failed(e)
            if attempt > 1:
                ray.get(self._desk.fail.remote(ticket, pickle.dumps(error)))
            yield table("row", pickle.dumps((ticket, "error", error)))
            self._desk.end.remote(ticket)

    def _ready(self) -> Any:
        from spalign.engines.make import load_engine

        if self._engine is None:
            self._engine = load_engine(self._name, self._config)
        return self._engine

    def about(self) -> Iterator[tuple[int, bool]]:
        """The window, and whether it is `Batching`, which may go by the GPU."""
        engine = self._ready()
        yield engine.window, isinstance(engine, Batching)

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        yield from self._ready().generate(requests)

    def score(self, verb: str, *arguments: Any) -> Iterator[list[tuple[float, ...] | None]]:
        engine: Engine = self._ready()
        yield getattr(engine, verb)(*arguments)

    def batches(self, requests: Sequence[GenerateRequest]) -> Iterator[list[list[tuple[int, int]]]]:
        """As `Batching.batches`, with places among the requests in place of requests."""
        place = {r.id: n for n, r in enumerate(requests)}
        yield [[(place[r.id], i) for r, i in batch] for batch in self._ready().batches(requests)]


def table(column: str, value: bytes) -> Any:
    import pyarrow

    return pyarrow.table({column: pyarrow.array([value], pyarrow.binary())})


def _failed(error: BaseException) -> EngineError:
    return EngineError(
        f"a worker failed: {type(error).__name__}: {in_words(error, 500)}",
        hint="ray's own logs of the workers say more; engine.kind=transformers or vllm runs the same here",
    )


def too_often(tries: int) -> EngineError:
    return EngineError(
        f"{tries} workers were lost on the same call",
        hint="short of memory? lower engine.batch_size or give a worker more; ray's own logs of the workers say more",
    )


def in_words(error: BaseException, length: int) -> str:
    return shorten(printable(" ".join(str(error).split())), length)
