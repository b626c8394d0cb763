"""Calls to engines in a cluster: rows that Ray Data maps over a pool of actors, one engine each.

A block of Ray Data is one row here, so that each completion is handed on as it is made. Actors that are lost are started again by Ray,
elsewhere where need be, and do again what they had in hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import pickle
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from spalign.config import EngineConfig
from spalign.engines.base import Completion, Engine, GenerateRequest
from spalign.errors import EngineError, SpalignError
from spalign.text import printable, shorten

TRIES = 3
"""How many workers a call may lose before it is taken to be its fault."""
PATIENCE = 600.0
"""Seconds in which a cluster that lacks room for a worker may make some, as those that grow by themselves do."""


class Desk:
    """An actor: calls that wait for a worker, how often each was begun, and what came of those that failed after a worker was lost."""

    def __init__(self) -> None:
        self._calls: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._begun: Counter[int] = Counter()
        self._failed: dict[int, bytes] = {}

    async def put(self, calls: Sequence[bytes | None]) -> None:
        for call in calls:
            self._calls.put_nowait(call)

    async def take(self) -> bytes | None:
        return await self._calls.get()

    async def begin(self, ticket: int) -> int:
        self._begun[ticket] += 1
        return self._begun[ticket]

    async def fail(self, ticket: int, error: bytes) -> None:
        self._failed[ticket] = error

    async def failed(self, ticket: int) -> bytes | None:
        return self._failed.get(ticket)


class Worker:
    """What runs in the cluster: an engine, loaded at the first call, also after the process was lost and started again.

    A batch is one call, (ticket, verb, arguments); of it come rows (ticket, kind, value): begun, values, and an end or an error. Of a call
    that was lost with a worker, Ray passes over as many rows as have arrived; an error would be among them, so the desk has it then.
    """

    def __init__(self, name: str, config: EngineConfig, desk: Any, tries: int) -> None:
        self._name, self._config, self._desk, self._tries = name, config, desk, tries
        self._engine: Any = None

    def __call__(self, batch: Any) -> Iterator[Any]:
        import ray

        ticket, verb, arguments = pickle.loads(batch["call"][0].as_py())
        me, attempt = ray.get_runtime_context(), ray.get(self._desk.begin.remote(ticket))
        yield _table("row", (ticket, "begun", (me.get_actor_id(), pickle.dumps(me.current_actor))))
        try:
            if attempt > self._tries:
                raise _too_often(self._tries)
            for value in getattr(self, verb)(*arguments):
                yield _table("row", (ticket, "value", value))
            yield _table("row", (ticket, "end", None))
        except Exception as e:
            error = e if isinstance(e, SpalignError) else _failed(e)
            if attempt > 1:
                ray.get(self._desk.fail.remote(ticket, pickle.dumps(error)))
            yield _table("row", (ticket, "error", error))

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
    """`width` workers, each of which takes `needs` of the cluster (num_cpus, num_gpus); loading begins at once.

    lack: of how many workers the cluster has no room for, in words; empty: it has.
    """

    def __init__(self, name: str, config: EngineConfig, width: int, needs: dict[str, Any], lack: Callable[[int], str]) -> None:
        import ray

        self._width, self._lack = width, lack
        self._tickets = itertools.count()
        self._waiting: dict[int, queue.SimpleQueue[tuple[str, Any]]] = {}
        self._workers: dict[str, bytes] = {}
        self._over: EngineError | None = None
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # with this one the command is lost as well
        self._desk: Any = ray.remote(Desk).options(num_cpus=0, label_selector=here).remote()
        rows = _rows(self._desk, here, width, (name, config, self._desk, TRIES), needs)
        self._pump = threading.Thread(target=self._hand_out, args=(rows,), name="ray-data", daemon=True)
        self._pump.start()

    def ask(self, verb: str, *arguments: Any, times: int = 1) -> Iterator[Any]:
        """What a worker's `verb` gives, as it comes. Raises what it raises, or EngineError where it cannot be had.

        times: so many workers do it at the same time, and the first one's answer counts.
        """
        tickets, answers = list(itertools.islice(self._tickets, times)), queue.SimpleQueue[tuple[str, Any]]()
        self._waiting.update(dict.fromkeys(tickets, answers))
        try:
            if self._over is None:
                self._put([pickle.dumps((ticket, verb, arguments)) for ticket in tickets])
            begun, heard = False, time.monotonic()
            while True:
                if self._over is not None and answers.empty():
                    raise self._over
                try:
                    kind, value = answers.get(timeout=1.0)
                except queue.Empty:
                    self._check(tickets, begun, silent=time.monotonic() - heard)
                    continue
                begun, heard = True, time.monotonic()
                if kind == "error":
                    raise value
                if kind == "end":
                    return
                if kind == "value":
                    yield value
        finally:
            for ticket in tickets:
                del self._waiting[ticket]

    def _put(self, calls: Sequence[bytes | None]) -> None:
        self._of_desk("put", calls)

    def _of_desk(self, verb: str, *arguments: Any) -> Any:
        import ray

        try:
            return ray.get(getattr(self._desk, verb).remote(*arguments))
        except Exception as e:
            raise _ended(e) from e

    def _check(self, tickets: Sequence[int], begun: bool, silent: float) -> None:
        """Raises what no row says of calls from which none has come for `silent` seconds."""
        for ticket in tickets:
            if error := self._of_desk("failed", ticket):
                raise pickle.loads(error)
        if silent < PATIENCE:
            return
        hint = "lower engine.workers, or what a worker takes (worker_cpus, worker_gpus); or add nodes"
        if not self._workers:
            there = self._lack(self._width) or "others may use the cluster"
            raise EngineError(f"none of {self._width} workers started within {PATIENCE:g} s: {there}", hint=hint)
        if begun and (there := self._lack(len(self._workers))):
            raise EngineError(f"the cluster lost a worker, and had no room for another within {PATIENCE:g} s: {there}", hint=hint)

    def _hand_out(self, rows: Any) -> None:
        """Give every row to the call that waits for it, until there are no more."""
        try:
            for table in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in table["row"].to_pylist():
                    ticket, kind, value = pickle.loads(row)
                    if kind == "begun":
                        self._workers.update([value])
                    if answers := self._waiting.get(ticket):
                        answers.put((kind, value))
            over = EngineError("the Ray workers ended", hint="is the cluster still there?")
        except BaseException as e:  # this thread has nobody to raise it to
            over = _ended(e)
        self._over = self._over or over

    def close(self) -> None:
        """End the workers and give their memory back; calls under way fail."""
        import ray

        self._over = self._over or EngineError("the Ray engine was closed", hint="make a new one")
        with contextlib.suppress(Exception):  # the cluster may be gone
            self._put([None])
            for worker in self._workers.values():
                ray.kill(pickle.loads(worker), no_restart=True)
        if self._workers:  # those that never had room go with this process
            self._pump.join(timeout=60)
        with contextlib.suppress(Exception):
            ray.kill(self._desk)


def _rows(desk: Any, here: dict[str, str], width: int, worker: tuple[Any, ...], needs: dict[str, Any]) -> Any:
    """The dataset of all that workers answer, made as calls come in."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext, from_items

    ways = DataContext.get_current().copy()
    ways.target_max_block_size = 1  # bytes: every row a block, which is handed on when it is made
    ways.execution_no_progress_timeout_s = -1  # between stages nothing is asked for
    ways.enable_progress_bars = ways.print_on_execution_start = False
    ways.issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised here

    def come_in(_: Any) -> Iterator[Any]:
        while (call := ray.get(desk.take.remote())) is not None:
            yield _table("call", call)

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


def _table(column: str, value: Any) -> Any:
    import pyarrow

    return pyarrow.table({column: pyarrow.array([value if isinstance(value, bytes) else pickle.dumps(value)], pyarrow.binary())})


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
