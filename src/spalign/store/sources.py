"""What a stage's work was made from: rows that are others later leave it undone.

A part that was lost is made again, and engines need not repeat themselves. `made_from.json` has the SHA-256 of the parts that the work
beside it is made from; what does not hold any more is set aside by `Stage.begin`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from spalign.files import read_json, write_json
from spalign.store.parts import read_manifest

MADE_FROM = "made_from.json"


class Source(Protocol):
    """A stage that others are made from."""

    folder: Path
    digest: str


class Sources:
    """whole: stages that a stage is made from as a whole; over: one, part by part."""

    def __init__(self, whole: Sequence[Source], over: Source | None) -> None:
        self._named = {f"from {n}": stage for n, stage in enumerate(whole)} | ({"over": over} if over else {})

    def _now(self) -> dict[str, dict[str, str] | None]:
        return {name: _content(stage) for name, stage in self._named.items()}

    def changed(self, folder: Path) -> set[str] | None:
        """Parts of `over` that are others than when the work in `folder` was made from them; None: all of it was made from other rows.

        What is not known (a source that is not finished yet, work of an earlier version) is taken to be as it was.
        """
        then, changed = read_json(folder / MADE_FROM) or {}, set[str]()
        for name, now in self._now().items():
            before = then.get(name)
            if now is None or before is None or now == before:
                continue
            if name != "over" or not isinstance(before, dict):
                return None
            changed |= {part for part in now | before if now.get(part) != before.get(part)}
        return changed

    def record(self, folder: Path) -> None:
        """Note in `folder` what they are now. Raises RunFolderError."""
        if (now := self._now()) and now != read_json(folder / MADE_FROM):
            write_json(folder / MADE_FROM, now)


def _content(stage: Source) -> dict[str, str] | None:
    """What a stage gives to others: its parts' SHA-256, of one without parts its manifest's; None where it is not finished."""
    found = read_manifest(stage.folder)
    if not found or found["digest"] != stage.digest:
        return None
    return found["parts"] or {"manifest.json": hashlib.sha256((stage.folder / "manifest.json").read_bytes()).hexdigest()}
