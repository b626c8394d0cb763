"""The report of a run: what stands in its folder, gathered for `report.html`."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
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
    index = list(islice(prompt_index(run, PROMPTS + 1), PROMPTS + 1))
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
    kept, dets = set[str](), array("d")
    for verdict in denoised.rows() if denoised else ():
        if verdict["reason"] is None:
            kept.add(verdict["prompt_id"])
        if verdict["det"]:
            dets.append(verdict["det"])
    margins, weights = array("d"), array("d")
    for pair in paired.rows() if paired else ():
        margins.append(pair["margin"])
        weights.append(pair["weight"])
    log = read_json(base / "6-train/log.json") or {}
    plane, sampled = _plane(base, objectives, kept)
    facts = (denoised.manifest() or {}) if denoised else {}
    return {
        "funnel": (paired.manifest() or {})["funnel"] if paired else None,
        "consistency": _consistency(facts.get("consistency")),
        "plane": plane,
        "sampled": sampled,
        "dets": _spread(dets),
        "tau": facts.get("tau"),
        "margins": _spread(margins),
        "weights": _spread(weights),
        "steps": log.get("steps", []),
        "collapsed": (trained.manifest() or {}).get("collapsed") if trained else None,
    }


def _consistency(found: Mapping[str, Mapping[str, int]] | None) -> str:
    if not found:
        return ""
    told = [f"{who} {of['passed']} of {of['tested']}" for who, of in found.items() if of["tested"]]
    return f"The consistency rule passes: {', '.join(told)}." if told else ""


class _Points:
    """Scores on the first two objectives, of responses that have both; two numbers each, however many there are."""

    def __init__(self, objectives: list[str]) -> None:
        self._objectives, self.x, self.y = objectives[:2], array("d"), array("d")

    def add(self, response: Mapping[str, Any]) -> None:
        s = response["scores"]
        if all(o in s for o in self._objectives):
            self.x.append(round(s[self._objectives[0]], 2))
            self.y.append(round(s[self._objectives[1]], 2))

    def __len__(self) -> int:
        return len(self.x)

    def spread(self) -> list[list[float]]:
        return [list(point) for point in zip(_spread(self.x), _spread(self.y), strict=True)]


def _plane(base: Path, objectives: list[str], kept: Collection[str]) -> tuple[list[Any], str]:
    """[name, colour, points] of dropped and kept candidates and of refined responses."""
    dropped, held, better = (_Points(objectives) for _ in range(3))
    scored, refined = finished(base / "2-evaluate"), finished(base / "3-refine")
    if len(objectives) < 2 or scored is None:
        return [], ""
    for row in scored.rows():
        for response in row["candidates"]:
            (held if row["prompt"]["id"] in kept else dropped).add(response)
    for row in refined.rows() if refined else ():
        for response in row["refined"]:
            better.add(response)
    kinds = (("candidates of dropped prompts", 3, dropped), ("candidates of kept prompts", 0, held), ("refined", 2, better))
    most = max(len(points) for _, _, points in kinds)
    plane = [[name, colour, points.spread()] for name, colour, points in kinds if len(points)]
    return plane, f"at most {POINTS:,} of each kind, of up to {most:,}" if most > POINTS else ""


def _heldout(run: Path, objectives: list[str]) -> list[Any]:
    out = []
    for when, colour in (("before", 3), ("after", 0)):
        stage = finished(run / "evaluation" / when / "2-judge")
        if stage is None or len(objectives) < 2:
            return []
        points = _Points(objectives)
        for row in stage.rows():
            for response in row["candidates"]:
                points.add(response)
        out.append([when, colour, points.spread()])
    return out


def _spread(values: Sequence[float]) -> list[float]:
    return list(values) if len(values) <= POINTS else [values[i * len(values) // POINTS] for i in range(POINTS)]
