"""Whose a run folder is: opened for this configuration, or refused with what differs; and what it says of how it was made."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import yaml

from spalign.config.run import what_counts
from spalign.errors import RunFolderError
from spalign.pipeline.context import Context
from spalign.store import RunFolder, write_atomic

Mode = Literal["auto", "resume", "fresh"]


def claim(run: Context, mode: Mode) -> None:
    """Open the folder under the rules of `mode`."""
    folder = run.folder
    if mode == "resume" and not folder.exists():
        raise RunFolderError(f"{folder.path}: no run to resume", hint="leave out --resume to start it")
    if mode == "fresh" and folder.path_exists():
        old = RunFolder(folder.path)
        old.open()  # not while another process works on it
        try:
            run.ui.line(f"set the old run aside as {old.set_aside()}")
            folder.open()
        finally:
            old.close()
        return
    if mode == "auto" and folder.has_work() and (changes := _changes(run)):
        listed = "\n".join(f"  {c}" for c in changes[:12])
        raise RunFolderError(
            f"{folder.path} holds a run with another configuration:\n{listed}",
            hint="--resume goes on and does again what depends on the change; --fresh sets the old run aside; or change the name",
        )
    folder.open()


def _changes(run: Context) -> list[str]:
    """Lines that differ between the folder's configuration and constitution and this run's."""
    changed: list[str] = []
    for name, value in _on_record(run).items():
        path = run.folder.path / name
        try:
            old = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
            raise RunFolderError(f"{path}: cannot be read: {e}", hint="use --fresh to set the folder aside") from e
        before, now = map(what_counts, (old, value)) if name == "config.yaml" else (old, value)
        lines = difflib.unified_diff(_flat(before), _flat(now), n=0, lineterm="")
        changed += [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return changed


def _flat(value: Any, at: str = "") -> list[str]:
    if isinstance(value, dict):
        return [line for k in sorted(value) for line in _flat(value[k], f"{at}.{k}" if at else k)]
    return [f"{at}: {value}"]


def _on_record(run: Context) -> dict[str, dict[str, Any]]:
    """What the folder says of how it was made."""
    return {"config.yaml": run.config.on_record(), "constitution.yaml": run.constitution.model_dump(mode="json")}


def write_config(run: Context) -> None:
    for name, value in _on_record(run).items():
        write_atomic(run.folder.path / name, yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode())
