"""How well a model judges labelled answers with each scorer of spalign: AUC, equal-error threshold, seconds.

    python benchmarks/judge_auc.py [--model demo] [--scorer yes_no likert] [--data FILE.jsonl ...]

Prints a line per objective and scorer, then one JSON line. The shipped rows are in src/spalign/calibration/.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.resources import files
from pathlib import Path

from spalign.config import EngineConfig, SelfEvaluationConfig
from spalign.constitution import load_constitution
from spalign.engines.transformers import TransformersEngine
from spalign.selfeval import score_responses
from spalign.types import Message, Prompt, Response


def auc(good: list[float], bad: list[float]) -> float:
    return sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / (len(good) * len(bad))


def equal_error_threshold(good: list[float], bad: list[float]) -> tuple[float, float]:
    """The score at which as large a share of the good lies below as of the bad lies at or above, and that share."""
    cuts = sorted({*good, *bad})
    below = lambda t: sum(g < t for g in good) / len(good)  # noqa: E731
    above = lambda t: sum(b >= t for b in bad) / len(bad)  # noqa: E731
    best = min(cuts, key=lambda t: (abs(below(t) - above(t)), t))
    return best, (below(best) + above(best)) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--scorer", nargs="+", default=["yes_no", "likert"])
    parser.add_argument("--data", nargs="*", type=Path)
    args = parser.parse_args()
    paths = args.data or [
        Path(str(files("spalign").joinpath("calibration", f"{o}.jsonl"))) for o in ("harmlessness", "helpfulness", "honesty")
    ]
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    objectives = {o.name: o for c in ("honest_helpful", "harmless_helpful") for o in load_constitution(c).objectives}
    engine = TransformersEngine.load(args.model, EngineConfig())
    out: dict[str, dict[str, dict[str, float]]] = {}
    for name in dict.fromkeys(r["objective"] for r in rows):
        mine = [r for r in rows if r["objective"] == name]
        items = [(Prompt(r["id"], (Message("user", r["prompt"]),)), Response(r["id"], r["response"], (), True)) for r in mine]
        for scorer in args.scorer:
            start = time.perf_counter()
            scored = score_responses(engine, items, [objectives[name]], SelfEvaluationConfig(scorer=scorer))
            seconds = time.perf_counter() - start
            good, bad = (
                [s.scores[name] for s, r in zip(scored, mine, strict=True) if name in s.scores and r["label"] == v] for v in (1, 0)
            )
            if not good or not bad:
                out.setdefault(name, {})[scorer] = {"unscored": len(mine)}
                print(f"{name:13} {scorer:8} nothing scored")
                continue
            cut, error = equal_error_threshold(good, bad)
            out.setdefault(name, {})[scorer] = {
                "auc": round(auc(good, bad), 3),
                "threshold": round(cut, 2),
                "error_at_threshold": round(error, 3),
                "unscored": len(mine) - len(good) - len(bad),
                "distinct": len({*good, *bad}),
                "seconds_per_100": round(100 * seconds / len(mine), 2),
            }
            print(f"{name:13} {scorer:8} {out[name][scorer]}")
    print(json.dumps({"model": args.model, "objectives": out}))


if __name__ == "__main__":
    main()
