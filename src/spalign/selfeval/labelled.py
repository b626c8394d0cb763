"""Labelled answers, to measure a judge against: the rows that ship with the package, or the user's own."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from spalign.errors import PromptError
from spalign.prompts import Mistake, read_file, refuse
from spalign.selfeval.base import Case
from spalign.types import Message, Prompt, Response

COLUMNS = ("prompt", "response", "objective", "label")
_GOOD, _BAD = {"1", "1.0", "good", "yes", "true"}, {"0", "0.0", "bad", "no", "false"}


@dataclass(frozen=True, slots=True)
class LabelledCase:
    """label: 1 where people call the answer good by the objective, 0 where they call it bad. source: whose kind of text the answer is."""

    case: Case
    objective: str
    label: int
    source: str = "all"


def shipped_objectives() -> tuple[str, ...]:
    """Objectives for which labelled answers ship with the package."""
    return tuple(sorted(f.name.removesuffix(".jsonl") for f in files("spalign").joinpath("calibration").iterdir()))


def load_labelled(path: Path | None, objectives: Sequence[str]) -> list[LabelledCase]:
    """The labelled answers of `objectives`: from `path` (JSONL, CSV, Parquet: prompt, response, objective, label), or shipped.

    An optional column `source` tells kinds of text apart (written by people, sampled from a model): each is measured by itself.

    Answers to one prompt become each other's rivals. Raises PromptError with all mistakes at once, and for an objective of which the rows
    do not hold both labels, at least two of each.
    """
    sources = (
        [path]
        if path
        else [Path(str(files("spalign").joinpath("calibration", f"{o}.jsonl"))) for o in objectives if o in shipped_objectives()]
    )
    rows: list[Mapping[str, Any]] = []
    mistakes: list[Mistake] = []
    for source in sources:
        table = read_file(source, (*COLUMNS, "source"))
        for row in table.rows:
            if isinstance(row, Mistake):
                mistakes.append(row)
            elif found := list(_mistakes(row.where, row.values)):
                mistakes += found
            else:
                rows.append(row.values)
    if mistakes:
        refuse(mistakes)
    mine = [r for r in rows if r["objective"] in objectives]
    for o in objectives:
        labels = [_label(r["label"]) for r in mine if r["objective"] == o]
        if min(labels.count(0), labels.count(1)) < 2:
            where = str(path) if path else "the package"
            raise PromptError(
                f"{where}: objective '{o}' has {labels.count(1)} good and {labels.count(0)} bad labelled answers; both need at least two",
                hint="bring your own (columns prompt, response, objective, label) by --data or self_evaluation.labelled, "
                "or name a scorer and thresholds in the config",
            )
    return _cases(mine)


def fingerprint(cases: Sequence[LabelledCase]) -> str:
    """SHA-256 of prompts, answers, objectives and labels, in order."""
    rows = [[c.case.prompt.text, c.case.response.text, c.objective, c.label, c.source] for c in cases]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _cases(rows: Sequence[Mapping[str, Any]]) -> list[LabelledCase]:
    responses = [Response(f"row-{i}", str(r["response"]), (), True) for i, r in enumerate(rows)]
    together: dict[tuple[str, str], list[Response]] = defaultdict(list)
    for r, response in zip(rows, responses, strict=True):
        together[r["objective"], r["prompt"]].append(response)
    return [
        LabelledCase(
            Case(Prompt(r["prompt"], (Message("user", r["prompt"]),)), response, tuple(together[r["objective"], r["prompt"]])),
            r["objective"],
            _label(r["label"]),
            str(r.get("source") or "all"),
        )
        for r, response in zip(rows, responses, strict=True)
    ]


def _label(value: object) -> int:
    return int(str(value).strip().lower() in _GOOD)


def _mistakes(where: str, row: Mapping[str, Any]) -> list[Mistake]:
    out = [
        Mistake(where, f"no text in the column '{c}'", "give every row a prompt, a response, an objective and a label")
        for c in COLUMNS[:3]
        if not isinstance(row.get(c), str) or not str(row[c]).strip()
    ]
    if str(row.get("label", "")).strip().lower() not in _GOOD | _BAD:
        out.append(Mistake(where, f"the label is {row.get('label')!r}", "write 1 for a good answer and 0 for a bad one"))
    return out
