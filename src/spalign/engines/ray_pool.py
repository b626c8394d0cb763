"""Calls to engines in a cluster: rows that Ray Data maps over a pool of actors, one engine each.

A block of Ray Data is one row here, so that each completion is handed on as it is made. Actors that are lost are started again by Ray,
elsewhere where need be, and do again what they had in hand.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import pickle
import queue
import threading
from collections.abc import Iterator
from typing import Any

from spalign.config import EngineConfig
from spalign.engines.ray_worker import Desk, Worker, in_words, table, too_often
from spalign.errors import EngineError

TRIES = 3
"""How many workers a call may lose before it is taken to be its fault."""
PATIENCE = 600.0
"""Seconds in which a cluster that lacks room for a worker may make some, as those that grow by themselves do."""
LOST = 60.0
"""Seconds without a sign of life of a worker after which somebody else gets its call."""


class Pool:
    """`width` workers, each of which takes `needs` of the cluster (num_cpus, num_gpus); loading begins at once."""

    def __init__(self, name: str, config: EngineConfig, width: int, needs: dict[str, Any]) -> None:
        import ray

        self.width = width
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
                        if (begun := self._missed(ticket)) is not None:
                            lost[n] += begun
                            if lost[n] == TRIES:
                                raise too_often(TRIES) from None
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

    def _missed(self, ticket: int) -> bool | None:
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
                f"none of {self.width} workers could be had for {PATIENCE:g} s: the cluster has no room, or others use it",
                hint="lower engine.workers, or what a worker takes (worker_cpus, worker_gpus); or add nodes. A judge of its own takes "
                "as many beside the policy's",
            )
        return None

    def _hand_out(self, rows: Any) -> None:
        """Give every row to the call that waits for it, until there are no more."""
        try:
            for block in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in block["row"].to_pylist():
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
            yield table("call", ray.get(desk.take.remote(place)))

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


def _ended(error: BaseException) -> EngineError:
    return EngineError(f"Ray failed: {in_words(error, 300)}", hint="is the cluster still there?")
