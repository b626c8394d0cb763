"""The report of a run: what stands in its folder, gathered for `report.html`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from spalign.pipeline.look import details_of, finished, iterations, on_record, prompt_index
from spalign.report.page_of import page_of
from spalign.store import clear_errors, read_json

PROMPTS = 20_000
"""Most prompts that a report has the texts of."""
POINTS = 4000
"""Most dots of a kind in a picture; of more, evenly spread ones are shown, which the picture says."""


def write_report(run: Path) -> Path:
    """`report.html` in the run's folder, of whatever is finished there. Raises RunFolderError where there is no run."""
    bases = iterations(run)
    summary = read_json(run / "summary.json")
    config, constitution = on_record(run)
    objectives = [o["name"] for o in constitution["objectives"]]
    index = list(islice(prompt_index(run), PROMPTS + 1))
    more = f"; the first {PROMPTS:,} prompts" if len(index) > PROMPTS else ""
    index = index[:PROMPTS]
    data = {
        "name": config["name"],
        "about": f"{config['model']}, constitution {config['constitution']}, recipe {config['recipe']}, seed {config['seed']}{more}",
        "objectives": objectives,
        "summary": summary and {k: v for k, v in summary.items() if k not in ("transcripts", "versions", "tokens", "seconds")},
        "iterations": [_iteration(base, objectives) for base in bases],
        "heldout": _heldout(run, objectives),
        "cost": [[name, s, (summary or {}).get("tokens", {}).get(name, 0)] for name, s in ((summary or {}).get("seconds") or {}).items()],
        "prompts": index,
    }
    path = run / "report.html"
    half = path.with_name(path.name + ".tmp")
    with clear_errors(path), half.open("w", encoding="utf-8", errors="replace") as f:
        f.writelines(page_of(data, details_of(run, [p["id"] for p in index])))
    with clear_errors(path):
        half.rename(path)
    return path


def _iteration(base: Path, objectives: list[str]) -> dict[str, Any]:
    paired, denoised, trained = (finished(base / name) for name in ("5-pair", "4-denoise", "6-train"))
    verdicts = {r["prompt_id"]: r for r in denoised.rows()} if denoised else {}
    log = read_json(base / "6-train/log.json") or {}
    pairs = list(paired.rows()) if paired else []
    plane, sampled = _plane(base, objectives, verdicts)
    facts = (denoised.manifest() or {}) if denoised else {}
    return {
        "funnel": (paired.manifest() or {})["funnel"] if paired else None,
        "consistency": _consistency(facts.get("consistency")),
        "plane": plane,
        "sampled": sampled,
        "dets": _spread([v["det"] for v in verdicts.values() if v["det"]]),
        "tau": facts.get("tau"),
        "margins": _spread([r["margin"] for r in pairs]),
        "weights": _spread([r["weight"] for r in pairs]),
        "steps": log.get("steps", []),
        "collapsed": (trained.manifest() or {}).get("collapsed") if trained else None,
    }


def _consistency(found: Mapping[str, Mapping[str, int]] | None) -> str:
    if not found:
        return ""
    told = [f"{who} {of['passed']} of {of['tested']}" for who, of in found.items() if of["tested"]]
    return f"The consistency rule passes: {', '.join(told)}." if told else ""


def _plane(base: Path, objectives: list[str], verdicts: Mapping[str, Any]) -> tuple[list[Any], str]:
    """[name, colour, points] of dropped and kept candidates and of refined responses."""
    kinds: dict[str, list[list[float]]] = {"candidates of dropped prompts": [], "candidates of kept prompts": [], "refined": []}
    scored, refined = finished(base / "2-evaluate"), finished(base / "3-refine")
    if len(objectives) < 2 or scored is None:
        return [], ""

    def place(response: Mapping[str, Any]) -> list[float] | None:
        s = response["scores"]
        return [round(s[objectives[0]], 2), round(s[objectives[1]], 2)] if all(o in s for o in objectives[:2]) else None

    for row in scored.rows():
        state = "kept" if verdicts.get(row["prompt"]["id"], {"reason": "?"})["reason"] is None else "dropped"
        kinds[f"candidates of {state} prompts"] += [p for r in row["candidates"] if (p := place(r))]
    for row in refined.rows() if refined else ():
        kinds["refined"] += [p for r in row["refined"] if (p := place(r))]
    most = max(map(len, kinds.values()))
    colours = (3, 0, 2)
    plane = [[name, colour, _spread(points)] for (name, points), colour in zip(kinds.items(), colours, strict=True) if points]
    return plane, f"at most {POINTS:,} of each kind, of up to {most:,}" if most > POINTS else ""


def _heldout(run: Path, objectives: list[str]) -> list[Any]:
    out = []
    for when, colour in (("before", 3), ("after", 0)):
        stage = finished(run / "evaluation" / when / "2-judge")
        if stage is None or len(objectives) < 2:
            return []
        scores = [r["scores"] for row in stage.rows() for r in row["candidates"]]
        points = [[round(s[objectives[0]], 2), round(s[objectives[1]], 2)] for s in scores if all(o in s for o in objectives[:2])]
        out.append([when, colour, _spread(points)])
    return out


def _spread(values: list[Any]) -> list[Any]:
    return values if len(values) <= POINTS else [values[i * len(values) // POINTS] for i in range(POINTS)]
