"""What a model's judgement of itself is worth: on the shipped answers, on HHH pairs, and in the priority order.

    python benchmarks/judge.py [--model demo] [--hhh FILE.jsonl] [--scorer NAME ...] [--json]

The check, its scorer and its thresholds are made on the rows of the shipped set whose split is `design`; they are tested on the others
(`test`, not looked at while questions, exemplars and system prompts were designed) and on HHH (BIG-bench; columns dimension, prompt,
chosen, rejected). Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from spalign.config import EngineConfig
from spalign.constitution import Objective, load_constitution
from spalign.engines.transformers import TransformersEngine
from spalign.pipeline.judging import auto_scorers
from spalign.selfeval import Case, Judgement, judge_check, load_labelled, score_responses
from spalign.selfeval.statistics import auc, auc_interval
from spalign.types import Message, Prompt, Response

OBJECTIVES = ("harmlessness", "helpfulness", "honesty")
DIMENSION = {"harmless": "harmlessness", "helpful": "helpfulness", "honest": "honesty"}
Pair = tuple[str, str, str]  # prompt, good answer, bad answer


def rows(objective: str) -> list[dict[str, Any]]:
    text = Path(str(files("spalign").joinpath("calibration", f"{objective}.jsonl"))).read_text()
    return [json.loads(line) for line in text.splitlines()]


def case(prompt: str, response: str, ident: str) -> Case:
    return Case(Prompt(ident, (Message("user", prompt),)), Response(ident, response, (), True))


def paired(objective: str, kinds: Sequence[str], intent: str) -> list[Pair]:
    """Good and bad written answers to one prompt of the test split, where the bad one is of one of `kinds` (none: of any)."""
    by: dict[str, dict[int, dict[str, Any]]] = {}
    for r in rows(objective):
        if r.get("intent") == intent and r["split"] == "test" and r["source"] == "written":
            by.setdefault(r["prompt"], {})[r["label"]] = r
    return [(p, d[1]["response"], d[0]["response"]) for p, d in by.items() if set(d) == {0, 1} and (not kinds or d[0]["kind"] in kinds)]


def scored(
    engine: Any, pairs: Sequence[Pair], objectives: Sequence[Objective], how: dict[str, Judgement]
) -> list[tuple[Response, Response]]:
    cases = [case(p, answer, f"{i}-{side}") for i, (p, *answers) in enumerate(pairs) for side, answer in enumerate(answers)]
    out = score_responses(engine, cases, objectives, how)
    return list(zip(out[::2], out[1::2], strict=True))


def share(wins: Sequence[float]) -> dict[str, Any]:
    n, mean = len(wins), statistics.fmean(wins)
    half = 1.96 * (mean * (1 - mean) / n) ** 0.5
    return {"pairs": n, "share": round(mean, 3), "ci": [round(max(0, mean - half), 3), round(min(1, mean + half), 3)]}


def won(good: Sequence[float], bad: Sequence[float]) -> float:
    return 1.0 if list(good) > list(bad) else 0.5 if list(good) == list(bad) else 0.0


def orders(pairs: Sequence[tuple[Response, Response]], primary: str, secondary: str, threshold: float, band: float) -> dict[str, Any]:
    """How often the good answer comes first: by the priority order with a threshold, by the sum, and with a tie band on the primary."""

    def lexicographic(r: Response) -> tuple[float, float]:
        return min(r.scores[primary], threshold), r.scores[secondary]

    def banded(a: Response, b: Response) -> float:
        lead = a.scores[primary] - b.scores[primary]
        return won([lead], [0.0]) if abs(lead) >= band else won([a.scores[secondary]], [b.scores[secondary]])

    return {
        "priority order": share([won(lexicographic(a), lexicographic(b)) for a, b in pairs]),
        "plain sum": share([won([a.scores[primary] + a.scores[secondary]], [b.scores[primary] + b.scores[secondary]]) for a, b in pairs]),
        "band of 1 SD": share([banded(a, b) for a, b in pairs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--hhh", type=Path, help="HHH pairs as JSONL")
    parser.add_argument("--scorer", nargs="+", default=list(auto_scorers()))
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    args = parser.parse_args()
    say = (lambda *_: None) if args.json else print
    known = {o.name: o for c in ("honest_helpful", "harmless_helpful") for o in load_constitution(c).objectives}
    objectives = [known[n] for n in OBJECTIVES]
    engine = TransformersEngine.load(args.model, EngineConfig())
    split = {(r["objective"], r["prompt"], r["response"]): r["split"] for n in OBJECTIVES for r in rows(n)}
    labelled = load_labelled(None, OBJECTIVES)
    of = {s: [c for c in labelled if split[c.objective, c.case.prompt.text, c.case.response.text] == s] for s in ("design", "test")}
    found = judge_check(engine, objectives, of["design"], args.scorer, diagnose_all=False)
    out: dict[str, Any] = {"model": args.model, "shipped": {}, "hhh": {}, "orders": {}, "recommended": found.recommended}
    hhh: dict[str, list[Pair]] = {}
    if args.hhh:
        for line in args.hhh.read_text().splitlines():
            r = json.loads(line)
            if r["dimension"] in DIMENSION:
                hhh.setdefault(DIMENSION[r["dimension"]], []).append((r["prompt"], r["chosen"], r["rejected"]))
    for o in objectives:
        test = [c for c in of["test"] if c.objective == o.name]
        for name, report in found.reports[o.name].items():
            how = {o.name: report.judgement or Judgement.unchecked(name)}
            answers = score_responses(engine, [c.case for c in test], [o], how)
            row = {"design": [round(report.auc, 3), *(round(v, 3) for v in report.auc_ci)]}
            for source in dict.fromkeys(c.source for c in test):
                kept = [(a.scores[o.name], c) for a, c in zip(answers, test, strict=True) if c.source == source and o.name in a.scores]
                values, labels, prompts = [v for v, _ in kept], [c.label for _, c in kept], [c.case.prompt.id for _, c in kept]
                row[f"test, {source}"] = [round(auc(values, labels), 3), *(round(v, 3) for v in auc_interval(values, labels, prompts))]
            out["shipped"].setdefault(o.name, {})[name] = row
            line = f"{o.name:13} {name:16} {row}"
            if o.name in hhh:
                both = [(a, b) for a, b in scored(engine, hhh[o.name], [o], how) if o.name in a.scores and o.name in b.scores]
                out["hhh"].setdefault(o.name, {})[name] = share([won([a.scores[o.name]], [b.scores[o.name]]) for a, b in both])
                line += f" HHH pairs {out['hhh'][o.name][name]}"
            say(line + (" *" if found.recommended.get(o.name) == name else ""))
    both_objectives = [known["harmlessness"], known["helpfulness"]]
    how = {o.name: j for o in both_objectives if (j := found.judgement(o.name))}
    if len(how) < 2:
        raise SystemExit("no scorer ranks good answers above bad ones on both objectives: there is no order to measure")
    kinds = {
        "ill-meant: harmless before harmful (shipped)": paired("harmlessness", (), "ill_meant"),
        "harmless: helpful before refusal (shipped)": paired("helpfulness", ("needless_refusal",), "harmless"),
        "ill-meant: harmless before harmful (HHH)": hhh.get("harmlessness", []),
        "harmless: helpful before less helpful (HHH)": hhh.get("helpfulness", []),
    }
    threshold = how["harmlessness"].threshold
    assert threshold is not None
    for kind, pairs in kinds.items():
        complete = [(a, b) for a, b in scored(engine, pairs, both_objectives, how) if len(a.scores) == len(b.scores) == 2] if pairs else []
        if complete:
            band = statistics.pstdev([r.scores["harmlessness"] for ab in complete for r in ab])
            out["orders"][kind] = orders(complete, "harmlessness", "helpfulness", threshold, band)
            say(f"{kind}: " + "; ".join(f"{k} {v['share']:.2f} {v['ci']} of {v['pairs']}" for k, v in out["orders"][kind].items()))
    print(json.dumps(out))


if __name__ == "__main__":
    main()
