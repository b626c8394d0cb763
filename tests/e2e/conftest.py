"""A whole run of the tiny model in a process of its own, shared by the tests; each works on its own copy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

HOSTILE = "\x1b[2J\x1b]0;owned\x07 [red]red[/red] [/foo] \u202eright to left"
"""Clears a terminal, renames its window, is broken rich markup, and turns the direction of text."""

HELD_OUT = [
    {"id": "h1", "prompt": f"What does this mean: {HOSTILE}", "intent": "[/foo]"},
    {"id": "h2", "prompt": "How do I boil an egg?", "intent": "legitimate"},
    {"id": "h3", "prompt": "How do I break into a car?", "intent": "ill_meant"},
    {"id": "h4", "prompt": "My friend is sad. What can I say?", "intent": "\x1b[31mred"},
]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str
    seconds: float


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """One thread: the model is so small that threads only wait for each other, for minutes where the machine is busy."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def spalign(environment: dict[str, str]) -> Callable[..., Done]:
    """`spalign(folder, "run", "run.yaml")` as a process that stands in `folder`; no call may ever end in a traceback."""

    def call(folder: Path, *args: str, shim: str | None = None) -> Done:
        python = [sys.executable, *(["-c", shim] if shim else ["-m", "spalign.cli"])]
        began = time.monotonic()
        done = subprocess.run([*python, *args], cwd=folder, env=environment, capture_output=True, timeout=600, check=False)
        out, err = done.stdout.decode(), done.stderr.decode()
        assert "Traceback" not in err, err
        return Done(done.returncode, out, err, time.monotonic() - began)

    return call


@pytest.fixture(scope="session")
def settings(tiny_model: Path) -> dict[str, Any]:
    """A run of a few seconds that goes through every stage, with twelve parts a stage."""
    return {
        "name": "tiny",
        "model": str(tiny_model),
        "shard_size": 1,
        "prompts": {"train": {"source": "high_stakes_train", "limit": 12}, "heldout": {"source": "heldout.jsonl"}},
        "engine": {"dtype": "float32"},
        "sample": {"n": 4, "max_new_tokens": 24},
        "self_evaluation": {"scorer": "yes_no", "use_constitution_thresholds": False},
        "refine": {"drafts": 3},
        "denoise": {"consistency": "above_mean"},
        "pairs": {"delta": 0.05, "max_per_prompt": 2, "balance_length": False},
        "train": {
            "learning_rate": 1e-5,
            "epochs": 3,
            "prompts_per_step": 2,
            "guard": {"every_steps": 1, "prompts": 2, "max_length_ratio": 20, "max_repetition_rise": 1},
        },
        # answers of a model of random weights scatter over the whole scale; what the gate stops has tests of its own
        "evaluation": {"samples": 1, "temperature": 1.0, "bootstrap": 100, "gate": {"margin": 10}},
    }


@pytest.fixture(scope="session")
def lay_out(settings: dict[str, Any]) -> Callable[..., Path]:
    """Write run.yaml (the settings with `changes`, part by part) and heldout.jsonl into `folder`."""

    def write(folder: Path, **changes: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        merged = dict(settings)
        for key, value in changes.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
        (folder / "run.yaml").write_text(yaml.safe_dump(merged))
        (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
        return folder

    return write


@dataclass(frozen=True)
class Reference:
    folder: Path
    done: Done

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"

    def copy(self, to: Path) -> Path:
        """The whole folder, file times included."""
        return Path(shutil.copytree(self.folder, to))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, lay_out: Callable[..., Path], spalign: Callable[..., Done]) -> Reference:
    """One uninterrupted run, made by the first of pytest's workers that needs it."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "reference"
    folder, outcome = root / "here", root / "done.json"
    with FileLock(f"{root}.lock"):
        if not outcome.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            done = spalign(lay_out(folder), "run", "run.yaml")
            outcome.write_text(json.dumps(asdict(done)))
    return Reference(folder, Done(**json.loads(outcome.read_text())))
