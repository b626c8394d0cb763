"""A stage's parts and its manifest as they stand on disk: read, and held against the SHA-256 that they had when they were written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spalign.errors import RunFolderError
from spalign.files import MADE_AGAIN, decode_row, read_json


class Part(NamedTuple):
    """One part of a finished stage."""

    path: Path
    sha256: str

    def lines(self, *, checked: bool = False) -> list[bytes]:
        """Its rows as JSON. Raises RunFolderError where it is missing or not what the manifest says.

        checked: that it is what the manifest says was seen a moment ago.
        """
        remedy = f"remove it and {self.path.with_name('manifest.json')}: what is missing is done again"
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


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the stage in that folder, of whatever inputs, if it is done. Raises RunFolderError where it is damaged."""
    path = folder / "manifest.json"
    found: dict[str, Any] | None = read_json(path)
    kinds = {"digest": str, "inputs": dict, "parts": dict}
    if found is not None and (wrong := [k for k, kind in kinds.items() if not isinstance(found.get(k), kind)]):
        raise RunFolderError(f"{path}: damaged: no {wrong[0]}", hint=MADE_AGAIN)
    return found


def damaged(folder: Path, parts: Mapping[str, str]) -> str | None:
    """Which part is not what the manifest says, in words."""
    for name, sha256 in parts.items():
        try:
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
                return f"{name} changed since it was written"
        except OSError as e:
            return f"{name}: {e.strerror}"
    return None


def rows_in(data: bytes) -> int | None:
    """How many rows a part has; None where it is damaged."""
    *lines, rest = data.split(b"\n")
    try:
        return len(lines) if not rest and all(isinstance(decode_row(line), dict) for line in lines) else None
    except ValueError:
        return None
