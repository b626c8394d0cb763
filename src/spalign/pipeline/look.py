"""What stands in a run's folder, for people: candidates, scores, verdicts, pairs and answers. Nothing is locked, nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spalign.errors import RunFolderError
from spalign.store import Row, Stage, read_json
from spalign.text import shorten
from spalign.types import prompt_from_json
from spalign.yamlfile import load_yaml


def finished(folder: Path) -> Stage | None:
    """The stage in that folder, if it is done."""
    manifest = read_json(folder / "manifest.json")
    return None if manifest is None else Stage(folder, manifest["inputs"])


def iterations(run: Path) -> list[Path]:
    """Raises RunFolderError where there is no run."""
    if not (run / "config.yaml").is_file():
        raise RunFolderError(f"{run}: no run", hint="name the folder of a run, for example runs/demo")
    return sorted(run.glob("iteration-[0-9]*"), key=lambda p: int(p.name.removeprefix("iteration-")))


def overview(run: Path) -> dict[str, Any]:
    """Each iteration's funnel (None where it is not paired yet) and prompts with their verdicts."""
    out = []
    for base in iterations(run):
        paired = finished(base / "5-pair")
        pairs = Counter(r["prompt_id"] for r in paired.rows()) if paired else Counter[str]()
        verdicts = {r["prompt_id"]: r for r in _rows(base / "4-denoise")}
        prompts = []
        for row in _rows(base / "1-sample"):
            prompt = prompt_from_json(row["prompt"])
            verdict = verdicts.get(prompt.id, {})
            told = {
                "id": prompt.id,
                "text": prompt.text,
                "reason": verdict.get("reason"),
                "det": verdict.get("det"),
                "pairs": pairs[prompt.id],
            }
            prompts.append(told)
        out.append({"funnel": (paired.manifest() or {}).get("funnel") if paired else None, "prompts": prompts})
    return {"iterations": out}


def one_prompt(run: Path, wanted: str) -> dict[str, Any]:
    """Everything about the prompt of that id. Raises RunFolderError where the run has none."""
    if wanted not in {p["id"] for p in prompt_index(run)}:
        raise RunFolderError(
            f"{run}: no prompt '{wanted}'", hint="`spalign show RUN` lists the training prompts; held-out ones have ids too"
        )
    return next(details_of(run, [wanted]))


def prompt_index(run: Path) -> Iterator[dict[str, Any]]:
    """A line a prompt, training prompts first: id, how its text begins, intent, topic, last iteration's verdict, pairs of all."""
    seen: dict[str, dict[str, Any]] = {}
    for base in iterations(run):
        verdicts = {r["prompt_id"]: r for r in _rows(base / "4-denoise")}
        pairs = Counter(r["prompt_id"] for r in _rows(base / "5-pair"))
        for row in _rows(base / "1-sample"):
            line = seen.setdefault(row["prompt"]["id"], {**_facts(row), "verdict": "not denoised yet", "pairs": 0})
            if verdict := verdicts.get(line["id"]):
                line["verdict"] = verdict["reason"] or ("kept" if pairs[line["id"]] else "below margin")
            line["pairs"] += pairs[line["id"]]
    yield from seen.values()
    for row in _rows(run / "evaluation/before/2-judge"):
        yield {**_facts(row), "verdict": "held out", "pairs": 0}


def _facts(row: Row) -> dict[str, Any]:
    prompt = prompt_from_json(row["prompt"])
    return {"id": prompt.id, "text": shorten(prompt.text, 160), "intent": prompt.intent, "topic": prompt.topic}


def details_of(run: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Everything about each prompt of these ids, in their order; stages are read side by side, a part at a time where they are in order."""
    by_iteration = [(n, _Iteration(base)) for n, base in enumerate(iterations(run), 1)]
    answers = {when: _Lookup(run / "evaluation" / when / "2-judge", lambda r: r["prompt"]["id"]) for when in ("before", "after")}
    for name in wanted:
        found: dict[str, Any] | None = None
        shown = []
        for number, iteration in by_iteration:
            row = iteration.groups.get(name)
            if row is not None:
                found = found or _whole(row)
                shown.append({"number": number, **iteration.details(name, row)})
        said = {when: row for when, lookup in answers.items() if (row := lookup.get(name))}
        if found is None:
            found = _whole(next(iter(said.values())))
        told = {when: [{"text": r["text"], "scores": r["scores"]} for r in row["candidates"]] for when, row in said.items()}
        yield {**found, "iterations": shown, "answers": told}


def _whole(row: Row) -> dict[str, Any]:
    return {**_facts(row), "prompt": prompt_from_json(row["prompt"]).text}


class _Lookup:
    """Rows of a stage by key; asked for in the stage's order, few of them are in memory at a time."""

    def __init__(self, folder: Path, key: Callable[[Row], str]) -> None:
        self._rows, self._key, self._ahead = _rows(folder), key, dict[str, Row]()

    def get(self, wanted: str) -> Row | None:
        if wanted in self._ahead:
            return self._ahead.pop(wanted)
        for row in self._rows:
            if self._key(row) == wanted:
                return row
            self._ahead[self._key(row)] = row
        return None


class _Iteration:
    """The stages of one iteration, read side by side."""

    def __init__(self, base: Path) -> None:
        self.groups = _Lookup(base / ("2-evaluate" if finished(base / "2-evaluate") else "1-sample"), lambda r: r["prompt"]["id"])
        self._drafts = _Lookup(base / "3-refine", lambda r: r["prompt_id"])
        self._verdicts = _Lookup(base / "4-denoise", lambda r: r["prompt_id"])
        self._pairs: dict[str, list[Row]] = {}
        for r in _rows(base / "5-pair"):
            few = {k: r[k] for k in ("id", "margin", "weight", "decided_by")}
            self._pairs.setdefault(r["prompt_id"], []).append(few)

    def details(self, name: str, row: Row) -> dict[str, Any]:
        drafts: Mapping[str, Any] = self._drafts.get(name) or {}
        kinds = [("candidate", r) for r in row["candidates"]]
        kinds += [(kind, r) for kind in ("refined", "placebo") for r in drafts.get(kind, ())]
        names = {r["id"]: r["id"].removeprefix(f"{name}/") for _, r in kinds}
        pairs = []
        for r in self._pairs.get(name, ()):
            chosen, rejected = _sides(r["id"], names)
            pairs.append({"chosen": chosen, "rejected": rejected, **{k: r[k] for k in ("margin", "weight", "decided_by")}})
        return {
            "verdict": self._verdicts.get(name),
            "responses": [
                {
                    "name": names[r["id"]],
                    "kind": f"{kind} {r['system']}".strip(),
                    **{k: r[k] for k in ("text", "scores", "finished")},
                }
                for kind, r in kinds
            ],
            "pairs": pairs,
        }


def _sides(pair: str, names: Mapping[str, str]) -> tuple[str, str]:
    """Short names of `CHOSEN>REJECTED`; a prompt's id may hold a > itself."""
    cuts = (i for i, c in enumerate(pair) if c == ">" and pair[:i] in names and pair[i + 1 :] in names)
    cut = next(cuts, None)
    return ("?", "?") if cut is None else (names[pair[:cut]], names[pair[cut + 1 :]])


def summary_of(run: Path) -> dict[str, Any]:
    """name, config, and summary of a finished run. Raises RunFolderError."""
    iterations(run)
    summary = read_json(run / "summary.json")
    if summary is None:
        raise RunFolderError(f"{run}: not finished, there is no summary.json", hint="finish it: spalign run CONFIG")
    return {"name": str(run), "config": on_record(run)[0], "summary": summary}


def on_record(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run's configuration and constitution, as they stand in its folder. Raises RunFolderError where one is missing or damaged."""
    config, constitution = (load_yaml(run / f"{name}.yaml", RunFolderError)[0] for name in ("config", "constitution"))
    return config, constitution


def _rows(folder: Path) -> Iterator[Row]:
    stage = finished(folder)
    if stage is not None:
        yield from stage.rows()
