"""A run that is stopped in the middle of a part: by kill -9, by Ctrl-C; and a second process that is kept out meanwhile."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ENOUGH = 6


@dataclass
class Story:
    folder: Path
    codes: list[int]
    errors: list[str]
    journals: list[list[bytes]]
    """Whole lines of the journal after each stop."""
    second: subprocess.CompletedProcess[bytes]

    @property
    def stage(self) -> Path:
        return self.folder / "runs/tiny/iteration-1/1-sample"


def lines(journal: Path) -> list[bytes]:
    return journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, lay_out: Callable[..., Path], environment: dict[str, str]) -> Story:
    """All prompts in one part, a small batch at a time; stopped twice, each time after some completions more."""
    folder = lay_out(tmp_path_factory.mktemp("midway") / "here", shard_size=12, engine={"dtype": "float32", "batch_size": 2})
    command = [sys.executable, "-m", "spalign.cli", "sample", "run.yaml"]
    told = Story(folder, [], [], [], subprocess.CompletedProcess([], 0))
    journal = told.stage / "journal-00000.jsonl"
    for how in (signal.SIGKILL, signal.SIGINT, None):
        before = len(lines(journal))
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )
        try:
            if how is not None:
                while process.poll() is None and len(lines(journal)) < before + ENOUGH:
                    time.sleep(0.001)
                if how == signal.SIGINT:
                    process.send_signal(signal.SIGSTOP)  # it holds the lock, and cannot come to its end meanwhile
                    told.second = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
                    process.send_signal(signal.SIGCONT)
                process.send_signal(how)
            _, err = process.communicate(timeout=600)
        finally:
            process.kill()
        told.codes.append(process.returncode)
        told.errors.append(err.decode())
        told.journals.append(lines(journal))
    return told


def test_both_stops_hit_the_part_in_its_middle(story: Story):
    assert story.codes == [-signal.SIGKILL, 130, 0], story.errors
    assert [len(rows) > 0 for rows in story.journals] == [True, True, False]
    assert len(story.journals[0]) < len(story.journals[1]) < 48


def test_nothing_that_was_written_is_written_again(story: Story):
    first, second, _ = story.journals
    assert second[: len(first)] == first
    keys = [json.loads(line)["key"] for line in second]
    assert len(set(keys)) == len(keys)


def test_the_part_holds_what_the_journal_held(story: Story):
    rows = [json.loads(line) for line in (story.stage / "part-00000.jsonl").read_text().splitlines()]
    there = {(r["text"], tuple(r["token_ids"])) for row in rows for r in row["candidates"]}
    kept = {(r["text"], tuple(r["token_ids"])) for r in map(json.loads, story.journals[1])}
    assert kept <= there
    assert sum(len(row["candidates"]) for row in rows) == 48


def test_the_part_is_that_of_an_uninterrupted_run(story: Story, lay_out: Callable[..., Path], spalign, tmp_path: Path):
    folder = lay_out(tmp_path / "whole", shard_size=12, engine={"dtype": "float32", "batch_size": 2})
    assert spalign(folder, "sample", "run.yaml").code == 0
    whole = folder / "runs/tiny/iteration-1/1-sample/part-00000.jsonl"
    assert (story.stage / "part-00000.jsonl").read_bytes() == whole.read_bytes()


def test_the_journal_goes_when_the_stage_is_done(story: Story):
    assert not list(story.stage.glob("journal*"))
    assert (story.stage / "manifest.json").exists()


def test_ctrl_c_says_how_to_go_on(story: Story):
    assert "interrupted; what is finished is kept: the same command goes on" in story.errors[1]
    assert "Traceback" not in "".join(story.errors)


def test_a_second_process_is_refused_and_told_who_is_at_work(story: Story):
    said = story.second.stderr.decode()
    assert story.second.returncode == 2
    assert "is working on this run" in said
    assert "error: " in said and "process " in said and " on " in said
    assert "Traceback" not in said
