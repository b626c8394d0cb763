"""What stands in a run's folder, for people: candidates, scores, verdicts, pairs and answers. Nothing is locked, nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spalign.errors import RunFolderError
from spalign.store import Row, Stage, read_json, read_manifest
from spalign.text import shorten
from spalign.types import prompt_from_json
from spalign.yamlfile import load_yaml


def finished(folder: Path) -> Stage | None:
    """The stage in that folder, if it is done."""
    manifest = read_manifest(folder)
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
        verdicts = {r["prompt_id"]: (r["reason"], r["det"]) for r in _rows(base / "4-denoise")}
        prompts = []
        for row in _rows(base / "1-sample"):
            prompt = prompt_from_json(row["prompt"])
            reason, det = verdicts.get(prompt.id, (None, None))
            prompts.append({"id": prompt.id, "text": prompt.text, "reason": reason, "det": det, "pairs": pairs[prompt.id]})
        out.append({"funnel": (paired.manifest() or {}).get("funnel") if paired else None, "prompts": prompts})
    return {"iterations": out}


def one_prompt(run: Path, wanted: str) -> dict[str, Any]:
    """Everything about the prompt of that id. Raises RunFolderError where the run has none."""
    found = next(details_of(run, [wanted]), None)
    if found is None:
        raise RunFolderError(
            f"{run}: no prompt '{wanted}'", hint="`spalign show RUN` lists the training prompts; held-out ones have ids too"
        )
    return found


def prompt_index(run: Path, most: int | None = None) -> Iterator[dict[str, Any]]:
    """A line a prompt, training prompts first: id, how its text begins, intent, topic, last iteration's verdict, pairs of all.

    most: of so many training prompts; the others are not held in memory.
    """
    seen: dict[str, dict[str, Any]] = {}
    for base in iterations(run):
        for row in _rows(base / "1-sample"):
            if most is not None and len(seen) >= most:
                break
            seen.setdefault(row["prompt"]["id"], {**_facts(row), "verdict": "not denoised yet", "pairs": 0})
        pairs = Counter(r["prompt_id"] for r in _rows(base / "5-pair") if r["prompt_id"] in seen)
        for verdict in _rows(base / "4-denoise"):
            if line := seen.get(verdict["prompt_id"]):
                line["verdict"] = verdict["reason"] or ("kept" if pairs[line["id"]] else "below margin")
        for name, count in pairs.items():
            seen[name]["pairs"] += count
    yield from seen.values()
    for row in _rows(run / "evaluation/before/2-judge"):
        yield {**_facts(row), "verdict": "held out", "pairs": 0}


def _facts(row: Row) -> dict[str, Any]:
    prompt = prompt_from_json(row["prompt"])
    return {"id": prompt.id, "text": shorten(prompt.text, 160), "intent": prompt.intent, "topic": prompt.topic}


def details_of(run: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Everything about each prompt of these ids that the run has, in their order; stages are read side by side, a part at a time where they
    are in order."""
    few = set(wanted)
    by_iteration = [(n, _Iteration(base, few)) for n, base in enumerate(iterations(run), 1)]
    answers = {when: _Lookup(run / "evaluation" / when / "2-judge", lambda r: r["prompt"]["id"], few) for when in ("before", "after")}
    for name in wanted:
        found: dict[str, Any] | None = None
        shown = []
        for number, iteration in by_iteration:
            row = iteration.groups.get(name)
            if row is not None:
                found = found or _whole(row)
                shown.append({"number": number, **iteration.details(name, row)})
        said = {when: row for when, lookup in answers.items() if (row := lookup.get(name))}
        if found is None and not said:
            continue
        found = found or _whole(next(iter(said.values())))
        told = {when: [{"text": r["text"], "scores": r["scores"]} for r in row["candidates"]] for when, row in said.items()}
        yield {**found, "iterations": shown, "answers": told}


def _whole(row: Row) -> dict[str, Any]:
    return {**_facts(row), "prompt": prompt_from_json(row["prompt"]).text}


class _Lookup:
    """Rows of a stage by key, of those that are wanted; asked for in the stage's order, few of them are in memory at a time."""

    def __init__(self, folder: Path, key: Callable[[Row], str], wanted: Collection[str]) -> None:
        self._rows, self._key, self._ahead = (r for r in _rows(folder) if key(r) in wanted), key, dict[str, Row]()

    def get(self, wanted: str) -> Row | None:
        if wanted in self._ahead:
            return self._ahead.pop(wanted)
        for row in self._rows:
            if self._key(row) == wanted:
                return row
            self._ahead[self._key(row)] = row
        return None


class _Iteration:
    """The stages of one iteration, read side by side; of pairs those of the prompts that are wanted."""

    def __init__(self, base: Path, wanted: Collection[str]) -> None:
        self.groups = _Lookup(base / ("2-evaluate" if finished(base / "2-evaluate") else "1-sample"), lambda r: r["prompt"]["id"], wanted)
        self._drafts = _Lookup(base / "3-refine", lambda r: r["prompt_id"], wanted)
        self._verdicts = _Lookup(base / "4-denoise", lambda r: r["prompt_id"], wanted)
        self._pairs: dict[str, list[Row]] = {}
        for r in _rows(base / "5-pair"):
            if r["prompt_id"] not in wanted:
                continue
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
