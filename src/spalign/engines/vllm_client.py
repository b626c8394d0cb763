"""Our side of vLLM's process: starting and ending it, and asking it many things at a time. The other side is `vllm_process`."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from spalign.engines.vllm_process import Call, Done, Failed, Job, Ready, Some, Stop
from spalign.errors import EngineError
from spalign.text import printable, shorten

_LOG_LINES = 12


class VLLMProcess:
    """vLLM's process and its log. Ended when closed, when forgotten, and when this process ends in whatever way."""

    def __init__(self, settings: dict[str, Any], environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="spalign-vllm-")
        log = Path(self._folder.name) / "log"
        ours, theirs = Pipe()
        code = f"from spalign.engines.vllm_process import main; main({theirs.fileno()}, {self._folder.name!r})"
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                env={**environment, "TMPDIR": self._folder.name},
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is ours; and whatever it starts can be ended with it
            )
        theirs.close()
        self._line = _Line(ours, self._process, log)
        self.close = self._line.close = weakref.finalize(self, _end, self._process, self._folder, self._line)
        self._numbers = itertools.count()
        self.window = self._line.begin(settings).window

    def run(self, jobs: list[Job]) -> Iterator[Done]:
        """Results as they come; a caller who stops listening ends the rest. Several threads may call it at the same time."""
        if not jobs:
            return
        number, over = next(self._numbers), False
        arrived = self._line.expect(number)
        try:
            self._line.outbox.put(Call(number, jobs))
            while not over:
                some = arrived.get()
                if isinstance(some, EngineError):
                    raise some
                over = some.over
                yield from some.done
        finally:
            self._line.forget(number)
            if not over:
                self._line.outbox.put(Stop(number))


class _Line:
    """The connection to vLLM's process: one thread writes, another reads and hands each call its results.

    Whoever asks, or stops asking, never waits for the other side: a generator that is forgotten in the middle may end in any thread, at any
    moment. So nothing is locked here: queues, and single operations on a dictionary. It knows no engine, so that engines can be forgotten.
    """

    def __init__(self, connection: Connection, process: subprocess.Popen[bytes], log: Path) -> None:
        self._connection, self._process, self._log = connection, process, log
        self._arriving: dict[int, SimpleQueue[Some | EngineError]] = {}
        self.outbox: SimpleQueue[Call | Stop | None] = SimpleQueue()
        self.closed = False
        self.close: Callable[[], object] = lambda: None
        self._ended: EngineError | None = None

    def begin(self, settings: dict[str, Any]) -> Ready:
        """The first exchange; then the threads start. Raises EngineError with the reason where vLLM does not start."""
        with contextlib.suppress(OSError):  # the reason is about to be read
            self._connection.send(settings)
        ready = self._receive()
        if not isinstance(ready, Ready):
            self._over("did not start", ready)
            raise self._ended or AssertionError
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True, name="vllm").start()
        return ready

    def expect(self, number: int) -> SimpleQueue[Some | EngineError]:
        """Where the results of a call arrive, and an error where there will be none. Raises EngineError where all is over already."""
        queue = self._arriving[number] = SimpleQueue()
        if self._ended or self.closed:
            self.forget(number)
            raise self._ended or was_closed()
        return queue

    def forget(self, number: int) -> None:
        self._arriving.pop(number, None)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the reader finds out why
            while (message := self.outbox.get()) is not None:
                self._connection.send(message)

    def _read(self) -> None:
        last: Any = None
        try:
            while isinstance(last := self._receive(), Some):
                if queue := self._arriving.get(last.number):
                    queue.put(last)
        finally:  # whatever it was: nobody may wait for ever
            self._over("failed", last)

    def _receive(self) -> Any:
        """The next message; None where the process has ended."""
        try:
            while not self._connection.poll(1.0):
                if self._process.poll() is not None and not self._connection.poll():
                    return None
            return self._connection.recv()
        except (EOFError, OSError):
            return None

    def _over(self, what: str, last: Any) -> None:
        """Tell every call, with the reason and the last lines of the log, and end the process."""
        self._ended = was_closed() if self.closed else self._failure(what, last)
        for queue in list(self._arriving.values()):
            queue.put(self._ended)
        self.close()

    def _failure(self, what: str, last: Any) -> EngineError:
        if isinstance(last, Failed):
            why = last.message
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            why = _ended(self._process.returncode)
        lines: list[str] = []
        with contextlib.suppress(OSError):  # the folder goes when it is closed
            lines = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        log = "".join(f"\n  log: {shorten(printable(line).strip(), 200)}" for line in lines if line.strip())
        return EngineError(
            f"vLLM {what}: {shorten(printable(' '.join(why.split())), 500)}{log}",
            hint="if it is short of memory, lower engine.batch_size or change engine.memory; engine.kind=transformers runs any model",
        )


def was_closed() -> EngineError:
    return EngineError("the vLLM engine was closed", hint="make a new one")


def _ended(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed, perhaps for want of memory"
    return f"its process ended by itself (exit code {code})"


def _end(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str], line: _Line) -> None:
    line.closed = True
    line.outbox.put(None)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()
    folder.cleanup()
