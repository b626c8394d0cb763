"""The same function on many tasks, by several processes where there are many.

Processes of their own, not forked ones: a fork would share the run's lock and the locks of the model's threads.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar, cast

from spalign.errors import SpalignError

Task = TypeVar("Task")
Result = TypeVar("Result")
MOST = 4
AHEAD = 3


def cores() -> int:
    """How many processes may be used."""
    return min(MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def in_order(function: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Iterator[Result]:
    """`function` of every task, in order. processes: 1 does the work here; else function and tasks must be picklable.

    A few results are fetched ahead of their turn, so that nobody waits for the one who uses them. Raises what `function` raised.
    """
    if processes < 2:
        yield from map(function, tasks)
        return
    free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def do(task: Task) -> Result:
        worker = free.get()
        try:
            return cast(Result, worker.answer(task))
        finally:
            free.put(worker)

    with contextlib.ExitStack() as stack:
        threads = ThreadPoolExecutor(processes)
        stack.callback(threads.shutdown, cancel_futures=True)  # after the processes have ended, so that nothing is waited for
        for _ in range(processes):
            free.put(stack.enter_context(_Worker(function)))
        waiting = iter(tasks)
        begun = deque(threads.submit(do, task) for task in islice(waiting, AHEAD * processes))
        while begun:
            result = begun.popleft().result()
            begun.extend(threads.submit(do, task) for task in islice(waiting, 1))
            yield result


class _Worker:
    """One process; ended with the `with` block, or with this process, whose end it reads as the end of its tasks."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from spalign.pipeline.workers import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._function = function

    def __enter__(self) -> _Worker:
        self.give(self._function)
        return self

    def __exit__(self, *how: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def give(self, task: Any) -> None:
        assert self._process.stdin is not None
        with self._alive():
            pickle.dump(task, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()

    def answer(self, task: Any) -> Any:
        assert self._process.stdout is not None
        self.give(task)
        with self._alive():
            failed, result = pickle.load(self._process.stdout)
        if failed:
            raise result
        return result

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as e:
            raise SpalignError(
                f"a worker process ended with code {self._process.wait()}", hint="was it killed for its memory? the same command goes on"
            ) from e


def main() -> None:
    """A worker process: read a function, then tasks, and answer each with (failed, result or error)."""
    gc.disable()  # rows have no cycles, and looking for some takes a sixth of the time
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to handle
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as out, contextlib.suppress(EOFError, BrokenPipeError):
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what anything prints is no result
        function = pickle.load(sys.stdin.buffer)
        while True:
            task = pickle.load(sys.stdin.buffer)
            try:
                answer = (False, function(task))
            except Exception as e:
                answer = (True, e)
            pickle.dump(answer, out, protocol=pickle.HIGHEST_PROTOCOL)
            out.flush()
