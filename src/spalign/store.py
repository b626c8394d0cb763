"""The run folder: stages of part files with manifests, so that a run can be killed anywhere and go on.

A part is written to a temporary name, synced and renamed. A stage's `manifest.json` is written last: its presence means done. A stage
knows the digest of all that it depends on; done with the same digest, it is not run again; with another one, it is set aside, never
deleted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from spalign.errors import RunFolderError

Item = TypeVar("Item")
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
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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


class Stage:
    """One stage on disk. `inputs` is everything that its result depends on."""

    def __init__(self, folder: Path, inputs: Mapping[str, Any]) -> None:
        self.folder, self.inputs = folder, dict(inputs)
        self.digest = digest(self.inputs)

    @property
    def name(self) -> str:
        return self.folder.name

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, if the stage is done with these inputs."""
        found = read_json(self.folder / "manifest.json")
        return found if found and found.get("digest") == self.digest else None

    def begin(self) -> dict[str, Any]:
        """Make the folder ready and return what an interrupted run left (`seconds`, `tokens`). Another input's work is set aside."""
        progress = read_json(self.folder / "progress.json")
        if self.folder.exists() and (progress is None or progress.get("digest") != self.digest):
            self._set_aside()
            progress = None
        if progress is None:
            with clear_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            progress = {"digest": self.digest, "seconds": 0.0, "tokens": 0}
            write_json(self.folder / "progress.json", progress)
        return dict(progress)

    def _set_aside(self) -> None:
        n = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.replaced-{n}")).exists():
            n += 1
        with clear_errors(self.folder):
            self.folder.rename(aside)

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.jsonl"))

    def part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.jsonl"

    def write_part(self, number: int, rows: Sequence[Row]) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(self.part(number), lines.encode("utf-8", "surrogatepass"))

    def note(self, *, seconds: float, tokens: int) -> None:
        write_json(self.folder / "progress.json", {"digest": self.digest, "seconds": seconds, "tokens": tokens})

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Write the manifest: the stage is done."""
        parts = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in self.parts()}
        manifest = {"digest": self.digest, "inputs": self.inputs, "parts": parts, "versions": versions(), **facts}
        write_json(self.folder / "manifest.json", manifest)
        return manifest

    def rows(self) -> Iterator[Row]:
        """The rows of a finished stage. Raises RunFolderError where a part is missing or not what the manifest says."""
        manifest = self.manifest()
        if manifest is None:
            raise RunFolderError(f"{self.folder}: not finished", hint="run the stage first: spalign run CONFIG --resume")
        for name, sha in manifest["parts"].items():
            path = self.folder / name
            try:
                data = path.read_bytes()
            except OSError as e:
                raise RunFolderError(f"{path}: {e.strerror}", hint=f"remove {self.folder} to have the stage done again") from e
            if hashlib.sha256(data).hexdigest() != sha:
                raise RunFolderError(
                    f"{path}: changed since it was written", hint=f"restore it, or remove {self.folder} to have the stage done again"
                )
            for line in data.splitlines():
                yield json.loads(line)


def run_in_parts(
    stage: Stage, items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], list[Row]], *, tokens: Callable[[], int] = lambda: 0
) -> dict[str, Any]:
    """Do `work` on `items`, `size` at a time, one part file each; parts that are on disk are not done again. Returns the manifest."""
    if (done := stage.manifest()) is not None:
        return done
    progress = stage.begin()
    seconds, before = progress["seconds"], progress["tokens"]
    for number, start in enumerate(range(0, len(items), size)):
        if stage.part(number).exists():
            continue
        began, counted = time.perf_counter(), tokens()
        stage.write_part(number, work(items[start : start + size]))
        seconds += time.perf_counter() - began
        before += tokens() - counted
        stage.note(seconds=seconds, tokens=before)
    return stage.finish(items=len(items), seconds=round(seconds, 3), tokens=before)


class RunFolder:
    """`runs/NAME`, held by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None

    def exists(self) -> bool:
        with clear_errors(self.path):  # a name that is too long, a folder that may not be looked into
            return (self.path / "config.yaml").exists()

    def has_work(self) -> bool:
        """Whether anything is finished that another configuration could call into question."""
        return self.exists() and any(p.parent.name != "0-judge" for p in self.path.rglob("part-*.jsonl"))

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
        """Create the folder and take its lock. Raises RunFolderError where another process holds it, or it cannot be written."""
        with clear_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "run.lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise RunFolderError(
                f"{self.path}: another process is working on this run", hint="wait for it, or give this run another name"
            ) from None
        except OSError as e:
            self.close()
            raise RunFolderError(
                f"{self.path}: cannot be locked: {e.strerror}", hint="choose a runs_dir whose file system has locks"
            ) from e

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def stage(self, where: str, inputs: Mapping[str, Any]) -> Stage:
        return Stage(self.path / where, inputs)


def versions() -> dict[str, str]:
    """Versions of what the results depend on; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for name in ("spalign", "torch", "transformers", "peft", "numpy", "openai"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
