"""Seconds in which `spalign what-if` answers for a run of 100,000 prompts with six responses each, beside the run's own two stages; and
seconds and peak memory of `spalign report`, `show` and `export` on the same run.

python benchmarks/what_if.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import preference_data
import yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="what-if-") as name:
        folder = Path(name)
        preference_data.write(folder, options.prompts)
        run = preference_data.measure(folder)
        lay_out(folder)
        command = [sys.executable, "-m", "spalign.cli", "what-if", str(folder), "--json"]
        times = []
        for _ in range(3):
            began = time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            times.append(round(time.perf_counter() - began, 2))
        commands = {"report": [], "show": ["p77"], "export": [str(folder / "out"), "--to", "parquet"]}
        others = {name: taken([name, str(folder), *more]) for name, more in commands.items()}
        found = json.loads(done.stdout)["the run"]
        assert (found["kept"], found["pairs"]) == (run["kept"], run["pairs"]), "what-if and the run do not agree"
    summary = {
        "prompts": options.prompts,
        "seconds": min(times),
        "all": times,
        "seconds_of_the_run": run["seconds"],
        "pairs": found["pairs"],
        **{name: {"seconds": seconds, "peak_gb": peak} for name, (seconds, peak) in others.items()},
    }
    print(json.dumps(summary) if options.json else summary)


def taken(words: list[str]) -> tuple[float, float]:
    """Seconds and peak memory (GB) of a command of spalign's."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "spalign.cli", *words], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, words
    return round(time.perf_counter() - began, 2), round(usage.ru_maxrss / 2**20, 2)


def lay_out(folder: Path) -> None:
    """What a run's folder has beside its stages, as far as what-if looks."""
    (folder / "iteration-1/1-sample").symlink_to(folder / "iteration-1/2-evaluate")  # the same groups with scores
    from spalign.config import config_from
    from spalign.constitution import load_constitution

    config = config_from({"name": "bench", "model": "none", "runs_dir": str(folder)})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.on_record()))
    (folder / "constitution.yaml").write_text(yaml.safe_dump(load_constitution("harmless_helpful").model_dump(mode="json")))


if __name__ == "__main__":
    main()
