"""Files that are whole or not there, rows as lines of JSON, and file system errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from spalign.errors import RunFolderError, SpalignError

Row = dict[str, Any]
MADE_AGAIN = "restore it, or remove this file alone and run again: it is made anew from what stands beside it"
"""What to do about a damaged file that says what stands beside it."""
_WRITER_FAILED = ("PytorchStreamWriter failed writing", "iostream error", "unexpected pos ")
"""What torch says of a file that it cannot write."""


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
    except SpalignError:
        raise
    except Exception as e:
        if (code := error_number(e)) is None:
            raise
        what = os.strerror(code) if code else "cannot be written; is the disk full, or a quota or size limit reached?"
        raise RunFolderError(f"{path}: {what}", hint=hints.get(code or errno.ENOSPC, "check the folder; choose another runs_dir")) from e


def error_number(e: Exception) -> int | None:
    """A file system error's number, 0 where torch's writer keeps it to itself; None: it is no such error."""
    if isinstance(e, OSError):
        return e.errno
    if type(e) is Exception or type(e).__name__ == "SafetensorError":  # of tokenizers and safetensors, which are written in Rust
        found = re.search(r"\(os error (\d+)\)", str(e))
        return int(found[1]) if found else None
    return 0 if type(e) is RuntimeError and any(said in str(e) for said in _WRITER_FAILED) else None


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


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def move_folder(half: Path, target: Path) -> None:
    """Rename a folder when all that is in it is on disk: what stands under the new name is whole, also after the machine lost power."""
    for path in (*half.rglob("*"), half):
        sync(path)
    half.rename(target)
    sync(target.parent)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path`, on disk, when the block ends; nothing is left of what fails. Raises RunFolderError."""
    temporary = path.with_name(path.name + ".tmp")
    with clear_errors(path):
        try:
            yield temporary
            sync(temporary)
            temporary.rename(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """The whole file or none of it, on disk when this returns. Raises RunFolderError."""
    with _whole(path) as temporary:
        temporary.write_bytes(data)


def link(file: Path, target: Path) -> None:
    """The same file under a second name; a copy, whole or not there, where the file system has no links. Raises RunFolderError."""
    try:
        target.hardlink_to(file)
    except OSError:
        with _whole(target) as temporary:
            shutil.copy2(file, temporary)


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
        raise RunFolderError(f"{path}: cannot be read: {e}", hint=MADE_AGAIN) from e
