"""`runs/NAME`: one folder a run, held by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spalign.errors import RunFolderError
from spalign.files import clear_errors
from spalign.store.stages import Stage
from spalign.text import printable


class RunFolder:
    """`runs/NAME`, held by one process at a time. tell: told what is set aside in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tell: Callable[[str], None] = lambda _: None
        self._lock: int | None = None

    def exists(self) -> bool:
        with clear_errors(self.path):  # a name that is too long, a folder that may not be looked into
            return (self.path / "config.yaml").exists()

    def has_work(self) -> bool:
        """Whether anything is finished that another configuration could call into question."""
        kinds = ("part-*.jsonl", "journal-*.jsonl")
        return self.exists() and any(p.parent.name != "0-judge" and _holds_any(p) for kind in kinds for p in self.path.rglob(kind))

    def path_exists(self) -> bool:
        with clear_errors(self.path):
            return self.path.exists()

    def set_aside(self) -> Path:
        """Rename the folder, so that a fresh run can have its name; nothing is deleted."""
        n = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{n}")).exists():
            n += 1
        with clear_errors(self.path):
            self.path.rename(aside)
        return aside

    def open(self) -> None:
        """Create the folder and take its lock. Raises RunFolderError where another process holds it, or it cannot be written.

        The lock is the open file's: it goes with the process, however that ends. What stands in the file only tells whose it is.
        """
        path = self.path / "run.lock"
        with clear_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            _held.add(self)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(self._lock), path.stat()):  # set aside between open and lock
                raise BlockingIOError
            with clear_errors(path):
                os.ftruncate(self._lock, 0)
                os.write(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BlockingIOError:
            holder = printable(os.pread(self._lock, 300, 0).decode("utf-8", "replace").strip()) or "another process"
            self.close()
            raise RunFolderError(
                f"{self.path}: {holder} is working on this run", hint="wait for it, or give this run another name"
            ) from None
        except RunFolderError:
            self.close()
            raise
        except OSError as e:
            self.close()
            raise RunFolderError(
                f"{self.path}: cannot be locked: {e.strerror}", hint="choose a runs_dir whose file system has locks"
            ) from e

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def stage(self, where: str, inputs: Mapping[str, Any], *made_from: Stage | None, over: Stage | None = None) -> Stage:
        return Stage(self.path / where, inputs, self.tell, [source for source in made_from if source], over)


def _holds_any(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # another process is at work
        return path.stat().st_size > 0
    return False


_held: weakref.WeakSet[RunFolder] = weakref.WeakSet()


def _let_go() -> None:
    for folder in list(_held):
        folder.close()


# a forked child would share the lock, and hold it when this process is dead
os.register_at_fork(after_in_child=_let_go)
