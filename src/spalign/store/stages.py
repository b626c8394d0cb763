"""Stages of part files with manifests.

A part is written to a temporary name, synced and renamed. A stage's `manifest.json` is written last: its presence means done. A stage
knows the digest of all that it depends on; done with the same digest, it is not run again; with another one, it is set aside, never
deleted. What is finished of a part in work stands in a journal of its own. Before a part is there, its SHA-256 is added to `parts.sha256`:
what goes on with the part later looks whether it still is what was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spalign.errors import RunFolderError
from spalign.files import (
    Row,
    clear_errors,
    decode_row,
    digest,
    encode_rows,
    link,
    read_json,
    write_atomic,
    write_json,
)
from spalign.store.journal import Journal
from spalign.store.parts import Part, damaged, read_manifest, rows_in
from spalign.store.sources import Sources

PART_BYTES = 1 << 25
SUMS = "parts.sha256"


class Stage:
    """One stage on disk.

    inputs: everything that its result depends on. made_from: stages whose rows it is made from, as a whole; over: one, part by part. tell:
    told where work of other inputs or rows is set aside.
    """

    def __init__(
        self,
        folder: Path,
        inputs: Mapping[str, Any],
        tell: Callable[[str], None] = lambda _: None,
        made_from: Sequence[Stage] = (),
        over: Stage | None = None,
    ) -> None:
        self.folder, self.inputs, self._tell, self._sources = folder, dict(inputs), tell, Sources(made_from, over)
        self.digest = digest(self.inputs)
        self.healed = 0
        """Torn lines of journals that this stage has had."""
        self._hashes: dict[str, str] = {}
        self._written: dict[str, set[str]] = {}
        """By part, what `parts.sha256` has of it: a part that was made again stands there twice."""
        self._journal = threading.local()

    @property
    def name(self) -> str:
        return self.folder.name

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, if the stage is done with these inputs, from the rows that now stand before it."""
        found = read_manifest(self.folder)
        return found if found and found["digest"] == self.digest and self._sources.changed(self.folder) == set() else None

    def begin(self) -> dict[str, Any]:
        """Make the folder ready; what an interrupted run left (`seconds`, `tokens`). Work of other inputs or rows is set aside."""
        progress = self._progress()
        if progress and progress["digest"] == self.digest:
            self._keep_what_holds()
            progress = self._progress()
        if progress is None or progress["digest"] != self.digest:
            self._set_aside("other inputs")
            with clear_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            progress = {"digest": self.digest, "seconds": 0.0, "tokens": 0}
            write_json(self.folder / "progress.json", progress)
        self._sources.record(self.folder)
        self.healed = progress.get("healed", 0)
        with clear_errors(self.folder), contextlib.suppress(FileNotFoundError):
            lines = (self.folder / SUMS).read_text("ascii", "replace").splitlines()
            for line in lines:
                if found := re.fullmatch(r"([0-9a-f]{64})  (part-\d+\.jsonl)", line):
                    self._written.setdefault(found[2], set()).add(found[1])
        return progress

    def _progress(self) -> dict[str, Any] | None:
        path = self.folder / "progress.json"
        new = json.dumps({"digest": self.digest, "seconds": 0, "tokens": 0})
        hint = (
            "it says what the parts beside it were made from: restore it; or, if configuration, model and prompts are what they were then, "
            f"write this into it: {new}; or move the folder away to have the stage done again"
        )
        try:
            found: dict[str, Any] | None = read_json(path)
        except RunFolderError as e:
            raise RunFolderError(e.message, hint=hint) from e
        kinds = {"digest": str, "seconds": int | float, "tokens": int}
        if found is not None and (wrong := [k for k, kind in kinds.items() if not isinstance(found.get(k), kind)]):
            raise RunFolderError(f"{path}: damaged: no {wrong[0]}", hint=hint)
        return found

    def _set_aside(self, why: str) -> None:
        """Where there is anything but what a kill left of a beginning."""
        with clear_errors(self.folder):
            if not self.folder.exists():
                return
            if not any(p.is_dir() or (p.stat().st_size and not p.name.startswith("progress.json")) for p in self.folder.iterdir()):
                return
            n = 1
            while (aside := self.folder.with_name(f"{self.folder.name}.replaced-{n}")).exists():
                n += 1
            self.folder.rename(aside)
        self._tell(f"{self.folder}: what is there was made from {why}; set aside as {aside.name}")

    def take_from(self, other: Path) -> bool:
        """Make another run's finished stage of the same inputs this one's, by links where the file system has them; False: it is none.

        A stage that holds folders (models) is none: what was trained stays where it is.
        """
        found = read_manifest(other)
        if not found or found["digest"] != self.digest or any(p.is_dir() for p in other.iterdir()):
            return False
        why = damaged(other, found["parts"]) or ("made from other rows" if self._sources.changed(other) != set() else None)
        if why:
            self._tell(f"{other}: not taken: {why}")
            return False
        self.begin()
        with clear_errors(self.folder):
            write_atomic(self.folder / SUMS, "".join(f"{sha}  {name}\n" for name, sha in found["parts"].items()).encode())
            for name in (*found["parts"], "manifest.json"):  # the manifest last: it says that all is there
                (self.folder / name).unlink(missing_ok=True)
                link(other / name, self.folder / name)
        return True

    def _keep_what_holds(self) -> None:
        """Set aside what was made from other rows than those that now stand before it: the parts, or the whole stage."""
        if (changed := self._sources.changed(self.folder)) is None:
            self._set_aside("other rows")
            return
        for name in sorted(changed):
            if (part := self.folder / name).exists():
                n = 1
                while (aside := part.with_name(f"replaced-{n}.{name}")).exists():
                    n += 1
                with clear_errors(part):
                    part.rename(aside)
                self._tell(f"{part}: made from other rows; set aside as {aside.name}")
        if changed:  # it is not done any more
            with clear_errors(self.folder):
                (self.folder / "manifest.json").unlink(missing_ok=True)

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

    def has_part(self, number: int, items: Callable[[], Sequence[Any]]) -> bool:
        """Whether the part of these items is there. Raises RunFolderError where it is not as it was written.

        One that does not stand in `parts.sha256` (which a machine that loses power may leave shorter) must have a row an item.
        """
        path = self.part(number)
        if not path.exists():
            return False
        with clear_errors(path):
            data = path.read_bytes()
        found, written = hashlib.sha256(data).hexdigest(), self._written.get(path.name)
        if not (found in written if written else rows_in(data) == len(items())):
            raise RunFolderError(
                f"{path}: damaged: it is not what was written", hint="restore it, or remove this file: this part alone is done again"
            )
        self._add_sum(path.name, found)
        return True

    def _add_sum(self, name: str, sha256: str) -> None:
        self._hashes[name] = sha256
        if sha256 in self._written.setdefault(name, set()):
            return
        path = self.folder / SUMS
        with clear_errors(path), path.open("ab") as f:
            f.write(f"{sha256}  {name}\n".encode())
        self._written[name].add(sha256)

    def write_part(self, number: int, rows: Iterable[object]) -> None:
        """A part, whole or not at all."""
        self.write_lines(number, encode_rows(rows))

    def write_lines(self, number: int, lines: bytes) -> None:
        """A part whose rows are encoded."""
        self._add_sum(self.part(number).name, hashlib.sha256(lines).hexdigest())  # before it is there: a kill may come between
        write_atomic(self.part(number), lines)

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
            for left in (*self.folder.glob("journal-*.jsonl"), *self.folder.glob("*.json*.tmp")):  # of a process that was killed
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


def versions() -> dict[str, str]:
    """Versions of what the results depend on; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for name in ("spalign", "torch", "transformers", "peft", "numpy", "openai", "vllm", "ray"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
