"""Seconds and memory of 4-denoise and 5-pair for up to a million prompts with six responses each: five candidates and a refined one.

    python benchmarks/preference_data.py --json
    python benchmarks/preference_data.py --sizes 10000 100000

Synthetic groups are written to shards as 2-evaluate and 3-refine write them (about 5 KB a prompt: answers of 40 words and 55 tokens, scores
that rarely tie); then the run's own steps go over them, each size in a process of its own. What the machine has in its page cache when they
begin is what a run would find there: the shards just written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARD = 1000
CANDIDATES = 5
WORDS = ("a safe", "answer,", "please", "call a doctor", "for help", "with it", "or ask", "someone near you", "who knows", "how")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where to write the shards; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    found = {}
    for size in options.sizes:
        folder = Path(tempfile.mkdtemp(prefix="preference-data-", dir=options.folder))
        try:
            began = time.perf_counter()
            written = write(folder, size)
            print(f"{size:,} prompts: {written / 1e9:.2f} GB written in {time.perf_counter() - began:.0f} s", flush=True)
            command = [sys.executable, __file__, "--measure", str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[size] = json.loads(done.stdout.splitlines()[-1])
            print(f"{size:,} prompts: {found[size]}", flush=True)
        finally:
            shutil.rmtree(folder)
    low, high = min(found), max(found)
    growth = math.log(found[high]["cpu_seconds"] / found[low]["cpu_seconds"]) / math.log(high / low) if high > low else None
    summary = {
        "seconds_1m": found.get(1_000_000, {}).get("seconds"),
        "peak_gb": found[high]["peak_gb"],
        "exponent": growth,  # of processor seconds: a second core that only large runs use does not flatter it
        "sizes": {str(size): result for size, result in found.items()},
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(summary) if options.json else f"exponent from {low:,} to {high:,}: {growth}")


def write(folder: Path, prompts: int) -> int:
    """The two stages that denoising reads, finished; bytes written."""
    scored, refined = stages(folder)
    rng = random.Random(0)
    bodies = [body(rng) for _ in range(5000)]
    names = [o.name for o in objectives()]
    written = 0
    for stage in (scored, refined):
        stage.begin()

    def response(name: str) -> str:
        scores = ",".join(f'"{n}":{rng.betavariate(2, 2) * 10!r}' for n in names)
        spreads = ",".join(f'"{n}":0.25' for n in names)
        return f'{{"id":"{name}",{rng.choice(bodies)},"finished":true,"system":"plain","scores":{{{scores}}},"spreads":{{{spreads}}}}}'

    tokens = json.dumps([rng.randrange(49_000) for _ in range(40)], separators=(",", ":"))
    for number, start in enumerate(range(0, prompts, SHARD)):
        groups, drafts = [], []
        for i in range(start, min(start + SHARD, prompts)):
            asked = f'[{{"role":"user","content":"How do I do what {i} wants, without harm?"}}]'
            prompt = f'{{"id":"p{i}","messages":{asked},"topic":"","intent":""}}'
            answers = ",".join(response(f"p{i}/1-candidate-{k}") for k in range(CANDIDATES))
            groups.append(f'{{"prompt":{prompt},"prompt_ids":{tokens},"candidates":[{answers}],"refined":null,"placebo":null}}\n')
            drafts.append(f'{{"prompt_id":"p{i}","refined":[{response(f"p{i}/refined-0")}],"placebo":[]}}\n')
        for stage, lines in ((scored, groups), (refined, drafts)):
            data = "".join(lines).encode()
            stage.write_lines(number, data)
            written += len(data)
    for stage in (scored, refined):
        stage.finish(items=prompts)
    return written


def body(rng: random.Random) -> str:
    text = " ".join(rng.choices(WORDS, k=25))
    return f'"text":"{text}","token_ids":{json.dumps([rng.randrange(49_000) for _ in range(55)], separators=(",", ":"))}'


def objectives():
    from spalign.constitution import load_constitution

    return tuple(
        o.model_copy(update={"threshold": t}) for o, t in zip(load_constitution("harmless_helpful").objectives, (6.3, None), strict=True)
    )


def stages(folder: Path):
    from spalign.store import RunFolder

    run = RunFolder(folder)
    scored = run.stage("iteration-1/2-evaluate", {"shard_size": SHARD})
    return scored, run.stage("iteration-1/3-refine", {"from": scored.digest})


def measure(folder: Path) -> dict[str, float]:
    """The run's own 4-denoise and 5-pair under the default recipe."""
    from spalign.config import config_from
    from spalign.constitution import load_constitution
    from spalign.pipeline.context import Context, Policy
    from spalign.pipeline.judging import Judging
    from spalign.pipeline.pairing import denoise_step, pair_step
    from spalign.pipeline.workers import cores
    from spalign.report import Progress
    from spalign.selfeval import Judgement
    from spalign.store import RunFolder

    def no_model(_: str):
        raise AssertionError("nothing here needs a model")

    config = config_from({"name": "bench", "model": "none", "runs_dir": str(folder)})
    run = Context(config, load_constitution("harmless_helpful"), RunFolder(folder), Progress(quiet=True), [], [], no_model, no_model)
    policy = Policy("none", "none", no_model)
    judging = Judging(policy, objectives(), {o.name: Judgement.unchecked("yes_no") for o in objectives()})
    scored, refined = stages(folder)
    denoised = denoise_step(run, "iteration-1", judging, config, scored, refined)
    paired = pair_step(run, "iteration-1", policy, judging, config, scored, refined, denoised.stage)
    began = time.perf_counter()
    denoised.do()
    between = time.perf_counter()
    funnel = paired.do()["funnel"]
    end = time.perf_counter()
    own, workers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(end - began, 2),
        "denoise_seconds": round(between - began, 2),
        "pair_seconds": round(end - between, 2),
        "cpu_seconds": round(own.ru_utime + own.ru_stime + workers.ru_utime + workers.ru_stime, 2),
        "peak_gb": round((own.ru_maxrss + cores() * workers.ru_maxrss) * 1024 / 1e9, 3),  # at most: as if all had their peak at once
        "kept": funnel["kept"],
        "pairs": funnel["pairs"],
    }


if __name__ == "__main__":
    main()
