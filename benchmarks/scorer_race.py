"""`scorer: auto` against every fixed scorer: the same candidates, what each scorer keeps of them, and the models that come out.

    python benchmarks/scorer_race.py OUT [--config configs/demo.yaml] [--scorer NAME ...] [--labels FILE]

Runs the configuration once with `scorer: auto`, then once more for each fixed scorer on a copy of that run, so that prompts and samples are
the same. No scorer can be the judge of this: the held-out answers of all models go, without the model's name and shuffled, to
OUT/answers.jsonl. Read them, write lines {"id": .., "harmlessness": 0 or 1, "helpfulness": 0 or 1}, and give that file as --labels. About
an hour on two cores for the demo; what is done already is not done again. Prints a line a scorer, then one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from spalign.evaluation import bootstrap_mean
from spalign.selfeval import ENSEMBLE, SCORERS, is_relative

FIXED = (*(n for n in SCORERS if not is_relative(n)), ENSEMBLE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--scorer", nargs="+", default=list(FIXED))
    parser.add_argument("--labels", type=Path)
    args = parser.parse_args()
    done: dict[str, Any] = {}
    for name in ("auto", *args.scorer):
        folder = args.out / name
        if name != "auto" and not folder.exists():
            shutil.copytree(args.out / "auto", folder)
        stopped = _run(args, name)
        done[name] = {"stopped": stopped} if stopped else json.loads((folder / "summary.json").read_text())["funnel"]
    ended = [name for name, row in done.items() if "stopped" not in row]
    answers = {"before": _answers(args.out / "auto", "before")} | {name: _answers(args.out / name, "after") for name in ended}
    _write_blind(args.out / "answers.jsonl", answers)
    labels = {r["id"]: r for r in map(json.loads, args.labels.open())} if args.labels else {}
    out: dict[str, Any] = {}
    for name, found in done.items():
        row = {k: found[k] for k in ("kept", "pairs", "stopped") if k in found}
        if labels and name in ended:
            row |= {o: _better(answers["before"], answers[name], labels, o) for o in ("harmlessness", "helpfulness")}
        out[name] = row
        print(f"{name:16} {row}", flush=True)
    print(json.dumps(out))


def _run(args: argparse.Namespace, name: str) -> str | None:
    """Runs, or completes, one arm. Returns why it stopped, if it did: a scorer may leave nothing to train on, or its model collapse."""
    own = [] if name == "auto" else ["--set", f"self_evaluation.scorer={name}"]
    settings = ["--set", f"name={name}", "--set", f"runs_dir={args.out}", "--set", "compare=[]", *own]
    resume = ["--resume"] if (args.out / name).exists() else []
    command = [Path(sys.executable).with_name("spalign"), "run", args.config, *settings, *resume]
    ended = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    said = [line for line in ended.stderr.splitlines() if line.startswith(("error:", "stopped:"))]
    return " ".join(said) or "failed" if ended.returncode else None


def _answers(run: Path, when: str) -> dict[str, list[tuple[str, str, str]]]:
    """Prompt id -> (prompt, intent, answer) of the held-out answers."""
    rows = [json.loads(line) for part in sorted((run / f"evaluation/{when}/1-sample").glob("part-*.jsonl")) for line in part.open()]
    return {
        r["prompt"]["id"]: [(r["prompt"]["messages"][-1]["content"], r["prompt"]["intent"], c["text"]) for c in r["candidates"]]
        for r in rows
    }


def _write_blind(path: Path, answers: dict[str, dict[str, list[tuple[str, str, str]]]]) -> None:
    rows = {_id(*a[::2]): a for of_run in answers.values() for group in of_run.values() for a in group}
    ids = sorted(rows)
    random.Random(0).shuffle(ids)
    lines = [json.dumps({"id": i, "intent": rows[i][1], "prompt": rows[i][0], "answer": rows[i][2]}) for i in ids]
    path.write_text("\n".join(lines) + "\n")


def _id(prompt: str, answer: str) -> str:
    return hashlib.sha256(f"{prompt}\0{answer}".encode()).hexdigest()[:12]


def _better(before: Any, after: Any, labels: dict[str, Any], objective: str) -> dict[str, Any]:
    """The share of good answers, and how much it rose, with its 95% interval: paired bootstrap over prompts."""

    def mean(group: list[tuple[str, str, str]]) -> float:
        return sum(float(labels[_id(p, a)][objective]) for p, _, a in group) / len(group)

    rise = bootstrap_mean([mean(after[p]) - mean(before[p]) for p in before], resamples=2000, seed=0)
    return {"good": round(sum(map(mean, after.values())) / len(after), 3), "rise": [round(x, 3) for x in (rise.mean, rise.low, rise.high)]}


if __name__ == "__main__":
    main()
