"""The run folder: atomic parts, manifests last, nothing deleted, one process at a time, and every disk error with a fix."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spalign.errors import RunFolderError
from spalign.files import move_folder
from spalign.store import (
    RunFolder,
    Stage,
    clear_errors,
    decode_row,
    digest,
    link,
    read_json,
    read_manifest,
    run_in_parts,
    run_over_parts,
    versions,
    write_atomic,
    write_json,
)
from spalign.store.work import Alone

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


def stage_at(folder: Path, **inputs: object) -> Stage:
    return Stage(folder / "1-sample", inputs or {"seed": 0})


def double(items):
    return [{"n": 2 * i} for i in items]


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own at `folder`, where the machine permits it."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


# digest


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(), JSON, min_size=2))
def test_digest_does_not_depend_on_the_order_of_keys(value):
    assert digest(value) == digest(dict(reversed(value.items())))


def test_digest_depends_on_every_value_and_on_the_order_of_lists():
    values = [{"a": [1, 2]}, {"a": [2, 1]}, {"a": [1, 2], "b": None}, {"a": ["1", 2]}, {"b": [1, 2]}]
    assert len({digest(v) for v in values}) == len(values)


def test_digest_is_sha256_of_the_sorted_json():
    # stable from version to version, or every run would start anew
    assert digest({"b": 1, "a": "é"}) == hashlib.sha256('{"a": "é", "b": 1}'.encode()).hexdigest()


def test_digest_takes_half_a_surrogate_pair():
    assert digest({"text": "\ud800"}) != digest({"text": "\ud801"})


# files


def test_write_atomic_replaces_the_whole_file_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, b"a longer text")
    write_atomic(path, b"short")
    assert path.read_bytes() == b"short"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"a\.json: No space left on device\n  fix: free some space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_data_is_synced_before_the_name_appears(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.json", []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(path.exists()), real(fd))[1])
    write_atomic(path, b"x")
    assert seen == [False, True]  # the file under its temporary name, then the folder that holds the new one


def test_json_survives_a_round_trip(tmp_path):
    value = {"text": "é \u2028 \ud800 \x1b", "n": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_bytes().decode("utf-8", "surrogatepass")
    assert json.loads(text) == value


def test_read_json_of_no_file_is_none(tmp_path):
    assert read_json(tmp_path / "no.json") is None


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe", b"[1, 2]", b"3"])
def test_a_damaged_json_file_is_named_with_a_fix(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"manifest\.json: cannot be read.*\n  fix: restore it, or remove this file alone"):
        read_json(path)


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "choose another runs_dir"),
        (errno.EROFS, "read-only; choose another runs_dir"),
        (errno.EACCES, "mend its permissions"),
        (errno.EPERM, "mend its permissions"),
        (errno.EIO, "check the folder"),
    ],
)
def test_every_disk_error_says_where_and_what_to_do(code, fix):
    with pytest.raises(RunFolderError) as e, clear_errors(Path("runs/x")):
        raise OSError(code, os.strerror(code))
    assert e.value.message == f"runs/x: {os.strerror(code)}"
    assert fix in e.value.hint


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("from safetensors.torch import save_file; save = lambda: save_file({'a': torch.zeros(9999)}, 'a')", "File too large"),
        (
            "save = lambda: torch.save({'a': torch.zeros(9999)}, 'a')",
            "cannot be written; is the disk full, or a quota or size limit reached?",
        ),
        (
            "from tokenizers import Tokenizer, models; t = Tokenizer(models.WordLevel({'x' * n: n for n in range(999)}, '')); "
            "save = lambda: t.save('a')",
            "File too large",
        ),
    ],
    ids=["safetensors", "torch", "tokenizers"],
)
def test_what_the_writers_of_models_raise_says_what_to_do(tmp_path, program, said):
    limits = "resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    told = f"""
import resource, signal, torch
from pathlib import Path
from spalign.errors import RunFolderError
from spalign.store import clear_errors
{program}
{limits}
try:
    with clear_errors(Path("stage")):
        save()
except RunFolderError as e:
    assert e.hint
    print(e.message)
"""
    done = subprocess.run([sys.executable, "-c", told], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"stage: {said}\n"


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ValueError("iostream error"), Exception("no number"), RunFolderError("a b")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as e, clear_errors(Path("x")):
        raise error
    assert e.value is error


def test_where_there_are_no_links_a_copy_is_whole_or_not_there(tmp_path, monkeypatch):
    from spalign import files

    def other_disk(self, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", other_disk)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"text")

    def full(file, place):
        place.write_bytes(b"")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m, pytest.raises(RunFolderError, match="b: No space left on device"):
        m.setattr(files.shutil, "copy2", full)
        link(source, target)
    assert list(tmp_path.iterdir()) == [source]
    link(source, target)
    assert target.read_bytes() == b"text"
    assert sorted(tmp_path.iterdir()) == [source, target]


def test_an_error_without_a_number_is_not_a_disk_error():
    with pytest.raises(OSError, match="from a library"), clear_errors(Path("x")):
        raise OSError("from a library")


# stages


def test_a_stage_is_done_when_its_manifest_is_there(tmp_path):
    stage = stage_at(tmp_path)
    assert stage.manifest() is None
    manifest = run_in_parts(stage, [1, 2, 3], 2, double)
    assert stage.manifest() == manifest
    assert manifest["items"] == 3
    assert manifest["inputs"] == {"seed": 0}
    assert manifest["versions"] == versions()
    assert list(stage.rows()) == [{"n": 2}, {"n": 4}, {"n": 6}]
    assert [p.name for p in stage.parts()] == ["part-00000.jsonl", "part-00001.jsonl"]


def test_the_manifest_names_every_part_with_its_sha256(tmp_path):
    stage = stage_at(tmp_path)
    manifest = run_in_parts(stage, [1], 1, double)
    assert manifest["parts"] == {"part-00000.jsonl": hashlib.sha256(b'{"n":2}\n').hexdigest()}


def test_the_manifest_is_written_last(tmp_path, monkeypatch):
    written = []
    from spalign import files
    from spalign.store import stages

    real = write_atomic
    for module in (files, stages):
        monkeypatch.setattr(module, "write_atomic", lambda path, data: (written.append(path.name), real(path, data))[1])
    run_in_parts(stage_at(tmp_path), [1, 2], 1, double)
    assert written[-1] == "manifest.json"
    assert written.count("manifest.json") == 1
    assert written[:2] == ["progress.json", "part-00000.jsonl"]


def test_a_done_stage_is_not_done_again(tmp_path):
    first = run_in_parts(stage_at(tmp_path), [1, 2], 1, double)
    assert run_in_parts(stage_at(tmp_path), [1, 2], 1, lambda _: pytest.fail("worked again")) == first


def test_an_interrupted_stage_does_only_what_is_missing(tmp_path):
    asked = []

    def until_three(items):
        asked.extend(items)
        if 3 in items:
            raise KeyboardInterrupt
        return double(items)

    with pytest.raises(KeyboardInterrupt):
        run_in_parts(stage_at(tmp_path), [1, 2, 3, 4, 5], 1, until_three)
    assert stage_at(tmp_path).manifest() is None
    (tmp_path / "1-sample/part-00003.jsonl.tmp").write_text('{"n": 8')  # torn
    done = []
    manifest = run_in_parts(stage_at(tmp_path), [1, 2, 3, 4, 5], 1, lambda items: (done.extend(items), double(items))[1])
    assert (asked, done) == ([1, 2, 3], [3, 4, 5])
    assert list(stage_at(tmp_path).rows()) == [{"n": n} for n in (2, 4, 6, 8, 10)]
    assert len(manifest["parts"]) == 5


def test_a_part_in_the_middle_that_went_missing_is_done_again_alone(tmp_path):
    stage = stage_at(tmp_path)
    run_in_parts(stage, list(range(6)), 2, double)
    stage.part(1).unlink()
    (stage.folder / "manifest.json").unlink()
    done = []
    run_in_parts(stage, list(range(6)), 2, lambda items: (done.append(list(items)), double(items))[1])
    assert done == [[2, 3]]


def test_seconds_and_tokens_add_up_over_sessions(tmp_path):
    class Counting(Alone):
        tokens = 0

    crew = Counting()

    def work(items):
        crew.tokens += 10
        if 3 in items:
            raise KeyboardInterrupt
        return double(items)

    with pytest.raises(KeyboardInterrupt):
        run_in_parts(stage_at(tmp_path), [1, 2, 3], 1, work, crew=crew)
    assert stage_at(tmp_path).begin()["tokens"] == 20  # two finished parts; the third counts when it is done again
    crew = Counting()

    def rest(items):
        crew.tokens += 7
        return double(items)

    assert run_in_parts(stage_at(tmp_path), [1, 2, 3], 1, rest, crew=crew)["tokens"] == 27


def test_work_of_other_inputs_is_set_aside_never_deleted(tmp_path):
    for seed in (0, 1, 2):
        run_in_parts(stage_at(tmp_path, seed=seed), [seed], 1, double)
    kept = {p.name: json.loads((p / "part-00000.jsonl").read_text())["n"] for p in tmp_path.iterdir()}
    assert kept == {"1-sample.replaced-1": 0, "1-sample.replaced-2": 2, "1-sample": 4}
    assert stage_at(tmp_path, seed=0).manifest() is None
    assert stage_at(tmp_path, seed=2).manifest() is not None


def test_an_unfinished_stage_of_other_inputs_is_set_aside_too(tmp_path):
    old = stage_at(tmp_path, seed=0)
    old.begin()
    old.write_part(0, [{"n": 1}])
    run_in_parts(stage_at(tmp_path, seed=1), [1, 2], 1, double)
    assert (tmp_path / "1-sample.replaced-1/part-00000.jsonl").exists()
    assert list(stage_at(tmp_path, seed=1).rows()) == [{"n": 2}, {"n": 4}]


def test_a_folder_that_is_no_stage_is_set_aside(tmp_path):
    folder = tmp_path / "1-sample"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    run_in_parts(stage_at(tmp_path), [1], 1, double)
    assert (tmp_path / "1-sample.replaced-1/notes.txt").read_text() == "mine"


def killed_after(folder: Path, parts: int) -> Stage:
    """A stage of three parts of two rows, of which so many are done."""

    def work(items):
        if items[0] == 2 * parts:
            raise KeyboardInterrupt
        return double(items)

    with pytest.raises(KeyboardInterrupt):
        run_in_parts(stage_at(folder), list(range(6)), 2, work)
    return stage_at(folder)


DAMAGES = {
    "a digit": lambda data: data.replace(b"2", b"3"),
    "a row less": lambda data: data.split(b"\n")[0] + b"\n",
    "cut": lambda data: data[:-3],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_part_that_changed_before_the_stage_is_done_is_named_and_done_again_alone(tmp_path, damage):
    part = killed_after(tmp_path, 2).part(0)
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(RunFolderError, match=rf"{part}: damaged: .*\n  fix: restore it, or remove this file: this part alone"):
        run_in_parts(stage_at(tmp_path), list(range(6)), 2, double)
    part.unlink()
    done = []
    run_in_parts(stage_at(tmp_path), list(range(6)), 2, lambda items: (done.append(list(items)), double(items))[1])
    assert done == [[0, 1], [4, 5]]
    assert [r["n"] for r in stage_at(tmp_path).rows()] == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("left", [b"", b"0123", None])
def test_a_part_of_which_no_sum_was_kept_counts_where_it_is_whole(tmp_path, left):
    """What a kill between the two leaves, a torn line, a run of an earlier version."""
    stage = killed_after(tmp_path, 1)
    sums = stage.folder / "parts.sha256"
    whole = sums.read_bytes()
    if left is None:
        sums.unlink()
    else:
        sums.write_bytes(left)
    killed_after(tmp_path, 1)
    assert sums.read_bytes() == (left or b"") + whole
    for name, damage in DAMAGES.items():
        if name != "a digit":
            sums.unlink()
            whole_part = stage.part(0).read_bytes()
            stage.part(0).write_bytes(damage(whole_part))
            with pytest.raises(RunFolderError, match="damaged"):
                run_in_parts(stage_at(tmp_path), list(range(6)), 2, double)
            stage.part(0).write_bytes(whole_part)
            killed_after(tmp_path, 1)
    assert run_in_parts(stage_at(tmp_path), list(range(6)), 2, double)["items"] == 6


@pytest.mark.parametrize("content", ["", "{}", '{"digest": "a', '{"digest": 1, "seconds": 0, "tokens": 0}'])
def test_damaged_progress_costs_no_part(tmp_path, content):
    stage = killed_after(tmp_path, 2)
    (stage.folder / "progress.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"progress\.json: .*\n  fix: .*restore it") as e:
        run_in_parts(stage_at(tmp_path), list(range(6)), 2, double)
    (stage.folder / "progress.json").write_text(json.dumps(json.loads(e.value.hint[e.value.hint.index("{") : e.value.hint.index("}") + 1])))
    done = []
    run_in_parts(stage_at(tmp_path), list(range(6)), 2, lambda items: (done.append(list(items)), double(items))[1])
    assert done == [[4, 5]]


@pytest.mark.parametrize("left", [None, "progress.json.tmp", "progress.json", "journal-00000.jsonl"])
def test_what_a_kill_leaves_of_a_beginning_is_not_set_aside(tmp_path, left):
    old = stage_at(tmp_path, seed=0)
    old.folder.mkdir()
    if left == "progress.json":
        old.begin()
    elif left:
        (old.folder / left).touch()
    run_in_parts(stage_at(tmp_path, seed=1), [1], 1, double)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["1-sample", "manifest.json", "part-00000.jsonl", "parts.sha256", "progress.json"]


def test_what_is_set_aside_is_told(tmp_path):
    said = []
    folder = RunFolder(tmp_path)
    folder.tell = said.append
    for seed in (0, 1):
        run_in_parts(folder.stage("1-sample", {"seed": seed}), [1], 1, double)
    assert said == [f"{tmp_path}/1-sample: what is there was made from other inputs; set aside as 1-sample.replaced-1"]


@pytest.mark.parametrize("content", ["{}", '{"digest": 1}', '{"digest": "a", "inputs": {}, "parts": []}'])
def test_a_manifest_that_lacks_something_is_refused_by_name_and_made_again_from_the_parts(tmp_path, content):
    stage = stage_at(tmp_path)
    first = run_in_parts(stage, [1, 2], 1, double)
    path = stage.folder / "manifest.json"
    path.write_text(content)
    for ask in (stage.manifest, lambda: list(stage.rows()), lambda: read_manifest(stage.folder)):
        with pytest.raises(RunFolderError, match=r"manifest\.json: damaged: no .*\n  fix: .*remove this file alone"):
            ask()
    path.unlink()
    again = run_in_parts(stage_at(tmp_path), [1, 2], 1, lambda _: pytest.fail("worked again"))
    assert again["parts"] == first["parts"]


def test_rows_of_an_unfinished_stage_are_refused(tmp_path):
    stage = stage_at(tmp_path)
    stage.begin()
    stage.write_part(0, [{"n": 1}])
    with pytest.raises(RunFolderError, match=r"1-sample: not finished\n  fix: run the stage first"):
        list(stage.rows())


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_or_missing_part_is_refused_by_name(tmp_path, damage):
    stage = stage_at(tmp_path)
    run_in_parts(stage, [1, 2, 3], 1, double)
    part = stage.part(1)
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-3] if damage == "cut" else b'{"n": 5}\n')
    with pytest.raises(RunFolderError, match=r"part-00001\.jsonl: .*\n  fix: .*remove .*1-sample") as e:
        list(stage.rows())
    assert ("No such file" in e.value.message) == (damage == "missing")


@settings(max_examples=20, deadline=None)  # every example is synced to the disk several times
@given(st.text())
def test_any_text_survives_a_part(tmp_path_factory, text):
    stage = stage_at(tmp_path_factory.mktemp("stage"))
    run_in_parts(stage, [text], 1, lambda items: [{"text": t} for t in items])
    assert list(stage.rows()) == [{"text": text}]


# the folder


def test_a_journal_that_holds_something_is_work(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "config.yaml").touch()
    journal = tmp_path / "iteration-1/1-sample/journal-00000.jsonl"
    journal.parent.mkdir(parents=True)
    journal.touch()
    assert not folder.has_work()
    journal.write_text("{}")
    assert folder.has_work()


def test_a_second_process_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open()
    try:
        assert _open_elsewhere(tmp_path / "run") == f"process {os.getpid()} on {socket.gethostname()} is working on this run"
    finally:
        folder.close()
    assert _open_elsewhere(tmp_path / "run") == "opened"


def test_a_killed_process_leaves_no_lock(tmp_path):
    program = (
        f"import os; from pathlib import Path; from spalign.store import RunFolder; RunFolder(Path({str(tmp_path)!r})).open(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert (tmp_path / "run.lock").exists()
    folder = RunFolder(tmp_path)
    folder.open()
    folder.close()


def _open_elsewhere(path: Path) -> str:
    program = f"""
from pathlib import Path
from spalign.store import RunFolder
from spalign.errors import RunFolderError
try:
    RunFolder(Path({str(path)!r})).open()
    print("opened")
except RunFolderError as e:
    assert e.hint
    print(e.message.split(": ", 1)[1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_forked_child_does_not_hold_the_lock_when_its_parent_is_dead(tmp_path):
    program = f"""
import os, sys, time
from pathlib import Path
from spalign.store import RunFolder
folder = RunFolder(Path({str(tmp_path)!r}))
folder.open()
if os.fork() == 0:
    time.sleep(60)
print("forked", flush=True)
os._exit(9)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert parent.wait(timeout=60) == 9
        assert _open_elsewhere(tmp_path) == "opened"
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.stdout.close()


def test_who_held_the_lock_before_is_not_named(tmp_path):
    (tmp_path / "run.lock").write_text("process 1 on a machine with a long name")
    folder = RunFolder(tmp_path)
    folder.open()
    assert (tmp_path / "run.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    folder.close()


def test_a_hostile_lock_file_cannot_drive_the_terminal(tmp_path):
    first = RunFolder(tmp_path)
    first.open()
    (tmp_path / "run.lock").write_bytes(b"\x1b[2J\xff" * 200)
    with pytest.raises(RunFolderError) as e:
        RunFolder(tmp_path).open()
    assert "\x1b" not in str(e.value)
    assert len(str(e.value)) < 1000
    first.close()


def test_parts_are_in_order_beyond_five_digits(tmp_path):
    stage = stage_at(tmp_path)
    stage.begin()
    for number in (100_000, 99_999, 0):
        stage.write_part(number, [{"n": number}])
    stage.finish()
    assert [r["n"] for r in stage.rows()] == [0, 99_999, 100_000]


def test_over_parts_one_part_comes_from_one_part(tmp_path):
    source, stage = stage_at(tmp_path), Stage(tmp_path / "2", {"from": 1})
    run_in_parts(source, [1, 2, 3, 4, 5], 2, double)
    seen = []

    def work(items):
        seen.append(list(items))
        if 10 in items:
            raise KeyboardInterrupt
        return [{"n": n} for n in items]

    def read(line):
        return decode_row(line)["n"]

    with pytest.raises(KeyboardInterrupt):
        run_over_parts(stage, source, read, work)
    again = []
    manifest = run_over_parts(stage, source, read, lambda items: (again.append(list(items)), [{"n": n} for n in items])[1])
    assert (seen, again) == ([[2, 4], [6, 8], [10]], [[10]])
    assert manifest["items"] == 5
    assert list(stage.rows()) == list(source.rows())


def test_a_full_disk_keeps_the_journal_to_its_last_whole_line(tmp_path):
    with mounted(tmp_path / "small", "size=64k") as disk:

        def fill(stage):
            stage.begin()
            with stage.recording(0) as journal:
                for n in range(100):
                    if journal.get(str(n)) is None:
                        journal.append(str(n), {"text": "x" * 3000})
                return len(journal._rows)

        with pytest.raises(RunFolderError, match=r"journal-00000\.jsonl: No space left on device\n  fix: free some space"):
            fill(stage_at(disk))
        rows = [json.loads(line) for line in (disk / "1-sample/journal-00000.jsonl").read_bytes().splitlines()]
        assert 10 <= len(rows) <= 21
        assert [r["key"] for r in rows] == [str(n) for n in range(len(rows))]
        subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
        stage = stage_at(disk)
        assert fill(stage) == len(rows)
        assert stage.healed == 0


def test_set_aside_keeps_every_old_run(tmp_path):
    for text in ("first", "second"):
        folder = RunFolder(tmp_path / "run")
        folder.open()
        (folder.path / "config.yaml").write_text(text)
        folder.close()
        folder.set_aside()
    assert {p.name: (p / "config.yaml").read_text() for p in tmp_path.iterdir()} == {"run.old-1": "first", "run.old-2": "second"}


def test_a_run_exists_when_its_configuration_does(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert not folder.exists()
    folder.open()
    assert not folder.exists()
    write_json(folder.path / "config.yaml", {})
    assert folder.exists()
    folder.close()


@pytest.mark.parametrize("place", ["/proc/spalign-test", "/sys/spalign-test"])
def test_a_folder_that_cannot_be_made_says_so(place):
    with pytest.raises(RunFolderError, match=rf"{place}/run: .*\n  fix: .*choose another runs_dir"):
        RunFolder(Path(place) / "run").open()


def test_a_name_that_is_too_long_says_so(tmp_path):
    folder = RunFolder(tmp_path / ("x" * 300))
    for ask in (folder.exists, folder.path_exists, folder.open):
        with pytest.raises(RunFolderError, match=r"File name too long\n  fix: .*choose another runs_dir"):
            ask()


def test_a_file_in_the_place_of_the_folder_says_so(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunFolderError, match="fix: check the folder; choose another runs_dir"):
        RunFolder(tmp_path / "runs" / "x").open()


def test_a_full_disk_loses_nothing_that_is_finished(tmp_path):
    with mounted(tmp_path / "small", "size=256k") as disk:
        stage = stage_at(disk)

        def work(items):
            return [{"n": i, "text": "x" * 50_000} for i in items]

        with pytest.raises(RunFolderError, match=r"part-0000\d\.jsonl: No space left on device\n  fix: free some space"):
            run_in_parts(stage, list(range(8)), 1, work)
        finished = [p.name for p in stage.parts()]
        assert 3 <= len(finished) <= 5  # 256 KiB hold five parts of 50 kB at most
        assert all(json.loads(p.read_text())["n"] == i for i, p in enumerate(stage.parts()))
        assert not list(stage.folder.glob("*.tmp"))
        assert stage.manifest() is None
        subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
        done = []
        run_in_parts(stage, list(range(8)), 1, lambda items: (done.extend(items), work(items))[1])
        assert done == list(range(len(finished), 8))
        assert [row["n"] for row in stage.rows()] == list(range(8))


def test_a_read_only_disk_says_so(tmp_path):
    with mounted(tmp_path / "disk", "size=1m") as disk:
        run_in_parts(stage_at(disk, seed=0), [1], 1, double)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert list(stage_at(disk, seed=0).rows()) == [{"n": 2}]  # reading goes on
        with pytest.raises(RunFolderError, match=r"Read-only file system\n  fix: the file system is read-only"):
            run_in_parts(stage_at(disk, seed=1), [1], 1, double)
        with pytest.raises(RunFolderError, match="Read-only file system"):
            RunFolder(disk / "run").open()
        assert (disk / "1-sample/manifest.json").exists()


def test_a_finished_stage_of_the_same_inputs_is_taken_from_another_run(tmp_path: Path) -> None:
    theirs, mine = Stage(tmp_path / "a/1", {"n": 1}), Stage(tmp_path / "b/1", {"n": 1})
    assert not mine.take_from(tmp_path / "a/1")  # nothing there
    theirs.begin()
    theirs.write_part(0, [{"x": 1}])
    assert not mine.take_from(tmp_path / "a/1")  # not finished
    theirs.finish(items=1)
    assert not Stage(tmp_path / "b/1", {"n": 2}).take_from(tmp_path / "a/1")  # of other inputs
    assert mine.take_from(tmp_path / "a/1")
    assert list(mine.rows()) == [{"x": 1}]
    mine.write_part(0, [{"x": 2}])  # a new file under the name: theirs stays
    assert list(theirs.rows()) == [{"x": 1}]
    assert len((tmp_path / "a/1/parts.sha256").read_text().splitlines()) == 1
    taken = Stage(tmp_path / "d/1", {"n": 1})
    assert taken.take_from(tmp_path / "a/1")
    (tmp_path / "d/1/manifest.json").unlink()  # as what is damaged is mended
    with (tmp_path / "d/1/part-00000.jsonl").open("r+b") as f:
        f.write(b'{"x":7}')  # one file under both names
    with pytest.raises(RunFolderError, match="damaged: it is not what was written"):
        run_in_parts(Stage(tmp_path / "d/1", {"n": 1}), [1], 1, double)
    said: list[str] = []
    assert not Stage(tmp_path / "e/1", {"n": 1}, said.append).take_from(tmp_path / "a/1")
    assert said == [f"{tmp_path}/a/1: not taken: part-00000.jsonl changed since it was written"]
    (tmp_path / "a/1/model").mkdir()
    assert not Stage(tmp_path / "c/1", {"n": 1}).take_from(tmp_path / "a/1")  # what was trained stays where it is


def made_again(stage: Stage, name: str, work: Any) -> None:
    """As a damaged part is: it and the manifest are removed, and the stage is done again."""
    for left in (name, "manifest.json"):
        (stage.folder / left).unlink()
    run_in_parts(stage, [1, 2, 3], 1, work)


@pytest.mark.parametrize("killed", [False, True])
def test_of_what_was_made_from_rows_that_are_others_now_that_part_alone_is_done_again(tmp_path: Path, killed: bool) -> None:
    source, said, seen = stage_at(tmp_path), list[str](), list[int]()

    def over() -> Stage:
        return Stage(tmp_path / "2-evaluate", {"from": source.digest}, said.append, over=source)

    def work(items: Any) -> Any:
        if killed and len(seen) == 2:
            seen.append(0)
            raise KeyboardInterrupt
        seen.extend(i["n"] for i in items)
        return list(items)

    run_in_parts(source, [1, 2, 3], 1, double)
    with pytest.raises(KeyboardInterrupt) if killed else contextlib.nullcontext():
        run_over_parts(over(), source, decode_row, work)
    seen.clear()
    made_again(source, "part-00001.jsonl", double)  # as it was: nothing to do again
    assert (over().manifest() is None) == killed
    made_again(source, "part-00001.jsonl", lambda items: [{"n": 100 + i} for i in items])
    assert over().manifest() is None
    assert not Stage(tmp_path / "other", {"from": source.digest}, over=source).take_from(tmp_path / "2-evaluate")
    again = over()
    again.begin()
    assert over().manifest() is None  # also between the beginning and the end
    run_over_parts(again, source, decode_row, work)
    assert seen == ([102, 6] if killed else [102])
    assert [r["n"] for r in over().rows()] == [2, 102, 6]
    aside = tmp_path / "2-evaluate/replaced-1.part-00001.jsonl"
    assert aside.read_bytes() == b'{"n":4}\n'
    assert said == [f"{tmp_path}/2-evaluate/part-00001.jsonl: made from other rows; set aside as {aside.name}"]


@pytest.mark.parametrize("done", [False, True])
def test_what_was_made_of_all_rows_is_set_aside_as_a_whole(tmp_path: Path, done: bool) -> None:
    source, said = stage_at(tmp_path), list[str]()

    def whole() -> Stage:
        return Stage(tmp_path / "6-train", {"from": source.digest}, said.append, [source])

    run_in_parts(source, [1, 2, 3], 1, double)
    stage = whole()
    stage.begin()
    (stage.folder / "model").mkdir()
    if done:
        stage.finish()
        assert whole().manifest() is not None
    after = Stage(tmp_path / "after", {}, made_from=[whole()])
    run_in_parts(after, [1], 1, double)
    made_again(source, "part-00001.jsonl", lambda items: [{"n": 100 + i} for i in items])
    stage = whole()
    assert stage.manifest() is None
    stage.begin()
    assert not (stage.folder / "model").exists()
    assert (tmp_path / "6-train.replaced-1/model").is_dir()
    assert said == [f"{tmp_path}/6-train: what is there was made from other rows; set aside as 6-train.replaced-1"]
    stage.finish(steps=9)
    assert (after.manifest() is None) == done  # of a stage without parts, what its manifest says


def test_a_part_made_again_counts_though_a_kill_came_before_its_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_at(tmp_path)
    stage.begin()
    stage.write_part(0, [{"n": 1}])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("spalign.store.stages.write_atomic", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        stage.write_part(0, [{"n": 2}])
    for n in (1, 2):  # the old one is still there, or the new one is
        stage.part(0).write_bytes(b'{"n":%d}\n' % n)
        again = stage_at(tmp_path)
        again.begin()
        assert again.has_part(0, lambda: [0])
        assert again.finish(items=1)["parts"] == {"part-00000.jsonl": hashlib.sha256(b'{"n":%d}\n' % n).hexdigest()}
        (stage.folder / "manifest.json").unlink()


def test_a_folder_has_its_new_name_when_all_in_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = tmp_path / "model.tmp"
    (half / "more").mkdir(parents=True)
    for name in ("weights", "more/config"):
        (half / name).write_text("x")
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda f: (synced.append(str(Path(f"/proc/self/fd/{f}").readlink())), real(f))[1])
    move_folder(half, tmp_path / "model")
    assert sorted(synced[:-1]) == sorted(str(half / name) for name in (".", "more", "weights", "more/config"))
    assert synced[-1] == str(tmp_path)
    assert (tmp_path / "model/more/config").read_text() == "x"
