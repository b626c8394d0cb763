"""Stages of part files with manifests.

A part is written to a temporary name, synced and renamed. A stage's `manifest.json` is written last: its presence means done. A stage
knows the digest of all that it depends on; done with the same digest, it is not run again; with another one, it is set aside, never
deleted. What is finished of a part in work stands in a journal of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from spalign.errors import RunFolderError
from spalign.store.files import Row, clear_errors, decode_row, digest, encode_rows, link, read_json, write_atomic, write_json
from spalign.store.journal import Journal

Item = TypeVar("Item")
PART_BYTES = 1 << 25


class Part(NamedTuple):
    """One part of a finished stage."""

    path: Path
    sha256: str

    def lines(self, *, checked: bool = False) -> list[bytes]:
        """Its rows as JSON. Raises RunFolderError where it is missing or not what the manifest says.

        checked: that it is what the manifest says was seen a moment ago.
        """
        remedy = f"remove {self.path.parent} to have the stage done again"
        try:
            data = self.path.read_bytes()
        except OSError as e:
            raise RunFolderError(f"{self.path}: {e.strerror}", hint=remedy) from e
        if not checked and hashlib.sha256(data).hexdigest() != self.sha256:
            raise RunFolderError(f"{self.path}: changed since it was written", hint=f"restore it, or {remedy}")
        lines = data.split(b"\n")  # several times as fast as splitlines
        if not lines[-1]:
            lines.pop()
        return lines


class Stage:
    """One stage on disk. `inputs` is everything that its result depends on."""

    def __init__(self, folder: Path, inputs: Mapping[str, Any]) -> None:
        self.folder, self.inputs = folder, dict(inputs)
        self.digest = digest(self.inputs)
        self.healed = 0
        """Torn lines of journals that this stage has had."""
        self._hashes: dict[str, str] = {}
        self._journal = threading.local()

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
        self.healed = progress.get("healed", 0)
        return dict(progress)

    def _set_aside(self) -> None:
        n = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.replaced-{n}")).exists():
            n += 1
        with clear_errors(self.folder):
            self.folder.rename(aside)

    def take_from(self, other: Path) -> bool:
        """Make another run's finished stage of the same inputs this one's, by links where the file system has them; False: it is none.

        A stage that holds folders (models) is none: what was trained stays where it is.
        """
        found = read_json(other / "manifest.json")
        if not found or found.get("digest") != self.digest or any(p.is_dir() for p in other.iterdir()):
            return False
        self.begin()
        with clear_errors(self.folder):
            for path in sorted(other.iterdir(), key=lambda p: p.name == "manifest.json"):  # the manifest last: it says that all is there
                if path.name in {p.name for p in self.folder.iterdir()}:
                    (self.folder / path.name).unlink()
                link(path, self.folder / path.name)
        return True

    @contextlib.contextmanager
    def recording(self, number: int) -> Iterator[Journal]:
        """The journal of a part, open and this thread's `journal`; it goes when the part is written."""
        journal = self._journal.of_thread = Journal(self.folder / f"journal-{number:05d}.jsonl")
        try:
            yield journal
        finally:
            self._journal.of_thread = None
            journal.close()
        if self.part(number).exists():
            journal.remove()

    @property
    def journal(self) -> Journal | None:
        """Of completions that stand in no part yet, while this thread is `recording`."""
        return getattr(self._journal, "of_thread", None)

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.jsonl"), key=lambda p: (len(p.name), p.name))

    def part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.jsonl"

    def write_part(self, number: int, rows: Iterable[object]) -> None:
        """A part, whole or not at all."""
        self.write_lines(number, encode_rows(rows))

    def write_lines(self, number: int, lines: bytes) -> None:
        """A part whose rows are encoded."""
        write_atomic(self.part(number), lines)
        self._hashes[self.part(number).name] = hashlib.sha256(lines).hexdigest()

    def write_stream(self, chunks: Iterable[bytes]) -> None:
        """All parts of the stage anew, from encoded rows; a part is closed with the chunk that makes it PART_BYTES long."""
        number, gathered = 0, bytearray()
        for chunk in chunks:
            gathered += chunk
            if len(gathered) >= PART_BYTES:
                self.write_lines(number, bytes(gathered))
                number, gathered = number + 1, bytearray()
        if gathered or number == 0:
            self.write_lines(number, bytes(gathered))
            number += 1
        for left in self.parts()[number:]:  # of an attempt that was interrupted
            left.unlink()

    def note(self, *, seconds: float, tokens: int) -> None:
        facts = {"digest": self.digest, "seconds": seconds, "tokens": tokens, **({"healed": self.healed} if self.healed else {})}
        write_json(self.folder / "progress.json", facts)

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Write the manifest: the stage is done."""
        parts = {p.name: self._hashes.get(p.name) or hashlib.sha256(p.read_bytes()).hexdigest() for p in self.parts()}
        manifest = {"digest": self.digest, "inputs": self.inputs, "parts": parts, "versions": versions(), **facts}
        write_json(self.folder / "manifest.json", manifest)
        with clear_errors(self.folder):
            for left in self.folder.glob("journal-*.jsonl"):  # of a process that was killed between a part and this
                left.unlink()
        return manifest

    def finished_parts(self) -> list[Part]:
        """The parts, in order. Raises RunFolderError where the stage is not finished."""
        manifest = self.manifest()
        if manifest is None:
            raise RunFolderError(f"{self.folder}: not finished", hint="run the stage first: spalign run CONFIG --resume")
        return [Part(self.folder / name, sha) for name, sha in manifest["parts"].items()]

    def rows(self) -> Iterator[Row]:
        """The rows of a finished stage. Raises RunFolderError where a part is missing or not what the manifest says."""
        for part in self.finished_parts():
            yield from map(decode_row, part.lines())


class Crew(Protocol):
    """Who does the parts: so many at the same time, each in a thread of its own."""

    @property
    def width(self) -> int: ...

    @property
    def tokens(self) -> int:
        """Generated so far by the calling thread."""
        ...

    def stop(self) -> None:
        """Have what is under way in other threads fail soon."""
        ...


class Alone:
    """One part at a time, and nothing generated."""

    width, tokens = 1, 0

    def stop(self) -> None:
        pass


def run_in_parts(
    stage: Stage, items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], list[Row]], *, crew: Crew | None = None
) -> dict[str, Any]:
    """Do `work` on `items`, `size` at a time, one part file each; parts that are on disk are not done again. Returns the manifest."""

    def shard(start: int) -> Sequence[Item]:
        return items[start : start + size]

    return _run(stage, [partial(shard, start) for start in range(0, len(items), size)], len(items), work, crew or Alone())


def run_over_parts(
    stage: Stage,
    source: Stage,
    read: Callable[[bytes], Item],
    work: Callable[[Sequence[Item]], list[Row]],
    *,
    crew: Crew | None = None,
) -> dict[str, Any]:
    """As `run_in_parts` for the rows of a finished stage: part by part, one of which a thread has in memory."""

    def items(part: Part) -> list[Item]:
        return [read(line) for line in part.lines()]

    parts = source.finished_parts()
    return _run(stage, [partial(items, part) for part in parts], (source.manifest() or {})["items"], work, crew or Alone())


def _run(
    stage: Stage,
    shards: Sequence[Callable[[], Sequence[Item]]],
    count: int,
    work: Callable[[Sequence[Item]], list[Row]],
    crew: Crew,
) -> dict[str, Any]:
    if (done := stage.manifest()) is not None:
        return done
    progress = stage.begin()
    began, before, tokens = time.perf_counter(), progress["seconds"], progress["tokens"]
    lock = threading.Lock()

    def note(new_tokens: int = 0, healed: int = 0) -> None:
        nonlocal tokens
        with lock:
            tokens += new_tokens
            stage.healed += healed
            stage.note(seconds=before + time.perf_counter() - began, tokens=tokens)

    def do(number: int) -> None:
        counted = crew.tokens
        with stage.recording(number) as journal:
            if journal.healed:
                note(healed=journal.healed)
            stage.write_part(number, work(shards[number]()))
        note(crew.tokens - counted)

    _abreast(do, [n for n in range(len(shards)) if not stage.part(n).exists()], crew)
    healed = {"healed_lines": stage.healed} if stage.healed else {}
    return stage.finish(items=count, seconds=round(before + time.perf_counter() - began, 3), tokens=tokens, **healed)


def _abreast(do: Callable[[int], None], numbers: Sequence[int], crew: Crew) -> None:
    """`do` every number. After an error or an interruption the crew is stopped; it is raised when no thread works any more."""
    if crew.width < 2:
        for n in numbers:
            do(n)
        return
    waiting, running = iter(numbers), set[Future[None]]()
    with ThreadPoolExecutor(crew.width, thread_name_prefix="part") as threads:
        try:
            while True:
                running |= {threads.submit(do, n) for n in islice(waiting, crew.width - len(running))}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        except BaseException:
            crew.stop()
            raise


def versions() -> dict[str, str]:
    """Versions of what the results depend on; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for name in ("spalign", "torch", "transformers", "peft", "numpy", "openai", "vllm", "ray"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
