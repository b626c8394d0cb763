"""The way in: `spalign init`, `validate`, `export` from outside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.model


def test_init_writes_what_validate_takes(spalign: Callable[..., Any], tmp_path: Path) -> None:
    done = spalign(tmp_path, "init", "my run.yaml")
    assert done.code == 0, done.err
    ok = spalign(tmp_path, "validate", "my run.yaml")
    assert ok.code == 0, ok.err
    assert "ok: 300 training" in ok.out or "training and" in ok.out
    assert not (tmp_path / "runs").exists()
    again = spalign(tmp_path, "init", "my run.yaml")
    assert (again.code, "exists" in again.err) == (2, True)
    assert spalign(tmp_path, "init", "b.yaml", "--constitution", "kind").code == 2


def test_validate_tells_all_mistakes_at_once(spalign: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "name: x\nsample: {n: 1, tempreature: 1}\ntrain: {epochs: 0}\nprompts: {train: {source: gone.jsonl}}\n"
    )
    done = spalign(tmp_path, "validate", "run.yaml")
    assert done.code == 2
    for wrong in ("sample.n", "tempreature", "train.epochs"):
        assert wrong in done.err
    (tmp_path / "run.yaml").write_text("name: x\nprompts: {train: {source: gone.jsonl}}\n")
    assert "gone.jsonl" in spalign(tmp_path, "validate", "run.yaml").err
    (tmp_path / "run.yaml").write_text(
        "name: x\nmodel: ./nowhere\nprompts: {train: {source: gone.jsonl}, heldout: {source: lost.jsonl}}\n"
        "self_evaluation: {labelled: none.jsonl, judge: ./nobody}\n"
    )
    done = spalign(tmp_path, "validate", "run.yaml")
    assert done.code == 2
    for wrong in ("5 mistakes", "gone.jsonl", "lost.jsonl", "./nowhere", "none.jsonl", "./nobody"):
        assert wrong in done.err


def test_export_from_outside(spalign: Callable[..., Any], reference: Any, tmp_path: Path) -> None:
    done = spalign(tmp_path, "export", str(reference.run), "out", "--to", "axolotl")
    assert done.code == 0, done.err
    assert (tmp_path / "out/pairs.jsonl").exists()
    wrong = spalign(tmp_path, "export", "nowhere", "out2")
    assert (wrong.code, "no run" in wrong.err) == (2, True)
