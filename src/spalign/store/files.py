"""Files that are whole or not there, rows as lines of JSON, and file system errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from spalign.errors import RunFolderError

Row = dict[str, Any]


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


@contextlib.contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """File system errors as RunFolderError that says what to do."""
    hints = {
        errno.ENOSPC: "free some space and run again with --resume; everything finished is kept",
        errno.EDQUOT: "your disk quota is used up; free some space and run again with --resume",
        errno.EFBIG: "the file system does not allow files this large; choose another runs_dir",
        errno.EROFS: "the file system is read-only; choose another runs_dir",
        errno.EACCES: "you may not write there; choose another runs_dir or mend its permissions",
        errno.EPERM: "you may not write there; choose another runs_dir or mend its permissions",
    }
    try:
        yield
    except OSError as e:
        if e.errno is None:
            raise
        raise RunFolderError(f"{path}: {e.strerror}", hint=hints.get(e.errno, "check the folder; choose another runs_dir")) from e


def encode_row(row: object) -> bytes:
    """A row as one line of JSON. Half a surrogate pair, which UTF-8 has no bytes for, is kept as Python's `surrogatepass` has it."""
    try:
        return msgspec.json.encode(row) + b"\n"
    except UnicodeEncodeError:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def decode_row(line: bytes) -> Row:
    """The inverse of `encode_row`. Raises ValueError where the line is not JSON."""
    try:
        row: Row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        row = json.loads(line)
    return row


def encode_rows(rows: Iterable[object]) -> bytes:
    return b"".join(map(encode_row, rows))


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_atomic(path: Path, data: bytes) -> None:
    """The whole file or none of it, on disk when this returns. Raises RunFolderError."""
    temporary = path.with_name(path.name + ".tmp")
    with clear_errors(path):
        try:
            with temporary.open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            temporary.rename(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def link(file: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system has no links."""
    try:
        target.hardlink_to(file)
    except OSError:
        shutil.copy2(file, target)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))


def read_json(path: Path) -> Any:
    """The JSON object in the file, or None where there is no such file. Raises RunFolderError where it is damaged."""
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise RunFolderError(f"{path}: cannot be read: {e}", hint="remove the stage's folder to have it done again, or use --fresh") from e
