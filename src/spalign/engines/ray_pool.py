"""Calls to engines in a cluster: rows that Ray Data maps over a pool of actors, one engine each.

A block of Ray Data is one row here, so that each completion is handed on as it is made. Actors that are lost are started again by Ray,
elsewhere where need be, and do again what they had in hand.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import logging
import pickle
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from spalign.config import EngineConfig
from spalign.engines.base import Completion, Engine, GenerateRequest
from spalign.errors import EngineError, SpalignError
from spalign.text import printable, shorten

TRIES = 3
"""How many workers a call may lose before it is taken to be its fault."""
PATIENCE = 600.0
"""Seconds in which a cluster that lacks room for a worker may make some, as those that grow by themselves do."""
BEAT, LOST = 5.0, 60.0
"""Seconds between two signs of life of a worker, and without one after which somebody else gets its call."""


class Desk:
    """An actor: the calls in their order, who does them, when each worker was last heard of, and what went wrong after one was lost.

    lost: seconds as LOST.
    """

    def __init__(self, lost: float) -> None:
        self._lost = lost
        self._calls: list[bytes | None] = []
        self._more = asyncio.Event()
        self._waiting: dict[int, tuple[int, float]] = {}
        """ticket -> place among the calls, and since when, until it is begun."""
        self._begun: Counter[int] = Counter()
        self._with: dict[int, str] = {}
        self._over: set[int] = set()
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
        if ticket in self._over:
            return 0
        if ticket in self._waiting:
            self._calls[self._waiting.pop(ticket)[0]] = None
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
            return self._failed.get(ticket), now - self._heard[worker][0] > self._lost, True, silent
        since = self._waiting[ticket][1] if ticket in self._waiting else now
        there = [at for worker, at in self._idle.items() if now - self._heard[worker][0] < self._lost]
        idle = any(now - max(at, since) > self._lost for at in there)
        return self._failed.get(ticket), idle, False, silent

    async def give_up(self, ticket: int) -> None:
        self._forget(ticket)

    def _forget(self, ticket: int) -> None:
        self._over.add(ticket)
        for known in (self._waiting, self._with, self._begun):
            known.pop(ticket, None)


class Worker:
    """What runs in the cluster: an engine, loaded at the first call, also after the process was lost and started again.

    A batch is one call, (ticket, verb, arguments); of it come rows (ticket, kind, value): values, and an end or an error. Of a call that
    was lost with a worker, Ray passes over as many rows as have arrived; an error would be among them, so the desk has it then.
    """

    def __init__(self, name: str, config: EngineConfig, desk: Any, tries: int) -> None:
        import ray

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
                raise _too_often(self._tries)
            for value in getattr(self, verb)(*arguments):
                yield _table("row", pickle.dumps((ticket, "value", value)))
            yield _table("row", pickle.dumps((ticket, "end", None)))
            self._desk.end.remote(ticket)
        except Exception as e:
            error = e if isinstance(e, SpalignError) else _failed(e)
            if attempt > 1:
                ray.get(self._desk.fail.remote(ticket, pickle.dumps(error)))
            yield _table("row", pickle.dumps((ticket, "error", error)))
            self._desk.end.remote(ticket)

    def _ready(self) -> Any:
        from spalign.engines.make import load_engine

        if self._engine is None:
            self._engine = load_engine(self._name, self._config)
        return self._engine

    def window(self) -> Iterator[int]:
        yield self._ready().window

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        yield from self._ready().generate(requests)

    def score(self, verb: str, *arguments: Any) -> Iterator[list[tuple[float, ...] | None]]:
        engine: Engine = self._ready()
        yield getattr(engine, verb)(*arguments)

    def batches(self, requests: Sequence[GenerateRequest]) -> Iterator[list[list[tuple[int, int]]]]:
        """As `Batching.batches`, with places among the requests in place of requests."""
        place = {r.id: n for n, r in enumerate(requests)}
        yield [[(place[r.id], i) for r, i in batch] for batch in self._ready().batches(requests)]


class Pool:
    """`width` workers, each of which takes `needs` of the cluster (num_cpus, num_gpus); loading begins at once."""

    def __init__(self, name: str, config: EngineConfig, width: int, needs: dict[str, Any]) -> None:
        import ray

        self._width = width
        self._tickets = itertools.count()
        self._waiting: dict[int, queue.SimpleQueue[tuple[str, Any]]] = {}
        self._over: EngineError | None = None
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # with this one the command is lost as well
        self._desk: Any = ray.remote(Desk).options(num_cpus=0, label_selector=here).remote(LOST)
        rows = _rows(self._desk, here, width, (name, config, self._desk, TRIES), needs)
        self._pump = threading.Thread(target=self._hand_out, args=(rows,), name="ray-data", daemon=True)
        self._pump.start()
        atexit.register(self.close)  # before Ray's own end, after which its dataset would start another cluster

    def ask(self, verb: str, *arguments: Any, times: int = 1) -> Iterator[Any]:
        """What a worker's `verb` gives, as it comes. Raises what it raises, or EngineError where it cannot be had.

        times: so many workers do it at the same time, and the first one's answer counts. After a loss, values may come twice or not at all.
        """
        answers = queue.SimpleQueue[tuple[str, Any]]()
        tickets = [self._send(answers, verb, arguments) for _ in range(times)]
        lost = [0] * times
        try:
            while True:
                if self._over is not None and answers.empty():
                    raise self._over
                try:
                    kind, value = answers.get(timeout=1.0)
                except queue.Empty:
                    for n, ticket in enumerate(tickets):
                        if (begun := self._lost(ticket)) is not None:
                            lost[n] += begun
                            if lost[n] == TRIES:
                                raise _too_often(TRIES) from None
                            tickets[n] = self._send(answers, verb, arguments)
                    continue
                if kind == "error":
                    raise value
                if kind == "end":
                    return
                yield value
        finally:
            for ticket in tickets:
                self._waiting.pop(ticket, None)

    def _send(self, answers: queue.SimpleQueue[tuple[str, Any]], verb: str, arguments: tuple[Any, ...]) -> int:
        ticket = next(self._tickets)
        self._waiting[ticket] = answers
        if self._over is None:
            self._at_desk("put", ticket, pickle.dumps((ticket, verb, arguments)))
        return ticket

    def _at_desk(self, verb: str, *arguments: Any) -> Any:
        import ray

        try:
            return ray.get(getattr(self._desk, verb).remote(*arguments))
        except Exception as e:
            raise self._over or _ended(e) from e

    def _lost(self, ticket: int) -> bool | None:
        """Whether it was begun, where another worker is to do it; what comes of it from now on is nobody's. Raises what no row says."""
        error, lost, begun, silent = self._at_desk("state", ticket)
        if error:
            raise pickle.loads(error)
        if lost:
            self._at_desk("give_up", ticket)
            del self._waiting[ticket]
            return bool(begun)
        if not begun and silent > PATIENCE:
            raise EngineError(
                f"none of {self._width} workers could be had for {PATIENCE:g} s: the cluster has no room, or others use it",
                hint="lower engine.workers, or what a worker takes (worker_cpus, worker_gpus); or add nodes. A judge of its own takes "
                "as many beside the policy's",
            )
        return None

    def _hand_out(self, rows: Any) -> None:
        """Give every row to the call that waits for it, until there are no more."""
        try:
            for table in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in table["row"].to_pylist():
                    ticket, kind, value = pickle.loads(row)
                    if answers := self._waiting.get(ticket):
                        answers.put((kind, value))
            over = EngineError("the Ray workers ended", hint="is the cluster still there?")
        except BaseException as e:  # this thread has nobody to raise it to
            over = _ended(e)
        self._over = self._over or over

    def close(self) -> None:
        """End the workers and give their memory back; calls under way fail."""
        import ray

        atexit.unregister(self.close)
        self._over = self._over or EngineError("the Ray engine was closed", hint="make a new one")
        with contextlib.suppress(Exception):  # the cluster may be gone
            workers = self._at_desk("workers")
            ray.kill(self._desk)  # nothing comes in any more, and the dataset ends
            for worker in workers:
                ray.kill(pickle.loads(worker), no_restart=True)
        self._pump.join(timeout=60)


def _rows(desk: Any, here: dict[str, str], width: int, worker: tuple[Any, ...], needs: dict[str, Any]) -> Any:
    """The dataset of all that workers answer, made as calls come in."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext, from_items

    ways = DataContext.get_current().copy()
    ways.target_max_block_size = 1  # bytes: every row a block, which is handed on when it is made
    ways._max_num_blocks_in_streaming_gen_buffer = None  # type: ignore[assignment]  # a worker does not wait until its rows are fetched
    ways.execution_no_progress_timeout_s = -1  # between stages nothing is asked for
    ways.enable_progress_bars = ways.print_on_execution_start = False
    ways.issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised here

    def come_in(_: Any) -> Iterator[Any]:
        for place in itertools.count():  # by places: where this process is lost, it starts again, and Ray passes over what has arrived
            yield _table("call", ray.get(desk.take.remote(place)))

    with DataContext.current(ways):
        return (
            from_items([0])
            .map_batches(come_in, num_cpus=0, label_selector=here)
            .map_batches(
                Worker,
                fn_constructor_args=worker,
                compute=ActorPoolStrategy(size=width, max_tasks_in_flight_per_actor=1),
                batch_size=1,
                batch_format="pyarrow",
                **needs,
            )
        )


def _table(column: str, value: bytes) -> Any:
    import pyarrow

    return pyarrow.table({column: pyarrow.array([value], pyarrow.binary())})


def _failed(error: BaseException) -> EngineError:
    return EngineError(
        f"a worker failed: {type(error).__name__}: {_said(error, 500)}",
        hint="ray's own logs of the workers say more; engine.kind=transformers or vllm runs the same here",
    )


def _too_often(tries: int) -> EngineError:
    return EngineError(
        f"{tries} workers were lost on the same call",
        hint="short of memory? lower engine.batch_size or give a worker more; ray's own logs of the workers say more",
    )


def _ended(error: BaseException) -> EngineError:
    return EngineError(f"Ray failed: {_said(error, 300)}", hint="is the cluster still there?")


def _said(error: BaseException, length: int) -> str:
    return shorten(printable(" ".join(str(error).split())), length)
