"""The journal: what `append` returned from survives any death of the process, and a torn line costs itself alone."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spalign.engines.base import Completion, GenerateRequest, Sampling
from spalign.errors import EngineError, RunFolderError
from spalign.pipeline.context import MeteredEngine, recorded
from spalign.store import Journal, Stage, run_in_parts
from spalign.store import journal as journal_module
from spalign.types import Message

KEYS = ("a", "b", "c")
TEXT = {"a": "plain", "b": "h\u00e9 \u2028 \x1b[2J \U0001f600", "c": "half a pair: \ud800"}


def fill(path: Path, *keys: str) -> None:
    journal = Journal(path)
    for key in keys:
        journal.append(key, {"text": TEXT[key], "token_ids": [1, 2]})
    journal.close()


def held(path: Path) -> tuple[dict[str, str], int]:
    """What a new process finds, and how many lines it had to heal."""
    journal = Journal(path)
    try:
        return {k: row["text"] for k in KEYS if (row := journal.get(k))}, journal.healed
    finally:
        journal.close()


def test_rows_come_back_in_another_process_whatever_their_text(tmp_path):
    fill(tmp_path / "j", *KEYS)
    assert held(tmp_path / "j") == (TEXT, 0)


def test_a_row_is_in_the_file_when_append_returns(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.append("a", {"n": 1})
    crc = b"%08x" % zlib.crc32(b'{"key":"a","n":1')
    assert (tmp_path / "j").read_bytes() == b'{"key":"a","n":1,"crc":"%s"}\n' % crc  # and so survives a kill -9
    journal.close()


def test_a_row_reaches_the_disk_within_seconds_without_another_one(tmp_path, monkeypatch):
    synced: list[float] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(time.monotonic()), real(fd))[1])
    monkeypatch.setattr(journal_module, "SYNC_SECONDS", 0.05)
    journal = Journal(tmp_path / "j")
    synced.clear()
    journal.append("a", {})
    deadline = time.monotonic() + 10
    while not synced and time.monotonic() < deadline:
        time.sleep(0.01)
    assert synced
    journal.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_line_torn_at_any_byte_loses_itself_alone(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("torn") / "j"
    fill(path, *KEYS)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 0x0A]
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    lines = sum(end <= cut for end in ends)
    torn = cut not in (0, *ends)
    assert held(path) == ({k: TEXT[k] for k in KEYS[:lines]}, int(torn))
    assert path.read_bytes() == whole[: ([0, *ends])[lines]]
    fill(path, *KEYS[lines:])  # what is appended next is whole
    assert held(path) == (TEXT, 0)


@settings(max_examples=60, deadline=None)
@given(junk=st.binary(min_size=1, max_size=40).filter(lambda b: b"\n" not in b and b"\r" not in b))
def test_garbage_between_lines_is_left_out_and_counted(tmp_path_factory, junk):
    path = tmp_path_factory.mktemp("garbage") / "j"
    fill(path, "a", "b")
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + junk + b"\n" + second)
    assert held(path) == ({k: TEXT[k] for k in "ab"}, 1)


@pytest.mark.parametrize(("old", "new"), [(b"plain", b"plein"), (b"[1,2]", b"[1,3]"), (b'"text"', b'"test"')])
def test_a_line_that_changed_is_left_out_and_counted(tmp_path, old, new):
    fill(tmp_path / "j", "a", "b")
    whole = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(whole.replace(old, new, 1))
    assert held(tmp_path / "j") == ({"b": TEXT["b"]}, 1)


def test_a_damaged_line_counts_once_however_often_the_journal_is_opened(tmp_path):
    for key in "abc":
        journal = Journal(tmp_path / "j")
        journal.append(key, {"text": key})
        journal.close()
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(data.replace(b'"text":"b"', b'"text":"B"'))
    healed = []
    for _ in range(3):
        journal = Journal(tmp_path / "j")
        journal.close()
        healed.append(journal.healed)
        assert [bool(journal.get(key)) for key in "abc"] == [True, False, True]
    assert healed == [1, 0, 0]
    assert (tmp_path / "j").read_bytes() == b"".join(line for line in data.splitlines(keepends=True) if b'"b"' not in line)


def test_lines_of_an_earlier_version_have_no_checksum_and_count(tmp_path):
    (tmp_path / "j").write_bytes(b'{"key":"a","text":"plain","token_ids":[1],"finished":true}\n')
    fill(tmp_path / "j", "b")
    assert held(tmp_path / "j") == ({k: TEXT[k] for k in "ab"}, 0)


def test_remove_takes_the_file_away(tmp_path):
    fill(tmp_path / "j", "a")
    journal = Journal(tmp_path / "j")
    journal.remove()
    journal.close()
    assert held(tmp_path / "j") == ({}, 0)


def test_a_failed_sync_is_told_at_the_next_row_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "SYNC_SECONDS", 0.01)
    journal = Journal(tmp_path / "j")

    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", broken)
        journal.append("a", {})
        deadline = time.monotonic() + 10
        while journal._failed is None and time.monotonic() < deadline:
            time.sleep(0.01)
    for action in (lambda: journal.append("b", {}), journal.close):
        with pytest.raises(RunFolderError, match="Input/output error"):
            action()


@pytest.fixture
def limit() -> Iterator[Any]:
    """Files of this process cannot grow beyond so many bytes: a write that fails in the kernel, after it has taken what fits."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_without_room_keeps_every_row_before(tmp_path, limit):
    path = tmp_path / "j"
    journal = Journal(path)
    journal.append("a", {"text": TEXT["a"]})
    whole = path.read_bytes()
    limit(len(whole) + 20)
    with pytest.raises(RunFolderError, match=rf"{path}: File too large\n  fix: "):
        journal.append("b", {"text": "x" * 100})
    assert path.read_bytes() == whole  # the 20 bytes that had fitted are gone again
    limit(1 << 20)
    journal.append("b", {"text": TEXT["b"]})  # space was made
    journal.close()
    assert held(path) == ({k: TEXT[k] for k in "ab"}, 0)


def test_a_journal_where_none_can_be_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"file/j: Not a directory\n  fix: "):
        Journal(tmp_path / "file/j")
    (tmp_path / "j").mkdir()
    with pytest.raises(RunFolderError, match=r"j: Is a directory\n  fix: "):
        Journal(tmp_path / "j")


# a stage with its journal


class Counting:
    """An engine whose completion is its seed; it can die after some."""

    name = "counting"
    capabilities = frozenset({"generate"})

    def __init__(self, dies_after: int | None = None) -> None:
        self.asked: list[int] = []
        self.dies_after = dies_after

    def generate(self, requests):
        for r in requests:
            for i, seed in enumerate(r.seeds):
                if len(self.asked) == self.dies_after:
                    raise KeyboardInterrupt
                self.asked.append(seed)
                yield Completion(r.id, i, f"{r.messages[0].content} {seed}", (seed, 0), True)


def request(name: str, *seeds: int, words: str = "hello", temperature: float = 1.0) -> GenerateRequest:
    return GenerateRequest(name, (Message("user", words),), seeds, Sampling(temperature, 1.0, 9))


def test_what_the_journal_holds_is_not_generated_again_and_keeps_its_place(tmp_path):
    requests = [request("x", 1, 2, 3), request("y", 2, 4, words="bye")]
    whole = {(c.request_id, c.index): c for c in Counting().generate(requests)}
    for dies in range(6):
        path = tmp_path / f"j{dies}"
        first, second = Counting(dies), Counting()
        journal = Journal(path)
        try:
            list(recorded(first, "m", requests, journal))
        except KeyboardInterrupt:
            assert dies < 5
        journal.close()
        journal = Journal(path)
        got = list(recorded(second, "m", requests, journal))
        journal.close()
        assert first.asked + second.asked == [1, 2, 3, 2, 4]
        assert {(c.request_id, c.index): c for c in got} == whole


@pytest.mark.parametrize(
    ("model", "other"),
    [
        ("m2", request("x", 1)),
        ("m", request("x", 2)),
        ("m", request("x", 1, words="other")),
        ("m", request("x", 1, temperature=0.5)),
    ],
)
def test_a_completion_of_another_model_seed_prompt_or_sampling_is_another(tmp_path, model, other):
    journal = Journal(tmp_path / "j")
    list(recorded(Counting(), "m", [request("x", 1)], journal))
    journal.close()
    journal = Journal(tmp_path / "j")
    again, new = Counting(), Counting()
    list(recorded(again, "m", [request("another id", 1)], journal))
    list(recorded(new, model, [other], journal))
    journal.close()
    assert (again.asked, len(new.asked)) == ([], 1)


@pytest.mark.parametrize(
    "bad",
    [
        {"text": None, "token_ids": [1], "finished": True},
        {"text": "a", "token_ids": [None], "finished": True},
        {"text": "a", "token_ids": [1], "finished": 1},
        {"text": "a", "finished": True},
    ],
)
def test_a_row_that_is_no_completion_is_asked_for_again_and_counted(tmp_path, bad):
    journal = Journal(tmp_path / "j")
    list(recorded(Counting(), "m", [request("x", 1, 2)], journal))
    journal.close()
    key = json.loads((tmp_path / "j").read_bytes().splitlines()[0])["key"]
    journal = Journal(tmp_path / "j")
    journal.append(key, bad)
    journal.close()
    for asked in ([1], []):  # the line that was asked for again is the one that counts
        engine, journal = Counting(), Journal(tmp_path / "j")
        got = list(recorded(engine, "m", [request("x", 1, 2)], journal))
        journal.close()
        assert (engine.asked, journal.healed) == (asked, len(asked))
        assert sorted(c.text for c in got) == ["hello 1", "hello 2"]


def work_with(engine: Any, stage: Stage, items: list[int]) -> dict[str, Any]:
    metered = MeteredEngine(engine, "m", stage)

    def work(shard):
        return [{"text": c.text} for c in metered.generate([request(str(i), i) for i in shard])]

    return run_in_parts(stage, items, 3, work, crew=metered)


def test_an_interrupted_part_goes_on_in_its_middle(tmp_path):
    def stage() -> Stage:
        return Stage(tmp_path / "1-sample", {"seed": 0})

    first, second = Counting(dies_after=5), Counting()
    with pytest.raises(KeyboardInterrupt):
        work_with(first, stage(), list(range(8)))
    path = tmp_path / "1-sample/journal-00001.jsonl"
    assert len(path.read_bytes().splitlines()) == 2  # 3 and 4; 0, 1 and 2 stand in a part
    with path.open("ab") as f:
        f.write(b'{"key":"torn')
    manifest = work_with(second, stage(), list(range(8)))
    assert (first.asked, second.asked) == ([0, 1, 2, 3, 4], [5, 6, 7])
    assert [r["text"] for r in stage().rows()] == [f"hello {i}" for i in range(8)]
    assert (manifest["items"], manifest["tokens"], manifest["healed_lines"]) == (8, 16, 1)
    assert not list(path.parent.glob("journal*"))


class Pooled(Counting):
    """Two calls at a time, each of which waits for the other; the n-th seed asked for fails, and what was stopped fails soon."""

    width = 2

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.both, self.stopped, self.fails_at = threading.Barrier(2), threading.Event(), fails_at

    def generate(self, requests):
        for completion in super().generate(requests):
            if self.stopped.is_set():
                raise EngineError("closed")
            if not self.stopped.is_set() and self.fails_at is None:
                self.both.wait(10)  # passes only where two parts are at work
            if completion.token_ids[0] == self.fails_at:
                raise EngineError("the first of all errors")
            yield completion

    def close(self) -> None:
        self.stopped.set()


def test_parts_are_done_side_by_side_by_an_engine_of_several_workers(tmp_path):
    alone, stage = Stage(tmp_path / "alone", {}), Stage(tmp_path / "pool", {})
    told = [work_with(engine, s, list(range(12))) for engine, s in ((Counting(), alone), (Pooled(), stage))]
    assert [t["tokens"] for t in told] == [24, 24]
    for a, b in zip(alone.parts(), stage.parts(), strict=True):
        assert (a.name, a.read_bytes()) == (b.name, b.read_bytes())
    assert not list(stage.folder.glob("journal*"))


def test_the_first_error_stops_the_others_and_what_they_had_is_kept(tmp_path):
    first, second = Pooled(fails_at=7), Counting()
    with pytest.raises(EngineError, match="the first of all errors"):
        work_with(first, Stage(tmp_path / "s", {}), list(range(30)))
    assert first.stopped.is_set()
    work_with(second, Stage(tmp_path / "s", {}), list(range(30)))
    twice = set(first.asked) & set(second.asked)
    assert 7 in twice
    assert len(twice) <= 2  # what each of the two had in hand
    assert [r["text"] for r in Stage(tmp_path / "s", {}).rows()] == [f"hello {i}" for i in range(30)]


def test_a_healed_line_is_counted_over_sessions(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            work_with(Counting(dies_after=0), Stage(tmp_path / "s", {}), [1])
        with (tmp_path / "s/journal-00000.jsonl").open("ab") as f:
            f.write(b"torn")
    assert work_with(Counting(), Stage(tmp_path / "s", {}), [1])["healed_lines"] == 2


def test_kill_9_keeps_all_that_was_appended(tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from spalign.store import Journal
journal = Journal(Path({str(tmp_path / "j")!r}))
for key in "abc":
    journal.append(key, {{"text": key}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert held(tmp_path / "j") == ({k: k for k in KEYS}, 0)
