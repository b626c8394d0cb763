"""`spalign run` over two workers of a Ray cluster: the data of a run on one engine, though a worker is killed; and what a stop leaves."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray", reason="needs Ray: pip install 'spalign[ray]'")

POOL = {"kind": "ray", "workers": 2, "worker_cpus": 1}
DATA = ("1-sample", "2-evaluate", "3-refine", "4-denoise", "5-pair")


@contextlib.contextmanager
def started(folder: Path, environment: dict[str, str], command: str) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "spalign.cli", command, "run.yaml"],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )
    try:
        yield process
    finally:  # also where the test fails
        everyone = family(process)
        process.kill()
        process.wait()
        for one in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    for child in family(process):
        with contextlib.suppress(psutil.Error):
            if "ray::MapWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def wait_for(what: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not what() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def kill_at_work(process: subprocess.Popen[bytes], stage: Path) -> bool:
    """Kill a worker at work. Both are stopped: two parts that are then in work are theirs. Ray names a process after what it does."""

    def in_work() -> set[str]:
        return {path.name for path in stage.glob("journal-*.jsonl")}

    while process.poll() is None and not (stage / "manifest.json").exists():
        both = workers(process)
        with contextlib.suppress(psutil.NoSuchProcess):
            for worker in both:
                worker.suspend()
            time.sleep(0.3)  # what was sent arrives
            stuck = in_work()
            time.sleep(0.3)
            busy = [worker for worker in both if worker.cmdline()[0].endswith(".submit")]
            caught = busy[:1] if len(both) == 2 == len(stuck & in_work()) else []
            for worker in both:
                worker.kill() if worker in caught else worker.resume()
            if caught:
                return True
        time.sleep(0.02)
    return False


def left_of(processes: list[psutil.Process]) -> list[str]:
    _, alive = psutil.wait_procs(processes, timeout=60)
    return [" ".join(p.cmdline())[:80] for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_run_that_lost_a_worker_has_the_data_of_a_run_on_one_engine(spalign, lay_out, reference, environment, tmp_path):
    lay_out(tmp_path, engine=POOL, train={"epochs": 1})
    stage = tmp_path / "runs/tiny/iteration-1/1-sample"
    with started(tmp_path, environment, "run") as process:
        wait_for(lambda: len(list(stage.glob("part-*.jsonl"))) >= 1, process)
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        assert kill_at_work(process, stage), "no worker was met with a part in hand"
        assert process.wait(400) == 0, (tmp_path / "stderr").read_text()
    for name in DATA:
        mine, theirs = (root / "runs/tiny/iteration-1" / name for root in (tmp_path, reference.folder))
        assert {p.name: p.read_bytes() for p in mine.glob("part-*.jsonl")} == {
            p.name: p.read_bytes() for p in theirs.glob("part-*.jsonl")
        }, name
        assert not list(mine.glob("journal*"))
    again = spalign(tmp_path, "run", "run.yaml")  # all is done: no cluster is started
    assert again.code == 0, again.err
    assert again.seconds < 60


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stop_leaves_no_process_and_the_run_goes_on_without_ray(how, spalign, lay_out, reference, environment, tmp_path):
    lay_out(tmp_path, engine=POOL)
    stage = tmp_path / "runs/tiny/iteration-1/1-sample"
    with started(tmp_path, environment, "sample") as process:
        wait_for(lambda: len(list(stage.glob("part-*.jsonl"))) >= 1, process)
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        everyone = family(process) if how == signal.SIGINT else workers(process)  # ray's own see after about a minute that they are alone
        assert len(workers(process)) == 2
        process.send_signal(how)
        code, err = process.wait(120), (tmp_path / "stderr").read_text()
        if how == signal.SIGINT:
            assert code == 130
            assert "interrupted; what is finished is kept: the same command goes on" in err
            assert "Traceback" not in err
        assert left_of(everyone) == []
    before = {p: p.stat().st_mtime_ns for p in stage.glob("part-*.jsonl")}
    assert 1 <= len(before) < 12
    lay_out(tmp_path)  # one engine, here
    assert spalign(tmp_path, "sample", "run.yaml", "--resume").code == 0
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())
    theirs = reference.run / "iteration-1/1-sample"
    assert {p.name: p.read_bytes() for p in stage.glob("part-*.jsonl")} == {p.name: p.read_bytes() for p in theirs.glob("part-*.jsonl")}
