"""What is finished of a part in work, one line each, so that a kill costs only what was in flight."""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from pathlib import Path

from spalign.files import Row, clear_errors, decode_row, encode_row, sync, write_atomic

SYNC_SECONDS = 1.0
_SUM = b',"crc":"'
"""Between a line's row and its CRC-32, which a line of an earlier version lacks."""


class Journal:
    """Rows by key in the file `path`, which has one writer at a time.

    A row that `append` has returned from survives the death of the process; within SYNC_SECONDS it is on the disk and survives the
    machine's too. A thread of its own does that, so that who appends does not wait. Opening heals the file: of a torn line, only that
    line is lost. All raise RunFolderError where the disk is full or may not be written; what was appended before stays.

    healed: lines that were torn or damaged, and are cut off or left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.healed = 0
        self._failed: OSError | None = None
        self._unsynced, self._closing = threading.Event(), threading.Event()
        with clear_errors(path):
            self._rows = self._heal() if path.exists() else {}
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                sync(path.parent)
                self._size = os.fstat(self._file).st_size
            except OSError:
                os.close(self._file)
                raise
        self._thread = threading.Thread(target=self._keep_synced, name="journal", daemon=True)
        self._thread.start()

    def _heal(self) -> dict[str, Row]:
        """The rows of all whole lines. Others are taken out: what is appended to a torn line would be torn, too."""
        rows: dict[str, Row] = {}
        whole: list[bytes] = []
        lines = self.path.read_bytes().splitlines(keepends=True)
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                row = _row(line)
                rows[row["key"]] = row
                whole.append(line)
        self.healed = len(lines) - len(whole)
        if whole == lines[: len(whole)]:  # a torn end is cut off, which needs no room
            os.truncate(self.path, sum(map(len, whole)))
        else:  # what a machine that lost power leaves
            write_atomic(self.path, b"".join(whole))
        return rows

    def get(self, key: str) -> Row | None:
        """What an earlier process appended under this key."""
        return self._rows.get(key)

    def drop(self, key: str) -> None:
        """The row of this key is not what it should be."""
        del self._rows[key]
        self.healed += 1

    def append(self, key: str, row: Row) -> None:
        body = encode_row({"key": key, **row})[:-2]
        line = b'%s%s%08x"}\n' % (body, _SUM, zlib.crc32(body))
        with clear_errors(self.path):
            self._check()
            rest = memoryview(line)
            try:
                while rest:  # a nearly full disk takes the beginning
                    rest = rest[os.write(self._file, rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)
                raise
        self._size += len(line)
        self._unsynced.set()

    def remove(self) -> None:
        """Take the file away: its rows stand in a part now."""
        with clear_errors(self.path):
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        with clear_errors(self.path):
            try:
                self._check()
                if self._unsynced.is_set():
                    os.fsync(self._file)
            finally:
                os.close(self._file)

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _keep_synced(self) -> None:
        while not self._closing.wait(SYNC_SECONDS):
            if self._unsynced.is_set() and self._failed is None:
                self._unsynced.clear()  # before: what is appended meanwhile waits for the next round
                try:
                    os.fsync(self._file)
                except OSError as e:
                    self._failed = e


def _row(line: bytes) -> Row:
    """Raises ValueError where the line is torn or not as it was written."""
    if not line.endswith(b"}\n"):
        raise ValueError("torn")
    body, mark, crc = line[:-19], line[-19:-11], line[-11:-3]
    if mark == _SUM and crc != b"%08x" % zlib.crc32(body):
        raise ValueError("damaged")
    return decode_row(line)
