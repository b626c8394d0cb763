"""Killed anywhere, a run goes on: nothing that was finished is lost, done twice, or changed.

One run is interrupted six times, in each long stage, and must come to what the uninterrupted reference run came to.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass
class Session:
    """One process of the run: how it ended and what it found and left."""

    code: int
    err: str
    before: dict[Path, int]
    after: dict[Path, int] = field(default_factory=dict)


@dataclass
class Story:
    folder: Path
    sessions: dict[str, Session] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"


def finished_files(run: Path) -> dict[Path, int]:
    """Everything that counts as finished, with its time."""
    return {p: p.stat().st_mtime_ns for pattern in ("**/part-*.jsonl", "**/manifest.json") for p in run.glob(pattern)}


STAGES = {
    "sample": "iteration-1/1-sample/part-*.jsonl",
    "evaluate": "iteration-1/2-evaluate/part-*.jsonl",
    "refine": "iteration-1/3-refine/part-*.jsonl",
    "train": "iteration-1/6-train/checkpoints/checkpoint-*/trainer_state.json",
}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, lay_out: Callable[..., Path], environment: dict[str, str]) -> Story:
    told = Story(lay_out(tmp_path_factory.mktemp("killed") / "here"))

    def session(name: str, *flags: str, stage: str | None = None, how: signal.Signals = signal.SIGKILL) -> None:
        """Run; as soon as `stage` has something new on disk, end the process `how`."""
        before = finished_files(told.run)
        old = set(told.run.glob(STAGES[stage])) if stage else set()
        errors = told.folder / "stderr"
        with errors.open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "spalign.cli", "run", "run.yaml", *flags],
                cwd=told.folder,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=err,
                # a job in the background of a shell starts with Ctrl-C ignored, and its children with it
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            )
            try:
                while stage and process.poll() is None and set(told.run.glob(STAGES[stage])) <= old:
                    time.sleep(0.002)
                if stage:
                    process.send_signal(how)
                code = process.wait(timeout=600)
            finally:
                process.kill()
        told.sessions[name] = Session(code, errors.read_text(), before, finished_files(told.run))

    session("interrupted", stage="sample", how=signal.SIGINT)
    session("sample", stage="sample")  # without a flag: the configuration is the same
    # what a kill in the middle of a write leaves behind
    (told.run / "iteration-1/1-sample/part-00009.jsonl.tmp").write_bytes(b'{"prompt": {"id": "torn')
    (told.run / "summary.json.tmp").write_bytes(b"{")
    session("evaluate", "--resume", stage="evaluate")
    session("refine", "--resume", stage="refine")
    session("train", "--resume", stage="train")
    torn = told.run / "iteration-1/6-train/checkpoints/checkpoint-99"
    assert torn.parent.is_dir(), {name: (s.code, s.err, sorted(map(str, s.after))) for name, s in told.sessions.items()}
    torn.mkdir()
    (torn / "trainer_state.json").write_bytes(b"")  # opened, not written yet
    session("end", "--resume")
    return told


def test_ctrl_c_says_that_the_same_command_goes_on(story: Story):
    first = story.sessions["interrupted"]
    assert first.code == 130
    assert "interrupted" in first.err
    assert "goes on" in first.err
    assert "Traceback" not in first.err
    assert first.after


@pytest.mark.parametrize("stage", STAGES)
def test_the_kill_hit_the_stage(story: Story, stage: str):
    """Or the other tests would prove nothing: the stage had begun and was not done."""
    killed = story.sessions[stage]
    assert killed.code == -signal.SIGKILL
    folder = story.run / STAGES[stage].split("/part")[0].split("/checkpoints")[0]
    assert folder / "manifest.json" not in killed.after
    assert "Traceback" not in killed.err


def test_the_last_session_ends_well(story: Story):
    assert story.sessions["end"].code == 0, story.sessions["end"].err


def test_what_was_finished_is_never_written_again(story: Story):
    files = finished_files(story.run)
    for name, session in story.sessions.items():
        for path, written in session.after.items():
            assert files[path] == written, f"{path} of session '{name}' was written again"
    sizes = [len(s.after) for s in story.sessions.values()]
    assert sizes == sorted(sizes)
    assert sizes[0] >= 1


def test_pairs_are_those_of_an_uninterrupted_run(story: Story, reference):
    part = "iteration-1/5-pair/part-00000.jsonl"
    rows = [json.loads(line) for line in (story.run / part).read_text().splitlines()]
    assert rows
    assert (story.run / part).read_bytes() == (reference.run / part).read_bytes()
    assert len({r["id"] for r in rows}) == len(rows)


def test_every_part_is_that_of_an_uninterrupted_run(story: Story, reference):
    names = {str(p.relative_to(reference.run)) for p in reference.run.glob("**/part-*.jsonl")}
    assert {str(p.relative_to(story.run)) for p in story.run.glob("**/part-*.jsonl")} == names
    early = [n for n in names if "evaluation/after" not in n]
    assert all((story.run / n).read_bytes() == (reference.run / n).read_bytes() for n in early)


def test_training_resumed_comes_to_the_same_weights(story: Story, reference):
    import torch
    from safetensors.torch import load_file

    model = "iteration-1/6-train/model/model.safetensors"
    mine, theirs = load_file(story.run / model), load_file(reference.run / model)
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6, msg=name)
    facts, other = (json.loads((r / "summary.json").read_text())["iterations"][0]["training"] for r in (story.run, reference.run))
    assert facts["steps"] == other["steps"] == facts["steps_kept"]


def test_nothing_is_left_over(story: Story):
    assert not list(story.run.glob("**/checkpoints"))
    assert not [p for p in story.run.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    assert not list(story.run.glob("**/*.replaced-*"))
