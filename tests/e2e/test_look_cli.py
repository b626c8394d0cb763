"""`spalign show`, `compare`, `report` and `what-if` from outside, on a run whose prompts are hostile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.model
DRIVES = ("\x1b", "\x07", "\u202e")


@pytest.fixture
def folder(reference: Any, tmp_path: Path) -> Path:
    return Path(reference.copy(tmp_path / "copy"))


def test_show_a_run_and_a_prompt(spalign: Callable[..., Any], folder: Path) -> None:
    done = spalign(folder, "show", "runs/tiny")
    assert done.code == 0, done.err
    first = next(line for line in done.out.splitlines() if " pairs  " in line).split()[0]
    assert "prompts kept" in done.out
    one = spalign(folder, "show", "runs/tiny", first)
    assert one.code == 0, one.err
    assert "iteration 1" in one.out
    assert "harmlessness" in one.out
    held = spalign(folder, "show", "runs/tiny", "h1", "--whole")
    assert "before training, answer 1" in held.out
    assert "right to left" in held.out
    assert not any(c in held.out + one.out + done.out for c in DRIVES)
    wrong = spalign(folder, "show", "runs/tiny", "nobody")
    assert (wrong.code, "no prompt 'nobody'" in wrong.err) == (2, True)
    assert spalign(folder, "show", "runs").code == 2


def test_the_report_is_there_after_a_run_and_can_be_made_again(spalign: Callable[..., Any], folder: Path) -> None:
    page = folder / "runs/tiny/report.html"
    text = page.read_text()
    assert "Content-Security-Policy" in text
    assert not any(c in text for c in DRIVES)
    page.unlink()
    done = spalign(folder, "report", "runs/tiny")
    assert done.code == 0, done.err
    assert page.read_text() == text


def test_compare(spalign: Callable[..., Any], folder: Path) -> None:
    shutil.copytree(folder / "runs/tiny", folder / "runs/other")
    done = spalign(folder, "compare", "runs/tiny", "runs/other")
    assert done.code == 0, done.err
    assert "prompts" in done.out
    assert not any(c in done.out for c in DRIVES)
    (folder / "runs/other/summary.json").unlink()
    assert spalign(folder, "compare", "runs/tiny", "runs/other").code == 2


def test_what_if_and_what_it_writes(spalign: Callable[..., Any], folder: Path) -> None:
    funnel = json.loads((folder / "runs/tiny/iteration-1/5-pair/manifest.json").read_text())["funnel"]
    args = ("--set", "denoise.tau=null", "--set", "pairs.max_per_prompt=1", "--sweep", "pairs.delta=0.01,9")
    done = spalign(folder, "what-if", "runs/tiny", *args, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["the run"]["kept"], found["the run"]["pairs"]) == (funnel["kept"], funnel["pairs"])
    assert found["what if"]["kept"] >= funnel["kept"]
    assert "unstable" not in found["what if"]["dropped"]
    assert found["sweep"]["9"]["pairs"] < found["sweep"]["0.01"]["pairs"]
    assert spalign(folder, "what-if", "runs/tiny", *args).code == 0
    applied = spalign(folder, "what-if", "runs/tiny", *args[:4], "--apply")
    assert applied.code == 0, applied.err
    again = json.loads((folder / "runs/tiny/iteration-1/5-pair/manifest.json").read_text())["funnel"]
    assert (again["kept"], again["pairs"]) == (found["what if"]["kept"], found["what if"]["pairs"])
    refused = spalign(folder, "what-if", "runs/tiny", "--set", "sample.n=9")
    assert refused.code == 2
    assert "generates and scores nothing anew" in refused.err
