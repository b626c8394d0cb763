"""Training in processes of its own, started by `accelerate launch`: followed, and ended with the run."""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from spalign import errors
from spalign.engines.make import give_memory_back
from spalign.errors import SpalignError, TrainingError
from spalign.pipeline.job import TrainJob, Watch
from spalign.pipeline.launch_file import launch_file
from spalign.store import clear_errors, read_json, write_json
from spalign.text import printable, without_keys

MARK = "SPALIGN_MARK"
"""Variable with the word that begins every line by which the first process tells how training goes; no other output can guess it."""
RESULT = "result.json"
LOG = "processes.log"
"""In the stage's folder: what the processes printed, control characters and keys taken out."""
_TOLD = 15
_FAILED = "] failed (exitcode: "
"""In what the launcher says first of a process that has failed."""
_PATIENCE = 40.0  # seconds, more than the launcher gives its own children


def launched(job: TrainJob, watch: Watch) -> dict[str, Any]:
    """As `train_job`, in the processes of the run's launch file. They end with this one, whatever ends it.

    Raises the SpalignError that one of them raised, or TrainingError with the end of what they printed.
    """
    path = str(job.config.train.accelerate)
    folder = job.folder / "launch"
    with clear_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_json(folder / "job.json", job.to_json())
        give_memory_back()
        mark = secrets.token_hex(8)
        with (job.folder / LOG).open("a", encoding="utf-8") as log, _process(path, folder / "job.json", mark) as process:
            tail = _follow(process, mark, watch, log)
            code = process.wait()
        if failed := [read_json(f) for f in folder.glob("error-*.json")]:
            raise _error(min(failed, key=lambda found: found["at"]))  # what the others say of it is that it is gone
        result: dict[str, Any] | None = read_json(folder / RESULT)
        if code or result is None:
            said = "\n".join(f"  | {line}" for line in tail)
            raise TrainingError(
                f"the processes that train ended with code {code}; the last that they printed:\n{said}",
                hint=f"see {job.folder / LOG}; the same command goes on from the last checkpoint",
            )
        shutil.rmtree(folder, ignore_errors=True)
        return result


@contextlib.contextmanager
def _process(path: str, job: Path, mark: str) -> Iterator[subprocess.Popen[str]]:
    """The launcher in a process group of its own, so that Ctrl-C reaches this process alone, which then ends it."""
    file = Path(path).expanduser()
    port = [] if launch_file(path).main_process_port else ["--main_process_port", "0"]  # a free one: two runs at a time do not meet
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), *port]
    process = subprocess.Popen(
        [*launch, "-m", "spalign.pipeline.worker", str(job)],
        stdin=subprocess.PIPE,  # its end tells the processes that this one is no more
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        env={**os.environ, MARK: mark},
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    for how in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)


def _follow(process: subprocess.Popen[str], mark: str, watch: Watch, log: IO[str]) -> list[str]:
    """Tell `watch` what the first process tells, and log the rest, until the launcher is done; the last lines of the log, those where
    the launcher goes on about a process that has failed left out."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    tail: deque[str] = deque(maxlen=_TOLD)
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            if process.poll() is not None:  # what they started may hold their output open
                return list(tail)
            continue
        if line is None:
            return list(tail)
        if line.startswith(f"{mark} "):
            _tell(watch, line.split()[1:])
        elif safe := without_keys(printable(line), os.environ).rstrip():
            log.write(safe + "\n")
            log.flush()
            if not any(_FAILED in said for said in tail):
                tail.append(safe)


def _read(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    with stream:
        while line := stream.readline(10_000):
            lines.put(line)
    lines.put(None)


def _tell(watch: Watch, what: list[str]) -> None:
    match what:
        case ["begins", steps]:
            watch.begins(int(steps))
        case ["step"]:
            watch.step()
        case ["saved"]:
            watch.saved()


def _error(found: dict[str, Any]) -> SpalignError:
    kind = getattr(errors, found["kind"])
    safe = (printable(without_keys(found[part], os.environ)) for part in ("message", "hint"))
    error: SpalignError = kind(next(safe), hint=next(safe))
    return error
