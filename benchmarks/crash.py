"""kill -9 of a real `spalign run` at random moments, in every stage, and resume, until it is done; again and again.

    python benchmarks/crash.py --kills 20 --json

The model is real and tiny (tests/random_model.py). Every process also notes each completion once it was promised to be kept. Counted are
    lost       completions, parts and manifests that were finished when a process was killed and are not there when the next one starts
    repeated   completions written again, parts and manifests written again, although they were finished
    different  part files that differ from those of a run that nobody interrupted
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

# notes what the journal promised: a line when a completion is in it, one when a part has taken its place
SHIM = """
import os
from spalign.store.journal import Journal
notes = os.open(os.environ["CRASH_NOTES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
append, remove = Journal.append, Journal.remove
def noted_append(self, key, row):
    append(self, key, row)
    os.write(notes, f"{self.path}\\t{key}\\n".encode())
def noted_remove(self):
    remove(self)
    os.write(notes, f"{self.path}\\t\\n".encode())
Journal.append, Journal.remove = noted_append, noted_remove
from spalign.cli import main
main()
"""
SETTINGS = {
    "name": "tiny",
    "shard_size": 6,
    "prompts": {"train": {"source": "high_stakes_train", "limit": 24}, "heldout": {"source": "high_stakes_heldout", "limit": 6}},
    "engine": {"dtype": "float32", "batch_size": 4},
    "sample": {"n": 4, "max_new_tokens": 24},
    "self_evaluation": {"scorer": "yes_no", "use_constitution_thresholds": False},
    "denoise": {"consistency": "above_mean"},
    "pairs": {"delta": 0.05, "max_per_prompt": 2, "balance_length": False},
    "train": {
        "learning_rate": 1e-5,
        "epochs": 2,
        "prompts_per_step": 2,
        "guard": {"every_steps": 1, "prompts": 2, "max_length_ratio": 20, "max_repetition_rise": 1},
    },
    "evaluation": {"samples": 1, "temperature": 1.0, "bootstrap": 100, "gate": {"margin": 10}},
}
KILLS_A_RUN = 5
NOTE = 120
"""Bytes of a note, about."""
DERIVED = ("4-denoise", "5-pair")
"""Stages of seconds, which are done as a whole: their parts are finished with the stage."""


@dataclass
class Tally:
    kills: int = 0
    lost: int = 0
    repeated: int = 0
    different: int = 0
    stages: Counter[str] = field(default_factory=Counter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    here = Path(tempfile.mkdtemp(prefix="crash-"))
    try:
        config = prepare(here)
        seconds = uninterrupted(here, config)
        stages = stage_seconds(here / "reference/runs/tiny")
        print(f"uninterrupted: {seconds:.0f} s after the folder was opened, stages {stages}", flush=True)
        tally = Tally()
        while tally.kills < options.kills:
            one_run(here, config, seconds, stages, options.kills, rng, tally)
    finally:
        shutil.rmtree(here, ignore_errors=True)
    found = {
        "kills": tally.kills,
        "lost": tally.lost,
        "repeated": tally.repeated,
        "different": tally.different,
        "stages": dict(tally.stages),
    }
    print(json.dumps(found) if options.json else found)
    sys.exit(bool(tally.lost or tally.repeated or tally.different))


def prepare(here: Path) -> Path:
    """The configuration file, with a model beside it."""
    from random_model import make_tiny
    from spalign.engines.models import resolve

    os.environ["HF_HUB_OFFLINE"] = "1"
    model = make_tiny(Path(resolve("demo")), here / "model", head_dim=16)
    config = here / "run.yaml"
    config.write_text(json.dumps({**SETTINGS, "model": str(model)}))  # JSON is YAML
    return config


def start(folder: Path, config: Path, *flags: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CRASH_NOTES": str(folder / "notes")}
    command = [sys.executable, "-c", SHIM, "run", str(config), *flags]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=(folder / "stderr").open("ab"))


def wait_until_open(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Until the process holds the run's lock, or has ended."""
    lock = folder / "runs/tiny/run.lock"
    while process.poll() is None and not (lock.exists() and lock.read_text().startswith(f"process {process.pid} ")):
        time.sleep(0.02)


def uninterrupted(here: Path, config: Path) -> float:
    process = start(here / "reference", config)
    wait_until_open(process, here / "reference")
    began = time.monotonic()
    if process.wait() != 0:
        sys.exit((here / "reference/stderr").read_text())
    return time.monotonic() - began


def stage_seconds(run: Path) -> dict[str, float]:
    """How long each stage took."""
    return {str(m.parent.relative_to(run)): json.loads(m.read_text()).get("seconds", 0.5) for m in sorted(run.glob("**/manifest.json"))}


def one_run(here: Path, config: Path, seconds: float, stages: dict[str, float], kills: int, rng: random.Random, tally: Tally) -> None:
    """A run that is killed until it is done, or until there have been enough kills; then it is let go on to its end."""
    folder = here / "victim"
    shutil.rmtree(folder, ignore_errors=True)
    run, flags, finished, here_killed = folder / "runs/tiny", (), {}, 0
    while True:
        process = start(folder, config, *flags)
        wait_until_open(process, folder)
        flags = ("--resume",)
        left = {name: tally.stages[name] for name in stages if not (run / name / "manifest.json").exists()}
        if tally.kills == kills or here_killed == KILLS_A_RUN:
            code = process.wait()
        elif left and rng.random() < 0.5:
            rarest = min(left, key=lambda name: (left[name], rng.random()))
            code = kill_in_stage(process, run / rarest, stages[rarest], rng)
        else:
            code = kill_at_random(process, folder / "notes", seconds, rng)
        if code == 0:
            break
        if code != -signal.SIGKILL:
            sys.exit(f"the run ended with code {code}:\n{(folder / 'stderr').read_text()}")
        tally.kills += 1
        here_killed += 1
        stage = stage_at_work(run)
        tally.stages[stage] += 1
        lost = promised_and_gone(folder)
        lost += sum(not path.exists() for path in finished)
        tally.lost += lost
        tally.repeated += written_again(finished)
        finished = finished_files(run)
        print(f"kill {tally.kills} in {stage}: {lost} lost", flush=True)
    tally.lost += sum(not path.exists() for path in finished)
    tally.repeated += written_again(finished) + sum(n - 1 for n in Counter(completions(folder / "notes")).values())
    reference = here / "reference/runs/tiny"
    names = {p.relative_to(root) for root in (run, reference) for p in root.glob("**/part-*.jsonl")}
    differing = [n for n in sorted(names) if not same(run / n, reference / n)]
    tally.different += len(differing)
    print(f"done: {len(names)} parts compared, different: {[str(n) for n in differing]}", flush=True)


def kill_at_random(process: subprocess.Popen[bytes], notes: Path, seconds: float, rng: random.Random) -> int:
    """After some time or after some completions, so that short stages are hit as well as long ones; the exit code."""
    by_time = rng.random() < 0.5
    deadline = time.monotonic() + rng.uniform(0, 0.8 if by_time else 1) * seconds
    size = notes.stat().st_size if notes.exists() else 0
    enough = math.inf if by_time else size + rng.uniform(0, 150) * NOTE
    while process.poll() is None and time.monotonic() < deadline and not (notes.exists() and notes.stat().st_size > enough):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait()


def kill_in_stage(process: subprocess.Popen[bytes], stage: Path, seconds: float, rng: random.Random) -> int:
    """Some time after the stage has begun; the exit code."""
    while process.poll() is None and not stage.exists():
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, seconds))
    process.send_signal(signal.SIGKILL)
    return process.wait()


def same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.read_bytes() == b.read_bytes()


def completions(notes: Path) -> list[str]:
    """Stage and key of every completion that was promised to be kept."""
    return [line for line in whole_lines(notes) if not line.endswith("\t")]


def promised_and_gone(folder: Path) -> int:
    """How many completions were noted, and stand neither in the journal nor in a part."""
    waiting: dict[str, list[str]] = {}
    for line in whole_lines(folder / "notes"):
        journal, key = line.split("\t")
        waiting.setdefault(journal, []).append(key)
        if not key:
            del waiting[journal]
    gone = 0
    for journal, keys in waiting.items():
        path = folder / journal
        if not path.with_name(path.name.replace("journal", "part")).exists():  # it has just taken the journal's place
            there = {json.loads(line)["key"] for line in whole_lines(path)}
            gone += sum(key not in there for key in keys)
    return gone


def whole_lines(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1] if path.exists() else []


def finished_files(run: Path) -> dict[Path, int]:
    files = [p for pattern in ("**/part-*.jsonl", "**/manifest.json") for p in run.glob(pattern)]
    return {p: p.stat().st_mtime_ns for p in files if p.parent.name not in DERIVED or (p.parent / "manifest.json").exists()}


def written_again(finished: dict[Path, int]) -> int:
    return sum(path.exists() and path.stat().st_mtime_ns != at for path, at in finished.items())


def stage_at_work(run: Path) -> str:
    """The last stage that has begun and is not done."""
    begun = [p.parent for p in run.glob("**/progress.json") if not (p.parent / "manifest.json").exists()]
    return str(max(begun, key=lambda p: p.stat().st_mtime).relative_to(run)) if begun else "between"


if __name__ == "__main__":
    main()
